"""Runs side by side, against scipy."""

import json

import numpy as np
import pytest
import scipy.stats

from experiments import report, sweep
from experiments import run as run_command
from tmdjax.harness import ConfigError, Outcome, ledger
from tmdjax.harness.compare import comparison_rows, read_run
from tmdjax.metrics.intervals import adjusted_p_values, paired_p_value


def write_run(folder, by_arm, device="cpu, 2 cores"):
    """A workdir with a summary; by_arm: {arm: {seed: metrics}}."""
    units = [
        {
            "arm": arm,
            "seed": seed,
            "metrics": metrics,
            "wall_s": 1.0,
            "peak_memory_gb": None,
            "device": device,
            "commit": "abc",
            "versions": {},
            "labels": {},
        }
        for arm, seeds in by_arm.items()
        for seed, metrics in seeds.items()
    ]
    found = ledger.summary(
        system="tiny", tier="cpu", command="run", config_hash="0", units=units
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(found))
    return str(folder)


def seeds_of(values, **others):
    return {i: {"loss": v} | others for i, v in enumerate(values)}


A, B = [1.0, 2.0, 4.0, 3.0], [1.5, 2.1, 5.0, 3.9]


def test_p_values_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 30):
        a, b = rng.normal(size=(2, count))
        expected = scipy.stats.ttest_rel(a, b).pvalue
        np.testing.assert_allclose(paired_p_value(a, b), expected, rtol=1e-10)
        assert paired_p_value(a, b) == paired_p_value(b, a)
    assert paired_p_value([1.0], [2.0]) is None
    assert paired_p_value([1.0, 2.0], [0.0, 1.0]) is None
    assert paired_p_value([0.3, 0.6], [0.1, 0.4]) is None  # equal up to rounding
    with pytest.raises(ValueError, match="2 seed"):
        paired_p_value([1.0, 2.0], [1.0])


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.4: times 4, 3, 2, 1, then never falling
    adjusted = adjusted_p_values([0.03, 0.01, 0.4, 0.02])
    np.testing.assert_allclose(adjusted, [0.06, 0.04, 0.4, 0.06])
    assert adjusted_p_values([0.9, 0.8]) == [1.0, 1.0]
    assert adjusted_p_values([]) == []
    with pytest.raises(ValueError, match="p-value=1.5"):
        adjusted_p_values([0.1, 1.5])


def test_false_rejections_are_as_rare_as_promised():
    """Ten true hypotheses a family: any rejection below 5 % in at most 5 % of them."""
    rng = np.random.default_rng(1)
    families = rng.uniform(size=(2000, 10))
    any_rejected = np.mean([min(adjusted_p_values(f)) < 0.05 for f in families])
    assert 0.03 < any_rejected < 0.065


def test_runs_are_paired_by_seed(tmp_path):
    first = write_run(tmp_path / "a", {"main": seeds_of(A)})
    # in another order, with a seed that the first lacks
    other = {3: B[3], 0: B[0], 2: B[2], 1: B[1], 9: 100.0}
    second = write_run(
        tmp_path / "b", {"main": {s: {"loss": v} for s, v in other.items()}}
    )
    (row,) = comparison_rows([read_run(first), read_run(second)])
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
    assert report.main(["--compare", f"{run}:plain", f"{run}:ours"]) == 0
    out = capsys.readouterr().out
    assert "loss" in out and "steps" in out and f"{run}:ours" in out
    whole = read_run(run)
    assert whole.seeds[0] == {
        "ours/loss": 1.5,
        "ours/steps": 3.0,
        "plain/loss": 1.0,
        "plain/steps": 3.0,
    }
    report.main(["--compare", f"{run}:plain", f"{run}:ours", "--metrics", "loss"])
    assert "steps" not in capsys.readouterr().out


def test_two_devices_are_said(tmp_path, capsys):
    first = write_run(tmp_path / "a", {"main": seeds_of(A)})
    second = write_run(tmp_path / "b", {"main": seeds_of(B)}, device="h100")
    report.main(["--compare", first, second])
    assert "different devices: cpu, 2 cores; h100" in capsys.readouterr().out


def test_a_seed_that_diverged_is_shown_and_not_averaged_away(tmp_path):
    first = write_run(tmp_path / "a", {"main": seeds_of(A)})
    bad = write_run(tmp_path / "b", {"main": seeds_of([1.0, float("nan"), 2.0, 3.0])})
    (row,) = comparison_rows([read_run(first), read_run(bad)])
    assert np.isnan(row["mean"]) and row["p"] is None and row["difference"] is None


def test_bad_comparisons(tmp_path):
    first = write_run(tmp_path / "a", {"main": seeds_of(A)})
    second = write_run(tmp_path / "b", {"main": {7: {"loss": 1.0}}})
    third = write_run(tmp_path / "c", {"x": seeds_of(A), "y": seeds_of(A)})
    with pytest.raises(ValueError, match="1 run.s. to compare"):
        comparison_rows([read_run(first)])
    with pytest.raises(
        ValueError, match=r"seeds \[0, 1, 2, 3\].* \[7\]: none in common"
    ):
        comparison_rows([read_run(first), read_run(second)])
    with pytest.raises(ValueError, match="share no metric .* choose an arm"):
        comparison_rows([read_run(first), read_run(third)])
    with pytest.raises(ValueError, match="do not share 'lss'.*Did you mean 'loss'"):
        comparison_rows([read_run(first), read_run(f"{third}:x")], ["lss"])
    with pytest.raises(ValueError, match="has no arm 'z'; it has x, y"):
        read_run(f"{third}:z")
    with pytest.raises(FileNotFoundError, match="summary.json is not there"):
        read_run(str(tmp_path))
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match="odd.json is no summary"):
        read_run(str(tmp_path / "odd.json"))


CONFIG = "--config=configs/flow_matching.py:smoke"


@pytest.fixture
def executed(monkeypatch):
    """Runs that only write the summary; the list of what they were asked."""
    calls = []

    def execute(flags, overrides):
        rate = float(dict(o.split("=") for o in overrides)["optimizer.learning_rate"])
        calls.append((flags.workdir, flags.cache, tuple(overrides)))
        values = [rate, 2 * rate, 4 * rate]
        write_run(flags.workdir, {"main": seeds_of(values)})
        return Outcome(0, {})

    monkeypatch.setattr(run_command, "execute", execute)
    return calls


def test_a_sweep_runs_every_combination_and_compares(tmp_path, executed, capsys):
    arguments = [
        CONFIG,
        "--seeds=0..2",
        f"--workdir={tmp_path}",
        "--config.train.steps=30",
        "--sweep.optimizer.learning_rate=1e-3,3e-3",
        "--sweep.train.drop_rate=0.0,0.1",
    ]
    assert sweep.main(arguments) == 0
    names = [folder.name for folder, _, _ in executed]
    assert names == [
        "learning_rate=1e-3_drop_rate=0.0",
        "learning_rate=1e-3_drop_rate=0.1",
        "learning_rate=3e-3_drop_rate=0.0",
        "learning_rate=3e-3_drop_rate=0.1",
    ]
    assert {cache for _, cache, _ in executed} == {tmp_path / "stages"}
    assert executed[0][2] == (
        "train.steps=30",
        "optimizer.learning_rate=1e-3",
        "train.drop_rate=0.0",
    )
    table = (tmp_path / "sweep.txt").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "learning_rate=3e-3_drop_rate=0.1" in table


def test_a_sweep_that_is_stopped_says_so(tmp_path, monkeypatch):
    for code in (143, 0):  # by a signal, or because the time was up
        calls = []

        def execute(flags, overrides, calls=calls, code=code):
            calls.append(flags.max_seconds)
            write_run(flags.workdir, {"main": seeds_of([1.0])})  # of fewer seeds
            return Outcome(code, {}, finished=False)

        monkeypatch.setattr(run_command, "execute", execute)
        arguments = [CONFIG, f"--workdir={tmp_path}", "--sweep.train.drop_rate=0.0,0.1"]
        assert sweep.main([*arguments, "--max_seconds=9"]) == code
        assert len(calls) == 1 and 8 < calls[0] <= 9
        assert not (tmp_path / "sweep.txt").exists()


def test_stages_and_sizes_of_a_sweep(tmp_path, monkeypatch, capsys):
    calls = []
    arguments = [CONFIG, f"--workdir={tmp_path}", "--sweep.train.drop_rate=0.0,0.1"]
    monkeypatch.setattr(
        run_command,
        "execute",
        lambda flags, overrides: calls.append(flags.stage) or Outcome(0, None),
    )
    assert sweep.main([*arguments, "--stage=train"]) == 0
    assert calls == ["train", "train"] and not (tmp_path / "sweep.txt").exists()
    assert sweep.main([*arguments, "--dry_run"]) == 0
    assert len(calls) == 2 and capsys.readouterr().out.count("to run") == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG], "give --sweep.a.b=v,w"),
        ([CONFIG, "--sweep.train.steps="], "is not like --sweep.a.b=v,w"),
        ([CONFIG, "--sweep.train.steps=3,3"], "is not like --sweep.a.b=v,w"),
        ([CONFIG, "--sweep.a=1,2", "--sweep.a=3,4"], "--sweep.a stands twice"),
        (["--sweep.a=1,2"], "give --config="),
        ([CONFIG, "--record", "--sweep.train.steps=3,4"], "--record does not go with"),
        ([CONFIG, "--fresh", "--sweep.train.steps=3,4"], "--fresh does not go with"),
        ([CONFIG, "--list", "--sweep.train.steps=3,4"], "--list does not go with"),
        (
            [CONFIG, "--shard=0/2", "--sweep.train.steps=3,4"],
            "--shard does not go with",
        ),
        ([CONFIG, "--sweep.train.steps=3"], "give two or more values"),
        ([CONFIG, "--sweep.train.steps=(3 4);(3,4)"], "whose letters, digits"),
        (
            [CONFIG, "--metrics", "euler9.x", "--sweep.train.drop_rate=0.0,0.1"],
            "not measured by",
        ),
        (
            [CONFIG, "--stage=tain", "--sweep.train.drop_rate=0.0,0.1"],
            "no stage 'tain'",
        ),
        ([CONFIG, "--sweep.train.stepz=3,4"], "stepz"),
        ([CONFIG, "--sweep.train.batch_size=8,-1"], "batch_size"),
    ],
)
def test_bad_sweeps_run_nothing(arguments, message, executed, as_shipped):
    with pytest.raises((ConfigError, ValueError), match=message):
        sweep.main(arguments)
    assert not executed


def test_values_with_commas():
    assert sweep.grid(["--sweep.a=(1,2);(3,4)"]) == [("a=(1,2)",), ("a=(3,4)",)]
