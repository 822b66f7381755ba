"""Checkpoints that are either whole or not there.

Orbax writes the arrays; a manifest with the SHA-256 of every file is written
last. A directory without manifest is an interrupted save and is ignored; one
whose files do not match is set aside, and the checkpoint before it is used.
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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON atomically."""
    text = json.dumps(value, indent=1, sort_keys=True)
    write_atomically(path, text.encode())


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
        self.keep_last = keep_last
        self.best = best

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / f"step_{step:010d}"

    def _manifest(self, step: int) -> dict[str, Any]:
        return json.loads((self._folder(step) / _MANIFEST).read_text())

    def steps(self) -> list[int]:
        """Steps of the finished saves, ascending."""
        manifests = self.directory.glob(f"step_*/{_MANIFEST}")
        return sorted(int(m.parent.name.removeprefix("step_")) for m in manifests)

    def _score(self, step: int) -> float | None:
        try:
            score = self._manifest(step)["score"]
        except (ValueError, KeyError):
            return None
        return score if score is not None and np.isfinite(score) else None

    def best_step(self) -> int | None:
        """The step with the best score; None if no save had one."""
        scores = {step: self._score(step) for step in self.steps()}
        scores = {step: score for step, score in scores.items() if score is not None}
        if self.best is None or not scores:
            return None
        choose = min if self.best == "min" else max
        return choose(scores, key=lambda step: (scores[step], step))

    def save(
        self,
        step: int,
        tree: PyTree,
        extra: dict[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Writes one checkpoint, then drops those that need not be kept.

        Args:
            step: number of the checkpoint; an existing one is replaced.
            tree: any pytree of arrays (typed keys as their key data).
            extra: JSON-able rest, e.g. the state of the data iterator.
            score: for the best one.

        Raises:
            CheckpointError: the disk is full, the place unwritable...; what was
                saved earlier is left as it was.
        """
        folder = self._folder(step)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write(folder, step, tree, extra or {}, score)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            earlier = self.steps()
            kept = (
                f"step {earlier[-1]} is intact" if earlier else "there is none before"
            )
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.directory}: "
                f"{_first_line(error)}. The one before: {kept}. Free space or mend "
                f"permissions, then run the same command to go on."
            ) from error
        keep = {*self.steps()[-self.keep_last :], self.best_step()}
        for old in self.steps():
            if old not in keep:
                (self._folder(old) / _MANIFEST).unlink()
                shutil.rmtree(self._folder(old))

    def _write(
        self,
        folder: pathlib.Path,
        step: int,
        tree: PyTree,
        extra: dict[str, Any],
        score: float | None,
    ) -> None:
        import orbax.checkpoint as ocp

        json.dumps(extra)  # refuses what is not JSON before anything is written
        if folder.exists():
            (folder / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
        arrays = serialization.to_state_dict(tree)
        folder.mkdir()
        if jax.tree.leaves(arrays):  # orbax refuses a tree without any
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(folder / _ARRAYS, arrays)
        manifest = {
            "step": step,
            "extra": extra,
            "score": None if score is None else float(score),
            "files": _digests(folder),
        }
        write_json(folder / _MANIFEST, manifest)

    def restore(self, like: PyTree | None = None, step: int | None = None) -> Any:
        """Reads the newest whole checkpoint (or a given one).

        Args:
            like: a tree of arrays or shape structs that says structure, dtype and
                sharding; None returns plain nested dicts of numpy arrays.
            step: that checkpoint and no other.

        Returns:
            A :class:`Restored`, or None if there is no checkpoint.

        Raises:
            CheckpointError: the given step is absent or damaged, or the tree has
                another structure.
        """
        if step is not None and step not in self.steps():
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; there are "
                f"{self.steps() or 'none'}."
            )
        for candidate in reversed(self.steps()) if step is None else [step]:
            damage = self._damage(candidate)
            if damage is None:
                return self._read(candidate, like)
            if step is not None:
                raise CheckpointError(f"checkpoint of step {step} is damaged: {damage}")
            aside = self._folder(candidate).with_name(f"damaged_step_{candidate:010d}")
            shutil.rmtree(aside, ignore_errors=True)
            self._folder(candidate).rename(aside)
            logger.warning(
                "checkpoint of step %d is damaged (%s); it is set aside as %s and the "
                "one before it is used",
                candidate,
                damage,
                aside.name,
            )
        return None

    def _damage(self, step: int) -> str | None:
        folder = self._folder(step)
        try:
            expected = self._manifest(step)["files"]
        except (ValueError, KeyError):
            return "its manifest cannot be read"
        found = _digests(folder)
        for name, digest in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != digest:
                return f"{name} does not match its SHA-256"
        return None

    def _read(self, step: int, like: PyTree | None) -> Restored:
        import orbax.checkpoint as ocp

        path = self._folder(step) / _ARRAYS
        extra = self._manifest(step)["extra"]
        if not path.exists():
            return Restored(step, {} if like is None else like, extra)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            if like is None:
                tree = jax.tree.map(np.asarray, checkpointer.restore(path))
            else:
                target = serialization.to_state_dict(like)
                self._check_structure(step, checkpointer.metadata(path), target)
                args = ocp.args.StandardRestore(jax.tree.map(_abstract, target))
                found = checkpointer.restore(path, args=args)
                tree = serialization.from_state_dict(like, found)
        return Restored(step, tree, extra)

    def _check_structure(self, step: int, metadata: Any, target: PyTree) -> None:
        saved = trees.flatten(getattr(metadata, "item_metadata", metadata).tree)
        wanted = trees.flatten(target)
        saved = {name: tuple(leaf.shape) for name, leaf in saved.items()}
        wanted = {name: tuple(np.shape(leaf)) for name, leaf in wanted.items()}
        if saved != wanted:
            differing = sorted(set(saved.items()) ^ set(wanted.items()))[:4]
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} belongs to another "
                f"model or optimiser; first differences: {differing}. Use its own "
                f"config, or --fresh to start anew."
            )


def _abstract(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
