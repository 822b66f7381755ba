"""Pages and pictures of the site that stand elsewhere in the repository."""

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent
_PAGES = {"results.md": "RESULTS.md", "changes.md": "CHANGELOG.md"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the rendered results, the changes, and the pictures of results."""
    for page, source in _PAGES.items():
        text = (_ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    for picture in sorted((_ROOT / "results").rglob("*.png")):
        place = picture.relative_to(_ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points pictures at their copies; a page in docs/ reaches them by '../'."""
    return re.sub(r"\]\(\.\./results/", "](results/", markdown)
