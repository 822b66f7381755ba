"""What finished smoke runs leave: their steps of ``.ci/run``, which ran each once.

``TMDJAX_SMOKES=<folder of workdirs> pytest -m smoke tests/experiments/test_smokes.py``
"""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tmdjax
from experiments import boss as boss_experiment
from experiments import run
from tmdjax import flows
from tmdjax.core import prng
from tmdjax.data import moving_sprites, text_tasks
from tmdjax.harness import load_config
from tmdjax.harness.experiment import measured
from tmdjax.harness.logs import read_rows
from tmdjax.harness.summaries import numbers
from tmdjax.systems import tmd

pytestmark = pytest.mark.smoke
SYSTEMS = sorted(path.stem for path in pathlib.Path("configs").glob("*.py"))
each_system = pytest.mark.parametrize("system", SYSTEMS)


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture
def found(smoke_of):
    return lambda system: numbers(summary_of(smoke_of(system)))


@each_system
def test_it_measures_what_claims_may_be_about(system, found):
    config = load_config(f"configs/{system}.py:smoke")
    experiment = run.find_experiment(config, f"configs/{system}.py:smoke")
    metrics = found(system)
    assert measured(experiment, config) <= metrics.keys()
    rows = experiment.summary_rows(config, metrics)
    assert len(rows) >= len(experiment.arms(config))
    for name, value in metrics.items():
        if name.endswith("skipped_updates"):
            assert value == 0, name


@each_system
def test_it_leaves_a_report_and_figures(system, smoke_of):
    workdir = smoke_of(system)
    page = (workdir / "report.html").read_text()
    for part in (
        "Results: seed 0 alone",
        "What the measures mean",
        "Training of stage",
    ):
        assert part in page
    figures = [p for p in (workdir / "figures").rglob("*") if p.is_file()]
    assert figures and all(path.stat().st_size > 1000 for path in figures)
    summary = summary_of(workdir)
    command = f"python -m experiments.run --config=configs/{system}.py:smoke"
    assert summary["command"] == command
    assert {c["verdict"] for c in summary["claims"]} <= {"exact", "reported"}


@each_system
def test_the_same_command_takes_it_up_again(system, smoke_of, capsys):
    before = summary_of(smoke_of(system))["metrics"]
    spec = f"--config=configs/{system}.py:smoke"
    assert run.main([spec, f"--workdir={smoke_of(system)}"]) == 0
    assert "cached" in capsys.readouterr().out
    assert summary_of(smoke_of(system))["metrics"] == before
    # of the clock, which stand under timings; time16 is of a simulation
    assert not [name for name in before if re.search(r"second|time(?!\d)", name)]


def test_flow_matching_has_begun_to_learn(smoke_of, found):
    metrics, distance = found("flow_matching"), "sliced_wasserstein"
    assert metrics[f"euler4.{distance}"] < metrics[f"untrained.{distance}"]
    assert metrics[f"real.{distance}"] < metrics[f"euler4.{distance}"]
    workdir = smoke_of("flow_matching")
    rows = read_rows(workdir / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"features", "train"}
    assert summary_of(workdir)["labels"]["frechet"].startswith("FD-sprites@")


def test_flow_matching_draws_its_figures_again(smoke_of, capsys):
    workdir = smoke_of("flow_matching")
    (workdir / "figures" / "samples.png").unlink()
    command = ["--config=configs/flow_matching.py:smoke", f"--workdir={workdir}"]
    assert run.main([*command, "--stage=sample"]) == 0
    assert (workdir / "figures" / "samples.png").exists()
    assert "samples.png" in capsys.readouterr().out


def test_flow_matching_loads_and_samples(smoke_of):
    apply_fn, params, meta = tmdjax.load(smoke_of("flow_matching"))
    assert meta["config"]["system"] == "flow_matching"
    noise = jax.random.normal(jax.random.key(0), (4, *meta["config"]["data"]["shape"]))
    velocity = functools.partial(apply_fn, params)
    x = flows.endpoints(velocity, noise, flows.uniform_grid(2), jnp.arange(4))
    assert x.shape == noise.shape and np.isfinite(x).all()


def test_boss_measures_every_row(found):
    metrics = found("boss")
    for name in boss_experiment.SETS:
        for k in (2, 4):
            for what in ("terminal_error", "frechet", "sliced_wasserstein"):
                assert np.isfinite(metrics[f"{name}{k}.{what}"]), name
    assert metrics["search.uniform_cheaper"] == 0  # O1
    assert metrics["rk45.terminal_error"] < metrics["uniform4.terminal_error"] / 10
    assert metrics["rk45.nfe"] > 20
    for k in (2, 4):
        error, other = (
            metrics[f"{name}{k}.terminal_error"] for name in ("straightened", "bellman")
        )
        assert error < other
        loss = metrics[f"straightened{k}.loss"]
        assert loss < metrics[f"straightened{k}.loss_before"]
        assert metrics[f"bellman{k}.spread_objective"] >= 1 - 1e-6
    # the teacher's chord error is its objective, measured in another way
    objective = pytest.approx(metrics["bellman4.objective"], rel=1e-3)
    assert metrics["bellman4.chord_error"] == objective
    assert metrics["straightened4.chord_error_ratio"] < 1


def test_boss_has_the_rows_asked_for(found):
    config = load_config("configs/boss.py:smoke")
    rows = boss_experiment.summary_rows(config, found("boss"))
    names = [row["grid or model"] for row in rows]
    assert names[:5] == list(boss_experiment.SHOWN)
    assert names[5].startswith("RK45, ") and names[7] == "real against real"
    assert all(" / " in rows[i][f"NFE {k}"] for i in range(5) for k in (2, 4))


@pytest.mark.parametrize("system", ["branchgrpo", "flow_grpo"])
def test_reward_of_every_alignment_rises(system, found):
    metrics = found(system)
    for name, value in metrics.items():  # a time may not have been reached
        assert name.endswith("reward_at_time") or np.isfinite(value), name
    for arm in load_config(f"configs/{system}.py:smoke").arms:
        assert metrics[f"{arm}/first_ratio_error"] <= 1e-6
        assert metrics[f"{arm}/reward_gain"] > 0
        assert metrics[f"{arm}/gain.held_out.score"] > 0


def test_network_calls_are_counted(found):
    metrics = found("branchgrpo")
    assert metrics["branch/network_calls_per_sample"] == 4.625
    assert metrics["dance/network_calls_per_sample"] == 8


def test_arms_of_xrpo_write_as_much_and_are_looked_at_alike(smoke_of, found):
    metrics = found("xrpo")
    assert metrics["xrpo/responses"] == metrics["grpo/responses"] == 3 * 4 * 8
    assert 0 == metrics["grpo/allocation_share"] < metrics["xrpo/allocation_share"] < 1
    assert not [name for name in metrics if name.count("/") > 1]
    rows = read_rows(smoke_of("xrpo") / "metrics.jsonl")
    for arm in ("grpo", "xrpo"):
        looks = [row for row in rows if row["arm"] == arm and "held_out" in row]
        assert [row["step"] for row in looks] == [1, 2, 3]
        assert 1 <= metrics[f"{arm}/steps_to_level"] <= 4
        assert 0 < metrics[f"{arm}/tokens_to_level"] <= 4 / 3 * metrics[f"{arm}/tokens"]


def test_grpo_loads(smoke_of, found):
    assert found("grpo")["chain_sum/first_ratio_error"] < 1e-3
    apply_fn, params, _ = tmdjax.load(smoke_of("grpo"), arm="chain_sum")
    logits = apply_fn(params, jnp.zeros((2, 3), jnp.int32))
    assert logits.shape == (2, 3, 1 + len(text_tasks.vocabulary.CHARACTERS))


def test_control_learns_and_loads(smoke_of, found):
    metrics = found("policyflow")
    for arm in load_config("configs/policyflow.py:smoke").arms:
        assert 0 <= metrics[f"{arm}/goal_entropy"] <= 1
    assert metrics["ppo/reward_last"] > metrics["ppo/reward_first"]
    assert metrics["policyflow/first_ratio_error"] == 0
    # a few units in the last place of log-probs near 3, by the processor
    assert metrics["ppo/first_ratio_error"] < 3e-6
    apply_fn, params, meta = tmdjax.load(smoke_of("policyflow"), arm="policyflow")
    v = apply_fn(params, jnp.zeros((3, 2)), jnp.ones(3), jnp.zeros((3, 4)))
    assert v.shape == (3, 2) and np.isfinite(v).all()
    assert meta["steps"] == 10 and len(meta["log_std"]) == 2


def test_clones_are_fine_tuned_and_load(smoke_of, found):
    metrics = found("reinflow")
    for arm, solver in (("maze_reinflow4", "euler"), ("maze_dppo", "ancestral")):
        assert metrics[f"{arm}/first_ratio_error"] < 1e-5
        assert metrics[f"{arm}/reward_last"] > metrics[f"{arm}/reward_first"]
        apply_fn, params, meta = tmdjax.load(smoke_of("reinflow"), arm=arm)
        x = jnp.zeros((3, 2 * meta["chunk"]))
        v = apply_fn(params, x, jnp.ones(3), jnp.zeros((3, 6)))
        assert v.shape == x.shape and np.isfinite(v).all()
        assert meta["solver"] == solver
    same = "maze_bc/cloning_loss", "maze_reinflow4/cloning_loss"
    assert len({metrics[name] for name in same}) == 1


def test_tmd_measures_teacher_and_student(found):
    metrics = found("tmd")
    # the exact teacher is right, in steps enough
    assert metrics["teacher/adherence"] == 1 > metrics["teacher/steps2.adherence"]
    assert metrics["teacher/real.adherence"] == 1
    assert metrics["teacher/real.frechet"] < metrics["tmd/frechet"]
    assert metrics["tmd/nfe"] == pytest.approx(2 * (1 + 1 / 2))  # M (1 + (N-1) H/L)
    assert metrics["tmd/inner1.nfe"] == 2
    # C7: what NFE leaves out here is a fusion a head, and two embeddings
    assert 1 < metrics["tmd/cost_over_nfe"] < 1.35


def test_world_models_are_judged_on_the_same_videos(smoke_of, found):
    metrics = found("flow_equivariant")
    for name in ("zero", "mean", "shifted"):
        for what in (f"{name}.mean_late", f"{name}.unseen"):
            assert metrics[f"full/{what}"] == metrics[f"rssm/{what}"] > 0
    for arm in load_config("configs/flow_equivariant.py:smoke").arms:
        assert metrics[f"{arm}/failed"] == 0 < metrics[f"{arm}/growth"] < 3
        assert metrics[f"{arm}/largest_state"] <= 5
    assert (smoke_of("flow_equivariant") / "figures/full/rollouts.gif").exists()
    apply_fn, params, _ = tmdjax.load(smoke_of("flow_equivariant"), arm="full")
    frame = apply_fn(params, jnp.zeros((2, 8, 8, 1)), jnp.zeros((2, 2), jnp.int32))
    assert frame.shape == (2, 8, 8, 1)


def test_a_tmd_student_loads_with_its_plan(smoke_of, refused):
    apply_fn, params, meta = tmdjax.load(smoke_of("tmd"), arm="tmd")
    scale = moving_sprites.get_scale(meta["scale"])
    text = moving_sprites.text_embedding(jnp.arange(3), scale)
    keys = prng.sample_keys(jax.random.key(0), 3)
    noise = prng.normal(keys, scale.event_shape)
    given = (apply_fn, params, noise, text, keys)
    draw = functools.partial(tmd.sample, *given, trained_plan=meta["plan"])
    assert draw(plan=tmd.StudentPlan.from_dict(meta["plan"])).shape == noise.shape
    words = r"samples another plan than its own.*outer"
    refused(words, draw, plan=tmd.make_plan(4, 2, 1, 2))


def test_workers_at_eta_0_are_the_synchronous_iteration(smoke_of, found):
    metrics, losses = found("areal"), {}
    rows = read_rows(smoke_of("areal") / "metrics.jsonl")
    for arm in ("loop", "sync"):
        assert metrics[f"{arm}/parameters_difference"] == 0
        own = [row for row in rows if row["arm"] == arm and row["stage"] == "rl"]
        losses[arm] = [row["loss"] for row in own]
    assert losses["loop"] == losses["sync"] and min(losses["sync"]) > 0.01
    assert metrics["loop/accuracy_after"] == metrics["sync/accuracy_after"]
    assert metrics["sync/staleness_max"] == metrics["sync/off_policy_share"] == 0
    assert metrics["sync/responses"] == 3 * 4 * 4 and metrics["sync/left_out"] == 0
    assert 0 < metrics["naive_4/staleness_max"] <= 4
    assert 0 < metrics["naive_4/clock_seconds"] < metrics["sync/clock_seconds"]


def test_unfinished_responses_go_on_under_xrpo_and_8_bits_too(smoke_of, found):
    metrics = found("april")
    for arm in load_config("configs/april.py:smoke").arms:
        assert 0 < metrics[f"{arm}/off_policy_share"] < 1
        assert metrics[f"{arm}/left_out"] > 0 < metrics[f"{arm}/length_ratio"]
    rows = read_rows(smoke_of("april") / "metrics.jsonl")
    moved = [r["quantised_moved"] for r in rows if r.get("quantised_moved") is not None]
    assert len(moved) == 3 and min(moved) > 0  # of the arm in 8 bits


def test_jet_rl_agrees_with_itself(found):
    metrics = found("jet_rl")
    for when in ("plain", "stress"):
        own, apart = (
            metrics[f"{arm}/mismatch_kl_{when}"]
            for arm in ("calibrated", "fp8_rollout")
        )
        assert 0 <= 100 * own < apart
        assert metrics[f"calibrated/mismatch_clipped_{when}"] == 0
