"""MeanFlow: a network of two times that learns to jump along the flow of the data.

References:
    Geng et al., "Mean Flows for One-step Generative Modeling", arXiv 2505.13447.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax import flows
from tmdjax.core import prng
from tmdjax.core.types import ApplyFn, Array, Cond, Data, Grid, Params, PerExample


def meanflow_loss(
    params: Params,
    apply_fn: ApplyFn,
    batch: Any,
    keys: Any,
    config: flows.FlowMapConfig,
    null_cond: Cond = None,
    *,
    derivative_apply_fn: ApplyFn | None = None,
) -> tuple[PerExample, dict[str, Array]]:
    """The normalised loss of the MeanFlow identity, per example.

    Args:
        params: of the network.
        apply_fn: ``(params, x, t, r, cond) -> u``.
        batch: {'x_data': [batch, *event], 'cond': pytree [batch, ...]}.
        keys: [batch].
        config: settings.
        null_cond: the null condition, a pytree like a row of the condition.
        derivative_apply_fn: the network as the total derivative evaluates it, on the
            same parameters: attention 'xla' for 'jvp', float32 for 'difference'.
            None is apply_fn.

    Returns:
        loss [batch] in [0, 1), and metrics [batch].

    Raises:
        ValueError: guidance or dropping without null_cond; 'jvp' of a network without
            forward mode.

    The paper draws the times of images logit-normally (mean -0.4, std 1), with r < t
    for a quarter of the examples; the defaults of :class:`tmdjax.flows.FlowMapConfig`
    keep that quarter, but take uniform times shifted by 3, those of transition matching
    distillation.

    References:
        arXiv 2505.13447, algorithm 1.
    """
    x_data = batch["x_data"]
    keys = prng.split(keys, 4)
    drops, jumps = flows.draw_roles(keys[:, 0], config)
    one, other = config.times()(keys[:, 1]), config.times()(keys[:, 2])
    t = jnp.maximum(one, other)
    r = jnp.where(jumps, jnp.minimum(one, other), t)
    noise = prng.normal(keys[:, 3], x_data.shape[1:], x_data.dtype)
    x_t = flows.interpolate(x_data, noise, t)
    frozen = jax.lax.stop_gradient(params)
    cond, v = flows.guided_target(
        lambda cond: apply_fn(frozen, x_t, t, t, cond),
        flows.conditional_velocity(x_data, noise),
        batch.get("cond"),
        drops,
        null_cond,
        config,
    )

    def velocity(apply_fn: ApplyFn, params: Params) -> flows.AverageVelocity:
        return lambda x, t, r: apply_fn(params, x, t, r, cond)

    u, derivative_of = velocity(apply_fn, params), None
    if derivative_apply_fn is not None:
        derivative_of = velocity(derivative_apply_fn, frozen)
    return flows.flow_map_loss(u, x_t, t, r, v, config, derivative_of=derivative_of)


def sample(
    apply_fn: ApplyFn, params: Params, noise: Data, cond: Cond, times: Grid
) -> Data:
    """Jumps along a grid from times[0] * noise; any number of steps.

    Args:
        apply_fn: ``(params, x, t, r, cond) -> u``.
        params: of the network.
        noise: [batch, *event], standard normal; scaled by times[0] here. Latents that
            other code has scaled already are divided by it first.
        cond: pytree of [batch, ...], or None.
        times: of the jumps, decreasing to 0.

    Returns:
        [batch, *event] at t = 0.
    """
    times = flows.custom_grid(times)
    network = flows.as_pytree(functools.partial(apply_fn, params))
    return _sample(network, times[0] * noise, cond, jnp.asarray(times, jnp.float32))


@jax.jit
def _sample(network: Any, x: Data, cond: Any, times: Array) -> Data:
    return flows.map_endpoints(lambda x, t, r: network(x, t, r, cond), x, times)
