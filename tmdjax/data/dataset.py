"""The data set that a source loads: arrays of two splits, checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tmdjax.core.checks import check_batch, check_count, check_finite, check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set in host memory, split once and for all.

    Attributes:
        name: the source's name in the registry.
        train: arrays by name, all [n, ...]: 'image' [n, height, width, channel],
            float32 in [-1, 1], 'video' [n, frame, height, width, channel] of the same
            range (or uint8: ``video_files``), or 'point' [n, dim], float32; 'label'
            int32 [n], in [0, num_classes).
        test: the same names for the held-out samples.
        num_classes: how many labels there are.
        meta: what else a report should say (class names, options).

    Raises:
        ValueError: the splits have different names, an array is empty or of
            another length than its split, or a value is not finite.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    num_classes: int
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.train.keys() != self.test.keys() or not self.train:
            raise ValueError(
                f"data set {self.name!r} has the arrays {sorted(self.train)} for "
                f"training but {sorted(self.test)} for test; both need the same."
            )
        for split in ("train", "test"):
            arrays = getattr(self, split)
            count = len(next(iter(arrays.values())))
            if not count:
                raise ValueError(f"data set {self.name!r} has no {split} sample.")
            for key, array in arrays.items():
                label = f"{self.name} {split}[{key!r}]"
                check_batch(label, array, count)
                check_finite(array, label, "The source is damaged: install it again.")


def count_up_to(name: str, value: int | None, high: int) -> int:
    """A number of samples in [1, high]; None is ``high``.

    Raises:
        TypeError: not an integer.
        ValueError: outside that range.
    """
    count = check_count(name, high if value is None else value)
    check_range(name, count, 1, high)
    return count


def stratified_split(
    arrays: Mapping[str, np.ndarray], test_count: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Splits samples so that each class keeps its share, without random numbers.

    With the samples sorted by class (given order inside a class), the test samples
    are ``test_count`` evenly spaced ranks, so each class is within one sample of
    its share. Both splits keep the given order.

    Args:
        arrays: [n, ...] by name, among them 'label' int [n].
        test_count: held-out samples, in [1, n).

    Returns:
        Training and test samples, copies.

    Raises:
        ValueError: test_count out of range.
    """
    label = arrays["label"]
    check_range("test_count", test_count, 1, len(label), open_high=True)
    steps = np.arange(len(label) + 1) * test_count // len(label)
    is_test = np.empty(len(label), bool)
    is_test[np.argsort(label, kind="stable")] = np.diff(steps) == 1
    return (
        {name: array[~is_test] for name, array in arrays.items()},
        {name: array[is_test] for name, array in arrays.items()},
    )
