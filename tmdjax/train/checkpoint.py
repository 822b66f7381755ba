"""Checkpoints that are either whole or not there.

Orbax writes the arrays into a folder beside; a manifest with the SHA-256 of every
file, and of itself, is written last; then the folder takes its name. What a killed
save left behind is finished or removed by the next one. A checkpoint whose bytes do
not match is set aside, and the one before it is used.
"""

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
from tmdjax.core.files import write_atomically
from tmdjax.core.types import PyTree

logger = logging.getLogger("tmdjax")

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"


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

    def _folder(self, step: int, kind: str = "step") -> pathlib.Path:
        return self.directory / f"{kind}_{step:010d}"

    def steps(self) -> list[int]:
        """Steps of the finished saves, ascending."""
        manifests = self.directory.glob(f"step_*/{_MANIFEST}")
        return sorted(int(m.parent.name.removeprefix("step_")) for m in manifests)

    def best_step(self) -> int | None:
        """The step with the best finite score; None if no save had one."""
        if self.best is None:
            return None
        bodies = {step: _read_manifest(self._folder(step)) for step in self.steps()}
        scores = {
            step: body["score"]
            for step, body in bodies.items()
            if body is not None and body["score"] is not None
        }
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
                (self._folder(old) / _MANIFEST).unlink()
                shutil.rmtree(self._folder(old))

    def _swap(self, step: int) -> None:
        """Gives a whole new folder its name; an old one of that name goes after."""
        old = self._folder(step, "old")
        if self._folder(step).exists():
            self._folder(step).rename(old)
        self._folder(step, "new").rename(self._folder(step))
        shutil.rmtree(old, ignore_errors=True)

    def _recover(self) -> None:
        """Finishes or removes what a killed save left behind."""
        for folder in self.directory.glob("new_*"):
            step = int(folder.name.removeprefix("new_"))
            if _read_manifest(folder) is not None:
                self._swap(step)
        for folder in self.directory.glob("old_*"):
            step = int(folder.name.removeprefix("old_"))
            if not self._folder(step).exists():
                folder.rename(self._folder(step))
        for pattern in ("new_*", "old_*"):
            for folder in self.directory.glob(pattern):
                shutil.rmtree(folder)

    def restore(self, like: PyTree | None = None, step: int | None = None) -> Any:
        """Reads the newest whole checkpoint (or a given one).

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
        if self.directory.exists():
            self._recover()
        if step is not None and step not in self.steps():
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; there are: "
                f"{_listed(self.steps())}."
            )
        for candidate in reversed(self.steps()) if step is None else [step]:
            damage = _damage(self._folder(candidate))
            if damage is None:
                return self._read(candidate, like)
            if step is not None:
                raise CheckpointError(
                    f"step {step} in {self.directory} is damaged: {damage}."
                )
            aside = self._folder(candidate, "damaged_step")
            shutil.rmtree(aside, ignore_errors=True)
            self._folder(candidate).rename(aside)
            earlier = self.steps()
            logger.warning(
                "step %d in %s is damaged (%s) and set aside as %s; %s",
                candidate,
                self.directory,
                damage,
                aside.name,
                f"the one before it, step {earlier[-1]}, is used"
                if earlier
                else "there is none before it, so this part starts anew",
            )
        return None

    def peek(self) -> dict[str, Any] | None:
        """The `extra` of the newest checkpoint whose manifest is whole, or None."""
        bodies = (_read_manifest(self._folder(step)) for step in reversed(self.steps()))
        return next((body["extra"] for body in bodies if body is not None), None)

    def _read(self, step: int, like: PyTree | None) -> Restored:
        import orbax.checkpoint as ocp

        path = self._folder(step) / _ARRAYS
        body = _read_manifest(self._folder(step))
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


def _read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest's body; None if it is absent or not as it was written."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
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
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
