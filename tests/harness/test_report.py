import base64
import html.parser
import math
import re
import sys

import numpy as np
import pytest
from PIL import Image

from tmdjax.harness.report import (
    claim_row,
    format_value,
    image_grid,
    line_plot,
    text_table,
    write_report,
)


def pixels(path):
    with Image.open(path) as picture:
        return picture.mode, np.asarray(picture)


def test_grid_places_every_image_and_scales_it(tmp_path):
    levels = [-1.0, -0.5, 0.0, 0.5, 1.0]
    images = np.stack([np.full((3, 2, 1), v) for v in levels])
    images[4, 0, 1] = -1
    path = image_grid(images, tmp_path / "a" / "grid.png", columns=3, scale=2)
    mode, grid = pixels(path)
    assert mode == "L"
    assert grid.shape == (3 * 2 * 2 + 2, 2 * 2 * 3 + 4)
    assert [grid[0, x] for x in (0, 6, 12)] == [0, 64, 128]
    last = grid[8:14, 6:10]
    np.testing.assert_array_equal(last[:2, 2:], 0)
    np.testing.assert_array_equal(last[2:], 255)
    assert (grid[8:, 12:] == 255).all()  # the place of a sixth image
    assert (grid[6:8] == 255).all()


def test_grid_keeps_colours_and_clips(tmp_path):
    images = np.array([1.0, -1.0, 7.0]).reshape(1, 1, 1, 3)
    mode, grid = pixels(image_grid(images, tmp_path / "grid.png", scale=1))
    assert mode == "RGB"
    assert grid.tolist() == [[[255, 0, 255]]]


@pytest.mark.parametrize("channels", [1, 3])
def test_row_labels_stand_left_of_their_rows(tmp_path, channels):
    images = -np.ones((4, 6, 6, channels))
    _, bare = pixels(image_grid(images, tmp_path / "bare.png", columns=2))
    path = image_grid(images, tmp_path / "grid.png", 2, row_labels=["1 step", "|"])
    _, grid = pixels(path)
    margin = grid.shape[1] - bare.shape[1]
    np.testing.assert_array_equal(grid[:, margin:], bare)
    dark = (grid[:, :margin].reshape(grid.shape[0], -1) < 128).sum(axis=1)
    assert dark[:24].sum() > dark[26:].sum() > 0


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((2, 4, 4), {}, "shape (2, 4, 4); give [n, height, width, channel]"),
        ((2, 4, 4, 2), {}, "1 or 3 channels"),
        ((0, 4, 4, 1), {}, "n >= 1"),
        ((2, 4, 4, 1), {"columns": 0}, "columns=0 and scale=4 must be at least 1"),
        ((2, 4, 4, 1), {"scale": 0}, "scale=0"),
        (
            (4, 4, 4, 1),
            {"columns": 2, "row_labels": ["a"]},
            "1 row labels for 2 rows (4 images in 2 columns)",
        ),
    ],
)
def test_grid_refuses_bad_input(tmp_path, shape, options, message):
    with pytest.raises(ValueError) as caught:
        image_grid(np.zeros(shape), tmp_path / "grid.png", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "grid.png").exists()


def test_grid_names_a_non_finite_pixel(tmp_path):
    images = np.zeros((2, 2, 2, 1))
    images[1, 0, 1, 0] = math.nan
    with pytest.raises(ValueError, match=r"at index \(1, 0, 1, 0\)"):
        image_grid(images, tmp_path / "grid.png")


def test_line_plot_writes_a_png_that_depends_on_its_data(tmp_path):
    pytest.importorskip("matplotlib")
    stateful = "matplotlib.pyplot" in sys.modules
    x = np.arange(1, 5)
    labels = ("quality against NFE", "NFE", "distance")
    one = line_plot({"uniform": (x, x)}, tmp_path / "f" / "one.png", *labels)
    two = line_plot({"uniform": (x, x[::-1])}, tmp_path / "two.png", *labels)
    log = line_plot({"uniform": (x, x)}, tmp_path / "log.png", *labels, log_y=True)
    pictures = [pixels(path)[1] for path in (one, two, log)]
    assert all(p.ndim == 3 and p.min() < 128 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 3
    assert ("matplotlib.pyplot" in sys.modules) == stateful


def test_line_plot_without_matplotlib_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "one.png"
    assert line_plot({"a": ([1], [2])}, path, "t", "x", "y") is None
    assert "pip install 'tmdjax[demo]'" in caplog.text
    assert not path.exists()


@pytest.mark.parametrize(
    "series, message",
    [
        ({}, "no series to plot in 't'"),
        ({"a": ([1, 2], [1])}, "series 'a' has x of shape (2,) and y of shape (1,)"),
        ({"a": (1, 2)}, "two arrays of one length"),
    ],
)
def test_line_plot_refuses_bad_series(tmp_path, series, message):
    with pytest.raises(ValueError) as caught:
        line_plot(series, tmp_path / "one.png", "t", "x", "y")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (123456, "123456"),
        (0.000123456, "0.0001235"),
        (1234.56, "1235"),
        (np.float32(0.5), "0.5"),
        (math.nan, "nan"),
        (True, "True"),
        ("a", "a"),
    ],
)
def test_cells(value, text):
    assert format_value(value) == text


def test_text_table_aligns_numbers_right_and_text_left():
    rows = [{"grid": "uniform", "nfe": 4, "w2": 1 / 3}, {"grid": "bellman", "nfe": 16}]
    assert text_table(rows).splitlines() == [
        "grid     nfe      w2",
        "-------  ---  ------",
        "uniform    4  0.3333",
        "bellman   16       -",
    ]
    assert text_table(rows, ["nfe", "grid"]).splitlines()[2] == "  4  uniform"
    assert text_table([], ["a", "b"]).splitlines() == ["a  b", "-  -"]


CLAIM = {
    "id": "B1",
    "statement": "fewer <steps> & better",
    "published": None,
    "threshold": 1.5,
    "direction": "greater",
    "ours": [1.0] * 5,
    "value": 1.23456,
    "ci95": [1.1, 1.4],
    "verdict": "not reproduced",
}


def test_claim_row_says_bound_interval_and_seeds():
    row = claim_row(CLAIM)
    assert row["95 % interval"] == "[1.1, 1.4]"
    assert row["threshold"] == "> 1.5"
    assert row["seeds"] == 5
    row = claim_row(CLAIM | {"ci95": [None, None], "threshold": None})
    assert row["95 % interval"] is None
    assert row["threshold"] is None


class Page(html.parser.HTMLParser):
    """Checks that tags close in order; keeps text, tags and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_self_contained_escaped_page(tmp_path):
    nasty = "<script>alert('x')</script> & \"q\""
    grid = image_grid(np.zeros((1, 2, 2, 1)), tmp_path / "grid.png")
    path = write_report(
        tmp_path / "out" / "report.html",
        title=nasty,
        command=f"run --config={nasty}",
        environment={nasty: nasty, "{braces}": 1},
        tables=[(nasty, [{nasty: nasty, "w2": 0.123456}])],
        figures=[(nasty, grid), ("curve", None)],
        claims=[CLAIM],
    )
    source = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == []
    assert "script" not in page.tags
    assert page.text.count(nasty) == 9
    assert "fewer <steps> & better" in page.text
    assert "0.1235" in page.text
    assert "curve: left out" in page.text
    (link,) = page.links
    kind, data = link.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == grid.read_bytes()
    assert not re.search(r"https?://|@import|url\(", source)
    assert 'name="viewport"' in source
    assert "color-scheme: light dark" in source
