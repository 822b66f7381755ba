"""Folders of images and files of arrays become sets that load by name."""

import importlib.util
import json
import tempfile

import numpy as np
import pytest
from PIL import Image

from tmdjax import data
from tmdjax.data import convert, tfds_sets
from tmdjax.data.image_folders import image_splits

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="tensorflow-datasets is absent (pip install 'tmdjax[tfds]')",
)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, tmp_path_factory):
    """What is written for a while is removed, and nobody asks the network."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert list(place.iterdir()) == []


def write_images(folder, count=6, size=(8, 8), classes=("cat", "dog"), captions=False):
    """Images whose red value is their number."""
    for i in range(count):
        place = folder / classes[i % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size[::-1], (i, 0, 200)).save(place / f"picture{i}.png")
        if captions:
            (place / f"picture{i}.txt").write_text(f"number {i}\n")


def loaded(root, name="mine", test_count=1):
    return data.load("tfds", builder=name, data_dir=root, test_count=test_count)


def write(root, columns, name="mine", **options):
    return convert.write_tfds(name, columns, data_dir=root, **options)


def written(root, columns):
    """What loads after the columns were written."""
    write(root, columns)
    return loaded(root)


def levels(images):
    return np.rint((images + 1) * 127.5).astype(int)


def red(images):
    return levels(images)[..., 0, 0, 0]


def test_classes_and_captions_stay_with_their_images(tmp_path, capsys):
    write_images(tmp_path / "in", captions=True)
    out = tmp_path / "out"
    arguments = ["images", str(tmp_path / "in"), "--name=mine", f"--data_dir={out}"]
    assert convert.main(arguments) == 0
    assert "wrote 6 samples of image, label, text" in capsys.readouterr().out
    for empty in (["images", "", "--name=x"], [*arguments, "--data_dir="]):
        with pytest.raises(SystemExit):  # '' is not the current folder
            convert.main(empty)
        assert "it is empty; name a folder" in capsys.readouterr().err
    found = loaded(out)
    numbers = red(found.train["image"])
    assert found.meta["class_names"] == ("cat", "dog")
    np.testing.assert_array_equal(found.train["label"], numbers % 2)
    texts = tfds_sets.decode_texts(found.train["text"])
    assert texts == [f"number {i}" for i in numbers]
    both = [*numbers, *red(found.test["image"])]
    assert sorted(both) == [*range(6)] and both != [*range(6)]  # a random order
    again = write(out, convert.image_columns(tmp_path / "in"), "again")
    assert again == out / "again/1.0.0"
    np.testing.assert_array_equal(red(loaded(out, "again").train["image"]), numbers)


def test_size_crops_the_middle_square(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    (tmp_path / "in").mkdir()
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / f"in/{i}.png")
    columns = convert.image_columns(tmp_path / "in", size=5, channels=1)
    found = written(tmp_path, columns)
    assert found.train["image"].shape == (1, 5, 5, 1)
    assert (found.train["image"] == 1).all() and found.num_classes == 1


def test_phones_hidden_folders_links_and_numbers(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255  # left half; turned by orientation 6 it is the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    for place in (folder / "2", folder / "10", folder / ".checkpoints", elsewhere):
        place.mkdir(parents=True)
        Image.fromarray(pixels).save(place / "a.png", exif=exif)
    for name in ("11", "12"):  # the same pictures, another class
        (folder / name).symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    found = written(tmp_path, convert.image_columns(folder))
    assert found.meta["class_names"] == ("2", "10", "11", "12")
    images = found.train["image"]
    assert images.shape == (3, 8, 4, 3)
    assert (images[:, :4] == 1).all() and (images[:, 4:] == -1).all()


def test_grey_images_as_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    paths = [tmp_path / "image.npy", tmp_path / "odd.npy"]
    for path, array in zip(paths, (images, np.arange(3, dtype=">i4"))):
        np.save(path, array)
    train = written(tmp_path, convert.array_columns(paths)).train
    assert train["image"].shape == (2, 5, 4, 1)
    np.testing.assert_array_equal(levels(train["image"][..., 0]), images[train["odd"]])


def test_arrays_of_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "video": rng.integers(0, 256, (5, 3, 4, 4, 1), dtype=np.uint8),
        "image": rng.integers(0, 256, (5, 6, 6, 1), dtype=np.uint8),
        "label": np.array([2, 0, 1, 0, 2]),
        "depth": rng.normal(size=(5, 2)),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.json").write_text(json.dumps([*"abcd", "ee"]))
    paths = [*tmp_path.glob("*.npy"), tmp_path / "text.json"]
    write(tmp_path, convert.array_columns(paths))
    train = loaded(tmp_path, test_count=2).train
    texts = tfds_sets.decode_texts(train["text"])
    rows = [[*"abcd", "ee"].index(text) for text in texts]
    arrays["depth"] = arrays["depth"].astype(np.float32)
    for name in ("video", "label", "depth"):
        np.testing.assert_array_equal(train[name], arrays[name][rows])
    np.testing.assert_array_equal(levels(train["image"]), arrays["image"][rows])
    batch = next(data.video_batches(train, 2))
    assert batch["video"].dtype == np.float32 and batch["video"].min() >= -1


def test_a_converted_set_is_read_in_batches_without_tensorflow(tmp_path, run_python):
    """From files to batches, in one process."""
    write_images(tmp_path / "in", count=40)
    out = run_python(
        f"""
import sys
from tmdjax import data
assert "tensorflow_datasets" not in sys.modules
from tmdjax.data import convert

folder, root = {str(tmp_path / "in")!r}, {str(tmp_path)!r}
convert.main(["images", folder, "--name=mine", f"--data_dir={{root}}"])
found = data.load("tfds", builder="mine", data_dir=root, test_count=8)
batch = next(data.in_memory(found.train, 16))
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
print(batch["image"].shape, found.num_classes)
"""
    )
    assert out.splitlines()[-1] == "(16, 8, 8, 3) 2"


def test_an_existing_set_is_not_overwritten(tmp_path, refused):
    write_images(tmp_path / "in")
    columns = convert.image_columns(tmp_path / "in")
    folder = write(tmp_path, columns)
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.iterdir())
    there = "mine/1.0.0 is there; give another"
    refused(there, write, tmp_path, columns, error=FileExistsError)
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.iterdir()) == before
    write(tmp_path, columns, version="1.1.0")
    assert loaded(tmp_path).meta["tfds"] == "mine:1.1.0"


def test_bad_folders(tmp_path, refused):
    for name in ("deep", "clear", "empty", "broken"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep/deep.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 100)).save(tmp_path / "clear/clear.png")
    (tmp_path / "broken/broken.png").write_bytes(b"no image")
    write_images(tmp_path / "mixed")
    write_images(tmp_path / "mixed", count=1, classes=())
    write_images(tmp_path / "half", count=2, classes=())
    (tmp_path / "half/picture0.txt").write_text("x")
    for name, message in {
        "deep": "deep.png has more than 8 bits",
        "clear": "clear.png has transparent pixels; give --channels=4",
        "empty": "holds no images",
        "broken": "broken.png is no image",
        "mixed": "holds images both in folders",
        "half": "1 of 2 images have a caption, .*picture1.png has none",
    }.items():
        refused(message, convert.image_columns, tmp_path / name)


def test_splits_are_no_classes(tmp_path, capsys, refused):
    folder, out = tmp_path / "in", tmp_path / "out"
    write_images(folder / "train")
    write_images(folder / "Val", count=3, classes=("dog",))
    (folder / "notes.md").write_text("beside")
    arguments = ["images", str(folder), "--name=mine", f"--data_dir={out}"]
    assert convert.main(arguments) == 0
    assert "test_split='test'" in capsys.readouterr().out
    found = data.load("tfds", builder="mine", data_dir=out, test_split="test")
    assert found.meta["class_names"] == ("cat", "dog")
    assert len(found.train["label"]) == 6 and (found.test["label"] == 1).all()
    assert sorted(red(found.test["image"])) == [0, 1, 2]
    refused("holds splits, not classes", convert.image_columns, folder)
    write_images(folder / "Val", count=1, classes=("cow",))
    refused("cow, which are not among", convert.main, [*arguments, "--version=2.0.0"])


def test_folders_are_splits_by_their_names(tmp_path, refused):
    for i, (names, found) in enumerate(
        (
            ("train val", ("train", "val")),
            ("training testing", ("training", "testing")),  # as mnist_png has them
            ("Train DEV", ("Train", "DEV")),
            ("train2017 val2017", ("train2017", "val2017")),
            ("train_images test_set", ("train_images", "test_set")),
            ("train", ("train", None)),
            ("train bus plane", None),  # a class called train among others
            ("cat dog", None),
            ("train training", None),
            ("train val test", "val"),
            ("test val", "test"),
            ("test", "test"),
            ("train test extra", "extra"),
        )
    ):
        folder = tmp_path / str(i)
        for name in names.split():
            (folder / name).mkdir(parents=True)
        if isinstance(found, str):
            words = f"holds .*{found}.*: splits are one of train, training and at most"
            refused(words, image_splits, folder)
        else:
            want = (folder, None) if found is None else found
            want = tuple(name and folder / name for name in want)
            assert image_splits(folder) == want
    for inside in ("train", "val"):  # of one who gives the folder above
        (tmp_path / "above" / "images" / inside).mkdir(parents=True)
    refused("images holds splits; give that fold", image_splits, tmp_path / "above")


def test_captions_in_files_of_windows_are_found(tmp_path):
    write_images(tmp_path, count=2, classes=())
    for i in range(2):
        (tmp_path / f"picture{i}.TXT").write_bytes(b"\xef\xbb\xbfnumber\r\n")
    assert convert.image_columns(tmp_path)["text"].read(1) == "number"


def test_pictures_of_other_formats_and_texts_with_a_mark(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    kinds = {"a.gif": "GIF", "b.tif": "TIFF", "c.TIFF": "TIFF", "d.jfif": "JPEG"}
    for i, (name, kind) in enumerate(kinds.items()):
        Image.new("RGB", (8, 8), (0, 60 * i, 0)).save(folder / name, kind)
        text = f"é {i}".encode("utf-8-sig" if i % 2 else "utf-8")
        (folder / name).with_suffix(".txt").write_bytes(text)
    columns = convert.image_columns(folder)
    assert columns["image"].count == 4
    assert [columns["text"].read(i) for i in range(4)] == [f"é {i}" for i in range(4)]
    mark = "\ufeff" + json.dumps(["ü", "b"])
    (tmp_path / "text.json").write_text(mark, "utf-8")
    assert convert.array_columns([tmp_path / "text.json"])["text"].read(0) == "ü"


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: png[:20],  # struct
        lambda png: png.replace(b"IDAT", b"\0\0\0\0"),  # syntax
        lambda png: png[:16] + b"\0\1\0\0" * 2 + png[24:],  # a bomb
        lambda png: png[:-30],
    ],
)
def test_an_image_that_cannot_be_read_is_named(damage, tmp_path, refused):
    Image.effect_noise((16, 16), 50).save(tmp_path / "torn.png")
    whole = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(damage(whole))
    refused("torn.png is no image", convert.image_columns, tmp_path)


def test_a_text_or_film_that_cannot_be_read_is_named(tmp_path, refused):
    write_images(tmp_path, count=1, classes=())
    for text, words in (
        ("né".encode("latin-1"), "picture0.txt is not UTF-8"),
        (b"a\0b", "picture0.txt holds NUL"),
        ("né".encode("utf-16"), "picture0.txt is not UTF-8"),
    ):
        (tmp_path / "picture0.txt").write_bytes(text)
        refused(words, convert.image_columns(tmp_path)["text"].read, 0)
    frames = [Image.new("L", (4, 4), 90 * i) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.txt").write_text("a")
    refused("a.gif is no image .*3 pictures", convert.image_columns, tmp_path)


def test_two_sizes_leave_no_set_behind(tmp_path, refused):
    folder = tmp_path / "in"
    write_images(folder, count=1, classes=("cat",))
    write_images(folder, count=2, size=(4, 8), classes=("dog", "dog"))
    sizes = r"is 4 x 8, .* 8 x 8 \(height x width\); give"
    refused(sizes, write, tmp_path, convert.image_columns(folder), error=Exception)
    assert tfds_sets.find_prepared("mine", tmp_path) is None
    channels = "channels=2 must be one of 1, 3, 4"
    refused(channels, convert.image_columns, folder, channels=2)
    refused("size=0 must be at least 1", convert.image_columns, folder, size=0)


def test_bad_files(tmp_path, refused):
    for files, message in (
        ({"a.npy": np.zeros((2, 3)), "b.npy": np.zeros(3)}, "b has 3 samples, a has 2"),
        ({"a.npy": np.array(["x"])}, "shape .1,. and dtype <U1; give numbers"),
        ({"label.npy": np.array([-1, 2])}, r"must hold integers \[n\] from 0"),
        ({"text.json": [1, 2]}, "must hold a list of texts"),
        ({"text.json": ["a", "b\0"]}, "text 1, .*holds NUL"),
        ({"text.json": ["\ud800"]}, "text 0, .*holds half of a surrogate pair"),
        ({"text.json": {"a": 1}}, "holds no single array and no list"),
        ({"label.json": ["a"]}, "label.json holds texts; classes are integers"),
        ({"image.npy": np.zeros((2, 3, 3))}, "an 'image' is uint8"),
        ({"image.npy": np.zeros((2, 3, 3, 2), np.uint8)}, "an 'image' is uint8"),
        ({"image.npy": np.zeros(3, np.uint8)}, "an 'image' is uint8"),
        ({"a.npz": {"x": np.zeros(2)}}, "ends in neither .npy nor .json"),
        ({"text.json": None}, "text.json is no array of numbers or JSON"),
        ({"a.npy": np.zeros(2), "x/a.npy": np.zeros(2)}, "two files are called 'a'"),
    ):
        for name, value in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix == ".json":
                path.write_text("{" if value is None else json.dumps(value))
            elif path.suffix == ".npz":
                np.savez(path, **value)
            else:
                np.save(path, value)
        refused(message, convert.array_columns, [tmp_path / name for name in files])


def test_bad_names(tmp_path, refused):
    write_images(tmp_path / "in")
    columns = convert.image_columns(tmp_path / "in")
    for name in ("My Set", "../x", "", "my/set", "my_set:1"):
        refused("must be like 'my_set'", write, tmp_path, columns, name)
