"""The handwritten digits that come with scikit-learn: 1,797 of 8x8 grey levels."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tmdjax.data.dataset import Dataset

FILE = "datasets/data/digits.csv.gz"
TEST_COUNT = 597


def load_digits(files: Mapping[str, Path]) -> Dataset:
    """Reads the digits and splits them into 1,200 for training and 597 for test.

    The grey levels 0..16 map to [-1, 1]. The split is stratified and needs no
    random numbers: with the samples sorted by class (file order inside a class),
    every third or fourth is a test sample, 597 evenly spaced ranks of 1,797, so
    each class is within one sample of its share. Both splits keep file order.
    The same writers appear in both.

    Args:
        files: path of the package's ``FILE``.

    Returns:
        'image' float32 [n, 8, 8, 1] and 'label' int32 [n].
    """
    table = np.loadtxt(files[FILE], delimiter=",", dtype=np.float32)
    image = (table[:, :64] / 8 - 1).reshape(-1, 8, 8, 1)
    label = table[:, 64].astype(np.int32)
    is_test = _stratified(label, TEST_COUNT)
    return Dataset(
        name="digits",
        train={"image": image[~is_test], "label": label[~is_test]},
        test={"image": image[is_test], "label": label[is_test]},
        num_classes=10,
        meta={"class_names": tuple("0123456789")},
    )


def _stratified(label: np.ndarray, test_count: int) -> np.ndarray:
    """Mask [n] of ``test_count`` evenly spaced ranks in class order."""
    steps = np.arange(len(label) + 1) * test_count // len(label)
    mask = np.empty(len(label), bool)
    mask[np.argsort(label, kind="stable")] = np.diff(steps) == 1
    return mask
