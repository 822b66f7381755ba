"""Ranges of numbers in a config, and where they are looked for."""

import math

import pytest

from tmdjax.harness.config import ConfigError, load_config
from tmdjax.harness.ranges import NUMBER, RANGES, WHOLE, read_range, refused, rule_of


def test_ends_belong_to_a_range_or_not():
    for rule, inside, outside in (
        ("[0, 1)", (0, 0.5, 0.0), (1, -1, 1.0, -1e-9, math.nan, math.inf)),
        ("(0, inf]", (1e-3, 7, math.inf), (0, 0.0, -math.inf, math.nan)),
        ("(0, inf)", (1e-3, 1e30), (math.inf, 1e39)),
        ("[1, 5]", (1, 5), (0, 6, 2**80, -(2**80))),
        ("[-inf, inf]", (2**80, -1.0, math.inf), (math.nan,)),
    ):
        found = read_range(rule)
        assert all(map(found.holds, inside)), rule
        assert not any(map(found.holds, outside)), rule
    # as the float32 that it becomes
    assert not read_range("(0, 1)").holds(1e-46)
    assert not read_range("[0, 1)").holds(0.99999999)


def test_every_stated_rule_can_be_read(refused):
    for rule in (*RANGES.values(), WHOLE, NUMBER):
        found = read_range(rule)
        assert found.low < found.high
    for bad in (
        "",
        "0, 1",
        "[1, 0]",
        "[a, 1]",
        "(nan, 1)",
        "[0,1]",
        "[0, 1] or",
        "(,)",
    ):
        refused("is not like", read_range, bad)


def test_the_config_s_own_rules_stand_before_the_shared_ones():
    assert rule_of("train.ema_decay") == RANGES["ema_decay"]
    assert rule_of("arms.a.train.ema_decay") == RANGES["ema_decay"]
    assert rule_of("arms.a.method.window.x") == RANGES["method.*"]
    assert rule_of("train.new") is None
    own = {"train.ema_decay": "[0, 1]", "new": "[2, 3]", "train.*": "[4, 5]"}
    assert rule_of("train.ema_decay", own) == "[0, 1]"
    assert rule_of("rl.ema_decay", own) == RANGES["ema_decay"]
    assert rule_of("arms.a.train.new", own) == "[2, 3]"
    assert rule_of("train.steps", own) == "[4, 5]"


def test_numbers_of_all_kinds_are_looked_at():
    def bad(**settings):
        return [text.split("=")[0] for text in refused(settings, {"low": "[-5, 5]"})]

    assert not bad(steps=1, rate=0.1, on=False, name="-1", grid=(1, (2, 3)), x=None)
    assert not bad(low=-5, claims=1) and bad(low=-6)
    for value in (0, -1, 10**9 + 1, 0.0, -0.5, math.inf, (1, 0), [[2, -1]], (1, 0.0)):
        assert bad(steps=value) == ["steps"], value
    assert refused({"claims.C1.threshold": -1.0}) == []


SOURCE = """
from ml_collections import ConfigDict

TIERS = ("smoke",)
RANGES = {"shift_by": "[-3, 3]", "noise": "[0, inf] or none"}


def get_config(tier):
    train = {"steps": 3, "shift_by": -2, "noise": 1.0, "clip_norm": 1.0}
    arms = {"a": {"train": {"noise": 0.5}}}
    return ConfigDict({"train": train, "method": {"name": "m"}, "arms": arms})
"""


def test_they_are_checked_where_a_config_is_read(tmp_path):
    path = tmp_path / "ranged.py"
    path.write_text(SOURCE)

    def load(*changes):
        return load_config(f"{path}:smoke", changes)

    assert load("train.noise=none").train.noise is None
    assert load("arms.a.train.noise=none").arms.a.train.noise is None
    assert load("train.noise=inf").train.noise == math.inf
    assert load("train.clip_norm=none").train.clip_norm is None
    assert load("method.x=none", "method.y=inf").method.to_dict() == {
        **{"name": "m", "x": None, "y": math.inf}
    }
    for change, words in (
        ("train.steps=0", r"train.steps=0 is outside \[1, 10+\].*RANGES of .*ranged"),
        ("train.shift_by=4", r"train.shift_by=4 is outside \[-3, 3\]"),
        ("arms.a.train.noise=-1", r"arms.a.train.noise=-1.0 is outside \[0, inf\]"),
        ("train.steps=none", "train.steps expects a whole number"),
        ("train.clip_norm=0", r"clip_norm=0.0 is outside \(0, 10+\] or none"),
        ("method.x=nan", "method.x expects a number, text or none, got 'nan'"),
        ("method.name=inf", "method.name expects a text"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(change)
    # also what the config says itself, and rules that are none
    path.write_text(SOURCE.replace('"steps": 3', '"steps": -3'))
    with pytest.raises(ConfigError, match="train.steps=-3 is outside"):
        load()
    path.write_text(SOURCE.replace("[-3, 3]", "-3 to 3"))
    with pytest.raises(ConfigError, match="RANGES of .*'-3 to 3' is not like"):
        load()
    path.write_text(f"{SOURCE}RANGES = ['[1, 2]']\n")
    with pytest.raises(ConfigError, match="RANGES of .* give a dict of rules"):
        load()
