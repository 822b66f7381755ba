"""Demonstrations: what was seen and done in episodes, to be imitated.

A set is stored in a folder, one ArrayRecord record a step, beside a manifest that says
what it is: sizes, smallest and largest values, returns, and how it was made. Files of
D4RL and Minari are read by :mod:`tmdjax.data.demonstration_files`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import check_batch, check_count, check_finite, first_few
from tmdjax.data.record_sets import read_manifest, read_records, write_record_set

KIND = "tmdjax.demonstrations"
_FIELDS = ("observation", "action", "reward", "terminated", "truncated")
_KEYS = ("kind", "version", "records", "steps", "episodes", "returns", "meta")
_FLOATS = (2, np.dtype(np.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Steps of episodes, one after the other.

    Attributes:
        observation: float32 [step, feature] or uint8 [step, height, width, channel],
            as it was before the action.
        action: float32 [step, action].
        reward: float32 [step].
        terminated: bool [step]; the episode ended with the step.
        truncated: bool [step]; it was cut there.
        meta: JSON-able facts: who acted, seeds, mixture.

    Raises:
        TypeError: an array of another dtype, or a value that is no array.
        ValueError: no step, arrays of different length or of another number of axes, a
            value that is not finite, or a last step that ends no episode.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.arrays().items():
            if not hasattr(value, "dtype"):
                raise TypeError(f"{name} is a {type(value).__name__}; give an array.")
        count = len(self.action)
        if not count:
            raise ValueError("demonstrations hold no step; give at least one.")
        image = self.observation.dtype == np.uint8
        known: dict[str, Any] = dict.fromkeys(_FIELDS, (1, np.dtype(bool)))
        known["observation"] = (4, np.dtype(np.uint8)) if image else _FLOATS
        known |= {"action": _FLOATS, "reward": (1, np.dtype(np.float32))}
        for name, (axes, dtype) in known.items():
            array = getattr(self, name)
            check_batch(name, array, count)
            if array.dtype != dtype:
                raise TypeError(
                    f"{name} is {array.dtype}; give {dtype}"
                    f"{' (or uint8 images)' if name == 'observation' else ''}."
                )
            if array.ndim != axes:
                raise ValueError(
                    f"{name} has shape {array.shape}; it needs {axes} axes, the first "
                    f"of which is the step."
                )
            check_finite(array, name, "Leave such episodes out.")
        if not self.ends[-1]:
            raise ValueError(
                "the last step ends no episode; mark it as truncated, or leave the "
                "unfinished episode out."
            )

    @property
    def ends(self) -> np.ndarray:
        """Bool [step]: whether an episode ended or was cut with the step."""
        return self.terminated | self.truncated

    @property
    def returns(self) -> np.ndarray:
        """float64 [episode]: sums of rewards."""
        starts = np.flatnonzero(np.concatenate([[True], self.ends[:-1]]))
        return np.add.reduceat(self.reward.astype(np.float64), starts)

    def arrays(self) -> dict[str, np.ndarray]:
        """The five arrays by name."""
        return {name: getattr(self, name) for name in _FIELDS}


class Bounds(NamedTuple):
    """Smallest and largest value of every feature, float32 [feature] each."""

    low: np.ndarray
    high: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        """What is mapped to 0."""
        return (self.low + self.high) / 2

    @property
    def half_width(self) -> np.ndarray:
        """What one unit becomes: the bounds are mapped to -1 and 1."""
        return (self.high - self.low) / 2


def action_bounds(demonstrations: Demonstrations) -> Bounds:
    """Of the actions.

    Raises:
        ValueError: a dimension that is constant, which nothing maps to [-1, 1].
    """
    action = demonstrations.action
    low, high = action.min(0), action.max(0)
    constant = np.flatnonzero(low == high)
    if len(constant):
        named = first_few(f"{i} (always {low[i]:g})" for i in constant)
        raise ValueError(
            f"action dimension {named} is constant over all {len(action)} steps, so "
            f"that it has no scale; leave the dimension out, or add demonstrations "
            f"that use it."
        )
    return Bounds(low, high)


def observation_bounds(demonstrations: Demonstrations) -> Bounds:
    """Of observations that are vectors; one unit around a feature that is constant.

    Raises:
        ValueError: observations are images.
    """
    seen = demonstrations.observation
    if seen.dtype == np.uint8:
        raise ValueError("observations are images, which are not scaled.")
    low, high = seen.min(0), seen.max(0)
    margin = np.where(low == high, np.float32(1), np.float32(0))
    return Bounds(low - margin, high + margin)


def action_chunks(demonstrations: Demonstrations, length: int) -> dict[str, np.ndarray]:
    """Every observation that is followed by a whole chunk of actions.

    Args:
        demonstrations: of n steps.
        length: actions of a chunk; none reaches from one episode into the next.

    Returns:
        'observation' [m, ...] and 'action' float32 [m, length * action], the first
        action first.

    Raises:
        ValueError: no episode has so many steps.
    """
    length = check_count("length", length)
    count = len(demonstrations.action)
    ends = np.flatnonzero(demonstrations.ends)
    end_of = ends[np.searchsorted(ends, np.arange(count))]
    starts = np.flatnonzero(np.arange(count) + length - 1 <= end_of)
    if not len(starts):
        longest = int(np.diff(np.concatenate([[-1], ends])).max())
        raise ValueError(
            f"no episode has length={length} steps, the longest {longest}; use shorter "
            f"chunks."
        )
    rows = starts[:, None] + np.arange(length)
    return {
        "observation": demonstrations.observation[starts],
        "action": demonstrations.action[rows].reshape(len(starts), -1),
    }


def write_demonstrations(
    folder: str | os.PathLike[str], demonstrations: Demonstrations
) -> Path:
    """Stores a set; an older one in the folder is replaced when this one is whole.

    Args:
        folder: made where it does not exist.
        demonstrations: to be stored.

    Returns:
        The path of the manifest.

    Raises:
        OSError: the place cannot be written; an older set is intact.
        ValueError: the folder has a manifest.json of something else, which stays.
    """
    arrays = demonstrations.arrays()
    described = {
        "episodes": int(demonstrations.ends.sum()),
        "returns": demonstrations.returns.tolist(),
        **{
            key: {
                "shape": list(array.shape[1:]),
                "dtype": str(array.dtype),
                "low": array.min(0).tolist() if array.ndim == 2 else None,
                "high": array.max(0).tolist() if array.ndim == 2 else None,
            }
            for key, array in arrays.items()
            if key in _FIELDS[:2]
        },
        "meta": dict(demonstrations.meta),
    }
    return write_record_set(folder, KIND, "steps", arrays, described)


def read_demonstrations(folder: str | os.PathLike[str]) -> Demonstrations:
    """A set that :func:`write_demonstrations` stored.

    Raises:
        FileNotFoundError: manifest or records are not there.
        ValueError: they are damaged, or do not belong together.
    """
    manifest = read_manifest(folder, KIND, {*_KEYS, *_FIELDS[:2]})
    arrays = read_records(folder, manifest, "steps", _FIELDS)
    found = Demonstrations(**arrays, meta=manifest["meta"])
    if (episodes := int(found.ends.sum())) != manifest["episodes"]:
        raise ValueError(
            f"{Path(folder, manifest['records'])} holds {episodes} episodes, its "
            f"manifest says {manifest['episodes']}; copy both again."
        )
    return found
