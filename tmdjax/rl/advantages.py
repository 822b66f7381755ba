"""Advantages of samples that share a prompt, a task or a tree depth: a group."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import (
    check_choice,
    check_count,
    check_finite,
    check_range,
    check_same_shape,
)
from tmdjax.core.types import Array, Bool, PerExample

BASELINES = ("mean", "leave_one_out")
SCALES = ("group", "batch", "none")
TIED_STD = 1e-6
"""A group is tied if its population std < TIED_STD * max(1, |mean|)."""


def group_advantages(
    rewards: Any,
    group: Any,
    *,
    num_groups: int,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    clip: float | None = None,
    mask: Any = None,
    allow_singletons: bool = False,
) -> PerExample:
    """How much better a sample is than the others of its group.

    A_i = clip((R_i - baseline_g) / (std + eps), -clip, clip).

    A tied group (population std < 1e-6 max(1, |mean|)) gets exactly 0, whatever
    the scale: dividing rounding noise by a tiny eps would give advantages of
    order 1. Published settings:

    ===================================  =============  =====  ====  ====  ====
    method                               baseline       scale  ddof  eps   clip
    ===================================  =============  =====  ====  ====  ====
    GRPO of language models              mean           group  1     1e-6  none
    Dr. GRPO                             mean           none   -     -     none
    RLOO                                 leave_one_out  none   -     -     none
    Flow-GRPO                            mean           batch  0     1e-4  5
    DanceGRPO, MixGRPO, Euphonium        mean           group  1     1e-8  5
    PromptRL                             mean           group  0     1e-4  5
    PPO over the whole batch (one group) mean           group  1     1e-8  none
    ===================================  =============  =====  ====  ====  ====

    Args:
        rewards: [batch], any real dtype; the maths is float32.
        group: [batch] integers in [0, num_groups). Number prompts, do not compare
            their texts: two prompts of equal text are two groups. Groups may be
            empty, and of different sizes.
        num_groups: static.
        baseline: 'mean' of the group, or mean of its other members.
        scale: divide by the std of the 'group', by that of all rewards of the
            'batch', or by nothing ('none', which ignores ddof and eps).
        ddof: 0 (population std) or 1 (sample std).
        eps: >= 0, added to the std.
        clip: > 0, bound of |A|, or None.
        mask: [batch], False for samples that do not exist (padding) or must not
            count. They get 0, and their reward and group may be anything.
        allow_singletons: whether a group of one sample is no error. It gets 0.

    Returns:
        [batch] float32, without gradient. Under ``jit``, where values cannot be
        refused, a non-finite reward makes its group NaN (the batch, for
        scale='batch') and a group out of range its sample NaN.

    Raises:
        TypeError: group holds no integers.
        ValueError: shapes that disagree, an option outside its range; where the
            arrays are concrete also a non-finite reward, a group out of range, or
            a group of one sample.

    Example:
        >>> group_advantages([1., 3., 5., 5.], [0, 0, 1, 1], num_groups=2,
        ...                  scale="none").tolist()
        [-1.0, 1.0, 0.0, 0.0]

    References:
        GRPO: arXiv 2402.03300 sec. 4.1. Dr. GRPO: arXiv 2503.20783. RLOO: arXiv
        2402.14740. Flow-GRPO: arXiv 2505.05470. DanceGRPO: arXiv 2505.07818.
    """
    rewards, group, live = _samples(rewards, group, num_groups, mask)
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof} must be 0 (population std) or 1 (sample std).")
    check_range("eps", eps, 0)
    _check_clip(clip)
    if not allow_singletons:
        _refuse_singletons(group, live, num_groups)
    groups = _moments(rewards, group, live, num_groups)
    advantages = groups.deviation
    if baseline == "leave_one_out":
        others = jnp.maximum(groups.count - 1, 1)
        advantages = advantages * (groups.count / others)[group]
    signal = live & ~groups.tied[group]
    if scale != "none":
        if scale == "group":
            over, of_sample = groups, group
        else:
            of_sample = jnp.zeros_like(group)
            over = _moments(rewards, of_sample, live, 1)
        std = jnp.sqrt(over.squares / jnp.maximum(over.count - ddof, 1))
        advantages = advantages / jnp.where(signal, std[of_sample] + eps, 1)
    advantages = jnp.where(signal, advantages, 0)
    if clip is not None:
        advantages = jnp.clip(advantages, -clip, clip)
    in_range = (group >= 0) & (group < num_groups)
    return jax.lax.stop_gradient(jnp.where(in_range | ~live, advantages, jnp.nan))


def reward_advantages(
    rewards: Any,
    group: Any,
    weights: Any,
    *,
    clip: float | None = None,
    **options: Any,
) -> PerExample:
    """Weighted sum of the group advantages of several rewards.

    Each reward is normalised by itself, so a reward's units do not matter, only
    its weight; a reward on which a group ties adds exactly 0 there.

    Args:
        rewards: [batch, reward].
        group: [batch] integers in [0, num_groups).
        weights: [reward] finite numbers.
        clip: > 0, bound of the sum's absolute value, or None.
        **options: of :func:`group_advantages`, the same for every reward; num_groups
            must be among them.

    Returns:
        [batch] float32, without gradient.

    Raises:
        TypeError, ValueError: as :func:`group_advantages`; weights of another
            length than the rewards' last axis, or not finite.

    References:
        MixGRPO: arXiv 2507.21802, its option of summed advantages.
    """
    rewards = rewards if isinstance(rewards, jax.Array) else np.asarray(rewards)
    if rewards.ndim != 2:
        raise ValueError(f"rewards has shape {rewards.shape}; give [batch, reward].")
    if np.shape(weights) != rewards.shape[1:]:
        raise ValueError(
            f"weights has shape {np.shape(weights)} but rewards has shape "
            f"{rewards.shape}; give one weight a reward, {rewards.shape[1:]}."
        )
    check_finite(weights, "weights", "Give 0 to leave a reward out.")
    _check_clip(clip)
    each = [group_advantages(reward, group, **options) for reward in rewards.T]
    total = jnp.sum(jnp.stack(each, 1) * jnp.asarray(weights, jnp.float32), axis=1)
    return total if clip is None else jnp.clip(total, -clip, clip)


def sharpen(
    advantages: Any,
    log_prob: Any,
    group: Any,
    right: Any,
    *,
    num_groups: int,
    strength: float = 2.5,
    most: float = 0.5,
    average: str = "group",
) -> PerExample:
    """Raises the advantages of right answers that were unlikely.

    A + min(max(strength (1 - eta), 0), most A) with eta = exp(s - mean of s over the
    group), for right answers of positive advantage; others keep theirs. So a raised
    advantage is at most (1 + most) A, and the sum over a group is no longer 0.

    Args:
        advantages: [batch], of :func:`group_advantages`.
        log_prob: [batch], s: the mean log-prob of an answer's tokens, under the policy
            and the prompt that it was drawn with, in nats. Not finite where there is
            none (no token): that answer keeps its advantage and does not count in the
            mean.
        group: [batch] integers in [0, num_groups).
        right: bool [batch], answers that are right.
        num_groups: static.
        strength: of the bonus, >= 0 and finite; 0 leaves all as they are.
        most: largest bonus, in parts of the advantage, >= 0 and finite; 0 leaves all as
            they are.
        average: the mean of s is over the whole 'group', or its 'right' answers.

    Returns:
        [batch] float32, without gradient.

    Raises:
        TypeError: group holds no integers.
        ValueError: shapes that disagree, an option out of range, or a non-finite
            advantage or group out of range where the arrays are concrete.

    References:
        XRPO, arXiv 2510.06672 (novelty-guided advantage sharpening; which answers the
        mean is over is not said in what was at hand). A version with most |A| would
        move wrong answers too.
    """
    check_range("strength", strength, 0, np.inf, open_high=True)
    check_range("most", most, 0, np.inf, open_high=True)
    check_choice("average", average, ("group", "right"))
    for name, array in (("log_prob", log_prob), ("right", right), ("group", group)):
        check_same_shape(name, array, "advantages", advantages)
    check_finite(advantages, "advantages", "Mend the rewards they come from.")
    advantages, group, _ = _samples(advantages, group, num_groups, None)
    log_prob, right = jnp.asarray(log_prob, jnp.float32), jnp.asarray(right, bool)
    known = jnp.isfinite(log_prob)
    counts = known & right if average == "right" else known
    # 0 where it does not count: what is raised always does
    deviation = _moments(log_prob, group, counts, num_groups).deviation
    bonus = jnp.minimum(
        jnp.maximum(-strength * jnp.expm1(deviation), 0), most * advantages
    )
    raised = right & known & (advantages > 0)
    return jax.lax.stop_gradient(advantages + jnp.where(raised, bonus, 0))


def best_and_worst(
    rewards: Any,
    group: Any,
    num_groups: int,
    best: int,
    worst: int,
    mask: Any = None,
) -> Bool[Array, "batch"]:
    """Marks the best and the worst samples of each group: the ones to train on.

    Samples of a group are ranked by reward, equal rewards by position (the later
    one ranks higher), so exactly best + worst samples a group are kept.

    Args:
        rewards: [batch].
        group: [batch] integers in [0, num_groups).
        num_groups: static.
        best: how many of the highest ranks to keep, static, >= 0.
        worst: how many of the lowest, static, >= 0.
        mask: [batch], False for samples that must not be kept.

    Returns:
        [batch] bool. Under ``jit`` a group of fewer samples is kept whole.

    Raises:
        TypeError: counts or groups that are no integers.
        ValueError: both counts are 0; where the arrays are concrete, a group that
            is not empty has fewer than best + worst samples.

    References:
        DanceGRPO: arXiv 2505.07818, its best-of-n option (4 and 4 of 24).
    """
    best = check_count("best", best, low=0)
    worst = check_count("worst", worst, low=0)
    if best + worst == 0:
        raise ValueError(
            f"best={best} and worst={worst} keep nothing; one of them must be at "
            f"least 1."
        )
    rewards, group, live = _samples(rewards, group, num_groups, mask)
    sizes = _concrete_sizes(group, live, num_groups)
    if sizes is not None and ((sizes > 0) & (sizes < best + worst)).any():
        small = int(np.argmax((sizes > 0) & (sizes < best + worst)))
        raise ValueError(
            f"group {small} has {sizes[small]} sample(s), fewer than best + worst = "
            f"{best + worst}; draw more samples a group or keep fewer."
        )
    # Dead samples go into a group of their own, behind all others.
    group = jnp.where(live, group, num_groups)
    order = jnp.lexsort((rewards, group))
    count = jax.ops.segment_sum(jnp.ones_like(group), group, num_groups + 1)
    start = jnp.cumsum(count) - count
    rank = jnp.zeros_like(group).at[order].set(jnp.arange(group.size)) - start[group]
    return live & ((rank < worst) | (rank >= count[group] - best))


def group_statistics(
    rewards: Any, group: Any, num_groups: int, mask: Any = None
) -> dict[str, Array]:
    """What the logs should say about the rewards of a batch.

    Args:
        rewards: [batch].
        group: [batch] integers in [0, num_groups).
        num_groups: static.
        mask: [batch], False for samples that do not count.

    Returns:
        float32 scalars: ``reward_mean`` over samples, ``reward_group_std``, the
        population std inside a group, averaged over groups, and
        ``tied_group_fraction``, the share of groups without a learning signal.
        Empty groups do not count; without any sample all are 0.

    Raises:
        TypeError, ValueError: as :func:`group_advantages`; a group of one sample is
            tied and no error.
    """
    rewards, group, live = _samples(rewards, group, num_groups, mask)
    groups = _moments(rewards, group, live, num_groups)
    filled = groups.count > 0
    num_filled = jnp.maximum(jnp.sum(filled), 1)
    std = jnp.sqrt(groups.squares / jnp.maximum(groups.count, 1))
    return {
        "reward_mean": jnp.sum(groups.mean * groups.count)
        / jnp.maximum(jnp.sum(groups.count), 1),
        "reward_group_std": jnp.sum(jnp.where(filled, std, 0)) / num_filled,
        "tied_group_fraction": jnp.sum(filled & groups.tied) / num_filled,
    }


class _Moments(NamedTuple):
    count: Array  # [group] live samples
    mean: Array  # [group]
    deviation: Array  # [batch] reward - mean of its group; 0 where not live
    squares: Array  # [group] sum of squared deviations
    tied: Array  # [group] bool


def _moments(rewards: Array, group: Array, live: Array, num_groups: int) -> _Moments:
    def total(x: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(live, x, 0), group, num_groups)

    # Differences to a member of the group are exact where a mean of large rewards
    # is not; ties become exact zeros.
    lowest = jax.ops.segment_min(jnp.where(live, rewards, jnp.inf), group, num_groups)
    count = total(jnp.ones_like(rewards))
    lowest = jnp.where(count > 0, lowest, 0)
    above = rewards - lowest[group]
    mean_above = total(above) / jnp.maximum(count, 1)
    deviation = jnp.where(live, above - mean_above[group], 0)
    squares = total(jnp.square(deviation))
    mean = lowest + mean_above
    std = jnp.sqrt(squares / jnp.maximum(count, 1))
    tied = std < TIED_STD * jnp.maximum(1.0, jnp.abs(mean))
    return _Moments(count, mean, deviation, squares, tied)


def _check_clip(clip: float | None) -> None:
    if clip is not None:
        check_range("clip", clip, 0, open_low=True)


def _samples(
    rewards: Any, group: Any, num_groups: int, mask: Any
) -> tuple[Array, Array, Array]:
    """Checked arrays: rewards float32, group ids, which samples are live."""
    check_count("num_groups", num_groups)
    rewards, group, mask = (
        x if x is None or isinstance(x, jax.Array) else np.asarray(x)
        for x in (rewards, group, mask)
    )
    batch = np.shape(rewards)
    if len(batch) != 1:
        raise ValueError(f"rewards has shape {batch}; give [batch].")
    for name, array in (("group", group), ("mask", mask)):
        if array is not None and np.shape(array) != batch:
            raise ValueError(
                f"{name} has shape {np.shape(array)} but rewards has shape "
                f"{np.shape(rewards)}; give one entry a sample, {batch}."
            )
    if not jnp.issubdtype(group.dtype, jnp.integer):
        raise TypeError(
            f"group has dtype {group.dtype}; give the integer number of "
            f"each sample's group."
        )
    live = np.ones(batch, bool) if mask is None else mask
    _check_values(rewards, group, num_groups, live)
    return (
        jnp.asarray(rewards, jnp.float32),
        jnp.asarray(group),
        jnp.asarray(live).astype(bool),
    )


def _check_values(rewards: Any, group: Any, num_groups: int, live: Any) -> None:
    if isinstance(live, jax.core.Tracer) or isinstance(group, jax.core.Tracer):
        return
    live, group = np.asarray(live).astype(bool), np.asarray(group)
    outside = live & ((group < 0) | (group >= num_groups))
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(
            f"group[{first}]={group[first]} is outside [0, {num_groups}); number the "
            f"groups from 0 and set num_groups to how many there are."
        )
    if isinstance(rewards, jax.core.Tracer):
        return
    values = np.asarray(rewards)
    bad = ~np.isfinite(values.astype(np.float32)) & live
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"rewards holds {int(bad.sum())} non-finite value(s), the first is "
            f"{values[first]}, of sample {first} in group {group[first]}. Mend the "
            f"reward, or mask the sample out; it is never replaced silently."
        )


def _concrete_sizes(group: Array, live: Array, num_groups: int) -> np.ndarray | None:
    if isinstance(group, jax.core.Tracer) or isinstance(live, jax.core.Tracer):
        return None
    return np.bincount(np.asarray(group)[np.asarray(live)], minlength=num_groups)


def _refuse_singletons(group: Array, live: Array, num_groups: int) -> None:
    sizes = _concrete_sizes(group, live, num_groups)
    if sizes is None or not (sizes == 1).any():
        return
    raise ValueError(
        f"{int((sizes == 1).sum())} group(s) have a single sample, the first is group "
        f"{int(np.argmax(sizes == 1))}; with nothing to compare, all advantages would "
        f"be 0 there. Draw at least 2 samples a group, or pass allow_singletons=True."
    )
