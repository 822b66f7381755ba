"""Arms: settings of their own over those of all, and methods found by their system."""

import pytest
from ml_collections import ConfigDict

from experiments import run
from experiments.arms import arms, build_method, check_devices, of_arm
from tmdjax import runtime
from tmdjax.harness import ConfigError
from tmdjax.train import flow_rl, on_policy

SETTINGS = {
    "system": "paper",
    "task": {"name": "shapes", "size": 8, "light": {"sun": 1.0, "lamp": None}},
    "train": {"steps": 10, "rate": 0.1},
    "optimizer": {"name": "adamw", "learning_rate": 0.3},
    "method": {"name": "grpo", "scale": "none"},
    "claims": {},
    "arms": {
        "plain": {},
        "long": {"train": {"steps": 20}, "method": {"scale": "batch"}},
        "plainer": {"optimizer": {"name": "sgd"}},
        "larger": {"task": {"name": "shapes", "size": 16, "light": {"lamp": 2}}},
        "words": {"task": {"name": "words", "font": 3}},
        "other": {"method": {"name": "grpo:dapo", "clip_range": (0.1, 0.3)}},
    },
}


def test_an_arm_changes_settings_of_all():
    config = ConfigDict(SETTINGS).lock()
    assert sorted(arms(config)) == sorted(SETTINGS["arms"])
    found = {arm: of_arm(config, arm) for arm in arms(config)}
    assert found["plain"].to_dict() == config.to_dict()
    assert found["long"].train.to_dict() == {"steps": 20, "rate": 0.1}
    assert found["long"].method.to_dict() == {"name": "grpo", "scale": "batch"}
    assert found["larger"].task.size == 16
    assert found["larger"].task.light.to_dict() == {"sun": 1.0, "lamp": 2}
    # settings of an optimiser are those of every other
    assert found["plainer"].optimizer.to_dict() == {"name": "sgd", "learning_rate": 0.3}
    # another task or method has settings of its own
    assert found["words"].task.to_dict() == {"name": "words", "font": 3}
    assert found["other"].method.clip_range == (0.1, 0.3)
    assert "scale" not in found["other"].method
    assert config.to_dict() == SETTINGS  # as it was
    alone = ConfigDict({"train": {"steps": 1}})
    assert arms(alone) == ("main",) and of_arm(alone, "main") is alone


def test_recipes_of_8_bits_are_emulated_where_that_is_allowed(refused, capsys):
    """On a CPU, which has no such products."""

    def config(all_arms, **own):
        groups = {name: {"precision": arm} for name, arm in own.items()}
        return ConfigDict({"precision": all_arms, "arms": groups}).lock()

    plain = {"rollout": "bf16", "train": "bf16"}
    mixed = config(plain, exact={}, narrow={"rollout": "fp8_rollout_only"})
    label = {"float8": "emulated in float32"}
    assert check_devices(config(plain), "gpu") == {} == check_devices(ConfigDict(), "x")
    assert not capsys.readouterr().out
    for tier in ("smoke", "cpu"):
        assert check_devices(mixed, tier) == label
        assert (
            "emulated in float32, slower than bf16 (narrow)" in capsys.readouterr().out
        )
    message = (
        "arm 'narrow': precision.rollout='fp8_rollout_only': 'cpu' .*no float8 .*Use "
        "the recipe 'bf16', or allow_emulation=True: .*that is --allow_emulation;"
    )
    refused(message, check_devices, mixed, "gpu", error=ConfigError)
    flags, _ = run.parse(run.parser(), ["--config=c.py:gpu", "--allow_emulation"])
    allowed = check_devices(mixed, "gpu", allow_emulation=flags.allow_emulation)
    assert allowed == label and run.command(flags, []).endswith(" --allow_emulation")
    for allowed, tier in ((True, "gpu"), (False, "smoke")):
        both = {"rollout": "fp8_block", "train": "fp8_block"}
        given = config(both | {"allow_emulation": allowed})
        if allowed:
            assert check_devices(given, tier) == label
        else:
            message = "arm 'main': precision.rollout='fp8_block'"
            refused(message, check_devices, given, tier, error=ConfigError)


def test_what_an_arm_cannot_change_is_refused(refused):
    for given, words in (
        ({"train": {"step": 3}}, r"arms.x.train.step changes no.*mean 'steps'"),
        ({"trian": {"steps": 3}}, "arms.x.trian is no group.*mean 'train'"),
        ({"method": "grpo"}, "arms.x.method is no group of settings"),
        ({"claims": {"a": 1}}, "arms.x.claims is no group"),
        ({"task": {"light": {"moon": 1}}}, "arms.x.task.light.moon changes no setting"),
        ({"task": {"light": 3}}, r"arms.x.task.light=3 is of another type than \{"),
        ({"train": {"steps": "3"}}, "train.steps='3' is of another type than 10"),
        (None, "arms.x=None is no arm; one is {group: {setting: value}}"),
    ):
        config = ConfigDict({**SETTINGS, "arms": {"x": given}})
        refused(words, of_arm, config, "x", error=ConfigError)
    refused("Did you mean 'words'", of_arm, ConfigDict(SETTINGS), "word")


def test_a_method_is_what_the_preset_of_its_system_makes(refused):
    found = build_method(
        {"name": "grpo", "clip_range": [0.1, 0.3]}, runtime.TokenObjective
    )
    assert found.clip_range == (0.1, 0.3) and found.aggregation == "seq-mean-token-mean"
    found = build_method({"name": "grpo:dapo"}, runtime.TokenObjective)
    assert found.aggregation == "token-mean"
    for name, group in (("branchgrpo", 16), ("flow_grpo:mix_grpo", 12)):
        found = build_method({"name": name}, flow_rl.Setup, (8, 8, 3), steps=20)
        assert found.method.group_size == group and len(found.method.grid) == 21
    for system, ratio in (("policyflow", 1e-4), ("ppo", 1e-4), ("fpo:released", None)):
        found = build_method({"name": system}, on_policy.ControlSetup, settings={})
        assert found.settings.max_ratio_error == ratio


@pytest.mark.parametrize(
    "method, error, words",
    [
        ({}, ConfigError, "name=None: name the method's system, such as 'grpo'"),
        ({"name": "gropo"}, ConfigError, "gropo.py beside the config.*mean 'grpo'"),
        ({"name": "boss"}, ConfigError, "has a function preset"),
        ({"name": "../grpo"}, ConfigError, "has a function preset"),
        ({"name": "ppo"}, ConfigError, "method.name='ppo' makes a ControlSetup"),
        ({"name": "flow_grpo"}, ConfigError, "is no TokenObjective: .*event_shape"),
        ({"name": "grpo:dappo"}, ValueError, "preset='dappo'.*mean 'dapo'"),
        ({"name": "grpo", "scal": 1}, TypeError, "no setting 'scal'.*mean 'scale'"),
    ],
)
def test_a_method_that_is_not_there_is_refused(method, error, words, refused):
    refused(words, build_method, method, runtime.TokenObjective, error=error)


def test_what_the_experiment_gives_a_method_is_changed_there(refused):
    method, words = {"name": "grpo", "length": 3}, "method.length of 'grpo': .*other gr"
    given = method, runtime.TokenObjective
    refused(words, build_method, *given, error=ConfigError, length=4)
