"""Transition Matching Distillation: few outer steps, each a small inner flow.

The student's backbone reads (x_t, t, text) once an outer step; its flow head turns
fresh noise y_1 into a transition y = x_noise - x_data in N inner steps, conditioned on
the backbone's feature m:

    x_{t'} = x_t - (t - t') y,      y_s = (1 - s) y + s y_1,      dy_s/ds = y_1 - y.

Stage 1 (:func:`pretraining_loss`) teaches the head to jump along the inner flow; stage
2 (:func:`generate` under :class:`tmdjax.train.Distillation`) trains the whole rollout
against the teacher's score. Where the paper's text contradicts its own equations, the
corrected form is the default and the printed one an option, see :class:`StudentPlan`.

References:
    Nie et al., Transition Matching Distillation, arXiv 2601.09881.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax import flows
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_batch, check_choice, check_count, check_output
from tmdjax.core.conventions import time_like
from tmdjax.core.types import ApplyFn, Array, Cond, Data, Params, PerExample, SampleKeys

Network = Callable[..., Any]
"""``network(x, t, cond, method='backbone') -> features`` and ``network(y, s, r,
features, method='head') -> [batch, *event]``: a :class:`tmdjax.models.SplitDiT` with
its parameters."""

AVERAGES = ("y1", "ys")
OUTPUTS = ("state", "noise")
SIGNS = ("minus", "plus")


def effective_nfe(outer: int, inner: int, head_blocks: int, depth: int) -> float:
    """M (1 + (N - 1) H / L): block evaluations over the depth.

    Raises:
        ValueError: M or N below 1, or H outside 1 .. L-1.

    References:
        arXiv 2601.09881, eq. 16.

    Example:
        >>> round(effective_nfe(2, 2, 5, 30), 3)
        2.333
    """
    check_count("outer steps M", outer)
    check_count("inner steps N", inner)
    _check_split(head_blocks, depth)
    return outer * (1 + (inner - 1) * head_blocks / depth)


def _check_split(head_blocks: int, depth: int) -> None:
    check_count("head_blocks", head_blocks, 0)
    if not 1 <= head_blocks < depth:
        raise ValueError(
            f"head_blocks={head_blocks} must lie in 1..L-1 = 1..{depth - 1}: of "
            f"L={depth} blocks at least one is the head's and one the backbone's."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentPlan:
    """How a student steps. One plan serves training and sampling.

    Attributes:
        outer_times: t_M .. t_0, decreasing from the noise to exactly 0.
        inner_times: s_N .. s_0, likewise.
        head_blocks: H.
        depth: L.
        average: how the head's answer becomes an average velocity u of the inner
            flow: 'y1' is y_1 - head (eq. 14, with the rollout's own noise y_1); 'ys' is
            (y_s - head) / s. With 'y1' u is no function of the state alone, which
            the MeanFlow identity assumes, and stage 1 alone shrinks samples towards
            their mean; 'ys' is consistent, and equal at s = 1.
        output: a training sample from the inner flow's end y: 'state' is x_t - t y,
            as in sampling; 'noise' is x_1 - y (eq. 15), biased below t = 1.
        sign: f = y - (s - r) u ('minus'), or + as eq. 7 and 13 print, which breaks
            the MeanFlow identity.
    """

    outer_times: tuple[float, ...]
    inner_times: tuple[float, ...]
    head_blocks: int
    depth: int
    average: str = "y1"
    output: str = "state"
    sign: str = "minus"

    def __post_init__(self) -> None:
        for name in ("outer_times", "inner_times"):
            grid = flows.custom_grid(getattr(self, name))
            object.__setattr__(self, name, tuple(map(float, grid)))
        _check_split(self.head_blocks, self.depth)
        check_choice("average", self.average, AVERAGES)
        check_choice("output", self.output, OUTPUTS)
        check_choice("sign", self.sign, SIGNS)

    @property
    def nfe(self) -> float:
        """Effective evaluations of the whole network a sample."""
        outer, inner = len(self.outer_times) - 1, len(self.inner_times) - 1
        return effective_nfe(outer, inner, self.head_blocks, self.depth)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the meta of a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> "StudentPlan":
        """The inverse of :meth:`to_dict`."""
        return cls(**plan)


def make_plan(
    outer_steps: int,
    inner_steps: int,
    head_blocks: int,
    depth: int,
    *,
    outer_shift: float = 10.0,
    inner_shift: float = 10.0,
    start: float = 0.999,
    **options: Any,
) -> StudentPlan:
    """A plan of M outer and N inner steps on shifted grids.

    Args:
        outer_steps: M.
        inner_steps: N.
        head_blocks: H.
        depth: L.
        outer_shift: >= 1; 10 for M = 2 and 5 for M = 4 in the reference.
        inner_shift: >= 1.
        start: t_M = s_N, the latest time that the teacher was trained at.
        **options: of :class:`StudentPlan`.

    Raises:
        ValueError: counts below 1, shifts below 1, a split outside 1 .. L-1.
    """
    return StudentPlan(
        outer_times=tuple(flows.truncated_grid(outer_steps, outer_shift, start)),
        inner_times=tuple(flows.truncated_grid(inner_steps, inner_shift, start)),
        head_blocks=head_blocks,
        depth=depth,
        **options,
    )


def average_velocity(
    network: Network, features: Any, y1: Data, average: str
) -> flows.AverageVelocity:
    """u(y, s, r) of the inner flow, from the head's answers.

    Args:
        network: see :data:`Network`.
        features: from the backbone.
        y1: [batch, *event], the noise that the inner flow started from.
        average: see :class:`StudentPlan`.
    """
    check_choice("average", average, AVERAGES)

    def velocity(y: Data, s: Any, r: Any) -> Data:
        answer = network(y, s, r, features, method="head")
        check_output(answer, y, "the head's answer")
        return y1 - answer if average == "y1" else (y - answer) / time_like(s, y)

    return velocity


def inner_flow(network: Network, features: Any, y1: Data, plan: StudentPlan) -> Data:
    """The transition y [batch, *event] that the head makes of noise y1, in N steps."""
    u = average_velocity(network, features, y1, plan.average)
    times = jnp.asarray(plan.inner_times, jnp.float32)
    jump = u if plan.sign == "minus" else lambda *state: -u(*state)
    return flows.map_endpoints(jump, y1, times, remat=True)


def generate(
    apply_fn: ApplyFn,
    plan: StudentPlan,
    params: Params,
    batch: Any,
    keys: SampleKeys,
    **given: Any,
) -> Data:
    """What stage 2 trains: one outer step from noised data, differentiable throughout.

    Args:
        apply_fn: of a :class:`tmdjax.models.SplitDiT`.
        plan: of the student.
        params: of the student.
        batch: {'x_data': [batch, *event], 'cond': ...}.
        keys: [batch].
        **given: what other code drew, instead of keys: 't' [batch] and 'noise' [batch,
            *event] of the start, 'inner_noise' of the inner flow.

    Returns:
        [batch, *event], the student's sample.

    References:
        arXiv 2601.09881, eq. 15 and 17.
    """
    keys, x, times = prng.split(keys), batch["x_data"], plan.outer_times
    y1 = flows.start_noise(given.pop("inner_noise", keys[:, 1]), x.shape[1:], x.dtype)
    x_t, t, noise = flows.noised_start(x, keys[:, 0], times, **given)
    network = functools.partial(apply_fn, params)
    features = network(x_t, t, batch.get("cond"), method="backbone")
    y = inner_flow(network, features, y1, plan)
    return noise - y if plan.output == "noise" else x_t - time_like(t, x_t) * y


PRETRAINING = flows.FlowMapConfig(guidance=3.0)
"""Settings of stage 1 in the paper (1.3 B): appendix A.2."""


def pretraining_loss(
    params: Params,
    apply_fn: ApplyFn,
    batch: Any,
    keys: SampleKeys,
    plan: StudentPlan,
    config: flows.FlowMapConfig = PRETRAINING,
    null_cond: Cond = None,
    *,
    derivative_apply_fn: ApplyFn | None = None,
) -> tuple[PerExample, dict[str, Array]]:
    """Transition matching MeanFlow: regression of the head along the inner flow.

    Jumps end at the inner time of the plan next below s.

    Args:
        params: of the student; the gradient reaches backbone and head.
        apply_fn: of a :class:`tmdjax.models.SplitDiT`.
        batch: {'x_data': [batch, *event], 'cond': pytree [batch, ...]}.
        keys: [batch].
        plan: of the student.
        config: settings.
        null_cond: the negative condition, a pytree like a row of the condition.
        derivative_apply_fn: the network as the total derivative evaluates it, on the
            same parameters: attention 'xla' for 'jvp', float32 for 'difference'. Its
            head alone runs, on the features of apply_fn's backbone, which are constant
            along the path, in float32. None is apply_fn.

    Returns:
        loss [batch] in [0, 1), and metrics [batch].

    Raises:
        ValueError: guidance or dropping without null_cond; 'jvp' of a network without
            forward mode.

    References:
        arXiv 2601.09881, sec. 3.1 and appendix A.2.
    """
    x_data = batch["x_data"]
    keys = prng.split(keys, 5)
    drops, jumps = flows.draw_roles(keys[:, 0], config)
    s = config.times()(keys[:, 1])
    r = jnp.where(jumps, flows.floor_to_grid(s, plan.inner_times), s)
    t = flows.discrete_time(plan.outer_times[:-1])(keys[:, 2])
    noise, y1 = (prng.normal(keys[:, i], x_data.shape[1:]) for i in (3, 4))
    x_t, y = flows.interpolate(x_data, noise, t), noise - x_data
    y_s = flows.interpolate(y, y1, s)

    def features_of(params: Params, cond: Cond) -> Any:
        return apply_fn(params, x_t, t, cond, method="backbone")

    def velocity(
        apply_fn: ApplyFn, params: Params, features: Any
    ) -> flows.AverageVelocity:
        network = functools.partial(apply_fn, params)
        return average_velocity(network, features, y1, plan.average)

    frozen = jax.lax.stop_gradient(params)
    cond, v = flows.guided_target(
        lambda cond: velocity(apply_fn, frozen, features_of(frozen, cond))(y_s, s, s),
        flows.conditional_velocity(y, y1),
        batch.get("cond"),
        drops,
        null_cond,
        config,
    )
    features = features_of(params, cond)
    u, derivative_of = velocity(apply_fn, params, features), None
    if derivative_apply_fn is not None:
        constant = trees.in_float32(jax.lax.stop_gradient(features))
        derivative_of = velocity(derivative_apply_fn, frozen, constant)
    return flows.flow_map_loss(u, y_s, s, r, v, config, derivative_of=derivative_of)


def sample(
    apply_fn: ApplyFn,
    params: Params,
    noise: Data,
    cond: Cond,
    keys: SampleKeys | Data,
    plan: StudentPlan,
    *,
    trained_plan: StudentPlan | Mapping[str, Any] | None = None,
    allow_mismatch: bool = False,
) -> Data:
    """Samples: M outer steps, N inner ones each, no guidance.

    The outer moves are deterministic; each inner flow starts from fresh noise, so one
    starting noise gives many samples.

    Args:
        apply_fn: of a :class:`tmdjax.models.SplitDiT`.
        params: of the student.
        noise: [batch, *event], standard normal; scaled by the first outer time here, so
            that latents which other code has scaled are divided by it first.
        cond: pytree of [batch, ...], or None.
        keys: [batch]; or the inner noises themselves, [outer step, batch, *event].
        plan: to sample with.
        trained_plan: what the student was trained with (``meta['plan']`` of a finished
            run); None does not compare.
        allow_mismatch: sample another plan than the trained one all the same.

    Returns:
        [batch, *event] at t = 0.

    Raises:
        ValueError: another plan than it was trained with, noises of another shape.

    Warns:
        UserWarning: likewise, where allow_mismatch is set.
    """
    if trained_plan is not None:
        _compare(plan, trained_plan, allow_mismatch)
    network = flows.as_pytree(functools.partial(apply_fn, params))
    return _sample(network, noise, cond, keys, plan)


@functools.partial(jax.jit, static_argnames="plan")
def _sample(network: Any, noise: Data, cond: Any, keys: Any, plan: StudentPlan) -> Data:
    times = jnp.asarray(plan.outer_times, jnp.float32)
    if given := jnp.issubdtype(keys.dtype, jnp.floating):
        check_batch("noise of the outer steps", keys, len(times) - 1)
        check_batch("noise of an outer step", keys[0], len(noise))

    def step(x: Data, i: Array) -> tuple[Data, None]:
        t = jnp.broadcast_to(times[i], x.shape[:1])
        features = network(x, t, cond, method="backbone")
        own = keys[i] if given else prng.fold_in(keys, i)
        y1 = flows.start_noise(own, x.shape[1:], x.dtype)
        y = inner_flow(network, features, y1, plan)
        return x - (times[i] - times[i + 1]) * y, None

    return jax.lax.scan(step, times[0] * noise, jnp.arange(len(times) - 1))[0]


def _compare(plan: StudentPlan, trained: Any, allowed: bool) -> None:
    if not isinstance(trained, StudentPlan):
        trained = StudentPlan.from_dict(trained)
    ours, theirs = (
        {k: _rounded(v) for k, v in each.to_dict().items()} for each in (plan, trained)
    )
    differing = [
        f"{name}={value}, trained with {theirs[name]}"
        for name, value in ours.items()
        if value != theirs[name]
    ]
    text = f"this student samples another plan than its own: {'; '.join(differing)}."
    if differing and not allowed:
        raise ValueError(f"{text} Give its own plan, or set allow_mismatch=True.")
    if differing:
        warnings.warn(text, UserWarning, stacklevel=3)


def _rounded(value: Any) -> Any:
    return [round(x, 6) for x in value] if isinstance(value, tuple) else value
