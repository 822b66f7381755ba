"""Plots are whole PNGs of what was given, and bad numbers are named."""

import math
import sys

import numpy as np
import pytest
from PIL import Image

from tmdjax.harness.plots import (
    bar_plot,
    histogram_plot,
    interval_plot,
    line_plot,
    point_plot,
    timeline_plot,
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


def colours(picture):
    """How many pixels have each colour."""
    found, counts = np.unique(
        picture[..., :3].reshape(-1, 3), axis=0, return_counts=True
    )
    return {tuple(map(int, each)): int(n) for each, n in zip(found, counts)}


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # the first two


def test_bars_and_bands_are_as_large_as_their_numbers(tmp_path, refused):
    """One colour a name in all rows; areas are in the ratio of the numbers."""
    pytest.importorskip("matplotlib")
    rows = {"a": {"busy": 1.0, "idle": 2.0}, "b": {"idle": 3.0, "busy": 0.0}}
    found = colours(pixels(bar_plot(rows, tmp_path / "bars.png", "Use", "share")))
    assert found[ORANGE] / found[BLUE] == pytest.approx(5, rel=0.1)  # and the legend

    # a third of the time busy, then half of the workers
    rows = {"a": {"busy": [1.0, 0.5], "idle": [0.0, 0.5]}, "b": {"idle": [1.0, 1.0]}}
    given = (rows, [0.0, 1.0, 3.0], tmp_path / "bands.png", "Time", "seconds")
    picture = pixels(timeline_plot(*given))
    found = colours(picture)
    assert found[ORANGE] / found[BLUE] == pytest.approx(2, rel=0.1)
    blue = (picture[..., :3] == BLUE).all(axis=-1)
    columns = blue[: len(blue) * 2 // 3].sum(axis=0)  # without the legend
    tall = np.flatnonzero(columns > 0.9 * columns.max())
    assert np.ptp(tall) + 1 == pytest.approx(np.flatnonzero(columns).size / 3, rel=0.1)

    path, part = tmp_path / "no.png", {"busy": 1.0}
    for words, *given in (
        ("nothing to plot in 'T'", bar_plot, {"a": {}}, path),
        (
            r"'busy' of 'a' in 'T' has shape \(1,\)",
            bar_plot,
            {"a": {"busy": [1.0]}},
            path,
        ),
        ("'busy' of 'a' in 'T' .* negative", bar_plot, {"a": {"busy": -1.0}}, path),
        ("not finite", bar_plot, {"a": {"busy": math.nan}}, path),
        (r"has shape \(\); give \(2,\)", timeline_plot, {"a": part}, [0, 1, 2], path),
        ("that rise", timeline_plot, {"a": part}, [0, 1, 1], path),
        (r"edges of shape \(1,\)", timeline_plot, {"a": part}, [0], path),
    ):
        refused(words, *given, "T", "x")
    assert not path.exists()


def test_histograms_lie_over_each_other(tmp_path, refused):
    pytest.importorskip("matplotlib")
    edges = np.arange(4) - 0.5

    def drawn(series):
        path = tmp_path / f"{len(series)}.png"
        return pixels(histogram_plot(series, edges, path, "H", "lag", "tokens"))

    one = drawn({"": [4, 0, 2]})
    both = drawn({"all": [4, 0, 2], "trained": [4, 4, 4]})
    assert one.shape == both.shape and one.tobytes() != both.tobytes()
    red, _, blue = np.moveaxis(one[..., :3].astype(int), -1, 0)
    columns = np.array_split((blue - red > 20).sum(axis=0)[100:-20], 3)
    left, middle, right = map(np.median, columns)
    assert left == pytest.approx(2 * right, rel=0.05) and middle < 10 < right
    words = "'trained' in 'H' has shape"
    refused(words, drawn, {"all": [1, 2, 3], "trained": [1]})
    refused("nothing to plot", drawn, {})
