"""DMD2-v: a velocity network distilled into few steps by distribution matching.

The student keeps the teacher's form: from a state x_t it predicts x_t - t v(x_t, t).
The losses and their cycle are those of :class:`tmdjax.train.Distillation`.

References:
    DMD2, arXiv 2405.14867; its variant for videos, arXiv 2601.09881, sec. 2.2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax import flows
from tmdjax.core import prng
from tmdjax.core.checks import check_choice
from tmdjax.core.types import ApplyFn, Array, Cond, Data, Grid, Params, SampleKeys

TRANSFERS = ("deterministic", "renoise")


def generate(
    apply_fn: ApplyFn, times: Grid, params: Params, batch: Any, keys: SampleKeys
) -> Data:
    """x_t - t v(x_t, t) from noised data, t uniform over the grid's starts.

    Args:
        apply_fn: ``(params, x, t, cond) -> v``.
        times: of the student's steps, see :func:`tmdjax.flows.truncated_grid`.
        params: of the student.
        batch: {'x_data': [batch, *event], 'cond': ...}.
        keys: [batch].

    References:
        arXiv 2601.09881, eq. 17.
    """
    x_t, t, _ = flows.noised_start(batch["x_data"], keys, times)
    velocity = apply_fn(params, x_t, t, batch.get("cond"))
    return flows.convert(velocity, "velocity", "data", x_t, t)


def sample(
    apply_fn: ApplyFn,
    params: Params,
    noise: Data,
    cond: Cond,
    times: Grid,
    *,
    transfer: str = "deterministic",
    keys: SampleKeys | None = None,
) -> Data:
    """Walks the student's grid from times[0] * noise.

    Args:
        apply_fn: ``(params, x, t, cond) -> v``.
        params: of the student.
        noise: [batch, *event], standard normal; scaled by times[0] here. Latents that
            other code has scaled already are divided by it first.
        cond: pytree of [batch, ...], or None.
        times: the grid it was trained on.
        transfer: 'deterministic' keeps the noise that x_t implies (Euler, eq. 18);
            'renoise' draws it anew (eq. 19).
        keys: [batch], for 'renoise'.

    Returns:
        [batch, *event] at t = 0.

    Raises:
        ValueError: 'renoise' without keys, an unknown transfer, a bad grid.
    """
    check_choice("transfer", transfer, TRANSFERS)
    times = flows.custom_grid(times)
    velocity = functools.partial(apply_fn, params)
    if transfer == "deterministic":
        return flows.endpoints(velocity, times[0] * noise, times, cond)
    if keys is None:
        raise ValueError("transfer='renoise' draws noise: give keys, one a sample.")
    compiled = flows.as_pytree(velocity)
    return _renoise(compiled, times[0] * noise, cond, keys, jnp.asarray(times))


@jax.jit
def _renoise(velocity: Any, x: Data, cond: Any, keys: Any, times: Array) -> Data:
    def step(x: Data, i: Array) -> tuple[Data, None]:
        t = jnp.broadcast_to(times[i], x.shape[:1])
        x_data = flows.convert(velocity(x, t, cond), "velocity", "data", x, t)
        noise = prng.normal(prng.fold_in(keys, i), x.shape[1:], x.dtype)
        return (1 - times[i + 1]) * x_data + times[i + 1] * noise, None

    return jax.lax.scan(step, x, jnp.arange(len(times) - 1))[0]
