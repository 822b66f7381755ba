"""Extremes of every setting of every smoke tier, and files that are none of ours."""

import json
import math
import pathlib
import random

import numpy as np
import pytest

from experiments import report, run
from tmdjax.core.failures import raised_on_purpose
from tmdjax.harness import ConfigError, load_config
from tmdjax.harness.config import _fields, load_module
from tmdjax.harness.ranges import NUMBER, WHOLE, read_range, rule_of

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("*.py"))


def settings_of(name):
    """Every number of a smoke tier by key, one a tuple, and its rule."""
    path = f"configs/{name}.py"
    own, found = getattr(load_module(pathlib.Path(path)), "RANGES", {}), {}
    for key, (holder, field) in _fields(load_config(f"{path}:smoke")).items():
        value = holder[field]
        first = value[0] if isinstance(value, tuple) and value else value
        kinds = bool | int | float
        if isinstance(first, bool) or not isinstance(first, kinds):
            continue
        if key.startswith("claims."):
            continue
        rule = rule_of(key, own) or (WHOLE if isinstance(first, int) else NUMBER)
        found[key] = (value, first, rule)
    return found


def overrides(key, value, first, numbers):
    """Each number in the place of the setting, or of the first of its tuple."""
    for number in numbers:
        if isinstance(first, int):
            number = int(number)
        text = repr(number)
        if isinstance(value, tuple):
            text = f"({', '.join(map(repr, (number, *value[1:])))},)"
        yield f"{key}={text}"


def outside(key, value, first, rule):
    """Numbers that no setting of that rule may have."""
    found, wide = read_range(rule), isinstance(first, float)
    numbers = [found.low - 1, found.high + 1, 2.0**70, -(2.0**70)]
    numbers += [found.low] * found.open_low + [found.high] * found.open_high
    numbers = [n for n in numbers if math.isfinite(n) and not found.holds(n)]
    numbers += [n for n in (math.inf, -math.inf) if wide and not found.holds(n)]
    return [*overrides(key, value, first, numbers), f"{key}=nan", f"{key}=1e999x"]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_lies_outside_is_refused_where_the_config_is_read(name):
    cases = [c for k, v in settings_of(name).items() for c in outside(k, *v)]
    for change in random.Random(0).sample(cases, 25):
        with pytest.raises(ConfigError) as caught:
            load_config(f"configs/{name}.py:smoke", [change])
        assert change.partition("=")[0] in str(caught.value), change


def inside(key, value, first, rule):
    """The ends of a range, and numbers near them."""
    found = read_range(rule)
    ends = [found.low, found.low + 1, found.high, 1e9, 1e-30, 0.0, 1.0, -1.0]
    ends += [math.inf, -math.inf] if isinstance(first, float) else []
    if isinstance(first, int):
        ends = [int(n) for n in ends if math.isfinite(n)]
    return overrides(
        key, value, first, dict.fromkeys(n for n in ends if found.holds(n))
    )


def tried(name, changes, folder):
    """Changes by how their dry run ends; raw is an error that nobody raised on purpose."""
    ends = {"accepted": [], "refused": [], "raw": []}
    for change in changes:
        command = [f"--config=configs/{name}.py:smoke", f"--config.{change}"]
        try:
            run.main([*command, "--dry_run", f"--workdir={folder}/run"])
        except Exception as error:
            raw = not raised_on_purpose(error) or isinstance(error, AssertionError)
            ends["raw" if raw else "refused"].append((change, str(error)))
        else:
            ends["accepted"].append(change)
    return ends


def sweep(name, folder):
    """Tries all ends of all ranges of a config; the last line printed is JSON."""
    cases = [c for k, v in settings_of(name).items() for c in inside(k, *v)]
    ends = tried(name, cases, folder)
    print(json.dumps(ends))


@pytest.mark.parametrize("name", ["boss", "grpo"])
def test_a_dry_run_refuses_or_describes(name, tmp_path, as_shipped):
    cases = [c for k, v in settings_of(name).items() for c in inside(k, *v)]
    assert tried(name, random.Random(1).sample(cases, 3), tmp_path)["raw"] == []


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_dry_run_refuses_or_describes(name, tmp_path, run_python):
    """In a process of its own: some hundred programs are traced."""
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/experiments']\n"
        f"from test_extremes import sweep; sweep({name!r}, {str(tmp_path)!r})"
    )
    ends = json.loads(run_python(code, timeout=3600).splitlines()[-1])
    print(name, {end: len(cases) for end, cases in ends.items()})
    assert ends["raw"] == [] and ends["accepted"] and ends["refused"]


def test_what_nobody_means_is_refused(refused):
    for name, changes in {
        "flow_matching": (
            "optimizer.learning_rate=1000",
            "optimizer.weight_decay=1e9",
            "train.batch_size=100000000",
            "sample.guidance=1000",
            "model.hidden=1000000",
        ),
        "flow_grpo": ("arms.dance_grpo.method.strength=1e9", "rollout.shift=1000"),
        "grpo": ("rl.temperature=1e9", "rl.epochs=1000000000"),
        "policyflow": (
            "arms.policyflow_plain.method.brownian_coefficient=1e9",
            "train.envs=1000000000",
        ),
    }.items():
        for change in changes:
            key = change.partition("=")[0]
            path = f"configs/{name}.py:smoke"
            refused(f"{key}=.* is outside", load_config, path, [change])


def test_what_would_fail_after_training_is_refused_before(tmp_path, refused):
    def bad(words, config, *arguments):
        for dry in ((), ("--dry_run",)):
            where = [
                f"--config=configs/{config}.py:smoke",
                f"--workdir={tmp_path / 'r'}",
            ]
            refused(words, run.main, [*where, *arguments, *dry])

    bad(
        "--seeds has 7, but arm 'policyflow' trains only 0", "policyflow", "--seeds=0,7"
    )
    bad("judge.problems=0 is outside", "grpo", "--config.judge.problems=0")
    bad("judge.samples=-1 is outside", "grpo", "--config.judge.samples=-1")
    bad("evaluate.projections=0", "flow_matching", "--config.evaluate.projections=0")
    bad("train.batch_size=600, but", "flow_matching", "--config.train.batch_size=600")
    bad("fine_tune.batch_size=500", "boss", "--config.fine_tune.batch_size=500")
    few = "microbatches=1000000, but a minibatch has [0-9]+ transitions"
    bad(few, "flow_grpo", "--config.rl.microbatches=1000000")
    bad("--seeds=4294967296 is outside", "boss", "--seeds=4294967296")
    bad("has more than 10000 seeds", "boss", "--seeds=0..99999999999")
    bad("--max_seconds=nan is outside", "boss", "--max_seconds=nan")
    bad("--record takes a whole run", "boss", "--record", "--stage=train")
    assert not (tmp_path / "r").exists()


def test_files_that_are_none_of_ours_are_named(tmp_path, refused, monkeypatch, capsys):
    odd = tmp_path / "odd" / "summary.json"
    odd.parent.mkdir()
    for text in ("{", "{}", "[]", "3", "null", '{"units": 3}', "[" * 10**5):
        odd.write_text(text)
        for command in (
            ["--merge", str(odd.parent)],
            ["--compare", str(odd), str(odd)],
        ):
            refused(f"{odd}", report.main, command)
    absent = ["--merge", str(tmp_path / "absent")]
    refused("absent is not there; give a workdir", report.main, absent, error=OSError)
    # a config.json that is not of a run
    for text in ("{", "[]", "{}", '{"config": [1], "tier": "smoke"}'):
        (tmp_path / "odd" / "config.json").write_text(text)
        command = ["--config=configs/boss.py:smoke", f"--workdir={odd.parent}"]
        refused(f"{odd.parent}/config.json", run.main, command)
    # a list of which one file is broken
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "results/good"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs" / "bad.py").write_text("1 / 0")
    good = "TIERS = ('smoke',)\ndef get_config(tier): ..."
    (tmp_path / "configs" / "good.py").write_text(good)
    (tmp_path / "results" / "good" / "smoke.json").write_text("{")
    assert run.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said and "good.py:smoke" in said
    assert "smoke.json is not JSON" in said


def test_seeds_of_one_key_are_refused(tmp_path):
    import jax

    keys = [jax.random.key_data(jax.random.key(s)) for s in (0, 2**32)]
    np.testing.assert_array_equal(*keys)  # why: a key holds 32 bits of a seed
