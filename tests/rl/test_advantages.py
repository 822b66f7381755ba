import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl

GROUP = np.array([0, 1, 0, 2, 1, 0, 2, 1])
REWARDS = np.array([1.0, 0.5, 3.0, -2.0, 0.25, 8.0, 2.0, 0.75], np.float32)
NAMES = ("baseline", "scale", "ddof")
BASELINES, SCALES = ("mean", "leave_one_out"), ("group", "batch", "none")
SETTINGS = [dict(zip(NAMES, s)) for s in itertools.product(BASELINES, SCALES, (0, 1))]


def reference(rewards, group, baseline, scale, ddof, eps):
    """One sample after the other, in float64."""
    rewards, result = np.asarray(rewards, np.float64), []
    for i, g in enumerate(group):
        mine = rewards[group == g]
        others = np.array([rewards[j] for j in np.flatnonzero(group == g) if j != i])
        base = {"mean": mine, "leave_one_out": others}[baseline].mean()
        spread = {"group": mine, "batch": rewards}.get(scale)
        divisor = 1.0 if spread is None else np.std(spread, ddof=ddof) + eps
        result.append((rewards[i] - base) / divisor)
    return np.array(result)


# one program for a shape and its options: run by itself, each operation is one
compiled = jax.jit(
    rl.group_advantages,
    static_argnames=("num_groups", *NAMES, "eps", "clip", "allow_singletons"),
)


def advantages(rewards, group=GROUP, num_groups=3, **options):
    rewards, group = np.asarray(rewards), np.asarray(group)
    return np.asarray(compiled(rewards, group, num_groups=num_groups, **options))


@functools.partial(jax.jit, static_argnums=1)
def _of_all_settings(rewards, eps):
    of = functools.partial(rl.group_advantages, group=GROUP, num_groups=3, eps=eps)
    return [jax.vmap(functools.partial(of, **s))(rewards) for s in SETTINGS]


def of_all_settings(rewards, eps=0.0):
    """Advantages of each row, and the options that they were computed with."""
    found = _of_all_settings(np.asarray(rewards, np.float32), eps)
    return zip(map(np.asarray, found), SETTINGS)


def test_advantages_are_those_of_a_loop_over_samples():
    other = np.random.default_rng(1).normal(size=8)
    for found, options in of_all_settings([REWARDS, other], 0.01):
        assert found.dtype == np.float32 and found.shape == (2, 8)
        for ours, rewards in zip(found, (REWARDS, other)):
            expected = reference(rewards, GROUP, eps=0.01, **options)
            assert_allclose(ours, expected, rtol=2e-6, atol=1e-7, err_msg=str(options))


def test_invariant_13_sums_shifts_scales_and_ties():
    units = np.array([1.0, 100.0, 0.01])[GROUP]
    tied = REWARDS.copy()
    tied[GROUP == 1] = 0.1 + 0.2
    tied[GROUP == 2] = [1000.0, 1000.0 + 1e-4]  # rounding noise at that size
    moved, constant = REWARDS + 64, np.full(8, 1 / 3)
    rows = [REWARDS, moved, 8 * REWARDS, units * REWARDS, tied, constant]
    # as a published eps, and as none at all
    for eps in (0.0, 1e-8):
        for found, options in of_all_settings(rows, eps):
            ours, moved, scaled, by_prompt, tied_some, tied_all = found
            scale = options["scale"]
            sums = [ours[GROUP == g].sum() for g in range(3)]
            assert_allclose(sums, 0, atol=5e-6)
            assert_allclose(moved, ours, rtol=1e-5)
            assert_allclose(scaled, (8.0 if scale == "none" else 1.0) * ours, rtol=1e-5)
            if scale == "group":  # each prompt may have its own units
                assert_allclose(by_prompt, ours, rtol=1e-5)
            assert_array_equal(tied_some[GROUP > 0], 0)
            assert (tied_some[GROUP == 0] != 0).all()
            assert_array_equal(tied_all, 0)


def test_a_large_common_offset_costs_nothing_and_a_small_spread_is_no_tie():
    # At 2^23 float32 holds whole numbers only, and sums of them lose their last bits.
    spread = np.array([1.0, 8.0, 17.0, 41.0, 30.0, 3.0, 27.0, 5.0], np.float32)
    group = [0, 0, 0, 0, 0, 1, 1, 1]
    expected = advantages(spread, group, eps=0.0)
    for offset in (2.0**23, -(2.0**23)):
        moved = spread + np.float32(offset)
        assert_array_equal(advantages(moved, group, eps=0.0), expected)
    pair = advantages([0.0, 1e-4], [0, 0], 1, eps=0.0)
    assert_allclose(pair, [-(0.5**0.5), 0.5**0.5], rtol=1e-5)


def test_order_names_and_values_of_other_groups_do_not_matter():
    ours = advantages(REWARDS)
    order = np.random.default_rng(0).permutation(8)
    assert_allclose(advantages(REWARDS[order], GROUP[order]), ours[order], rtol=1e-6)
    names = np.array([4, 0, 2])  # with empty groups between
    assert_allclose(advantages(REWARDS, names[GROUP], 5), ours, rtol=1e-6)
    changed = np.where(GROUP == 2, 1e6 * REWARDS, REWARDS).astype(np.float32)
    assert_array_equal(advantages(changed)[GROUP != 2], ours[GROUP != 2])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_masked_samples_do_not_exist(scale):
    rewards = np.concatenate([REWARDS, [np.nan, 1e30, np.inf]]).astype(np.float32)
    group = np.concatenate([GROUP, [0, 1, -7]])
    whole = advantages(rewards, group, mask=np.arange(11) < 8, scale=scale)
    assert_allclose(whole[:8], advantages(REWARDS, scale=scale), rtol=1e-6)
    assert_array_equal(whole[8:], 0)


def test_clip_bounds_both_sides():
    rewards, zeros = np.array([0.0] * 50 + [1.0]), np.zeros(51, int)
    options = {"num_groups": 1, "ddof": 0, "eps": 0.0}
    free = advantages(rewards, zeros, **options)
    clipped = advantages(rewards, zeros, clip=5, **options)
    assert free.max() > 7 and clipped.max() == 5
    assert advantages(-rewards, zeros, clip=5, **options).min() == -5
    assert_allclose(clipped[:50], free[:50])


def test_outside_jit_the_same_and_bad_values_stay_visible_inside(count_compiles):
    expected = advantages(REWARDS)
    with count_compiles() as compiles:
        for bad in (np.nan, np.inf, -np.inf):
            rewards = REWARDS.copy()
            rewards[1] = bad
            assert_array_equal(np.isnan(advantages(rewards)), GROUP == 1)
    assert not compiles  # one program whatever the values
    for wrong in (-1, 3):
        ours = advantages(np.append(REWARDS, np.float32(5)), np.append(GROUP, wrong))
        assert_array_equal(np.isnan(ours), np.arange(9) == 8)
        assert_allclose(ours[:8], expected, rtol=1e-6)
    eager = rl.group_advantages(REWARDS, GROUP, num_groups=3)
    assert_allclose(eager, expected, rtol=1e-6)
    slope = jax.grad(lambda r: compiled(r, GROUP, num_groups=3)[0])(REWARDS)
    assert_array_equal(slope, 0)


def test_rewards_of_any_dtype_and_a_singleton_on_demand():
    for dtype in (bool, int, np.float64, jnp.bfloat16):
        ours = advantages(np.array([1, 0, 0, 1, 1, 0, 1, 0]).astype(dtype))
        assert ours.dtype == np.float32
        assert_allclose(ours[4] / ours[1], -2, rtol=1e-5, err_msg=str(dtype))
    rewards, group = np.array([5.0, 1.0, 0.0]), np.array([1, 0, 0])
    for options in ({}, {"baseline": "leave_one_out", "scale": "batch"}):
        ours = advantages(rewards, group, 2, allow_singletons=True, **options)
        assert ours[0] == 0 and ours[1] > 0


def test_bad_inputs(refused):
    for change, message in (
        ({"group": GROUP[:7]}, r"group has shape \(7,\) but rewards has shape \(8,\)"),
        ({"rewards": np.zeros((8, 1))}, r"rewards has shape \(8, 1\); give \[batch\]"),
        ({"mask": np.ones((8, 1), bool)}, r"mask has shape \(8, 1\) but rewards"),
        ({"num_groups": 0}, "num_groups=0 must be at least 1"),
        ({"num_groups": 2}, r"group\[3\]=2 is outside \[0, 2\); number the groups from 0"),
        ({"group": GROUP - 1}, r"group\[0\]=-1 is outside \[0, 3\)"),
        ({"group": np.r_[GROUP[:7], 3], "num_groups": 4}, "a single sample, the first is group 3.*all advantages would be 0.*allow_singletons=True"),
        ({"mask": GROUP * np.arange(8) != 6}, "single sample, the first is group 2"),
        ({"rewards": np.r_[REWARDS[:4], np.nan, REWARDS[5:]]}, "the first is nan, of sample 4 in group 1.*never replaced"),
        ({"baseline": "median"}, "baseline='median' is not one of 'mean', 'leave_one_out'"),
        ({"scale": "groups"}, "scale='groups' is not one of.*Did you mean 'group'"),
        ({"ddof": 2}, "ddof=2 must be 0"),
        ({"eps": -1.0}, "eps=-1.0 is outside"),
        ({"clip": 0.0}, "clip=0.0 is outside"),
    ):  # fmt: skip
        given = {"rewards": REWARDS, "group": GROUP, "num_groups": 3, **change}
        rewards, group = given.pop("rewards"), given.pop("group")
        refused(message, rl.group_advantages, rewards, group, **given)
    of_type = functools.partial(refused, error=TypeError)
    of, message = rl.group_advantages, "group has dtype float"
    of_type(message, of, REWARDS, GROUP * 1.0, num_groups=3)
    of_type("num_groups=3.0", of, REWARDS, GROUP, num_groups=3.0)
    two = np.stack([REWARDS, REWARDS], 1)
    broken = two.copy()
    broken[5, 1] = np.inf
    for message, *given in (
        (r"weights has shape \(3,\) but rewards", two, GROUP, [1, 1, 1]),
        (r"give \[batch, reward\]", REWARDS, GROUP, [1]),
        ("weights has 1 non-finite", two, GROUP, [1, np.nan]),
        ("inf, of sample 5 in group 0", broken, GROUP, [1, 1]),
        ("single sample, the first is group 0", two[:2], [0, 1], [1, 1]),
    ):
        refused(message, rl.reward_advantages, *given, num_groups=3)
    for message, *given in (
        (r"group 2 has 2 sample\(s\), fewer than best \+ worst = 3", 2, 1),
        ("best=0 and worst=0 keep nothing", 0, 0),
        ("worst=-1 must be at least 0", 1, -1),
    ):
        refused(message, rl.best_and_worst, REWARDS, GROUP, 3, *given)
    of_type("best=1.5", rl.best_and_worst, REWARDS, GROUP, 3, 1.5, 1)


def test_several_rewards_are_summed_after_normalising():
    second = np.array([0, 1, 0, 0, 1, 0, 0, 1.0], np.float32)  # ties everywhere
    third = np.random.default_rng(0).normal(size=8).astype(np.float32)
    rewards = np.stack([REWARDS, second, third], 1)
    names = ("num_groups", "clip", "eps")
    several = jax.jit(rl.reward_advantages, static_argnames=names)

    def of(rewards, weights, **options):
        weights = np.float32(weights)
        return np.asarray(several(rewards, GROUP, weights, num_groups=3, **options))

    ours = of(rewards, [1.0, 7.0, 0.5])
    assert_allclose(ours, advantages(REWARDS) + 0.5 * advantages(third), rtol=1e-5)
    # A reward's units do not matter.
    units = np.array([1000.0, 1.0, 0.001], np.float32)
    a, b = (of(r, [1, 7, 0.5], eps=0.0) for r in (units * rewards, rewards))
    assert_allclose(a, b, rtol=1e-4)
    assert abs(of(rewards, [9, 0, 0], clip=5)).max() == 5


@pytest.mark.parametrize("best, worst", [(2, 3), (3, 0), (0, 2)])
def test_best_and_worst_is_a_sort_of_each_group(best, worst):
    jitted = jax.jit(lambda r, g, m: rl.best_and_worst(r, g, 4, best, worst, m))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        group = rng.permutation(np.repeat([0, 1, 3], 7))
        rewards = rng.integers(0, 4, 21).astype(np.float32)
        mask = np.ones(21, bool)
        mask[[2, 11]] = False
        expected = np.zeros(21, bool)
        for g in (0, 1, 3):
            members = [i for i in range(21) if group[i] == g and mask[i]]
            ranked = sorted(members, key=lambda i: rewards[i])
            expected[ranked[:worst] + ranked[len(ranked) - best :]] = True
        assert_array_equal(jitted(rewards, group, mask), expected)


def test_group_statistics():
    rewards = [1.0, 3.0, 2.0, 2.0, 7.0, np.nan]
    group = [0, 0, 1, 1, 4, 4]
    mask = [True] * 5 + [False]
    statistics = jax.jit(rl.group_statistics, static_argnums=2)
    rewards, group = np.float32(rewards), np.array(group)
    stats = statistics(rewards, group, 5, np.array(mask))
    # Groups 2 and 3 are empty; 1 is tied, 4 has one sample.
    assert all(value.dtype == jnp.float32 for value in stats.values())
    assert_allclose(stats["reward_mean"], 3.0, rtol=1e-6)
    assert_allclose(stats["reward_group_std"], 1 / 3, rtol=1e-6)
    assert_allclose(stats["tied_group_fraction"], 2 / 3, rtol=1e-6)
    none = statistics(rewards, group, 5, np.zeros(6, bool))
    assert all(v == 0 for v in none.values())


SHARPEN = jax.jit(
    rl.sharpen, static_argnames=("num_groups", "strength", "most", "average")
)


def sharpened(advantages, s, right, group=GROUP, **options):
    given = (np.float32(x) for x in (advantages, s))
    return np.asarray(SHARPEN(*given, group, right, num_groups=3, **options))


def test_xrpo_7_unlikely_right_answers_are_raised_and_nothing_else_is_changed():
    rng = np.random.default_rng(0)
    a, s = np.float32(rng.normal(size=8)), np.float32(rng.normal(-1, 0.1, 8))
    right = a > -0.3  # one that is right, but below the mean of its group
    up = right & (a > 0)
    assert (right & ~up).any() and up.sum() >= 2
    for average in ("group", "right"):
        expected = a.astype(np.float64)
        for i in np.flatnonzero(up):
            counts = (GROUP == GROUP[i]) & (right | (average == "group"))
            eta = np.exp(s[i] - s[counts].mean())
            expected[i] += min(max(2.5 * (1 - eta), 0), 0.5 * a[i])
        found = sharpened(a, s, right, average=average)
        assert_allclose(found, expected, rtol=1e-5)
        assert (found[up] > a[up]).any() and (found[~up] == a[~up]).all()
        assert (found[up] >= a[up]).all() and (found[up] <= 1.5 * a[up] + 1e-6).all()
    found = sharpened(a, s, right)
    assert_array_equal(sharpened(a, np.full(8, -0.7), right), a)  # none is novel
    for options in ({"strength": 0.0}, {"most": 0.0}):
        assert_array_equal(sharpened(a, s, right, **options), a)
    assert_allclose(sharpened(a, s + 3, right), found, atol=1e-6)
    assert_array_equal(sharpened(np.zeros(8), s, np.ones(8, bool)), np.zeros(8))
    # an answer without tokens has no likelihood, and is no part of the mean
    known = np.where(np.arange(8) == 2, np.nan, s)
    rest = sharpened(a, known, right)
    assert np.isfinite(rest).all() and rest[2] == a[2]
    kept = np.arange(8) != 2
    assert_allclose(
        rest[kept],
        SHARPEN(a[kept], s[kept], GROUP[kept], right[kept], num_groups=3),
        rtol=1e-6,
    )


def test_xrpo_7_the_less_likely_the_more_up_to_the_cap_and_without_gradient():
    a, right = np.array([1.0, 1.0, 1.0, -3.0]), np.array([1, 1, 1, 0], bool)
    group = np.zeros(4, int)
    found = sharpened(a, [-1.0, -1.1, -9.0, -1.0], right, group)
    assert found[0] == 1 and found[2] == 1.5 and 1 <= found[1] <= 1.5
    s = np.float32([-1.0, -1.05, -1.1, -0.9])
    found = sharpened(a, s, right, group)
    assert found[0] <= found[1] < found[2] < 1.5
    slope = jax.grad(lambda s: SHARPEN(a, s, group, right, num_groups=3).sum())
    assert_array_equal(jax.jit(slope)(s), 0)


def test_sharpening_bad_inputs(refused):
    given = {"advantages": REWARDS, "log_prob": REWARDS, "group": GROUP}
    given |= {"right": REWARDS > 0, "num_groups": 3}
    for change, message in (
        ({"most": -0.1}, "most=-0.1 is outside"),
        ({"strength": -1.0}, "strength=-1.0 is outside"),
        ({"average": "all"}, "average='all' is not one of 'group', 'right'"),
        ({"log_prob": REWARDS[:7]}, r"log_prob has shape \(7,\) but advantages"),
        ({"advantages": REWARDS * np.nan}, "advantages has 8 non-finite"),
        ({"strength": np.inf}, r"strength=inf is outside \[0, inf\)"),
        # of a wrong answer, which the mean of its group would miss
        ({"group": np.where(REWARDS > 0, GROUP, 9)}, r"=9 is outside \[0, 3\)"),
    ):
        refused(message, rl.sharpen, **given | change)
