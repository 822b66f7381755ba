"""Elements that other weights drew: which of them train, and around what.

A text that is written while weights change has tokens of several versions
(:class:`tmdjax.rl.TokenBatch` has them in ``version``). These functions know of
versions and log-probs alone; the weights that correct for them are those of
:mod:`tmdjax.rl.importance_weights`. Where an element does not train, give
``keep=False`` to :mod:`tmdjax.rl.aggregation`, whose denominators still count it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_range
from tmdjax.core.types import Array
from tmdjax.rl.ratios import as_mask, log_ratio, masked


def within_lag(versions: Any, version: Any, max_lag: Any) -> Any:
    """Which tokens were drawn by weights that are not too old.

    Args:
        versions: of the weights that drew each token, integers of any shape; -1 where
            none did (a prompt, padding).
        version: of the weights that are trained, a number >= 0.
        max_lag: how many versions a token may be behind, >= 0.

    Returns:
        bool, of versions' shape and kind (numpy or jax): True where a token was drawn
        and ``version - versions <= max_lag``.

    References:
        AReaL, arXiv 2505.24298, bounds the lag by eta; with ``max_lag=0`` these are the
        tokens that train where partial rollouts are masked (APRIL).
    """
    return (versions >= 0) & (version - versions <= max_lag)


def within_second_moment(
    target_log_prob: Any,
    behaviour_log_prob: Any,
    mask: Any = None,
    *,
    threshold: float,
) -> Array:
    """Which elements are kept so that squared log-ratios are small on average.

    With d = target - behaviour, the elements of the largest d^2 are left out until the
    mean of d^2 over the others is below the threshold. Of all elements at least one is
    kept, that of the smallest d^2; of equal ones the first are. The mean is over the
    whole array: give all tokens of a batch at once, or its parts would have rules of
    their own.

    Args:
        target_log_prob: any shape; of the policy before the update, for the most part.
        behaviour_log_prob: the same shape.
        mask: shape of target_log_prob or of its first axes, or None. Where it is False
            an element neither counts nor is kept, whatever its log-probs.
        threshold: > 0, in squared nats.

    Returns:
        bool, of target_log_prob's shape. A live element whose d is NaN is left out.

    Raises:
        ValueError: shapes that disagree, or a threshold that is not positive.

    References:
        M2PO, arXiv 2510.01161. AReaL's example of it has the threshold 0.04; its code
        takes the mean over a microbatch.
    """
    check_range("threshold", threshold, 0, open_low=True)
    difference = log_ratio(target_log_prob, behaviour_log_prob, mask)
    live = jnp.ones_like(difference) if mask is None else as_mask(mask, difference)
    squares = jax.lax.stop_gradient(difference) ** 2
    squares = jnp.where(live, squares, jnp.inf).ravel()
    order = jnp.argsort(squares)  # stable; those masked out come last, then NaN
    rank = jnp.zeros(len(squares), jnp.int32).at[order].set(jnp.arange(len(squares)))
    # means of the smallest 1, 2, ... of them: they rise
    means = jnp.cumsum(squares[order]) / jnp.arange(1, len(squares) + 1)
    count = jnp.maximum(jnp.sum(means < threshold), 1)
    return (rank < count).reshape(difference.shape) & (live != 0)


def log_linear_proximal(
    log_prob: Any,
    behaviour_log_prob: Any,
    versions: Any,
    version: Any,
    mask: Any = None,
) -> Array:
    """An estimate of the policy before the update, without running it.

    A token that weights v drew has log-prob b then and l under the weights that are
    trained. These began as ``version`` and are on their way to ``version + 1``; the
    policy before the update is taken to lie as far between the two as its version
    does, on a straight line of log-probs:

        b + alpha (l - b),    alpha = (version - v) / (version + 1 - v).

    alpha is 0 where v is ``version`` itself (what was recorded is that policy's), and
    nears 1 for old tokens. It is an estimate: before the first update, where l is that
    policy's, ratios of older tokens to it are exp((1 - alpha) (l - b)), and not 1.

    Args:
        log_prob: of the trained policy, any shape; a constant here.
        behaviour_log_prob: as recorded, the same shape.
        versions: of the weights that drew each element, integers of that shape. Where
            one is -1 (nobody drew it) or above ``version``, alpha is 0.
        version: of the weights before the update, >= 0.
        mask: shape of log_prob or of its first axes, or None; 0 where it is False.

    Returns:
        Log-probs of log_prob's shape, float32, without gradient.

    Raises:
        ValueError: shapes that disagree.

    References:
        AReaL (``prox_logp_method='loglinear'``), whose current version is ours + 1.
    """
    behind = jnp.where(jnp.asarray(versions) >= 0, version - versions, 0)
    behind = jnp.maximum(behind, 0)
    difference = log_ratio(log_prob, behaviour_log_prob, mask)
    found = masked(behaviour_log_prob, mask) + behind / (behind + 1) * difference
    return jax.lax.stop_gradient(found)
