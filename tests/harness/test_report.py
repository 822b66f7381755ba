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


def plot(path, series, **options):
    return line_plot(series, path, "quality against NFE", "NFE", "distance", **options)


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
    assert mode == "RGB" and grid.tolist() == [[[255, 0, 255]]]


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


def test_grid_refuses_bad_input(tmp_path, refused):
    def grid_refused(words, *shape, **options):
        images = options.pop("images", np.zeros(shape))
        refused(words, image_grid, images, tmp_path / "grid.png", **options)

    words = r"shape \(2, 4, 4\); give \[n, height, width, channel\]"
    grid_refused(words, 2, 4, 4)
    grid_refused("1 or 3 channels", 2, 4, 4, 2)
    grid_refused("n >= 1", 0, 4, 4, 1)
    words = "columns=0 and scale=4 must be at least 1"
    grid_refused(words, 2, 4, 4, 1, columns=0)
    grid_refused("scale=0", 2, 4, 4, 1, scale=0)
    words = r"1 row labels for 2 rows \(4 images in 2 columns\)"
    grid_refused(words, 4, 4, 4, 1, columns=2, row_labels=["a"])
    images = np.zeros((2, 2, 2, 1))
    images[1, 0, 1, 0] = math.nan
    grid_refused(r"at index \(1, 0, 1, 0\)", images=images)
    assert not (tmp_path / "grid.png").exists()


def test_line_plot_writes_a_png_that_depends_on_its_data(tmp_path):
    pytest.importorskip("matplotlib")
    stateful = "matplotlib.pyplot" in sys.modules
    x = np.arange(1, 5)
    one = plot(tmp_path / "f" / "one.png", {"uniform": (x, x)})
    two = plot(tmp_path / "two.png", {"uniform": (x, x[::-1])})
    log = plot(tmp_path / "log.png", {"uniform": (x, x)}, log_y=True)
    pictures = [pixels(path)[1] for path in (one, two, log)]
    assert all(p.ndim == 3 and p.min() < 128 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 3
    assert ("matplotlib.pyplot" in sys.modules) == stateful


def test_line_plot_without_matplotlib_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "one.png"
    assert plot(path, {"a": ([1], [2])}) is None
    assert "pip install 'tmdjax[demo]'" in caplog.text and not path.exists()


def test_line_plot_refuses_bad_series(tmp_path, refused):
    path = tmp_path / "one.png"
    refused("no series to plot in 'quality against NFE'", plot, path, {})
    words = r"series 'a' has x of shape \(2,\) and y of shape \(1,\)"
    refused(words, plot, path, {"a": ([1, 2], [1])})
    refused("two arrays of one length", plot, path, {"a": (1, 2)})


def test_cells():
    numbers = (123456, 0.000123456, 1234.56, np.float32(0.5), math.nan)
    found = [format_value(value) for value in (None, *numbers, True, "a")]
    assert found == "- 123456 0.0001235 1235 0.5 nan True a".split()


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


CLAIM = {"id": "B1", "statement": "fewer <steps> & better", "published": None}
CLAIM |= {"threshold": 1.5, "direction": "greater", "ours": [1.0] * 5}
CLAIM |= {"value": 1.23456, "ci95": [1.1, 1.4], "verdict": "not reproduced"}


def test_claim_row_says_bound_interval_and_seeds():
    row = claim_row(CLAIM)
    names = ("95 % interval", "threshold", "seeds")
    assert [row[name] for name in names] == ["[1.1, 1.4]", "> 1.5", 5]
    row = claim_row(CLAIM | {"ci95": [None, None], "threshold": None})
    assert row["95 % interval"] is None and row["threshold"] is None


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
    assert page.open == [] and "script" not in page.tags
    assert page.text.count(nasty) == 9
    for shown in ("fewer <steps> & better", "0.1235", "curve: left out"):
        assert shown in page.text
    (link,) = page.links
    kind, data = link.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == grid.read_bytes()
    assert not re.search(r"https?://|@import|url\(", source)
    assert 'name="viewport"' in source
    assert "color-scheme: light dark" in source
