"""The handwritten digits that come with scikit-learn: 1,797 of 8x8 grey levels."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tmdjax.data.dataset import Dataset, stratified_split

FILES = {
    "datasets/data/digits.csv.gz": (
        "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
    )
}
"""SHA-256 of the file by its name."""

TEST_COUNT = 597


def load_digits(files: Mapping[str, Path]) -> Dataset:
    """Reads the digits and splits them into 1,200 for training and 597 for test.

    The grey levels 0..16 map to [-1, 1]. The split is that of
    :func:`stratified_split`: every third or fourth sample of a class is a test
    sample. The same writers appear in both.

    Args:
        files: path of the package's ``FILES``.

    Returns:
        'image' float32 [n, 8, 8, 1] and 'label' int32 [n].
    """
    table = np.loadtxt(*files.values(), delimiter=",", dtype=np.float32)
    train, test = stratified_split(
        {
            "image": (table[:, :64] / 8 - 1).reshape(-1, 8, 8, 1),
            "label": table[:, 64].astype(np.int32),
        },
        TEST_COUNT,
    )
    return Dataset(
        name="digits",
        train=train,
        test=test,
        num_classes=10,
        meta={"class_names": tuple("0123456789")},
    )
