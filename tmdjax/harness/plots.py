"""Plots of numbers, as PNG files by matplotlib; without it none is written."""

import io
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.files import write_atomically
from tmdjax.metrics.intervals import Interval

_LOGGER = logging.getLogger(__name__)

Parts = Mapping[str, Mapping[str, Any]]
"""By the name of a row, amounts by what they are of."""


def line_plot(
    series: Mapping[str, tuple[Any, Any]],
    path: str | os.PathLike[str],
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> Path | None:
    """Writes curves as a PNG by matplotlib; whole x have whole ticks.

    Args:
        series: (x, y), each [n], by the name shown in the legend, which one series does
            not have. y may be a list of intervals, drawn as values and shaded bounds.
        path: the PNG to write; folders are made.
        title: above the axes.
        x_label: below the horizontal axis.
        y_label: beside the vertical axis.
        log_y: logarithmic vertical axis, where values span a decade; a narrower range
            is read better on a linear one.

    Returns:
        The path; None, with a logged warning, where matplotlib is absent (a run
        does not die of a figure).

    Raises:
        ValueError: no series, or x and y of different lengths; names the series.
    """
    if not series:
        raise ValueError(f"no series to plot in {title!r}; give at least one.")
    bounds = {}
    for name, (x, y) in series.items():
        if isinstance(y, list | tuple) and y and isinstance(y[0], Interval):
            ends = [_bounded(i) for i in y]
            values, *bounds[name] = np.array(ends, float).T
            series = {**series, name: (x, values)}
    for name, (x, y) in series.items():
        if np.ndim(x) != 1 or np.shape(x) != np.shape(y):
            raise ValueError(
                f"series {name!r} has x of shape {np.shape(x)} and y of shape "
                f"{np.shape(y)}; give two arrays of one length."
            )
    axes = _axes(path, (6.4, 4.0))
    if axes is None:
        return None
    for i, (name, (x, y)) in enumerate(series.items()):
        style = ("-", "--", ":", "-.")[i // 10 % 4]  # there are ten colours
        (line,) = axes.plot(x, y, style, marker=".", label=name)
        if name in bounds:
            axes.fill_between(x, *bounds[name], color=line.get_color(), alpha=0.2)
    drawn = np.concatenate([np.asarray(y, float) for _, y in series.values()])
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    if log_y and drawn.size and drawn.max() >= 10 * drawn.min():
        axes.set_yscale("log")
    if all(np.issubdtype(np.asarray(x).dtype, np.integer) for x, _ in series.values()):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    return _save(axes, path)


def interval_plot(
    rows: Mapping[str, Mapping[str, Interval]],
    path: str | os.PathLike[str],
    title: str,
    x_label: str,
) -> Path | None:
    """Writes values and their intervals as a PNG by matplotlib, a row an arm.

    Args:
        rows: by the text to the left, from top to bottom: intervals of finite values by
            the name of a series, drawn below each other in a colour a series; a row may
            lack some. One series alone has no legend.
        path: the PNG to write; folders are made.
        title: above the axes.
        x_label: below the axis, on which all values lie; whole ones have whole ticks.

    Returns:
        The path; None, with a logged warning, where matplotlib is absent.

    Raises:
        ValueError: no row with an interval.
    """
    series = list(dict.fromkeys(key for found in rows.values() for key in found))
    if not series:
        raise ValueError(f"no intervals to plot in {title!r}; give at least one.")
    axes = _axes(path, (6.4, 1.3 + 0.35 * len(rows) + 0.15 * len(series)))
    if axes is None:
        return None
    for place, key in enumerate(series):
        down = 0.16 * (place - (len(series) - 1) / 2)
        at = [i + down for i, found in enumerate(rows.values()) if key in found]
        ends = [_bounded(found[key]) for found in rows.values() if key in found]
        values, low, high = np.array(ends, float).T
        bars = [values - low, high - values]
        axes.errorbar(values, at, xerr=bars, fmt="o", capsize=3, label=key)
        if all(value == int(value) for value in values):
            axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel=x_label)
    axes.grid(alpha=0.3, axis="x")
    return _save_rows(axes, list(rows), path)


def point_plot(
    points: Mapping[str, tuple[Interval, Interval]],
    path: str | os.PathLike[str],
    title: str,
    x_label: str,
    y_label: str,
) -> Path | None:
    """Writes what is found against what it costs as a PNG by matplotlib.

    Args:
        points: (x, y) of each arm by its name, with their intervals; x above 0, on a
            logarithmic axis. One that is not finite is left out.
        path: the PNG to write; folders are made.
        title: above the axes.
        x_label: below the horizontal axis.
        y_label: beside the vertical axis.

    Returns:
        The path; None, with a logged warning, where matplotlib is absent.

    Raises:
        ValueError: no finite point, or an x that is not positive; names it.
    """
    for name, (x, _) in points.items():
        if x.value <= 0:
            raise ValueError(
                f"{name!r} has x={x.value:g} in {title!r}; a logarithmic axis needs "
                f"positive numbers."
            )
    points = {
        name: (x, y)
        for name, (x, y) in points.items()
        if np.isfinite([x.value, y.value]).all()
    }
    if not points:
        raise ValueError(f"no points to plot in {title!r}; give at least one.")
    axes = _axes(path, (8.0, max(4.0, 1.0 + 0.22 * len(points))))
    if axes is None:
        return None
    for i, (name, pair) in enumerate(points.items()):
        (x, *across), (y, *along) = (np.array(_bounded(each), float) for each in pair)
        bars = [
            np.abs(np.array(along)[:, None] - y),
            np.abs(np.array(across)[:, None] - x),
        ]
        marker = "os^vDPX*"[i // 10 % 8]  # there are ten colours
        axes.errorbar([x], [y], *bars, marker, capsize=3, label=name)
    axes.set_xscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right upper")
    return _save(axes, path)


def path_plot(
    paths: Any,
    path: str | os.PathLike[str],
    title: str,
    marks: Any = (),
    squares: Any = (),
) -> Path | None:
    """Writes the paths of agents in the plane as a PNG by matplotlib.

    Args:
        paths: [agent, time, 2]; a path stops at its first value that is not finite.
        path: the PNG to write; folders are made.
        title: above the axes.
        marks: [n, 2], places to mark, such as goals.
        squares: [n, 2], centres of unit squares to fill, such as walls.

    Returns:
        The path; None, with a logged warning, where matplotlib is absent.

    Raises:
        ValueError: paths of another shape.
    """
    paths = np.asarray(paths)
    if paths.ndim != 3 or paths.shape[2] != 2:
        raise ValueError(f"paths have shape {paths.shape}; give [agent, time, 2].")
    axes = _axes(path, (5.0, 5.0))
    if axes is None:
        return None
    for x, y in np.asarray(squares).reshape(-1, 2):
        axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5],
                  [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color="0.8")  # fmt: skip
    for walk in paths:
        axes.plot(walk[:, 0], walk[:, 1], linewidth=0.6, alpha=0.4)
    marks = np.asarray(marks).reshape(-1, 2)
    axes.plot(marks[:, 0], marks[:, 1], "k*", markersize=12)
    axes.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    return _save(axes, path)


def bar_plot(
    rows: Parts, path: str | os.PathLike[str], title: str, x_label: str
) -> Path | None:
    """Writes what each row is made of as a PNG: bars of parts, end to end.

    Args:
        rows: by the text to the left, from top to bottom: a number >= 0 for each part
            by its name. A part has one colour in all rows, in the order in which names
            first appear.
        path: the PNG to write; folders are made.
        title: above the axes.
        x_label: below the axis, on which parts add up.

    Returns:
        The path; None, with a logged warning, where matplotlib is absent.

    Raises:
        ValueError: no row with a part, or a number that is negative or not finite.
    """
    names = _names_of_parts(rows, title, shape=())
    axes = _axes(path, (7.0, 1.6 + 0.35 * len(rows)))
    if axes is None:
        return None
    begin = np.zeros(len(rows))
    for name, colour in _colours(names).items():
        width = np.array([parts.get(name, 0.0) for parts in rows.values()], float)
        axes.barh(range(len(rows)), width, left=begin, color=colour, label=name)
        begin += width
    axes.set(title=title, xlabel=x_label)
    axes.grid(alpha=0.3, axis="x")
    return _save_rows(axes, list(rows), path)


def timeline_plot(
    rows: Parts,
    edges: Any,
    path: str | os.PathLike[str],
    title: str,
    x_label: str,
) -> Path | None:
    """Writes what each row does over time as a PNG: a band a row.

    A band is as high, in each period, as its parts are there: one that does one thing
    at a time is a bar that changes its colour, one that stands for many is a stack.

    Args:
        rows: by the text to the left, from top to bottom: shares [period] in [0, 1] of
            each part by its name, which add up to at most 1. A part has one colour in
            all rows, in the order in which names first appear.
        edges: [period + 1], where periods begin and end; it rises.
        path: the PNG to write; folders are made.
        title: above the axes.
        x_label: below the axis.

    Returns:
        The path; None, with a logged warning, where matplotlib is absent.

    Raises:
        ValueError: no row with a part, another shape, edges that do not rise, or a
            share that is negative or not finite.
    """
    edges = _edges(edges, title)
    names = _names_of_parts(rows, title, shape=(len(edges) - 1,))
    axes = _axes(path, (9.0, 1.6 + 0.35 * len(rows)))
    if axes is None:
        return None
    colours, unnamed = _colours(names), dict(zip(names, names))
    for place, parts in enumerate(rows.values()):
        level = np.full(len(edges) - 1, place + 0.42)  # the axis points downwards
        for name in (name for name in names if np.any(parts.get(name, 0))):
            top = level - 0.84 * np.asarray(parts[name], float)
            band = axes.stairs(top, edges, baseline=level, fill=True, linewidth=0)
            band.set(color=colours[name], label=unnamed.pop(name, None))
            level = top
    axes.set_xlim(edges[0], edges[-1])
    axes.set(title=title, xlabel=x_label)
    return _save_rows(axes, list(rows), path)


def histogram_plot(
    series: Mapping[str, Any],
    edges: Any,
    path: str | os.PathLike[str],
    title: str,
    x_label: str,
    y_label: str,
) -> Path | None:
    """Writes histograms of whole numbers over each other as a PNG.

    Args:
        series: heights [bin] by the name shown in the legend, which one series does not
            have.
        edges: [bin + 1], where bins begin and end; it rises.
        path: the PNG to write; folders are made.
        title: above the axes.
        x_label: below the horizontal axis, whose ticks are whole.
        y_label: beside the vertical axis.

    Returns:
        The path; None, with a logged warning, where matplotlib is absent.

    Raises:
        ValueError: no series, another shape, edges that do not rise, or a height that
            is negative or not finite.
    """
    edges = _edges(edges, title)
    _names_of_parts({"": series}, title, shape=(len(edges) - 1,))
    axes = _axes(path, (6.4, 4.0))
    if axes is None:
        return None
    for place, (name, heights) in enumerate(series.items()):
        color, faint = f"C{place}", 0.6 if len(series) == 1 else 0.35
        axes.stairs(heights, edges, fill=True, color=color, alpha=faint, label=name)
        axes.stairs(heights, edges, color=color)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    return _save(axes, path)


def _bounded(interval: Interval) -> Interval:
    """The interval, its value in place of bounds that are unknown."""
    value, low, high = interval
    return Interval(
        value, value if low is None else low, value if high is None else high
    )


def _edges(given: Any, title: str) -> np.ndarray:
    """Where bins begin and end, checked."""
    edges = np.asarray(given, float)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(
            f"edges of shape {edges.shape} in {title!r}; give two or more numbers that "
            f"rise, [bin + 1]."
        )
    return edges


def _names_of_parts(rows: Parts, title: str, *, shape: tuple[int, ...]) -> list[str]:
    """All names, in the order in which they first appear; numbers are checked."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    if not names:
        raise ValueError(f"nothing to plot in {title!r}; give at least one part.")
    for row, parts in rows.items():
        for name, given in parts.items():
            values = np.asarray(given, float)
            whose = f"{name!r} of {row!r}" if row else repr(name)
            if values.shape != shape:
                raise ValueError(
                    f"{whose} in {title!r} has shape {values.shape}; give {shape}."
                )
            if not (np.isfinite(values) & (values >= 0)).all():
                raise ValueError(
                    f"{whose} in {title!r} has numbers that are negative or not finite."
                )
    return names


def _colours(names: Iterable[str]) -> dict[str, Any]:
    """Twenty colours, the strong ones first; only where matplotlib is there."""
    from matplotlib import colormaps

    shades = [colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    return {name: shades[i % len(shades)] for i, name in enumerate(names)}


def _save_rows(axes: Any, labels: list[str], path: Any) -> Path:
    """Saves axes with a row a label, from top to bottom, and a legend below."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.figure.legend(loc="outside lower center", ncols=5)
    return _save(axes, path)


def _axes(path: Any, size: tuple[float, float]) -> Any:
    """Axes of a new figure; None where matplotlib is absent: no run dies of one."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _LOGGER.warning(
            "%s left out: matplotlib is absent (pip install 'tmdjax[demo]').", path
        )
        return None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def _save(axes: Any, path: Any) -> Path:
    picture = io.BytesIO()
    axes.figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
    return Path(path)
