"""What a run leaves to look at: plots, tables, one HTML page."""

import base64
import html
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.files import write_atomically
from tmdjax.metrics.intervals import Interval

_LOGGER = logging.getLogger(__name__)

Row = Mapping[str, Any]


def format_value(value: Any, digits: int = 4) -> str:
    """A table cell: '-' for None, floats to so many significant digits, else ``str``.

    An :class:`~tmdjax.metrics.intervals.Interval` is its value ± half its width, or the
    value alone where it has no bounds or no width.
    """
    if value is None:
        return "-"
    if isinstance(value, Interval):
        text = format_value(value.value, digits)
        if value.low is None or value.high is None or value.low == value.high:
            return text
        return f"{text} ± {(value.high - value.low) / 2:.2g}"
    if isinstance(value, float | np.floating):
        return f"{float(value):.{digits}g}"
    return str(value)


def text_table(rows: Sequence[Row]) -> str:
    """An aligned table for the terminal; numbers are flush right.

    Args:
        rows: dicts, whose columns stand as they first appear; what a row lacks is
            shown as '-'.

    Returns:
        Header, rule and rows, without a last newline.
    """
    columns = _columns(rows)
    cells = [[format_value(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    right = [_is_numeric(rows, name) for name in columns]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(texts, widths, right)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(columns), rule, *map(line, cells)])


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
    figure = _figure(path, (6.4, 4.0))
    if figure is None:
        return None
    axes = figure.subplots()
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
    return _save(figure, path)


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
    figure = _figure(path, (6.4, 1.3 + 0.35 * len(rows) + 0.15 * len(series)))
    if figure is None:
        return None
    axes = figure.subplots()
    for place, key in enumerate(series):
        down = 0.16 * (place - (len(series) - 1) / 2)
        at = [i + down for i, found in enumerate(rows.values()) if key in found]
        ends = [_bounded(found[key]) for found in rows.values() if key in found]
        values, low, high = np.array(ends, float).T
        bars = [values - low, high - values]
        axes.errorbar(values, at, xerr=bars, fmt="o", capsize=3, label=key)
        if all(value == int(value) for value in values):
            axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(title=title, xlabel=x_label)
    axes.grid(alpha=0.3, axis="x")
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series))
    return _save(figure, path)


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
    figure = _figure(path, (8.0, max(4.0, 1.0 + 0.22 * len(points))))
    if figure is None:
        return None
    axes = figure.subplots()
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
    figure.legend(loc="outside right upper")
    return _save(figure, path)


def _bounded(interval: Interval) -> Interval:
    """The interval, its value in place of bounds that are unknown."""
    value, low, high = interval
    return Interval(
        value, value if low is None else low, value if high is None else high
    )


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
    figure = _figure(path, (5.0, 5.0))
    if figure is None:
        return None
    axes = figure.subplots()
    for x, y in np.asarray(squares).reshape(-1, 2):
        axes.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5],
                  [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color="0.8")  # fmt: skip
    for walk in paths:
        axes.plot(walk[:, 0], walk[:, 1], linewidth=0.6, alpha=0.4)
    marks = np.asarray(marks).reshape(-1, 2)
    axes.plot(marks[:, 0], marks[:, 1], "k*", markersize=12)
    axes.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    return _save(figure, path)


def _figure(path: Any, size: tuple[float, float]) -> Any:
    """An empty figure; None where matplotlib is absent: no run dies of a figure."""
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
    return figure


def _save(figure: Any, path: Any) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
    return Path(path)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    command: str,
    environment: Mapping[str, Any],
    tables: Iterable[tuple[str, Sequence[Row]]] = (),
    figures: Iterable[tuple[str, str | os.PathLike[str] | None]] = (),
    claims: Sequence[Row] = (),
    facts: Sequence[str] = (),
    links: Sequence[str] = (),
    meanings: Mapping[str, str] | None = None,
    details: Iterable[tuple[str, Sequence[Row]]] = (),
) -> Path:
    """Writes one self-contained HTML page; pictures are embedded.

    Claims come first, then tables, what their measures mean, and figures.

    Args:
        path: the HTML file; folders are made.
        title: heading of the page.
        command: what to type to get this page again.
        environment: versions, device and so on, by name.
        tables: (caption, rows) each.
        figures: (caption, PNG, GIF or HTML page) each; None (a figure left out) is said
            in its place.
        claims: judged claims, as in a summary.
        facts: on the run, in the line below the title.
        links: of files beside the page, relative to it.
        meanings: a sentence a measure, by its name; shown with blanks for underscores,
            as tables have them.
        details: more tables (caption, rows), folded.

    Returns:
        The path.
    """
    text = html.escape
    parts = [f"<h1>{text(title)}</h1>"]
    if facts:
        parts.append(f"<p class='facts'>{' &middot; '.join(map(text, facts))}</p>")
    parts.append(f"<pre>{text(command)}</pre>")
    if links:
        anchors = (f'<a href="{text(link)}">{text(link)}</a>' for link in links)
        parts.append(f"<p>Files: {', '.join(anchors)}</p>")
    if claims:
        rows = [claim_row(claim) for claim in claims]
        rows = [{k: row[k] for k in ("id", "verdict", *row)} for row in rows]
        parts.append(_html_table("Claims", rows))
    parts += [_html_table(caption, rows) for caption, rows in tables]
    if meanings:
        rows = (
            f"<dt>{text(name.replace('_', ' '))}</dt><dd>{text(what)}</dd>"
            for name, what in meanings.items()
        )
        parts.append(f"<h2>What the measures mean</h2><dl>{''.join(rows)}</dl>")
    shown = [_html_figure(caption, picture) for caption, picture in figures]
    if shown:
        parts += ["<h2>Figures</h2>", "<div class='gallery'>", *shown, "</div>"]
    rows = [{"": name, "value": value} for name, value in environment.items()]
    for caption, folded in (*details, ("Environment", rows)):
        parts += ["<details>", _html_table(caption, folded, "summary"), "</details>"]
    page = _PAGE.format(title=text(title), style=_STYLE, body="\n".join(parts))
    write_atomically(path, page.encode())
    return Path(path)


def claim_row(claim: Row) -> dict[str, Any]:
    """One line about a judged claim, for a table.

    Args:
        claim: a dict from ``claims.judge``.

    Returns:
        Columns id, statement, published, value, 95 % interval, threshold,
        verdict, seeds.
    """
    low, high = claim["ci95"]
    interval = None if low is None else f"[{format_value(low)}, {format_value(high)}]"
    signs = {"greater": "> ", "less": "< ", "equal": "= "}
    threshold = claim["threshold"]
    return {
        "id": claim["id"],
        "statement": claim["statement"],
        "published": claim["published"],
        "value": claim["value"],
        "95 % interval": interval,
        "threshold": None
        if threshold is None
        else signs[claim["direction"]] + format_value(threshold),
        "verdict": claim["verdict"],
        "seeds": len(claim["ours"]),
    }


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row.get(name) for row in rows]
    kinds = int | float | np.number | Interval
    return all(v is None or isinstance(v, kinds) for v in values)


def _html_table(caption: str, rows: Sequence[Row], heading: str = "h2") -> str:
    columns = _columns(rows)
    right = [' class="number"' if _is_numeric(rows, c) else "" for c in columns]
    head = "".join(f"<th{r}>{html.escape(c)}</th>" for r, c in zip(right, columns))
    lines = []
    for row in rows:
        cells = (_html_cell(column, row.get(column)) for column in columns)
        line = "".join(f"<td{r}>{cell}</td>" for r, cell in zip(right, cells))
        lines.append(f"<tr>{line}</tr>")
    return (
        f"<{heading}>{html.escape(caption)}</{heading}>\n<div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _html_cell(column: str, value: Any) -> str:
    text = html.escape(format_value(value))
    if column == "statement":
        return f'<div class="statement">{text}</div>'
    if column == "verdict":
        return f'<span class="verdict {text.replace(" ", "-")}">{text}</span>'
    return text


def _html_figure(caption: str, picture: str | os.PathLike[str] | None) -> str:
    caption = html.escape(caption)
    if picture is None:
        return f"<p>{caption}: left out, matplotlib is absent.</p>"
    if Path(picture).suffix == ".html":
        page = html.escape(Path(picture).read_text(encoding="utf-8"))
        return (
            f'<figure><iframe title="{caption}" srcdoc="{page}"></iframe>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    kind = "gif" if Path(picture).suffix == ".gif" else "png"
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
pre, .scroll { overflow-x: auto; }
pre { padding: .6rem; border: 1px solid #8886; border-radius: 4px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #8886; text-align: left; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.facts { opacity: .8; }
.statement { min-width: 14rem; }
.verdict { padding: .1rem .5rem; border-radius: 1rem; white-space: nowrap;
  background: #6b7280; color: #fff; }
.reproduced, .exact { background: #15803d; }
.not-reproduced { background: #b91c1c; }
.inconclusive { background: #a16207; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
.gallery { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; }
iframe { width: 100%; height: 30rem; border: 0; }
img { max-width: 100%; height: auto; background: #fff; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
