"""The grammar of captions of coloured shapes: its words, and its templates.

``TEMPLATES`` numbers the ways to say a spec. They fall into three wordings that share
no sentence: 'W0' is the one canonical form of GenEval, 'W1' the corpus of a prompt
refiner, 'W2' paraphrases that are held out.
"""

import dataclasses
from collections.abc import Sequence

from tmdjax.core.checks import check_choice

WORDINGS = ("W0", "W1", "W2")
ADJECTIVES = ("nice", "lovely", "neat", "plain", "crisp", "tidy", "pretty", "simple")
OPENINGS = {
    "W0": ("a photo of",),
    "W1": (
        "an image of",
        "a picture of",
        "please draw",
        "show me",
        "i would like to see",
        "can you paint",
        "make",
        "here is",
    ),
    "W2": (
        "kindly render",
        "depict",
        "an illustration featuring",
        "let us have",
        "would you mind sketching",
        "imagine",
    ),
}
ENDINGS = {
    "W0": (),
    "W1": ("please", "should be drawn", "can be seen in a picture", "is shown"),
    "W2": ("if you can", "must appear on the canvas", "was painted by someone"),
}

# Before a scene whose first clause comes last.
INTRODUCTIONS = {
    "W1": ("the scene goes like this", "it looks like this"),
    "W2": ("my wish reads", "the plan says"),
}
SYNONYMS: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "W0": {"colours": (), "shapes": ()},
    "W1": {
        "colours": (
            ("scarlet",),
            ("emerald",),
            ("azure",),
            ("golden",),
            ("pink",),
            ("turquoise",),
        ),
        "shapes": (("box",), ("circle",), ("pyramid",), ("plus",)),
    },
    "W2": {
        "colours": (
            ("crimson", "ruby"),
            ("lime",),
            ("navy", "cobalt"),
            ("amber", "lemon"),
            ("fuchsia",),
            ("aqua", "teal"),
        ),
        "shapes": (("block",), ("dot", "ball"), ("wedge",), ("crosshair",)),
    },
}
_PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses"}
NUMBERS = {
    "articles": (("a", "an"), ("two",), ("three",), ("four",)),
    "words": (("one",), ("two",), ("three",), ("four",)),
    "digits": (("1",), ("2",), ("3",), ("4",)),
    "groups": (("a single",), ("a pair of",), ("a trio of",), ("a group of four",)),
}

# By wording, for left of, right of, above, below.
RELATIONS = {
    "W0": (("left of",), ("right of",), ("above",), ("below",)),
    "W1": (
        ("to the left of", "on the left side of"),
        ("to the right of", "on the right side of"),
        ("over", "higher than"),
        ("under", "lower than"),
    ),
    "W2": (
        ("placed leftward of", "located left from"),
        ("placed rightward of", "located right from"),
        ("placed on top of", "located over"),
        ("placed beneath", "located underneath"),
    ),
}
AND = {"W0": ("and",), "W1": ("and", "with"), "W2": ("along with", "as well as")}
BESIDES = {"W1": ("besides", "in addition to"), "W2": ("apart from", "aside from")}
VERBS = {"W1": ("is", "there is"), "W2": ("sits", "lies")}
POST_COLOUR = {"W1": "in", "W2": "coloured"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """One way to say a spec.

    Attributes:
        wording: one of ``WORDINGS``.
        opening: words before the scene.
        ending: words after it.
        numbers: 'articles' (a, two), 'words' (one, two), 'digits' or 'groups'.
        synonyms: whether shapes and colours go by the wording's other names.
        adjectives: whether a meaningless adjective stands before each object.
        inverted: whether the first clause comes last ("left of a red disc is ...").
        colour_last: whether colours follow their shape ("a disc in red").
    """

    wording: str
    opening: str = ""
    ending: str = ""
    numbers: str = "articles"
    synonyms: bool = False
    adjectives: bool = False
    inverted: bool = False
    colour_last: bool = False


def _templates() -> tuple[Template, ...]:
    """The canonical form; then all frames in three laps with other options each."""
    templates = [Template(wording="W0", opening="a photo of")]
    numbers = tuple(NUMBERS)
    for wording in ("W1", "W2"):
        frames = [(opening, "", False) for opening in OPENINGS[wording]]
        frames += [("", ending, False) for ending in ENDINGS[wording]]
        frames += [(opening, "", True) for opening in INTRODUCTIONS[wording]]
        for lap in range(3):
            templates += [
                Template(
                    wording=wording,
                    opening=opening,
                    ending=ending,
                    inverted=inverted,
                    numbers=numbers[(i + lap) % len(numbers)],
                    synonyms=lap != 1,
                    adjectives=lap == 2,
                    colour_last=(i + lap) % 5 == 3,
                )
                for i, (opening, ending, inverted) in enumerate(frames)
            ]
    return tuple(templates)


TEMPLATES = _templates()
"""All templates; ``captions.caption`` takes the number of one."""


def plural(noun: str) -> str:
    """The plural of a noun of the grammar."""
    return _PLURALS.get(noun, noun + "s")


def templates_of(wording: str) -> tuple[int, ...]:
    """Numbers of the templates of a wording.

    Raises:
        ValueError: unknown wording.
    """
    check_choice("wording", wording, WORDINGS)
    return tuple(i for i, t in enumerate(TEMPLATES) if t.wording == wording)


def check_wordings(wordings: str | Sequence[str]) -> tuple[str, ...]:
    """Returns one or several wordings as a tuple.

    Raises:
        ValueError: none, or an unknown one.
    """
    wordings = (wordings,) if isinstance(wordings, str) else tuple(wordings)
    if not wordings:
        raise ValueError(f"wordings is empty; give some of {', '.join(WORDINGS)}.")
    for wording in wordings:
        check_choice("wording", wording, WORDINGS)
    return wordings
