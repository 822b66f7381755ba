import dataclasses
import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tmdjax.harness.ledger import (
    SUMMARY_KEYS,
    Claim,
    judge,
    merge,
    read_records,
    summary,
    with_seeds,
    write_record,
)


def claim(**changes):
    fields = {
        "id": "B1",
        "statement": "Bellman grids beat uniform ones",
        "published": "1.5x",
        "statistic": "difference",
        "direction": "greater",
        "threshold": 0.0,
        "ours": "boss/score",
        "baseline": "uniform/score",
    }
    return Claim(**(fields | changes))


def judged(ours, baseline=None, **changes):
    per_seed = [{"boss/score": x} for x in ours]
    for metrics, x in zip(per_seed, baseline or []):
        metrics["uniform/score"] = x
    if baseline is None:
        changes["baseline"] = None
    return judge(claim(**changes), per_seed, list(range(len(ours))), "cpu")


# --- claims -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"statistic": "ratios"}, "'ratios' is not one of"),
        ({"statistic": "ratios"}, "Did you mean 'ratio'?"),
        ({"direction": "equal"}, "direction='equal' is not one of 'greater', 'less'"),
        ({"direction": None}, "direction='None' is not one of"),
        ({"statistic": "exact"}, "direction='greater' is not one of 'equal'"),
        ({"threshold": None}, "threshold is None; a difference needs a finite one"),
        ({"threshold": math.inf}, "threshold is inf"),
        ({"ours": " "}, "ours is empty"),
        ({"id": ""}, "id is empty"),
        ({"baseline": "boss/score"}, "baseline and ours are both 'boss/score'"),
    ],
)
def test_claims_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        claim(**changes)
    assert message in str(caught.value)
    assert f"claim {changes.get('id', 'B1')!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reported_claim_needs_no_threshold_and_claims_are_frozen():
    made: Any = claim(statistic="report", direction=None, threshold=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.threshold = 1.0


# --- verdicts ---------------------------------------------------------------

FIVE = [1.0, 1.1, 0.9, 1.05, 0.95]


@pytest.mark.parametrize(
    "ours, changes, verdict",
    [
        (FIVE, {"threshold": 0.5}, "reproduced"),
        (FIVE, {"threshold": 1.5}, "not reproduced"),
        (FIVE, {"threshold": 1.01}, "inconclusive"),
        (FIVE, {"threshold": 1.5, "direction": "less"}, "reproduced"),
        (FIVE, {"threshold": 0.5, "direction": "less"}, "not reproduced"),
        (FIVE, {"threshold": 0.99, "direction": "less"}, "inconclusive"),
        ([1.0] * 5, {"threshold": 1.0}, "inconclusive"),
        ([*FIVE, math.nan], {"threshold": 0.5}, "inconclusive"),
        ([*FIVE, math.inf], {"threshold": 0.5}, "inconclusive"),
        (FIVE[:4], {"threshold": 0.5}, "pilot"),
        (FIVE[:3], {"threshold": 1.5}, "pilot"),
        (FIVE[:2], {"threshold": 0.5}, "reported"),
        (FIVE[:1], {"threshold": 0.5}, "reported"),
        (FIVE, {"threshold": 0.5, "simulated": True}, "simulated"),
        (FIVE[:1], {"statistic": "report"}, "reported"),
        (FIVE, {"statistic": "report", "threshold": 0.5}, "reported"),
        ([3.0], {"statistic": "exact", "direction": "equal", "threshold": 3}, "exact"),
        (
            [3.0, 3.0 + 1e-15, 3.0],
            {"statistic": "exact", "direction": "equal", "threshold": 3.0},
            "not reproduced",
        ),
        (
            [3.0, math.nan],
            {"statistic": "exact", "direction": "equal", "threshold": 3.0},
            "not reproduced",
        ),
    ],
)
def test_verdicts(ours, changes, verdict):
    assert judged(ours, **changes)["verdict"] == verdict


def test_difference_interval_is_the_paired_t_interval_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 0.3, 6).tolist(), rng.normal(0, 0.3, 6).tolist()
    result = judged(a, b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(result["ci95"], [low, high], rtol=1e-10)
    np.testing.assert_allclose(result["value"], np.mean(a) - np.mean(b), rtol=1e-10)
    assert result["ours"] == a
    assert result["baseline"] == b
    # A common shift of both arms in a seed changes nothing: seeds are paired.
    shift = rng.normal(0, 50, 6)
    moved = judged((a + shift).tolist(), (b + shift).tolist())
    np.testing.assert_allclose(moved["ci95"], [low, high], rtol=1e-9)


def test_single_arm_interval_is_the_t_interval_of_scipy():
    result = judged(FIVE, threshold=0.5)
    low, high = stats.ttest_1samp(FIVE, 0).confidence_interval(0.95)
    np.testing.assert_allclose(result["ci95"], [low, high], rtol=1e-10)
    assert result["baseline"] is None


def test_ratio_is_blind_to_the_unit_of_each_seed():
    ours, base = [2.0, 4.2, 8.1, 1.9, 2.2], [1.0, 2.0, 4.0, 1.0, 1.0]
    result = judged(ours, base, statistic="ratio", threshold=1.5)
    assert result["verdict"] == "reproduced"
    scale = [1, 10, 0.1, 7, 3]
    scaled = judged(
        [x * s for x, s in zip(ours, scale)],
        [x * s for x, s in zip(base, scale)],
        statistic="ratio",
        threshold=1.5,
    )
    np.testing.assert_allclose(scaled["ci95"], result["ci95"], rtol=1e-12)


def test_a_ratio_that_does_not_exist_is_inconclusive_not_an_error():
    result = judged([1.0] * 5, [1.0, 1.0, 0.0, 1.0, 1.0], statistic="ratio")
    assert result["verdict"] == "inconclusive"
    assert result["value"] is None
    assert result["ci95"] == [None, None]


def test_exact_compares_arms_seed_by_seed_and_shows_the_worst():
    fields = {"statistic": "exact", "direction": "equal", "threshold": 0.0}
    assert judged([0.1, 0.7], [0.1, 0.7], **fields)["verdict"] == "exact"
    result = judged([0.1, 0.75, 0.5], [0.1, 0.5, 0.625], **fields)
    assert result["verdict"] == "not reproduced"
    assert result["value"] == 0.25


def test_one_seed_has_a_value_but_no_interval():
    result = judged([2.0], [0.5])
    assert result["value"] == 1.5
    assert result["ci95"] == [None, None]


def test_judged_claims_hold_the_keys_of_the_ledger():
    result = judged(FIVE, FIVE[::-1])
    assert set(result) >= {
        *("id", "statement", "published", "statistic", "direction", "threshold"),
        *("ours", "baseline", "value", "ci95", "verdict", "pairing"),
    }
    assert result["pairing"] == "separate"


@pytest.mark.parametrize(
    "per_seed, seeds, options, message",
    [
        ([], [], {}, "at least one"),
        ([{}], [0, 1], {}, "metrics of 1 seed(s) for seeds [0, 1]"),
        ([{}, {}], [3, 3], {}, "a seed twice: [3, 3]"),
        ([{}], [0], {"pairing": "mixed"}, "pairing='mixed' is not one of"),
        (
            [{"boss/score": 1.0, "uniform/scor": 2.0}],
            [7],
            {},
            "needs metric 'uniform/score', which seed 7 of tier 'cpu' lacks",
        ),
        (
            [{"boss/score": 1.0, "uniform/scor": 2.0}],
            [7],
            {},
            "Did you mean 'uniform/scor'?",
        ),
    ],
)
def test_judge_refuses_bad_input(per_seed, seeds, options, message):
    with pytest.raises(ValueError) as caught:
        judge(claim(), per_seed, seeds, "cpu", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- summaries and their merge ------------------------------------------------


def unit(arm, seed, metrics, wall_s=1.0, peak=None):
    return {
        "arm": arm,
        "seed": seed,
        "metrics": metrics,
        "wall_s": wall_s,
        "peak_memory_gb": peak,
        "device": "NVIDIA H100",
        "commit": "abc",
        "versions": {"jax": "0.10.2"},
        "labels": {"frechet": "FD-net@1"},
    }


UNITS = [
    unit(
        arm,
        seed,
        {"score": base + 0.1 * seed, "w2": 1.0 / (seed + 1)},
        0.1 + seed,
        seed,
    )
    for arm, base in (("boss", 2.0), ("uniform", 1.0))
    for seed in range(5)
]
CLAIMS = [
    claim(),
    claim(id="B2", ours="boss/w2", baseline=None, statistic="report", threshold=None),
    claim(id="B3", simulated=True, statistic="ratio", threshold=1.2),
]


def summarise(units=UNITS, claims=CLAIMS, **changes):
    fields = {
        "system": "boss",
        "tier": "gpu",
        "command": "python -m experiments.run --config=configs/boss.py:gpu",
        "config_hash": "0123456789abcdef",
    }
    return summary(units=units, claims=claims, **(fields | changes))


def test_summary_of_one_arm_has_plain_metric_names():
    units = [unit("main", s, {"loss": float(s)}, 2.0, 1.5) for s in (4, 1)]
    only = Claim(
        id="1a",
        statement="x",
        published=None,
        statistic="exact",
        direction="equal",
        threshold=1,
        ours="loss",
    )
    result = summarise(units, [only])
    assert tuple(result) == SUMMARY_KEYS
    assert result["metrics"] == {"loss": 2.5}
    assert result["seeds"] == [1, 4]
    assert result["wall_s"] == 4.0
    assert result["peak_memory_gb"] == 1.5
    assert result["claims"][0]["ours"] == [1.0, 4.0]


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
    result = summarise(UNITS[:7])  # boss 0..4, uniform 0, 1
    assert len(result["claims"][0]["ours"]) == 2
    assert result["claims"][0]["verdict"] == "reported"
    assert len(result["claims"][1]["ours"]) == 5


@pytest.mark.parametrize(
    "units, claims, message",
    [
        ([], [], "at least one unit"),
        (
            [{"arm": "a", "seed": 0}],
            [],
            "a unit lacks metrics, wall_s, peak_memory_gb, device",
        ),
        (
            [unit("a", 0, {"x": 1.0}), unit("a", 0, {"x": 2.0})],
            [],
            "arm 'a' seed 0 stands twice with different content",
        ),
        (UNITS, [claim(), claim()], "two claims share an id"),
        (
            UNITS,
            [claim(ours="boss/scores")],
            "metric 'boss/scores', which no unit measured",
        ),
        (UNITS, [claim(ours="boss/scores")], "Did you mean 'boss/score'?"),
        (UNITS, [claim(baseline="unifrm/score")], "Did you mean 'uniform/score'?"),
    ],
)
def test_summary_refuses_bad_input(units, claims, message):
    with pytest.raises(ValueError) as caught:
        summarise(units, claims)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def shards(assignment, order, repeated=()):
    parts = [
        summarise(
            [
                u
                for u, part in zip(UNITS, assignment)
                if part == n or (n, u["seed"]) in repeated
            ],
            complete=False,
        )
        for n in sorted(set(assignment))
    ]
    order.shuffle(parts)
    return parts


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
    units = [*UNITS[1:], unit("boss", 0, {"score": math.nan})]
    shard = summarise(units, CLAIMS[:1])
    merged = merge([shard, shard])
    assert merged["claims"][0]["verdict"] == "inconclusive"
    assert math.isnan(merged["metrics"]["boss/score"])
    assert len(merged["units"]) == 10


@pytest.mark.parametrize(
    "key, value",
    [
        ("system", "tmd"),
        ("tier", "cpu"),
        ("config_hash", "fedcba9876543210"),
    ],
)
def test_merge_names_what_differs(key, value):
    with pytest.raises(ValueError) as caught:
        merge([summarise(), summarise(**{key: value})])
    message = str(caught.value)
    assert f"shards differ in {key}" in message
    assert repr(value) in message
    assert repr(summarise()[key]) in message
    assert "\n" not in message


def test_merge_refuses_moved_thresholds_and_conflicting_units():
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
    moved = summarise(claims=[claim(threshold=0.1), *CLAIMS[1:]])
    with pytest.raises(ValueError, match="boss gpu differ in the definition"):
        merge([summarise(), moved])
    tpu = summarise([u | {"device": "TPU v5e"} for u in UNITS])
    with pytest.raises(ValueError, match=r"differ in device: 'NVIDIA H100' and 'TPU"):
        merge([summarise(), tpu])
    slower = summarise([UNITS[0] | {"wall_s": 99.0}], complete=False)
    assert merge([summarise(), slower]) == summarise()  # a rerun may take longer
    other = summarise([UNITS[0] | {"metrics": {"score": 9.0}}], complete=False)
    with pytest.raises(ValueError, match="arm 'boss' seed 0 stands twice"):
        merge([summarise(), other])


def test_units_of_two_nets_or_devices_are_not_pooled():
    for key, value in (("labels", {"frechet": "FD-net@2"}), ("device", "TPU v5e")):
        with pytest.raises(ValueError, match=r"units differ in .*cannot be judged"):
            summarise([*UNITS[:-1], UNITS[-1] | {key: value}])
    shards = [
        summarise(UNITS[:5], complete=False),
        summarise(
            [u | {"labels": {"frechet": "FD-net@2"}} for u in UNITS[5:]], complete=False
        ),
    ]
    with pytest.raises(ValueError, match=r"FD-net@1, FD-net@2"):
        merge(shards)


@pytest.mark.parametrize(
    "seeds, suffix",
    [
        ([0], ""),
        ([1], " --seeds=1"),
        ([0, 1], " --seeds=0,1"),
        ([2, 0, 1], " --seeds=0..2"),
        ([0, 1, 4], " --seeds=0,1,4"),
    ],
)
def test_commands_name_the_seeds(seeds, suffix):
    for typed in ("run x", "run x --seeds=7", "run x --seeds=0..4 --shard=1/2"):
        assert with_seeds(typed, seeds) == f"run x{suffix}"


# --- records ------------------------------------------------------------------


def test_record_round_trip(tmp_path):
    units = [*UNITS[:-1], unit("uniform", 4, {"score": math.inf, "w2": 0.0})]
    whole = summarise(units)
    path = write_record(tmp_path, whole)
    assert path == tmp_path / "boss" / "gpu.json"
    assert "Infinity" not in path.read_text()
    assert read_records(tmp_path) == [whole]
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


def test_records_come_by_system_then_tier(tmp_path):
    for system, tier in (("tmd", "cpu"), ("boss", "paper"), ("boss", "cpu")):
        write_record(tmp_path, summarise(system=system, tier=tier))
    write_record(tmp_path, summarise(tier="smoke"))
    order = [(r["system"], r["tier"]) for r in read_records(tmp_path)]
    assert order == [
        ("boss", "smoke"), ("boss", "cpu"), ("boss", "paper"), ("tmd", "cpu")
    ]  # fmt: skip
    assert read_records(tmp_path / "absent") == []


@pytest.mark.parametrize("key", SUMMARY_KEYS)
def test_a_missing_key_is_refused_in_both_directions(tmp_path, key):
    whole = summarise()
    del whole[key]
    with pytest.raises(ValueError, match=f"the summary lacks {key}; a record needs"):
        write_record(tmp_path, whole)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "boss" / "gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=rf"gpu\.json lacks {key}"):
        read_records(tmp_path)


def test_an_unfinished_summary_is_not_recorded(tmp_path):
    shard = summarise(UNITS[:5], complete=False)
    with pytest.raises(ValueError) as caught:
        write_record(tmp_path, shard)
    assert "claim 'B1' has no seed with 'boss/score' and 'uniform/score'" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("gpu", "{", "gpu.json is not JSON"),
        ("gpu", "[]", "gpu.json holds no record"),
        ("cpu", None, "cpu.json is the record of boss/gpu"),
    ],
)
def test_records_made_by_hand_are_refused(tmp_path, name, text, message):
    path = write_record(tmp_path, summarise())
    content = path.read_text()
    path.unlink()
    (tmp_path / "boss" / f"{name}.json").write_text(content if text is None else text)
    with pytest.raises(ValueError) as caught:
        read_records(tmp_path)
    assert message in str(caught.value)
