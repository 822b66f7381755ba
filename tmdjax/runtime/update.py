"""One compiled update of a minibatch, cut into microbatches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tmdjax import rl
from tmdjax.core.types import Array, Params
from tmdjax.rl import ratios
from tmdjax.rl.kl import k3
from tmdjax.runtime.packing import TokenObjective, UpdateBatch
from tmdjax.train.state import TrainState, make_train_step

MAXIMA = ("ratio_error_max", "behaviour_log_ratio_max", "mismatch_max")
"""Metrics of an update that are largest values."""

LogProbs = Callable[[Params, Array, Array, Array], tuple[Array, Array]]
"""``(params, tokens, positions, segments) -> (log-probs, entropies)``, [row, position]
each and aligned with the token they belong to."""


def make_update(
    log_probs: LogProbs,
    objective: TokenObjective,
    optimizer: optax.GradientTransformation,
    *,
    recomputed: bool = False,
) -> Callable[[TrainState, UpdateBatch, Any], tuple[TrainState, dict[str, Array]]]:
    """One update by a minibatch, its microbatches scanned; state donated.

    Args:
        log_probs: of texts under parameters.
        objective: the loss.
        optimizer: optax transformation.
        recomputed: whether ``batch.proximal`` is what training computed under the
            weights of the rollout. If so, the mismatch of rollout and training is taken
            of it; else of the log-probs of this update, which are under those weights
            in the first minibatch alone.

    Returns:
        ``(state, batch, key) -> (state, metrics)``, jitted. Metrics are means over the
        tokens of the minibatch, those named in MAXIMA the largest of any token. The
        others called mismatch are sums, for :func:`tmdjax.rl.mismatch_of`.
        'trained_fraction', the share of the tokens that train, is there where the batch
        has ``keep``.
    """

    def loss_fn(params: Params, part: UpdateBatch, keys: Any) -> Any:
        del keys
        batch: UpdateBatch = jax.tree.map(lambda x: x[0], part)
        texts = batch.texts
        found = log_probs(params, texts.tokens, texts.positions, texts.segments)
        log_prob, entropy = (texts.responses(x) for x in found)
        log_prob = jnp.where(texts.mask, log_prob, 0)
        if batch.version is not None:
            given = log_prob, texts.log_prob, texts.version, batch.version
            estimate = rl.log_linear_proximal(*given, texts.mask)
            batch = dataclasses.replace(batch, proximal=estimate)
        loss, metrics = objective.loss(log_prob, batch)
        if batch.keep is not None:
            metrics = metrics | {"trained_fraction": batch.keep}
        ratio = objective.log_ratio(log_prob, batch)
        low, high = rl.beyond_clip(ratio, batch.clip_range(objective.clip_range))
        away = batch.proximal - texts.log_prob
        live = texts.mask if batch.keep is None else batch.keep
        trained = jnp.where(live, ratios.ratio(away), 0)
        mismatch = rl.mismatch_terms(
            batch.proximal if recomputed else log_prob,
            texts.log_prob,
            texts.mask & batch.as_written[:, None],
        )
        metrics = {
            "entropy": entropy,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "behaviour_log_ratio": jnp.abs(away),
            "behaviour_ratio": trained,
            "behaviour_ratio_square": trained**2,
            # of KL(behaviour || proximal), the tokens being the behaviour's
            "behaviour_kl": k3(-away),
            **mismatch,
            **metrics,
        }
        means = {
            name: jnp.sum(jnp.where(texts.mask, x, 0))
            * (1 if name in mismatch else batch.share)
            for name, x in jax.lax.stop_gradient(metrics).items()
        }
        worst = jnp.max(jnp.where(texts.mask, rl.ratio_error(ratio), 0))
        total = jnp.sum(jnp.where(batch.weight > 0, loss, 0) * batch.weight)
        furthest = jnp.max(jnp.where(texts.mask, jnp.abs(away), 0))
        each = {
            "ratio_error_max": worst,
            "behaviour_log_ratio_max": furthest,
            "mismatch_max": jnp.max(mismatch["mismatch_mean"]),
            **means,
        }
        return total[None], {name: x[None] for name, x in each.items()}

    def update(state: TrainState, batch: UpdateBatch, key: Any) -> Any:
        parts = batch.share.shape[0]

        def whole(params: Params, part: UpdateBatch, keys: Any) -> Any:
            loss, metrics = loss_fn(params, part, keys)  # the step means over parts
            scaled = {k: v * (1 if k in MAXIMA else parts) for k, v in metrics.items()}
            return loss * parts, scaled

        step = make_train_step(
            whole,
            optimizer,
            microbatches=parts,
            reductions=dict.fromkeys(MAXIMA, jnp.max),
        )
        return step(state, batch, key)

    return jax.jit(update, donate_argnums=0)


def check_something_trains(metrics: Sequence[Mapping[str, Any]]) -> None:
    """Refuses an iteration of which the objective's correction rejected every token.

    Args:
        metrics: of each update; 'behaviour_weight' where the objective corrects.

    Raises:
        ValueError: every update has a mean weight of 0: gradients of nothing.
    """
    if metrics and all(found.get("behaviour_weight") == 0 for found in metrics):
        raise ValueError(
            f"behaviour_weight=0 in {len(metrics)} updates: the correction rejected "
            f"every token, as the policy that wrote is too far from the one before "
            f"the update. Raise max_weight, lower eta of the schedule or the learning "
            f"rate, or bound weights instead of rejecting (correction='truncate')."
        )
