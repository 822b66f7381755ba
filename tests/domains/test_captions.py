import functools
import itertools

import jax
import numpy as np

from tmdjax.core.prng import sample_keys
from tmdjax.domains.shapes import captions, drawing, grammar
from tmdjax.domains.shapes import checks as shapes
from tmdjax.domains.shapes.specs import TAGS, tag_of

NAMES = ("count", "colour", "shape", "relation", "tag")


@functools.cache
def specs(count=256):
    sample = functools.partial(drawing.sample_specs, size=32)
    return jax.device_get(jax.jit(sample)(sample_keys(jax.random.key(0), count)))


def row(i):
    return {name: specs()[name][i] for name in NAMES}


def spec_of(*clauses, relation=0):
    rows = [*clauses] + [(0, -1, -1)] * (3 - len(clauses))
    count, colour, shape = np.array(rows, np.int32).T
    return {"count": count, "colour": colour, "shape": shape, "relation": relation}


RED_SQUARE, BLUE_DISC = (1, 0, 0), (1, 2, 1)


@functools.cache
def said():
    """Sixteen specs by all templates, [spec][template]."""
    return [
        [
            captions.caption(row(i), template, np.random.default_rng((i, template)))
            for template in range(len(grammar.TEMPLATES))
        ]
        for i in range(16)
    ]


def test_invariant_11_parse_inverts_every_template():
    for i, texts in enumerate(said()):
        for text in texts:
            assert reads(text, row(i)).keys() == row(i).keys()


def test_invariant_11_wordings_are_disjoint():
    numbers = [grammar.templates_of(wording) for wording in grammar.WORDINGS]
    assert sorted(sum(numbers, ())) == list(range(len(grammar.TEMPLATES)))
    assert len(numbers[0]) == 1 and min(map(len, numbers[1:])) >= 20
    texts = [{texts[n] for texts in said() for n in own} for own in numbers]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert min(len(set(texts)) for texts in said()) >= 40  # forms of every spec


def reads(text, spec):
    """Parses the text, which must bring the arrays of the spec."""
    parsed = captions.parse(text)
    for name, value in spec.items():
        np.testing.assert_array_equal(parsed[name], value, err_msg=text)
        assert parsed[name].dtype == np.int32
    return parsed


def test_canonical_form():
    for spec, text in (
        (spec_of((1, -1, 0)), "a photo of a square"),
        (spec_of((1, -1, 3), (1, -1, 2)), "a photo of a cross and a triangle"),
        (spec_of((3, -1, 3)), "a photo of three crosses"),
        (spec_of((1, 3, 1)), "a photo of a yellow disc"),
        (spec_of(RED_SQUARE, BLUE_DISC, relation=1), "a photo of a red square left of a blue disc"),
        (spec_of(RED_SQUARE, BLUE_DISC, relation=4), "a photo of a red square below a blue disc"),
        (spec_of(RED_SQUARE, BLUE_DISC), "a photo of a red square and a blue disc"),
        (spec_of(RED_SQUARE, BLUE_DISC, (4, -1, 2), relation=3),
         "a photo of a red square above a blue disc and four triangles"),
    ):  # fmt: skip
        assert captions.caption(spec, 0, np.random.default_rng(0)) == text
        reads(text, spec)


def test_other_ways_to_say_one_thing():
    for text in (
        "A photo of a red square left of a blue disc.",
        "Show me: one tidy, crisp scarlet box to the left of 1 navy circle!",
        "It looks like this: on the left side of a blue dot there is a square in red",
        "my wish reads placed leftward of a single azure ball sits a ruby block",
        "a red square left of a blue disc",
    ):
        parsed = reads(text, spec_of(RED_SQUARE, BLUE_DISC, relation=1))
        assert TAGS[parsed["tag"]] == "position"


def test_the_first_clause_may_come_last():
    for text, clauses in (
        ("besides a blue disc is a red square", [RED_SQUARE, BLUE_DISC]),
        ("two discs with three pink pluses", [(2, -1, 1), (3, 4, 3)]),
        ("apart from a pair of wedges and a dot lies an aqua block",
         [(1, 5, 0), (2, -1, 2), (1, -1, 1)]),
    ):  # fmt: skip
        reads(text, spec_of(*clauses))


def test_the_tag_is_that_of_the_sampler():
    for i in range(256):
        assert tag_of(row(i)) == row(i)["tag"]


def test_what_cannot_be_read(refused):
    for text, message in (
        ("", "ends after 0 words; expected a number of objects"),
        # an ending in the middle of a sentence
        ("Show me, please: one red box", "word 3, 'please', does not fit"),
        ("a photo of a red sqare", "word 6, 'sqare', does not fit and is unknown; expected a shape. Did you mean 'square'"),
        ("a photo of two red square", "word 6, 'square', does not fit; expected a shape in the plural"),
        ("a photo of a disc left of", "ends after 7 words; expected a number"),
        ("a photo of red disc", "word 4, 'red', does not fit; expected a number"),
        ("a photo of a disc now", "word 6, 'now', .* expected the end of the text"),
        ("a red disc in blue", "word 5, 'blue', does not fit"),
        ("besides a disc and a box is a cross and a wedge", "expected one object on one side"),
        ("a disc and a box left of a cross", "expected one object before a relation"),
        ("left of a disc a box", "expected 'is' or another verb"),
        ("a disc and a box and a cross and a wedge", "speaks of 4 kinds .* at most 3"),
        ("a red disc and a red disc", "clauses 0 and 1 have one shape"),
        ("a disc and two discs", "clauses 0 and 1 have one shape"),
        ("two discs left of a box", "a relation needs clauses 0 and 1 of count 1"),
        ("<answer> a disc </answer>", "word 1, '<answer>', does not fit"),
    ):  # fmt: skip
        refused(f"caption .*{message}", captions.parse, text)


def test_invariant_6_the_scorer_reads_specs_alone():
    """Other words for the same specs change no reward, of good and of bad images."""
    some = {name: array[:32] for name, array in specs().items()}
    keys = sample_keys(jax.random.key(1), 32)
    images = jax.jit(drawing.render, static_argnums=2)(keys, some, 32)
    images = np.where(np.arange(32)[:, None, None, None] % 2, images, 0)
    check = jax.jit(shapes.check)
    scores = []
    for wording, seed in (("W0", 0), ("W1", 1), ("W2", 2), ("W2", 3)):
        read = [captions.parse(text) for text in captions.batch(some, wording, seed)]
        batch = {name: np.stack([r[name] for r in read]) for name in NAMES}
        scores.append(np.asarray(check(images, batch)["score"]))
    assert scores[0].min() == 0 and scores[0].max() == 1
    for other in scores[1:]:
        np.testing.assert_array_equal(scores[0], other)


def test_batch():
    texts = captions.batch(specs(), "W1", 5)
    assert texts == captions.batch(specs(), "W1", 5)
    assert texts != captions.batch(specs(), "W1", 6)
    head = {name: array[:9] for name, array in specs().items()}
    assert captions.batch(head, "W1", 5) == texts[:9]
    assert len({text.split()[0] for text in texts}) > 5
    both = captions.batch(specs(), ("W0", "W2"), 5)
    share = np.mean([text.startswith("a photo of") for text in both])
    assert 0.35 < share < 0.65


def test_vocabulary():
    words = captions.VOCABULARY
    assert len(words) == len(set(words)) < 300
    assert words[:2] == (captions.PAD, captions.UNKNOWN)
    for wording in grammar.WORDINGS:
        for text in captions.batch(specs(), wording):
            assert set(text.split()) <= set(words[len(captions.SPECIALS) :])


def test_longest():
    """All templates for the specs that need most words."""
    most = {
        "mixed": [spec_of((4, 0, 0), (4, 1, 1), (4, 2, 2)),
                  spec_of(RED_SQUARE, BLUE_DISC, (4, 4, 3), relation=1)],
        "position": [spec_of(RED_SQUARE, BLUE_DISC, relation=r) for r in (1, 2, 3, 4)],
        "attribution": [spec_of(RED_SQUARE, BLUE_DISC)],
        "counting": [spec_of((4, -1, 0))],
    }  # fmt: skip
    every = itertools.product(range(len(grammar.TEMPLATES)), range(2))
    draws = [(template, np.random.default_rng(i)) for template, i in every]
    for tag, specs in most.items():
        texts = [captions.caption(spec, *draw) for spec in specs for draw in draws]
        assert 8 < max(len(text.split()) for text in texts) <= captions.longest([tag])
    assert captions.longest(TAGS) == captions.LONGEST


def test_tokenise():
    texts = ["a red disc", "A Disc, <answer>mauve</answer>", ""]
    tokens = captions.tokenise(texts, 6)
    assert tokens["ids"].dtype == np.int32 and tokens["mask"].dtype == bool
    words = [[captions.VOCABULARY[i] for i in ids] for ids in tokens["ids"]]
    assert words[0] == ["a", "red", "disc", "<pad>", "<pad>", "<pad>"]
    assert words[1] == ["a", "disc", "<answer>", "<unknown>", "</answer>", "<pad>"]
    assert tokens["mask"].sum(1).tolist() == [3, 5, 0]
    back = ["a red disc", "a disc <answer> <unknown> </answer>", ""]
    assert captions.detokenise(**tokens) == back


def test_tokens_bring_texts_back():
    texts = captions.batch(specs(), grammar.WORDINGS)
    assert captions.detokenise(**captions.tokenise(texts, captions.LONGEST)) == texts


def test_bad_input(refused):
    texts, rng = ["a red disc", "a nice red disc"], np.random.default_rng(0)
    long = "text 1 has 4 words but length=3: 'a nice"
    refused(long, captions.tokenise, texts, 3)
    refused("length=0 must be at least 1", captions.tokenise, ["a"], 0)
    refused("wording='W9' is not one of 'W0'", captions.batch, specs(), "W9")
    refused("wordings is empty; give some of W0", captions.batch, specs(), ())
    refused("wording='w1' is not one of", grammar.templates_of, "w1")
    refused("template=76 is outside", captions.caption, row(0), 76, rng)
    bad = spec_of((1, 0, 9))
    refused("a shape lies outside", captions.caption, bad, 0, rng)
    ids, mask = np.array([[0, 500]], np.int32), np.ones((1, 2), bool)
    refused("id 500 is outside the vocabulary", captions.detokenise, ids, mask)
