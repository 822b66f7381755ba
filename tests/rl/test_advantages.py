import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import rl

GROUP = np.array([0, 1, 0, 2, 1, 0, 2, 1])
REWARDS = np.array([1.0, 0.5, 3.0, -2.0, 0.25, 8.0, 2.0, 0.75], np.float32)
NAMES = ("baseline", "scale", "ddof")
SETTINGS = list(
    itertools.product(("mean", "leave_one_out"), ("group", "batch", "none"), (0, 1))
)


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
    static_argnames=("num_groups", "baseline", "scale", "ddof", "eps", "clip"),
)


def advantages(rewards, group=GROUP, num_groups=3, **options):
    rewards, group = np.asarray(rewards), np.asarray(group)
    return np.asarray(compiled(rewards, group, num_groups=num_groups, **options))


@functools.partial(jax.jit, static_argnums=1)
def _of_all_settings(rewards, eps):
    return [
        jax.vmap(
            lambda reward, s=s: rl.group_advantages(
                reward, GROUP, num_groups=3, eps=eps, **dict(zip(NAMES, s))
            )
        )(rewards)
        for s in SETTINGS
    ]


def of_all_settings(rewards, eps=0.0):
    """Advantages of each row, and the options that they were computed with."""
    found = _of_all_settings(np.asarray(rewards, np.float32), eps)
    return [(np.asarray(a), dict(zip(NAMES, s))) for a, s in zip(found, SETTINGS)]


def test_advantages_are_those_of_a_loop_over_samples():
    other = np.random.default_rng(1).normal(size=8)
    for found, options in of_all_settings([REWARDS, other], 0.01):
        assert found.dtype == np.float32 and found.shape == (2, 8)
        for ours, rewards in zip(found, (REWARDS, other)):
            expected = reference(rewards, GROUP, eps=0.01, **options)
            np.testing.assert_allclose(
                ours, expected, rtol=2e-6, atol=1e-7, err_msg=str(options)
            )


def test_advantages_by_hand():
    def of(rewards, group, **options):
        return advantages(rewards, group, max(group) + 1, eps=0.0, **options)

    pair = of([1.0, 0.0], [0, 0])
    np.testing.assert_allclose(pair, [0.5**0.5, -(0.5**0.5)], rtol=1e-6)
    np.testing.assert_allclose(of([1.0, 0.0], [0, 0], ddof=0), [1, -1], rtol=1e-6)
    out = of([0.0, 0.0, 3.0], [0, 0, 0], baseline="leave_one_out", scale="none")
    np.testing.assert_array_equal(out, [-1.5, -1.5, 3.0])
    # Std over both groups: mean 2, deviations -2 0 2 0, population std sqrt(2).
    out = of([0.0, 2.0, 4.0, 2.0], [0, 0, 1, 1], scale="batch", ddof=0)
    np.testing.assert_allclose(out, np.array([-1, 1, 1, -1]) / 2**0.5, rtol=1e-6)
    # A small spread is not a tie.
    out = of([0.0, 1e-4], [0, 0])
    np.testing.assert_allclose(out, [-(0.5**0.5), 0.5**0.5], rtol=1e-5)


def test_invariant_13_sums_shifts_scales_and_ties():
    units = np.array([1.0, 100.0, 0.01])[GROUP]
    tied = REWARDS.copy()
    tied[GROUP == 1] = 0.1 + 0.2
    tied[GROUP == 2] = [1000.0, 1000.0 + 1e-4]  # rounding noise at that size
    rows = [
        REWARDS,
        REWARDS + 64,
        8 * REWARDS,
        units * REWARDS,
        tied,
        np.full(8, 1 / 3),
    ]
    # as a published eps, and as none at all
    for eps in (0.0, 1e-8):
        for found, options in of_all_settings(rows, eps):
            ours, moved, scaled, by_prompt, tied_some, tied_all = found
            scale = options["scale"]
            sums = [ours[GROUP == g].sum() for g in range(3)]
            np.testing.assert_allclose(sums, 0, atol=5e-6)
            np.testing.assert_allclose(moved, ours, rtol=1e-5)
            factor = 8.0 if scale == "none" else 1.0
            np.testing.assert_allclose(scaled, factor * ours, rtol=1e-5)
            if scale == "group":  # each prompt may have its own units
                np.testing.assert_allclose(by_prompt, ours, rtol=1e-5)
            np.testing.assert_array_equal(tied_some[GROUP > 0], 0)
            assert (tied_some[GROUP == 0] != 0).all()
            np.testing.assert_array_equal(tied_all, 0)


def test_a_large_common_offset_costs_nothing():
    # At 2^23 float32 holds whole numbers only, and sums of them lose their last bits.
    spread = np.array([1.0, 8.0, 17.0, 41.0, 30.0, 3.0, 27.0, 5.0], np.float32)
    group = [0, 0, 0, 0, 0, 1, 1, 1]
    for offset in (2.0**23, -(2.0**23)):
        np.testing.assert_array_equal(
            advantages(spread + np.float32(offset), group, eps=0.0),
            advantages(spread, group, eps=0.0),
        )


def test_order_names_and_values_of_other_groups_do_not_matter():
    ours = advantages(REWARDS)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(
        advantages(REWARDS[order], GROUP[order]), ours[order], rtol=1e-6
    )
    names = np.array([4, 0, 2])  # with empty groups between
    np.testing.assert_allclose(advantages(REWARDS, names[GROUP], 5), ours, rtol=1e-6)
    changed = np.where(GROUP == 2, 1e6 * REWARDS, REWARDS).astype(np.float32)
    np.testing.assert_array_equal(advantages(changed)[GROUP != 2], ours[GROUP != 2])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_masked_samples_do_not_exist(scale):
    rewards = np.concatenate([REWARDS, [np.nan, 1e30, np.inf]]).astype(np.float32)
    group = np.concatenate([GROUP, [0, 1, -7]])
    whole = advantages(rewards, group, mask=np.arange(11) < 8, scale=scale)
    np.testing.assert_allclose(whole[:8], advantages(REWARDS, scale=scale), rtol=1e-6)
    np.testing.assert_array_equal(whole[8:], 0)


def test_clip_bounds_both_sides():
    rewards, zeros = np.array([0.0] * 50 + [1.0]), np.zeros(51, int)
    options = {"num_groups": 1, "ddof": 0, "eps": 0.0}
    free = advantages(rewards, zeros, **options)
    clipped = advantages(rewards, zeros, clip=5, **options)
    assert free.max() > 7 and clipped.max() == 5
    assert advantages(-rewards, zeros, clip=5, **options).min() == -5
    np.testing.assert_allclose(clipped[:50], free[:50])


def test_outside_jit_the_same_and_bad_values_stay_visible_inside(count_compiles):
    expected = advantages(REWARDS)
    with count_compiles() as compiles:
        for bad in (np.nan, np.inf, -np.inf):
            rewards = REWARDS.copy()
            rewards[1] = bad
            np.testing.assert_array_equal(np.isnan(advantages(rewards)), GROUP == 1)
    assert not compiles  # one program whatever the values
    for wrong in (-1, 3):
        ours = advantages(np.append(REWARDS, np.float32(5)), np.append(GROUP, wrong))
        np.testing.assert_array_equal(np.isnan(ours), np.arange(9) == 8)
        np.testing.assert_allclose(ours[:8], expected, rtol=1e-6)
    eager = rl.group_advantages(REWARDS, GROUP, num_groups=3)
    np.testing.assert_allclose(eager, expected, rtol=1e-6)


def test_rewards_get_no_gradient():
    grad = jax.jit(jax.grad(lambda r: compiled(r, GROUP, num_groups=3)[0]))
    np.testing.assert_array_equal(grad(REWARDS), 0)


@pytest.mark.parametrize("dtype", [bool, int, np.float64, jnp.bfloat16])
def test_rewards_of_any_dtype(dtype):
    ours = advantages(np.array([1, 0, 0, 1, 1, 0, 1, 0]).astype(dtype))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[4] / ours[1], -2, rtol=1e-5)


def test_a_singleton_on_demand():
    @jax.jit
    def both(rewards):
        return [
            rl.group_advantages(
                rewards, [1, 0, 0], num_groups=2, allow_singletons=True, **options
            )
            for options in ({}, {"baseline": "leave_one_out", "scale": "batch"})
        ]

    for ours in both(np.array([5.0, 1.0, 0.0])):
        assert ours[0] == 0 and ours[1] > 0


BAD = [
    ({"group": GROUP[:7]}, r"group has shape \(7,\) but rewards has shape \(8,\)"),
    ({"rewards": np.zeros((8, 1))}, r"rewards has shape \(8, 1\); give \[batch\]"),
    ({"mask": np.ones((8, 1), bool)}, r"mask has shape \(8, 1\) but rewards"),
    ({"num_groups": 0}, "num_groups=0 must be at least 1"),
    ({"num_groups": 2}, r"group\[3\]=2 is outside \[0, 2\); number the groups from 0"),
    ({"group": GROUP - 1}, r"group\[0\]=-1 is outside \[0, 3\)"),
    ({"group": np.r_[GROUP[:7], 3], "num_groups": 4}, "a single sample, the first is group 3.*all advantages would be 0.*allow_singletons=True"),
    ({"mask": GROUP * np.arange(8) != 6}, "single sample, the first is group 2"),
    ({"rewards": np.r_[REWARDS[:4], np.nan, REWARDS[5:]]}, r"the first is nan at index \(4,\) \(sample 4 of group 1\).*never replaced"),
    ({"baseline": "median"}, "baseline='median' is not one of 'mean', 'leave_one_out'"),
    ({"scale": "groups"}, "scale='groups' is not one of.*Did you mean 'group'"),
    ({"ddof": 2}, "ddof=2 must be 0"),
    ({"eps": -1.0}, "eps=-1.0 is outside"),
    ({"clip": 0.0}, "clip=0.0 is outside"),
]  # fmt: skip


@pytest.mark.parametrize("change,message", BAD)
def test_bad_inputs_of_group_advantages(change, message, as_shipped):
    given = {"rewards": REWARDS, "group": GROUP, "num_groups": 3, **change}
    with pytest.raises(ValueError, match=message):
        rl.group_advantages(given.pop("rewards"), given.pop("group"), **given)


def test_groups_are_integers(as_shipped):
    with pytest.raises(TypeError, match="group has dtype float"):
        rl.group_advantages(REWARDS, GROUP * 1.0, num_groups=3)
    with pytest.raises(TypeError, match="num_groups=3.0"):
        rl.group_advantages(REWARDS, GROUP, num_groups=3.0)


def test_several_rewards_are_summed_after_normalising():
    second = np.array([0, 1, 0, 0, 1, 0, 0, 1.0], np.float32)  # ties everywhere
    third = np.random.default_rng(0).normal(size=8).astype(np.float32)
    rewards = np.stack([REWARDS, second, third], 1)
    several = jax.jit(
        rl.reward_advantages, static_argnames=("num_groups", "clip", "eps")
    )

    def of(rewards, weights, **options):
        weights = np.asarray(weights, np.float32)
        options |= {"num_groups": 3}
        return np.asarray(several(rewards, GROUP, weights, **options))

    ours = of(rewards, [1.0, 7.0, 0.5])
    expected = advantages(REWARDS) + 0.5 * advantages(third)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # A reward's units do not matter.
    units = np.array([1000.0, 1.0, 0.001], np.float32)
    np.testing.assert_allclose(
        of(units * rewards, [1, 7, 0.5], eps=0.0),
        of(rewards, [1, 7, 0.5], eps=0.0),
        rtol=1e-4,
    )
    assert abs(of(rewards, [9, 0, 0], clip=5)).max() == 5


def test_bad_inputs_of_reward_advantages(as_shipped):
    rewards = np.stack([REWARDS, REWARDS], 1)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\) but rewards"):
        rl.reward_advantages(rewards, GROUP, [1, 1, 1], num_groups=3)
    with pytest.raises(ValueError, match=r"give \[batch, reward\]"):
        rl.reward_advantages(REWARDS, GROUP, [1], num_groups=3)
    with pytest.raises(ValueError, match="weights has 1 non-finite"):
        rl.reward_advantages(rewards, GROUP, [1, np.nan], num_groups=3)
    rewards[5, 1] = np.inf
    with pytest.raises(
        ValueError, match=r"inf at index \(5, 1\) \(sample 5 of group 0"
    ):
        rl.reward_advantages(rewards, GROUP, [1, 1], num_groups=3)
    with pytest.raises(ValueError, match="single sample, the first is group 0"):
        rl.reward_advantages(rewards[:2], [0, 1], [1, 1], num_groups=2)


def test_best_and_worst_by_hand():
    rewards = [3.0, 1.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0]
    group = [0, 0, 0, 0, 1, 1, 1, 1]
    kept = rl.best_and_worst(rewards, group, 2, best=1, worst=1)
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 3, 4, 7])
    kept = rl.best_and_worst(rewards, group, 2, best=3, worst=0)
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, 2, 5, 6, 7])
    kept = rl.best_and_worst(rewards, group, 2, best=0, worst=2)
    np.testing.assert_array_equal(np.flatnonzero(kept), [1, 3, 4, 5])


def test_best_and_worst_is_a_sort_of_each_group():
    jitted = jax.jit(lambda r, g, m: rl.best_and_worst(r, g, 4, 2, 3, m))
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
            expected[ranked[:3] + ranked[-2:]] = True
        np.testing.assert_array_equal(jitted(rewards, group, mask), expected)


def test_bad_inputs_of_best_and_worst(as_shipped):
    with pytest.raises(
        ValueError, match=r"group 2 has 2 sample\(s\), fewer than best \+ worst = 3"
    ):
        rl.best_and_worst(REWARDS, GROUP, 3, 2, 1)
    with pytest.raises(ValueError, match="best=0 and worst=0 keep nothing"):
        rl.best_and_worst(REWARDS, GROUP, 3, 0, 0)
    with pytest.raises(ValueError, match="worst=-1 must be at least 0"):
        rl.best_and_worst(REWARDS, GROUP, 3, 1, -1)
    with pytest.raises(TypeError, match="best=1.5"):
        rl.best_and_worst(REWARDS, GROUP, 3, 1.5, 1)


def test_group_statistics():
    rewards = [1.0, 3.0, 2.0, 2.0, 7.0, np.nan]
    group = [0, 0, 1, 1, 4, 4]
    mask = [True] * 5 + [False]
    stats = rl.group_statistics(rewards, group, 5, mask)
    # Groups 2 and 3 are empty; 1 is tied, 4 has one sample.
    assert {k: v.dtype for k, v in stats.items()} == {
        "reward_mean": jnp.float32,
        "reward_group_std": jnp.float32,
        "tied_group_fraction": jnp.float32,
    }
    np.testing.assert_allclose(stats["reward_mean"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(stats["reward_group_std"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(stats["tied_group_fraction"], 2 / 3, rtol=1e-6)
    none = rl.group_statistics(rewards, group, 5, np.zeros(6, bool))
    assert all(v == 0 for v in none.values())
