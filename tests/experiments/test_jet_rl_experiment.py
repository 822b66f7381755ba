"""Arms of precision as an experiment: what they share, what is compared, refusals."""

import types

import jax
import numpy as np
import pytest
from checks import same

from experiments import grpo, language_iteration, mismatch
from experiments import language_tasks as tasks
from tmdjax.harness import load_config
from tmdjax.systems import jet_rl

SMOKE = "configs/jet_rl.py:smoke"


def test_arms_start_from_one_policy_and_share_what_is_alike():
    config = load_config("configs/jet_rl.py:cpu")
    stages = {
        arm: {stage.name: stage.config for stage in grpo.stages(config, arm)}
        for arm in config.arms
    }
    assert len({repr(found["sft"]) for found in stages.values()}) == 1
    compared = {arm: repr(found["mismatch"]) for arm, found in stages.items()}
    assert compared["fp8_rollout"] == compared["truncated"]
    assert compared["unified"] == compared["calibrated"]
    assert len(set(compared.values())) == 6
    trained = {arm: found["rl"] for arm, found in stages.items() if "rl" in found}
    assert len({repr(found) for found in trained.values()}) == len(trained) == 5
    given = grpo.resolved(config, "calibrated")
    objective = language_iteration.settings_of(given)[1]
    assert objective == jet_rl.preset("calibrated", calibrate_every=5)
    assert mismatch.MISMATCH.keys() <= grpo.measures(config, "bf16")
    assert mismatch.CALIBRATED.keys() <= grpo.measures(config, "calibrated")
    assert not mismatch.CALIBRATED.keys() & grpo.measures(config, "unified")
    # arms that are not trained have what is compared, and claims what is measured
    for arm in config.arms.keys() - trained.keys():
        assert stages[arm].keys() == {"sft", "mismatch"}
        assert grpo.measures(config, arm) == mismatch.measured(given)
    measured = {f"{arm}/{x}" for arm in config.arms for x in grpo.measures(config, arm)}
    for claim in config.claims.values():
        assert {claim.ours, claim.get("baseline", claim.ours)} <= measured
    alone = load_config("configs/jet_rl.py:cpu", ["rl.iterations=0"])
    assert [stage.name for stage in grpo.stages(alone, "bf16")] == ["sft", "mismatch"]
    assert mismatch.calibrated(np.float32([0.25, 0.5])) == {
        "clip_low": 0.25,
        "clip_high": 0.5,
    }
    assert mismatch.calibrated(None) == {}
    # without stress there is one condition, and other configs have none at all
    plain = load_config(SMOKE, ["stress.channels=0"])
    assert "mismatch_kl_stress" not in grpo.measures(plain, "calibrated")
    other = load_config("configs/grpo.py:smoke")
    assert not mismatch.MISMATCH.keys() & grpo.measures(other, "chain_sum")


def test_what_is_compared_is_what_is_defined():
    rng = np.random.default_rng(0)
    lengths = np.array([3, 9, 6, 12])
    mask = np.arange(12) < lengths[:, None]
    rollout = np.float32(rng.normal(-2, 0.5, mask.shape))
    train = rollout + np.float32(rng.normal(0, 0.1, mask.shape))
    ours, theirs = (np.where(mask, x, np.nan) for x in (train, rollout))
    found = mismatch.summarise(ours, theirs, mask, (0.1, 0.15))
    d = [np.float64(a - b)[m] for a, b, m in zip(train, rollout, mask)]
    every = np.concatenate(d)
    expected = {
        "mismatch_kl": np.mean(np.exp(every) - 1 - every),
        "mismatch_mean": np.mean(abs(every)),
        "mismatch_max": np.max(abs(every)),
        "mismatch_growth": np.mean(abs(np.concatenate([x[-len(x) // 3 :] for x in d])))
        / np.mean(abs(np.concatenate([x[: len(x) // 3] for x in d]))),
        "mismatch_clipped": np.mean((np.exp(every) < 0.9) | (np.exp(every) > 1.15)),
        "mismatch_length": np.corrcoef([abs(x.sum()) for x in d], lengths)[0, 1],
        "mismatch_effective": np.exp(every).sum() ** 2
        / (len(every) * np.exp(2 * every).sum()),
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert found.keys() == mismatch.MEASURED.keys()
    assert 0 < found["mismatch_clipped"] < 1
    lost = np.where(mask & (np.arange(12) == 2), np.nan, train)  # a token of each
    told = mismatch.summarise(lost, theirs, mask, (0.1, 0.15))["mismatch_clipped"]
    inside = (np.exp(every) >= 0.9) & (np.exp(every) <= 1.15)
    at = np.concatenate([np.arange(n) for n in lengths])
    assert told == pytest.approx(1 - np.mean(inside & (at != 2)))
    alike = mismatch.summarise(theirs, theirs, mask, 0.2)
    nothing = dict.fromkeys(mismatch.MEASURED, 0.0)
    assert alike == nothing | {"mismatch_growth": 1.0, "mismatch_effective": 1.0}


def test_the_start_is_under_stress_where_the_config_says_so():
    given = grpo.resolved(load_config(SMOKE), "calibrated")
    context = types.SimpleNamespace(key=jax.random.key(0), inputs={})
    language = tasks.language(given)
    plain = language.parameters(context.key)
    start = language_iteration.start_of(given, context)
    same(start, jet_rl.outlier_channels(plain, language.config, 1, 32.0))
    none = given | {"stress": {"channels": 0, "factor": 32.0}}
    same(language_iteration.start_of(none, context), plain)


def test_bad_inputs(refused):
    for changes, words in (
        (["rl.minibatches=1"], "calibrate_every=1 with one update an iteration"),
        (["sft.recipe=fp23"], "sft.recipe='fp23' is not one of 'bf16', .*mean 'fp32'"),
        (["stress.factor=1e9"], "stress.factor=1000000000.0 is outside"),
    ):
        refused(words, lambda given=changes: grpo.describe(load_config(SMOKE, given)))
