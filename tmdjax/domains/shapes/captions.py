"""English captions of captioned shapes: written, read, and as ids of words.

:func:`parse` inverts every template of :mod:`tmdjax.domains.shapes.grammar`, and more:
any of their openings, numbers, synonyms and endings in any mixture:

    text     = [opening] scene [ending]
    scene    = object relation object [and object] | relation object verb object
               [and object] | object [and object [and object]]
               | besides object [and object] verb object
    object   = number {adjective} [colour] shape [in colour]

Adjectives of ``grammar.ADJECTIVES`` mean nothing; they distract. Host code.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.registry import suggestion
from tmdjax.core.types import Bool, Int
from tmdjax.domains.shapes import grammar
from tmdjax.domains.shapes.grammar import TEMPLATES, Template
from tmdjax.domains.shapes.specs import (
    CLAUSES,
    COLOURS,
    FIELDS,
    SHAPES,
    Specs,
    check_specs,
    tag_of,
)


def caption(spec: Mapping[str, Any], template: int, rng: np.random.Generator) -> str:
    """Says a spec in words.

    Args:
        spec: one row of a batch of specs: 'count', 'colour', 'shape' int [3] and
            'relation' int [].
        template: index into ``TEMPLATES``.
        rng: chooses among synonyms and adjectives; the canonical form needs none.

    Returns:
        Lower-case words separated by single spaces.

    Raises:
        ValueError: a bad spec, or no such template.
    """
    check_range("template", template, 0, len(TEMPLATES) - 1)
    check_specs({name: np.asarray(value)[None] for name, value in spec.items()})
    return _say(spec, TEMPLATES[template], rng)


def _say(spec: Mapping[str, Any], form: Template, rng: np.random.Generator) -> str:
    used = [k for k in range(CLAUSES) if spec["count"][k]]
    objects = [_object(spec, k, form, rng) for k in used]
    relation = int(spec["relation"])
    wording = form.wording
    conjunction = f" {_pick(grammar.AND[wording], rng)} "
    if relation:
        phrase = _pick(grammar.RELATIONS[wording][relation - 1], rng)
        if form.inverted:
            verb = _pick(grammar.VERBS[wording], rng)
            pair = f"{phrase} {objects[1]} {verb} {objects[0]}"
        else:
            pair = f"{objects[0]} {phrase} {objects[1]}"
        scene = conjunction.join([pair, *objects[2:]])
    elif form.inverted and len(objects) > 1:
        besides = _pick(grammar.BESIDES[wording], rng)
        verb = _pick(grammar.VERBS[wording], rng)
        scene = f"{besides} {conjunction.join(objects[1:])} {verb} {objects[0]}"
    else:
        scene = conjunction.join(objects)
    return " ".join(filter(None, (form.opening, scene, form.ending)))


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[0] if len(options) == 1 else options[int(rng.integers(len(options)))]


def _object(
    spec: Mapping[str, Any], clause: int, form: Template, rng: np.random.Generator
) -> str:
    count, colour, shape = (int(spec[name][clause]) for name in FIELDS[:3])
    other = grammar.SYNONYMS[form.wording]
    noun, hue = SHAPES[shape], ""
    if form.synonyms:
        noun = _pick(other["shapes"][shape], rng)
    if colour >= 0:
        hue = [*COLOURS][colour]
        if form.synonyms:
            hue = _pick(other["colours"][colour], rng)
    words = [_pick(grammar.ADJECTIVES, rng)] if form.adjectives else []
    if hue and not form.colour_last:
        words.append(hue)
    words.append(noun if count == 1 else grammar.plural(noun))
    if hue and form.colour_last:
        words += [grammar.POST_COLOUR[form.wording], hue]
    number = grammar.NUMBERS[form.numbers][count - 1]
    return " ".join([number[len(number) > 1 and words[0][0] in "aeiou"], *words])


def _phrases(*texts: str) -> list[tuple[str, ...]]:
    """As words, the longest first."""
    return sorted({tuple(text.split()) for text in texts}, key=len, reverse=True)


def _by_phrase(options: Iterable[tuple[str, int]]) -> dict[tuple[str, ...], int]:
    """Meaning by words, the longest first."""
    found = {tuple(text.split()): meaning for text, meaning in options}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _flat(table: Mapping[str, Sequence[str]]) -> list[str]:
    return [text for texts in table.values() for text in texts]


_NUMBER_PHRASES = _by_phrase(
    (text, count)
    for style in grammar.NUMBERS.values()
    for count, texts in enumerate(style, 1)
    for text in texts
)
_RELATION_PHRASES = _by_phrase(
    (text, relation)
    for style in grammar.RELATIONS.values()
    for relation, texts in enumerate(style, 1)
    for text in texts
)
_HUES, _NOUNS = (
    {name: i for i, name in enumerate(plain)}
    | {
        name: i
        for table in grammar.SYNONYMS.values()
        for i, names in enumerate(table[kind])
        for name in names
    }
    for kind, plain in (("colours", COLOURS), ("shapes", SHAPES))
)
_PLURAL_NOUNS = {grammar.plural(noun): i for noun, i in _NOUNS.items()}
_OPENING_PHRASES = _phrases(*_flat(grammar.OPENINGS), *_flat(grammar.INTRODUCTIONS))
_ENDING_PHRASES = _phrases(*_flat(grammar.ENDINGS))
_AND_PHRASES = _phrases(*_flat(grammar.AND))
_BESIDES_PHRASES = _phrases(*_flat(grammar.BESIDES))
_VERB_PHRASES = _phrases(*_flat(grammar.VERBS))
PAD, UNKNOWN, START, END = "<pad>", "<unknown>", "<start>", "<end>"

SPECIALS = (PAD, UNKNOWN, START, END, "<answer>", "</answer>")
"""Words of a language model's own; no caption holds them."""

VOCABULARY: tuple[str, ...] = SPECIALS + tuple(
    sorted(
        {
            word
            for phrases in (
                _NUMBER_PHRASES,
                _RELATION_PHRASES,
                _OPENING_PHRASES,
                _ENDING_PHRASES,
                _AND_PHRASES,
                _BESIDES_PHRASES,
                _VERB_PHRASES,
            )
            for phrase in phrases
            for word in phrase
        }
        | {
            *grammar.ADJECTIVES,
            *_HUES,
            *_NOUNS,
            *_PLURAL_NOUNS,
            *grammar.POST_COLOUR.values(),
        }
    )
)
"""Every word by its id."""

LONGEST = 36
"""No caption has more words."""

_LONGEST_OF_TWO = 24
_IDS = {word: i for i, word in enumerate(VOCABULARY)}


def words_of(text: str) -> list[str]:
    """Lower-case words; other punctuation than that of ``SPECIALS`` separates them."""
    return re.findall(r"</?[a-z]+>|[a-z0-9]+", text.lower())


class _Reader:
    """Reads words from left to right; what fails is tried another way.

    ``furthest`` keeps the first word that nothing could follow, and what was hoped
    for there: the error of the whole.
    """

    def __init__(self, words: list[str]):
        self.words = words
        self.furthest, self.wanted = -1, ""

    def fail(self, position: int, wanted: str) -> None:
        if position > self.furthest:
            self.furthest, self.wanted = position, wanted

    def take(
        self, position: int, phrases: Iterable[tuple[str, ...]]
    ) -> tuple[str, ...] | None:
        """The first of the phrases that stands at the position."""
        for phrase in phrases:
            if tuple(self.words[position : position + len(phrase)]) == phrase:
                return phrase
        return None

    def object(self, at: int) -> tuple[int, tuple[int, int, int]] | None:
        """(next position, (count, colour, shape))."""
        number = self.take(at, _NUMBER_PHRASES)
        if number is None:
            return self.fail(at, "a number of objects")
        count, at = _NUMBER_PHRASES[number], at + len(number)
        while at < len(self.words) and self.words[at] in grammar.ADJECTIVES:
            at += 1
        colour = -1
        if at < len(self.words) and self.words[at] in _HUES:
            colour, at = _HUES[self.words[at]], at + 1
        nouns = _NOUNS if count == 1 else _PLURAL_NOUNS
        if at >= len(self.words) or self.words[at] not in nouns:
            one = "a shape" if count == 1 else "a shape in the plural"
            return self.fail(at, one if colour >= 0 else f"a colour or {one}")
        shape, at = nouns[self.words[at]], at + 1
        if at < len(self.words) and self.words[at] in grammar.POST_COLOUR.values():
            hue = self.words[at + 1 : at + 2]
            if colour < 0 and hue and hue[0] in _HUES:
                return at + 2, (count, _HUES[hue[0]], shape)
            self.fail(at + 1, "a colour")
        return at, (count, colour, shape)

    def objects(self, at: int) -> tuple[int, list[tuple[int, int, int]]] | None:
        """One or more objects joined by 'and'."""
        first = self.object(at)
        if first is None:
            return None
        at, found = first[0], [first[1]]
        while conjunction := self.take(at, _AND_PHRASES):
            following = self.object(at + len(conjunction))
            if following is None:
                break
            at = following[0]
            found.append(following[1])
        return at, found

    def scene(self, at: int) -> tuple[int, list[tuple[int, int, int]], int] | None:
        """(next position, clauses, relation)."""
        relation = self.take(at, _RELATION_PHRASES)
        lead = relation or self.take(at, _BESIDES_PHRASES)
        if lead:
            last = self.objects(at + len(lead))
            if last is None:
                return None
            verb = self.take(last[0], _VERB_PHRASES)
            if verb is None:
                return self.fail(last[0], "'is' or another verb")
            first = self.objects(last[0] + len(verb))
            if first is None:
                return None
            if relation and len(last[1]) == 1:
                clauses = [first[1][0], *last[1], *first[1][1:]]
                return first[0], clauses, _RELATION_PHRASES[relation]
            if relation or len(first[1]) > 1:
                return self.fail(last[0], "one object on one side of the verb")
            return first[0], first[1] + last[1], 0
        first = self.objects(at)
        if first is None:
            return None
        relation = self.take(first[0], _RELATION_PHRASES)
        if relation is None:
            return first[0], first[1], 0
        if len(first[1]) > 1:
            return self.fail(first[0], "one object before a relation")
        last = self.objects(first[0] + len(relation))
        if last is None:
            return None
        return last[0], first[1] + last[1], _RELATION_PHRASES[relation]


def parse(text: str) -> dict[str, np.ndarray]:
    """Reads the spec that a caption says; the inverse of :func:`caption`.

    Args:
        text: any sentence of the grammar; case, punctuation and adjectives of
            ``ADJECTIVES`` are ignored.

    Returns:
        'count', 'colour', 'shape' int32 [3]; 'relation', 'tag' int32 [].

    Raises:
        ValueError: the text is no sentence of the grammar (the message names the
            word, or the position, that does not fit), or says what no spec can.
    """
    words = words_of(text)
    reader = _Reader(words)
    openings = [p for p in _OPENING_PHRASES if tuple(words[: len(p)]) == p]
    for opening in [*openings, ()]:
        scene = reader.scene(len(opening))
        if scene is None:
            continue
        at, clauses, relation = scene
        ending = reader.take(at, _ENDING_PHRASES) or ()
        if at + len(ending) == len(words):
            return _spec(text, clauses, relation)
        reader.fail(at + len(ending), "the end of the text")
    at, hint = reader.furthest, ""
    if at >= len(words):
        problem = f"ends after {len(words)} words"
    else:
        problem = f"word {at + 1}, {words[at]!r}, does not fit"
        if words[at] not in _IDS:
            problem += " and is unknown"
            hint = suggestion(words[at], VOCABULARY)
    raise ValueError(f"caption {text!r}: {problem}; expected {reader.wanted}.{hint}")


def _spec(
    text: str, clauses: list[tuple[int, int, int]], relation: int
) -> dict[str, np.ndarray]:
    if len(clauses) > CLAUSES:
        raise ValueError(
            f"caption {text!r} speaks of {len(clauses)} kinds of objects; a spec has "
            f"at most {CLAUSES}."
        )
    rows = np.array([*clauses] + [(0, -1, -1)] * (CLAUSES - len(clauses)), np.int32)
    spec = {
        **dict(zip(("count", "colour", "shape"), rows.T.copy())),
        "relation": np.array(relation, np.int32),
    }
    try:
        check_specs({name: value[None] for name, value in spec.items()})
    except ValueError as error:
        raise ValueError(f"caption {text!r}: {error}") from None
    return {**spec, "tag": np.array(tag_of(spec), np.int32)}


def batch(specs: Specs, wordings: str | Sequence[str], seed: int = 0) -> list[str]:
    """One caption a spec, each by a random template of a random wording.

    Args:
        specs: batch of specs, concrete.
        wordings: one of ``WORDINGS``, or several, equally likely; one that stands
            twice is twice as likely.
        seed: caption i depends on spec i, the wordings, seed and i alone.

    Raises:
        ValueError: no wording, an unknown one, or bad specs.
    """
    numbers = [grammar.templates_of(w) for w in grammar.check_wordings(wordings)]
    count = check_specs(specs)
    arrays = {name: np.asarray(specs[name]) for name in FIELDS}
    texts = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        choices = numbers[rng.integers(len(numbers))]
        form = TEMPLATES[choices[rng.integers(len(choices))]]
        texts.append(_say({name: a[i] for name, a in arrays.items()}, form, rng))
    return texts


def longest(tags: Iterable[str]) -> int:
    """Words that hold every caption of these tags."""
    return LONGEST if "mixed" in tags else _LONGEST_OF_TWO


def tokenise(texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Word ids, padded at the end.

    Args:
        texts: n captions.
        length: of a row; ``LONGEST`` holds every caption.

    Returns:
        'ids' int32 [n, length], an unknown word as the id of ``UNKNOWN``; 'mask' bool
        [n, length], True at words.

    Raises:
        ValueError: a text of more than ``length`` words, which the message names.
    """
    check_count("length", length)
    ids = np.full((len(texts), length), _IDS[PAD], np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, text in enumerate(texts):
        words = words_of(text)
        if len(words) > length:
            raise ValueError(
                f"text {i} has {len(words)} words but length={length}: {text!r}. "
                f"Raise the length; {LONGEST} holds every caption."
            )
        mask[i, : len(words)] = True
        ids[i, : len(words)] = [_IDS.get(word, _IDS[UNKNOWN]) for word in words]
    return {"ids": ids, "mask": mask}


def detokenise(
    ids: Int[np.ndarray, "n length"], mask: Bool[np.ndarray, "n length"]
) -> list[str]:
    """Texts of the words where the mask is True.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    ids, mask = np.asarray(ids), np.asarray(mask)
    for bad in ids[mask & ((ids < 0) | (ids >= len(VOCABULARY)))].tolist()[:1]:
        raise ValueError(f"id {bad} is outside the vocabulary, [0, {len(VOCABULARY)}).")
    return [" ".join(VOCABULARY[i] for i in row[kept]) for row, kept in zip(ids, mask)]
