import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import rl

GROUP = np.array([0, 1, 0, 2, 1, 0, 2, 1])
REWARDS = np.array([1.0, 0.5, 3.0, -2.0, 0.25, 8.0, 2.0, 0.75], np.float32)
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


@pytest.mark.parametrize("baseline,scale,ddof", SETTINGS)
def test_advantages_are_those_of_a_loop_over_samples(baseline, scale, ddof):
    options = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": 0.01}
    ours = rl.group_advantages(REWARDS, GROUP, num_groups=3, **options)
    assert ours.dtype == jnp.float32 and ours.shape == (8,)
    np.testing.assert_allclose(ours, reference(REWARDS, GROUP, **options), rtol=2e-6)


def test_advantages_by_hand():
    one = {"num_groups": 1, "eps": 0.0}
    pair = rl.group_advantages([1.0, 0.0], [0, 0], **one)
    np.testing.assert_allclose(pair, [0.5**0.5, -(0.5**0.5)], rtol=1e-6)
    pair = rl.group_advantages([1.0, 0.0], [0, 0], ddof=0, **one)
    np.testing.assert_allclose(pair, [1, -1], rtol=1e-6)
    out = rl.group_advantages(
        [0.0, 0.0, 3.0], [0, 0, 0], baseline="leave_one_out", scale="none", **one
    )
    np.testing.assert_array_equal(out, [-1.5, -1.5, 3.0])
    # Std over both groups: mean 2, deviations -2 0 2 0, population std sqrt(2).
    out = rl.group_advantages(
        [0.0, 2.0, 4.0, 2.0], [0, 0, 1, 1], num_groups=2, scale="batch", ddof=0, eps=0
    )
    np.testing.assert_allclose(out, np.array([-1, 1, 1, -1]) / 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("baseline,scale,ddof", SETTINGS)
def test_invariant_13_sums_shifts_and_scales(baseline, scale, ddof):
    def advantages(rewards):
        return np.asarray(
            rl.group_advantages(
                rewards,
                GROUP,
                num_groups=3,
                baseline=baseline,
                scale=scale,
                ddof=ddof,
                eps=0.0,
            )
        )

    ours = advantages(REWARDS)
    sums = [ours[GROUP == g].sum() for g in range(3)]
    np.testing.assert_allclose(sums, 0, atol=5e-6)
    np.testing.assert_allclose(advantages(REWARDS + 64), ours, rtol=1e-5)
    factor = 8.0 if scale == "none" else 1.0
    np.testing.assert_allclose(advantages(8 * REWARDS), factor * ours, rtol=1e-5)
    if scale == "group":  # each prompt may have its own units
        units = np.array([1.0, 100.0, 0.01])[GROUP].astype(np.float32)
        np.testing.assert_allclose(advantages(units * REWARDS), ours, rtol=1e-5)


@pytest.mark.parametrize("baseline,scale,ddof", SETTINGS)
def test_invariant_13_a_tied_group_is_exactly_zero(baseline, scale, ddof):
    rewards = REWARDS.copy()
    rewards[GROUP == 1] = 0.1 + 0.2
    rewards[GROUP == 2] = [1000.0, 1000.0 + 1e-4]  # rounding noise at that size
    ours = rl.group_advantages(
        rewards,
        GROUP,
        num_groups=3,
        baseline=baseline,
        scale=scale,
        ddof=ddof,
        eps=1e-8,
    )
    np.testing.assert_array_equal(ours[GROUP > 0], 0)
    assert (ours[GROUP == 0] != 0).all()
    np.testing.assert_array_equal(
        rl.group_advantages(
            np.full(8, 1 / 3),
            GROUP,
            num_groups=3,
            baseline=baseline,
            scale=scale,
            eps=0,
        ),
        0,
    )


def test_a_small_spread_is_not_a_tie():
    ours = rl.group_advantages([0.0, 1e-4], [0, 0], num_groups=1, eps=0.0)
    np.testing.assert_allclose(ours, [-(0.5**0.5), 0.5**0.5], rtol=1e-5)


def test_a_large_common_offset_costs_nothing():
    # At 2^23 float32 holds whole numbers only, and sums of them lose their last bits.
    spread = np.array([1.0, 8.0, 17.0, 41.0, 30.0, 3.0, 27.0], np.float32)
    group, options = np.array([0, 0, 0, 0, 0, 1, 1]), {"num_groups": 2, "eps": 0.0}
    for offset in (2.0**23, -(2.0**23)):
        np.testing.assert_array_equal(
            rl.group_advantages(spread + np.float32(offset), group, **options),
            rl.group_advantages(spread, group, **options),
        )


def test_order_of_samples_and_names_of_groups_do_not_matter():
    ours = rl.group_advantages(REWARDS, GROUP, num_groups=3)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(
        rl.group_advantages(REWARDS[order], GROUP[order], num_groups=3),
        ours[order],
        rtol=1e-6,
    )
    names = np.array([4, 0, 2])  # with empty groups between
    np.testing.assert_allclose(
        rl.group_advantages(REWARDS, names[GROUP], num_groups=5), ours, rtol=1e-6
    )


def test_groups_do_not_meet():
    changed = REWARDS.copy()
    changed[GROUP == 2] *= 1e6
    rest = GROUP != 2
    np.testing.assert_array_equal(
        rl.group_advantages(changed, GROUP, num_groups=3)[rest],
        rl.group_advantages(REWARDS, GROUP, num_groups=3)[rest],
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_masked_samples_do_not_exist(scale):
    rewards = np.concatenate([REWARDS, [np.nan, 1e30, np.inf]]).astype(np.float32)
    group = np.concatenate([GROUP, [0, 1, -7]])
    mask = np.arange(11) < 8
    whole = rl.group_advantages(rewards, group, num_groups=3, mask=mask, scale=scale)
    part = rl.group_advantages(REWARDS, GROUP, num_groups=3, scale=scale)
    np.testing.assert_allclose(whole[:8], part, rtol=1e-6)
    np.testing.assert_array_equal(whole[8:], 0)


def test_clip_bounds_both_sides():
    rewards = np.array([0.0] * 50 + [1.0])
    options = {"num_groups": 1, "ddof": 0, "eps": 0.0}
    zeros = np.zeros(51, int)
    assert rl.group_advantages(rewards, zeros, **options).max() > 7
    clipped = rl.group_advantages(rewards, zeros, clip=5, **options)
    assert clipped.max() == 5
    assert rl.group_advantages(-rewards, zeros, clip=5, **options).min() == -5
    np.testing.assert_allclose(
        clipped[:50], rl.group_advantages(rewards, zeros, **options)[:50]
    )


def test_under_jit_the_same_and_one_program(count_compiles):
    jitted = jax.jit(
        lambda r, g, m: rl.group_advantages(r, g, num_groups=3, scale="batch", mask=m)
    )
    rewards, group, mask = jnp.asarray(REWARDS), jnp.asarray(GROUP), jnp.arange(8) < 7
    first = jitted(rewards, group, mask)
    with count_compiles() as compiles:
        jitted(2 * rewards, group, ~mask)
    assert len(compiles) <= 2  # 2 * rewards and ~mask alone
    np.testing.assert_allclose(
        first,
        rl.group_advantages(REWARDS, GROUP, num_groups=3, scale="batch", mask=mask),
        rtol=1e-6,
    )


def test_under_jit_bad_values_stay_visible():
    jitted = jax.jit(lambda r, g: rl.group_advantages(r, g, num_groups=3))
    for bad in (np.nan, np.inf, -np.inf):
        rewards = REWARDS.copy()
        rewards[1] = bad
        ours = np.asarray(jitted(rewards, GROUP))
        np.testing.assert_array_equal(np.isnan(ours), GROUP == 1)
    for wrong in (-1, 3):
        group = np.concatenate([GROUP, [wrong]])
        ours = np.asarray(jitted(np.append(REWARDS, 5.0), group))
        np.testing.assert_array_equal(np.isnan(ours), np.arange(9) == 8)
        np.testing.assert_allclose(
            ours[:8], rl.group_advantages(REWARDS, GROUP, num_groups=3), rtol=1e-6
        )


def test_rewards_get_no_gradient():
    grad = jax.grad(lambda r: rl.group_advantages(r, GROUP, num_groups=3)[0])
    np.testing.assert_array_equal(grad(jnp.asarray(REWARDS)), 0)


@pytest.mark.parametrize("dtype", [bool, int, np.float64, jnp.bfloat16])
def test_rewards_of_any_dtype(dtype):
    rewards = np.array([1, 0, 0, 1, 1, 0, 1, 0]).astype(dtype)
    ours = rl.group_advantages(rewards, GROUP, num_groups=3)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[4] / ours[1], -2, rtol=1e-5)


def test_a_singleton_on_demand():
    ours = rl.group_advantages(
        [5.0, 1.0, 0.0], [1, 0, 0], num_groups=2, allow_singletons=True
    )
    assert ours[0] == 0 and ours[1] > 0
    ours = rl.group_advantages(
        [5.0, 1.0, 0.0],
        [1, 0, 0],
        num_groups=2,
        baseline="leave_one_out",
        scale="batch",
        allow_singletons=True,
    )
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
    rewards, options = np.stack([REWARDS, second, third], 1), {"num_groups": 3}
    ours = rl.reward_advantages(rewards, GROUP, [1.0, 7.0, 0.5], **options)
    expected = rl.group_advantages(REWARDS, GROUP, **options) + 0.5 * (
        rl.group_advantages(third, GROUP, **options)
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    # A reward's units do not matter.
    units = np.array([1000.0, 1.0, 0.001], np.float32)
    np.testing.assert_allclose(
        rl.reward_advantages(units * rewards, GROUP, [1, 7, 0.5], eps=0, **options),
        rl.reward_advantages(rewards, GROUP, [1, 7, 0.5], eps=0, **options),
        rtol=1e-4,
    )
    clipped = rl.reward_advantages(rewards, GROUP, [9, 0, 0], clip=5, **options)
    assert abs(clipped).max() == 5


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


@pytest.mark.parametrize("seed", range(3))
def test_best_and_worst_is_a_sort_of_each_group(seed):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat([0, 1, 3], 7))
    rewards = rng.integers(0, 4, 21).astype(np.float32)
    mask = np.ones(21, bool)
    mask[[2, 11]] = False
    jitted = jax.jit(lambda r, g, m: rl.best_and_worst(r, g, 4, 2, 3, m))
    kept = np.asarray(jitted(rewards, group, mask))
    expected = np.zeros(21, bool)
    for g in (0, 1, 3):
        members = [i for i in range(21) if group[i] == g and mask[i]]
        ranked = sorted(members, key=lambda i: rewards[i])
        expected[ranked[:3] + ranked[-2:]] = True
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(
        rl.best_and_worst(rewards, group, 4, 2, 3, mask), expected
    )


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
