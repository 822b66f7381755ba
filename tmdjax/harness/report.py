"""What a run leaves to look at: tables, one HTML page."""

import base64
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.files import write_atomically
from tmdjax.metrics.intervals import Interval

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
