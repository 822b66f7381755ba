"""Sets of arrays stored as records in a folder, beside a manifest that describes them.

The manifest names the file of records, which is called after its content: a set is
replaced when its successor is whole, and one that is damaged is told.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import check_count, check_name, first_few
from tmdjax.core.files import json_of, write_atomically
from tmdjax.core.trees import content_hash
from tmdjax.data.pipeline import array_record, write_array_record

MANIFEST = "manifest.json"
_BATCH = 256


def write_record_set(
    folder: str | os.PathLike[str],
    kind: str,
    rows: str,
    arrays: Mapping[str, np.ndarray],
    described: Mapping[str, Any],
) -> Path:
    """Stores arrays, a record a row; an older set is replaced when this one is whole.

    Args:
        folder: made where it does not exist.
        kind: of the set, 'tmdjax.demonstrations' say.
        rows: what a row is called, 'steps' say.
        arrays: {name: [row, ...]}, at least one row.
        described: what else stands in the manifest, JSON-able.

    Returns:
        The path of the manifest.

    Raises:
        OSError: the place cannot be written; an older set is intact.
        ValueError: the folder has a manifest of something else, which stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{rows}-{content_hash(dict(arrays))[:16]}.array_record"
    count = len(next(iter(arrays.values())))
    manifest = {"kind": kind, "version": 1, "records": name, rows: count, **described}
    text = json.dumps(manifest, indent=1, allow_nan=False).encode()  # before any file
    old = _records_in(folder, kind, manifest.keys())
    write_array_record(
        folder / name, ({k: v[i] for k, v in arrays.items()} for i in range(count))
    )
    write_atomically(folder / MANIFEST, text)
    if old not in (None, name):
        (folder / old).unlink(missing_ok=True)
    return folder / MANIFEST


def _records_in(folder: Path, kind: str, keys: Collection[str]) -> str | None:
    """Name of the records of the set that a folder holds, None without a whole one."""
    path = folder / MANIFEST
    if path.is_file() and _kind_of(path) != kind:
        raise ValueError(
            f"{path} is no manifest of {kind.split('.')[-1]}, and would be replaced; "
            f"give another folder, or move the file away."
        )
    try:
        return read_manifest(folder, kind, keys)["records"]
    except (FileNotFoundError, ValueError):
        return None


def _kind_of(path: Path) -> Any:
    """What a manifest says that it is of; None of another file."""
    try:
        found = json_of(path)
    except ValueError:
        return None
    return found.get("kind") if isinstance(found, dict) else None


def read_manifest(
    folder: str | os.PathLike[str], kind: str, keys: Collection[str]
) -> dict[str, Any]:
    """What a stored set says of itself.

    Args:
        folder: of the set.
        kind: of which it must be.
        keys: that the manifest has, and no others.

    Raises:
        FileNotFoundError: the folder holds no manifest.
        ValueError: the manifest is no such one; names what is missing or unknown.
    """
    path, noun = Path(folder, MANIFEST), kind.split(".")[-1]
    found, known = json_of(path), set(keys)
    if not isinstance(found, dict) or found.keys() != known or found["kind"] != kind:
        there = set(found) if isinstance(found, dict) else set()
        raise ValueError(
            f"{path} is no manifest of {noun}: "
            f"{first_few(sorted(known - there)) or 'nothing'} is missing, "
            f"{first_few(map(repr, sorted(there - known))) or 'nothing'} is not known. "
            f"Write the set with write_{noun}."
        )
    if found["version"] != 1:
        raise ValueError(
            f"{path} has version {found['version']!r}, and 1 is read; write the set "
            f"again."
        )
    check_name(f"records of {path}", found["records"])
    return found


def read_records(
    folder: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    rows: str,
    names: Collection[str],
) -> dict[str, np.ndarray]:
    """The arrays that :func:`write_record_set` stored.

    Args:
        folder: of the set.
        manifest: of :func:`read_manifest`.
        rows: what a row is called in it.
        names: of the arrays, which must be these.

    Raises:
        FileNotFoundError: the records are not there.
        ValueError: they are damaged, or do not belong to the manifest.
    """
    path, noun = Path(folder, manifest["records"]), manifest["kind"].split(".")[-1]
    count = check_count(f"{rows} of {Path(folder, MANIFEST)}", manifest[rows])
    options = {"shuffle": False, "drop_remainder": False, "threads": 0}
    batches = array_record(path, _BATCH, **options)
    if batches.plan.count != count:
        raise ValueError(
            f"{path} holds {batches.plan.count} {rows}, its manifest says {count}; "
            f"copy both again."
        )
    parts = [next(batches) for _ in range(batches.plan.steps_per_epoch)]
    if parts[0].keys() != {*names}:
        raise ValueError(
            f"records of {path} are of {', '.join(sorted(parts[0]))}; those of {noun} "
            f"are {', '.join(names)}."
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
