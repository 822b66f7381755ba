"""Runs side by side, against scipy."""

import json
import types

import numpy as np
import pytest
import scipy.stats
from records import unit

from experiments import report, sweep
from experiments import run as run_command
from tmdjax.harness import Outcome, summaries
from tmdjax.harness.compare import comparison_rows, read_run
from tmdjax.metrics.intervals import adjusted_p_values, paired_p_value


def write_run(folder, by_arm, device="cpu, 2 cores"):
    """A workdir with a summary; by_arm: {arm: {seed: metrics}}."""
    units = [
        unit(arm, seed, metrics, device=device)
        for arm, seeds in by_arm.items()
        for seed, metrics in seeds.items()
    ]
    given = {"system": "tiny", "tier": "cpu", "command": "run", "config_hash": "0"}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summaries.summary(**given, units=units))
    (folder / "summary.json").write_text(text)
    return str(folder)


def run_of(folder, **arms):
    return read_run(write_run(folder, arms))


def seeds_of(values, **others):
    return {i: {"loss": v} | others for i, v in enumerate(values)}


A, B = [1.0, 2.0, 4.0, 3.0], [1.5, 2.1, 5.0, 3.9]


def test_p_values_are_those_of_scipy(refused):
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 30):
        a, b = rng.normal(size=(2, count))
        expected = scipy.stats.ttest_rel(a, b).pvalue
        np.testing.assert_allclose(paired_p_value(a, b), expected, rtol=1e-10)
        assert paired_p_value(a, b) == paired_p_value(b, a)
    assert paired_p_value([1.0], [2.0]) is None
    assert paired_p_value([1.0, 2.0], [0.0, 1.0]) is None
    assert paired_p_value([0.3, 0.6], [0.1, 0.4]) is None  # equal up to rounding
    refused("2 seed", paired_p_value, [1.0, 2.0], [1.0])


def test_holm_by_hand(refused):
    # sorted 0.01, 0.02, 0.03, 0.4: times 4, 3, 2, 1, then never falling
    adjusted = adjusted_p_values([0.03, 0.01, 0.4, 0.02])
    np.testing.assert_allclose(adjusted, [0.06, 0.04, 0.4, 0.06])
    assert adjusted_p_values([0.9, 0.8]) == [1.0, 1.0]
    assert adjusted_p_values([]) == []
    refused("p-value=1.5", adjusted_p_values, [0.1, 1.5])


def test_false_rejections_are_as_rare_as_promised():
    """Ten true hypotheses a family: any rejection below 5 % in at most 5 % of them."""
    rng = np.random.default_rng(1)
    families = rng.uniform(size=(2000, 10))
    any_rejected = np.mean([min(adjusted_p_values(f)) < 0.05 for f in families])
    assert 0.03 < any_rejected < 0.065


def test_runs_are_paired_by_seed(tmp_path):
    # the other in another order, with a seed that the first lacks
    other = {3: B[3], 0: B[0], 2: B[2], 1: B[1], 9: 100.0}
    other = {seed: {"loss": value} for seed, value in other.items()}
    runs = run_of(tmp_path / "a", main=seeds_of(A)), run_of(tmp_path / "b", main=other)
    (row,) = comparison_rows(runs)
    assert row["metric"] == "loss" and row["seeds"] == 4
    np.testing.assert_allclose(row["mean"], np.mean(B))
    np.testing.assert_allclose(row["difference"], np.mean(B) - np.mean(A))
    test = scipy.stats.ttest_rel(B, A)
    np.testing.assert_allclose(row["p"], test.pvalue)
    assert row["p (Holm)"] == row["p"]
    bounds = [float(x) for x in row["ci95"].split(" .. ")]
    np.testing.assert_allclose(bounds, test.confidence_interval(0.95), rtol=1e-3)


def test_arms_of_one_run(tmp_path, capsys):
    arms = {"ours": seeds_of(B, steps=3), "plain": seeds_of(A, steps=3)}
    run = write_run(tmp_path / "a", arms)
    compare = ["--compare", f"{run}:plain", f"{run}:ours"]
    assert report.main(compare) == 0
    out = capsys.readouterr().out
    assert "loss" in out and "steps" in out and f"{run}:ours" in out
    first = {"ours/loss": 1.5, "plain/loss": 1.0, "ours/steps": 3.0, "plain/steps": 3.0}
    assert read_run(run).seeds[0] == first
    report.main([*compare, "--metrics", "loss"])
    assert "steps" not in capsys.readouterr().out


def test_two_devices_are_said(tmp_path, capsys):
    first = write_run(tmp_path / "a", {"main": seeds_of(A)})
    second = write_run(tmp_path / "b", {"main": seeds_of(B)}, device="h100")
    report.main(["--compare", first, second])
    assert "different devices: cpu, 2 cores; h100" in capsys.readouterr().out


def test_a_seed_that_diverged_is_shown_and_not_averaged_away(tmp_path):
    first = run_of(tmp_path / "a", main=seeds_of(A))
    bad = run_of(tmp_path / "b", main=seeds_of([1.0, float("nan"), 2.0, 3.0]))
    (row,) = comparison_rows([first, bad])
    assert np.isnan(row["mean"]) and row["p"] is None and row["difference"] is None


def test_what_is_given_twice_is_no_second_test(tmp_path, refused):
    """Holm's adjustment counts the rows of a table: none may stand there twice."""
    runs = [run_of(tmp_path / name, main=seeds_of(x)) for name, x in zip("ab", (A, B))]
    assert comparison_rows(runs, ["loss", "loss"]) == comparison_rows(runs, ["loss"])
    refused("b is given twice", comparison_rows, [*runs, runs[1]])
    again = read_run(f"{tmp_path}/a/../b")
    refused(r"/\.\./b is given twice", comparison_rows, [*runs, again])


def test_bad_comparisons(tmp_path, refused):
    first = run_of(tmp_path / "a", main=seeds_of(A))
    second = run_of(tmp_path / "b", main={7: {"loss": 1.0}})
    third = run_of(tmp_path / "c", x=seeds_of(A), y=seeds_of(A))
    arm, odd = f"{tmp_path / 'c'}:x", tmp_path / "odd.json"
    refused("1 run.s. to compare", comparison_rows, [first])
    words = r"seeds \[0, 1, 2, 3\].* \[7\]: none in common"
    refused(words, comparison_rows, [first, second])
    words = "share no metric .* choose an arm"
    refused(words, comparison_rows, [first, third])
    words = "do not share 'lss'.*Did you mean 'loss'"
    refused(words, comparison_rows, [first, read_run(arm)], ["lss"])
    refused("has no arm 'z'; it has x, y", read_run, arm.replace(":x", ":z"))
    words = "summary.json is not there"
    refused(words, read_run, str(tmp_path), error=FileNotFoundError)
    odd.write_text("{}")
    refused("odd.json lacks", read_run, str(odd))


CONFIG = "--config=configs/flow_matching.py:smoke"


@pytest.fixture
def executed(monkeypatch):
    """Runs that only write the summary; the list of what they were asked."""
    calls = []

    def execute(flags, overrides):
        rate = float(dict(o.split("=") for o in overrides)["optimizer.learning_rate"])
        calls.append((flags.workdir, flags.cache, tuple(overrides)))
        write_run(flags.workdir, {"main": seeds_of([rate, 2 * rate, 4 * rate])})
        return Outcome(0, {})

    monkeypatch.setattr(run_command, "execute", execute)
    return calls


def test_a_sweep_runs_every_combination_and_compares(tmp_path, executed, capsys):
    rates, drops = ("1e-3", "3e-3"), ("0.0", "0.1")
    arguments = [
        f"--sweep.optimizer.learning_rate={','.join(rates)}",
        f"--sweep.train.drop_rate={','.join(drops)}",
    ]
    fixed = ["--seeds=0..2", f"--workdir={tmp_path}", "--config.train.steps=30"]
    assert sweep.main([CONFIG, *fixed, *arguments]) == 0
    names = [folder.name for folder, _, _ in executed]
    assert names == [f"learning_rate={r}_drop_rate={d}" for r in rates for d in drops]
    assert {cache for _, cache, _ in executed} == {tmp_path / "stages"}
    first = ("train.steps=30", "optimizer.learning_rate=1e-3", "train.drop_rate=0.0")
    assert executed[0][2] == first
    table = (tmp_path / "sweep.txt").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "learning_rate=3e-3_drop_rate=0.1" in table


def test_without_values_those_of_the_config_are_tried_one_at_a_time(
    tmp_path, executed, monkeypatch, refused
):
    stated = types.SimpleNamespace(SWEEP=("train.drop_rate=0.0,0.2", "train.steps=30"))
    monkeypatch.setattr(sweep, "load_module", lambda path: stated)
    fixed = [CONFIG, f"--workdir={tmp_path}", "--config.optimizer.learning_rate=1e-3"]
    assert sweep.main(fixed) == 0
    names = [folder.name for folder, _, _ in executed]
    assert names == ["plain", "drop_rate=0.0", "drop_rate=0.2", "steps=30"]
    assert [point[1:] for _, _, point in executed] == [
        (), ("train.drop_rate=0.0",), ("train.drop_rate=0.2",), ("train.steps=30",)
    ]  # fmt: skip
    assert "plain" in (tmp_path / "sweep.txt").read_text()
    stated.SWEEP = ("train.drop_rate=0.1",)
    refused("no change and train.drop_rate=0.1 are one config", sweep.main, fixed)
    refused(
        "there is no config|does not exist", sweep.main, ["--config=configs/no.py:x"]
    )


TWO = "--sweep.train.drop_rate=0.0,0.1"


def test_a_sweep_that_is_stopped_says_so(tmp_path, monkeypatch):
    for code in (143, 0):  # by a signal, or because the time was up
        calls = []

        def execute(flags, overrides, calls=calls, code=code):
            calls.append(flags.max_seconds)
            write_run(flags.workdir, {"main": seeds_of([1.0])})  # of fewer seeds
            return Outcome(code, {}, finished=False)

        monkeypatch.setattr(run_command, "execute", execute)
        arguments = [CONFIG, f"--workdir={tmp_path}", TWO, "--max_seconds=9"]
        assert sweep.main(arguments) == code
        assert len(calls) == 1 and 8 < calls[0] <= 9
        assert not (tmp_path / "sweep.txt").exists()


def test_stages_and_sizes_of_a_sweep(tmp_path, monkeypatch, capsys):
    calls, arguments = [], [CONFIG, f"--workdir={tmp_path}", TWO]

    def execute(flags, overrides):
        calls.append(flags.stage)
        return Outcome(0, None)

    monkeypatch.setattr(run_command, "execute", execute)
    assert sweep.main([*arguments, "--stage=train"]) == 0
    assert calls == ["train", "train"] and not (tmp_path / "sweep.txt").exists()
    assert sweep.main([*arguments, "--dry_run"]) == 0
    assert len(calls) == 2 and capsys.readouterr().out.count("to run") == 8


def test_help_of_a_sweep_is_its_own(capsys):
    with pytest.raises(SystemExit, match="0"):
        sweep.main(["--help"])
    text = capsys.readouterr().out
    assert "usage: experiments.sweep" in text and "--sweep.a.b=v,w" in text


def test_bad_sweeps_run_nothing(executed, refused):
    steps = "--sweep.train.steps="
    for arguments, words in (
        ([], "give --sweep.a.b=v,w"),
        ([steps], "is not like --sweep.a.b=v,w"),
        ([f"{steps}3,03"], "train.steps=3 and train.steps=03 are one config"),
        (["--sweep.optimizer.learning_rate=1e-3,2e-3,0.001"], "are one config; give"),
        (["--sweep.arms.main.train.drop_rate=0,0.0"], "no setting"),
        (["--sweep.sample.euler_nfe=(2,4);(2,04)"], "are one config"),
        ([f"{steps}3,3"], "is not like --sweep.a.b=v,w"),
        (["--sweep.a=1,2", "--sweep.a=3,4"], "--sweep.a stands twice"),
        (["--record", f"{steps}3,4"], "--record does not go with"),
        (["--fresh", f"{steps}3,4"], "--fresh does not go with"),
        (["--list", f"{steps}3,4"], "--list does not go with"),
        (["--shard=0/2", f"{steps}3,4"], "--shard does not go with"),
        ([f"{steps}3"], "give two or more values"),
        ([f"{steps}(3 4);(3,4)"], "whose letters, digits"),
        (["--metrics", "euler9.x", TWO], "not measured by"),
        (["--stage=tain", TWO], "no stage 'tain'"),
        (["--sweep.train.stepz=3,4"], "stepz"),
        (["--sweep.train.batch_size=8,-1"], "batch_size"),
    ):
        refused(words, sweep.main, [CONFIG, *arguments])
    refused("give --config=", sweep.main, ["--sweep.a=1,2"])
    assert not executed


def test_values_with_commas():
    assert sweep.grid(["--sweep.a=(1,2);(3,4)"]) == [("a=(1,2)",), ("a=(3,4)",)]
