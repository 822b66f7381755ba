"""Demonstrations: stored and read, chunked, and read from the files of others."""

import itertools
import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tmdjax import data
from tmdjax.data import record_sets as module
from tmdjax.data.demonstration_files import load_demonstrations, read_d4rl, read_minari


def episodes(lengths=(5, 3, 4), seed=0, image=False, **changes):
    rng, count = np.random.default_rng(seed), sum(lengths)
    last = np.cumsum(lengths) - 1
    ends = np.isin(np.arange(count), last)
    seen = np.float32(rng.normal(size=(count, 3)))
    if image:
        seen = rng.integers(0, 256, (count, 2, 2, 1)).astype(np.uint8)
    given = {
        "observation": seen,
        "action": np.arange(2 * count, dtype=np.float32).reshape(count, 2),
        "reward": np.float32(rng.normal(size=count)),
        "terminated": ends & (np.arange(count) == last[0]),
        "truncated": ends & (np.arange(count) != last[0]),
        "meta": {"seeds": [3], "mixture": {"expert": 0.5, "medium": 0.5}},
    }
    return data.Demonstrations(**given | changes)


def same(a, b):
    for name, array in a.arrays().items():
        assert_array_equal(array, getattr(b, name), err_msg=name)
        assert getattr(b, name).dtype == array.dtype


@pytest.mark.parametrize("image", [False, True])
def test_what_is_stored_is_read(tmp_path, image):
    made = episodes(image=image)
    manifest = json.loads(data.write_demonstrations(tmp_path, made).read_text())
    found = data.read_demonstrations(tmp_path)
    same(made, found)
    assert found.meta == made.meta and manifest["meta"] == made.meta
    assert (manifest["steps"], manifest["episodes"]) == (12, 3)
    assert manifest["action"]["low"] == [0, 1] and manifest["action"]["high"] == [
        22,
        23,
    ]
    assert (manifest["observation"]["low"] is None) == image
    for i, rows in enumerate((slice(0, 5), slice(5, 8), slice(8, 12))):
        assert manifest["returns"][i] == pytest.approx(made.reward[rows].sum())


def test_a_set_is_replaced_when_its_successor_is_whole(tmp_path, monkeypatch):
    old, new = episodes(), episodes(seed=1)
    data.write_demonstrations(tmp_path, old)
    with monkeypatch.context() as patch:  # the disk is full as the manifest is written

        def full(*_):
            raise OSError("no space")

        patch.setattr(module, "write_atomically", full)
        with pytest.raises(OSError, match="no space"):
            data.write_demonstrations(tmp_path, new)
    same(data.read_demonstrations(tmp_path), old)
    data.write_demonstrations(tmp_path, new)
    same(data.read_demonstrations(tmp_path), new)
    data.write_demonstrations(tmp_path, new)  # the same once more
    assert len(list(tmp_path.iterdir())) == 2


def test_the_manifest_of_something_else_is_not_replaced(tmp_path, refused):
    manifest, made = tmp_path / "manifest.json", episodes()
    for text in ('{"name": "an extension"}', '{"kind": "tmdjax.trajectories"}', "[{"):
        manifest.write_text(text)
        words = "manifest.json is no manifest of demonstrations, and would be replaced"
        refused(words, data.write_demonstrations, tmp_path, made)
        assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
        assert manifest.read_text() == text
    manifest.write_text(json.dumps({"kind": "tmdjax.demonstrations", "version": 0}))
    data.write_demonstrations(tmp_path, made)  # what is damaged can be written again
    same(data.read_demonstrations(tmp_path), made)


def test_damaged_sets_are_refused(tmp_path, refused):
    path = data.write_demonstrations(tmp_path, episodes())
    whole = json.loads(path.read_text())
    for change, words in (
        ({"steps": 13}, "holds 12 steps, its manifest says 13"),
        ({"episodes": 2}, "holds 3 episodes, its manifest says 2"),
        ({"version": 2}, "has version 2, and 1 is read"),
        ({"kind": "other"}, "is no manifest of demonstrations"),
        ({"mask": 1}, "'mask' is not known"),
        ({"records": "../steps"}, "records of .* names a file"),
        ({"records": "absent"}, "absent does not exist"),
    ):
        path.write_text(json.dumps(whole | change))
        kind = FileNotFoundError if "absent" in words else ValueError
        refused(words, data.read_demonstrations, tmp_path, error=kind)
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != "meta"}))
    refused("meta is missing", data.read_demonstrations, tmp_path)


def test_chunks_stay_inside_their_episode(refused):
    made = episodes()
    found = data.action_chunks(made, 3)
    starts = [0, 1, 2, 5, 8, 9]
    assert_array_equal(found["observation"], made.observation[starts])
    expected = [made.action[i : i + 3].ravel() for i in starts]
    assert_array_equal(found["action"], expected)
    assert len(data.action_chunks(made, 1)["action"]) == 12
    words = "no episode has length=6 steps, the longest 5"
    refused(words, data.action_chunks, made, 6)


def test_bounds_are_mapped_to_one_and_constants_are_named(refused):
    made = episodes()
    low, high = bounds = data.action_bounds(made)
    for edge, value in ((low, -1), (high, 1)):
        assert_array_equal((edge - bounds.middle) / bounds.half_width, [value, value])
    seen = made.observation.copy()
    seen[:, 1] = 7
    bounds = data.observation_bounds(episodes(observation=seen))
    assert bounds.middle[1] == 7 and bounds.half_width[1] == 1
    assert bounds.low[0] == seen[:, 0].min() and bounds.high[2] == seen[:, 2].max()
    action = made.action.copy()
    action[:, 1] = 0.5
    words = r"action dimension 1 \(always 0.5\) is constant over all 12 steps"
    refused(words, data.action_bounds, episodes(action=action))
    refused("are images", data.observation_bounds, episodes(image=True))


def test_bad_demonstrations(refused):
    made = episodes()
    for changes, words, error in (
        ({"reward": made.reward[:-1]}, "reward has shape", ValueError),
        ({"action": made.action[:, 0]}, "action has shape .* needs 2 axes", ValueError),
        ({"action": made.action.astype(int)}, "action is int64; give flo", TypeError),
        (
            {"observation": made.observation.tolist()},
            "is a list; give an ar",
            TypeError,
        ),
        (
            {"truncated": made.truncated & False},
            "last step ends no episode",
            ValueError,
        ),
        ({"reward": made.reward * np.nan}, "reward has 12 non-finite", ValueError),
        ({"action": made.action[:0]}, "hold no step", ValueError),
    ):
        refused(words, episodes, error=error, **changes)


def written(h5py, path, entries, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in entries.items():
            file.create_dataset(name, data=array, **options)
    return path


def d4rl(made):
    return {
        "observations": made.observation.astype(">f8"),
        "actions": made.action,
        "rewards": made.reward[:, None],
        "terminals": made.terminated.astype(np.uint8),
        "timeouts": made.truncated,
        "infos/qpos": np.zeros(3),
    }


def test_d4rl_files_are_read(tmp_path, refused):
    h5py = pytest.importorskip("h5py")
    made = episodes()
    entries, file = d4rl(made), tmp_path / "hopper.hdf5"
    written(h5py, file, entries, compression="gzip")
    same(load_demonstrations(file), made)
    # where the file ends, the last episode is cut
    part = {k: v[:7] if len(v) > 3 else v for k, v in entries.items()}
    found = read_d4rl(written(h5py, file, part))
    assert_array_equal(np.flatnonzero(found.ends), [4, 6])
    del entries["timeouts"]
    written(h5py, file, entries)
    refused("no timeouts: where episodes were cut", read_d4rl, file)
    written(h5py, tmp_path / "cut.hdf5", d4rl(made))
    refused("leave out horizon=3", read_d4rl, tmp_path / "cut.hdf5", horizon=3)
    found = read_d4rl(file, horizon=3)
    assert_array_equal(np.flatnonzero(found.truncated), [2, 7, 10, 11])
    assert_array_equal(found.terminated, made.terminated)
    entries["goals"] = np.zeros(3)
    written(h5py, file, entries)
    refused("'goals' is not understood", read_d4rl, file, horizon=3)
    for reader, option in ((read_d4rl, "ignore"), (read_minari, "entries")):
        words = rf"{option}='goals' is one name; give \('goals',\)"
        refused(words, reader, file, error=TypeError, **{option: "goals"})
    assert len(read_d4rl(file, horizon=3, ignore=("goals",)).action) == 12
    for name, value, words in (
        ("terminals", np.full(12, 2), "terminals has values other than 0 and 1"),
        ("actions", np.array([b"left"] * 12), "actions is .* an array of numbers"),
        ("rewards", np.zeros(24), r"rewards has shape \(24,\); .* of the 12 actions"),
        ("timeouts", np.zeros(11), r"timeouts has shape \(11,\)"),
        ("terminals", np.zeros((12, 2)), r"terminals has shape \(12, 2\)"),
    ):
        written(h5py, file, d4rl(made) | {name: value})
        refused(words, read_d4rl, file)
    written(h5py, file, {k: v for k, v in d4rl(made).items() if k != "rewards"})
    refused("rewards is missing", read_d4rl, file)


def test_what_lies_outside_a_file_is_not_read(tmp_path, refused):
    h5py = pytest.importorskip("h5py")
    entries, file = d4rl(episodes()), tmp_path / "a.h5"
    secret = written(h5py, tmp_path / "secret.h5", {"actions": entries.pop("actions")})
    written(h5py, file, entries)
    with h5py.File(file, "a") as opened:
        opened["actions"] = h5py.ExternalLink(str(secret), "actions")
    refused("actions is a link", read_d4rl, file)
    with h5py.File(file, "a") as opened:
        del opened["actions"]
        layout = h5py.VirtualLayout((12, 2), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "actions", (12, 2))
        opened.create_virtual_dataset("actions", layout)
    refused("actions has data outside the file", read_d4rl, file)
    (tmp_path / "b.h5").write_text("no such thing")
    refused("b.h5 is no HDF5 file", read_d4rl, tmp_path / "b.h5")


def minari(made, seen):
    starts = np.concatenate([[0], np.flatnonzero(made.ends) + 1])
    entries = {}
    for i, (a, b) in enumerate(itertools.pairwise(starts)):
        found = {
            "actions": made.action[a:b].astype(np.float64),
            "rewards": made.reward[a:b],
            "terminations": made.terminated[a:b],
            "truncations": made.truncated[a:b],
            "infos/success": np.zeros(b - a + 1),
            **seen(np.concatenate([made.observation[a:b], made.observation[:1]])),
        }
        entries |= {f"episode_{i}/{k}": v for k, v in found.items()}
    return entries


def test_minari_folders_are_read(tmp_path, refused):
    h5py = pytest.importorskip("h5py")
    made, file = episodes(), tmp_path / "data" / "main_data.hdf5"
    written(h5py, file, minari(made, lambda x: {"observations": x}))
    same(load_demonstrations(tmp_path), made)
    told = tmp_path / "data" / "metadata.json"
    told.write_text(json.dumps({"data_format": "hdf5", "dataset_id": "maze/v0"}))
    assert read_minari(tmp_path).meta["dataset_id"] == "maze/v0"
    told.write_text(json.dumps({"data_format": "arrow"}))
    refused("data_format='arrow', and 'hdf5' is read", read_minari, tmp_path)
    told.unlink()
    parts = {"goal": slice(0, 1), "place": slice(1, 3)}
    several = minari(
        made, lambda x: {f"observations/{k}": x[:, v] for k, v in parts.items()}
    )
    written(h5py, file, several)
    same(read_minari(tmp_path, entries=("goal", "place")), made)
    refused("a dict of 'goal', 'place', entries", read_minari, tmp_path)
    flat = minari(
        made, lambda x: {"observations/goal": x[:, 0], "observations/place": x[:, 1:]}
    )
    written(h5py, file, flat)  # one number a step has no axis of its own
    same(read_minari(tmp_path, entries=("goal", "place")), made)
    cut = flat | {"episode_1/observations/place": np.zeros((3, 2))}
    written(h5py, file, cut)
    words = r"episode_1/observations/place has shape \(3, 2\); .* \[4, feature\]"
    refused(words, read_minari, tmp_path, entries=("goal", "place"))
    short = minari(made, lambda x: {"observations": x[:-1]})
    written(h5py, file, short)
    refused("5 observations and 5 actions", read_minari, tmp_path)
    words = r"observations are one array, and entries=\('goal',\) names parts of a dict"
    refused(words, read_minari, tmp_path, entries=("goal",))
    written(h5py, file, {"episode_0": np.zeros(3)})
    refused("episode_0 is a dataset; it must be a group", read_minari, tmp_path)
    renamed = {k.replace("_1/", "_7/"): v for k, v in several.items()}
    written(h5py, file, renamed)
    refused("has episode_7; it needs episode_0", read_minari, tmp_path)


def test_other_places_are_refused(tmp_path, refused):
    refused(
        "does not exist", load_demonstrations, tmp_path / "a", error=FileNotFoundError
    )
    refused("no demonstrations that are understood", load_demonstrations, tmp_path)
    data.write_demonstrations(tmp_path, episodes())
    same(load_demonstrations(tmp_path), episodes())
