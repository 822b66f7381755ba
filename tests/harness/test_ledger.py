import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import claim, unit
from scipy import stats

from tmdjax.harness.ledger import (
    SUMMARY_KEYS,
    judge,
    merge,
    read_records,
    summary,
    with_seeds,
    write_record,
)

EXACT = {"statistic": "exact", "direction": "equal"}


REPORT = {"statistic": "report", "direction": None, "threshold": None}


def refuses(words, call, *arguments, **options):
    """An error of one line that says these words as they stand."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


def judged(ours, baseline=None, **changes):
    per_seed = [{"boss/score": x} for x in ours]
    for metrics, x in zip(per_seed, baseline or []):
        metrics["uniform/score"] = x
    if baseline is None:
        changes["baseline"] = None
    return judge(claim(**changes), per_seed, list(range(len(ours))), "cpu")


# --- claims -----------------------------------------------------------------


def test_claims_that_do_not_fit_together_are_refused():
    refuses("claim 'B1'", claim, statistic="ratios")
    refuses("'ratios' is not one of", claim, statistic="ratios")
    refuses("Did you mean 'ratio'?", claim, statistic="ratios")
    words = "direction='equal' is not one of 'greater', 'less'"
    refuses(words, claim, direction="equal")
    refuses("direction='None' is not one of", claim, direction=None)
    refuses("direction='greater' is not one of 'equal'", claim, statistic="exact")
    words = "threshold is None; a difference needs a finite one"
    refuses(words, claim, threshold=None)
    refuses("threshold is inf", claim, threshold=math.inf)
    refuses("ours is empty", claim, ours=" ")
    refuses("claim '': id is empty", claim, id="")
    words = "baseline and ours are both 'boss/score'"
    refuses(words, claim, baseline="boss/score")


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
        (FIVE[:1], REPORT, "reported"),
        (FIVE, {"statistic": "report", "threshold": 0.5}, "reported"),
        ([3.0], {**EXACT, "threshold": 3}, "exact"),
        ([3.0, 3.0 + 1e-15, 3.0], {**EXACT, "threshold": 3.0}, "not reproduced"),
        ([3.0, math.nan], {**EXACT, "threshold": 3.0}, "not reproduced"),
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
    ratio = {"statistic": "ratio", "threshold": 1.5}
    result = judged(ours, base, **ratio)
    assert result["verdict"] == "reproduced"
    scale = [1, 10, 0.1, 7, 3]
    ours, base = ([x * s for x, s in zip(values, scale)] for values in (ours, base))
    scaled = judged(ours, base, **ratio)
    np.testing.assert_allclose(scaled["ci95"], result["ci95"], rtol=1e-12)


def test_a_ratio_that_does_not_exist_is_inconclusive_not_an_error():
    result = judged([1.0] * 5, [1.0, 1.0, 0.0, 1.0, 1.0], statistic="ratio")
    assert result["verdict"] == "inconclusive"
    assert result["value"] is None and result["ci95"] == [None, None]


def test_exact_compares_arms_seed_by_seed_and_shows_the_worst():
    fields = {**EXACT, "threshold": 0.0}
    assert judged([0.1, 0.7], [0.1, 0.7], **fields)["verdict"] == "exact"
    result = judged([0.1, 0.75, 0.5], [0.1, 0.5, 0.625], **fields)
    assert result["verdict"] == "not reproduced" and result["value"] == 0.25


def test_one_seed_has_a_value_but_no_interval():
    result = judged([2.0], [0.5])
    assert result["value"] == 1.5 and result["ci95"] == [None, None]


def test_judge_refuses_bad_input():
    near = [{"boss/score": 1.0, "uniform/scor": 2.0}]
    cases = (
        ("at least one", [], []),
        ("metrics of 1 seed(s) for seeds [0, 1]", [{}], [0, 1]),
        ("a seed twice: [3, 3]", [{}, {}], [3, 3]),
        ("needs metric 'uniform/score', which seed 7 of tier 'cpu' lacks", near, [7]),
        ("Did you mean 'uniform/scor'?", near, [7]),
    )
    for words, per_seed, seeds in cases:
        refuses(words, judge, claim(), per_seed, seeds, "cpu")
    words = "pairing='mixed' is not one of"
    refuses(words, judge, claim(), [{}], [0], "cpu", pairing="mixed")


# --- summaries and their merge ------------------------------------------------


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
    words = "a unit lacks metrics, wall_s, peak_memory_gb, device"
    refuses(words, summarise, [{"arm": "a", "seed": 0}], [])
    twice = [unit("a", 0, {"x": x}) for x in (1.0, 2.0)]
    words = "arm 'a' seed 0 stands twice with different content"
    refuses(words, summarise, twice, [])
    refuses("two claims share an id", summarise, claims=[claim(), claim()])
    other = [claim(ours="boss/scores")]
    words = "metric 'boss/scores', which no unit measured"
    refuses(words, summarise, claims=other)
    refuses("Did you mean 'boss/score'?", summarise, claims=other)
    other = [claim(baseline="unifrm/score")]
    refuses("Did you mean 'uniform/score'?", summarise, claims=other)


def shards(assignment, order, repeated=()):
    def of(n):
        rows = zip(UNITS, assignment)
        return [u for u, part in rows if part == n or (n, u["seed"]) in repeated]

    parts = [summarise(of(n), complete=False) for n in sorted(set(assignment))]
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
    refuses("differ in device: 'NVIDIA H100' and 'TPU", merge, [summarise(), tpu])
    slower = summarise([UNITS[0] | {"wall_s": 99.0}], complete=False)
    assert merge([summarise(), slower]) == summarise()  # a rerun may take longer
    other = summarise([UNITS[0] | {"metrics": {"score": 9.0}}], complete=False)
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
    halves = (UNITS[:5], [u | net for u in UNITS[5:]])
    shards = [summarise(units, complete=False) for units in halves]
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
    for key in SUMMARY_KEYS:
        whole = summarise()
        del whole[key]
        words = f"the summary lacks {key}; a record needs"
        refuses(words, write_record, tmp_path, whole)
        assert not path.exists()
        path.write_text(json.dumps(whole))
        refuses(f"gpu.json lacks {key}", read_records, tmp_path)
        path.unlink()


def test_an_unfinished_summary_is_not_recorded(tmp_path):
    shard = summarise(UNITS[:5], complete=False)
    words = "claim 'B1' has no seed with 'boss/score' and 'uniform/score'"
    refuses(words, write_record, tmp_path, shard)


def test_records_made_by_hand_are_refused(tmp_path):
    path = write_record(tmp_path, summarise())
    path.rename(path.with_name("cpu.json"))
    refuses("cpu.json is the record of boss/gpu", read_records, tmp_path)
    path.with_name("cpu.json").unlink()
    for text, words in (("{", "is not JSON"), ("[]", "holds no record")):
        path.write_text(text)
        refuses(f"gpu.json {words}", read_records, tmp_path)
