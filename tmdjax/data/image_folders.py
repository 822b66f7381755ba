"""Folders of images as people have them: splits, files below, captions."""

import os
import re
from pathlib import Path

from tmdjax.core.checks import first_few
from tmdjax.core.files import text_of

SUFFIXES = tuple(".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff".split())
TRAINS = ("train", "training")
HELD_OUT = tuple("val valid validation dev eval evaluation test testing".split())
"""Folders of what trains, and those beside them of what is held out."""

_HIDDEN = (".", "__MACOSX")
_LONGEST_CAPTION = 10**6


def image_splits(folder: Path) -> tuple[Path, Path | None]:
    """The folder of images that train, and that of those held out, or None.

    They are one of :data:`TRAINS`, and one of :data:`HELD_OUT` (capitals or not, with
    'images', 'set' or a number behind: 'val2017') or nothing beside it. Other folders
    are classes: the folder itself is what trains.

    Raises:
        ValueError: several folders that could be held out, or none that trains beside
            them; splits beside other folders, or inside of a class.
    """
    folders = _folders(folder)
    train = [path for path in folders if _split_name(path) in TRAINS]
    held = [path for path in folders if _split_name(path) in HELD_OUT]
    if not held and (len(folders) > 1 or not train):
        for path in folders:
            inside = {_split_name(part) for part in _folders(path)}
            if inside & {*TRAINS} and inside & {*HELD_OUT}:
                raise ValueError(
                    f"{path} holds splits; give that folder, or one with a folder for "
                    f"each split and the classes in these."
                )
        return folder, None
    if len(train) != 1 or len(held) > 1 or len(folders) > len(train) + len(held):
        raise ValueError(
            f"{folder} holds {first_few(p.name for p in folders)}: splits are one of "
            f"{', '.join(TRAINS)} and at most one of {', '.join(HELD_OUT)}, and no "
            f"other folders. Move these away, or rename them if all are classes."
        )
    return train[0], held[0] if held else None


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder, but no hidden ones; sorted."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in paths if p.is_dir() and not p.name.startswith(_HIDDEN)]


def _split_name(path: Path) -> str:
    """What a folder is called, without what is put behind the names of splits."""
    name = path.name.lower()
    short = re.sub(r"[\W_]*(images?|set|[0-9]+)$", "", name)
    return short if short in (*TRAINS, *HELD_OUT) else name


def caption_of(path: Path) -> str:
    """A text in UTF-8, with or without a byte-order mark."""
    text = text_of(path, _LONGEST_CAPTION).strip()
    if "\0" in text:
        raise ValueError(f"{path} holds NUL; remove it (UTF-16 is full of it).")
    return text


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, through links too, but nothing hidden; sorted.

    Within a class (a folder in the folder), what several links lead to is walked once,
    and a link back to a folder above is not followed: links in a ring have an end.

    Raises:
        OSError: a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    found, walked = [], set()
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real, path = os.path.realpath(place), Path(place)
        there = path.relative_to(folder).parts[:1], real
        if there in walked or real in map(os.path.realpath, path.parents):
            folders.clear()
            continue
        walked.add(there)
        folders[:] = sorted(n for n in folders if not n.startswith(_HIDDEN))
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)
