"""The invariants of BranchGRPO, numbered as in its sheet."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import mlp, same
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import data, flows, rl, train
from tmdjax.core import prng
from tmdjax.systems import branchgrpo, flow_grpo
from tmdjax.train import flow_rl

MIXTURE = flows.gaussian_mixture(**data.MIXTURE)
SPLITS, EIGHT = (0, 2, 4), flows.uniform_grid(8)
Trees = functools.partial(branchgrpo.Trees, grid=EIGHT, event_shape=(2,), splits=SPLITS)
COUNTS = [
    (20, (0, 3, 6, 9), 2, (203, 218, 16)),
    (6, (1, 3), 3, (26, 34, 9)),
    (4, (), 2, (4, 4, 1)),
]
LAST_STEPS = (16, 17, 18, 19, 20)
TWENTY = {"grid": flows.uniform_grid(20), "splits": (0, 3, 6, 9)}
PAPER = functools.partial(Trees, **TWENTY, train_last=True)
NET, PARAMS = mlp(hidden=16, depth=1)
MIXED = {"mix": (4, 2), "correlation": 0.5, "split_scale": 3.0, "train_last": True}


def compiled(function, *names):
    """With results in numpy, where an index compiles nothing."""
    program = jax.jit(function, static_argnames=names)
    return lambda *x, **more: jax.tree.map(np.asarray, program(*x, **more))


fuse = compiled(rl.fuse_rewards, "tree", "rule")
advantages = compiled(rl.depth_advantages, "tree", "baseline", "std_scope", "clip")
tree_rollout = compiled(flows.tree_rollout, "velocity", "splits", "branches")
rollout = compiled(flows.rollout, "velocity")


def rewards(trees, leaves, seed=0):
    return np.random.default_rng(seed).normal(size=(trees, leaves)).astype(np.float32)


def drawn(*methods, prompts=3, key=0, velocity=MIXTURE.velocity):
    """What the first method draws; with several, whose tables alone differ, of each."""
    keys = prng.sample_keys(jax.random.key(key), prompts)
    samples = flow_rl.samples_of(keys, methods[0].group_size)
    plans = [method.plan(0) for method in methods]
    options = {"velocity": velocity, "plan": plans[0][1]}
    walk = compiled(functools.partial(methods[0].rollout, **options))
    found = [(*walk(samples, table=table), table, plan) for table, plan in plans]
    return found[0] if len(found) == 1 else found


@pytest.mark.parametrize("steps, splits, branches, expected", COUNTS)
def test_2_counts(steps, splits, branches, expected):
    tree = rl.make_tree(steps, splits, branches)
    assert (tree.calls, tree.edges, tree.leaves) == expected
    # a call is one row of a network call: count the rows that the network sees
    rows = []

    def velocity(x, t, cond):
        jax.debug.callback(lambda x: rows.append(len(x)), x)
        return x

    keys = prng.sample_keys(jax.random.key(0), 1)
    table = flows.make_table("dance_grpo", flows.uniform_grid(steps))
    x, options = np.ones((1, 2), np.float32), {"splits": splits, "branches": branches}
    tree_rollout(keys, velocity, x, table, **options)
    jax.effects_barrier()
    assert sum(rows) == tree.calls


def test_1_without_splits_a_tree_is_a_rollout():
    keys = prng.sample_keys(jax.random.key(0), 3)
    x = prng.normal(prng.sample_keys(jax.random.key(1), 3), (2,))
    table = flows.make_table("dance_grpo", flows.uniform_grid(6))
    given = (keys, MIXTURE.velocity, x, table)
    samples, states, log_prob = tree_rollout(*given, splits=())
    plain = rollout(*given)
    chain = np.moveaxis(plain.states, 0, 1)
    assert_array_equal(samples[:, 0], chain[:, -1])
    assert_array_equal(states[:, :-1], chain[:, :-1])
    assert_array_equal(log_prob, plain.log_prob.T)


def test_given_noise_is_that_of_the_keys_that_drew_it(refused):
    """Edges in the order of their log-probs; siblings after one another."""
    keys = prng.sample_keys(jax.random.key(0), 3)
    x = prng.normal(prng.sample_keys(jax.random.key(1), 3), (2,))
    window = np.arange(6) != 2  # a step without noise
    table = flows.make_table("dance_grpo", flows.uniform_grid(6), window=window)
    given, splits = (MIXTURE.velocity, x, table), (1, 3)
    drawn = tree_rollout(keys, *given, splits=splits)
    branch, levels = keys[:, None], []
    for step in range(6):
        if step in splits:
            branch = prng.fold_in(branch[..., None], (1 << 21) + jnp.arange(2))
            branch = branch.reshape(3, -1)
        own = prng.fold_in(branch.reshape(-1), step)
        levels.append(prng.normal(own, (2,)).reshape(3, -1, 2))
    noise = jnp.concatenate(levels, 1)
    replayed = tree_rollout(None, *given, splits=splits, noise=noise)
    for ours, theirs in zip(replayed, drawn):
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    other = tree_rollout(None, *given, splits=splits, noise=noise.at[1, 7].add(1.0))
    changed = np.abs(other[1] - drawn[1]).max(-1) > 1e-4
    assert not changed[[0, 2]].any() and changed[1, 8] and not changed[1, 1:8].any()
    walk = functools.partial(flows.tree_rollout, None, *given, splits=splits)
    words = r"noise has shape \(3, 4, 2\); give one an edge, \(3, 17, 2\)"
    refused(words, walk, noise=noise[:, :4])
    refused("give noise that correlates", walk, noise=noise, correlation=0.5)


def test_1_one_split_at_the_root_is_a_group_from_one_noise():
    group = 6
    method = Trees(splits=(0,), branches=group)
    samples, record, *_ = drawn(method, prompts=4000)
    options = {"grid": method.grid, "group_size": group, "fraction": 1.0}
    chains = flow_grpo.preset("dance_grpo", (2,), **options).method
    other = drawn(chains, prompts=4000, key=1)
    assert samples.shape == other[0].shape
    assert len(record) - 4000 * group == len(other[1])  # the last step, unseen
    # the law of the first step: from one root, means alike and noise S in each child
    first = np.asarray(record.states).reshape(4000, -1, 2)[:, 1 : group + 1]
    chain = np.asarray(other[1].states).reshape(4000, group, -1, 2)[:, :, 1]
    for level in (first, chain):
        within = level.var(1, ddof=1)
        expected = method.table().S[0] ** 2
        error = within.std() / np.sqrt(within.size)
        assert abs(within.mean() - expected) < 4 * error
    # and of the samples: mean and spread over roots, to four standard errors
    a, b = (np.asarray(x).reshape(4000, group, 2).mean(1) for x in (samples, other[0]))
    error = np.sqrt((a.var(0) + b.var(0)) / 4000)
    assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * error)
    reward = rewards(4000, group)
    advantage = advantages(fuse(reward, method.tree), method.tree, clip=np.inf)
    given = (reward.reshape(-1), np.repeat(np.arange(4000), group))
    ordinary = rl.group_advantages(*given, num_groups=4000, eps=1e-8)
    for depth in range(1, 9):
        found = advantage[:, method.tree.depth[1:] == depth].reshape(-1)
        assert_allclose(found, ordinary, rtol=2e-4, atol=2e-5)


def test_3_fused_rewards_are_means_over_leaves():
    tree = rl.make_tree(8, SPLITS, 2)
    reward = rewards(3, 8)
    value = fuse(reward, tree)
    assert_allclose(value[:, 0], np.mean(reward, 1), rtol=1e-5)
    leaf = np.flatnonzero(tree.depth == 8)
    for node in range(tree.nodes):
        below = []
        for i, at in enumerate(leaf):
            while at >= 0 and at != node:
                at = tree.parent[at]
            below += [i] if at == node else []
        expected = np.mean(reward[:, below], 1)
        assert_allclose(value[:, node], expected, rtol=1e-5, atol=1e-6)
    # unequal: the root has a leaf and a subtree of two; not the mean of children
    parent, depth = np.array([[-1, 0, 0, 2, 2], [0, 1, 1, 2, 2]])
    unequal = rl.Tree(parent, depth, live=np.array([1, 2]), leaves=3, last_split=1)
    value = fuse(np.array([[3.0, 6.0, 9.0]]), unequal)
    assert_allclose(value, [[6, 3, 7.5, 6, 9]])


def test_4_advantages_by_tree_and_depth():
    tree = rl.make_tree(8, SPLITS, 2)
    reward = rewards(4, 8)
    reward[3] = 2.5
    found = functools.partial(advantages, tree=tree)
    advantage = found(fuse(reward, tree))
    for depth in range(1, 9):
        level = advantage[:3, tree.depth[1:] == depth]
        assert_allclose(level.sum(1), 0, atol=1e-5)
        assert_allclose(level.var(1, ddof=1), 1, rtol=1e-4)
    assert_allclose(np.abs(advantage[:3, :2]), np.sqrt(0.5), rtol=1e-5)
    assert_array_equal(advantage[3], 0)
    assert_allclose(found(fuse(5 * reward + 3, tree)), advantage, atol=1e-4)
    assert_allclose(found(fuse(reward[1:2], tree))[0], advantage[1], atol=1e-6)
    late = rl.make_tree(4, (2,), 2)
    trunk = advantages(fuse(rewards(2, 2), late), late)
    assert_array_equal(trunk[:, :2], 0)  # depths with one node


def test_4_one_standard_deviation_for_the_tree_keeps_magnitudes():
    tree = rl.make_tree(4, (0, 1), 2)
    value = fuse(np.array([[1.0, 2.0, 5.0, 8.0], [4.0, 4.0, 4.0, 4.0]]), tree)
    std = np.std([1, 2, 5, 8], ddof=1)
    found = advantages(value, tree, std_scope="tree")
    assert_allclose(found[0, :2], [-2.5 / std, 2.5 / std], rtol=1e-5)
    assert_array_equal(found[1], 0)
    of_parent = advantages(value, tree, baseline="parent", std_scope="tree")
    assert_allclose(of_parent[0, :2], [-2.5 / std, 2.5 / std], rtol=1e-5)
    halves = np.array([-0.5, 0.5, -1.5, 1.5])
    assert_allclose(of_parent[0, 2:6], halves / std, rtol=1e-4)
    assert_allclose(of_parent[0, 6:], 0, atol=1e-6)  # single children


def test_5_fusion_by_edge_probability():
    tree = rl.make_tree(6, (0, 2), 2)
    reward = rewards(2, 4)
    by_probability = functools.partial(fuse, reward, tree, "prob")
    equal = np.zeros((2, tree.edges), np.float32)
    assert_allclose(by_probability(equal), fuse(reward, tree), rtol=1e-5)
    log_prob = rewards(2, tree.edges, seed=4)
    value = by_probability(log_prob)
    assert_allclose(by_probability(log_prob + 7), value, rtol=1e-4)
    for node in range(tree.nodes):
        children = np.flatnonzero(tree.parent == node)
        if len(children) == 1:
            assert_allclose(value[:, node], value[:, children[0]])
        elif len(children):
            below = value[:, children]
            weight = np.exp(log_prob[:, children - 1])
            expected = np.average(below, axis=1, weights=weight)
            assert_allclose(value[:, node], expected, rtol=1e-4)


def test_6_after_the_last_split_advantages_are_those_of_the_leaves():
    tree = rl.make_tree(8, SPLITS, 2)
    advantage = advantages(fuse(rewards(2, 8), tree), tree)
    leaves = advantage[:, -8:]
    for depth in range(5, 9):
        level = advantage[:, tree.depth[1:] == depth]
        assert_allclose(level, leaves, rtol=1e-5)


def kept_edges(method, reward, iteration=0):
    """(tree, edge) of the transitions that train, and the credit."""
    _, plan = method.plan(iteration)
    log_prob = np.zeros(len(reward) * method.tree.edges, np.float32)
    record = rl.Transitions(*[None] * 5, log_prob)
    reward = reward.reshape(-1)
    group = np.arange(len(reward)) // method.group_size
    given = (reward, group, record, plan, jax.random.key(0))
    credit = compiled(method.credit)(*given)
    edge = credit.edge[credit.weight > 0]
    assert len(set(edge)) == len(edge)
    return {divmod(int(e), method.tree.edges) for e in edge}, credit


def test_7_pruning_counts_of_the_paper():
    reward = rewards(2, 16)
    tree = PAPER().tree
    assert len(kept_edges(PAPER(), reward)[0]) == 2 * 218
    kept, _ = kept_edges(PAPER(prune_depths=LAST_STEPS), reward)
    assert len(kept) == 2 * 138
    assert max(tree.depth[1:][e] for _, e in kept) == 15
    for mode in branchgrpo.WIDTH_MODES:
        kept, _ = kept_edges(PAPER(prune_width=0.5, width_mode=mode), reward)
        assert len(kept) == 2 * 138, mode
    kept, _ = kept_edges(PAPER(prune_width=0.5, width_mode="first_steps"), reward)
    depths = {int(tree.depth[1:][e]) for _, e in kept}
    assert {depth for depth in depths if depth > 10} == set(range(11, 16))
    # without the step that no sample shows
    assert len(kept_edges(PAPER(train_last=False), reward)[0]) == 2 * (218 - 16)


def test_7_width_pruning_keeps_what_it_says():
    reward = rewards(3, 16)
    tree = PAPER().tree
    advantage = advantages(fuse(reward, tree), tree)
    late = np.flatnonzero(tree.depth[1:] > 10)
    best, _ = kept_edges(PAPER(prune_width=0.5), reward)
    for t, e in itertools.product(range(3), late):
        branch = int((e - late[0]) % 16)
        sibling = branch ^ 1
        assert ((t, int(e)) in best) == bool(reward[t, branch] > reward[t, sibling])
    credited = PAPER(prune_width=0.5, baseline="parent", std_scope="tree")
    assert kept_edges(credited, reward)[0] == best  # by value, not by advantage
    extremes, _ = kept_edges(PAPER(prune_width=0.25, width_mode="extremes"), reward)
    for t in range(3):
        chosen = [advantage[t, e] for e in late if (t, int(e)) in extremes]
        ordered = np.sort(advantage[t, late])
        assert len(ordered) == 160
        expected = np.concatenate([ordered[:20], ordered[-20:]])
        assert_allclose(np.sort(chosen), expected, atol=1e-6)


def velocity_of(params, frozen=()):
    return lambda x, t, cond=None: MIXTURE.velocity(x, t) + NET(params, x, t, None)


def target_reward(x, prompts):
    return -jnp.linalg.norm(x - np.array([1.2, 1.6], np.float32), axis=-1)


def test_7_pruning_touches_nothing_but_the_gradient():
    methods = Trees(), Trees(prune_depths=(6, 7)), Trees(prune_width=0.5)
    velocity = velocity_of(PARAMS)
    a, *others = (drawn(method, velocity=velocity) for method in methods)
    record, table = a[1], a[2]

    @jax.jit
    def gradient(credit, weight):
        def loss(params):
            drawn = jax.tree.map(jnp.asarray, record)
            source, target = (x[credit.edge] for x in (drawn.source, drawn.target))
            rows = table.rows(drawn.step[credit.edge], jnp.float32)
            x, y = drawn.states[source], drawn.states[target]
            scores = flows.score_transitions(velocity_of(params), x, y, rows)
            given = (scores.log_prob, drawn.log_prob[credit.edge], credit.advantage)
            return jnp.sum(weight * rl.clipped_surrogate(*given, clip_range=1.0))

        return jax.grad(loss)(PARAMS)

    reward, group = target_reward(a[0], None), np.arange(24) // 8
    full, *parts = (
        compiled(method.credit)(reward, group, record, plan, jax.random.key(0))
        for method, (*_, plan) in zip(methods, (a, *others))
    )
    for b, part in zip(others, parts):
        same(a[:2], b[:2])
        kept = np.isin(full.edge, part.edge[part.weight > 0])
        assert 0 < kept.sum() < (full.weight > 0).sum()
        masked, direct = gradient(full, full.weight * kept), gradient(part, part.weight)
        same(masked, direct, rtol=1e-4, atol=1e-5)


def test_8_sliding_depths():
    slide = functools.partial(branchgrpo.depth_window, LAST_STEPS, stop=9)
    assert slide(0) == slide(29) == [16, 17, 18, 19, 20]
    assert slide(90) == [13, 14, 15, 16, 17]
    assert slide(10_000) == [9, 10, 11, 12, 13]
    method = PAPER(prune_depths=LAST_STEPS, prune_interval=30)
    sizes = {method.plan(i)[1]["kept"].shape for i in range(0, 400, 10)}
    assert len(sizes) == 2  # the only sizes that compile
    kept, _ = kept_edges(method, rewards(1, 16), 90)
    depths = {int(method.tree.depth[1:][e]) for _, e in kept}
    assert depths == set(range(1, 21)) - {13, 14, 15, 16, 17}
    ended = PAPER(prune_depths=(20,), prune_until=5)
    assert len(kept_edges(ended, rewards(1, 16), 5)[0]) == 218


def test_9_siblings():
    table = Trees(splits=(0,), branches=2).table()
    silent = dataclasses.replace(table, c=np.append(0.0, table.c[1:]))
    keys = prng.sample_keys(jax.random.key(0), 2000)

    @jax.jit
    def walks(keys):
        x = flows.initial_noise(keys, (2,))
        v = MIXTURE.velocity(x, jnp.ones(2000))
        mean, _ = flows.transition_mean(table.rows(0, jnp.float32), x, v)
        walk = functools.partial(flows.tree_rollout, keys, MIXTURE.velocity, x)
        cases = ((table, None), (table, 2.0), (table, 0.0), (silent, None))
        return mean, [walk(u, splits=(0,), correlation=s)[1:] for u, s in cases]

    mean, found = jax.tree.map(np.asarray, walks(keys))
    z = [(states[:, 1:3] - mean[:, None]) / table.S[0] for states, _ in found]
    free, correlated, twins, silenced = z
    assert_allclose(np.cov(free.reshape(2000, 4).T), np.eye(4), atol=0.12)
    for noise, (_, log_prob) in zip(z[:3], found):
        density = -0.5 * np.mean(noise**2, -1) - np.log(table.S[0] * np.sqrt(2 * np.pi))
        assert_allclose(log_prob[:, :2], density, atol=1e-4)
    assert_allclose(np.mean(correlated**2), 1, atol=0.05)
    assert_allclose(np.mean(correlated[:, 0] * correlated[:, 1]), 1 / 5, atol=0.05)
    for pair in (twins, silenced):
        assert_array_equal(pair[:, 0], pair[:, 1])


@pytest.mark.filterwarnings("ignore:split_scale")
def test_10_log_prob_at_splits():
    scored = ("proposal", "policy")
    methods = [Trees(split_scale=4.0, split_log_prob=by) for by in scored]
    S, half = methods[0].table().S[0], np.log(2 * np.pi) / 2
    laws = (-0.5 - np.log(4 * S) - half, -8 - np.log(S) - half)
    for (_, record, *_), expected in zip(drawn(*methods, prompts=4000), laws):
        log_prob = record.log_prob.reshape(4000, -1)[:, :2]
        assert abs(log_prob.mean() - expected) < 4 * log_prob.std() / np.sqrt(8000)


@pytest.mark.parametrize("options", [{}, MIXED])
def test_11_ratio_is_one_on_every_edge(options):
    method = Trees(event_shape=(64,), **options)
    velocity = lambda x, t, cond=None: jnp.tanh(x) - t[:, None]  # noqa: E731
    _, record, table, _ = drawn(method, velocity=velocity)

    @jax.jit
    def again(x, x_next, step):
        rows = table.rows(step, jnp.float32)
        return flows.score_transitions(velocity, x, x_next, rows).log_prob

    states = record.states
    found = again(states[record.source], states[record.target], record.step)
    assert np.abs(np.expm1(np.asarray(found) - record.log_prob)).max() < 1e-6


def test_12_mix():
    method = Trees(mix=(8, 1), splits=(0, 3))
    tree = method.tree
    kept, _ = kept_edges(method, rewards(2, 4))
    steps = {int(tree.depth[1:][e]) - 1 for _, e in kept}
    assert steps == {0, 3}  # splits alone: the window lies on one of them
    table = method.table()
    assert list(np.flatnonzero(table.S > 0)) == [0, 3]
    wide = Trees(mix=(4, 2), splits=(0, 3))
    steps = {int(tree.depth[1:][e]) - 1 for _, e in kept_edges(wide, rewards(2, 4))[0]}
    assert steps == {0, 1, 3, 4, 5}
    a, b = drawn(Trees(mix=(1, 1)), Trees())
    same(a[:2], b[:2])


def test_13_levels_in_one_batch_are_nodes_one_by_one():
    table = flows.make_table("dance_grpo", flows.uniform_grid(5))
    keys = prng.sample_keys(jax.random.key(0), 2)
    x, cond = rewards(2, 2), rewards(2 * 4, 2, seed=1)

    velocity = lambda x, t, cond: MIXTURE.velocity(x, t) + cond  # noqa: E731

    @jax.jit
    def child_of(key, child, step, here, cond):
        """Key, noise, mean and end of one node."""
        key = jnp.where(child < 0, key, jax.random.fold_in(key, (1 << 21) + child))
        rows = table.rows(step, jnp.float32)
        v = velocity(here, rows["t"][None], cond)
        mean, x0_hat = flows.transition_mean(rows, here, v)
        z = jax.random.normal(jax.random.fold_in(key, step), (2,))
        return key, z, mean[0], x0_hat[0]

    given = (keys, velocity, x, table, cond)
    samples, states, _ = tree_rollout(*given, splits=(1, 3))
    tree = rl.make_tree(5, (1, 3), 2)
    first_leaf = np.arange(tree.nodes) - (tree.nodes - tree.leaves)
    for node in reversed(range(tree.nodes - tree.leaves)):
        first_leaf[node] = first_leaf[np.flatnonzero(tree.parent == node)[0]]
    assert_array_equal(tree.first_leaf, first_leaf)
    for t in range(2):
        node_keys = {0: keys[t]}
        for node in range(1, tree.nodes):
            parent, step = int(tree.parent[node]), int(tree.depth[node]) - 1
            child = int(np.sum(tree.parent[1 : node + 1] == parent)) - 1
            given = (child if step in (1, 3) else -1, step, states[t, parent][None])
            here = cond[4 * t + first_leaf[parent]]
            found = child_of(node_keys[parent], *given, here)
            node_keys[node], z, mean, x0_hat = found
            if step < 4:
                expected = np.asarray(mean) + np.float32(table.S[step]) * z
                assert_allclose(states[t, node], expected, atol=2e-6)
            else:
                leaf = node - (tree.nodes - tree.leaves)
                assert_allclose(samples[t, leaf], x0_hat, atol=2e-6)


def test_reward_rises_and_nothing_recompiles(count_compiles):
    method = Trees(strength=0.7, prune_depths=(7,), prune_interval=40)
    rule = train.make_optimizer(train.OptimizerConfig(name="adam", learning_rate=3e-3))
    given = (method, target_reward, rule, flow_rl.FlowObjective(clip_range=0.05))
    iteration = flow_rl.make_iteration(flow_rl.Policy(velocity_of), *given, updates=3)
    state = train.create_state(PARAMS, rule)
    batch, history = {"prompt": np.arange(8)}, []
    state, metrics = iteration(state, batch, jax.random.key(1))
    assert float(metrics["ratio_error"]) <= 1e-6
    with count_compiles() as compiled:
        for _ in range(30):
            state, metrics = iteration(state, batch, jax.random.key(1))
            history.append(float(metrics["reward_mean"]))
    assert not compiled
    assert np.mean(history[-5:]) > np.mean(history[:5]) + 0.5


def test_shuffled_credit_keeps_the_advantages_of_a_depth():
    method, control = Trees(), Trees(shuffle=True)
    reward = rewards(2, 8)
    (a, found), (b, mixed) = (kept_edges(m, reward) for m in (method, control))
    assert a == b
    depth = np.tile(method.tree.depth[1:], 2)
    for tree, d in itertools.product(range(2), range(1, 8)):
        edge, live = found.edge, found.weight > 0
        mine = live & (edge // method.tree.edges == tree) & (depth[edge] == d)
        x, y = found.advantage[mine], mixed.advantage[mine]
        assert_allclose(np.sort(x), np.sort(y), rtol=1e-6)
    assert not np.allclose(found.advantage, mixed.advantage)


def test_published_settings_memory_and_bad_inputs(refused):
    with pytest.warns(UserWarning, match="is biased"):
        released = branchgrpo.preset("branchgrpo_released", (16, 16, 3))
    method, objective, updates = released
    assert method.group_size == 16 and objective.clip_range == 1e-3 and updates == 18
    corrected = branchgrpo.preset("branchgrpo", [2], splits=(0, 2), steps=4, shift=1.0)
    assert corrected.method == Trees(splits=(0, 2), grid=corrected.method.grid)
    assert_array_equal(corrected.method.grid, flows.uniform_grid(4))
    assert flow_rl.stored_bytes(method, 2) == 2 * 219 * 16 * 16 * 3 * 4
    table = method.table()
    stds = (table.c * table.S)[[0, 9]]
    assert table.mask.all() and np.allclose(stds, [0.16, 0.23], atol=0.01)  # the sheet
    refused(r"\[0, 6\] for 8 steps; \[7\] are outside", Trees, splits=(0, 3, 7))
    refused("increasing", Trees, splits=(3, 0))
    refused("without repeats", Trees, splits=(0, 3, 3))
    refused("a split step=-2", Trees, splits=(-2, 0))
    refused("nothing to learn", Trees, splits=())
    refused(r"2\^3 = 8 leaves", Trees, num_generations=16)
    refused("split_scale=0", Trees, split_scale=0.0)
    refused(r"prune_depths has \[0, 9\], outside \[1, 8\]", Trees, prune_depths=(0, 9))
    refused("leave no edge", Trees, prune_depths=tuple(range(1, 9)))
    refused("prune_width=1.5", Trees, prune_width=1.5)
    refused("prune_stop=-3", Trees, prune_stop=-3)
    refused("set std_scope='tree'", Trees, baseline="parent")
    refused("reduction='men'", Trees, reduction="men")
    refused("Did you mean 'extremes'", Trees, width_mode="extreme")
    with pytest.warns(UserWarning, match=r"first 2 step\(s\) have one node"):
        Trees(splits=(2, 4))
    with pytest.warns(UserWarning, match="biased"):
        Trees(split_scale=4.0, split_log_prob="policy")
    tree = Trees(split_scale=4.0).tree  # a warning would be an error
    given = (np.zeros((1, tree.nodes)), tree)
    refused("std_scope='tree'", rl.depth_advantages, *given, baseline="parent")
    message = r"rewards have shape \(2, 7\).*8 leaves"
    refused(message, rl.fuse_rewards, jnp.zeros((2, 7)), tree)
    refused("weighs children by log_prob", fuse, np.zeros((1, 8)), tree, "prob")
