import functools
import importlib.util
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.core.prng import fold_in, sample_keys
from tmdjax.data import rendered_text
from tmdjax.rewards import host, ocr

needs_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxruntime", "rapidocr_onnxruntime"))),
    reason="onnxruntime or rapidocr-onnxruntime is absent",
)
KEYS = sample_keys(fold_in(jax.random.key(0), 0), 200)


@functools.cache
def words(held_out=False):
    return rendered_text.sample_words(KEYS, held_out)


@functools.cache
def rendered(size, held_out=False):
    return rendered_text.render(words(held_out), KEYS, size)


@functools.cache
def reader():
    return ocr.load()


def edits(a, b):
    """Edit distance by its recursive definition, all alignments tried."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        edits(a[1:], b[1:]) + (a[0] != b[0]), edits(a[1:], b) + 1, edits(a, b[1:]) + 1
    )


def test_13_edit_distance_against_all_alignments():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice([*"ABC"], rng.integers(0, 6))) for _ in range(2))
        assert ocr.edit_distance(a, b) == edits(a, b) == ocr.edit_distance(b, a)


def test_13_published_edit_distances():
    for words, distance in {
        ("kitten", "sitting"): 3,
        ("saturday", "sunday"): 3,
        ("intention", "execution"): 5,
        ("", "four"): 4,
        ("same", "same"): 0,
    }.items():
        assert ocr.edit_distance(*words) == distance


def test_13_spaces_and_case_do_not_count():
    texts = [" wO rd\t", "W O R D", "word\n", "WORD"]
    np.testing.assert_array_equal(ocr.score(texts, ["WORD"] * 4), 1)
    np.testing.assert_array_equal(ocr.exact(texts, ["w o r d"] * 4), 1)


def test_13_score_of_known_readings():
    texts = ["WORD", "WARD", "WOR", "SWORD", "XXXX", "ABCDEFGHIJ", "RD"]
    scores, exact = (fn(texts, ["WORD"] * 7) for fn in (ocr.score, ocr.exact))
    assert scores.dtype == exact.dtype == np.float32
    np.testing.assert_allclose(scores, [1, 0.75, 0.75, 0.75, 0, 0, 0.5])
    np.testing.assert_array_equal(exact, [1, 0, 0, 0, 0, 0, 0])


def test_13_empty_recognition_scores_zero():
    for fn in (ocr.score, ocr.exact):
        np.testing.assert_array_equal(fn(["", "  "], ["CAT", "SIX"]), 0)
        assert fn([], []).shape == (0,)


def test_13_score_is_one_only_when_exact():
    rng = np.random.default_rng(1)
    draw = lambda: "".join(rng.choice([*"AB"], rng.integers(1, 4)))  # noqa: E731
    texts, asked = zip(*((draw(), draw()) for _ in range(200)))
    scores, exact = ocr.score(texts, asked), ocr.exact(texts, asked)
    assert 0 < exact.sum() < 200 and scores.min() == 0
    np.testing.assert_array_equal(scores == 1, exact == 1)


def test_bad_input(refused):
    for fn in (ocr.score, ocr.exact):
        refused("2 texts but 1 words", fn, ["A", "B"], ["A"])
        refused(r"words\[1\]=' ' has no character", fn, ["A", ""], ["A", " "])
        refused("texts='ABC' is one string", fn, "ABC", [*"ABC"], error=TypeError)
    refused("threads=0 must be at least 1", ocr.load, threads=0)
    refused(r"batch_size=1\.5", ocr.load, batch_size=1.5, error=TypeError)
    read = ocr.Reader(session=None, characters=())
    shapes = (64, 64, 3), (2, 64, 64, 1), (2, 3, 64, 64), (2, 31, 64, 3), (2, 64, 8, 3)
    for images in map(np.float32, map(np.zeros, shapes)):
        refused(r"images has shape .*; give \[n, height", read, images)
    images = np.zeros((3, 32, 32, 3), np.float32)
    dtype = r"dtype uint8; give floating .*127\.5 - 1"
    refused(dtype, read, images.astype(np.uint8), error=TypeError)
    images[2, 4, 5, 1] = np.inf
    refused(r"images has 1 non-fin.*\(2, 4, 5, 1\)", read, images)


class Session:
    """A network whose classes are given, one row an image."""

    def __init__(self, rows):
        self.rows = np.array(rows)
        self.inputs = []

    def get_inputs(self):
        return [types.SimpleNamespace(name="x")]

    def run(self, outputs, inputs):
        start = sum(map(len, self.inputs))
        self.inputs.append(inputs["x"])
        return [np.eye(4)[self.rows[start : start + len(inputs["x"])]]]


def test_decoding_joins_repeats_and_drops_blanks():
    rows = [
        [0, 1, 1, 0, 1, 2, 2],
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [2, 0, 2, 3, 3, 1, 0],
        [3, 3, 0, 3, 1, 2, 1],
    ]
    session = Session(rows)
    read = ocr.Reader(session=session, characters=("", "A", "B", " "), batch_size=2)
    texts = read(np.zeros((5, 32, 32, 3), np.float32))
    assert texts == ["AAB", "A", "", "BB A", "  ABA"]
    assert [b.shape for b in session.inputs] == [(n, 3, 48, 96) for n in (2, 2, 1)]
    assert read(np.zeros((0, 32, 32, 3), np.float32)) == []


@pytest.mark.parametrize("size", [32, 45, 64])
def test_input_of_the_network_is_opencvs(size):
    cv2 = pytest.importorskip("cv2")
    image = rendered(64)[0, :size, :size]
    levels = np.rint((image + 1) * 127.5).astype(np.uint8)
    rows = ocr.text_band(size)
    theirs = cv2.resize(levels[rows, :, ::-1], (96, 48)).transpose(2, 0, 1)
    (ours,) = ocr.network_input(image[None])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs / 127.5 - 1, atol=2.5 / 127.5)


def test_the_input_of_the_network_is_clipped_and_blue_comes_first():
    image = np.zeros((1, 32, 48, 3), np.float32) + np.array([5, 0, -5], np.float32)
    batch = ocr.network_input(image)
    assert batch.shape == (1, 3, 48, 144)
    np.testing.assert_allclose(batch[0, :, 7, 7], [-1, 0, 1], atol=0.51 / 127.5)


@needs_model
@pytest.mark.parametrize(
    ("size", "noise", "rate"),
    [(32, 0.0, 0.85), (48, 0.0, 0.93), (64, 0.0, 0.95), (64, 0.3, 0.75)],
)
def test_rendered_words_are_read_back(size, noise, rate):
    images = rendered(size)
    images = images + noise * np.random.default_rng(0).standard_normal(images.shape)
    assert ocr.exact(reader()(images), words()).mean() >= rate


@needs_model
def test_held_out_words_are_read_back():
    texts = reader()(rendered(64, held_out=True)[:60])
    assert ocr.exact(texts, words(held_out=True)[:60]).mean() >= 0.95


@needs_model
def test_texts_do_not_depend_on_batch_dtype_or_order():
    images = rendered(64)[:20]
    texts = reader()(images)
    assert ocr.load(batch_size=7)(images) == texts
    assert reader()(images[::-1]) == texts[::-1]
    assert reader()(images.astype(np.float64)) == texts
    assert ocr.exact(reader()(jnp.asarray(images, jnp.bfloat16)), texts).mean() > 0.8


@needs_model
def test_the_package_reads_the_same():
    pytest.importorskip("cv2")
    recognise = pytest.importorskip("rapidocr_onnxruntime.ch_ppocr_rec")
    settings = {"use_cuda": False, "use_dml": False, "rec_batch_num": 6}
    settings |= {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    settings |= {"model_path": str(ocr._packaged_model())}
    theirs = recognise.TextRecognizer({**settings, "rec_img_shape": [3, 48, 96]})
    images = rendered(64)[:40]
    levels = np.rint((images + 1) * 127.5).astype(np.uint8)[:, 16:48, :, ::-1]
    texts = [text for text, _ in theirs(list(levels))[0]]
    # Resizing differs by a level here and there, and so may a text on the edge.
    assert np.mean([a == b for a, b in zip(reader()(images), texts)]) >= 0.95


@needs_model
def test_nothing_is_read_on_a_plain_image():
    images = np.full((3, 64, 64, 3), 0.25, np.float32)
    texts = reader()(images)
    np.testing.assert_array_equal(ocr.score(texts, ["CAT"] * 3), 0)


@needs_model
def test_as_a_scorer_on_the_host(refused):
    def score(images, asked):
        return ocr.score(reader()(images), asked)

    submit = functools.partial(host.submit, score)
    images = jnp.asarray(rendered(64)[:16])
    pending = [submit(images[i : i + 8], words()[i : i + 8], i) for i in (0, 8)]
    rewards = np.concatenate([p.result() for p in pending])
    assert rewards.shape == (16,) and rewards.mean() > 0.9
    assert submit(images, words()[1:17]).result().mean() < 0.5
    broken = submit(images.at[5, 0, 0, 0].set(jnp.nan), words()[:16], 10)
    sample = rf"sample 15 .*'{words()[5]}'.*non-fini"
    refused(sample, broken.result, error=host.RewardError)


@needs_model
def test_the_package_itself_is_not_imported(run_python):
    run_python(
        "import sys\n"
        "from tmdjax.rewards import ocr\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "ocr.load()\n"
        "assert not {'cv2', 'rapidocr_onnxruntime'} & {*sys.modules}\n"
    )


def test_absent_packages_name_the_extra(monkeypatch, refused):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        refused(r"onnxruntime .*'tmdjax\[ocr\]'", ocr.load, error=ImportError)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"rapidocr-onnxruntime.*'tmdjax\[ocr\]'", ocr.load, error=ImportError)


def fake_onnxruntime(characters):
    """A module whose sessions have 5 classes and this dictionary."""
    module = mock.Mock()
    session = module.InferenceSession.return_value
    session.get_modelmeta.return_value.custom_metadata_map = characters
    session.get_outputs.return_value = [mock.Mock(shape=["n", "w", 5])]
    return module


def test_another_model_needs_a_dictionary_that_fits(monkeypatch, tmp_path, refused):
    path = tmp_path / "model.onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime({}))
    absent = r"model=.*model\.onnx' is not a file"
    refused(absent, ocr.load, model=path, error=FileNotFoundError)
    path.write_bytes(b"")
    refused("5 classes but a dictionary of 0 characters", ocr.load, model=path)
    fitting = fake_onnxruntime({"character": "a\nb\nc"})
    monkeypatch.setitem(sys.modules, "onnxruntime", fitting)
    assert ocr.load(model=path).characters == ("", "a", "b", "c", " ")


def test_a_damaged_or_other_model_file_is_refused(monkeypatch, tmp_path, refused):
    path = tmp_path / ocr.MODEL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not a network")
    spec = types.SimpleNamespace(submodule_search_locations=[tmp_path])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime({}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    refused(r"has SHA-256 \w{64}, expected 48fc40f2", ocr.load)
