"""Stages and the runner, on a tiny experiment that trains in milliseconds."""

import functools
import json
import os
import pathlib
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from tmdjax import harness, train
from tmdjax.harness import ledger
from tmdjax.harness import stages as stages_module
from tmdjax.harness.environment import InUse, locked
from tmdjax.harness.logs import read_rows, without_timings

RULE = optax.sgd(0.1)


class Draws:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        rng = np.random.default_rng(self.position)
        return rng.normal(size=(4, 2)).astype(np.float32)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def loss(params, batch, keys):
    return jnp.square(batch @ params["w"] - batch.sum(1)), {}


STEP = jax.jit(train.make_train_step(loss, RULE))


def make_config(steps=15, offset=1.0):
    return ConfigDict(
        {
            "system": "tiny",
            "train": {"steps": steps, "log_every": 5},
            "score": {"offset": offset},
            "claims": {
                "T1": {
                    "statement": "training approaches the answer",
                    "published": "",
                    "statistic": "difference",
                    "direction": "less",
                    "threshold": 10.0,
                    "ours": "error",
                    "baseline": None,
                }
            },
        }
    )


def make_experiment(calls=None, arms=("main",), interrupt=None):
    """An experiment whose stage calls are listed; `interrupt(step)` may raise."""
    calls = [] if calls is None else calls

    def fit(config, context):
        calls.append(("fit", context.seed))
        data = Draws()
        step_fn = STEP
        if interrupt is not None:

            def step_fn(state, batch, key):
                interrupt(int(state.step))
                return STEP(state, batch, key)

        params = {"w": jax.random.normal(context.key, (2,))}
        state = context.fit(
            train.create_state(params, RULE),
            step_fn,
            data,
            num_steps=config.train.steps,
            log_every=config.train.log_every,
            checkpoint_seconds=(0.0, 0.0),
        )
        spec = {"name": "mlp", "hidden": 4, "depth": 1}
        return harness.StageResult(
            {"params": state.params}, {"w0": state.params["w"][0]}, spec
        )

    def score(config, context):
        calls.append(("score", context.seed))
        w = context.inputs["fit"].outputs["params"]["w"]
        error = float(np.abs(w - 1).sum()) + config.score.offset
        return harness.StageResult({}, {"error": error}, labels={"net": "n1"})

    def stages(config, arm):
        plain = config.to_dict()
        return [
            harness.Stage(
                name="fit",
                run=functools.partial(fit, config),
                config={"train": plain["train"], "arm": arm},
            ),
            harness.Stage(
                name="score",
                run=functools.partial(score, config),
                config=plain["score"],
                parents=("fit",),
            ),
        ]

    def report(config, results, folder):
        rows = [{"stage": name} for name in results]
        return harness.Report([("stages", rows)], [])

    return types.SimpleNamespace(
        stages=stages,
        report=report,
        describe=lambda config: {"parameters": 2},
        arms=lambda config: arms,
    )


def nothing(context):
    return harness.StageResult()


def options(tmp_path, **changes):
    given = {
        "command": "python -m experiments.run --config=configs/tiny.py:smoke",
        "tier": "smoke",
        "workdir": tmp_path / "run",
        "results": tmp_path / "results",
    }
    return harness.Options(**(given | changes))


def files(workdir):
    return {p.name for p in workdir.iterdir()}


def test_a_run_leaves_its_records(tmp_path, capsys):
    outcome = harness.run(make_experiment(), make_config(), options(tmp_path))
    assert outcome.code == 0
    run = tmp_path / "run"
    assert {
        "config.json",
        "environment.json",
        "summary.json",
        "metrics.jsonl",
        "metrics.csv",
        "report.html",
    } <= files(run)
    summary = json.loads((run / "summary.json").read_text())
    for key in (
        "system tier metrics device wall_s peak_memory_gb seeds command commit claims"
    ).split():
        assert key in summary
    assert summary["claims"][0]["verdict"] == "reported"  # one seed gives no verdict
    assert summary["labels"] == {"net": "n1"}
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert "T1" in (run / "report.html").read_text()
    assert "T1" in capsys.readouterr().out


def test_stages_are_cached_by_what_they_depend_on(tmp_path):
    calls = []
    experiment = make_experiment(calls)
    harness.run(experiment, make_config(), options(tmp_path))
    harness.run(experiment, make_config(), options(tmp_path))
    assert calls == [("fit", 0), ("score", 0)]
    other = options(tmp_path, workdir=tmp_path / "other")
    harness.run(experiment, make_config(offset=2.0), other)
    assert calls[2:] == [("score", 0)]  # the trained stage is shared
    harness.run(experiment, make_config(), options(tmp_path, fresh=True))
    assert calls[3:] == [("fit", 0), ("score", 0)]


def test_hashes_follow_config_seed_version_and_parents():
    def make(config=1, version=1, seeded=True):
        parent = harness.Stage(
            name="a", run=nothing, config={"x": config}, version=version, seeded=seeded
        )
        child = harness.Stage(name="b", run=nothing, config={}, parents=("a",))
        return [parent, child]

    def hashes(seed=0, **options):
        return stages_module.stage_hashes(make(**options), seed)

    base = hashes()
    for changed in (hashes(config=2), hashes(version=2), hashes(seed=1)):
        assert changed["a"] != base["a"] and changed["b"] != base["b"]
    assert hashes() == base
    assert hashes(seed=1, seeded=False)["a"] == hashes(seed=2, seeded=False)["a"]


def test_killed_and_run_again_equals_uninterrupted(tmp_path):
    class Killed(BaseException):
        pass

    def kill(at, step):
        if step == at:
            raise Killed

    def rows(name):
        return without_timings(read_rows(tmp_path / name / "run" / "metrics.jsonl"))

    whole = harness.run(make_experiment(), make_config(), options(tmp_path / "whole"))
    for at in (3, 11, 14):  # before the first checkpoint, after one, at the end
        folder = tmp_path / str(at)
        killed = make_experiment(interrupt=functools.partial(kill, at))
        with pytest.raises(Killed):
            harness.run(killed, make_config(), options(folder))
        again = harness.run(make_experiment(), make_config(), options(folder))
        assert again.summary["metrics"] == whole.summary["metrics"]
        assert rows(str(at)) == rows("whole")


def test_max_seconds_pauses_and_the_command_goes_on(tmp_path, capsys):
    whole = harness.run(make_experiment(), make_config(), options(tmp_path / "a"))
    paused = harness.run(
        make_experiment(), make_config(), options(tmp_path / "b", max_seconds=0.0)
    )
    assert paused.code == 0 and paused.summary is None
    assert "paused" in capsys.readouterr().out
    done = harness.run(make_experiment(), make_config(), options(tmp_path / "b"))
    assert done.summary["metrics"] == whole.summary["metrics"]


def test_sigterm_checkpoints(tmp_path):
    def terminate(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome = harness.run(
        make_experiment(interrupt=terminate), make_config(), options(tmp_path)
    )
    assert outcome.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    saved = (tmp_path / "stages").glob("fit-*/checkpoints/step_*")
    assert max(saved).name == "step_0000000010"


def test_changed_config_is_refused_with_the_difference(tmp_path):
    harness.run(make_experiment(), make_config(), options(tmp_path))
    with pytest.raises(harness.ConfigError, match=r"score.offset: 1.0 -> 3.0.*--fresh"):
        harness.run(make_experiment(), make_config(offset=3.0), options(tmp_path))
    with pytest.raises(harness.ConfigError, match="tier: smoke -> cpu"):
        harness.run(make_experiment(), make_config(), options(tmp_path, tier="cpu"))
    fresh = options(tmp_path, fresh=True)
    assert harness.run(make_experiment(), make_config(offset=3.0), fresh).code == 0


def test_seeds_and_shards(tmp_path):
    calls = []
    experiment = make_experiment(calls)
    seeds = tuple(range(5))
    whole = harness.run(experiment, make_config(), options(tmp_path, seeds=seeds))
    assert whole.summary["claims"][0]["verdict"] == "reproduced"
    assert whole.summary["seeds"] == [0, 1, 2, 3, 4]
    w0 = {u["seed"]: u["metrics"]["w0"] for u in whole.summary["units"]}
    assert len(set(w0.values())) == 5
    shards = [
        harness.run(
            experiment,
            make_config(),
            options(
                tmp_path,
                workdir=tmp_path / f"s{i}",
                cache=tmp_path / f"c{i}",
                seeds=seeds,
                shard=(i, 2),
            ),
        ).summary
        for i in range(2)
    ]
    assert [s["seeds"] for s in shards] == [[0, 2, 4], [1, 3]]
    merged = ledger.merge(shards)
    assert merged["metrics"] == whole.summary["metrics"]
    assert merged["claims"][0]["verdict"] == "reproduced"


def test_one_stage(tmp_path):
    calls = []
    outcome = harness.run(
        make_experiment(calls), make_config(), options(tmp_path, stage="fit")
    )
    assert calls == [("fit", 0)] and outcome.summary is None
    with pytest.raises(ValueError, match=r"no stage 'sample'; stages: fit, score"):
        harness.run(make_experiment(), make_config(), options(tmp_path, stage="sample"))


def test_record_and_render(tmp_path):
    harness.run(
        make_experiment(),
        make_config(),
        options(tmp_path, seeds=(0, 1, 2), record=True),
    )
    record = json.loads((tmp_path / "results" / "tiny" / "smoke.json").read_text())
    assert record["claims"][0]["verdict"] == "pilot"
    text = (tmp_path / "RESULTS.md").read_text()
    assert "training approaches the answer" in text
    assert "1 pilot" in text and "`results/tiny/smoke.json`" in text


def test_a_model_loads_from_the_workdir(tmp_path):
    harness.run(make_experiment(), make_config(), options(tmp_path, seeds=(1, 2)))
    _, params, meta = harness.load(tmp_path / "run")
    assert meta["seed"] == 1 and meta["config"]["system"] == "tiny"
    w0 = json.loads((tmp_path / "run" / "units" / "main-seed1.json").read_text())
    assert float(params["w"][0]) == w0["unit"]["metrics"]["w0"]
    _, _, meta = harness.load(tmp_path / "run", seed=2)
    assert meta["seed"] == 2
    with pytest.raises(
        FileNotFoundError, match="seed 7; it holds: main-seed1, main-seed2"
    ):
        harness.load(tmp_path / "run", seed=7)
    with pytest.raises(FileNotFoundError, match=r"holds: none.*Finish the run"):
        harness.load(tmp_path / "absent")


def test_damaged_result_is_made_again(tmp_path, caplog):
    calls = []
    experiment = make_experiment(calls)
    first = harness.run(experiment, make_config(), options(tmp_path))
    largest = max(
        (p for p in (tmp_path / "stages").glob("fit-*/result/**/d/*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(bytes(data))
    again = harness.run(experiment, make_config(), options(tmp_path))
    assert "damaged" in caplog.text
    assert calls == [("fit", 0), ("score", 0), ("fit", 0)]
    assert again.summary["metrics"] == first.summary["metrics"]


def test_two_runs_of_one_workdir(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(RuntimeError, match="in use by another run"),
    ):
        harness.run(make_experiment(), make_config(), options(tmp_path))


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*give another --workdir"):
        harness.run(
            make_experiment(),
            make_config(),
            options(tmp_path, workdir=tmp_path / "file"),
        )


def test_arms_are_units_and_ablations_run_under_one_seed(tmp_path):
    calls = []
    config = make_config()
    config.one_seed_arms = ("other",)
    experiment = make_experiment(calls, arms=("main", "other"))
    outcome = harness.run(experiment, config, options(tmp_path, seeds=(3, 4)))
    units = {(unit["arm"], unit["seed"]) for unit in outcome.summary["units"]}
    assert units == {("main", 3), ("main", 4), ("other", 3)}
    assert set(outcome.summary["metrics"]) == {"error", "w0", "other/error", "other/w0"}
    config.one_seed_arms = ("othr",)
    with pytest.raises(ValueError, match="Did you mean 'other'"):
        harness.run(experiment, config, options(tmp_path, fresh=True))


def test_bad_shards_and_stage_lists(tmp_path):
    with pytest.raises(harness.ConfigError, match="only 1 units"):
        harness.run(make_experiment(), make_config(), options(tmp_path, shard=(0, 2)))
    with pytest.raises(harness.ConfigError, match=r"index must be in \[0, 2\)"):
        harness.run(make_experiment(), make_config(), options(tmp_path, shard=(2, 2)))
    side_by_side = make_experiment()
    side_by_side.PAIRING = "vmapped"  # seeds of an arm stay together
    with pytest.raises(harness.ConfigError, match="only 1 arms, whose seeds are"):
        harness.run(
            side_by_side, make_config(), options(tmp_path, seeds=(0, 1), shard=(0, 2))
        )
    stage = harness.Stage(name="a", run=nothing, config={}, parents=("b",))
    with pytest.raises(ValueError, match="does not come before"):
        stages_module.select([stage])
    stage = harness.Stage(name="a", run=nothing, config={})
    with pytest.raises(ValueError, match="two stages are called 'a'"):
        stages_module.select([stage, stage])


def test_metrics_of_one_name_in_two_stages_are_refused(tmp_path):
    def run(context):
        return harness.StageResult({}, {"same": 1.0})

    experiment = make_experiment()
    experiment.stages = lambda config, arm: [
        harness.Stage(name=name, run=run, config={}) for name in ("a", "b")
    ]
    with pytest.raises(ValueError, match=r"'b' reports \['same'\]"):
        harness.run(experiment, make_config(), options(tmp_path))


def test_dry_run_makes_nothing(tmp_path, capsys):
    calls = []
    harness.dry_run(make_experiment(calls), make_config(), options(tmp_path))
    assert not calls and not list(pathlib.Path(tmp_path).iterdir())
    out = capsys.readouterr().out
    assert "parameters" in out and "to run" in out


def test_foreign_files_survive_fresh(tmp_path):
    harness.run(make_experiment(), make_config(), options(tmp_path))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    harness.run(make_experiment(), make_config(), options(tmp_path, fresh=True))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def one_stage_experiment(run, **fields):
    experiment = make_experiment()
    experiment.stages = lambda config, arm: [
        harness.Stage(name="only", run=run, config={"arm": arm}, **fields)
    ]
    return experiment


def no_claims():
    config = make_config()
    config.claims = ConfigDict()
    return config


def test_a_shared_stage_does_not_know_the_seed(tmp_path):
    def draw(context):
        w = jax.random.normal(context.key, ())
        return harness.StageResult({"w": w}, {"w": w, "seed": context.seed})

    metrics = [
        harness.run(
            one_stage_experiment(draw, seeded=False),
            no_claims(),
            options(tmp_path / str(seed), seeds=(seed,)),
        ).summary["metrics"]
        for seed in (0, 3)
    ]
    assert metrics[0] == metrics[1] and metrics[0]["seed"] == 0


def test_units_measured_by_two_nets_are_not_pooled(tmp_path):
    def label(context):
        return harness.StageResult({}, {"x": 1.0}, labels={"net": f"n{context.seed}"})

    with pytest.raises(ValueError, match=r"units differ in label 'net': n0, n1"):
        harness.run(
            one_stage_experiment(label), no_claims(), options(tmp_path, seeds=(0, 1))
        )


def test_a_second_fit_in_a_stage_is_refused(tmp_path):
    def twice(context):
        for _ in range(2):
            state = train.create_state({"w": jnp.zeros(2)}, RULE)
            context.fit(state, STEP, Draws(), num_steps=3)

    with pytest.raises(RuntimeError, match="calls fit a second time"):
        harness.run(one_stage_experiment(twice), no_claims(), options(tmp_path))


def test_time_of_all_attempts_counts(tmp_path):
    attempts = []

    def slow(context):
        attempts.append(context.elapsed())
        time.sleep(0.3)
        if len(attempts) < 3:
            raise OSError("the machine goes away")
        return harness.StageResult({}, {"x": 1.0})

    experiment = one_stage_experiment(slow)
    for _ in range(2):
        with pytest.raises(OSError, match="goes away"):
            harness.run(experiment, no_claims(), options(tmp_path))
    summary = harness.run(experiment, no_claims(), options(tmp_path)).summary
    assert 0.9 <= summary["wall_s"] < 1.5
    assert harness.run(experiment, no_claims(), options(tmp_path)).summary == summary


def test_units_of_an_earlier_version_are_left_out(tmp_path, caplog):
    def run(context):
        return harness.StageResult({}, {"x": 1.0})

    old = one_stage_experiment(run)
    harness.run(old, no_claims(), options(tmp_path, seeds=(0, 1)))
    new = one_stage_experiment(run, version=2)
    summary = harness.run(new, no_claims(), options(tmp_path)).summary
    assert summary["seeds"] == [0] and "main-seed1.json is of an earlier" in caplog.text


def test_the_command_names_all_seeds_that_count(tmp_path):
    harness.run(make_experiment(), make_config(), options(tmp_path, seeds=(0, 1, 2)))
    summary = harness.run(make_experiment(), make_config(), options(tmp_path)).summary
    assert summary["seeds"] == [0, 1, 2]
    assert summary["command"].endswith(":smoke --seeds=0..2")


def test_record_takes_whole_runs_only(tmp_path):
    for changes in ({"shard": (0, 2), "seeds": (0, 1)}, {"stage": "fit"}):
        with pytest.raises(harness.ConfigError, match="--record takes a whole run"):
            harness.run(
                make_experiment(),
                make_config(),
                options(tmp_path, record=True, **changes),
            )


def test_other_commands_leave_the_model_of_a_finished_run(tmp_path):
    harness.run(make_experiment(), make_config(), options(tmp_path))
    model = tmp_path / "run" / "models" / "main-seed0" / "step_0000000000"
    before = model.stat().st_ino
    harness.run(make_experiment(), make_config(), options(tmp_path))
    assert model.stat().st_ino == before
    harness.run(make_experiment(), make_config(), options(tmp_path, stage="fit"))
    assert harness.load(tmp_path / "run")[2]["metrics"].keys() == {"w0", "error"}


def test_fresh_waits_for_other_users_of_a_stage(tmp_path):
    harness.run(make_experiment(), make_config(), options(tmp_path))
    folder = next((tmp_path / "stages").glob("fit-*"))
    with locked(folder), pytest.raises(InUse):
        harness.run(
            make_experiment(),
            make_config(),
            options(tmp_path, fresh=True, max_seconds=0.5),
        )
    assert list(folder.glob("result/step_*"))


def test_waiting_for_a_stage_ends_with_the_time(tmp_path, capsys):
    harness.run(make_experiment(), make_config(), options(tmp_path))
    with locked(next((tmp_path / "stages").glob("fit-*"))):
        other = options(tmp_path, workdir=tmp_path / "other", max_seconds=0.5)
        assert harness.run(make_experiment(), make_config(), other).code == 0
    assert "paused: waiting for another run" in capsys.readouterr().out


def test_a_run_without_a_model_says_so(tmp_path):
    def run(context):
        return harness.StageResult({}, {"x": 1.0})

    harness.run(one_stage_experiment(run), no_claims(), options(tmp_path))
    with pytest.raises(FileNotFoundError, match="finished without a model"):
        harness.load(tmp_path / "run")


def test_a_damaged_unit_is_named(tmp_path):
    harness.run(make_experiment(), make_config(), options(tmp_path, seeds=(0, 1)))
    path = tmp_path / "run" / "units" / "main-seed1.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"main-seed1.json is damaged.*remove it"):
        harness.run(make_experiment(), make_config(), options(tmp_path))


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*config.json: No space.*Free"):
        harness.run(make_experiment(), make_config(), options(tmp_path))
