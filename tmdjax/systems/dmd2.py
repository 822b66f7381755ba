"""DMD2-v: a velocity network distilled into few steps by distribution matching.

The student keeps the teacher's form: from a state x_t it predicts x_t - t v(x_t, t).
The losses and their cycle are those of :class:`tmdjax.train.Distillation`.

References:
    DMD2, arXiv 2405.14867; its variant for videos, arXiv 2601.09881, sec. 2.2.
"""

import functools
from typing import Any

import jax

from tmdjax import flows
from tmdjax.core.checks import check_choice
from tmdjax.core.types import ApplyFn, Cond, Data, Grid, Params, SampleKeys

TRANSFERS = ("deterministic", "renoise")


def generate(
    apply_fn: ApplyFn,
    times: Grid,
    params: Params,
    batch: Any,
    keys: SampleKeys,
    **given: Any,
) -> Data:
    """x_t - t v(x_t, t) from noised data, t uniform over the grid's starts.

    Args:
        apply_fn: ``(params, x, t, cond) -> v``.
        times: of the student's steps, see :func:`tmdjax.flows.truncated_grid`.
        params: of the student.
        batch: {'x_data': [batch, *event], 'cond': ...}.
        keys: [batch].
        **given: what other code drew, instead of keys: 't' [batch] and 'noise' [batch,
            *event].

    References:
        arXiv 2601.09881, eq. 17.
    """
    x_t, t, _ = flows.noised_start(batch["x_data"], keys, times, **given)
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
    step_noise: Data | None = None,
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
        step_noise: [steps, batch, *event], the noise of each step of 'renoise' instead
            of keys, to replay what other code drew; the last step, to t = 0, adds none.

    Returns:
        [batch, *event] at t = 0.

    Raises:
        ValueError: 'renoise' without keys or noise, noise of another shape, an
            unknown transfer, a bad grid.
    """
    check_choice("transfer", transfer, TRANSFERS)
    times = flows.custom_grid(times)
    velocity = functools.partial(apply_fn, params)
    if transfer == "deterministic":
        return flows.endpoints(velocity, times[0] * noise, times, cond)
    if keys is None and step_noise is None:
        raise ValueError("transfer='renoise' draws noise: give keys, one a sample.")
    table = flows.make_table("renoise", times)
    return _walk(
        flows.as_pytree(velocity), times[0] * noise, table, cond, keys, step_noise
    )


@jax.jit
def _walk(velocity: Any, x: Data, table: Any, cond: Any, keys: Any, noise: Any) -> Data:
    return flows.rollout(keys, velocity, x, table, cond, noise=noise, store=False)
