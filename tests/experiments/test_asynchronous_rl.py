"""Writing apart from training as an experiment: rules, clocks, accounts, refusals."""

import json
import math
import os
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest

from experiments import asynchronous_rl, exploration, grpo
from tmdjax import runtime
from tmdjax.harness import StageResult, load_config
from tmdjax.harness.stages import stage_hashes
from tmdjax.runtime import executors
from tmdjax.runtime.events import Event, EventLog

AREAL, APRIL = "configs/areal.py:cpu", "configs/april.py:cpu"


def rules(spec, arm, *changes):
    given = asynchronous_rl.resolved(load_config(spec, changes), arm)
    return asynchronous_rl.rules_of(given)


def test_arms_are_the_schedules_and_objectives_that_they_are_named_after():
    for arm, eta in (("sync", 0), ("decoupled_8", 8), ("decoupled_inf", math.inf)):
        settings, objective, _, schedule = rules(AREAL, arm)
        assert schedule.eta == eta and schedule.when_full == "continue"
        assert objective.correction == "reject" and "proximal" in objective.needs
        assert (settings.prompts, schedule.updates, schedule.slots) == (16, 60, 128)
    assert rules(AREAL, "naive_4")[1].needs == ()
    assert rules(AREAL, "loglinear_4")[0].proximal == "loglinear"
    assert rules(AREAL, "m2po_4")[1].max_second_moment == 0.04
    for arm, ahead, proximal, correction in (
        ("sync", 16, "recompute", "none"),
        ("april_4n_ignore", 64, "recompute", "none"),
        ("april_2n_ignore", 32, "recompute", "none"),
        ("april_4n_decoupled", 64, "auto", "reject"),
        ("april_4n_truncate", 64, "auto", "truncate"),
    ):
        settings, objective, _, schedule = rules(APRIL, arm)
        assert schedule.most_ahead == ahead and schedule.when_full == "resume"
        assert (settings.proximal, objective.correction) == (proximal, correction)
    settings, _, _, schedule = rules(APRIL, "april_4n_mask")
    assert schedule.on_stale == "mask" and settings.max_lag == schedule.eta == 0
    assert rules(APRIL, "discard_4n")[3].when_full == "discard"
    settings, objective, *_ = rules(APRIL, "april_4n_dapo")
    assert settings.dynamic_sampling and objective.clip_range == (0.2, 0.28)
    assert rules(APRIL, "april_4n_gspo")[1].surrogate == "sequence"
    spec = "configs/april.py:smoke"
    _, objective, _, schedule = rules(spec, "xrpo_fp8_block")
    assert isinstance(objective, runtime.Planner) and not objective.shows_examples
    assert objective.correction == "reject" and schedule.rounds == objective.rounds == 2
    change = "arms.april_4n_ignore.schedule.max_resume=1"
    assert rules(APRIL, "april_4n_ignore", change)[3].max_resume == 1


def test_all_arms_of_both_systems_start_from_one_policy():
    found = {}
    for spec in (AREAL, APRIL):
        config = load_config(spec)
        for arm in config.arms:
            stages = asynchronous_rl.stages(config, arm)
            found[spec, arm] = stage_hashes(stages, 0)
    assert len({hashes["sft"] for hashes in found.values()}) == 1
    assert len({hashes["rl"] for hashes in found.values()}) == len(found) == 20
    # the synchronous iteration is compared with the workers' run, which is made once
    loop, sync = found[AREAL, "loop"], found[AREAL, "sync"]
    assert loop["sync/rl"] == sync["rl"] and {"compare"} <= loop.keys() & sync.keys()
    alone = load_config(AREAL, ["arms=loop"])
    names = [stage.id for stage in asynchronous_rl.stages(alone, "loop")]
    assert names == ["sft", "rl", "judge"] and "C4" not in alone.claims
    # another clock or bound is another run
    for change in ("runtime.costs.learn.tokens=1e-5", "curve.level=0.6"):
        changed = asynchronous_rl.stages(load_config(AREAL, [change]), "sync")
        assert stage_hashes(changed, 0)["rl"] != sync["rl"]
    # what has no workers is as it was
    plain = grpo.stages(load_config("configs/grpo.py:cpu"), "chain_sum")
    assert not plain[1].config.keys() & {*asynchronous_rl.GROUPS, "level"}


def test_updates_end_on_one_clock_over_all_starts(tmp_path):
    def log(number, *events):
        with EventLog(tmp_path / f"events_{number:03d}.jsonl") as write:
            for step, (what, version, end) in enumerate(events):
                write(
                    Event(
                        worker="train",
                        step=step,
                        what=what,
                        begin=end - 0.5,
                        end=end,
                        version=version,
                    )
                )

    ends = lambda updates: asynchronous_rl.update_ends(tmp_path, updates).tolist()  # noqa: E731
    learn = "learn"
    log(0, ("publish", 0, 0.5), (learn, 0, 2.0), (learn, 1, 5.0), (learn, 2, 9.0))
    assert ends(3) == [2, 5, 9]
    # killed after the third update, of which no checkpoint was left
    log(1, ("publish", 2, 0.5), (learn, 2, 3.0), ("save", 3, 3.0))
    assert ends(3) == [2, 5, 5 + 3]
    log(2, ("publish", 3, 0.5))  # killed before it did anything
    log(3)
    log(4, ("publish", 3, 0.5), (learn, 3, 4.0))
    assert ends(4) == [2, 5, 8, 8 + 4]
    # the event of the last update was lost, its weights were not
    assert ends(5) == [2, 5, 8, 12, 12]
    # told to stop, which keeps what was written until then
    log(5, ("publish", 5, 0.5), ("stop", 5, 7.0), ("aborted", 5, 9.0))
    log(6, ("publish", 5, 0.5), (learn, 5, 2.0), (learn, 6, 3.0))
    assert ends(7)[4:] == [12, 12 + 9 + 2, 12 + 9 + 3]
    log(7, ("publish", 5, 0.5), (learn, 5, 1.0), (learn, 6, 4.0))  # after a kill
    assert ends(7)[4:] == [12, 12 + 9 + 1, 12 + 9 + 4]


def test_the_level_is_reached_on_the_smoothed_curve():
    held_out = np.array([0.1, 0.5, 0.3, 0.6, 0.9])  # means: .1 .3 .3 .467 .6
    curves = {"held_out": held_out, "looked_at": np.arange(2, 12, 2)}
    for level, steps in ((0.3, 4), (0.45, 8), (0.6, 10), (0.61, 12)):
        assert exploration.steps_to(curves, level) == steps
    seconds = np.arange(1.0, 11.0) ** 2
    assert exploration.spent_by(4, seconds) == 16
    assert exploration.spent_by(12, seconds) == 100 * 12 / 10


def test_the_account_says_what_trained_and_how_old_it_was(tmp_path):
    with runtime.TrajectoryStore(tmp_path) as store:
        store.submit(range(4), 0)
        for number, spans in enumerate(([(0, 4)], [(0, 3), (1, 3)], [(1, 2)])):
            store.write(number, spans, finished=number < 2)
        for number in (0, 1):
            store.score(number, 1.0)
        store.consume([0], 0)
        store.consume([1], 1)
    found = asynchronous_rl.account_of(tmp_path)
    assert found["off_policy_share"] == 3 / 10 and found["length_trained"] == 5
    assert (found["responses"], found["left_out"], found["tokens"]) == (3, 1, 12)
    assert 0 < found["length_ratio"] <= 1


def test_parameters_are_compared_to_the_bit():
    one = {"a": {"kernel": np.float32([1, 2])}, "b": np.float32([[3]])}
    other = {"a": {"kernel": np.float32([1, 2])}, "b": np.float32([[3.5]])}
    for params, difference in ((one, 0), (other, 0.5)):
        inputs = {"rl": StageResult({"params": one})}
        inputs["sync/rl"] = StageResult({"params": params})
        context = types.SimpleNamespace(inputs=inputs)
        found = asynchronous_rl.compare_parameters("sync/rl", context)
        assert found.metrics == {"parameters_difference": difference}


def test_stale_responses_have_no_first_ratio():
    config = load_config(AREAL)
    workers = asynchronous_rl.measures(config, "decoupled_4")
    loop = asynchronous_rl.measures(config, "loop")
    equal = exploration.EQUAL.keys()
    assert equal <= loop and not equal & workers
    assert asynchronous_rl.APART.keys() | asynchronous_rl.CLOCKED.keys() <= workers
    assert "accuracy_T3_after" in workers & loop
    rows = [{"tokens": 8.0, "tied_group_fraction": 0.0, "responses": 2.0}] * 2
    rows = [row | {"time/steps_per_second": 1.0} for row in rows]
    assert not exploration.course(rows)[1].keys() & exploration.EQUAL.keys()
    rows[1] = rows[1] | {"first_ratio_error": 0.25}
    assert exploration.course(rows)[1]["first_ratio_error"] == 0.25


def test_executors_are_made_by_name_and_with_the_costs_of_the_config():
    given = asynchronous_rl.resolved(load_config(AREAL), "sync")["runtime"]
    clock = asynchronous_rl.executor_of(given)
    assert isinstance(clock, executors.Simulated)
    assert clock.costs.seconds("learn", {"tokens": 1000}) == pytest.approx(0.022)
    made = asynchronous_rl.executor_of(given | {"executor": "threads"})
    assert isinstance(made, executors.Threads)
    assert asynchronous_rl.executor_of(given | {"executor": "none"}) is None


def test_a_run_in_rays_actors_has_the_options_of_the_config(monkeypatch, refused):
    changes = ["runtime.executor=ray", "runtime.ray.address=auto"]
    changes += ["runtime.ray.options.train.num_gpus=2"]
    config = load_config(AREAL, changes)
    given = asynchronous_rl.resolved(config, "sync")["runtime"]
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    actors = asynchronous_rl.executor_of(given)
    assert isinstance(actors, executors.RayActors) and actors.address == "auto"
    assert actors.options_of("train")["num_gpus"] == 2
    generator = actors.options_of("generate/0")
    assert generator["runtime_env"]["env_vars"]["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(
        r"runtime.executor='ray' needs ray: .* pip install 'tmdjax\[ray\]'",
        *(asynchronous_rl.describe, config),
        error=ImportError,
    )


@pytest.mark.slow
def test_actors_leave_what_the_virtual_clock_leaves(tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    found = []
    with tempfile.TemporaryDirectory(prefix="ray_", dir="/tmp") as short:  # for sockets
        own = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        for executor in ("ray", "sim"):
            command = [sys.executable, "-m", "experiments.run", "--config.arms=sync"]
            command += [
                "--config=configs/areal.py:smoke",
                f"--workdir={tmp_path / executor}",
            ]
            command += [f"--config.runtime.executor={executor}"]
            env = os.environ | own | {"RAY_TMPDIR": short}
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            assert done.returncode == 0, done.stderr[-3000:]
            summary = json.loads((tmp_path / executor / "summary.json").read_text())
            found.append(summary["metrics"])
    assert found[0] == found[1] and found[0]["sync/responses"] == 48


def test_bad_inputs(refused):
    for spec, arm, change, words in (
        (AREAL, "sync", "runtime.executor=thread", "mean 'threads'"),
        (AREAL, "decoupled_4", "runtime.executor=none", "lets 80 groups be ahead"),
        (AREAL, "sync", "schedule.name=aprl", "mean 'april'"),
        (AREAL, "decoupled_4", "schedule.on_stale=hold", "on_stale='hold'"),
        (AREAL, "sync", "arms.sync.schedule.eta=0.5", "eta=0.5 .* give an integer"),
        (AREAL, "m2po_4", "rl.proximal=loglinear", "max_second_moment needs"),
        (APRIL, "april_4n_ignore", "rl.proximal=loglinear", "off_policy='ignore'"),
        (APRIL, "sync", "method.name=grpo:decoupled", "would replace"),
    ):

        def build(spec=spec, arm=arm, change=change):
            config = load_config(spec, [change])
            given = asynchronous_rl.resolved(config, arm)
            asynchronous_rl.executor_of(given["runtime"])
            asynchronous_rl.rules_of(given)

        refused(words, build, error=(TypeError, ValueError))
    for change in ("schedule.eta=-1", "runtime.generators=0", "curve.level=1.5"):
        refused("is outside", load_config, AREAL, [change])
