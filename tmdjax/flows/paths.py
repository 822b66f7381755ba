"""The linear path between data and noise, and what a network may predict on it.

    x_t = (1 - t) x_data + t x_noise,    t = 1 noise, t = 0 data.

Four parametrisations carry the same information at a state (x, t):

    velocity   v  = x_noise - x_data
    data       x0 = x - t v
    noise      e  = x + (1 - t) v
    score      s  = grad log p_t(x) = -e / t

`data` and `score` say nothing of the velocity at t = 0, `noise` and `score`
nothing at t = 1; conversions there divide by zero and are the caller's to avoid.
Samplers refuse a walk of :func:`as_velocity` that asks there.

References:
    Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003.
"""

from typing import Any

from flax import struct

from tmdjax.core.checks import (
    check_choice,
    check_output,
    check_same_shape,
    check_time,
)
from tmdjax.core.conventions import time_like
from tmdjax.core.functions import VelocityWrapper, as_pytree
from tmdjax.core.types import Array, Cond, Data, Time, Velocity

PARAMETRISATIONS = ("velocity", "data", "noise", "score")


def interpolate(x_data: Data, x_noise: Data, t: Time) -> Data:
    """x_t = (1 - t) x_data + t x_noise, all [batch, *event], t [batch].

    Raises:
        ValueError: a concrete t outside [0, 1], or shapes that differ.
    """
    check_time(t)
    check_same_shape("x_noise", x_noise, "x_data", x_data)
    t = time_like(t, x_data)
    return (1 - t) * x_data + t * x_noise


def conditional_velocity(x_data: Data, x_noise: Data) -> Data:
    """The regression target of flow matching, x_noise - x_data, [batch, *event].

    Raises:
        ValueError: shapes that differ.
    """
    check_same_shape("x_noise", x_noise, "x_data", x_data)
    return x_noise - x_data


def _data_and_noise(value: Array, source: str, x: Array, t: Array) -> tuple[Any, Any]:
    if source == "velocity":
        return x - t * value, x + (1 - t) * value
    if source == "data":
        return value, (x - (1 - t) * value) / t
    noise = value if source == "noise" else -t * value
    return (x - t * noise) / (1 - t), noise


def convert(value: Data, source: str, target: str, x: Data, t: Time) -> Data:
    """Turns one parametrisation into another at the state (x, t).

    Args:
        value: the prediction, [batch, *event].
        source: what `value` is: 'velocity', 'data', 'noise' or 'score'.
        target: what to return, one of the same names.
        x: state, [batch, *event].
        t: time, [batch].

    Returns:
        The prediction as `target`, [batch, *event].

    Raises:
        TypeError: the prediction is not an array of floats.
        ValueError: unknown parametrisation, a prediction of another shape than x, or a
            concrete t outside [0, 1].
    """
    check_choice("source", source, PARAMETRISATIONS)
    check_choice("target", target, PARAMETRISATIONS)
    check_output(value, x, f"the prediction ({source})")
    if source == target:
        return value
    check_time(t)
    t = time_like(t, x)
    if {source, target} == {"noise", "score"}:
        return -value / t if target == "score" else -t * value
    data, noise = _data_and_noise(value, source, x, t)
    if target == "score":
        return -noise / t
    return {"data": data, "noise": noise, "velocity": noise - data}[target]


def as_velocity(predict: Velocity, source: str) -> Velocity:
    """A network (x, t, cond) -> `source` (one of PARAMETRISATIONS) as a velocity."""
    check_choice("source", source, PARAMETRISATIONS)
    return _Converted(as_pytree(predict), source)


@struct.dataclass(eq=False)
class _Converted(VelocityWrapper):
    source: str = struct.field(pytree_node=False)

    def __call__(self, x: Data, t: Time, cond: Cond = None) -> Data:
        return convert(self.velocity(x, t, cond), self.source, "velocity", x, t)

    def check_times(self, times: Any) -> None:
        """Refuses the ends at which the conversion divides by zero."""
        if self.source in ("noise", "score") and (times == 1).any():
            raise ValueError(
                f"a network that predicts {self.source} says nothing of the velocity "
                f"at t = 1 (division by 1 - t). Begin just below: a grid such as "
                f"flows.truncated_grid(steps, shift), which starts at 0.999."
            )
        if self.source in ("data", "score") and (times == 0).any():
            raise ValueError(
                f"a network that predicts {self.source} says nothing of the velocity "
                f"at t = 0 (division by t), where the last stage of this solver asks. "
                f"Take method='euler' or 'midpoint'."
            )
        super().check_times(times)
