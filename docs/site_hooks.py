"""The site: pages from elsewhere, verdicts, formulas, links, and checks.

Nothing that a page loads lies on another host: formulas become MathML here,
which browsers render themselves.
"""

import html
import json
import pathlib
import re
import sys
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from tmdjax.harness.logs import format_duration
from tmdjax.harness.records import order, read_records
from tmdjax.harness.results_page import (
    markdown_table,
    read_findings,
    verdict_counts,
)
from tmdjax.harness.summaries import Summary

import names

_ROOT = pathlib.Path(__file__).parent.parent
_RESULTS = _ROOT / "results"
_COPIES = {"results.md": "RESULTS.md", "changes.md": "CHANGELOG.md"}
_ROLE = re.compile(r":[a-z]+:<code>(~?)([\w.]+)</code>")
_VERDICTS = re.compile(r"<!-- verdicts: ([\w, ]+) -->")
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[([](.*?)\\[)\]]</\1>', re.S
)
_NAME = re.compile(
    r"(?<!</span>)(?<!\">)<code>([A-Za-z_][\w.]*)([^<\n]*)</code>"
)
_FOREIGN = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*"
    r'\s(?:src|href)="(?:https?:)?//[^"]*"'
)


def on_files(files: Any, config: Any) -> Any:
    """Adds results, changes, pictures, and a page of the API a package."""
    for page, source in _COPIES.items():
        text = (_ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    results = sorted(_RESULTS.rglob("*.*"))
    for picture in (
        path for path in results if path.suffix in (".png", ".gif")
    ):
        place = picture.relative_to(_ROOT).as_posix()
        files.append(
            File.generated(config, place, abs_src_path=str(picture))
        )
    for package in sorted((_ROOT / "tmdjax").glob("*/__init__.py")):
        name = package.parent.name
        text = _package_page(package.parent)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def _package_page(folder: pathlib.Path) -> str:
    """A section a module; the package exports what its users need."""
    lines = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        of_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if of_package else parts)
        members = "\n    options:\n      members: []" if of_package else ""
        if of_package or not parts[-1].startswith("_"):
            level = "##" if lines else "#"
            lines += [
                f"{level} {name} {{ #{name} }}",
                f"::: {name}{members}",
            ]
    return "\n\n".join(lines) + "\n"


def on_page_markdown(
    markdown: str, page: Any, config: Any, files: Any
) -> str:
    """Fills in verdicts, and points pictures and pages at their copies."""
    markdown = _VERDICTS.sub(
        lambda found: _verdict_table(found[1]), markdown
    )
    depth = "../" * page.file.src_uri.count("/")
    markdown = re.sub(
        r"\]\((?:\.\./)+results/", f"]({depth}results/", markdown
    )
    for copy, source in _COPIES.items():
        markdown = re.sub(
            rf"\]\((?:\.\./)+{source}\)", f"]({depth}{copy})", markdown
        )
    return markdown


def _verdict_table(systems: str) -> str:
    """What was found of systems, 'a, b' or 'all', from records alone."""
    records: dict[str, list[Summary]] = {}
    for record in sorted(read_records(_RESULTS), key=order):
        records.setdefault(record["system"], []).append(record)
    wanted = list(records) if systems == "all" else systems.split(", ")
    if unknown := set(wanted) - set(records):
        raise PluginError(f"verdicts of {unknown}, which have no record.")
    rows = [
        _verdict_row(record) for name in wanted for record in records[name]
    ]
    return "\n".join(markdown_table(rows))


def _verdict_row(record: Summary) -> dict[str, str]:
    system, tier = record["system"], record["tier"]
    section = f"results.md#{system}-{tier}-tier"
    findings = read_findings(_RESULTS).get(system, {}).get(tier, {})
    counts, seeds = verdict_counts(record["claims"]), len(record["seeds"])
    took = format_duration(record["wall_s"])
    return {
        "system": f"[{system}]({_page_of(system) or section})",
        "what came out": findings.get("finding", ""),
        "verdicts": f"[{counts}]({section})",
        "on": f"{record['device']}, {seeds} seeds, {took}",
    }


def _page_of(system: str) -> str | None:
    """The page that holds a system's claims."""
    for path in sorted((_ROOT / "docs").glob("*.md")):
        if f"<!-- claims: {system}:" in path.read_text():
            return path.name
    return None


def on_page_content(
    content: str, page: Any, config: Any, files: Any
) -> str:
    """Formulas, links from names to the API, and roles as names."""

    def formula(found: re.Match[str]) -> str:
        kind, latex = found[1], html.unescape(found[2]).strip()
        try:
            mathml = convert(
                latex, display="block" if kind == "div" else "inline"
            )
        except Exception as error:
            raise PluginError(
                f"{page.file.src_uri}: {latex!r} ({error!r})"
            ) from error
        if "\\" in mathml:
            raise PluginError(
                f"{page.file.src_uri}: unknown command in {latex!r}"
            )
        return f'<{kind} class="formula">{mathml}</{kind}>'

    def link(found: re.Match[str]) -> str:
        target = names.identifier(found[1]) if "." in found[1] else None
        if target is None or found[2].startswith("="):
            return found[0]
        return (
            f'<autoref identifier="{target}" optional>{found[0]}</autoref>'
        )

    content = _ROLE.sub(
        lambda m: (
            f"<code>{m[2].rpartition('.')[2] if m[1] else m[2]}</code>"
        ),
        content,
    )
    if page.file.src_uri.startswith(
        "api/"
    ):  # dollars of docstrings are text
        return _FORMULA.sub(lambda found: f"${found[2]}$", content)
    return _FORMULA.sub(formula, _NAME.sub(link, content))


def on_post_build(config: Any) -> None:
    """Checks that search knows all pages, and that none loads from afar."""
    site = pathlib.Path(config.site_dir)
    entries = json.loads(
        (site / "search" / "search_index.json").read_text()
    )["docs"]
    indexed = {entry["location"].partition("#")[0] for entry in entries}
    for path in site.rglob("index.html"):
        place = path.parent.relative_to(site).as_posix().removeprefix(".")
        if (f"{place}/" if place else "") not in indexed:
            raise PluginError(
                f"search does not know {place or 'the first page'}"
            )
        if found := _FOREIGN.search(path.read_text()):
            raise PluginError(
                f"{place} loads a file of another host: {found[0]}"
            )
