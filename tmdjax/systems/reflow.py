"""Reflow: straight lines between noise and what a fine solver made of it.

References:
    Liu et al., "Flow Straight and Fast", ICLR 2023, arXiv 2209.03003.
"""

from collections.abc import Mapping
from typing import Any

from tmdjax import flows, train
from tmdjax.core.types import ApplyFn, Params


def pair_loss(
    params: Params,
    apply_fn: ApplyFn,
    batch: Mapping[str, Any],
    keys: Any,
    time_sampler: flows.TimeSampler | None = None,
) -> Any:
    """Flow matching along the line of each pair, per example.

    Args:
        params: of the network.
        apply_fn: ``(params, x, t, cond) -> v``.
        batch: 'x_noise' and 'x_data' [batch, *event], and 'cond' if there is one.
        keys: [batch].
        time_sampler: draws the times, keys -> t [batch]; None is uniform.

    Returns:
        loss [batch] and metrics [batch].
    """
    return flows.flow_matching_loss(
        params,
        apply_fn,
        batch["x_data"],
        keys,
        batch.get("cond"),
        x_noise=batch["x_noise"],
        time_sampler=time_sampler,
    )


def rectify(
    params: Params,
    apply_fn: ApplyFn,
    pairs: Mapping[str, Any],
    *,
    steps_distilled: int | None = None,
    **options: Any,
) -> train.FineTuned:
    """Regresses a network onto the lines between noise and its samples.

    Args:
        params: of the pretrained network.
        apply_fn: ``(params, x, t, cond) -> v``; arrays that it holds by
            ``functools.partial`` are not compiled in.
        pairs: 'x_noise' and 'x_data' [samples, *event], and 'cond' if there is one.
        steps_distilled: k regresses at the k times of a uniform Euler grid alone
            (Distill-k-Reflow); None at all times (Uniform-Reflow).
        **options: of :func:`tmdjax.train.fine_tune`.

    References:
        arXiv 2209.03003, sec. 2, and sec. 2.3 of distillation; both are the baselines
        of arXiv 2312.16414, table 2.
    """
    sampler = None
    if steps_distilled is not None:
        sampler = flows.discrete_time(flows.uniform_grid(steps_distilled)[:-1])

    def loss(params: Params, batch: Any, keys: Any, apply_fn: ApplyFn) -> Any:
        return pair_loss(params, apply_fn, batch, keys, sampler)

    constants = flows.as_pytree(apply_fn)
    return train.fine_tune(params, loss, pairs, constants=constants, **options)
