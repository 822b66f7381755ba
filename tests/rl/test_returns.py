import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl

# one program a shape, whatever the discount
advantages = jax.jit(rl.generalised_advantages)
update = jax.jit(rl.update_statistics, static_argnames="forget")
scale_rewards = jax.jit(rl.scale_rewards)


def drawn(seed, time=7, env=5):
    rng = np.random.default_rng(seed)
    reward, value, next_value = rng.normal(size=(3, time, env))
    kind = rng.integers(0, 4, (time, env))
    return reward, value, next_value, kind == 0, kind == 1


def brute_force(reward, value, next_value, terminated, truncated, discount, lam):
    """Sums of discounted errors, each until its episode is cut."""
    time, env = reward.shape
    out = np.zeros((time, env))
    for e in range(env):
        for t in range(time):
            weight = 1.0
            for s in range(t, time):
                after = 0 if terminated[s, e] else next_value[s, e]
                out[t, e] += weight * (reward[s, e] + discount * after - value[s, e])
                if terminated[s, e] or truncated[s, e]:
                    break
                weight *= discount * lam
    return out


@pytest.mark.parametrize("discount, lam", [(0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_13_generalised_advantages_are_the_sum(discount, lam):
    arrays = drawn(0)
    options = {"discount": discount, "gae_lambda": lam}
    advantage, returns = advantages(*arrays, **options)
    expected = brute_force(*arrays, discount, lam)
    assert_allclose(advantage, expected, rtol=1e-5, atol=1e-5)
    assert_allclose(returns, advantage + arrays[1], rtol=1e-5, atol=1e-6)


def test_an_exact_value_has_no_advantage():
    """Reward 1 for ever is worth 1 / (1 - discount), cut or not."""
    shape = (6, 2)
    cut, none = np.zeros((2, *shape), bool)
    cut[2], cut[4, 0] = True, True

    def advantage(*ends):
        options = {"discount": 0.9, "gae_lambda": 0.95}
        given = (np.ones(shape), np.full(shape, 10.0), np.full(shape, 10.0), *ends)
        return np.asarray(advantages(*given, **options)[0])

    assert_allclose(advantage(none, cut), 0, atol=1e-5)
    assert (advantage(cut, none)[2] < -8).all()


def test_a_step_that_is_not_valid_is_a_cut_before_it():
    reward, value, next_value, terminated, truncated = drawn(1)
    valid = np.ones(reward.shape, bool)
    valid[3, 1] = valid[5, 4] = False
    options = {"discount": 0.9, "gae_lambda": 0.8, "valid": valid}
    broken, next_broken = (np.where(valid, x, np.nan) for x in (reward, next_value))
    given = (broken, value, next_broken, terminated, truncated)
    advantage = np.asarray(advantages(*given, **options)[0])
    assert np.isfinite(advantage).all() and advantage[3, 1] == advantage[5, 4] == 0
    # as if it had been a step worth nothing, with nothing known behind it
    worthless, ended = np.where(valid, reward, value), terminated | ~valid
    given = (worthless, value, next_value, ended, truncated)
    assert_allclose(advantage, brute_force(*given, 0.9, 0.8), atol=1e-5)


def test_no_gradient_traced_numbers_and_bad_inputs(refused):
    reward, value, *rest = drawn(2)

    @jax.jit
    def total(value, discount):
        options = {"discount": discount, "gae_lambda": 0.9}
        return sum(rl.generalised_advantages(reward, value, *rest, **options)).sum()

    assert (jax.grad(total)(value, 0.9) == 0).all()
    of, given = rl.generalised_advantages, {"discount": 0.9, "gae_lambda": 0.9}
    short = (reward, value, rest[0], rest[1][:2], rest[2])
    refused("terminated has shape", of, *short, **given)
    given["discount"] = 1.5
    refused("discount=1.5 is outside", of, reward, value, *rest, **given)


def test_standardised_over_what_is_valid(refused):
    x = np.random.default_rng(0).normal(3, 2, (40, 3))
    valid = np.random.default_rng(1).random((40, 3)) > 0.3
    out = np.asarray(rl.standardise(np.where(valid, x, 1e6), valid))
    assert (out[~valid] == 0).all()
    assert_allclose(out[valid].mean(), 0, atol=1e-5)
    assert_allclose(out[valid].std(ddof=1), 1, rtol=1e-5)
    whole = np.asarray(rl.standardise(x))
    assert_allclose(whole, (x - x.mean()) / x.std(ddof=1), atol=1e-5)
    refused("valid has shape", rl.standardise, np.zeros(3), np.ones(4, bool))


@pytest.mark.parametrize("split", [(1000,), (1, 2, 997), (500, 500), (50,) * 20])
def test_12_statistics_do_not_depend_on_the_split(split):
    x = np.random.default_rng(0).normal([5, -3, 100], [2, 0.1, 30], (1000, 3))
    statistics = rl.RunningStatistics.start((3,))
    for part in np.split(x, np.cumsum(split)[:-1]):
        statistics = update(statistics, part)
    assert statistics.count == 1000
    assert_allclose(statistics.mean, x.mean(0), rtol=1e-5)
    assert_allclose(np.sqrt(statistics.variance), x.std(0), rtol=1e-4)
    normal = np.asarray(statistics.normalise(x))
    assert_allclose(normal.mean(0), 0, atol=1e-3)
    assert_allclose(normal.std(0), 1, rtol=1e-3)


def test_12_rows_can_be_left_out_and_axes_are_free():
    x = np.random.default_rng(0).normal(size=(6, 10, 2))
    valid = np.random.default_rng(1).random((6, 10)) > 0.5
    start, seen = rl.RunningStatistics.start((2,)), np.where(valid[..., None], x, 99.0)
    statistics = update(start, seen, valid)
    assert_allclose(statistics.mean, x[valid].mean(0), rtol=1e-5)
    assert_allclose(statistics.variance, x[valid].var(0), rtol=1e-4)
    same = update(statistics, x, np.zeros((6, 10), bool))
    jax.tree.map(assert_array_equal, same, statistics)


def test_12_the_forgetful_form_shrinks():
    """As measured on the released FPO: 1.01, .74, .60, .50, .46, .40, .38, .35."""
    rng, statistics = np.random.default_rng(0), rl.RunningStatistics.start((1,))
    found = []
    for _ in range(8):
        batch = rng.normal(size=(4000, 1))
        statistics = update(statistics, batch, forget=True)
        found.append(float(np.sqrt(statistics.variance)[0]))
    assert_allclose(found, 1 / np.sqrt(np.arange(1, 9)), rtol=0.05)


def test_10_nothing_after_a_cut_is_in_an_advantage():
    """A_t of a truncated step is of V(final observation), and of no later reward."""
    reward, value, next_value, terminated, _ = drawn(3)
    truncated, terminated[2], terminated[:3] = np.zeros_like(terminated), False, False
    truncated[2] = True

    def advantage(reward, next_value):
        given = (reward, value, next_value, terminated, truncated)
        return np.asarray(advantages(*given, discount=0.9, gae_lambda=0.8)[0])

    base, later, last = advantage(reward, next_value), reward.copy(), next_value.copy()
    later[3:] += 100
    assert_array_equal(advantage(later, next_value)[:3], base[:3])
    last[2] += 1
    assert_allclose(advantage(reward, last)[2] - base[2], 0.9, rtol=1e-5)
    assert_allclose(advantage(reward, last)[0] - base[0], 0.9 * 0.72**2, rtol=1e-4)


def sums_of(reward, ended, discount, start=0.0):
    """Forward discounted sums of one environment, and what stands after them."""
    found, running = [], start
    for r, e in zip(reward, ended):
        running = r + discount * running
        found.append(running)
        running = 0.0 if e else running
    return found, running


def test_11_rewards_are_divided_by_the_spread_of_their_sums():
    rng = np.random.default_rng(4)
    reward, ended = rng.normal(2, 3, (40, 3)), rng.random((40, 3)) < 0.1
    ended[19] = (False, True, False)
    scale, found = rl.RewardScale.start(3), []
    for part in (slice(0, 20), slice(20, 40)):  # two iterations
        given = (scale, np.float32(reward[part]), ended[part])
        scaled, scale = scale_rewards(*given, discount=0.9)
        found.append(np.asarray(scaled))
    whole = [sums_of(reward[:, i], ended[:, i], 0.9) for i in range(3)]
    assert_allclose(scale.running, [after for _, after in whole], rtol=1e-5)
    sums = np.array([sums for sums, _ in whole])
    for k, rows in enumerate((slice(0, 20), slice(20, 40))):
        expected = reward[rows] / sums[:, : rows.stop].std(ddof=1)
        assert_allclose(found[k], expected, rtol=1e-4)


def test_11_the_unit_of_rewards_does_not_matter():
    rng = np.random.default_rng(5)
    reward, ended = np.float32(rng.normal(size=(30, 2))), rng.random((30, 2)) < 0.2
    start = rl.RewardScale.start(2)
    scaled, _ = scale_rewards(start, reward, ended, discount=0.9)
    other, _ = scale_rewards(start, 1000 * reward, ended, discount=0.9)
    assert_allclose(other, scaled, rtol=1e-4)
    # one outlier is clipped; a step that is not valid is not counted
    reward[7, 0], valid = 1e6, np.ones_like(ended)
    valid[7, 0], ended[7, 0] = False, True
    left_out, kept = scale_rewards(start, reward, ended, valid, discount=0.9)
    left_out = np.asarray(left_out)
    assert left_out[7, 0] == 10 and kept.statistics.count == 59
    assert np.abs(left_out).max() == 10 > np.sort(np.abs(left_out).ravel())[-2]


def test_11_bad_inputs(refused):
    start = rl.RewardScale.start(2)
    given = (start, np.zeros((3, 2)), np.zeros((3, 1), bool))
    refused("ended has shape", rl.scale_rewards, *given, discount=0.9)
