"""Tokenizers under one protocol, and the one of a small task.

Special tokens that stand in a text are encoded as such, so a text of strangers must
not hold any: :func:`tmdjax.generation.render_chat` refuses its marks in a message.
"""

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

from tmdjax.core.checks import brief
from tmdjax.core.registry import suggestion


@runtime_checkable
class Tokenizer(Protocol):
    """What an engine, a task and a report need of a tokenizer.

    Attributes:
        vocab_size: one past the largest id; an embedding may have more rows.
        eos_id: id that ends a response.
        stop_ids: all ids that end one, ``eos_id`` first: ends of a turn, and what the
            generation_config of a checkpoint lists.
        stop_strings: texts that end one, for ``EngineConfig.stop_strings``.
        pad_id: id that fills up rows; it may be ``eos_id``.
    """

    vocab_size: int
    eos_id: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added at its ends."""
        ...

    def decode(
        self, ids: Iterable[SupportsIndex], *, skip_special: bool = False
    ) -> str:
        """Text of ids; whatever a model drew has one.

        Args:
            ids: those that name no token, such as rows of a padded embedding, add
                nothing.
            skip_special: special tokens add nothing either, as a scorer wants it;
                without, they stand there by their names.
        """
        ...

    def special_id(self, token: str) -> int:
        """Id of a special token.

        Raises:
            ValueError: there is no special token of this name.
        """
        ...


class CharTokenizer:
    """One id a character, for small tasks, with special tokens of several characters.

    The padding comes first, then the other special tokens, then the characters.

    Args:
        characters: the alphabet, in the order of ids.
        eos: ends a response: a special token, or one of the characters.
        pad: name of the padding.
        specials: more special tokens.

    Raises:
        ValueError: a character or a special token given twice or empty.

    Example:
        >>> tokenizer = CharTokenizer("0123456789+=")
        >>> tokenizer.encode("1+2=<eos>")
        [3, 12, 4, 13, 1]
    """

    def __init__(
        self,
        characters: str,
        *,
        eos: str = "<eos>",
        pad: str = "<pad>",
        specials: Sequence[str] = (),
    ):
        names = [pad, *(() if eos in characters else (eos,)), *specials]
        tokens = [*names, *characters]
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice or "" in tokens:
            raise ValueError(
                f"tokens must differ and not be empty; given twice: {twice}."
            )
        self._tokens = tokens
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._specials = {name: self._ids[name] for name in {*names, eos}}
        # The longest first, so that no name hides one it begins.
        ordered = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)))
        self.vocab_size = len(tokens)
        self.eos_id = self._ids[eos]
        self.stop_ids, self.stop_strings = (self.eos_id,), ()
        self.pad_id = self._ids[pad]

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            ValueError: a character outside the alphabet, by its place.
        """
        ids, position = [], 0
        while position < len(text):
            found = self._pattern.match(text, position)
            if found is None:
                known = "".join(token for token in self._tokens if len(token) == 1)
                raise ValueError(
                    f"character {text[position]!r} at {position} of {brief(text)} is "
                    f"not in the alphabet {brief(known)}."
                )
            ids.append(self._ids[found.group()])
            position = found.end()
        return ids

    def decode(
        self, ids: Iterable[SupportsIndex], *, skip_special: bool = False
    ) -> str:
        """Text of ids; those out of range add nothing.

        Args:
            ids: integers.
            skip_special: leave special tokens out, the end too.
        """
        skipped = set(self._specials.values()) if skip_special else ()
        known = known_ids(ids, self.vocab_size)
        return "".join(self._tokens[i] for i in known if i not in skipped)

    def special_id(self, token: str) -> int:
        """Id of a special token.

        Raises:
            ValueError: there is no special token of this name.
        """
        return special_of(self._specials, token)


def known_ids(ids: Iterable[SupportsIndex], vocab_size: int) -> list[int]:
    """Those in [0, vocab_size), as Python integers (arrays have others)."""
    return [i for i in map(operator.index, ids) if 0 <= i < vocab_size]


def special_of(specials: Mapping[str, int], token: str) -> int:
    """The id of a special token, or an error that names it."""
    if token not in specials:
        known = sorted(specials, key=lambda name: specials[name])
        raise ValueError(
            f"{token!r} is no special token of this tokenizer; it has: "
            f"{', '.join(known) or 'none'}.{suggestion(token, known)}"
        )
    return specials[token]
