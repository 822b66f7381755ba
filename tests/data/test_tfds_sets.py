import functools
import importlib.util
import io
import json
import socket
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

from tmdjax.data import SOURCES, Source, check, load, tfds_sets

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="tensorflow-datasets is absent (pip install 'tmdjax[tfds]')",
)
LABELLED = {"image": "image", "label": "label"}
PREPARE = (
    "pip install tensorflow-datasets tensorflow && tfds build celeb_a_hq/256 "
    "--file_format=array_record"
)


@pytest.fixture(autouse=True)
def no_network_and_no_other_folder(monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    # TFDS leaves a temporary folder for each set that it builds
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def register(monkeypatch):
    """Puts a source of the set 'shapes' into the registry for one test."""
    known = SOURCES._entries

    def add(builder="shapes", **changes):
        monkeypatch.setattr(SOURCES, "_entries", dict(known))
        source = Source(
            name="shapes",
            package="tensorflow-datasets",
            install="pip install tensorflow-datasets",
            licence="MIT",
            description="shapes",
            loader=functools.partial(
                tfds_sets.load_tfds, name="shapes", builder=builder, **changes
            ),
        )
        SOURCES.register("shapes")(source)

    return add


def pixels(count, size=8, seed=0):
    shape = (count, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def build(root, name, features, splits, config="", version="1.0.0"):
    """Writes splits of examples in the order given, by TFDS itself.

    Features are a function of ``tfds.features``. Returns the folder of the set.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features(tfds.features)),
                disable_shuffling=True,
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            yield from enumerate(splits[split])

    Written.name = name
    Written(data_dir=root, file_format="array_record").download_and_prepare()
    return root / name / config / version


def write_set(root, images, shape=(8, 8, 3)):
    """The set 'celeb_a_hq/256' with one split."""

    def features(f):
        image = f.Image(shape=shape, encoding_format="png")
        return {"image": image, "image/filename": f.Text()}

    rows = [{"image": png(x), "image/filename": f"{i}"} for i, x in enumerate(images)]
    return build(root, "celeb_a_hq", features, {"train": rows}, "256", "2.0.0")


def write_shapes(root, images, labels, version="1.0.0"):
    """The set 'shapes' with labels."""

    def features(f):
        image = f.Image(shape=(8, 8, 3), encoding_format="png")
        return {"image": image, "label": f.ClassLabel(names=["cup", "hat", "key"])}

    def rows(split):
        for image, label in zip(images[split], labels[split]):
            yield {"image": png(image), "label": label}

    splits = {split: rows(split) for split in images}
    return build(root, "shapes", features, splits, version=version)


def shows(arrays, images):
    """The arrays hold these images of bytes."""
    levels = (arrays["image"].astype(np.float64) + 1) * 127.5
    np.testing.assert_allclose(levels, images, atol=1e-4)


@pytest.fixture
def celeb(tmp_path):
    return functools.partial(load, "celeb_a_hq", data_dir=tmp_path)


@needs_tfds
class TestPrepared:
    def test_celeb_a_hq_holds_out_its_end_in_file_order(self, tmp_path, celeb):
        images = pixels(12)
        images[0], images[1] = 0, 255  # the ends of the range
        write_set(tmp_path, images)
        data = celeb(test_count=3)
        for arrays, expected in ((data.train, images[:9]), (data.test, images[9:])):
            assert arrays.keys() == {"image", "label"}
            assert arrays["image"].dtype == np.float32
            assert arrays["label"].dtype == np.int32
            shows(arrays, expected)
            np.testing.assert_array_equal(arrays["label"], np.zeros(len(expected)))
        assert data.num_classes == 1
        assert data.meta == {"tfds": "celeb_a_hq/256:2.0.0"}

    def test_counts_bound_both_splits(self, tmp_path, celeb, refused):
        images = pixels(12)
        write_set(tmp_path, images)
        data = celeb(test_count=2, train_count=4)
        shows(data.train, images[:4])
        shows(data.test, images[10:])
        refused(r"test_count=2000 is outside \[1, 11\]", celeb)
        refused("test_count=0 must be at least 1", celeb, test_count=0)
        refused(r"train_count=10 is .* \[1, 9\]", celeb, test_count=3, train_count=10)
        unset = "give test_count=, how many samples of 'train'"
        refused(unset, celeb, test_count=None)
        refused("memory_limit_gb=0 is outside", celeb, test_count=3, memory_limit_gb=0)

    def test_order_holds_over_several_reads(self, tmp_path, celeb):
        images = pixels(150, size=2)
        write_set(tmp_path, images, shape=(2, 2, 3))
        data = celeb(test_count=10)
        shows(data.train, images[:140])
        shows(data.test, images[140:])

    def test_folder_of_the_option_the_environment_or_the_home(
        self, tmp_path, monkeypatch, celeb
    ):
        home, named, given = (pixels(2, seed=seed) for seed in range(3))
        write_set(tmp_path / "home/tensorflow_datasets", home)
        write_set(tmp_path / "named", named)
        write_set(tmp_path, given)
        shows(load("celeb_a_hq", test_count=1).train, home[:1])
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "named"))
        shows(load("celeb_a_hq", test_count=1).train, named[:1])
        shows(celeb(test_count=1).train, given[:1])

    def test_another_set_is_one_entry(self, tmp_path, register):
        images = {"train": pixels(5), "test": pixels(4, seed=1)}
        labels = {"train": [2, 0, 1, 1, 2], "test": [0, 2, 2, 1]}
        write_shapes(tmp_path, images, labels)
        register(keys=LABELLED, test_split="test")
        data = load("shapes", data_dir=tmp_path)
        for split in ("train", "test"):
            shows(getattr(data, split), images[split])
            assert getattr(data, split)["label"].tolist() == labels[split]
        assert data.num_classes == 3
        assert data.meta["class_names"] == ("cup", "hat", "key")
        fewer = load("shapes", data_dir=tmp_path, test_count=2)
        np.testing.assert_array_equal(fewer.test["label"], [0, 2])

    def test_the_highest_version_or_the_one_named(self, tmp_path, register):
        for version, seed in (("1.9.0", 9), ("1.10.0", 10)):
            images = {"train": pixels(2, seed=seed)}
            write_shapes(tmp_path, images, {"train": [0, 1]}, version)
        options = {"data_dir": tmp_path, "test_count": 1}
        register()
        newest = load("shapes", **options)
        assert newest.meta["tfds"] == "shapes:1.10.0"
        shows(newest.train, pixels(2, seed=10)[:1])
        pinned = load("tfds", builder="shapes:1.9.0", **options)
        shows(pinned.train, pixels(2, seed=9)[:1])

    def test_too_many_bytes_are_refused_with_a_count_that_fits(
        self, tmp_path, celeb, refused
    ):
        write_set(tmp_path, pixels(12))
        options = {"test_count": 3, "memory_limit_gb": 5.5e-6}
        # An image takes 4 * 8 * 8 * 3 = 768 bytes: 7 of them fit.
        bytes_ = r"9 \+ 3 samples of \[8, 8, 3\] float32 take 9,216 bytes.*"
        higher = "Give train_count=4, or a higher memory_limit_gb="
        refused(bytes_ + higher, celeb, **options)
        refused("take 6,144 bytes", celeb, train_count=5, **options)
        data = celeb(train_count=4, **options)
        assert sum(a["image"].nbytes for a in (data.train, data.test)) == 7 * 768
        smaller, limit = (
            "Give smaller train_count= and test_",
            {"memory_limit_gb": 2e-6},
        )
        refused(smaller, celeb, **options | limit)

    def test_names_that_the_set_lacks(self, tmp_path, register, refused):
        images = {"train": pixels(2), "test": pixels(2)}
        write_shapes(tmp_path, images, {"train": [0, 1], "test": [-1, -1]})
        unknown = r"keys\['image'\]='imag' is no feature .* Did you mean 'image'"
        kind = r"keys\['label'\]='image' is of kind Image; 'label' stands for classes"
        unlabelled = {"keys": LABELLED, "test_split": "test"}
        for message, fields in (
            (unknown, {"keys": {"image": "imag"}}),
            (kind, {"keys": {"label": "image"}}),
            (r"keys=\{\} asks for no feature", {"keys": {}}),
            ("split='tests' is not one of 'train', 'test'", {"test_split": "tests"}),
            ("'train' would test on what trains", {"test_split": "train"}),
            ("of the split 'test' have no label", unlabelled),
        ):
            register(**fields)
            refused(message, load, "shapes", data_dir=tmp_path)

    def test_images_of_varying_size_are_refused(self, tmp_path, celeb, refused):
        write_set(tmp_path, [*pixels(2), *pixels(1, size=4)], shape=(None, None, 3))
        refused(r"\(None, None, 3\) .* of one size", celeb, test_count=1)

    def test_a_format_without_random_access_is_refused(self, tmp_path, celeb, refused):
        folder = write_set(tmp_path, pixels(2))
        path = folder / "dataset_info.json"
        text = path.read_text()
        assert '"fileFormat": "array_record"' in text
        path.write_text(text.replace("array_record", "tfrecord"))
        command = (
            f"tfds convert_format --dataset_version_dir={folder} --out_file_format"
        )
        refused(f"holds tfrecord files.*{command}=array_record", celeb, test_count=1)

    def test_damaged_files_are_refused(self, tmp_path, celeb, refused):
        folder = write_set(tmp_path, pixels(12))
        other = write_set(tmp_path / "other", pixels(12, size=4), shape=(4, 4, 3))
        (shard,) = folder.glob("*.array_record*")
        message = f"{folder} is damaged.*{PREPARE} --data_dir={tmp_path}"
        truncated = shard.read_bytes()[: shard.stat().st_size // 2]
        for content in (truncated, (other / shard.name).read_bytes()):
            shard.write_bytes(content)
            refused(message, celeb, test_count=3)
        shard.unlink()
        refused(message, celeb, test_count=3)

    def test_check_says_present(self, tmp_path, monkeypatch):
        def status():
            return check.status(SOURCES["celeb_a_hq"])

        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        assert status() == "absent"
        write_set(tmp_path, pixels(2))
        assert status() == "present"
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert status() == "absent"


def write_features(root, features, rows):
    """The set 'mixed' of any features."""
    return build(root, "mixed", features, {"train": rows})


def write_numbers(root):
    """The set 'mixed' of the numbers 0, 1 and 2."""
    rows = [{"n": i} for i in range(3)]
    return write_features(root, lambda f: {"n": f.Scalar(np.int32)}, rows)


def mixed(root):
    return {"builder": "mixed", "data_dir": root, "test_count": 1}


@needs_tfds
class TestFeatures:
    def test_numbers_texts_and_classes(self, tmp_path):
        rng = np.random.default_rng(0)
        rows = [
            {
                "clip": rng.integers(0, 256, (2, 4, 4, 1), dtype=np.uint8),
                "state": rng.normal(size=3).astype(np.float64),
                "packed": rng.normal(size=(2, 2)).astype(np.float32),
                "count": int(i - 2),
                "flag": bool(i % 2),
                "caption": "né " * i,
                "style": ["plain", "bold"][i % 2],
            }
            for i in range(6)
        ]
        write_features(
            tmp_path,
            lambda f: {
                "clip": f.Tensor(shape=(2, 4, 4, 1), dtype=np.uint8),
                "state": f.Tensor(shape=(3,), dtype=np.float64),
                "packed": f.Tensor(shape=(2, 2), dtype=np.float32, encoding="zlib"),
                "count": f.Scalar(np.int64),
                "flag": f.Scalar(np.bool_),
                "caption": f.Text(),
                "style": f.ClassLabel(names=["plain", "bold"]),
            },
            rows,
        )
        options = mixed(tmp_path) | {"test_count": 2}
        found = load("tfds", **options)
        kept = {"clip": np.uint8, "flag": np.bool_, "count": np.int32}
        for key, dtype in (kept | {"state": np.float32, "packed": np.float32}).items():
            expected = np.stack([row[key] for row in rows[:4]]).astype(dtype)
            assert found.train[key].dtype == dtype
            np.testing.assert_array_equal(found.train[key], expected)
        longest = len(("né " * 5).encode())  # of both splits
        assert found.train["caption"].shape == (4, longest)
        texts = tfds_sets.decode_texts(found.test["caption"])
        assert texts == [row["caption"] for row in rows[4:]]
        assert found.num_classes == 1 and (found.train["label"] == 0).all()
        keys = {"video": "clip", "label": "style"}
        found = load("tfds", keys=keys, **options)
        assert found.train.keys() == keys.keys() and found.num_classes == 2
        np.testing.assert_array_equal(found.train["label"], [0, 1, 0, 1])
        assert found.meta["class_names"] == ("plain", "bold")

    def test_integers_that_do_not_fit_are_refused(self, tmp_path, refused):
        rows = [{"n": 1}, {"n": 2**40}, {"n": 3}]
        write_features(tmp_path, lambda f: {"n": f.Scalar(np.int64)}, rows)
        refused("'n' of sample 1 does not fit int32", load, "tfds", **mixed(tmp_path))

    def test_other_features_are_refused_by_name(self, tmp_path_factory, refused):
        def refuses(message, feature, value):
            root = tmp_path_factory.mktemp("odd")
            rows = [{"n": i, "odd": value} for i in range(3)]
            write_features(
                root, lambda f: {"n": f.Scalar(np.int32), "odd": feature(f)}, rows
            )
            refused(message, load, "tfds", **mixed(root))
            found = load("tfds", keys={"n": "n"}, **mixed(root))
            np.testing.assert_array_equal(found.train["n"], [0, 1])

        sequence = "feature 'odd' .* is of kind Sequence, which needs"
        refuses(sequence, lambda f: f.Sequence(np.int32), [1, 2])
        nested = "is of kind FeaturesDict.*Leave it out: give keys= of n"
        refuses(nested, lambda f: {"inner": f.Text()}, {"inner": "x"})
        ragged = r"'odd' .* has shape \(None,\) and dtype int32; only numbers"
        refuses(
            ragged,
            lambda f: f.Tensor(shape=(None,), dtype=np.int32),
            np.zeros(2, np.int32),
        )

    @pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is not None, reason="tensorflow is here"
    )
    def test_a_feature_that_needs_tensorflow_is_named(self, tmp_path, refused):
        path = write_numbers(tmp_path) / "features.json"
        features = json.loads(path.read_text())
        audio = {"shape": {"dimensions": ["-1"]}, "dtype": "int64"}
        features["featuresDict"]["features"]["sound"] = {
            "pythonClassName": "tensorflow_datasets.core.features.audio_feature.Audio",
            "audio": {**audio, "sampleRate": "16000", "encoding": "none"},
        }
        path.write_text(json.dumps(features))
        needs = "'sound' .* is of kind Audio, which needs"
        refused(needs, load, "tfds", **mixed(tmp_path))
        without = r"without the package tensorflow: it has sound \(Audio\)"
        refused(without, load, "tfds", keys={"n": "n"}, **mixed(tmp_path))

    def test_damaged_metadata(self, tmp_path, refused):
        (write_numbers(tmp_path) / "features.json").write_text("[]")
        damaged = "features.json is damaged or no dict"
        refused(damaged, load, "tfds", **mixed(tmp_path))


def test_texts_as_bytes(refused):
    texts = ["", "a b", "zoë"]
    rows = tfds_sets.encode_texts(texts)
    assert rows.shape == (3, 4) and tfds_sets.decode_texts(rows) == texts
    refused("text 1, .*holds NUL", tfds_sets.encode_texts, ["a", "a\0b"])


def test_a_set_that_is_not_prepared_names_folder_and_command(tmp_path, refused):
    folder, name = tmp_path / "my data", "celeb_a_hq"
    for message in (
        rf"\(looked in {folder / 'celeb_a_hq/256'}\)",
        f"{PREPARE} --data_dir='{folder}'",
        f"place data256x256.tar.* in {folder}/downloads/manual;",
    ):
        refused(message, load, name, data_dir=folder, error=FileNotFoundError)
    home = "home/tensorflow_datasets/celeb_a_hq"
    refused(home, load, name, error=FileNotFoundError)


def test_a_folder_with_all_metadata_is_prepared(tmp_path, monkeypatch, celeb, refused):
    find, folder = tfds_sets.find_prepared, tmp_path / "celeb_a_hq/256/2.0.0"
    folder.mkdir(parents=True)
    (tmp_path / "celeb_a_hq/256/notes.of.mine").mkdir()
    (folder / "dataset_info.json").write_text("{}")
    assert find("celeb_a_hq/256", tmp_path) is None
    (folder / "features.json").write_text("{}")
    for name in ("celeb_a_hq/256", "celeb_a_hq/256:2.0.0"):
        assert find(name, tmp_path) == folder
    for name in ("celeb_a_hq/256:1.0.0", "celeb_a_hq"):
        assert find(name, tmp_path) is None
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused(r"pip install 'tmdjax\[tfds\]'", celeb, error=ImportError)


def test_bad_names(refused):
    for builder in ("", "a/b/c", "set:1.0", "../set", "Set/x:"):
        message = "is not a name of TFDS; give 'set'"
        refused(message, tfds_sets.find_prepared, builder)
    refused("'tfds' needs builder=", load, "tfds")
    refused(r"'dat_dir'.*Did you mean 'data_dir'", load, "celeb_a_hq", dat_dir="x")


def test_check_lists_the_source_and_how_to_get_it():
    (row,) = [r for r in check.table().splitlines() if r.startswith("celeb_a_hq")]
    assert "absent" in row and "non-commercial" in row
    assert "pip install 'tmdjax[tfds]'; to prepare the files: place data256" in row
    assert row.endswith(PREPARE)
