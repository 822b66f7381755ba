import json
import math
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, FrozenConfigDict

from tmdjax.harness import find
from tmdjax.harness.config import (
    ConfigError,
    config_hash,
    differences,
    flatten,
    from_plain,
    load_config,
    to_plain,
)

SOURCE = """
import dataclasses

from ml_collections import ConfigDict, config_dict

TIERS = ("smoke", "cpu")
RANGES = {"train.*": "[-inf, inf]", "model.*": "[-inf, inf]"}


@dataclasses.dataclass
class Local:
    x: "int" = 1


def get_config(tier):
    empty = config_dict.placeholder
    return ConfigDict({
        "name": "digits",
        "train": {
            "steps": 10 if tier == "smoke" else 100, "learning_rate": 1e-3,
            "shuffle": True, "clip": empty(float), "note": empty(str),
            "grid": empty(tuple),
        },
        "model": {
            "hidden": 64, "betas": (0.9, 0.999), "mixed": (1, 0.5, True, "relu"),
            "nested": ((1, 2), (3, 4)), "widths": [8, 16], "free": [],
            "act": ("gelu", "silu"), "dtype": None,
        },
    })
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "digits.py"
    path.write_text(SOURCE)
    return str(path)


def refused(spec, overrides=()):
    """The message of the refusal, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(spec, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tiers_are_loaded_and_locked(config_file):
    assert load_config(f"{config_file}:smoke").train.steps == 10
    config = load_config(f"{config_file}:cpu")
    assert config.train.steps == 100
    with pytest.raises(AttributeError, match="locked"):
        config.train.new = 1


@pytest.mark.parametrize(
    "override, value",
    [
        ("name=a b='c'", "a b='c'"),
        ("name=", ""),
        ("name=x=y", "x=y"),
        ("train.steps=-7", -7),
        ("train.learning_rate=3", 3.0),
        ("train.learning_rate=2e-4", 2e-4),
        ("train.learning_rate=inf", math.inf),
        ("train.shuffle=false", False),
        ("train.shuffle=True", True),
        ("train.clip=0.5", 0.5),
        ("train.clip=none", None),
        ("train.note=off", "off"),
        ("train.grid=(1,0.5,true,a)", (1, 0.5, True, "a")),
        ("model.betas=(0.5, 1)", (0.5, 1.0)),
        ("model.betas=0.5,1", (0.5, 1.0)),
        ("model.betas=[0.5,1,]", (0.5, 1.0)),
        ("model.mixed=(2, 3, false, gelu)", (2, 3.0, False, "gelu")),
        ("model.mixed=(2,3,true,'a,(b')", (2, 3.0, True, "a,(b")),
        ("model.nested=((5,6),(7,8))", ((5, 6), (7, 8))),
        ("model.nested=(5,6),(7,8)", ((5, 6), (7, 8))),
        ("model.widths=1,2,3", [1, 2, 3]),
        ("model.widths=[]", []),
        ("model.free=1,b", [1, "b"]),
    ],
)
def test_overrides(config_file, override, value):
    result = load_config(f"{config_file}:smoke", [override])[override.split("=")[0]]
    assert result == value
    assert type(result) is type(value)
    if isinstance(value, tuple | list):
        assert [type(v) for v in result] == [type(v) for v in value]


ARMS = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

TIERS = ("smoke",)


def get_config(tier):
    return ConfigDict({
        "train": {"steps": 3, "rate": placeholder(float)},
        "task": {"name": "shapes", "size": 8},
        "method": {"name": "ppo"},
        "arms": {"a": {}, "words": {"task": {"name": "words"}}},
    })
"""


def test_an_arm_may_be_given_what_the_config_has_for_all(tmp_path):
    path = tmp_path / "arms.py"
    path.write_text(ARMS)
    changes = "arms.a.train.steps=5 arms.a.train.rate=0.5 arms.a.method.clip=0.1"
    changes += " method.sizes=(4,2) arms.a.method.name=fpo"
    config = load_config(f"{path}:smoke", changes.split())
    assert config.arms.a.train.to_dict() == {"steps": 5, "rate": 0.5}
    assert config.arms.a.method.to_dict() == {"name": "fpo", "clip": 0.1}
    assert config.train.to_dict() == {"steps": 3, "rate": None}
    assert config.method.sizes == (4, 2)
    for change, words in (
        ("arms.a.train.stps=5", "there is no setting 'arms.a.train.stps'"),
        ("arms.a.train.steps=x", "arms.a.train.steps expects a whole number"),
        ("arms.b.train.steps=5", "there is no setting 'arms.b.train.steps'"),
        ("arms.words.task.size=5", "there is no setting 'arms.words.task.size'"),
        ("train.clip=5", "there is no setting 'train.clip'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(f"{path}:smoke", [change])


def test_some_arms_alone_keep_their_own_claims(tmp_path):
    path = tmp_path / "arms.py"
    path.write_text(
        ARMS.replace(
            '"arms": {',
            '"claims": {"1": {"ours": "a/x"}, "2": {"ours": "a/x", "baseline": '
            '"words/x"}}, "one_seed_arms": ("words",), "arms": {',
        )
    )
    for change, arms, claims in (
        ("arms=a", ["a"], ["1"]),
        ("arms=words,a", ["a", "words"], ["1", "2"]),
        ("arms=words", ["words"], []),
        ("arms=", [], []),  # what config.method names
    ):
        config = load_config(f"{path}:smoke", [change])
        assert sorted(config.arms) == arms and sorted(config.claims) == claims
        assert config.one_seed_arms == (("words",) if "words" in arms else ())
    with pytest.raises(ConfigError, match="arms=word: .*Did you mean 'words'"):
        load_config(f"{path}:smoke", ["arms=word"])
    for change, claims in (
        ("claims=2", ["2"]),
        ("claims=2,1", ["1", "2"]),
        ("claims=", []),
    ):
        config = load_config(f"{path}:smoke", [change])
        assert list(config.claims) == claims and len(config.arms) == 2
    with pytest.raises(ConfigError, match="claims=3: claim='3' is not one of '1', '2'"):
        load_config(f"{path}:smoke", ["claims=3"])


def test_a_config_is_loaded_where_the_current_folder_is_on_the_path(monkeypatch):
    """As '' in a notebook and under python -c: it stays, for what a config imports."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(find, "_folder", "")
    find.use_folder(pathlib.Path("configs"))
    assert sys.path[0] == "" and str(pathlib.Path("configs").resolve()) in sys.path


def test_last_override_wins_and_none_comes_back(config_file):
    overrides = ["train.clip=1", "train.steps=3", "train.steps=4", "train.clip=None"]
    config = load_config(f"{config_file}:smoke", overrides)
    assert config.train.steps == 4 and config.train.clip is None


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.steps=1.5", "train.steps expects a whole number, got '1.5'; it is 10"),
        ("train.steps=1e3", "a whole number"),
        ("train.steps=true", "a whole number"),
        ("train.steps=none", "a whole number, got 'none'"),
        ("train.learning_rate=fast", "a number, got 'fast'; it is 0.001"),
        ("train.learning_rate=nan", "a number, got 'nan'"),
        ("train.shuffle=1", "true or false, got '1'"),
        ("train.shuffle=yes", "true or false"),
        ("train.clip=big", "a number or none, got 'big'; it is None"),
        ("model.betas=0.9", "2 value(s) in brackets, got '0.9'"),
        ("model.betas=(1,2,3)", "2 value(s) in brackets"),
        ("model.betas=(0.9,x)", "a number at position 1"),
        ("model.betas=(0.9,0.1", "matching brackets"),
        ("model.betas=()", "2 value(s)"),
        ("model.mixed=(1.5,1,true,a)", "a whole number at position 0"),
        ("model.mixed=(1,1,1,a)", "true or false at position 2"),
        ("model.nested=((1,2),(3,x))", "a whole number at position 1 at position 1"),
        ("model.widths=1,b", "a whole number at position 1"),
        ("model.dtype=bf16", "placeholder(int)"),
    ],
)
def test_wrong_values_name_key_given_and_expected(config_file, override, expected):
    message = refused(f"{config_file}:smoke", [override])
    assert expected in message
    assert f"--config.{override}" in message


@pytest.mark.parametrize(
    "override, suggested",
    [
        ("model.hiden=3", "Did you mean 'model.hidden'?"),
        ("modle.hidden=3", "Did you mean 'model.hidden'?"),
        ("hidden=3", "Did you mean 'model.hidden'?"),
        ("learning_rat=3", "Did you mean 'train.learning_rate'?"),
        ("optimizer.settings.steps=3", "Did you mean 'train.steps'?"),
        ("nam=3", "Did you mean 'name'?"),
        ("train.steps.x=3", "Did you mean 'train.steps'?"),
        ("train={}", "'train' is a group of settings, not one; set one of train.clip"),
        ("train.steps", "write --config.train.steps=<value>"),
        ("train.step", "Did you mean 'train.steps'?"),
        ("a\nb=1", "no setting"),
    ],
)
def test_wrong_keys_suggest_the_nearest(config_file, override, suggested):
    assert suggested in refused(f"{config_file}:smoke", [override])


SAFE = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(-(2**70), 2**70),
    rate=st.floats(allow_nan=False),
    shuffle=st.booleans(),
    name=SAFE,
    mixed=st.tuples(st.integers(), st.floats(allow_nan=False), st.booleans(), SAFE),
    widths=st.lists(st.integers()),
)
def test_override_round_trip(config_file, steps, rate, shuffle, name, mixed, widths):
    overrides = [f"train.steps={steps}", f"train.learning_rate={rate!r}"]
    overrides += [f"train.shuffle={str(shuffle).lower()}", f"name={name}"]
    overrides += [f"model.mixed={mixed!r}", f"model.widths={widths!r}"]
    config = load_config(f"{config_file}:smoke", overrides)
    assert config.train.steps == steps
    assert config.train.learning_rate == rate
    assert config.train.shuffle is shuffle
    assert config.name == name
    assert config.model.mixed == mixed
    assert config.model.widths == widths


HEAD = "from ml_collections import ConfigDict, config_dict\nTIERS = ('a',)\n"


GET = "def get_config(tier): "


def test_missing_file_suggests_the_nearest(config_file, tmp_path, monkeypatch):
    message = refused(config_file.replace("digits", "digts") + ":smoke")
    assert f"Did you mean {config_file!r}?" in message
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    message = refused("configs/x.py:cpu")
    assert "'configs/x.py' does not exist" in message
    assert "Did you mean" not in message
    for name in ("flow_matching", "boss", "__init__"):
        (tmp_path / "configs" / f"{name}.py").write_text("")
    for spec in ("flow_maching:cpu", "flow_matching", "config/flow-matching.py:cpu"):
        assert "Did you mean 'configs/flow_matching.py'?" in refused(spec)


def test_missing_and_wrong_tier_list_the_tiers(config_file):
    for spec in (config_file, f"{config_file}:"):
        message = refused(spec)
        assert f"write {config_file}:smoke (tiers: smoke, cpu)" in message
    message = refused(f"{config_file}:smok")
    assert "no tier 'smok'; its tiers: smoke, cpu. Did you mean 'smoke'?" in message


@pytest.mark.parametrize(
    "source, expected",
    [
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first second"),
        ("def (", "failed at import: SyntaxError"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("raise SystemExit(0)", "failed at import: SystemExit: 0"),
        ("", "defines no get_config; add"),
        (f"{GET}...", "must define TIERS, a tuple"),
        (f"TIERS = ['a']\n{GET}...", "it has ['a']"),
        (f"{HEAD}{GET}...", "returned NoneType"),
        (f"{HEAD}{GET}return {{}}['b']", "get_config('a') of"),
        (f"{HEAD}{GET}raise SystemExit", "raised SystemExit"),
    ],
)
def test_broken_config_files(tmp_path, source, expected):
    path = tmp_path / "broken.py"
    path.write_text(source)
    message = refused(f"{path}:a")
    assert expected in message and str(path) in message


def test_values_that_are_no_settings_are_named(tmp_path):
    path = tmp_path / "values.py"
    path.write_text(f"{HEAD}{GET}return ConfigDict({{'m': {{'f': (1, object())}}}})")
    assert "m.f[1] is of type object; allowed are bool" in refused(f"{path}:a")
    path = tmp_path / "required.py"
    value = "{'m': {'path': config_dict.required_placeholder(str)}}"
    path.write_text(f"{HEAD}{GET}return ConfigDict({value})")
    words = "m.path has no value yet; give --config.m.path=<value>"
    assert words in refused(f"{path}:a")
    assert load_config(f"{path}:a", ["m.path=x"]).m.path == "x"


def test_linked_fields_move_together(tmp_path):
    path = tmp_path / "linked.py"
    path.write_text(
        f"{HEAD}{GET}\n"
        "    config = ConfigDict({'steps': 1})\n"
        "    config.total = config.get_ref('steps')\n"
        "    config.twice = 2 * config.get_ref('steps')\n"
        "    return config\n"
    )
    config = load_config(f"{path}:a", ["steps=5"])
    assert (config.total, config.twice) == (5, 10)


def test_to_plain_is_json_and_comes_back():
    tree = {"a": {"b": (1, 2.5), "c": None}, "d": np.float32(0.5), "e": [True, "x"]}
    plain = {"a": {"b": [1, 2.5], "c": None}, "d": 0.5, "e": [True, "x"]}
    assert to_plain(ConfigDict(tree)) == plain
    assert to_plain(FrozenConfigDict(tree)) == plain
    odd = to_plain({"x": (math.nan, math.inf, -math.inf), "y": np.float64("inf")})
    assert odd == {"x": ["nan", "inf", "-inf"], "y": "inf"}
    back = from_plain(json.loads(json.dumps(odd, allow_nan=False)))
    assert math.isnan(back["x"][0])
    assert back["x"][1:] == [math.inf, -math.inf] and back["y"] == math.inf


def test_flatten_keeps_lists_and_empty_groups():
    plain = {"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": {}}
    assert flatten(plain) == {"a.b.c": 1, "a.d": [{"e": 2}], "f": {}}


def test_differences_lists_changes_in_key_order():
    old = {"train": {"steps": 100, "clip": None}, "name": "a", "same": 1}
    new = {"train": {"steps": 200, "rate": 0.1}, "name": "b", "same": 1}
    assert differences(old, new) == [
        'name: "a" -> "b"',
        "train.clip: null -> (absent)",
        "train.rate: (absent) -> 0.1",
        "train.steps: 100 -> 200",
    ]


PLAIN = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        st.one_of(st.integers(0, 1), st.booleans(), st.sampled_from([0.0, 1.0, "1"])),
        lambda inner: st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        max_leaves=3,
    ),
)


@settings(max_examples=60, deadline=None)
@given(PLAIN, PLAIN)
def test_hash_and_differences_agree(old, new):
    assert (config_hash(old) == config_hash(new)) == (differences(old, new) == [])


def test_hash_is_stable_and_blind_to_order():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    # printf '{"a":1}' | sha256sum
    assert config_hash({"a": 1}) == "015abd7f5cc57a2d"
