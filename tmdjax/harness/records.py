"""Records: the summaries that count, ``results/<system>/<tier>.json``."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tmdjax.core.checks import check_name
from tmdjax.core.files import write_together
from tmdjax.harness.config import differences, json_text, read_json
from tmdjax.harness.summaries import (
    SUMMARY_KEYS,
    Summary,
    check_summary_parts,
    merge,
)

LATER = ("timings",)
"""Keys of a summary that records of old runs lack."""

PICTURES = "figures"
"""Key of a record: what its pictures show, by the names of the files beside it."""

IMAGES = (".png", ".gif")
"""Endings of the pictures that a record keeps; pages, such as films, stay in the run's
folder and its report.html."""

TIERS = ("smoke", "cpu", "gpu", "paper")


def write_record(
    results_dir: str | os.PathLike[str],
    record: Summary,
    figures: Sequence[tuple[str, Path | None]] = (),
) -> Path:
    """Writes ``<results_dir>/<system>/<tier>.json`` and its pictures, all or nothing.

    Args:
        results_dir: of all records.
        record: from :func:`tmdjax.harness.summaries.summary`.
        figures: (caption, path) each; a caption says of which arms and seeds it is.
            They lie in a folder 'figures', are named by their place in it, and their
            captions are kept in the record under :data:`PICTURES`; those that are no
            :data:`IMAGES` are left out. Other pictures that an older record lists stay
            where it has the same units, and are removed where it has others.

    Returns:
        The path of the record.

    Raises:
        ValueError: a key is missing, a claim has no seed (shards still to merge),
            system or tier is no name of a file, or what :func:`check_successor`
            refuses.
    """
    _check_summary(record, "the summary")
    path = record_path(results_dir, record["system"], record["tier"])
    for claim in record["claims"]:
        if not claim["ours"]:
            about = (claim["ours_metric"], claim["baseline_metric"])
            metrics = [repr(name) for name in about if name is not None]
            raise ValueError(
                f"claim {claim['id']!r} has no seed with {' and '.join(metrics)}; run "
                f"or merge the missing shards before recording."
            )
    units = [(unit["arm"], unit["seed"]) for unit in record["units"]]
    check_successor(path, units, [claim["id"] for claim in record["claims"]])
    files, captions = {}, {}
    for caption, picture in figures:
        if picture is not None and picture.suffix in IMAGES:
            parts = picture.parts
            places = [i for i, part in enumerate(parts) if part == "figures"]
            below = parts[places[-1] + 1 :] if places else parts[-1:]
            name = f"{path.stem}-{'-'.join(below)}"
            files[path.with_name(name)] = [picture.read_bytes()]
            captions[name] = caption
    older, drawn = _drawn(path)
    if drawn == json_text(record["units"]):  # drawn anew: the others are still of it
        captions = {n: c for n, c in older.items() if n.endswith(IMAGES)} | captions
    text = json_text({**record, PICTURES: captions} if captions else record)
    gone = {path.with_name(name) for name in older.keys() - captions.keys()}
    write_together({**files, path: [text]}, remove_after=gone)
    return path


def record_path(results_dir: str | os.PathLike[str], system: str, tier: str) -> Path:
    """``<results_dir>/<system>/<tier>.json``.

    Raises:
        ValueError: system or tier is no name of a file.
    """
    system, tier = check_name("system", system), check_name("tier", tier)
    return Path(results_dir, system, f"{tier}.json")


def check_successor(
    path: Path, units: Iterable[tuple[str, int]], claims: Iterable[str]
) -> None:
    """Refuses to write over a record that holds more than its successor will.

    Args:
        path: of the record; it may be absent, or hold none that can be read.
        units: (arm, seed) of the successor.
        claims: their ids in the successor.

    Raises:
        ValueError: the record has units or claims that the successor lacks; names them.
    """
    try:
        older = read_summary(path)
    except (OSError, ValueError):
        return
    units, claims = {*units}, {*claims}
    held = [(unit["arm"], unit["seed"]) for unit in older["units"]]
    lost = [
        f"arm {arm!r} seed {seed}" for arm, seed in held if (arm, seed) not in units
    ]
    ids = [claim["id"] for claim in older["claims"]]
    lost += [f"claim {name!r}" for name in ids if name not in claims]
    if lost:
        raise ValueError(
            f"{path} holds {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}, "
            f"which a new record would lack; run all of it, or leave --record out. "
            f"Remove the file first if it is no longer of use."
        )


def _drawn(path: Path) -> tuple[dict[str, str], bytes]:
    """Pictures that a record lists, and its units; none where none can be read."""
    try:
        found = read_json(path)
        listed, units = dict(found[PICTURES]), json_text(found["units"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, b""
    own = {n: c for n, c in listed.items() if n.startswith(f"{path.stem}-")}
    return {check_name("picture", name): c for name, c in own.items()}, units


def read_records(results_dir: str | os.PathLike[str]) -> list[Summary]:
    """All records of a folder, by system, then from smoke to paper.

    Raises:
        ValueError: as :func:`read_record`, of any.
    """
    paths = sorted(Path(results_dir).glob("[!.]*/[!.]*.json"))
    return sorted(map(read_record, paths), key=order)


def read_record(path: Path) -> Summary:
    """Reads ``<results_dir>/<system>/<tier>.json``.

    Raises:
        ValueError: the file is not a record, lies under another name than its own, or
            says what its units do not give (a verdict, interval or mean that was
            changed by hand); names it.
    """
    record = read_summary(path)
    if (record["system"], record["tier"]) != (path.parent.name, path.stem):
        raise ValueError(
            f"{path} is the record of {record['system']}/{record['tier']}; records are "
            f"written by --record, never moved by hand."
        )
    _check_recomputed(record, path)
    return record


def _check_recomputed(record: Summary, path: Path) -> None:
    """Judges a record again from its units, and takes its means again."""
    drawn = {PICTURES: record.get(PICTURES, {})}
    again, given = (_comparable(r | drawn) for r in (merge([record]), record))
    changed = differences(again, given)
    if changed:
        raise ValueError(
            f"{path} does not say what its units give: {'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}. Records are written by --record, "
            f"never by hand: restore the file, or record the run again."
        )


def _comparable(value: Any) -> Any:
    """A summary with its claims by id, plain, numbers to nine digits."""
    if isinstance(value, Mapping):
        found = {str(name): _comparable(each) for name, each in value.items()}
        if "claims" in found and "units" in found:
            found = {key: {} for key in LATER} | found
            found["claims"] = {claim["id"]: claim for claim in found["claims"]}
        return found
    if isinstance(value, list | tuple):
        return [_comparable(each) for each in value]
    return f"{value:.9g}" if isinstance(value, float) else value


def read_summary(path: str | os.PathLike[str]) -> Summary:
    """The summary of a run, or a record, whose parts are of the kinds they should be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no summary; names the file and what is wrong.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path} is not there; give a workdir of a finished run, its summary.json, "
            f"or a record under results/."
        )
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds no summary; give that of a finished run, or write a record "
            f"with --record."
        )
    _check_summary(found, os.fspath(path))
    try:
        check_summary_parts(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or run its command again."
        ) from error
    return found


def _check_summary(summary: Mapping[str, Any], where: str) -> None:
    missing = [key for key in SUMMARY_KEYS if key not in (*summary, *LATER)]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; a record needs "
            f"{', '.join(SUMMARY_KEYS)}. Build it with summaries.summary."
        )


def order(record: Summary) -> tuple[str, int, str]:
    """Sorts records by system, then from smoke to paper."""
    tier = record["tier"]
    return record["system"], (*TIERS, tier).index(tier), tier
