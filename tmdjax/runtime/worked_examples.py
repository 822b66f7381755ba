"""Solved problems that are kept, found again, and shown before a prompt."""

import collections
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import check_count
from tmdjax.data.text_tasks import Problem

Words = collections.Counter[str]


class Solved(NamedTuple):
    """A worked example: a problem that was solved in training.

    Attributes:
        prompt: token ids.
        response: token ids, right, and ended by itself.
        words: of the problem, see :func:`words_of`.
        iteration: in which it was written.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    words: Words
    iteration: int


class Memory(NamedTuple):
    """Solved problems, each at most once.

    Attributes:
        seen: how many were ever offered, those that are kept and those that are not;
            not those that replaced the example of a problem that was there.
        solved: those that are kept.
    """

    seen: int = 0
    solved: tuple[Solved, ...] = ()

    def pack(self) -> np.ndarray:
        """As an array that a checkpoint holds: JSON in bytes, uint8 [n]."""
        solved = [each._asdict() for each in self.solved]
        text = json.dumps({"seen": self.seen, "solved": solved})
        return np.frombuffer(text.encode(), np.uint8)


def unpack_memory(packed: Any) -> Memory:
    """The memory of :meth:`Memory.pack`; nothing of an array without elements."""
    if not np.size(packed):
        return Memory()
    found = json.loads(np.asarray(packed, np.uint8).tobytes())
    solved = (
        Solved(
            tuple(each["prompt"]),
            tuple(each["response"]),
            collections.Counter(each["words"]),
            each["iteration"],
        )
        for each in found["solved"]
    )
    return Memory(found["seen"], tuple(solved))


def remember(
    memory: Memory, solved: Sequence[Solved], size: int, order: np.random.Generator
) -> Memory:
    """A memory with further solved problems.

    A problem that is there already has its example replaced by the newer one. Which
    problems stay is drawn evenly from all that were ever offered (a reservoir), where
    one that was dropped and is solved again counts once more.

    Args:
        memory: so far.
        solved: in the order they come in.
        size: most problems, >= 1.
        order: draws which ones stay.
    """
    check_count("size", size)
    kept, seen = list(memory.solved), memory.seen
    held = {each.prompt: i for i, each in enumerate(kept)}
    for each in solved:
        if each.prompt in held:
            kept[held[each.prompt]] = each
            continue
        seen += 1
        if len(kept) < size:
            held[each.prompt] = len(kept)
            kept.append(each)
        elif (at := int(order.integers(seen))) < size:
            del held[kept[at].prompt]
            held[each.prompt], kept[at] = at, each
    return Memory(seen, tuple(kept))


def words_of(problem: Any) -> Words:
    """The numbers and words of a problem's text, each as often as it stands there."""
    text = problem.prompt if isinstance(problem, Problem) else str(problem)
    return collections.Counter(re.findall(r"\d+|[^\W\d_]+", text))


def retrieve(
    prompt: Sequence[int],
    words: Mapping[str, int],
    known: Sequence[Solved],
    count: int,
    order: np.random.Generator,
) -> list[Solved]:
    """Solved problems that share most words with one, the most alike last.

    Args:
        prompt: token ids of the problem.
        words: of the problem.
        known: to choose from. The problem itself is left out, and so is one of exactly
            its words, whatever their order.
        count: most of them, >= 0.
        order: decides among those that share as much.
    """
    own, tokens = collections.Counter(words), tuple(prompt)
    found = [
        ((own & each.words).total(), draw, each)
        for draw, each in zip(order.permutation(len(known)).tolist(), known)
        if each.prompt != tokens and each.words != own
    ]
    best = sorted(found, key=lambda item: item[:2])[max(0, len(found) - count) :]
    return [each for _, _, each in best]


def show(
    prompt: Sequence[int], examples: Sequence[Solved], longest: int
) -> tuple[tuple[int, ...], int]:
    """A prompt with worked examples before it, and how many found no room.

    An example is the ids of its prompt and its response, one after the other. Those
    that do not fit are left out whole, the first ones first; with none the prompt is as
    it was.

    Args:
        prompt: token ids of the problem.
        examples: in their order.
        longest: tokens that the result may have.
    """
    for dropped in range(len(examples) + 1):
        shown = [(*each.prompt, *each.response) for each in examples[dropped:]]
        text = tuple(token for part in (*shown, prompt) for token in part)
        if len(text) <= longest:
            return text, dropped
    return tuple(prompt), len(examples)
