"""The range of every number that a config may set.

A rule is an interval in text, such as ``"[0, 1)"``; ``" or none"`` after it lets the
setting be switched off. A config file states rules of its own as ``RANGES``, by
'GROUP.SETTING' (an arm's settings have those of their group), by 'SETTING' in any
group, or by 'GROUP.*'. They stand before the rules here; a number without any has
``WHOLE`` or ``NUMBER``. Numbers that are not whole are compared as the float32 that
they become: 1e-46 is 0.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

WHOLE, NUMBER = "[1, 1000000000]", "(0, 1000000]"
_NAMES = {
    # an end is far beyond what anybody means: 1e9 for a rate is a slip of the hand
    "(0, 10]": "learning_rate critic_learning_rate",
    "[0.01, 100]": "sample_shift shift temperature",
    "[0, 10]": "strength weight_decay",
    "[0, 100]": "guidance overlong_factor",
    "[-10, 10]": "time_mean",
    "[0, 1000]": "adversarial_weight attention_levels brownian_coefficient "
    "entropy_coefficient kl_coefficient text_depth",
    "(0, 1000]": "future_weight",
    "(0, 1000000] or none": "clip_norm",
    "(0, inf]": "clip_range",
    # fractions
    "[0, 1)": "drop_rate ema_decay",
    "[0, 1]": "gate map_rate",
    "(0, 1]": "ema_half_life fraction",
    "(0, 1)": "eval_fraction",
    # networks of these are traced before a run, and prompts drawn
    "[1, 200]": "blocks depth num_layers",
    "[1, 1000]": "critic_updates epochs heads inner levels num_heads num_kv_heads "
    "outer patch_size shown updates",
    "[1, 10000]": "problems prompts size",
    "[1, 100000]": "critic_hidden discriminator_width feature_dim frequency_dim "
    "group_size head_dim held_out hidden hidden_size intermediate_size mlp_width "
    "projections shape text_width width",
    "[0, 10000]": "lora_rank",
    # what is held at once, and what is drawn
    "[1, 1000000]": "agents batch batch_size chunk chunks envs length max_new_tokens "
    "microbatch microbatches minibatches num_classes per_prompt samples slots unroll",
    "[0, 1000000]": "diagnosed_samples pack_rows overlong_buffer",
    "[1, 10000000]": "count images noises pairs test_count train_count",
    WHOLE: "iterations prune_interval",
    "[0, 1000000000]": "warmup warmup_steps",
    "[0, 4294967295]": "seeds",  # a key holds 32 bits
    "[-inf, inf]": "method.*",  # its preset knows its settings, and checks them
}
RANGES: Mapping[str, str] = {
    name: rule for rule, names in _NAMES.items() for name in names.split()
}
"""The rules of settings that experiments share, by their names."""


class Range(NamedTuple):
    """An interval of numbers.

    Attributes:
        low: its lower end.
        high: its upper end.
        open_low: whether the lower end lies outside.
        open_high: whether the upper end lies outside.
        optional: whether None may stand for a number.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool
    optional: bool

    def holds(self, number: float) -> bool:
        """Whether a number lies inside; NaN lies nowhere."""
        if isinstance(number, float):
            with np.errstate(over="ignore"):
                number = float(np.float32(number))
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below


def read_range(text: str) -> Range:
    """Reads a rule.

    Raises:
        ValueError: it is not like ``"[0, 1)"`` or ``"(0, inf] or none"``.
    """
    found = re.fullmatch(r"([\[(])(.+), (.+)([\])])( or none)?", text)
    try:
        if found is None:
            raise ValueError
        low, high = float(found[2]), float(found[3])
        if not low <= high or low == high == math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"the range {text!r} is not like '[0, 1)' or '(0, inf] or none'."
        ) from None
    return Range(low, high, found[1] == "(", found[4] == ")", found[5] is not None)


def rule_of(key: str, own: Mapping[str, str] = {}) -> str | None:
    """The rule that is stated for a setting, or None.

    Args:
        key: of the setting, such as 'train.steps' or 'arms.ARM.train.steps'.
        own: rules of the config file.
    """
    parts = key.split(".")
    parts = parts[2:] if parts[0] == "arms" and len(parts) > 2 else parts
    names = (".".join(parts), parts[-1], f"{parts[0]}.*")
    stated = (rules[name] for rules in (own, RANGES) for name in names if name in rules)
    return next(stated, None)


def refused(settings: Mapping[str, Any], own: Mapping[str, str] = {}) -> list[str]:
    """What is wrong with the numbers of a config, one sentence each.

    Args:
        settings: by dotted key; those of claims are not looked at, nor texts.
        own: rules of the config file.
    """
    found = []
    for key, value in settings.items():
        stated = rule_of(key, own)
        if key.startswith("claims."):
            continue
        for number in _numbers(value):
            rule = stated or (WHOLE if isinstance(number, int) else NUMBER)
            if not read_range(rule).holds(number):
                found.append(f"{key}={value} is outside {rule}")
                break
    return found


def _numbers(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
