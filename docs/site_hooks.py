"""Pages of the site that are made of what stands elsewhere in the repository."""

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent
_COPIES = {"results.md": "RESULTS.md", "changes.md": "CHANGELOG.md"}
_ROLE = re.compile(r":[a-z]+:<code>(~?)([\w.]+)</code>")


def on_files(files: Any, config: Any) -> Any:
    """Adds results, changes, pictures, and a page of the API for every package."""
    for page, source in _COPIES.items():
        text = (_ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    results = sorted((_ROOT / "results").rglob("*.*"))
    for picture in (path for path in results if path.suffix in (".png", ".gif")):
        place = picture.relative_to(_ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    for package in sorted((_ROOT / "tmdjax").glob("*/__init__.py")):
        name = package.parent.name
        text = _package_page(package.parent)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def _package_page(folder: pathlib.Path) -> str:
    """A section a module; what the package exports is imported from the package."""
    lines = [f"# tmdjax.{folder.name}"]
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] == "__init__":
            members = "\n    options:\n      members: []"
            lines += [f"::: {name}{members}"] if len(parts) == 3 else []
        elif not parts[-1].startswith("_"):
            lines += [f"## {name}", f"::: {name}"]
    return "\n\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points pictures and pages at their copies."""
    markdown = re.sub(r"\]\((?:\.\./)+results/", "](results/", markdown)
    depth = "../" * page.file.src_uri.count("/")
    for copy, source in _COPIES.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{source}\)", f"]({depth}{copy})", markdown)
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Shows the roles of docstrings, :func:`~a.b.c`, as names."""
    return _ROLE.sub(
        lambda m: f"<code>{m[2].rpartition('.')[2] if m[1] else m[2]}</code>", html
    )
