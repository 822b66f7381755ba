"""Chains of Gaussian steps with clips: how a policy that samples in K steps explores.

A sampler of few steps is a Markov chain x_0, ..., x_K once every step adds noise,

    x_{i+1} = mean_i(x_i) + clip(std_i z, -c std_i, c std_i),    z ~ N(0, I),

and the joint density of the chain is a product of Gaussians, whatever the network
inside. A :data:`Transition` says mean and standard deviation of a step; one walk and
one score serve all of them: Euler steps of a flow with learned noise
(:func:`euler_transition`), ancestral steps of a diffusion model
(:func:`tmdjax.flows.ancestral_step`).

What is scored is the state that was clipped, under the Gaussian that was not.

References:
    ReinFlow, arXiv 2505.22094; DPPO, arXiv 2409.00588.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tmdjax import rl
from tmdjax.core import prng
from tmdjax.core.checks import (
    check_batch,
    check_choice,
    check_count,
    check_output,
    check_range,
    check_same_shape,
)
from tmdjax.core.conventions import time_like
from tmdjax.core.types import Array, Cond, Data, PerExample, Time, Velocity
from tmdjax.flows.transition import (
    REDUCTIONS,
    gaussian_log_density,
    gaussian_transition,
    transition_mean,
)

Transition = Callable[[Any, Any, Any], tuple[Any, Any]]
"""``transition(x, row, cond) -> mean, std``: x and mean [batch, *event], row a dict of
columns [batch] each, std > 0 a scalar, [batch] or [batch, *event]."""

_FIRST = (1 << 20) + 1
"""Folded into keys to draw which steps have noise: beyond every step's number, and not
that of :func:`tmdjax.flows.initial_noise`."""


@struct.dataclass
class Chain:
    """States of a walk, and what a policy says of its steps.

    Attributes:
        states: [step + 1, batch, *event], the first is the start.
        log_density: [step, batch, *event], log N of every dimension in nats; None of a
            walk without noise.
        std: [step, batch, *event], standard deviation; None of a walk without noise.
        end: [batch, *event], last state of the walk; None of a chain that was rescored.
        step: int32 [step, batch], which of the walk's steps these are; None is all.
    """

    states: Any
    log_density: Any = None
    std: Any = None
    end: Any = None
    step: Any = None


def bounded_std(raw: Any, low: Any, high: Any) -> Array:
    """A standard deviation in [low, high], on a logarithmic scale.

        log std = log low + (log high - log low) (tanh(raw) + 1) / 2

    Args:
        raw: any shape; 0 gives sqrt(low high), -inf low and +inf high.
        low: > 0, scalar; may be traced, as may high.
        high: >= low. Where the two are equal, raw has no gradient.

    Returns:
        The shape of raw.

    References:
        ReinFlow, arXiv 2505.22094 (its code bounds the logarithm of the variance).
    """
    low, high = jnp.log(low), jnp.log(high)
    return jnp.exp(low + (high - low) * (jnp.tanh(raw) + 1) / 2)


def decayed_bound(done: Any, low: Any, high: Any) -> Array:
    """The highest standard deviation, a scalar, after a share of training, in [0, 1].

    ``high`` in the first 35 %; then half a cosine down to 0.3 low + 0.7 high, where it
    stays. All may be traced.

    References:
        'learn_decay' in ReinFlow's code.
    """
    fallen = jnp.clip((done - 0.35) / 0.65, 0, 1)
    return high - 0.3 * (high - low) * (1 - jnp.cos(jnp.pi * fallen)) / 2


def euler_transition(
    velocity: Velocity,
    std: Callable[[Time, Cond], Any],
    *,
    clip_mean: float | None = None,
) -> Transition:
    """Euler steps of a flow, x - h v, with noise of a given standard deviation.

    The rows are those of an 'ode' table, ``make_table('ode', grid).rows(slice(None),
    float32)``: without noise and clips the walk is the ODE of
    :func:`tmdjax.flows.rollout`, bit for bit. The noise is added to the ODE step, so
    the chain does not keep the marginals of the flow.

    Args:
        velocity: ``(x, t, cond) -> v``; t = 1 is noise.
        std: ``(t [batch], cond) ->`` scalar, [batch] or [batch, *event], > 0.
        clip_mean: means are clipped to +-clip_mean; None leaves them.

    Returns:
        A transition, which refuses a velocity of another shape than x.
    """

    def transition(x: Data, row: Mapping[str, Array], cond: Cond) -> tuple[Data, Any]:
        v = check_output(velocity(x, row["t"], cond), x)
        mean, _ = transition_mean(row, x, v)
        return _clip(mean, clip_mean), std(row["t"], cond)

    return transition


def noisy_chain(
    keys: Any,
    transition: Transition,
    x: Data,
    rows: Mapping[str, Array],
    cond: Cond = None,
    *,
    noisy_steps: int | None = None,
    clip_noise: float | None = None,
    clip_last: float | None = None,
) -> Chain:
    """Walks a chain from x.

    Args:
        keys: typed keys [batch]; step i draws from ``fold_in(key, row['step'])``. None
            walks the means, without noise and densities.
        transition: mean and standard deviation of a step.
        x: start [batch, *event], float32 or float64.
        rows: columns [step] of the steps in the order they are walked, 'step' (int)
            among them.
        cond: pytree of [batch, ...], handed to the transition.
        noisy_steps: how many consecutive steps of each sample have noise, the first of
            them drawn uniformly from its key. The others end in their mean, with
            certainty, so the chain that is returned, to be scored, is of the noisy
            steps alone. None is all of them.
        clip_noise: the noise of a step stays within +-clip_noise standard deviations;
            None does not clip.
        clip_last: the last state stays within +-clip_last; None does not clip.

    Returns:
        The chain; all of it has the gradient that the transition has.

    Raises:
        TypeError: x narrower than float32, or keys that are not typed.
        ValueError: keys of another batch, noisy_steps out of range, a clip that is not
            positive, a mean of another shape than x.
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"the state of a chain is {x.dtype}; give float32 and let the network "
            f"cast: densities of rounded states are wrong."
        )
    for name, clip in (("clip_noise", clip_noise), ("clip_last", clip_last)):
        if clip is not None:
            check_range(name, clip, 0, open_low=True)
    if keys is not None:
        prng.check_key(keys, "keys")
        check_batch("keys", keys, x.shape[0])
    count = len(rows["step"])
    noised = count if noisy_steps is None else check_count("noisy_steps", noisy_steps)
    check_range("noisy_steps", noised, 1, count)
    z = first = None
    if keys is not None:  # all noise in one call: random numbers are slow to compile
        each = prng.fold_in(keys, rows["step"][:, None])
        z = prng.normal(each.reshape(-1), x.shape[1:], x.dtype)
        z = _clip(z.reshape(count, *x.shape), clip_noise)
        if noisy_steps is not None:
            share = prng.uniform(prng.fold_in(keys, _FIRST))
            first = (share * (count - noised + 1)).astype(jnp.int32)

    def step(x: Data, given: tuple[Array, Any, Any]) -> tuple[Data, Any]:
        i, row, z = given
        mean, std = _law(transition, x, _spread(row, x.shape[0]), cond)
        after = mean if z is None else gaussian_transition(mean, std, z)
        if first is not None:
            noisy = (first <= i) & (i < first + noised)
            after = jnp.where(time_like(noisy, x), after, mean)
        after = jnp.where(i == count - 1, _clip(after, clip_last), after)
        if z is None:
            return after, (after, None, None)
        return after, (after, gaussian_log_density(after, mean, std), std)

    # few steps of a small network: all of them are unrolled
    end, (states, density, std) = jax.lax.scan(
        step, x, (jnp.arange(count), dict(rows), z), unroll=min(count, 10)
    )
    states = jnp.concatenate([x[None], states])
    if first is None:
        return Chain(states, density, std, end)
    kept, sample = first + jnp.arange(noised + 1)[:, None], jnp.arange(len(x))
    density, std = (y[kept[:-1], sample] for y in (density, std))
    return Chain(states[kept, sample], density, std, end, kept[:-1])


def rescore_chain(
    states: Array,
    transition: Transition,
    rows: Mapping[str, Array],
    cond: Cond = None,
    step: Array | None = None,
) -> Chain:
    """A chain that was walked, under another policy: one call of the network.

    The steps do not depend on each other once the states are known, so all of them go
    through the network as one batch of step x batch rows.

    Args:
        states: [step + 1, batch, *event], held constant.
        transition: of the policy that is asked; its gradient flows.
        rows: as :func:`noisy_chain` had them.
        cond: pytree of [batch, ...].
        step: int [step, batch], which of the rows belong to the states; None is all.

    Returns:
        The same states with the densities and deviations of that policy.

    Raises:
        ValueError: another number of states than of steps and one.
    """
    steps = len(rows["step"] if step is None else step)
    if states.ndim < 3 or states.shape[0] != steps + 1:
        raise ValueError(
            f"a chain of {steps} steps has shape {tuple(states.shape)}; its states are "
            f"[{steps + 1}, batch, *event], start and end included."
        )
    states = jax.lax.stop_gradient(states)
    batch = states.shape[1]
    x, after = (y.reshape(-1, *y.shape[2:]) for y in (states[:-1], states[1:]))
    repeated = {
        name: jnp.repeat(jnp.asarray(c), batch) if step is None else c[step.reshape(-1)]
        for name, c in rows.items()
    }
    tiled = jax.tree.map(lambda c: jnp.tile(c, (steps,) + (1,) * (c.ndim - 1)), cond)
    mean, std = _law(transition, x, repeated, tiled)
    shape = states[1:].shape
    density = gaussian_log_density(after, mean, std).reshape(shape)
    return Chain(states, density, std.reshape(shape), step=step)


def chain_log_prob(
    chain: Chain, reduction: str = "mean", *, count_start: bool = False
) -> PerExample:
    """Log-density of a whole chain.

    Args:
        chain: with densities.
        reduction: 'sum' over steps and event dimensions, the joint density; or 'mean'
            over both. A ratio of means is the D (steps)-th root of that of the joint
            densities, so a clip range belongs to one of the two.
        count_start: counts the start x_0 ~ N(0, I) as one more step. It cancels in a
            ratio of sums; of means it changes the denominator.

    Returns:
        [batch] in nats (a dimension and step, under 'mean').

    Raises:
        ValueError: an unknown reduction, a chain without noise, or count_start of a
            chain without its start (``noisy_steps``).

    References:
        ReinFlow, arXiv 2505.22094 (its code takes the mean).
    """
    if chain.log_density is None:
        raise ValueError("this chain was walked without noise and has no density.")
    start = chain.states[0]
    first = gaussian_log_density(start, jnp.zeros_like(start), 1.0)
    return _reduced(chain, chain.log_density, first, reduction, count_start)


def chain_entropy(
    chain: Chain, reduction: str = "mean", *, count_start: bool = False
) -> PerExample:
    """Entropy of the Gaussians of a chain's steps, given the states they start from.

    Args:
        chain: with standard deviations.
        reduction: 'sum' over steps and event dimensions, or 'mean' over both.
        count_start: counts that of the start, N(0, I), too.

    Returns:
        [batch] in nats (a dimension and step, under 'mean'), that of an unclipped
        Gaussian.

    Raises:
        ValueError: an unknown reduction, a chain without noise, or count_start of a
            chain without its start (``noisy_steps``).
    """
    if chain.std is None:
        raise ValueError("this chain was walked without noise and has no entropy.")
    each = rl.gaussian_entropy(jnp.log(chain.std)[..., None])
    first = rl.gaussian_entropy(jnp.zeros_like(chain.std[0])[..., None])
    return _reduced(chain, each, first, reduction, count_start)


def _reduced(
    chain: Chain, each: Array, first: Array, reduction: str, count_start: bool
) -> PerExample:
    check_choice("reduction", reduction, REDUCTIONS)
    if count_start and chain.step is not None:
        raise ValueError(
            "count_start=True, and this chain is of its noisy steps alone, without its "
            "start; leave count_start out."
        )
    if count_start:
        each = jnp.concatenate([first[None], each])
    axes = (0, *range(2, each.ndim))
    return (jnp.mean if reduction == "mean" else jnp.sum)(each, axis=axes)


def _law(transition: Transition, x: Data, row: Any, cond: Cond) -> tuple[Data, Data]:
    """Mean and standard deviation of a step, both [batch, *event]."""
    mean, std = transition(x, row, cond)
    check_same_shape("the mean of a transition", mean, "its state x", x)
    std = jnp.asarray(std, x.dtype)
    std = std.reshape(std.shape + (1,) * (x.ndim - std.ndim)) if std.ndim else std
    return mean, jnp.broadcast_to(std, x.shape)


def _spread(row: Mapping[str, Array], batch: int) -> dict[str, Array]:
    """The scalars of one row as columns [batch]."""
    return {name: jnp.broadcast_to(c, (batch,)) for name, c in row.items()}


def _clip(x: Array, bound: float | None) -> Array:
    return x if bound is None else jnp.clip(x, -bound, bound)
