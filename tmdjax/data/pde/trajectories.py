"""Trajectories of fields: what a set is, how it is stored, and cut for training."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import check_batch, check_count, check_finite, check_range
from tmdjax.core.trees import content_hash
from tmdjax.data.pipeline import Batch, Batches, BatchPlan
from tmdjax.data.record_sets import read_manifest, read_records, write_record_set

KIND = "tmdjax.trajectories"
_KEYS = (
    *("kind", "version", "records", "trajectories", "shape", "parameters", "ranges"),
    *("equation", "meta"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Fields on a periodic grid at equal steps of time, one trajectory a row.

    Attributes:
        states: float32 [trajectory, frame, *space, channel].
        dt: float64 [trajectory], time between frames.
        dx: float64 [trajectory], distance of points.
        parameters: float64 [trajectory] each, by name: 'viscosity' and such.
        equation: what it is a solution of, a name.
        meta: JSON-able facts: how it was made.

    Raises:
        TypeError: states that are not float32.
        ValueError: arrays of different length, no frame, a step or distance that is not
            positive, or a value that is not finite.
    """

    states: np.ndarray
    dt: np.ndarray
    dx: np.ndarray
    parameters: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    equation: str = ""
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.states.dtype != np.float32:
            raise TypeError(f"states are {self.states.dtype}; give float32.")
        if self.states.ndim < 4 or not self.states.size:
            raise ValueError(
                f"states have shape {self.states.shape}; give [trajectory, frame, "
                f"*space, channel], at least one of each."
            )
        count = len(self.states)
        columns = self.columns()
        for name, array in columns.items():
            check_batch(name, array, count)
            if array.ndim != 1:
                raise ValueError(
                    f"{name} has shape {array.shape}; give one number a trajectory."
                )
            check_finite(array, name)
        for name in ("dt", "dx"):
            check_range(name, float(columns[name].min()), 0, open_low=True)
        check_finite(self.states, "states", "Leave such trajectories out.")

    def columns(self) -> dict[str, np.ndarray]:
        """dt, dx and the parameters by name, float64 [trajectory] each."""
        given = {"dt": self.dt, "dx": self.dx, **self.parameters}
        return {name: np.asarray(array, np.float64) for name, array in given.items()}

    def rows(self, rows: Any) -> "Trajectories":
        """Some of the trajectories, a slice or indices."""
        return dataclasses.replace(
            self,
            states=self.states[rows],
            dt=self.dt[rows],
            dx=self.dx[rows],
            parameters={name: a[rows] for name, a in self.parameters.items()},
        )


def write_trajectories(
    folder: str | os.PathLike[str], trajectories: Trajectories
) -> Path:
    """Stores a set, a record a trajectory; an older one stays until this one is whole.

    Args:
        folder: made where it does not exist.
        trajectories: to be stored.

    Returns:
        The path of the manifest.

    Raises:
        OSError: the place cannot be written; an older set is intact.
        ValueError: the folder has a manifest.json of something else, which stays.
    """
    described = {"equation": trajectories.equation, "meta": dict(trajectories.meta)}
    described |= {
        "shape": list(trajectories.states.shape[1:]),
        "parameters": sorted(trajectories.parameters),
        "ranges": {
            name: [float(column.min()), float(column.max())]
            for name, column in trajectories.columns().items()
        },
    }
    arrays = {"states": trajectories.states, **trajectories.columns()}
    return write_record_set(folder, KIND, "trajectories", arrays, described)


def read_trajectories(folder: str | os.PathLike[str]) -> Trajectories:
    """A set that :func:`write_trajectories` stored.

    Raises:
        FileNotFoundError: manifest or records are not there.
        ValueError: they are damaged, or do not belong together.
    """
    manifest = read_manifest(folder, KIND, _KEYS)
    names = manifest["parameters"]
    arrays = read_records(
        folder, manifest, "trajectories", ("states", "dt", "dx", *names)
    )
    if list(arrays["states"].shape[1:]) != manifest["shape"]:
        raise ValueError(
            f"records of {folder} have shape {list(arrays['states'].shape[1:])}, its "
            f"manifest says {manifest['shape']}; copy both again."
        )
    return Trajectories(
        states=arrays["states"],
        dt=arrays["dt"],
        dx=arrays["dx"],
        parameters={name: arrays[name] for name in names},
        equation=manifest["equation"],
        meta=manifest["meta"],
    )


def windows(
    trajectories: Trajectories,
    batch_size: int,
    seed: int = 0,
    *,
    frames: int = 2,
    stride: int = 1,
    **options: Any,
) -> Batches:
    """Endless batches of successive frames, from every start in every trajectory.

    Args:
        trajectories: to cut.
        batch_size: windows of a batch.
        seed: of the shuffle.
        frames: of a window: those a model sees and those it is to predict.
        stride: frames of the set between two of a window, so that a model's step is
            ``stride * dt``.
        **options: shuffle, drop_remainder, shard_index and shard_count of
            :class:`tmdjax.data.BatchPlan`.

    Returns:
        Iterator over 'states' float32 [batch, frames, *space, channel], the set's 'dt',
        'dx' and parameters, float32 [batch] (of the set's frames, not of the model's
        step), and 'trajectory', int32 [batch], the row of the set.

    Raises:
        TypeError, ValueError: numbers out of range, or trajectories shorter than a
            window.
    """
    frames, stride = check_count("frames", frames, 2), check_count("stride", stride)
    states, columns = trajectories.states, trajectories.columns()
    starts = states.shape[1] - stride * (frames - 1)
    if starts < 1:
        raise ValueError(
            f"no targets: a window of frames={frames} at stride={stride} spans "
            f"{stride * (frames - 1) + 1} frames, and a trajectory has "
            f"{states.shape[1]}; use a smaller stride, or longer trajectories."
        )
    plan = BatchPlan(
        count=len(states) * starts, batch_size=batch_size, seed=seed, **options
    )
    reach = stride * np.arange(frames)
    small = {name: column.astype(np.float32) for name, column in columns.items()}

    def gather(indices: np.ndarray) -> Batch:
        row, start = np.divmod(indices, starts)
        batch = {name: column[row] for name, column in small.items()}
        frames = states[row[:, None], start[:, None] + reach]
        return {"states": frames, **batch, "trajectory": row.astype(np.int32)}

    def named() -> str:
        return f"{content_hash({'states': states, **columns})}/{frames}/{stride}"

    return Batches(plan, gather, named)


def every(states: Any, stride: int, frames: int | None = None) -> np.ndarray:
    """Frames 0, stride, 2 stride and so on, as a rollout from frame 0 has them.

    Args:
        states: [trajectory, frame, ...].
        stride: of the model's step.
        frames: how many after the first; None takes all there are.

    Returns:
        [frame, trajectory, ...], as a scan stacks them, the first one included.

    Raises:
        ValueError: no frame after the first.
    """
    states, stride = np.asarray(states), check_count("stride", stride)
    last = (states.shape[1] - 1) // stride
    wanted = last if frames is None else check_count("frames", frames)
    if not 1 <= wanted <= last:
        raise ValueError(
            f"no targets: {wanted} steps of stride={stride} and a trajectory of "
            f"{states.shape[1]} frames, which has {last}; use a smaller stride."
        )
    return np.moveaxis(states[:, : wanted * stride + 1 : stride], 1, 0)
