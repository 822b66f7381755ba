"""Checkpoints that are either whole or not there.

Orbax writes the arrays into a folder beside; a manifest with the SHA-256 of every
file, and of itself, is written last; then the folder takes its name. What a killed
save left behind is finished or removed by the next one. A checkpoint whose bytes do
not match is passed over, and the one before it is used.

Reading writes nothing: it may go on beside a run that saves, as often as one likes,
and on a folder that cannot be written. Folders of other names are passed over.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from tmdjax.core import trees
from tmdjax.core.checks import check_choice, check_count
from tmdjax.core.files import json_of, sha256, write_atomically
from tmdjax.core.types import PyTree

logger = logging.getLogger("tmdjax")

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_KINDS = ("damaged_step", "old", "step", "new")
_Identity = tuple[int, int]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; earlier ones are intact."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    tree: Any
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the last few and the best.

    Args:
        directory: where they are kept; made on the first save.
        keep_last: how many of the newest to keep.
        best: 'min' or 'max' to also keep the one with the best score, or None.
    """

    def __init__(
        self, directory: str | os.PathLike, keep_last: int = 2, best: str | None = None
    ):
        self.directory = pathlib.Path(directory).absolute()
        self.keep_last = check_count("keep_last", keep_last)
        if best is not None:
            check_choice("best", best, ("min", "max"))
        self.best = best
        self._damaged: dict[pathlib.Path, tuple[_Identity, str]] = {}

    def _folder(self, step: int, kind: str = "step") -> pathlib.Path:
        return self.directory / f"{kind}_{step:010d}"

    def steps(self) -> list[int]:
        """Steps of the finished saves, ascending."""
        return sorted({step for step, _ in self._whole()})

    def _folders(self) -> list[tuple[int, str, pathlib.Path]]:
        """(step, kind, folder) of all that :meth:`_folder` names; kinds sort by age."""
        try:
            names = os.listdir(self.directory)  # at one moment, beside a writer
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for name in names:
            kind, _, digits = name.rpartition("_")
            if kind in _KINDS and digits.isdecimal():
                folder = self._folder(int(digits), kind)
                if folder.name == name:
                    found.append((int(digits), kind, folder))
        return sorted(found, key=lambda f: (f[0], _KINDS.index(f[1])))

    def _whole(self) -> list[tuple[int, pathlib.Path]]:
        """(step, folder) of the finished saves, newest first.

        A save that is about to take its name is one, and one that has just lost it.
        """
        while True:
            folders = self._folders()
            found = [
                (step, folder)
                for step, kind, folder in reversed(folders)
                if _identity(folder) is not None
                and (kind != "new" or _read_manifest(folder) is not None)
                and kind != "damaged_step"
            ]
            if folders == self._folders():  # else a writer renamed some meanwhile
                return found

    def best_step(self) -> int | None:
        """The step with the best finite score; None if no save had one."""
        if self.best is None:
            return None
        scores = {}
        for step, folder in reversed(self._whole()):
            body = _read_manifest(folder)
            if body is not None and body["score"] is not None:
                scores[step] = body["score"]
        choose = min if self.best == "min" else max
        return choose(scores, key=lambda s: (scores[s], s)) if scores else None

    def save(
        self,
        step: int,
        tree: PyTree,
        extra: dict[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Writes one checkpoint, then drops those that need not be kept.

        Args:
            step: number of the checkpoint; an existing one is replaced once the new
                one is whole.
            tree: any pytree of arrays (typed keys as their key data).
            extra: JSON-able rest, e.g. the state of the data iterator.
            score: for the best one; NaN counts as none.

        Raises:
            TypeError: `extra` is not JSON-able.
            CheckpointError: the disk is full, the place unwritable...; what was
                saved earlier is left as it was.
        """
        body = {
            "step": step,
            "extra": json.loads(json.dumps(extra or {})),
            "score": None if score is None or not np.isfinite(score) else float(score),
        }
        new = self._folder(step, "new")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._recover()
            _write(new, body, tree)
            self._swap(step)
        except Exception as error:
            shutil.rmtree(new, ignore_errors=True)
            raise CheckpointError(
                f"cannot write step {step} to {self.directory}: {_first_line(error)}. "
                f"Saved there and intact: {_listed(self.steps())}. Free space or mend "
                f"permissions, then run the same command to go on."
            ) from error
        keep = {*self.steps()[-self.keep_last :], self.best_step()}
        for old in self.steps():
            if old not in keep:
                _remove(self._folder(old))

    def discard(self) -> None:
        """Removes all checkpoints, and the directory if it holds nothing else."""
        for _, _, folder in self._folders():
            _remove(folder)
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _swap(self, step: int) -> None:
        """Gives a whole new folder its name; an old one of that name goes after."""
        old = self._folder(step, "old")
        if self._folder(step).exists():
            self._folder(step).rename(old)
        self._folder(step, "new").rename(self._folder(step))
        if old.exists():
            _remove(old)

    def _recover(self) -> None:
        """Finishes or removes what a killed save left; sets aside what is damaged."""
        for folder in self._damaged:
            if self._known_damage(folder):
                aside = folder.with_name(f"damaged_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        self._damaged.clear()
        for step, kind, folder in self._folders():
            if kind == "new" and _read_manifest(folder) is not None:
                self._swap(step)
        for step, kind, folder in self._folders():
            if kind == "old" and not self._folder(step).exists():
                folder.rename(self._folder(step))
        for _, kind, folder in self._folders():
            if kind in ("new", "old"):
                _remove(folder)

    def restore(self, like: PyTree | None = None, step: int | None = None) -> Any:
        """Reads the newest whole checkpoint (or a given one); writes nothing.

        A damaged checkpoint stays where it is, until the next save by this object sets
        it aside as ``damaged_step_...``. What a run replaces or drops while it is read
        is looked for again.

        Args:
            like: a tree of arrays or shape structs that says structure, dtype and
                sharding; None returns plain nested dicts of numpy arrays. A vector
                of length 0 there stands for one of any length, such as a queue.
            step: that checkpoint and no other.

        Returns:
            A :class:`Restored`, or None if there is no checkpoint.

        Raises:
            CheckpointError: the given step is absent or damaged, or the tree has
                another structure.
        """
        while True:
            there = [(n, f) for n, f in self._whole() if step in (None, n)]
            whole = [(n, f) for n, f in there if not self._known_damage(f)]
            if step is not None and not there:
                raise CheckpointError(
                    f"no checkpoint of step {step} in {self.directory}; there are: "
                    f"{_listed(self.steps())}."
                )
            if not whole:
                if step is None:
                    return None
                raise CheckpointError(
                    f"step {step} in {self.directory} is damaged: "
                    f"{self._known_damage(there[0][1])}."
                )
            number, folder = whole[0]
            before = _identity(folder)
            if before is None:
                continue
            try:
                damage = _damage(folder)
                restored = None if damage else self._read(number, folder, like)
            except Exception:
                if _identity(folder) == before:
                    raise
                continue
            if _identity(folder) != before:  # a writer removed files under our eyes
                continue
            if restored is not None:
                return restored
            assert damage is not None
            self._damaged[folder] = before, damage
            if step is None:
                logger.warning(
                    "step %d in %s is damaged (%s) and passed over; %s",
                    number,
                    self.directory,
                    damage,
                    f"the one before it, step {whole[1][0]}, is used"
                    if whole[1:]
                    else "there is none before it, so this part starts anew",
                )

    def _known_damage(self, folder: pathlib.Path) -> str | None:
        """What was found wrong with a folder, if it is still that save."""
        found, damage = self._damaged.get(folder, (None, None))
        return damage if found == _identity(folder) else None

    def peek(self) -> dict[str, Any] | None:
        """The `extra` of the newest checkpoint whose manifest is whole, or None."""
        bodies = (_read_manifest(folder) for _, folder in self._whole())
        return next((body["extra"] for body in bodies if body is not None), None)

    def _read(self, step: int, folder: pathlib.Path, like: PyTree | None) -> Restored:
        import orbax.checkpoint as ocp

        path = folder / _ARRAYS
        body = _read_manifest(folder)
        assert body is not None  # just verified
        if not path.exists():
            return Restored(step, {} if like is None else like, body["extra"])
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(path)
            saved = getattr(metadata, "item_metadata", metadata).tree
            empty = {
                name: np.zeros(shape, dtype)
                for name, (shape, dtype) in body.get("empty", {}).items()
            }
            if like is None:
                # a numpy target reads what any number of devices wrote
                target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), saved)
                args = ocp.args.StandardRestore(target)
                found = checkpointer.restore(path, args=args)
                tree = jax.tree.map(np.asarray, _with_empty(found, empty))
            else:
                target = serialization.to_state_dict(like)
                held = trees.flatten(_with_empty(saved, empty))
                target = trees.map_with_path(
                    lambda name, leaf: _with_length(leaf, held.get(name)), target
                )
                self._check_structure(step, held, trees.flatten(target))
                target = jax.tree.map(_abstract, _without_empty(target))
                args = ocp.args.StandardRestore(target)
                found = _with_empty(checkpointer.restore(path, args=args), empty)
                tree = serialization.from_state_dict(like, found)
        return Restored(step, tree, body["extra"])

    def _check_structure(
        self, step: int, saved: dict[str, Any], target: dict[str, Any]
    ) -> None:
        found, wanted = (
            {name: tuple(np.shape(leaf)) for name, leaf in leaves.items()}
            for leaves in (saved, target)
        )
        if found != wanted:
            differing = sorted(set(found.items()) ^ set(wanted.items()))[:4]
            raise CheckpointError(
                f"step {step} in {self.directory} belongs to another model or "
                f"optimiser; first differences: {differing}. Use its own config, or "
                f"--fresh to start anew."
            )


def _write(folder: pathlib.Path, body: dict[str, Any], tree: PyTree) -> None:
    import orbax.checkpoint as ocp

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    arrays = serialization.to_state_dict(tree)
    if jax.tree.leaves(arrays):  # orbax refuses a tree without any
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(folder / _ARRAYS, _without_empty(arrays))
    empty = {
        name: [np.shape(leaf), np.dtype(leaf.dtype).name]
        for name, leaf in trees.flatten(arrays).items()
        if _is_empty(leaf)
    }
    body = {**body, "files": _digests(folder)} | ({"empty": empty} if empty else {})
    manifest = {"body": body, "sha256": _text_sha256(body)}
    text = json.dumps(manifest, indent=1, sort_keys=True)
    write_atomically(folder / _MANIFEST, text.encode())


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder; the manifest first, so that none is ever whole by half."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _identity(folder: pathlib.Path) -> _Identity | None:
    """Of a folder's manifest: another save of the same step has another."""
    try:
        found = (folder / _MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest's body; None if it is absent or not as it was written."""
    try:
        manifest = json_of(folder / _MANIFEST)
        body = manifest["body"]
        return body if manifest["sha256"] == _text_sha256(body) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _damage(folder: pathlib.Path) -> str | None:
    body = _read_manifest(folder)
    if body is None:
        return "its manifest is not as it was written"
    found = _digests(folder)
    for name, digest in body["files"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} does not match its SHA-256"
    return None


def _digests(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _text_sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _listed(steps: list[int]) -> str:
    return ", ".join(f"step {step}" for step in steps) or "none"


def _is_empty(leaf: Any) -> bool:
    return 0 in np.shape(leaf)


def _without_empty(tree: PyTree) -> PyTree:
    """Arrays without elements, which orbax refuses, replaced by one zero."""
    return jax.tree.map(lambda x: np.zeros(1) if _is_empty(x) else x, tree)


def _with_empty(tree: PyTree, empty: dict[str, Any]) -> PyTree:
    """The opposite; ``empty`` holds them by name."""
    return trees.map_with_path(lambda name, leaf: empty.get(name, leaf), tree)


def _with_length(leaf: Any, saved: Any) -> Any:
    """A vector of length 0 in the length of the saved one; other leaves as they are."""
    if np.shape(leaf) != (0,) or len(np.shape(saved)) != 1:
        return leaf
    return jax.ShapeDtypeStruct(np.shape(saved), leaf.dtype)


def _abstract(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _first_line(error: BaseException) -> str:
    """Kind and first line, the middle of a long one left out."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(".")
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}"
