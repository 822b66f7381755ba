"""Stages and the runner, on a tiny experiment that trains in milliseconds."""

import functools
import json
import os
import pathlib
import re
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from checks import Numbered
from ml_collections import ConfigDict

from tmdjax import harness, train
from tmdjax.harness import environment, run_folder, summaries
from tmdjax.harness import stages as stages_module
from tmdjax.harness import writers as writers_module
from tmdjax.harness.environment import InUse, locked
from tmdjax.harness.logs import TIME_PREFIX, read_rows
from tmdjax.harness.writers import has_rows

RULE = optax.sgd(0.1)


def draws():
    def batch(number):
        return np.random.default_rng(number).normal(size=(4, 2)).astype(np.float32)

    return Numbered(batch)


def loss(params, batch, keys):
    return jnp.square(batch @ params["w"] - batch.sum(1)), {}


STEP = jax.jit(train.make_train_step(loss, RULE))


def make_config(offset=1.0, claims=True):
    claim = {"statement": "training approaches the answer", "published": ""}
    claim |= {"statistic": "difference", "direction": "less", "threshold": 10.0}
    claim |= {"ours": "error", "baseline": None}
    given = {"system": "tiny", "train": {"steps": 15, "log_every": 5}}
    given |= {"score": {"offset": offset}, "claims": {"T1": claim} if claims else {}}
    return ConfigDict(given)


def make_experiment(calls=None, arms=("main",), interrupt=lambda step: None, **members):
    """An experiment whose stage calls are listed; `interrupt(step)` may raise.

    It draws no curves of its training, unless `CURVES` is given: most tests do not look.
    """
    calls = [] if calls is None else calls

    def fit(config, context):
        calls.append(("fit", context.seed))

        def step_fn(state, batch, key):
            interrupt(int(state.step))
            return STEP(state, batch, key)

        params = {"w": jax.random.normal(context.key, (2,))}
        state = context.fit(
            train.create_state(params, RULE),
            step_fn,
            draws(),
            num_steps=config.train.steps,
            log_every=config.train.log_every,
            checkpoint_seconds=(0.0, 0.0),
        )
        spec = {"name": "mlp", "hidden": 4, "depth": 1}
        metrics = {"w0": state.params["w"][0]}
        return harness.StageResult({"params": state.params}, metrics, spec)

    def score(config, context):
        calls.append(("score", context.seed))
        w = context.inputs["fit"].outputs["params"]["w"]
        error = float(np.abs(w - 1).sum()) + config.score.offset
        return harness.StageResult({}, {"error": error}, labels={"net": "n1"})

    def stages(config, arm):
        plain, make = config.to_dict(), harness.Stage
        of_fit = {"train": plain["train"], "arm": arm}
        fitting, scoring = (functools.partial(f, config) for f in (fit, score))
        return [
            make(name="fit", run=fitting, config=of_fit),
            make(name="score", run=scoring, config=plain["score"], parents=("fit",)),
        ]

    def report(config, arm, results, folder):
        if "fit" not in results:
            return harness.Report()
        w = results["fit"].outputs["params"]["w"]
        path = folder / "w.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{arm} {w[0]}".encode())
        return harness.Report([("stages", [{"w": w[0]}])], [("picture", path)])

    return types.SimpleNamespace(
        stages=stages,
        report=report,
        describe=lambda config: {"parameters": 2},
        arms=lambda config: arms,
        measures=lambda config, arm: {"error", "w0"},
        **{"CURVES": {}, **members},
    )


MODEL = "models/main-seed0"


def nothing(context):
    return harness.StageResult()


def measured(context):
    return harness.StageResult({}, {"x": 1.0})


def options(tmp_path, **changes):
    given = {
        "command": "python -m experiments.run --config=configs/tiny.py:smoke",
        "tier": "smoke",
        "workdir": tmp_path / "run",
        "results": tmp_path / "results",
    }
    return harness.Options(**(given | changes))


def run(tmp_path, experiment=None, config=None, **changes):
    """Runs the tiny experiment, or another one, in ``tmp_path / "run"``."""
    experiment, config = experiment or make_experiment(), config or make_config()
    experiment = harness.check_experiment(experiment)
    return harness.run(experiment, config, options(tmp_path, **changes))


def test_a_run_leaves_its_records(tmp_path, capsys):
    assert run(tmp_path, labels={"float8": "emulated"}).code == 0
    workdir = tmp_path / "run"
    for name in "config.json environment.json metrics.csv report.html".split():
        assert (workdir / name).exists()
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() >= set(summaries.SUMMARY_KEYS)
    assert summary["claims"][0]["verdict"] == "reported"  # one seed gives no verdict
    assert summary["labels"] == {"net": "n1", "float8": "emulated"}
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert "T1" in (workdir / "report.html").read_text()
    assert "T1" in capsys.readouterr().out


def test_stages_are_cached_by_what_they_depend_on(tmp_path):
    calls = []
    experiment = make_experiment(calls)
    run(tmp_path, experiment)
    run(tmp_path, experiment)
    assert calls == [("fit", 0), ("score", 0)]
    run(tmp_path, experiment, make_config(offset=2.0), workdir=tmp_path / "other")
    assert calls[2:] == [("score", 0)]  # the trained stage is shared
    run(tmp_path, experiment, fresh=True)
    assert calls[3:] == [("fit", 0), ("score", 0)]


def test_hashes_follow_config_seed_version_and_parents():
    def hashes(seed=0, config=1, **options):
        given = {"run": nothing, "config": {"x": config}}
        parent = harness.Stage(name="a", **given, **options)
        child = harness.Stage(name="b", run=nothing, config={}, parents=("a",))
        return stages_module.stage_hashes([parent, child], seed)

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
        found = read_rows(tmp_path / name / "run" / "metrics.jsonl")
        return [
            {k: v for k, v in row.items() if not k.startswith(TIME_PREFIX)}
            for row in found
        ]

    whole = run(tmp_path / "whole")
    for at in (3, 11, 14):  # before the first checkpoint, after one, at the end
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            run(folder, make_experiment(interrupt=functools.partial(kill, at)))
        assert run(folder).summary["metrics"] == whole.summary["metrics"]
        assert rows(str(at)) == rows("whole")


def test_max_seconds_pauses_and_the_command_goes_on(tmp_path, capsys):
    whole = run(tmp_path / "a")
    paused = run(tmp_path / "b", max_seconds=0.0)
    assert paused.code == 0 and paused.summary is None
    assert "paused" in capsys.readouterr().out
    assert run(tmp_path / "b").summary["metrics"] == whole.summary["metrics"]


def test_sigterm_checkpoints(tmp_path):
    def terminate(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome = run(tmp_path, make_experiment(interrupt=terminate))
    assert outcome.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    saved = (tmp_path / "stages").glob("fit-*/checkpoints/step_*")
    assert max(saved).name == "step_0000000010"


def test_changed_config_is_refused_with_the_difference(tmp_path, refused):
    run(tmp_path)
    refused = functools.partial(refused, error=harness.ConfigError)
    other = make_config(offset=3.0)
    words = r"score.offset: 1.0 -> 3.0.*--fresh"
    refused(words, run, tmp_path, config=other)
    refused("tier: smoke -> cpu", run, tmp_path, tier="cpu")
    assert run(tmp_path, config=other, fresh=True).code == 0


def test_a_cached_stage_gives_its_log_to_a_writer_that_lacks_it(
    tmp_path, monkeypatch, capsys
):
    """Once, and not to one that has it; a stage of an earlier, longer run too."""
    given = []

    class Writer:
        def __init__(self, folder, name, settings):
            self.folder, self.new = folder, not has_rows("wandb", folder)
            (folder / "wandb_id").write_text("1")

        def write(self, step, values):
            given.append((self.folder.name, step, values["loss"]))

        def rewind(self, step):
            given[:] = [row for row in given if row[1] <= step]

        def close(self, failed=False):
            pass

    monkeypatch.setattr(writers_module, "WandB", Writer)
    run(tmp_path)
    run(tmp_path, writers=("wandb",))
    folder = next((tmp_path / "stages").glob("fit-*"))
    rows = [
        (folder.name, row["step"], row["loss"])
        for row in read_rows(folder / "metrics.jsonl")
    ]
    assert given == rows and [row[1] for row in rows] == [5, 10, 15]
    assert f"[fit] cached: its log went to wandb, {folder}" in capsys.readouterr().out
    run(tmp_path, writers=("wandb",))
    assert given == rows
    assert f"its log went to wandb, {folder}" in capsys.readouterr().out  # where it is


def test_a_paused_stage_gives_what_it_logged_to_a_writer_that_comes_late(
    tmp_path, monkeypatch
):
    steps = []

    class Killed(BaseException):
        pass

    def kill(step):
        if step == 12:
            raise Killed

    class Writer:
        new = True

        def write(self, step, values):
            steps.append(step)

        def rewind(self, step):
            steps[:] = [each for each in steps if each <= step]

        def close(self, failed=False):
            pass

    with pytest.raises(Killed):
        run(tmp_path, make_experiment(interrupt=kill))
    monkeypatch.setattr(writers_module, "WandB", lambda *arguments: Writer())
    run(tmp_path, writers=("wandb",))
    assert steps == [5, 10, 15]


def test_seeds_and_shards(tmp_path):
    experiment, seeds = make_experiment(), tuple(range(5))
    whole = run(tmp_path, experiment, seeds=seeds).summary
    assert whole["claims"][0]["verdict"] == "reproduced"
    assert whole["seeds"] == [0, 1, 2, 3, 4]
    assert len({u["metrics"]["w0"] for u in whole["units"]}) == 5
    shards = [
        run(tmp_path / f"s{i}", experiment, seeds=seeds, shard=(i, 2)).summary
        for i in range(2)
    ]
    assert [s["seeds"] for s in shards] == [[0, 2, 4], [1, 3]]
    merged = summaries.merge(shards)
    assert merged["metrics"] == whole["metrics"]
    assert merged["claims"][0]["verdict"] == "reproduced"


def test_one_stage(tmp_path, refused):
    calls = []
    outcome = run(tmp_path, make_experiment(calls), stage="fit")
    assert calls == [("fit", 0)] and outcome.summary is None
    refused(r"no stage 'sample'; stages: fit, score", run, tmp_path, stage="sample")


def test_record_and_render(tmp_path, refused):
    calls = []
    experiment = make_experiment(calls)
    run(tmp_path, experiment, seeds=(0, 1, 2), record=True)
    path = tmp_path / "results" / "tiny" / "smoke.json"
    record = json.loads(path.read_text())
    assert record["claims"][0]["verdict"] == "pilot"
    text = (tmp_path / "RESULTS.md").read_text()
    assert "training approaches the answer" in text
    assert "1 pilot" in text and "`results/tiny/smoke.json`" in text
    # less of it is refused before anything is run or discarded
    calls.clear()
    other = tmp_path / "other"
    for words, changes in (
        ("holds arm 'main' seed 1, arm 'main' seed 2, which", {"fresh": True}),
        ("holds arm 'main' seed 1, arm 'main' seed 2, which", {"workdir": other}),
        ("holds claim 'T1', which", {"config": make_config(claims=False)}),
    ):
        refused(words, run, tmp_path, experiment, record=True, **changes)
    assert not calls and json.loads(path.read_text()) == record and not other.exists()
    run(tmp_path, experiment, seeds=(3,), record=True)  # the folder has the others
    assert json.loads(path.read_text())["seeds"] == [0, 1, 2, 3]


def test_a_model_loads_from_the_workdir(tmp_path, refused):
    run(tmp_path, seeds=(1, 2))
    workdir = tmp_path / "run"
    _, params, meta = harness.load(workdir)
    assert meta["seed"] == 1 and meta["config"]["system"] == "tiny"
    w0 = json.loads((workdir / "units" / "main-seed1.json").read_text())
    assert float(params["w"][0]) == w0["unit"]["metrics"]["w0"]
    assert harness.load(workdir, seed=2)[2]["seed"] == 2
    refused = functools.partial(refused, error=FileNotFoundError)
    words = "seed 7; it holds: main-seed1, main-seed2"
    refused(words, harness.load, workdir, seed=7)
    refused("holds no model of arm '../models/main'", harness.load, workdir,
            "../models/main", 1)  # fmt: skip
    refused(r"holds: none.*Finish the run", harness.load, tmp_path / "absent")
    one_stage(tmp_path / "b", measured)
    refused("finished without a model", harness.load, tmp_path / "b" / "run")
    (workdir / "models" / "main-seed0").mkdir()  # its model is being written
    (workdir / "models" / "main-seed1").rename(workdir / "models" / "main-seed1 (old)")
    assert harness.load(workdir)[2]["seed"] == 2


def test_damaged_result_is_made_again(tmp_path, caplog):
    calls = []
    experiment = make_experiment(calls)
    first = run(tmp_path, experiment)
    results = (tmp_path / "stages").glob("fit-*/result/**/d/*")
    largest = max(filter(pathlib.Path.is_file, results), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(bytes(data))
    again = run(tmp_path, experiment)
    assert "damaged" in caplog.text
    assert calls == [("fit", 0), ("score", 0), ("fit", 0)]
    assert again.summary["metrics"] == first.summary["metrics"]


def test_workdirs_that_cannot_be_used(tmp_path, refused):
    with locked(tmp_path / "run"):
        refused("in use by another run", run, tmp_path, error=RuntimeError)
    (tmp_path / "file").write_text("")
    words, other = r"cannot write to .*give another --workdir", tmp_path / "file"
    refused(words, run, tmp_path, workdir=other, error=OSError)


def test_arms_are_units_and_ablations_run_under_one_seed(tmp_path, refused):
    config = make_config()
    config.one_seed_arms = ("other",)
    experiment = make_experiment(arms=("main", "other"))
    summary = run(tmp_path, experiment, config, seeds=(3, 4)).summary
    units = {(unit["arm"], unit["seed"]) for unit in summary["units"]}
    assert units == {("main", 3), ("main", 4), ("other", 3)}
    assert set(summary["metrics"]) == {"error", "w0", "other/error", "other/w0"}
    config.one_seed_arms = ("othr",)
    refused("Did you mean 'other'", run, tmp_path, experiment, config, fresh=True)


def test_an_arm_reads_what_another_left_under_the_same_seed(tmp_path, refused):
    """Made once for both; its metrics stay the other's, also where that is not run."""
    calls = []

    def draw(offset, context):
        calls.append((offset, context.seed))
        w = offset + jax.random.normal(context.key, ())
        return harness.StageResult({"w": w}, {"w": w})

    def compare(context):
        own, other = (context.inputs[n].outputs["w"] for n in ("draw", "main/draw"))
        return harness.StageResult({}, {"more": other - own})

    def stages(config, arm):
        offset = {"main": 5.0, "other": 0.0}[arm]
        draws = functools.partial(draw, offset)
        own = harness.Stage(name="draw", run=draws, config={"offset": offset})
        if arm == "main":
            return [own]
        theirs = stages_module.of_other_arm("main", stages(config, "main"), "draw")
        given = {"run": compare, "config": {}, "parents": ("draw", "main/draw")}
        return [*theirs, own, harness.Stage(name="compare", **given)]

    def ran(folder, *arms, **changes):
        experiment = make_experiment(arms=arms)
        experiment.stages = stages
        given = {"config": make_config(claims=False), "seeds": (3, 4), **changes}
        found = run(tmp_path / folder, experiment, **given).summary
        return {(u["arm"], u["seed"]): u["metrics"] for u in found["units"]}

    both = ran("both", "main", "other")
    assert calls == [(5.0, 3), (5.0, 4), (0.0, 3), (0.0, 4)]
    assert both["main", 3].keys() == {"w"}
    for seed in (3, 4):
        assert both["other", seed]["more"] == pytest.approx(5.0)
        assert both["other", seed]["w"] == pytest.approx(both["main", seed]["w"] - 5)
    alone = ran("alone", "other")
    assert alone["other", 4] == both["other", 4] and calls[4:].count((5.0, 4)) == 1
    calls.clear()
    ran("alone", "other", fresh=True)  # what is another's is left to it
    assert calls == [(0.0, 3), (0.0, 4)]
    words = "'compare' reads 'main/draw', which does not come before it"
    refused(words, stages_module.select, stages(None, "other")[1:])


def test_a_report_shows_all_arms_and_seeds_and_says_whose_a_picture_is(
    tmp_path, capsys
):
    """Not the numbers of the first unit for all; pictures are of the first seed."""
    experiment = make_experiment(arms=("a", "b"), CURVES={"loss": "loss"})
    config = make_config()
    config.claims, seeds = {}, (4, 2, 7)
    summary = run(tmp_path, experiment, config, seeds=seeds, record=True).summary
    workdir = tmp_path / "run"
    page = (workdir / "report.html").read_text()
    record = json.loads((tmp_path / "results/tiny/smoke.json").read_text())
    for arm in "ab":
        w0 = [u["metrics"]["w0"] for u in summary["units"] if u["arm"] == arm]
        half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(w0)
        assert len(set(w0)) == 3
        assert f"{arm}/w0</td>" in page
        assert f"{np.mean(w0):.4g} ± {half:.2g}</td>" in page
        assert f"picture ({arm}, seed 4)" in page
        (first,) = (
            u["metrics"]["w0"]
            for u in summary["units"]
            if (u["arm"], u["seed"]) == (arm, 4)
        )
        picture = (workdir / "figures" / arm / "w.png").read_text()
        assert picture == f"{arm} {np.float32(first)}"
        assert (tmp_path / "results/tiny" / f"smoke-{arm}-w.png").read_text() == picture
        shows = record["figures"][f"smoke-{arm}-w.png"]
        assert shows == f"picture ({arm}, seed 4)"
    assert "mean ± 95 % interval over seeds 2, 4, 7" in page
    assert "mean ± 95 % interval over seeds 2, 4, 7" in capsys.readouterr().out
    assert (workdir / "figures" / "training-fit-loss.png").stat().st_size > 5000
    for link in re.findall(r'href="(.*?)"', page):
        assert (workdir / link).exists(), link
    assert 'href="models/b-seed7/"' in page and 'href="metrics.csv"' in page
    run(tmp_path, experiment, config, seeds=(5,), fresh=True)
    page = (workdir / "report.html").read_text()
    assert "Results: seed 5 alone" in page and "±" not in page
    assert "picture (b, seed 5)" in page
    files = {p.name for p in (workdir / "figures").rglob("*") if p.is_file()}
    assert files == {"w.png", "training-fit-loss.png"}


def test_bad_shards_and_stage_lists(tmp_path, refused):
    of_config = functools.partial(refused, error=harness.ConfigError)
    of_config("only 1 units", run, tmp_path, shard=(0, 2))
    of_config(r"index must be in \[0, 2\)", run, tmp_path, shard=(2, 2))
    side_by_side = make_experiment()
    side_by_side.PAIRING = "vmapped"  # seeds of an arm stay together
    given, words = {"seeds": (0, 1), "shard": (0, 2)}, "only 1 arms, whose seeds are"
    of_config(words, run, tmp_path, side_by_side, **given)
    for changes in (given, {"stage": "fit"}):
        words = "--record takes a whole run"
        of_config(words, run, tmp_path, record=True, **changes)
    stage, child = (
        harness.Stage(name="a", run=nothing, config={}, parents=parents)
        for parents in ((), ("b",))
    )
    refused("does not come before", stages_module.select, [child])
    refused("two stages are called 'a'", stages_module.select, [stage, stage])


def test_metrics_of_one_name_in_two_stages_are_refused(tmp_path, refused):
    experiment = make_experiment()
    experiment.stages = lambda config, arm: [
        harness.Stage(name=name, run=measured, config={}) for name in ("a", "b")
    ]
    refused(r"'b' reports \['x'\]", run, tmp_path, experiment)


def test_dry_run_makes_nothing(tmp_path, capsys):
    calls = []
    experiment = harness.check_experiment(make_experiment(calls))
    harness.dry_run(experiment, make_config(), options(tmp_path))
    assert not calls and not list(pathlib.Path(tmp_path).iterdir())
    out = capsys.readouterr().out
    assert "parameters" in out and "to run" in out


def files_below(folder):
    """Names and content of all files, but for locks and arrays (of random names)."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock" and "arrays" not in path.parts
    }


def with_figure(config, arm, results, folder):
    folder.mkdir(exist_ok=True)
    (folder / "curve.png").write_bytes(b"made")
    return harness.Report([], [("a curve", folder / "curve.png")])


def test_fresh_removes_what_the_run_lists_and_nothing_else(tmp_path):
    experiment, workdir = make_experiment(), tmp_path / "run"
    experiment.report = with_figure
    run(tmp_path, experiment, seeds=(0, 1))
    own = files_below(workdir)
    assert {"figures/curve.png", "units/main-seed1.json", "report.html"} < own.keys()
    mine = [workdir / n for n in ("notes.txt", "figures/mine.png", "units/a/b.json",
            "models/main-seed0/README", "models/mine/step_0000000000/x")]  # fmt: skip
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    for _ in range(2):
        run_folder.claim_workdir(workdir, make_config(), "smoke", fresh=True)
        left = files_below(workdir)
        assert left.pop("config.json")
        assert not list(workdir.rglob("arrays"))
        assert left == {p.relative_to(workdir).as_posix(): b"mine" for p in mine}
    assert run(tmp_path, experiment, seeds=(0, 1)).code == 0
    assert files_below(workdir).keys() == {*own, *left}


def test_fresh_leaves_what_links_lead_to(tmp_path):
    """A folder of somebody else that was put in the place of the run's own."""
    workdir, theirs = tmp_path / "run", tmp_path / "theirs"
    run(tmp_path)
    for name in ("figures", MODEL):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).rename(theirs / name)
        (workdir / name).symlink_to(theirs / name)
    kept = files_below(theirs)
    assert {"figures/w.png", f"{MODEL}/step_0000000000/manifest.json"} <= kept.keys()
    (tmp_path / "link").symlink_to(workdir)
    config = make_config()
    run_folder.claim_workdir(tmp_path / "link", config, "smoke", fresh=True)
    assert files_below(theirs) == kept
    assert {p.name for p in workdir.iterdir()} == {".lock", "config.json", "figures"}


@pytest.mark.parametrize(
    "files, words",
    [
        ({"models/w.bin": "x", "figures/a.png": "x"}, "holds figures, models but no"),
        ({"train.py": "x"}, "holds train.py but no config.json of a run"),
        ({"config.json": "{"}, "config.json is not of a run of this version"),
        ({"config.json": '{"model_type": "qwen2"}'}, "is not of a run"),
        ({"config.json": '{"tier": "smoke", "config": {}}'}, "lacks .*'files'"),
        (
            {"config.json": '{"tier": "a", "config": {}, "files": ["../x"]}'},
            "is not of",
        ),
        ({"config.json": '{"tier": "a", "config": {}, "files": ["/x"]}'}, "is not of"),
        ({"config.json": '{"tier": "a", "config": {}, "files": [""]}'}, "is not of"),
        ({"config.json": '{"tier": "a", "config": {}, "files": "x"}'}, "is not of"),
        (
            {"config.json": '{"tier": "a", "config": {}, "files": ["a\\u0000"]}'},
            "is not of",
        ),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_of_others_stays_as_it_is(tmp_path, refused, files, words, fresh):
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    (tmp_path / "x").write_text("beside the folder")
    before, calls = files_below(tmp_path), []
    if list(files) == ["train.py"] and not fresh:  # nothing there is written over
        assert run(tmp_path).code == 0
        assert before.items() <= files_below(tmp_path).items()
        return
    experiment, error = make_experiment(calls), harness.ConfigError
    refused(words, run, tmp_path, experiment, fresh=fresh, error=error)
    assert files_below(tmp_path) == before and not calls


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", ".hidden", "a b"])
def test_names_that_are_no_files_are_refused(tmp_path, refused, name):
    refused("stage name=.* names a file", harness.Stage, name=name, run=nothing,
            config={})  # fmt: skip
    refused("arm=.* names a file", run, tmp_path, make_experiment(arms=(name,)))
    config = make_config()
    config.system = f"/{name}"
    refused("system=.* names a file", run, tmp_path, config=config)
    assert not list(tmp_path.iterdir())


def test_a_stage_is_made_again_when_its_files_have_other_content(tmp_path):
    """Under the same names and of the same size; its children too."""
    data, single = tmp_path / "data", tmp_path / "labels.json"
    (data / "train").mkdir(parents=True)
    shard = data / "train" / "shard-0"
    shard.write_text("old")
    calls, experiment = [], make_experiment()

    def read(context):
        calls.append(context.name)
        return harness.StageResult({}, {"x": float(len(shard.read_text()))})

    def after(context):
        calls.append(context.name)
        return harness.StageResult()

    experiment.stages = lambda config, arm: [
        harness.Stage(name="read", run=read, config={}, files=(data, single)),
        harness.Stage(name="after", run=after, config={}, parents=("read",)),
        harness.Stage(name="apart", run=after, config={}),
    ]
    config = make_config(claims=False)

    def made():
        calls.clear()
        run(tmp_path, experiment, config)
        return list(calls)

    assert made() == ["read", "after", "apart"] and made() == []
    shard.write_text("new")  # the same length
    assert made() == ["read", "after"]
    (data / ".notes").write_text("hidden files are not data")
    assert made() == []
    single.write_text("{}")
    assert made() == ["read", "after"]
    shard.rename(data / "train" / "shard-1")
    shard = data / "train" / "shard-1"
    assert made() == ["read", "after"] and made() == []
    linked = tmp_path / "another disk"
    (data / "train").rename(linked)
    (data / "train").symlink_to(linked)
    assert made() == []  # the same content
    (linked / "shard-1").write_text("off")
    assert made() == ["read", "after"]
    (data / "again").symlink_to(linked)
    assert made() == ["read", "after"]
    (linked / "ring").symlink_to(data)
    assert made() == ["read", "after"] and made() == []


def one_stage(tmp_path, stage, version=1, seeded=True, **changes):
    """Runs an experiment of one stage, without claims."""
    experiment, options = make_experiment(), {"version": version, "seeded": seeded}
    experiment.stages = lambda config, arm: [
        harness.Stage(name="only", run=stage, config={"arm": arm}, **options)
    ]
    return run(tmp_path, experiment, make_config(claims=False), **changes)


def test_a_shared_stage_does_not_know_the_seed(tmp_path):
    def draw(context):
        w = jax.random.normal(context.key, ())
        return harness.StageResult({"w": w}, {"w": w, "seed": context.seed})

    first, other = (
        one_stage(tmp_path / str(seed), draw, seeded=False, seeds=(seed,))
        for seed in (0, 3)
    )
    assert first.summary["metrics"] == other.summary["metrics"]
    assert first.summary["metrics"]["seed"] == 0


def test_units_measured_by_two_nets_are_not_pooled(tmp_path, refused):
    def label(context):
        return harness.StageResult({}, {"x": 1.0}, labels={"net": f"n{context.seed}"})

    words = r"units differ in label 'net': n0, n1"
    refused(words, one_stage, tmp_path, label, seeds=(0, 1))


def test_a_second_fit_in_a_stage_is_refused(tmp_path, refused):
    def twice(context):
        for _ in range(2):
            state = train.create_state({"w": jnp.zeros(2)}, RULE)
            context.fit(state, STEP, draws(), num_steps=3)

    words = "trains a second time"
    refused(words, one_stage, tmp_path, twice, error=RuntimeError)


def test_time_of_all_attempts_counts(tmp_path, refused):
    attempts = []

    def slow(context):
        attempts.append(context.elapsed())
        time.sleep(0.3)
        if len(attempts) < 3:
            raise OSError("the machine goes away")
        return measured(context)

    for _ in range(2):
        refused("goes away", one_stage, tmp_path, slow, error=OSError)
    summary = one_stage(tmp_path, slow).summary
    assert 0.9 <= summary["wall_s"] < 1.5
    assert one_stage(tmp_path, slow).summary == summary


def test_units_of_an_earlier_version_are_left_out(tmp_path, caplog):
    one_stage(tmp_path, measured, seeds=(0, 1))
    summary = one_stage(tmp_path, measured, version=2).summary
    assert summary["seeds"] == [0] and "main-seed1.json is of an earlier" in caplog.text


def test_the_command_names_all_seeds_that_count(tmp_path):
    run(tmp_path, seeds=(0, 1, 2))
    summary = run(tmp_path).summary
    assert summary["seeds"] == [0, 1, 2]
    assert summary["command"].endswith(":smoke --seeds=0..2")


def test_other_commands_leave_the_model_of_a_finished_run(tmp_path):
    run(tmp_path)
    model = tmp_path / "run" / "models" / "main-seed0" / "step_0000000000"
    before = model.stat().st_ino
    run(tmp_path)
    assert model.stat().st_ino == before
    run(tmp_path, stage="fit")
    assert harness.load(tmp_path / "run")[2]["metrics"].keys() == {"w0", "error"}


def test_a_stage_in_use_is_waited_for(tmp_path, capsys):
    """By a fresh run, and by another run until its time ends."""
    run(tmp_path)
    folder = next((tmp_path / "stages").glob("fit-*"))
    with locked(folder):
        with pytest.raises(InUse):
            run(tmp_path, fresh=True, max_seconds=0.5)
        assert list(folder.glob("result/step_*"))
        assert run(tmp_path, workdir=tmp_path / "other", max_seconds=0.5).code == 0
    assert "paused: waiting for another run" in capsys.readouterr().out


def test_a_damaged_unit_is_named(tmp_path, refused):
    run(tmp_path, seeds=(0, 1))
    path = tmp_path / "run" / "units" / "main-seed1.json"
    whole = json.loads(path.read_text())
    for key, odd in (("logs", []), ("logs", {"fit": 3}), ("logs", {"fit": [{}]}),
                     ("logs", {"fit": [{"step": 1, "loss": []}]}),
                     ("stages", 3), ("unit", {"arm": "main", "seed": 1})):  # fmt: skip
        path.write_text(json.dumps(whole | {key: odd}))
        refused(r"main-seed1.json is damaged.*remove it", run, tmp_path)
    path.write_text(json.dumps(whole)[:-20])
    refused(r"main-seed1.json is damaged.*remove it", run, tmp_path)
    path.rename(path.with_name("._main-seed1.json"))  # as other systems leave them
    assert run(tmp_path).code == 0


def test_full_disk_names_the_file(tmp_path, monkeypatch, refused):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    words = r"cannot write .*config.json: No space.*Free"
    refused(words, run, tmp_path, error=OSError)


def test_what_ended_a_stage_is_said_on_a_full_disk_too(tmp_path, monkeypatch, refused):
    """The time spent, which cannot be noted then, hides nothing."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def fails(context):
        monkeypatch.setattr(os, "replace", full)
        raise ValueError("the loss is not finite")

    refused("the loss is not finite", one_stage, tmp_path, fails)


def test_peak_memory_counts_kilobytes_but_on_macos(monkeypatch):
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    bytes_ = environment.peak_memory_gb()
    monkeypatch.setattr(environment.sys, "platform", "linux")
    assert environment.peak_memory_gb() == pytest.approx(1024 * bytes_, rel=0.1)
    assert environment.peak_memory_gb() > 0.05  # an interpreter with jax


def test_an_experiment_is_checked_and_gets_its_defaults(tmp_path, refused):
    given = make_experiment()
    del given.arms, given.CURVES
    found = harness.check_experiment(given)
    assert list(found.arms(None)) == ["main"] and found.updates(None) == {}
    assert found.summary_rows(None, {"a": 1.0}) == [{"metric": "a", "value": 1.0}]
    assert (found.PAIRING, found.CURVES, found.RULES) == (
        "separate",
        {"loss": "loss"},
        (),
    )
    assert found.report(None, "main", {}, tmp_path) == harness.Report()
    again = harness.check_experiment(found)
    assert again.stages is given.stages and again.PAIRING == "separate"

    def wrong(words, error=TypeError, **changes):
        bad = types.SimpleNamespace(**{**vars(given), **changes})
        refused(words, harness.check_experiment, bad, error=error)

    words = r"\.report is called with \(config, arm, results, folder\)"
    wrong(words, report=lambda config, results, folder: None)
    wrong(r"\.arms is called with \(config\).*not a callable", arms=("main",))
    wrong("PAIRING='mixed' is not one of", PAIRING="mixed", error=ValueError)
    empty = types.ModuleType("eleventh")
    words = "eleventh is no experiment: it lacks stages, describe, measures"
    refused(words, harness.check_experiment, empty, error=TypeError)


def test_a_claim_about_what_is_not_measured_is_refused_before_the_run(
    tmp_path, refused
):
    calls, config = [], make_config()
    config.claims.T1.ours = "eror"
    words = "'T1' is about 'eror', which .*Did you mean 'error'"
    refused(words, run, tmp_path, make_experiment(calls), config)
    assert not calls
