"""Summaries of runs, their merge, and the records that they become."""

import copy
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import claim, refuses, unit

from tmdjax.harness.compare import comparison_rows, read_run
from tmdjax.harness.records import LATER, read_records, read_summary, write_record
from tmdjax.harness.summaries import (
    SUMMARY_KEYS,
    merge,
    numbers,
    summary,
    with_seeds,
)

EXACT = {"statistic": "exact", "direction": "equal"}
REPORT = {"statistic": "report", "direction": None, "threshold": None}
MADE = {"device": "NVIDIA H100", "versions": {"jax": "0.10.2"}}
MADE["labels"] = {"frechet": "FD-net@1"}


def scored(arm, seed, base):
    metrics = {"score": base + 0.1 * seed, "w2": 1.0 / (seed + 1)}
    return unit(arm, seed, metrics, wall_s=0.1 + seed, peak_memory_gb=seed, **MADE)


UNITS = [scored("boss", s, 2.0) for s in range(5)]
UNITS += [scored("uniform", s, 1.0) for s in range(5)]
CLAIMS = [
    claim(),
    claim(id="B2", ours="boss/w2", baseline=None, **REPORT),
    claim(id="B3", simulated=True, statistic="ratio", threshold=1.2),
]


def summarise(units=UNITS, claims=CLAIMS, **changes):
    command = "python -m experiments.run --config=configs/boss.py:gpu"
    fields = {"system": "boss", "tier": "gpu", "command": command}
    fields |= {"config_hash": "0123456789abcdef", **changes}
    return summary(units=units, claims=claims, **fields)


def test_summary_of_one_arm_has_plain_metric_names():
    units = [unit("main", s, {"loss": float(s)}) for s in (4, 1)]
    result = summarise(units, [claim(**EXACT, threshold=1, ours="loss", baseline=None)])
    assert tuple(result) == SUMMARY_KEYS
    assert result["metrics"] == {"loss": 2.5}
    assert result["seeds"] == [1, 4]
    assert result["wall_s"] == 2.0 and result["peak_memory_gb"] is None
    assert result["claims"][0]["ours"] == [1.0, 4.0]


def test_stages_that_units_share_count_once_in_the_time():
    """A record made before stages were timed counts them in each unit."""
    shared = [
        UNITS[i] | {"wall_s": 9.0, "stage_s": {"teacher": 7.0, f"student{i}": 2.0}}
        for i in range(2)
    ]
    found = summarise([*shared, UNITS[2] | {"wall_s": 9.0}], [])
    assert found["wall_s"] == 7 + 2 + 2 + 9
    assert summarise(found["units"], []) == found


def test_summary_of_two_arms_prefixes_and_pairs_by_seed():
    result = summarise(random.Random(0).sample(UNITS, len(UNITS)), pairing="vmapped")
    assert list(result["metrics"]) == [
        "boss/score", "boss/w2", "uniform/score", "uniform/w2"
    ]  # fmt: skip
    np.testing.assert_allclose(result["metrics"]["boss/score"], 2.2)
    first, second, third = result["claims"]
    assert first["verdict"] == "reproduced"
    assert first["pairing"] == "vmapped"
    np.testing.assert_allclose(first["value"], 1.0)
    assert first["ours"][3] == 2.0 + 0.1 * 3
    assert second["verdict"] == "reported"
    assert third["verdict"] == "simulated"
    assert result["peak_memory_gb"] == 4


def test_a_claim_takes_the_seeds_that_have_both_arms():
    first, second, _ = summarise(UNITS[:7])["claims"]  # boss 0..4, uniform 0, 1
    assert len(first["ours"]) == 2 and first["verdict"] == "reported"
    assert len(second["ours"]) == 5


def test_summary_refuses_bad_input():
    refuses("at least one unit", summarise, [], [])
    twice = [unit("a", 0, {"x": x}) for x in (1.0, 2.0)]
    words = "arm 'a' seed 0 stands twice with different content"
    refuses(words, summarise, twice, [])
    refuses("two claims share an id", summarise, claims=[claim(), claim()])


def shards(assignment, order, repeated=()):
    def of(n):
        rows = zip(UNITS, assignment)
        return [u for u, part in rows if part == n or (n, u["seed"]) in repeated]

    parts = [summarise(of(n)) for n in sorted(set(assignment))]
    order.shuffle(parts)
    return parts


def test_merge_refuses_what_differs():
    refuses("nothing to merge", merge, [])
    other = {"system": "tmd", "tier": "cpu", "config_hash": "fedcba9876543210"}
    for key, value in other.items():
        pair = [summarise(), summarise(**{key: value})]
        refuses(f"shards differ in {key}", merge, pair)
        for shard in pair:
            refuses(repr(shard[key]), merge, pair)
    moved = summarise(claims=[claim(threshold=0.1), *CLAIMS[1:]])
    refuses("boss gpu differ in the definition", merge, [summarise(), moved])
    tpu = summarise([u | {"device": "TPU v5e"} for u in UNITS])
    refuses("differ in device: NVIDIA H100, TPU v5e", merge, [summarise(), tpu])
    slower = summarise([UNITS[0] | {"wall_s": 99.0}])
    assert merge([summarise(), slower]) == summarise()  # a rerun may take longer
    other = summarise([UNITS[0] | {"metrics": {"score": 9.0}}])
    refuses("arm 'boss' seed 0 stands twice", merge, [summarise(), other])


@settings(max_examples=40, deadline=None)
@given(
    assignment=st.lists(st.integers(0, 4), min_size=10, max_size=10),
    order=st.randoms(use_true_random=False),
    repeated=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4),
)
def test_merge_of_any_partition_is_the_whole(assignment, order, repeated):
    assert merge(shards(assignment, order, repeated)) == summarise()


@settings(max_examples=20, deadline=None)
@given(
    assignment=st.lists(st.integers(0, 4), min_size=10, max_size=10),
    order=st.randoms(use_true_random=False),
    cut=st.integers(1, 4),
)
def test_merge_of_merges_is_the_merge_through_json_too(assignment, order, cut):
    parts = [json.loads(json.dumps(s)) for s in shards(assignment, order)]
    for n, part in enumerate(parts):
        part["command"] += f" --shard={n}/5"
        for u in part["units"]:
            u["commit"] = "abc" if n % 2 else "def"
            u["versions"] = {"jax": f"0.1{n % 2}"}
    halves = [merge(half) for half in (parts[:cut], parts[cut:]) if half]
    whole = merge(parts)
    assert merge(halves) == whole
    assert whole["command"] == summarise()["command"]
    assert whole["commit"] in ("def", "abc, def")


def test_a_diverged_seed_merges_with_itself():
    units = [*UNITS[1:], unit("boss", 0, {"score": math.nan}, **MADE)]
    shard = summarise(units, CLAIMS[:1])
    merged = merge([shard, shard])
    assert merged["claims"][0]["verdict"] == "inconclusive"
    assert math.isnan(merged["metrics"]["boss/score"])
    assert len(merged["units"]) == 10


def test_units_of_two_nets_or_devices_are_not_pooled(refused):
    net = {"labels": {"frechet": "FD-net@2"}}
    for change in (net, {"device": "TPU v5e"}):
        other = [*UNITS[:-1], UNITS[-1] | change]
        refused(r"units differ in .*cannot be judged", summarise, other)
    pinned = {"device": "cpu, 1 cores and cpu, 2 cores"}  # other times, equal numbers
    cores = [UNITS[0] | {"device": "cpu, 2 cores"}, UNITS[1] | pinned]
    assert merge([summarise([u]) for u in cores])["device"] == pinned["device"]
    refused("NVIDIA H100, cpu;", summarise, [*UNITS[2:], cores[0]])
    both = [u | {"device": "NVIDIA H100 and cpu, 2 cores"} for u in UNITS]
    assert summarise(both)["device"] == both[0]["device"]
    halves = (UNITS[:5], [u | net for u in UNITS[5:]])
    shards = [summarise(units) for units in halves]
    refused(r"FD-net@1, FD-net@2", merge, shards)


def test_commands_name_the_seeds():
    for seeds, suffix in (
        ([0], ""),
        ([1], " --seeds=1"),
        ([0, 1], " --seeds=0,1"),
        ([2, 0, 1], " --seeds=0..2"),
        ([0, 1, 4], " --seeds=0,1,4"),
    ):
        for typed in ("run x", "run x --seeds=7", "run x --seeds=0..4 --shard=1/2"):
            assert with_seeds(typed, seeds) == f"run x{suffix}"


# --- records ------------------------------------------------------------------


def test_record_round_trip(tmp_path):
    units = [*UNITS[:-1], unit("uniform", 4, {"score": math.inf, "w2": 0.0}, **MADE)]
    whole = summarise(units)
    path = write_record(tmp_path, whole)
    assert path == tmp_path / "boss" / "gpu.json"
    assert "Infinity" not in path.read_text()
    assert read_records(tmp_path) == [whole]
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


def test_pictures_of_a_record_say_what_they_show_and_go_with_it(tmp_path):
    made, folder = {}, tmp_path / "figures" / "run" / "figures"  # the last one counts
    for name in ("error.png", "arm/samples.png", "film.html", "film.gif"):
        made[name] = folder / name
        made[name].parent.mkdir(parents=True, exist_ok=True)
        made[name].write_text(name)
    first = [("error (seeds 0, 1)", made["error.png"])]
    first += [("samples (arm, seed 0)", made["arm/samples.png"]), ("absent", None)]
    first += [("a page, which stays with the run", made["film.html"])]
    path = write_record(tmp_path, summarise(), first)

    def there():
        return {p.name: p.read_text() for p in path.parent.glob("gpu-*")}

    both = {"gpu-error.png": "error.png", "gpu-arm-samples.png": "arm/samples.png"}
    assert there() == both
    (record,) = read_records(tmp_path)
    captions = ["error (seeds 0, 1)", "samples (arm, seed 0)"]
    assert list(record["figures"].values()) == captions
    made["error.png"].write_text("drawn anew")  # of the same units
    write_record(tmp_path, merge([record]), [("error again", made["error.png"])])
    assert there() == {**both, "gpu-error.png": "drawn anew"}
    captions[0] = "error again"
    assert list(read_records(tmp_path)[0]["figures"].values()) == captions
    listed = json.loads(path.read_text())
    listed["figures"] |= {"gpu-film.html": "of a record that kept pages"}
    path.write_text(json.dumps(listed))
    path.with_name("gpu-film.html").touch()
    write_record(tmp_path, merge([record]))
    assert {*there()} == {*read_records(tmp_path)[0]["figures"]} == {*both}
    others = [scored("boss", 0, 3.0), *UNITS[1:]]
    write_record(tmp_path, summarise(others), [("film", made["film.gif"])])
    assert there() == {"gpu-film.gif": "film.gif"}
    foreign = json.loads(path.read_text())
    foreign["figures"] |= {"gpu-../../x": "", "cpu.json": ""}
    path.write_text(json.dumps(foreign))
    refuses("picture='gpu-../../x' names a file", write_record, tmp_path, summarise())


def test_a_record_is_not_written_over_by_one_that_holds_less(tmp_path):
    path = write_record(tmp_path, summarise())
    whole = path.read_bytes()
    for held, *less in (
        ("arm 'uniform' seed 4, which", UNITS[:-1]),
        ("arm 'boss' seed 1, arm 'boss' seed 2, arm 'boss' seed 3, ..., which",
         [UNITS[0], *UNITS[5:]]),
        ("claim 'B2', which", UNITS, [CLAIMS[0], CLAIMS[2]]),
    ):  # fmt: skip
        refuses(f"gpu.json holds {held} a", write_record, tmp_path, summarise(*less))
        assert path.read_bytes() == whole
    more = [*UNITS, scored("boss", 5, 0.0)]
    assert len(read_summary(write_record(tmp_path, summarise(more)))["units"]) == 11
    path.write_text("{")  # damaged
    assert write_record(tmp_path, summarise()).read_bytes() == whole


def test_records_come_by_system_then_tier(tmp_path):
    for system, tier in (("tmd", "cpu"), ("boss", "paper"), ("boss", "cpu")):
        write_record(tmp_path, summarise(system=system, tier=tier))
    write_record(tmp_path, summarise(tier="smoke"))
    order = [(r["system"], r["tier"]) for r in read_records(tmp_path)]
    assert order == [
        ("boss", "smoke"), ("boss", "cpu"), ("boss", "paper"), ("tmd", "cpu")
    ]  # fmt: skip
    assert read_records(tmp_path / "absent") == []


def test_a_missing_key_is_refused_in_both_directions(tmp_path):
    path = tmp_path / "boss" / "gpu.json"
    path.parent.mkdir()
    for key in {*SUMMARY_KEYS} - {*LATER}:
        whole = summarise()
        del whole[key]
        words = f"the summary lacks {key}; a record needs"
        refuses(words, write_record, tmp_path, whole)
        assert not path.exists()
        path.write_text(json.dumps(whole))
        refuses(f"gpu.json lacks {key}", read_records, tmp_path)
        path.unlink()


def test_an_unfinished_summary_is_not_recorded(tmp_path):
    shard = summarise(UNITS[:5])
    words = "claim 'B1' has no seed with 'boss/score' and 'uniform/score'"
    refuses(words, write_record, tmp_path, shard)


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "..", "", None, 3])
@pytest.mark.parametrize("key", ["system", "tier"])
def test_a_name_that_is_a_path_is_not_recorded(tmp_path, key, name):
    folder = tmp_path / "deep" / "results"
    words = f"{key}={name!r} names a file"
    refuses(words, write_record, folder, summarise() | {key: name})
    assert not list(tmp_path.iterdir())


def test_a_record_is_judged_again_when_it_is_read(tmp_path):
    """Whatever the units do not give is found, and the first of it is named."""
    path = write_record(tmp_path, summarise())
    whole = path.read_text()

    def edited(words, change):
        record = json.loads(whole)
        change(record)
        path.write_text(json.dumps(record))
        refuses(
            f"{path} does not say what its units give: {words}", read_records, tmp_path
        )

    def of_claim(key, value):
        return lambda record: record["claims"][0].update({key: value})

    says = 'claims.B1.verdict: "reproduced" -> "exact"'
    edited(says, of_claim("verdict", "exact"))
    edited(
        'claims.B1.verdict: "reproduced" -> "simulated"',
        of_claim("verdict", "simulated"),
    )
    edited("claims.B1.value: ", of_claim("value", 1.001))
    edited("claims.B1.ci95: ", of_claim("ci95", [0.5, 0.6]))
    edited('claims.B1.verdict: "not reproduced" -> ', of_claim("threshold", 2.0))
    edited(
        "metrics.boss/score: ",
        lambda record: record["metrics"].update({"boss/score": 3}),
    )
    edited("seeds: ", lambda record: record["seeds"].append(5))
    edited("wall_s: ", lambda record: record.update(wall_s=1.0))
    path.write_text(json.dumps(json.loads(whole) | {"units": [{}]}))
    refuses(f"{path} is damaged", read_records, tmp_path)
    record = json.loads(whole)
    record["claims"][0]["value"] *= 1 + 1e-14  # the rounding of another machine
    path.write_text(json.dumps(record))
    assert read_records(tmp_path)


def test_timings_stand_apart_from_metrics_and_old_records_have_none(tmp_path):
    fast, slow = (
        unit("boss", 0, {"score": 1.0}, timings={"seconds": s}) for s in (2.0, 3.0)
    )
    claims = [claim(**REPORT, ours="boss/seconds", baseline=None)]
    found = summarise([fast], claims)
    assert found["metrics"] == {"boss/score": 1.0}
    assert found["timings"] == {"boss/seconds": 2.0}
    assert found["claims"][0]["value"] == 2.0
    assert merge([found, summarise([slow], claims)]) == found  # run twice: no conflict
    assert numbers(found) == {"boss/score": 1.0, "boss/seconds": 2.0}
    path = write_record(tmp_path, summarise())
    old = json.loads(path.read_text())
    del old["timings"]
    path.write_text(json.dumps(old))
    assert numbers(read_records(tmp_path)[0]) == old["metrics"]


def parts(found, place=()):
    """Places of all parts of a JSON value, of a list its first."""
    yield place
    if isinstance(found, list):
        found = dict(enumerate(found[:1]))
    for key, value in found.items() if isinstance(found, dict) else ():
        yield from parts(value, (*place, key))


def replaced(found, place, value):
    if not place:
        return value
    other = copy.copy(found)
    other[place[0]] = replaced(found[place[0]], place[1:], value)
    return other


def test_a_summary_with_a_part_of_another_kind_is_damaged(tmp_path):
    """Whatever is read can be merged, compared and judged again."""
    path, refusals = tmp_path / "summary.json", 0
    good = json.loads(json.dumps(summarise(UNITS[:1] + UNITS[5:6])))
    for place in parts(good):
        for value in (None, "x", [], {}, [None], {"a": None}, True):
            path.write_text(json.dumps(replaced(good, place, value)))
            try:
                found = read_summary(path)
            except ValueError as error:
                assert str(path) in str(error)
                refusals += 1
                continue
            for call in (
                lambda found=found: merge([found, found]),
                lambda: comparison_rows(
                    [read_run(f"{path}:{arm}") for arm in ("boss", "uniform")]
                ),
            ):
                try:
                    call()
                except ValueError:  # of other arms, pairings, devices or labels
                    assert place[0] in ("units", "claims")
    assert refusals > 300


def test_records_made_by_hand_are_refused(tmp_path):
    path = write_record(tmp_path, summarise())
    path.rename(path.with_name("cpu.json"))
    refuses("cpu.json is the record of boss/gpu", read_records, tmp_path)
    path.with_name("cpu.json").unlink()
    for text, words in (("{", "is not JSON"), ("[]", "holds no summary")):
        path.write_text(text)
        refuses(f"gpu.json {words}", read_records, tmp_path)
