"""The safetensors format, beside the library of that name."""

import json

import ml_dtypes
import numpy as np
import pytest

from tmdjax.models.checkpoints import layout
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors

library = pytest.importorskip("safetensors")
from safetensors.numpy import save, save_file  # noqa: E402

KINDS = [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.bool_),
    *(np.int64, np.int32, np.int16, np.int8),
    *(np.uint64, np.uint32, np.uint16, np.uint8),
]
NAMES = ["a", "model.layers.0.weight", "Gewicht_ü", "權重", "\U0001f600", 'a"b\\c', ""]


def draw_array(rng):
    """Of any dtype and bits, NaN among them, of 0 to 4 axes, each 0 to 3 long."""
    shape = tuple(rng.integers(0, 4, rng.integers(0, 5)))
    kind = np.dtype(KINDS[rng.integers(len(KINDS))])
    if kind == np.bool_:
        return rng.integers(0, 2, shape).astype(kind)
    size = int(np.prod(shape)) * kind.itemsize
    return np.frombuffer(rng.bytes(size), kind).reshape(shape)


def draw_tensors(rng, most=7):
    names = rng.permutation(NAMES)[: rng.integers(1, most + 1)]
    return {str(name): draw_array(rng) for name in names}


def said(content):
    """What the library reads: by name, dtype in its own words, shape and bytes."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in library.deserialize(content)
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_random_files_both_ways(tmp_path):
    """The library's files are read here; the files written here are its own."""
    rng = np.random.default_rng(0)
    kinds, shapes = set(), set()
    for case in range(60):
        tensors = draw_tensors(rng)
        metadata = [{"format": "pt"}, {"k": 'v "ü"', "": ""}, {}, None][case % 4]
        save_file(tensors, tmp_path / "theirs", metadata)
        found = read_safetensors(tmp_path / "theirs")
        same(found, tensors)
        kinds |= {array.dtype for array in tensors.values()}
        shapes |= {array.shape for array in tensors.values()}
        # as views too, which do not lie in one piece
        turned = {name: array.T for name, array in tensors.items()}
        write_safetensors(tmp_path / "ours", turned)
        save_file(
            {name: np.array(array.T, order="C") for name, array in tensors.items()},
            tmp_path / "theirs",
            {"format": "pt"},
        )
        ours = (tmp_path / "ours").read_bytes()
        assert said(ours) == said((tmp_path / "theirs").read_bytes())
        if all(name.isascii() for name in tensors):
            assert ours == (tmp_path / "theirs").read_bytes()
    assert len(kinds) == len(KINDS) and () in shapes and (0,) in shapes


def test_arrays_are_views_that_cannot_be_written(tmp_path):
    write_safetensors(tmp_path / "file", {"a": np.arange(3.0)})
    with pytest.raises(ValueError, match="read-only"):
        read_safetensors(tmp_path / "file")["a"][0] = 1


def test_what_cannot_be_written(tmp_path, refused):
    for tensors, message, error in (
        ({"c": np.zeros(2, np.complex64)}, "'c' has dtype complex64", TypeError),
        ({"__metadata__": np.zeros(2)}, "no tensor may be called", ValueError),
    ):
        refused(message, write_safetensors, tmp_path / "file", tensors, error=error)
    assert not list(tmp_path.iterdir())


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def two(**changes):
    """Tensors a and b of two bytes each, b changed."""
    a = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    b = {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}
    return {"a": a, "b": b | changes}


WHOLE = file_of(two(), b"abcd")
TEXT = WHOLE[8:-4]
DAMAGED = [
    ("gap", file_of(two(data_offsets=[3, 5]), b"abcde"), "'b' begins at byte 3 .* 2;"),
    ("overlap", file_of(two(data_offsets=[1, 3]), b"abc"), "'b' begins at byte 1 "),
    ("first byte", file_of({"b": two()["b"]}, b"abcd"), "'b' begins at byte 2 .* 0;"),
    ("backwards", file_of(two(data_offsets=[4, 2]), b"abcd"), "bytes 4 to 2"),
    ("beyond", file_of(two(data_offsets=[2, 6], shape=[4]), b"abcd"), "cut off in ten"),
    ("far beyond", file_of(two(data_offsets=[2, 2**64])), "entry of tensor 'b'"),
    ("negative", file_of(two(shape=[-2]), b"abcd"), "entry of tensor 'b' is damaged"),
    ("both", file_of(two(shape=[-1, -2]), b"abcd"), "entry of tensor 'b' is damaged"),
    ("fraction", file_of(two(shape=[2.0]), b"abcd"), "entry of tensor 'b' is damaged"),
    ("truth", file_of(two(shape=[2, True]), b"abcd"), "entry of tensor 'b' is damaged"),
    (
        "shape",
        file_of(two(shape=[3]), b"abcd"),
        r"shape \[3\] and dtype U8 takes 3 byt",
    ),
    ("no shape", file_of(two(shape=None), b"abcd"), "entry of tensor 'b' is damaged"),
    ("offsets", file_of(two(data_offsets=[2]), b"abcd"), "entry of tensor 'b' is dam"),
    ("dtype", file_of(two(dtype="U9"), b"abcd"), "'b' has dtype 'U9'; known: F64"),
    ("no dtype", file_of(two(dtype=["U8"]), b"abcd"), "'b'"),
    ("number", file_of({"a": 3}), "entry of tensor 'a' is damaged: 3"),
    ("list", file_of([]), "is not JSON as it should"),
    ("twice", file_of(TEXT[:-1] + b',"b":{}}', b"abcd"), "'b' stands in it twice"),
    ("twice inside", file_of(TEXT[:-2] + b',"dtype":"U8"}}', b"abcd"), "'dtype' st"),
    ("metadata", file_of({"__metadata__": {"a": 1}}), "other things than strings"),
    ("metadata list", file_of({"__metadata__": [1]}), "is not JSON as it should"),
    ("surrogate", file_of(b'{"\\ud800":{}}'), "surrogates not allowed"),
    ("not UTF-8", file_of(b'{"\xff":{}}'), "can't decode byte"),
    ("UTF-16", file_of("{}".encode("utf-16")), "is not JSON as it should"),
    ("no header", file_of(b""), "is not JSON as it should"),
    ("text after it", file_of(TEXT + b"x", b"abcd"), "Extra data"),
    ("nothing", b"", "should end at byte 8 .* the file has 0"),
    ("seven bytes", WHOLE[:7], "should end at byte 8 .* the file has 7"),
    ("length alone", WHOLE[:8], "header should end at byte"),
    (
        "long header",
        b"\xff" * 8 + WHOLE[8:],
        "header should end at byte 18446744073709",
    ),
    ("cut off", WHOLE[:-1], "cut off in tensor 'b': its 2 bytes end at"),
    ("more", WHOLE + b"x", "1 more than its header tells of"),
]


@pytest.fixture
def ours(tmp_path):
    def read(content):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return read_safetensors(path)

    return read


def test_damaged_files(ours, refused):
    assert ours(file_of({})) == {}
    same(ours(WHOLE), {k: np.frombuffer(v, "u1") for k, v in zip("ab", [b"ab", b"cd"])})
    for name, content, message in DAMAGED:
        refused(f"model.safetensors.*{message}", ours, content)
        with pytest.raises(library.SafetensorError):
            print(name, said(content))


def test_a_header_longer_than_any(tmp_path, refused):
    path = tmp_path / "file"
    with open(path, "wb") as file:  # of holes: nothing of it is on the disk
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(110_000_000)
    refused("of at most 100000000", read_safetensors, path)


def test_random_damage(ours):
    """What the library refuses is refused; what is read is what the library reads."""
    rng = np.random.default_rng(1)
    signs = b'"{}[]:,0123456789-.eE \\\xffabdeflnorstu'
    counts = dict.fromkeys(("both read", "both refuse", "refused here alone"), 0)
    for _ in range(300):
        tensors = draw_tensors(rng, 3)
        content = bytearray(save(tensors, {"k": "v"}))
        end = 8 + int.from_bytes(content[:8], "little")
        for _ in range(rng.integers(1, 3)):
            place, sign = int(rng.integers(8, end)), signs[rng.integers(len(signs))]
            old, new = [(1, [sign]), (0, [sign]), (1, [])][rng.integers(3)]
            content[place : place + old] = bytes(new)
            end += len(new) - old
        content[:8] = (end - 8).to_bytes(8, "little")
        try:
            theirs = said(bytes(content))
        except library.SafetensorError:
            theirs = None
        try:
            found = ours(bytes(content))
        except ValueError as error:
            assert "model.safetensors" in str(error)
            # the library takes the second of two, and knows other dtypes
            alone = "stands in it twice" in str(error) or "has dtype" in str(error)
            assert theirs is None or alone, error
            counts["both refuse" if theirs is None else "refused here alone"] += 1
        else:
            assert theirs is not None, bytes(content[:end])
            assert found.keys() == theirs.keys()
            for name, (_, shape, data) in theirs.items():
                assert found[name].shape == shape and found[name].tobytes() == data
            counts["both read"] += 1
    assert counts["both read"] > 10 and counts["both refuse"] > 200, counts


def test_an_error_of_many_differences_names_the_first_and_counts_the_rest(as_shipped):
    leaves = [
        layout.Leaf(
            path=f"layer{i}/kernel",
            names=[f"layer.{i}.weight"],
            shape=(2, 3),
            stacked=False,
            read=np.asarray,
            write=np.asarray,
        )
        for i in range(1500)
    ]
    others = {f"other.{i}.weight": np.zeros(1) for i in range(700)}
    shapes = {f"layer{i}": {"kernel": np.zeros((2, 3))} for i in range(1500)}
    for call in (
        lambda: layout.params_from_tensors(leaves, others, lambda leaf: None, "net"),
        lambda: layout.tensors_from_params(leaves, shapes, others, "net"),
    ):
        with pytest.raises(ValueError, match="layer.*and 2192 more") as caught:
            call()
        assert len(str(caught.value)) < 1000
