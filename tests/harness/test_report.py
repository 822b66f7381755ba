import base64
import html.parser
import math
import re
import sys

import numpy as np
import pytest
from PIL import Image

from tmdjax.harness.pictures import image_grid
from tmdjax.harness.report import (
    claim_row,
    format_value,
    interval_plot,
    line_plot,
    point_plot,
    text_table,
    write_report,
)
from tmdjax.metrics.intervals import Interval


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def plot(path, series, **options):
    return line_plot(series, path, "quality against NFE", "NFE", "distance", **options)


def test_line_plot_writes_a_png_that_depends_on_its_data(tmp_path):
    pytest.importorskip("matplotlib")
    stateful = "matplotlib.pyplot" in sys.modules
    x = np.arange(1, 5)
    one = plot(tmp_path / "f" / "one.png", {"uniform": (x, x)})
    two = plot(tmp_path / "two.png", {"uniform": (x, x[::-1])})
    log = plot(tmp_path / "log.png", {"uniform": (x, 10.0**x)}, log_y=True)
    pictures = [pixels(path) for path in (one, two, log)]
    assert all(p.ndim == 3 and p.min() < 128 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 3
    assert ("matplotlib.pyplot" in sys.modules) == stateful


def test_interval_plot_has_a_row_an_arm_and_a_colour_a_series(tmp_path, refused):
    pytest.importorskip("matplotlib")
    one, wide = Interval(1.0, None, None), Interval(1.0, 0.5, 1.5)
    drawn = [
        pixels(interval_plot(rows, tmp_path / f"{i}.png", "after", "share"))
        for i, rows in enumerate(
            (
                {"a": {"x": one}},
                {"a": {"x": wide}},
                {"a": {"x": wide}, "b": {"x": one}},
                {"a": {"x": wide, "y": one}, "b": {"y": one}},
            )
        )
    ]
    assert len({picture.tobytes() for picture in drawn}) == 4
    heights = [len(picture) for picture in drawn]
    assert heights[0] == heights[1] < heights[2] < heights[3]
    colourful = [np.ptp(p[..., :3].astype(int), axis=-1).max() for p in drawn]
    assert min(colourful) > 100
    words = "no intervals to plot in 'after'"
    refused(words, interval_plot, {"a": {}}, tmp_path / "no.png", "after", "share")


def test_point_plot_has_a_point_an_arm(tmp_path, refused):
    pytest.importorskip("matplotlib")
    one, wide = Interval(1.0, None, None), Interval(10.0, 5.0, 15.0)
    lost = Interval(math.nan, None, None)
    given = {"a": {"a": (one, wide)}, "b": {"a": (one, one)}}
    given["c"] = {"a": (one, wide), "b": (wide, one)}
    given["d"] = {"a": (one, wide), "b": (wide, lost)}
    drawn = {
        name: pixels(point_plot(points, tmp_path / f"{name}.png", "all", "s", "time"))
        for name, points in given.items()
    }
    assert len({drawn[name].tobytes() for name in "abc"}) == 3
    assert (drawn["a"] == drawn["d"]).all()  # without the one that is not finite
    path = tmp_path / "no.png"
    words = "no points to plot in 'all'"
    refused(words, point_plot, {"b": (wide, lost)}, path, "all", "s", "time")
    free = Interval(0.0, None, None)
    words = "'b' has x=0 in 'all'; .* needs positive"
    refused(words, point_plot, {"b": (free, one)}, path, "all", "s", "time")


def test_a_logarithmic_axis_needs_a_decade(tmp_path):
    """Within one, its ticks are all of the kind 1.7095 x 10^-1."""
    pytest.importorskip("matplotlib")

    for y, equal in (([1.0, 9.0], True), ([1.0, 11.0], False), ([0.0, 0.0], True)):
        series = {"a": (np.arange(2), np.array(y))}
        one, other = (
            pixels(plot(tmp_path / f"{log}.png", series, log_y=log)).tobytes()
            for log in (True, False)
        )
        assert (one == other) == equal


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
    grid = image_grid(np.zeros((1, 2, 2, 1)), tmp_path / "grid.png", 1)
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
