"""Optimisers from a handful of numbers, over optax."""

import dataclasses
from typing import Any

import numpy as np
import optax

from tmdjax.core import trees
from tmdjax.core.checks import check_choice, check_count, check_range

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser, schedule and clipping.

    Attributes:
        name: 'adamw', 'adam' or 'sgd'.
        learning_rate: peak value, > 0, finite.
        schedule: after warm-up: 'constant', or 'cosine' or 'linear' decay to 0.
        warmup_steps: linear warm-up from 0; 0 means none.
        total_steps: updates in all; the decay ends there.
        weight_decay: >= 0, decoupled, on matrices only ('adamw'): leaves with less
            than two axes are left alone, and so are those named bias or scale (biases
            of stacked blocks are [layer, features]).
        b1: first-moment decay, in [0, 1).
        b2: second-moment decay, in [0, 1).
        eps: Adam's epsilon, > 0.
        clip_norm: global gradient norm, > 0; None does not clip.

    Raises:
        TypeError: a number of steps that is no integer.
        ValueError: a number out of its range (or not finite), also as float32 holds it
            (a b2 of 1 - 1e-9 is 1 there, an eps of 1e-50 is 0); an unknown name, decay
            without 'adamw', or a schedule without an end.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        positive, decay = {"open_low": True}, {"high": 1}
        spans: dict[str, dict[str, Any]] = {
            **{"learning_rate": positive, "eps": positive, "clip_norm": positive},
            **{"weight_decay": {}, "b1": decay, "b2": decay},
        }
        for name, span in spans.items():
            value = getattr(self, name)
            if name == "clip_norm" and value is None:
                continue
            check_range(f"optimizer.{name}", value, 0, open_high=True, **span)
            with np.errstate(over="ignore"):
                narrow = float(np.float32(value))  # as updates compute with it
            shown = f"optimizer.{name}={value!r} in float32"
            check_range(shown, narrow, 0, open_high=True, **span)
        if self.total_steps is not None:
            check_count("optimizer.total_steps", self.total_steps, 0)
        check_count("optimizer.warmup_steps", self.warmup_steps, 0)
        if self.weight_decay and self.name != "adamw":
            raise ValueError(
                f"optimizer.weight_decay={self.weight_decay} is decoupled decay; use "
                f"optimizer.name='adamw' instead of {self.name!r}."
            )
        if self.schedule != "constant":
            if self.total_steps is None or self.total_steps <= self.warmup_steps:
                raise ValueError(
                    f"optimizer.schedule={self.schedule!r} needs total_steps > "
                    f"warmup_steps, got {self.total_steps} and {self.warmup_steps}."
                )


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the update count."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after: optax.Schedule = optax.constant_schedule(peak)
    else:
        assert config.total_steps is not None
        decay = config.total_steps - warmup
        after = (
            optax.cosine_decay_schedule(peak, decay)
            if config.schedule == "cosine"
            else optax.linear_schedule(peak, 0.0, decay)
        )
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), after], [warmup]
    )


def _is_matrix(name: str, leaf: Any) -> bool:
    return leaf.ndim >= 2 and name.rpartition("/")[2] not in ("bias", "scale")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, the optimiser and its schedule as one optax transformation."""
    schedule = make_schedule(config)
    if config.name == "sgd":
        rule = optax.sgd(schedule)
    else:
        rule = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: trees.map_with_path(_is_matrix, params),
        )
    if config.clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
