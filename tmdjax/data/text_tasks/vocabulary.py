"""The one small vocabulary of the procedural tasks: a character is a token."""

from collections.abc import Sequence

import numpy as np

from tmdjax.core.types import Int
from tmdjax.domains.arithmetic.written_work import ANSWER, END, PASS

PAD = "_"
START = ">"
"""Opens a prompt."""

GIVEN = "="
"""Closes a prompt."""

CHARACTERS = f"{PAD}{START}{ANSWER}{END}{PASS}{GIVEN}0123456789+-*/(),:srdk"
"""Id i stands for character i; padding is id 0."""

_IDS = {character: i for i, character in enumerate(CHARACTERS)}


def encode(text: str) -> Int[np.ndarray, "position"]:
    """Ids of a text, int32.

    Raises:
        ValueError: a character outside ``CHARACTERS``.
    """
    for at, character in enumerate(text):
        if character not in _IDS:
            raise ValueError(
                f"text {text!r}: character {at + 1}, {character!r}, is not among "
                f"{CHARACTERS!r}."
            )
    return np.array([_IDS[character] for character in text], np.int32)


def decode(ids: Sequence[int] | Int[np.ndarray, "position"]) -> str:
    """The text of ids, padding dropped.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    row = np.asarray(ids, np.int64).tolist()
    for i in row:
        if not 0 <= i < len(CHARACTERS):
            raise ValueError(
                f"id {i} is outside the vocabulary, [0, {len(CHARACTERS)})."
            )
    return "".join(CHARACTERS[i] for i in row).replace(PAD, "")
