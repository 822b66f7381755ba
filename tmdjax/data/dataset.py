"""What a source loads to."""

import dataclasses
from typing import Any

import numpy as np

from tmdjax.core.checks import check_batch, check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set in host memory, split once and for all.

    Attributes:
        name: as in the registry of sources.
        train: arrays by name, all [n, ...]: 'image' float32 in [-1, 1]
            [n, height, width, channel] or 'point' float32 [n, dim]; 'label' int32
            [n] in [0, num_classes).
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
