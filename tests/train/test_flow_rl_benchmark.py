"""The parts of benchmarks/flow_rl.py, at a size where nothing is worth timing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from benchmarks import flow_rl as benchmark
from tmdjax import flows
from tmdjax.core import prng
from tmdjax.harness import load_config

pytestmark = pytest.mark.nightly

TINY = (
    "model.hidden=8", "model.depth=1", "model.heads=2", "task.size=4", "rl.prompts=2",
    "rollout.steps=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def problem():
    config = load_config("configs/flow_grpo.py:cpu", TINY)
    return benchmark.make_problem(config, group_size=2, remat=False)


@pytest.fixture(scope="module")
def setup(problem):
    """All stored steps train, so that nothing in an update is drawn."""
    found = benchmark.dance_grpo(problem)
    return found._replace(method=dataclasses.replace(found.method, fraction=1.0))


@pytest.fixture(scope="module")
def ours(problem, setup):
    return benchmark.Ours(problem, setup)


@pytest.fixture(scope="module")
def one(problem, setup):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "dance_grpo", lambda problem: setup)
        return benchmark.OneAtATime(problem)


def test_one_at_a_time_walks_the_chains_of_a_batched_rollout(problem, one):
    keys = prng.sample_keys(jax.random.key(5), 4)
    start = prng.normal(keys, problem.event_shape)
    drawn = one.rollout(keys, start)
    cond = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), problem.batch)
    velocity = benchmark._velocity(problem)(problem.params)
    batched = flows.rollout(keys, velocity, start, one.method.plan(0)[0], cond)
    states = np.stack([np.concatenate(states) for states, _ in drawn], 1)
    log_prob = np.stack([np.concatenate(each) for _, each in drawn], 1)
    assert_allclose(states, batched.states, atol=1e-5)
    assert_allclose(log_prob, batched.log_prob, atol=1e-5)
    # by itself it starts a group from the same noise
    starts = np.concatenate([states[0] for states, _ in one.rollout()])
    assert_array_equal(starts[::2], starts[1::2])
    assert (starts[0] != starts[2]).all()


def test_one_at_a_time_accumulates_the_gradient_of_the_batched_update(ours, one):
    (_, record), rewards = ours.rollout(), np.asarray([0.0, 1.0, 3.0, -2.0], np.float32)
    ours.rewards = rewards
    _, metrics = ours.iteration.programs["update"](*ours.learn_arguments(record))
    states = record.states.reshape(4, 1, -1, *record.states.shape[1:])
    log_prob = record.log_prob.reshape(4, -1, 1)
    drawn = [
        ([states[i, :, n] for n in range(states.shape[2])], list(log_prob[i]))
        for i in range(4)
    ]
    one.params = jax.tree.map(jnp.copy, ours.state.params)
    (norm,) = one.update(drawn, rewards)
    assert float(norm) > 1e-6
    assert_allclose(norm, metrics["grad_norm"], rtol=1e-4)


def test_a_ratio_is_paired_in_each_repeat_and_the_first_run_does_not_count():
    calls = []

    def contender(name, seconds):
        values = iter(seconds)

        def run():
            calls.append(name)
            return {"whole": next(values)}

        return run

    both = {"ours": contender("a", [9, 1, 2, 6]), "rival": contender("b", [9, 2, 2, 2])}
    found = benchmark.in_turn(both, 3)
    (row,) = benchmark.compare("x", found["ours"], found["rival"], {"whole": 1.5})
    assert (row["ours"], row["rival"], row["ratio"]) == (2, 2, 1.0)
    assert row["quartiles"] == [0.75, 2.0]
    assert row["goal"] == 1.5
    assert calls[:2] == ["a", "b"] and sorted(calls[2:]) == ["a"] * 3 + ["b"] * 3


def test_chains_store_and_train_what_their_settings_say(problem, setup, ours):
    assert benchmark.trained_steps(setup.method) == (2, 2)
    config = load_config("configs/flow_grpo.py:cpu", [*TINY, "rollout.steps=11"])
    method, _, _ = benchmark.dance_grpo(dataclasses.replace(problem, config=config))
    assert benchmark.trained_steps(method) == (10, 6)  # 0.6 of them, as published
    stored, collect, learn = benchmark.memory_rows({"dance": ours})
    image = 4 * 4 * 4 * 3
    assert stored["ours"] == 3 * image  # of 3 steps the last has no log-prob
    assert stored["rival"] == 4 * image
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(ours.state.params))
    assert collect["ours"] > parameters
    assert learn["ours"] > 3 * parameters  # Adam's moments


def test_the_program_prints_a_table_and_writes_json(
    problem, ours, monkeypatch, tmp_path, capsys
):
    path, made = tmp_path / "found.json", []
    make = lambda *given: made.append(given) or problem  # noqa: E731
    monkeypatch.setattr(benchmark, "make_problem", make)
    monkeypatch.setattr(benchmark, "Ours", lambda problem, setup: ours)
    flags = ["--hidden=12", "--group=3", "--no-remat", "--parts", "rollout"]
    benchmark.main([*flags, "--repeats=1", f"--json={path}"])
    ((config, group_size, remat),) = made
    assert (config.model.hidden, group_size, remat) == (12, 3, False)
    found = json.loads(path.read_text())
    assert found["overrides"] == ["model.hidden=12"]
    (row,) = found["rows"]
    assert row["goal"] == 1.03 and row["ratio"] > 0
    assert found["first_ratio_error"] < 1e-4
    assert "log-probs and record / ODE: rollout" in capsys.readouterr().out


def test_torch_computes_the_same_or_is_refused(problem, monkeypatch):
    rival = pytest.importorskip("benchmarks.torch_dance_grpo", reason="needs PyTorch")
    wide = dataclasses.replace(problem, event_shape=(4, 8, 3))
    found = benchmark.check_torch(wide)
    parts = {"velocity", "states", "samples", "log_prob", "gradient_norm"}
    assert set(found) == parts and max(found.values()) < 1e-4
    convert = rival.convert

    def other(params):
        found = convert(params)
        return found | {"null_token": found["null_token"] + 0.1}

    monkeypatch.setattr(rival, "convert", other)
    with pytest.raises(AssertionError, match="differs from ours by"):
        benchmark.check_torch(problem)


def test_torch_learns_and_refuses_other_methods(problem):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rival = benchmark.make_torch(problem, compiled=False)
    before = rival.network.patch_embedding.weight.clone()
    samples, *record = rival.rollout()
    assert samples.shape == (4, 4, 4, 3) and record[1].shape == (4, 2)
    rival.update(*record, rival.reward(samples))
    assert torch.isfinite(rival.network.patch_embedding.weight).all()
    assert not torch.equal(before, rival.network.patch_embedding.weight)
    method = dataclasses.replace(rival.method, scale="batch")
    from benchmarks import torch_dance_grpo

    with pytest.raises(ValueError, match="only DanceGRPO"):
        torch_dance_grpo.Rival(
            problem.network, problem.params, method, None, method.plan(0)[0], 2, 2,
            problem.batch, updates=1, microbatches=1, learning_rate=1e-3,
            weight_decay=0.0, clip_norm=1.0, compiled=False,
        )  # fmt: skip


def test_torch_runs_eagerly_where_it_does_not_compile(problem, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    make = benchmark.make_torch

    def without_compiler(problem, compiled):
        if compiled:
            raise RuntimeError("no working C++ compiler\nand more")
        return make(problem, compiled)

    monkeypatch.setattr(benchmark, "make_torch", without_compiler)
    rival = benchmark.Torch(problem)
    assert rival.name.endswith(", eager (RuntimeError: no working C++ compiler)")
    assert set(rival()) == {"rollout", "update", "whole"}
