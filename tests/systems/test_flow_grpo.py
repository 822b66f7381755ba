import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mlp
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import data, flows, rl, train
from tmdjax.systems import flow_grpo
from tmdjax.train import flow_rl

MIXTURE = flows.gaussian_mixture(**data.MIXTURE)
APPLY, PARAMS = mlp(hidden=16, depth=2)
PARAMS["out"] = jax.tree.map(jnp.zeros_like, PARAMS["out"])
WINDOWS = {
    "flow_grpo_fast": {"schedule": "random", "size": 3, "high": 5},
    # four positions in twelve iterations, and back to the first
    "mix_grpo": {"schedule": "progressive", "size": 4, "iterations": 3},
}
NIGHTLY = ("flow_grpo_fast", "dance_grpo")
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY]
# mean and std over, ddof, eps: the table of the published losses
ADVANTAGES = dict.fromkeys(("flow_grpo", "flow_grpo_fast"), ("batch", 0, 1e-4))
ADVANTAGES |= dict.fromkeys(("dance_grpo", "mix_grpo"), ("group", 1, 1e-8))


def corrected(params, frozen):
    """The exact velocity of the mixture plus a network that starts at zero."""
    return lambda x, t, cond: MIXTURE.velocity(x, t) + APPLY(params, x, t, None)


def to_goal(x, prompts):
    return -jnp.linalg.norm(x - jnp.array([1.2, 1.6]), axis=-1)


@pytest.mark.parametrize("name", ["flow_grpo", "mix_grpo", *NIGHTLY])
def test_reward_rises_with_one_compilation_of_each_program(name):
    objective = {"clip_range": 0.05, "kl_coefficient": 0.0}
    options = {"steps": 8, "group_size": 8, "objective": objective}
    options |= {"window": WINDOWS[name]} if name in WINDOWS else {}
    setup = flow_grpo.preset(name, (2,), **options)
    rule = train.make_optimizer(train.OptimizerConfig(learning_rate=5e-3, name="adam"))
    given = (flow_rl.Policy(corrected), setup.method, to_goal, rule, setup.objective)
    iteration = flow_rl.make_iteration(*given, updates=setup.updates)
    state, history = train.create_state(PARAMS, rule), []
    for _ in range(25):
        state, metrics = iteration(state, {"prompt": np.arange(8)}, jax.random.key(1))
        history.append(metrics)
    rewards = [float(m["reward_mean"]) for m in history]
    assert np.mean(rewards[-3:]) > 0.5 * np.mean(rewards[:3]), rewards
    assert 0 < history[0]["ratio_error"] <= 1e-6
    assert history[0]["clip_fraction_first"] == 0
    windows = {tuple(setup.method.table(i).mask) for i in range(25)}
    assert len(windows) >= 3 or name not in WINDOWS
    # the type hook of the tests does not multiply programs
    assert [p._cache_size() for p in iteration.programs.values()] == [1, 1]
    assert int(state.step) == 25 * setup.updates and int(state.skipped) == 0


def credit(method, rewards, key=0, give=None):
    """Of a record without transitions: rewards are all that counts."""
    _, plan = method.plan(0)
    record = rl.Transitions(*(np.zeros(0, np.float32) for _ in range(6)))
    group = jnp.arange(len(rewards)) // method.group_size
    given = (np.float32(rewards), group, record, plan, jax.random.key(key))
    found = (give or jax.jit(method.credit))(*given)
    return plan["steps"], flow_rl.Credit(*(np.asarray(column) for column in found))


def rewards_of(groups, size, seed=0):
    return np.random.default_rng(seed).normal(size=(groups, size))


@pytest.mark.parametrize("name", flow_grpo.PRESETS)
def test_advantages_are_the_published_ones(name):
    method = flow_grpo.preset(name, (2,)).method
    rewards = rewards_of(3, method.group_size)
    rewards[1, 4] += 100  # beyond the clip where the std is that of the batch
    scale, ddof, eps = ADVANTAGES[name]
    expected = []
    for group in rewards:
        std = np.std(rewards if scale == "batch" else group, ddof=ddof)
        expected.append(np.clip((group - np.mean(group)) / (std + eps), -5, 5))
    assert (np.max(expected) == 5) == (scale == "batch")
    give = jax.jit(method.credit)
    steps, found = credit(method, rewards.reshape(-1), give=give)
    each = found.advantage.reshape(rewards.size, -1)
    for column in each.T:
        assert_allclose(column, np.reshape(expected, -1), rtol=1e-4, atol=1e-5)
    sample = found.edge.reshape(each.shape) // len(steps)
    assert_array_equal(sample, np.arange(rewards.size)[:, None] + 0 * sample)
    assert (found.weight == 1).all()
    # tied groups: zero, and outside the loss where published so
    rewards = rewards_of(3, method.group_size)
    rewards[1] = 0.7
    _, found = credit(method, rewards.reshape(-1), give=give)
    advantage, weight = (x.reshape(3, -1) for x in (found.advantage, found.weight))
    assert not advantage[1].any() and advantage[0].any() and advantage[2].any()
    assert (weight[[0, 2]] == 1).all()
    assert (weight[1] == (0 if name.startswith("flow") else 1)).all()


def test_only_the_best_and_the_worst_reach_the_update():
    rewards = rewards_of(4, 6)
    rewards[2] = 1.0  # tied, and still of the same number of transitions
    make = functools.partial(flow_grpo.preset, "dance_grpo", (2,), group_size=6)
    every, method = make().method, make(best_and_worst=(2, 1)).method
    steps, found = credit(method, rewards.reshape(-1))
    assert found.edge.shape == (4 * 3 * 9,)
    sample = found.edge.reshape(12, 9) // len(steps)
    assert (sample == sample[:, :1]).all()
    for group in (0, 1, 3):
        order = np.argsort(rewards[group]) + 6 * group
        kept = set(sample[3 * group : 3 * group + 3, 0])
        assert kept == {order[0], order[-1], order[-2]}
    # advantages compare the whole group
    _, whole = credit(every, rewards.reshape(-1))
    advantage = dict(zip(whole.edge // len(steps), whole.advantage))
    for s, a in zip(sample[:, 0], found.advantage.reshape(12, 9)[:, 0]):
        assert advantage[s] == a


def test_random_transitions_are_distinct_and_of_the_published_number():
    method = flow_grpo.preset("dance_grpo", (2,)).method
    rewards = rewards_of(16, 12).reshape(-1)
    steps, found = credit(method, rewards)
    assert_array_equal(steps, np.arange(15))  # the last never trains
    chosen = found.edge.reshape(192, -1) % 15
    assert chosen.shape[1] == int((16 - 1) * 0.6) == 9
    assert all(len(set(row)) == 9 for row in chosen)
    counts = np.bincount(chosen.reshape(-1), minlength=15) / 192
    # binomial with p = 9/15: within 5 standard errors
    assert_allclose(counts, 0.6, atol=5 * np.sqrt(0.24 / 192))
    _, other = credit(method, rewards, key=1)
    assert (other.edge != found.edge).any()


def test_grids_and_windows_are_as_published():
    # shifted by three, at the first inner knot: 3 u / (1 + 2 u)
    for name in flow_grpo.PRESETS:
        grid = flow_grpo.preset(name, (2,)).method.grid
        u = 1 - 1 / (len(grid) - 1)
        assert_allclose(grid[1], 3 * u / (1 + 2 * u), rtol=1e-12)
    fast = flow_grpo.preset("flow_grpo_fast", (2,)).method
    starts = []
    for i in range(40):
        on = np.flatnonzero(fast.table(i).mask)
        assert_array_equal(on, on[0] + np.arange(3))
        starts.append(on[0])
    assert set(starts) == {0, 1, 2}  # both ends of [0, 5 - 3]
    mix = flow_grpo.preset("mix_grpo", (2,)).method
    for i, start in ((0, 0), (24, 0), (25, 1), (25 * 20, 20), (25 * 21, 0)):
        table, plan = mix.plan(i)
        assert_array_equal(np.flatnonzero(table.mask), start + np.arange(4))
        assert_array_equal(plan["steps"], start + np.arange(4))


def drawn(method):
    shrink = lambda x, t, cond: 0.3 * x + jnp.sin(t)[:, None]  # noqa: E731
    keys, given = jax.random.split(jax.random.key(5), 3), method.plan(0)
    walk = jax.jit(method.rollout, static_argnames="velocity")
    samples = flow_rl.samples_of(keys, method.group_size)
    return jax.tree.map(np.asarray, walk(samples, shrink, *given))


def at_window(start, **options):
    window = {"schedule": "fixed", "size": 3, "low": start}
    options |= {"steps": 8, "group_size": 4, "window": window}
    return flow_grpo.preset("mix_grpo", (2,), **options).method


def test_states_before_the_window_are_those_of_the_ode_and_the_same_in_a_group():
    # invariant 14
    method = at_window(0)
    _, record = drawn(method)
    noise = record.states.reshape(3, 4, 4, 2)[:, :, 0]
    assert_array_equal(noise, np.broadcast_to(noise[:, :1], noise.shape))
    samples, late = drawn(at_window(3))
    entry = late.states.reshape(3, 4, 4, 2)[:, :, 0]
    assert_array_equal(entry, np.broadcast_to(entry[:, :1], entry.shape))
    x = np.asarray(noise[:, 0], np.float64)
    for t, t_next in zip(method.grid[:3], method.grid[1:4]):
        x = x - (t - t_next) * (0.3 * x + np.sin(t))
    assert_allclose(entry[:, 0], x, atol=1e-5)
    assert len(np.unique(noise[:, 0, 0])) == 3
    _, free = drawn(at_window(0, same_noise=False))
    assert len(np.unique(free.states.reshape(12, 4, 2)[:, 0, 0])) == 12
    after = late.states.reshape(12, 4, 2)[:, 1]
    assert len(np.unique(after[:, 0])) == 12 == len(np.unique(samples[:, 0]))


@pytest.mark.parametrize("start", [0, 2])
def test_the_record_keeps_the_states_of_the_window_alone(start):
    _, record = drawn(at_window(start))
    assert (
        record.states.nbytes
        == flow_rl.stored_bytes(at_window(start), 3)
        == 12 * (3 + 1) * 2 * 4
    )
    assert len(record) == 12 * 3
    assert_array_equal(record.target, record.source + 1)
    # each state inside a chain ends one transition and begins the next
    ends = np.bincount(np.concatenate([record.source, record.target]), minlength=48)
    assert_array_equal(ends, [1, 2, 2, 1] * 12)
    assert_array_equal(record.step, np.tile(start + np.arange(3), 12))
    assert_array_equal(record.sample, np.repeat(np.arange(12), 3))


def test_bad_settings(refused):
    preset = functools.partial(flow_grpo.preset, "flow_grpo", (2,))
    refused("group_size=1: an advantage compares", preset, group_size=1)
    refused("group_size=0 must be at least 1", preset, group_size=0)
    refused("no step of preset='flow_grpo' with strength=0.0", preset, strength=0.0)
    refused(r"low=9 is outside \[0, 7\]", preset, window={"size": 3, "low": 9})
    refused(r"low=0 is outside \[0, -1\]", preset, window={"size": 11})
    refused(r"high=12 is outside \[1, 10\]", preset, window={"size": 2, "high": 12})
    refused("trained='last' is not one of", preset, trained="last")
    refused("scale='groups' is not one of.*'group'", preset, scale="groups")
    refused("reduction='max' is not one of", preset, reduction="max")
    refused(r"ddof=2 is outside \[0, 1\]", preset, ddof=2)
    refused("eps=-1.0 is outside", preset, eps=-1.0)
    refused(r"fraction=0.0 is outside \(0, 1\]", preset, fraction=0.0)
    refused("advantage_clip=0.0 is outside", preset, advantage_clip=0.0)
    refused(r"best \+ worst=0 is outside \[1, 24\]", preset, best_and_worst=(0, 0))
    refused(r"best \+ worst=25 is outside \[1, 24\]", preset, best_and_worst=(20, 5))
    refused("worst=-1 must be at least 0", preset, best_and_worst=(5, -1))
    refused("'grid' is all of the grid", preset, grid=flows.uniform_grid(4), steps=3)
    refused("kl_kind='exact' is not one of", preset, objective={"kl_kind": "exact"})
    refused("clip_range low=0.0 is outside", preset, objective={"clip_range": 0.0})
    refused("updates=0 must be at least 1", preset, updates=0)
    words = "FlowObjective has no setting 'clip_rang'.*mean 'clip_range'"
    refused(words, preset, objective={"clip_rang": 1e-4}, error=TypeError)
    refused("ddpm", preset, preset="ddpm", error=(ValueError, KeyError))
    refused("noise_level", preset, noise_level=0.7, error=TypeError)
    message = "preset='flow_grp' is not one of.*mean 'flow"
    refused(message, flow_grpo.preset, "flow_grp", (2,))


def test_the_first_share_of_all_steps_trains():
    for changes, expected in (
        ({}, 9),
        ({"final": "x0_hat"}, 9),
        ({"preset": "flow_cps"}, 9),
        ({"window": {"size": 3, "schedule": "fixed"}}, 3),
        ({"fraction": 0.5}, 5),
        ({"grid": flows.uniform_grid(6)}, 5),
    ):
        shift = {} if "grid" in changes else {"shift": 1.0}
        method = flow_grpo.preset("flow_grpo", (2,), **shift, **changes).method
        table, plan = method.plan(0)
        assert_array_equal(plan["steps"], np.arange(expected))
        assert changes or table.mask.all()
        assert "grid" not in changes or (method.grid == changes["grid"]).all()
