import json

import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.data import files_of, load, video_batches
from tmdjax.data.videos.files import open_videos, to_float, to_uint8

VIDEO = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 8, 3), np.uint8)
TEXT = np.random.default_rng(1).standard_normal((9, 3, 5)).astype(np.float16)
LABEL = np.arange(9) % 3
PROMPTS = [["b cat", "a dog", "c cow"][i % 3] for i in range(9)]


@pytest.fixture
def folder(tmp_path):
    for name, array in (("video", VIDEO), ("text", TEXT), ("label", LABEL)):
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def test_files_that_a_stage_depends_on(folder):
    found = files_of("video_files", folder=folder, test_count=2)
    assert {*folder.iterdir()} == {path for path in found if path.exists()}
    assert {path.name for path in found if not path.exists()} == {"prompts.json"}
    assert files_of("digits") == files_of("sprites", train_count=3) == ()


def test_bytes_and_floats():
    every = np.arange(256, dtype=np.uint8)
    floats = to_float(every)
    assert floats.dtype == np.float32 and floats[0] == -1 and floats[-1] == 1
    np.testing.assert_allclose(np.diff(floats), 2 / 255, rtol=1e-4)
    np.testing.assert_array_equal(to_uint8(floats), every)
    np.testing.assert_array_equal(to_uint8([-3.0, 3.0, 0.0]), [0, 255, 128])
    np.testing.assert_allclose(to_float(jnp.asarray(every)), floats, atol=1e-7)


def test_a_folder_by_name(folder):
    data = load("video_files", folder=folder, test_count=2)
    for split, rows in ((data.train, slice(7)), (data.test, slice(7, None))):
        np.testing.assert_array_equal(split["video"], VIDEO[rows])
        np.testing.assert_array_equal(split["text"], TEXT[rows].astype(np.float32))
        assert split["video"].dtype == np.uint8 and split["label"].dtype == np.int32
    assert data.num_classes == 3 and data.meta == {"folder": str(folder)}
    few = load("video_files", folder=folder, train_count=3).train["video"]
    assert isinstance(few, np.memmap) and len(few) == 3  # the videos stay on disk


@pytest.mark.parametrize("threads", [0, 1])
def test_batches_are_floats_of_their_rows(folder, threads):
    data = load("video_files", folder=folder, test_count=1)
    batches = video_batches(data.train, 4, seed=2, threads=threads)
    seen = []
    for _ in range(2):
        batch = next(batches)
        shown = to_uint8(batch["video"])[:, None]
        rows = (VIDEO == shown).all((2, 3, 4, 5)).argmax(1)
        seen += [*rows]
        assert batch["video"].dtype == np.float32
        np.testing.assert_allclose(batch["video"], VIDEO[rows] / 127.5 - 1, atol=1e-6)
        np.testing.assert_array_equal(batch["label"], LABEL[rows])
        np.testing.assert_array_equal(batch["text"], TEXT[rows].astype(np.float32))
    assert sorted(seen) == [*range(8)]
    batches.close()


def test_batches_resume_and_refuse_other_videos(folder, refused):
    arrays, _ = open_videos(folder)
    first, again = (video_batches(arrays, 2, threads=0) for _ in range(2))
    next(first)
    state = json.loads(json.dumps(first.get_state()))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["video"], next(first)["video"])
    changed = dict(arrays, video=np.array(arrays["video"]))
    changed["video"][-1, 0, 0, 0, 0] ^= 1
    other = video_batches(changed, 2)
    refused("another pipeline: data was", other.set_state, state)


def test_prompts_become_labels_or_names_of_labels(folder):
    def with_prompts(prompts, **options):
        (folder / "prompts.json").write_text(json.dumps(prompts))
        return load("video_files", folder=folder, **options)

    assert with_prompts(PROMPTS).meta["class_names"] == ("b cat", "a dog", "c cow")
    assert "class_names" not in with_prompts([*"123456789"]).meta
    (folder / "label.npy").unlink()
    data = with_prompts(PROMPTS, test_count=2)
    assert data.meta["class_names"] == ("a dog", "b cat", "c cow")
    names = [data.meta["class_names"][i] for i in data.train["label"]]
    assert names == PROMPTS[:7] == [*data.meta["train_prompts"]]
    assert data.meta["test_prompts"] == tuple(PROMPTS[7:])


def test_videos_alone_have_one_class(folder):
    (folder / "label.npy").unlink()
    (folder / "text.npy").unlink()
    data = load("video_files", folder=folder)
    assert set(data.train) == {"video", "label"} and data.num_classes == 1


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        ({}, {"test_count": 9}, r"test_count=9 is outside \[1, 8\]"),
        ({}, {"train_count": 9}, r"train_count=9 is outside \[1, 8\]"),
        ({"video": VIDEO[0]}, {}, r"shape \(4, 6, 8, 3\); they need \[n, frame"),
        ({"video": VIDEO[..., :2]}, {}, "1 or 3 channels"),
        ({"video": VIDEO / 255}, {}, "dtype float64; they need uint8"),
        ({"label": LABEL[:3]}, {}, "label of .* leading axis must be the batch, 9"),
        ({"label": LABEL / 2}, {}, "dtype float64; they need integers"),
        ({"label": LABEL - 1}, {}, "least label of .*=-1 is outside"),
        ({"text": TEXT[:, 0]}, {}, r"shape \(9, 5\) .* floats \[n, word, width\]"),
        ({"text": TEXT[:, :0]}, {}, r"shape \(9, 0, 5\) .* floats \[n, word, width\]"),
        ({"text": TEXT[:3]}, {}, "text of .* leading axis must be the batch, 9"),
        ({"text": np.full((9, 1, 1), np.nan)}, {}, "9 non-finite .*Encode the prompts"),
        ({"video": np.array([{}])}, {}, "damaged or no array of numbers"),
        ({"prompts": "["}, {}, "prompts.json is damaged"),
        ({"prompts": "[" * 100_000}, {}, "prompts.json is damaged"),
        ({"prompts": '{"a": 1}'}, {}, "a list of texts"),
        ({"prompts": '["a"]'}, {}, "1 texts for 9 videos"),
    ],
)
def test_bad_folders(folder, refused, arrays, options, message):
    for name, array in arrays.items():
        if name == "prompts":
            (folder / "prompts.json").write_text(array)
        else:
            np.save(folder / f"{name}.npy", array)
    refused(message, load, "video_files", folder=folder, **options)


def test_missing_and_damaged_files(folder, refused):
    def bad(message, error=ValueError, **options):
        refused(message, load, "video_files", error=error, **options)

    bad("needs folder=")
    bad("there is no folder", FileNotFoundError, folder=folder / "none")
    for name in ("label.npy", "text.npy", "prompts.json"):  # there, but not to be read
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / "on another disk")
        bad(f"{name} is damaged", folder=folder)
        (folder / name).unlink()
    (folder / "video.npy").write_bytes((folder / "video.npy").read_bytes()[:500])
    bad(r"video\.npy is damaged", folder=folder)
    (folder / "video.npy").unlink()
    bad(r"holds no video\.npy", FileNotFoundError, folder=folder)
    floats = {"video": VIDEO / 255}
    refused("dtype float64; give uint8", video_batches, floats, 2)
