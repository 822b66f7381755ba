"""Claims and their verdicts, against scipy."""

import math

import numpy as np
import pytest
from records import claim, refuses
from scipy import stats

from tmdjax.harness.claims import Claim, claims_of, judge, stated

EXACT = {"statistic": "exact", "direction": "equal"}


REPORT = {"statistic": "report", "direction": None, "threshold": None}


def judged(ours, baseline=None, **changes):
    by_seed = {seed: {"boss/score": x} for seed, x in enumerate(ours)}
    for seed, x in enumerate(baseline or []):
        by_seed[seed]["uniform/score"] = x
    if baseline is None:
        changes["baseline"] = None
    return judge(claim(**changes), by_seed)


def test_claims_of_a_config_have_the_fields_of_a_claim(refused):
    good = {"statement": "a", "statistic": "report", "ours": "x"}
    assert claims_of({}) == claims_of({"claims": None}) == []
    assert claims_of({"claims": {"1": good}}) == [Claim(id="1", **good)]
    for change, words in (
        (
            {"statment": "a"},
            "field='statment' is not one of .*Did you mean 'statement'",
        ),
        ({"ours": None}, "ours is None; give a text"),
        ({"statistic": "difference", "direction": "less", "threshold": "1"}, "is 1; a"),
    ):
        refused(f"claim 'T': .*{words}", claims_of, {"claims": {"T": good | change}})
    for odd in ("we win", {"ours": "x"}):
        refused("claim 'T' is .* a claim has ours, statement, statistic",
                claims_of, {"claims": {"T": odd}})  # fmt: skip


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
    refuses("ours is ' '; give a text", claim, ours=" ")
    refuses("claim '': id is ''; give a text", claim, id="")
    words = "baseline and ours are both 'boss/score'"
    refuses(words, claim, baseline="boss/score")


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


def test_seeds_without_both_metrics_do_not_count():
    ours = {seed: {"boss/score": 1.0 + seed} for seed in (2, 0, 1)}
    assert judge(claim(), ours)["ours"] == []
    assert judge(claim(), ours)["verdict"] == "reported"
    ours[1]["uniform/score"] = 0.5
    found = judge(claim(), ours)
    assert (found["ours"], found["baseline"]) == ([2.0], [0.5])
    refuses("pairing='mixed' is not one of", judge, claim(), ours, pairing="mixed")


def test_claims_are_stated_as_before_they_were_judged():
    claims = [claim(), claim(id="B2", baseline=None, **REPORT), claim(simulated=True)]
    assert stated([judge(c, {}) for c in claims]) == claims
