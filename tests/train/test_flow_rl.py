import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import Numbered, lowered, mlp, same
from numpy.testing import assert_allclose

from tmdjax import flows, models, quant, rl, train
from tmdjax.models import lora
from tmdjax.rewards import host
from tmdjax.systems import branchgrpo, flow_grpo
from tmdjax.train import flow_rl

KEY = jax.random.key(3)
SHIFTS = {"shift": jnp.asarray([[0.0, 0.0], [0.5, -0.5], [-1.0, 0.3], [0.2, 0.9]])}


def affine(params, frozen):
    return lambda x, t, cond: x @ params["w"] + params["b"] + cond


POLICY = flow_rl.Policy(
    velocity=affine,
    reference=lambda frozen: lambda x, t, cond: 0.4 * x + cond,
    condition=lambda frozen, batch: frozen["shift"][batch["prompt"]],
    frozen=SHIFTS,
)
PARAMS = {"w": jnp.asarray([[0.5, 0.1], [-0.2, 0.3]]), "b": jnp.asarray([0.1, -0.1])}
BATCH = {"prompt": np.arange(4)}
SGD = optax.sgd(0.1)
PRUNED = branchgrpo.Trees(
    grid=flows.uniform_grid(4), event_shape=(2,), splits=(0, 1), prune_width=0.5
)
OBJECTIVES = {
    "plain": {},
    "summed": {"kl_kind": "flow_grpo_code", "reduction": "sum"},
    "weighted": {"kl_kind": "velocity_mse", "step_weight": "inverse_gain"},
}
FAULTS = {
    "raises": r"raised on sample 0 \(prompt: .*array\(1\).*OSError: scoring server is",
    "hangs": r"not answer within 2 s for samples 0 to 5 .*array\(1\)",
    "nan": r"reward of sample 0 \(prompt: .*array\(1\).* is nan",
}


def chains(kind=flow_grpo.Chains, **changes):
    settings = {"event_shape": (2,), "group_size": 3, "fraction": 0.75, **changes}
    return kind(**{"grid": flows.uniform_grid(4), **settings})


def first_coordinate(x, prompts):
    return x[:, 0] + 0.1 * prompts["prompt"]


def make(method=None, reward=first_coordinate, objective=(), policy=POLICY, **options):
    objective = flow_rl.FlowObjective(**{"clip_range": 0.2, **dict(objective)})
    given = (policy, method or chains(), reward, SGD, objective)
    return flow_rl.make_iteration(*given, **options)


def fresh(params=PARAMS):
    return train.create_state(params, SGD)


def arguments(method, iteration=0, batch=BATCH, first=0):
    """What `collect` is called with after the parameters and what is frozen."""
    table, plan = method.plan(iteration)
    return batch, KEY, np.int32(iteration), np.int32(first), table, plan


class Weighted(flow_grpo.Chains):
    """Transitions of uneven weight, some of them 0, and an advantage each."""

    def credit(self, *given):
        found = super().credit(*given)
        index = jnp.arange(found.edge.shape[0])
        advantage = found.advantage + 0.1 * jnp.sin(index)
        return flow_rl.Credit(found.edge, advantage, (index % 4) * 0.5)


def expected_gradient(record, advantage, weight, objective, grid, a=0.7):
    """Sum over transitions, each by the chain rule, in float64; a row each."""
    arrays = (PARAMS["w"], PARAMS["b"], SHIFTS["shift"])
    w, b, shifts = (np.asarray(x, np.float64) for x in arrays)
    record, t, h = jax.tree.map(np.asarray, record), grid[:-1], -np.diff(grid)
    sigma = a * np.sqrt(t / (1 - np.where(t == 1, grid[1], t)))
    gain, std = -h * (1 + sigma**2 * (1 - t) / (2 * t)), sigma * np.sqrt(h)
    weighted = objective.step_weight == "inverse_gain"
    step_weight = std / abs(gain) if weighted else np.ones_like(std)
    step_weight = step_weight / step_weight.mean()
    rows = np.stack([t, h, sigma, gain, std, step_weight])
    t, h, sigma, gain, std, step_weight = rows[:, record.step, None]
    x, y = record.states.astype(np.float64)[np.stack([record.source, record.target])]
    v = x @ w + b + shifts[record.sample // 3]
    away = v - 0.4 * x - shifts[record.sample // 3]
    mean = x * (1 - sigma**2 * h / (2 * t)) + gain * v
    log_prob = -((y - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
    scale = 1 if objective.reduction == "sum" else 1 / 2
    old, adv = record.log_prob[:, None], advantage[:, None]
    r = np.exp(scale * log_prob.sum(1, keepdims=True) - old)
    low, high = 1 - objective.clip_range, 1 + objective.clip_range
    cut = np.where(adv > 0, r > high, r < low)
    surrogate = step_weight * -adv * np.where(cut, np.clip(r, low, high), r)
    d_v = -adv * r * scale * (y - mean) * gain / std**2
    d_v = step_weight * np.where(cut, 0, d_v)
    factors = {"transition": gain**2 / (2 * std**2), "velocity_mse": 1.0}
    factors["flow_grpo_code"] = h * factors["transition"]
    factor = scale * factors[objective.kl_kind]
    kl = factor * np.sum(away**2, 1, keepdims=True)
    share = (weight / weight.sum())[:, None]
    d_v = share * (d_v + objective.kl_coefficient * 2 * factor * away)
    loss = np.sum(share * (surrogate + objective.kl_coefficient * kl))
    clipped = np.sum(share * ((r < low) | (r > high)))
    return {"w": x.T @ d_v, "b": d_v.sum(0)}, loss, np.sum(share * kl), clipped


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_sum_over_transitions(name):
    objective = {"kl_coefficient": 0.3, **OBJECTIVES[name]}
    # 36 transitions become 40: padding changes nothing
    microbatches = 8 if name == "weighted" else 1
    method = chains(Weighted, reduction=objective.get("reduction", "mean"))
    iteration = make(method, objective=objective, microbatches=microbatches)
    objective = flow_rl.FlowObjective(clip_range=0.2, **objective)
    _, record = iteration.programs["rollout"](PARAMS, SHIFTS, *arguments(method))
    # another behaviour policy: some ratios leave the clip range on either side
    away = 0.4 * np.sin(np.arange(36.0)).astype(np.float32)
    record = record.replace(log_prob=record.log_prob + away)
    rewards = np.random.default_rng(0).normal(size=12).astype(np.float32)
    state, metrics = learned(iteration, method, rewards, record)
    groups = rewards.astype(np.float64).reshape(4, 3)
    advantage = (groups - groups.mean(1, keepdims=True)) / (np.std(groups) + 1e-4)
    advantage = np.repeat(advantage.reshape(-1), 3) + 0.1 * np.sin(np.arange(36))
    given = (record, advantage, np.arange(36) % 4 * 0.5, objective, method.grid)
    gradient, loss, kl, clipped = expected_gradient(*given)
    assert 0.1 < clipped < 0.9
    for name in "wb":
        found = (PARAMS[name] - state.params[name]) / 0.1
        atol = 1e-4 * np.abs(gradient[name]).max()
        assert_allclose(found, gradient[name], rtol=1e-4, atol=atol)
    assert_allclose(metrics["loss"], loss, rtol=1e-4, atol=1e-5)
    assert_allclose(metrics["kl"], kl, rtol=1e-4)
    assert_allclose(metrics["clip_fraction_first"], clipped, rtol=1e-5)
    error = np.max(np.abs(np.expm1(-away))[np.arange(36) % 4 > 0])
    assert_allclose(metrics["ratio_error"], error, rtol=1e-4)
    norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def update_of(params, start=PARAMS):
    return jax.tree.map(lambda new, old: np.asarray(new) - old, params, start)


def learned(iteration, method, rewards, record=None):
    batch, key, number, _, *rest = arguments(method)
    if record is None:
        _, record = iteration.programs["rollout"](PARAMS, SHIFTS, *arguments(method))
    given = (SHIFTS, batch, (record,), rewards, key, number, *rest)
    return iteration.programs["update"](fresh(), *given)


def test_rollout_and_update_in_two_precisions():
    """The behaviour's log-probs are those of the rollout; ratios are to recomputed ones."""
    module = models.build({"name": "mlp", "hidden": 16, "depth": 1})
    inputs = (jnp.zeros((1, 2)), jnp.zeros(1), None)
    params = models.init_params(module, jax.random.key(0), *inputs)
    pair = quant.Precision(rollout="bf16", train="fp32")
    narrow, wide = (
        models.functional(models.with_recipe(module, recipe))
        for recipe in (pair.rollout, pair.train)
    )
    policy = flow_rl.Policy(
        velocity=lambda params, frozen: lambda x, t, cond: wide(params, x, t),
        rollout_velocity=lambda params, frozen: lambda x, t, cond: narrow(params, x, t),
        precision=pair,
    )
    objective = {"clip_range": 0.01, "proximal": "behaviour"}
    plain = make(policy=policy, objective=objective)
    drawn = plain.collect(fresh(params), BATCH, KEY)
    record = drawn.records[0]

    def scored(velocity):
        found = flows.score_transitions(
            velocity(params, ()),
            record.states[record.source],
            record.states[record.target],
            drawn.table.rows(record.step, jnp.float32),
        )
        return np.max(np.abs(found.log_prob - record.log_prob))

    assert scored(policy.acting) < 1e-5 and scored(policy.velocity) > 1e-3
    # a network that starts at zero has equal log-probs in every precision: keep looking
    silent = params | {"out": jax.tree.map(jnp.zeros_like, params["out"])}
    state, metrics = plain(fresh(silent), BATCH, KEY)
    assert 0 < metrics["ratio_error"] < 1e-5
    assert "behaviour_ratio_error" not in metrics
    with pytest.raises(rl.RatioError, match="rollout='bf16'.*train='fp32'.*recompute"):
        plain.learn(fresh(params), drawn, KEY)
    objective = {"clip_range": 0.01}  # 'auto' recomputes here
    # 24 transitions of 36 in two microbatches: recomputed as they are trained
    corrected = make(policy=policy, objective=objective, microbatches=2)
    state, metrics = corrected.learn(fresh(params), drawn, KEY)
    assert metrics["ratio_error"] < 1e-5 and metrics["clip_fraction_first"] == 0
    assert_allclose(metrics["behaviour_ratio_error"], scored(policy.velocity), rtol=0.1)
    assert np.abs(update_of(state.params, params)["out"]["kernel"]).max() > 0


def test_tied_groups_count_in_neither_loss_nor_denominator():
    rewards = np.random.default_rng(1).normal(size=12).astype(np.float32)
    rewards[3:6] = rewards[9:12] = 0.5
    objective = {"kl_coefficient": 0.3}
    some = chains(scale="none")
    iteration = make(some, objective=objective)
    state, metrics = learned(iteration, some, rewards)

    # the same four groups, of which the two tied ones are left out by hand
    class Alive(flow_grpo.Chains):
        def credit(self, *given):
            found = super().credit(*given)
            alive = np.flatnonzero(np.arange(36) // 9 % 2 == 0)
            return flow_rl.Credit(*(column[alive] for column in found))

    alone = chains(Alive, scale="none", drop_tied=False)
    other, other_metrics = learned(make(alone, objective=objective), alone, rewards)
    same(state.params, other.params, rtol=1e-6)
    for name in ("kl", "loss"):
        assert_allclose(metrics[name], other_metrics[name], rtol=1e-5)
    assert metrics["tied_group_fraction"] == 0.5
    # all tied: no gradient, not even of the KL, and nothing is NaN
    state, metrics = learned(iteration, some, np.ones(12, np.float32))
    same(state.params, PARAMS)
    assert metrics["grad_norm"] == metrics["loss"] == state.skipped == 0
    assert metrics["tied_group_fraction"] == 1
    assert all(np.isfinite(value) for value in metrics.values())
    # those that stay feel the KL alone
    stay = chains(drop_tied=False, scale="group")
    _, metrics = learned(make(stay, objective=objective), stay, np.ones(12, np.float32))
    assert_allclose(metrics["loss"], 0.3 * metrics["kl"], rtol=1e-6)
    assert metrics["kl"] > 0 and metrics["grad_norm"] > 0


def test_chunks_and_microbatches_change_memory_not_maths():
    method = chains(same_noise=True)
    whole = make(method, updates=2)
    samples, record = whole.programs["rollout"](PARAMS, SHIFTS, *arguments(method))
    drawn = []
    for i in (0, 2):
        half = {"prompt": BATCH["prompt"][i : i + 2]}
        given = arguments(method, batch=half, first=i)
        drawn.append(whole.programs["rollout"](PARAMS, SHIFTS, *given))
    together = np.concatenate([samples for samples, _ in drawn])
    assert_allclose(together, samples, atol=1e-5)
    same(rl.concatenate([record for _, record in drawn], 6), record, atol=1e-5)
    expected, metrics = whole(fresh(), BATCH, KEY)
    update = update_of(expected.params)
    # 18 transitions a minibatch, padded to 20
    parts = make(method, updates=2, chunks=2, microbatches=4)
    state, other = parts(fresh(), BATCH, KEY)
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(update_of(state.params))):
        assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    for name in metrics.keys() - {"ratio_error"}:
        assert_allclose(metrics[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", [chains(), PRUNED])
def test_samples_of_a_prompt_may_have_conditions_of_their_own(method):
    """Update and rollout agree on them, or the first ratio would not be 1."""
    size = method.group_size
    own = lambda frozen, batch: batch["shift"].reshape(-1, 2)  # noqa: E731
    iteration = make(method, policy=POLICY._replace(condition=own), chunks=2)
    found = []
    for spread in (0.0, 1.0):
        shift = SHIFTS["shift"][:, None] + spread * jnp.arange(size)[:, None]
        state, metrics = iteration(fresh(), {**BATCH, "shift": shift}, KEY)
        assert 0 < metrics["ratio_error"] < 1e-5
        found.append(np.asarray(state.params["w"]))
    assert not np.allclose(*found, rtol=0.01)


def test_iterations_differ_and_depend_on_key_and_number_alone():
    iteration = make()
    first, _ = iteration(fresh(), BATCH, KEY)
    again, _ = iteration(fresh(), BATCH, KEY)
    same(first.params, again.params)
    other, _ = iteration(fresh(), BATCH, jax.random.key(4))
    later, _ = iteration(fresh().replace(step=jnp.int32(1)), BATCH, KEY)
    for state in (other, later):
        assert not np.array_equal(state.params["b"], first.params["b"])


@pytest.mark.parametrize("method", [chains(), PRUNED])
def test_programs_lower_for_accelerators(method):
    iteration = make(method, objective={"kl_coefficient": 0.1}, updates=2, chunks=2)
    given = (PARAMS, SHIFTS, *arguments(method, batch={"prompt": np.arange(2)}))
    samples, record = jax.eval_shape(iteration.programs["rollout"], *given)
    assert samples.shape[1:] == (2,) and isinstance(record, rl.Transitions)
    lowered(iteration.programs["rollout"], *given)
    batch, key, number, _, *rest = arguments(method)
    rewards = np.zeros(2 * len(samples), np.float32)
    given = (SHIFTS, batch, (record,) * 2, rewards, key, number, *rest)
    lowered(iteration.programs["update"], fresh(), *given)


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax
from tmdjax import flows, models, train
from tmdjax.systems import branchgrpo, flow_grpo
from tmdjax.train import flow_rl

net = models.build({"name": "mlp", "hidden": 128, "depth": 2})
apply = models.functional(net)
params = models.init_params(net, jax.random.key(0), jnp.zeros((1, 4)), jnp.zeros(1), None)
shape = {"grid": flows.uniform_grid(4), "event_shape": (4,)}
chains = flow_grpo.Chains(**shape, group_size=3)
trees = branchgrpo.Trees(**shape, splits=(0, 1), prune_width=0.5)
policy = flow_rl.Policy(
    velocity=lambda params, frozen: lambda x, t, cond: apply(params, x, t, None)
    + frozen["base"] * x + cond,
    reference=lambda frozen: lambda x, t, cond: frozen["base"] * x,
    condition=lambda frozen, batch: batch["shift"],
    frozen={"base": jnp.float32(0.5)},
)
batch = {"shift": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)}
optimizer = optax.sgd(0.1)
key = jax.random.key(3)

def run(mesh, method, **options):
    iteration = flow_rl.make_iteration(
        policy, method, lambda x, prompts: x[:, 0] + prompts["shift"][:, 1], optimizer,
        flow_rl.FlowObjective(clip_range=0.2, kl_coefficient=0.1), mesh=mesh, updates=2,
        ema_decay=0.9, **options)
    state = train.create_state(params, optimizer, ema=True)
    history = []
    for _ in range(3):
        state, metrics = iteration(state, batch, key)
        history.append({name: float(value) for name, value in metrics.items()})
    programs = [p._cache_size() for p in iteration.programs.values()]
    assert programs == [1, 1], programs
    return iteration, state, history

mesh = train.make_mesh(2, 4)
for method in (trees, chains):
    one, expected, history = run(None, method)
    eight, state, other = run(mesh, method, chunks=2, microbatches=2)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, state.params, expected.params)
    for a, b in zip(history, other):
        for name in a.keys() - {"ratio_error", "clip_fraction_last"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)
assert any(not p.sharding.is_fully_replicated for p in jax.tree.leaves(state.params))

# rollout and update of one device are about an eighth of the work
table, plan = method.plan(0)
zero, half = np.int32(0), {"shift": batch["shift"][:8]}
start = train.create_state(params, optimizer, ema=True)
drawn = (start.params, policy.frozen, half, key, zero, zero, table, plan)
records = (jax.eval_shape(one.programs["rollout"], *drawn)[1],) * 2
done = (start, policy.frozen, batch, records, np.zeros(48, np.float32), key, zero, table, plan)
for whole, cut, given in (
    (one.programs["rollout"], eight.programs["rollout"], drawn), (one.programs["update"], eight.programs["update"], done)
):
    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=train.replicated(mesh))
    on_mesh = jax.tree.map(placed, given[:2]) + given[2:]
    # a loop counts as one turn of it, in both alike
    a = whole.lower(*given).compile().cost_analysis()["flops"]
    b = cut.lower(*on_mesh).compile().cost_analysis()["flops"]
    assert b < a / 5, (a, b)
try:
    eight(state, {"shift": batch["shift"][:12]}, key)
except ValueError as error:
    print(error)
print("same")
"""


@pytest.mark.slow
def test_eight_devices_equal_one(run_python):
    said = run_python(EIGHT_DEVICES, devices=8)
    assert "a chunk of 6 prompts does not divide over 8 devices" in said
    assert said.strip().endswith("same")


def test_rewards_see_their_own_prompt():
    seen = []

    def fn(images, prompts):
        seen.append((images.shape, [int(p["prompt"]) for p in prompts]))
        return images[:, 0] + 0.1 * np.array([p["prompt"] for p in prompts])

    batch = {"prompt": np.array([2, 0, 3, 1])}
    iteration = make(reward=flow_rl.HostReward(fn=fn), chunks=2)
    state, metrics = iteration(fresh(), batch, KEY)
    assert sorted(seen) == [((6, 2), [2, 2, 2, 0, 0, 0]), ((6, 2), [3, 3, 3, 1, 1, 1])]
    # the same reward on the device, and with the batch there already
    placed = jax.tree.map(jnp.asarray, batch)
    other, other_metrics = make(chunks=2)(fresh(), placed, KEY)
    same(state.params, other.params, rtol=1e-5)
    assert_allclose(metrics["reward_mean"], other_metrics["reward_mean"], rtol=1e-5)


def test_chunks_are_scored_while_others_are_drawn():
    both = threading.Barrier(2, timeout=20)

    def fn(images, prompts):
        both.wait()  # passes only when two chunks are pending at once
        return images[:, 0]

    _, metrics = make(reward=flow_rl.HostReward(fn=fn), chunks=2)(fresh(), BATCH, KEY)
    assert np.isfinite(metrics["reward_mean"])


def pair(number):
    """A batch of two prompts."""
    return {"prompt": np.array([(number + 1) % 4, (number + 2) % 4])}


class Scorer:
    """First coordinates; with a fault, prompt 1 fails from the fifth iteration on."""

    def __init__(self):
        self.fault, self.calls, self.released = None, 0, threading.Event()

    def __call__(self, images, prompts):
        self.calls += len(prompts) > 1
        if self.fault is None or self.calls < 5:
            return images[:, 0]
        at_fault = [int(p["prompt"]) == 1 for p in prompts]
        if self.fault == "hangs":
            self.released.wait(60)
        if self.fault == "raises" and any(at_fault):
            raise OSError("scoring server is gone")
        return np.where(at_fault, np.nan, images[:, 0])


def test_a_failing_reward_stops_the_run_which_resumes(tmp_path, refused):
    scorer = Scorer()
    method = chains(window={"size": 2, "iterations": 2, "high": 4}, fraction=1.0)
    iteration = make(method, flow_rl.HostReward(fn=scorer, timeout=2))

    def run(folder=None):
        options = {"num_steps": 7, "log_every": 1, "checkpoint_seconds": (0.0, 0.0)}
        options["checkpoints"] = folder and train.Checkpoints(folder)
        return train.fit(fresh(), iteration, Numbered(pair), key=KEY, **options)

    whole = run()
    for fault, message in FAULTS.items():
        folder = tmp_path / fault
        scorer.fault, scorer.calls = fault, 0
        scorer.released.clear()
        refused(message, run, folder, error=host.RewardError)
        scorer.released.set()
        assert train.Checkpoints(folder).steps()[-1] == 4
        scorer.fault = None
        resumed = run(folder)
        assert resumed.finished and int(resumed.state.step) == 7
        same(resumed.state, whole.state)


def scaled(x, prompts):
    return x[:, 0] * prompts["scale"]


def test_a_failed_iteration_leaves_its_state_usable(refused):
    for reward, shape in (
        (lambda x, prompts: x, r"\(12, 2\)"),
        (lambda x, prompts: jnp.mean(x), r"\(\)"),
        (flow_rl.HostReward(fn=lambda x, prompts: x[1:, 0]), r"\(11,\)"),
    ):
        message = r"one number a sample, shape \(12,\); got .*" + shape
        given = (fresh(), BATCH, KEY)
        refused(message, make(reward=reward), *given, error=host.RewardError)
    iteration = make(reward=scaled, chunks=2)
    good = {"prompt": np.arange(4), "scale": np.ones(4, np.float32)}
    broken = {**good, "scale": np.array([1, 1, 1, np.nan], np.float32)}
    state = fresh()
    message = r"sample 9 \(prompt: .*array\(3\).* nan.*3 of 6 rewards"
    refused(message, iteration, state, broken, KEY, error=host.RewardError)
    after, _ = iteration(state, good, KEY)
    expected, _ = iteration(fresh(), good, KEY)
    same(after.params, expected.params)
    assert state.params["w"].is_deleted()  # donated by the one that went through


def test_adapters_train_and_the_base_stays():
    apply, base = mlp(hidden=8, depth=1)
    before = jax.tree.map(np.array, base)

    def velocity(adapters, frozen):
        adapted = lora.apply_fn(apply, frozen, 2.0)
        return lambda x, t, cond: adapted(adapters, x, t, cond)

    reference = lambda frozen: velocity({}, frozen)  # noqa: E731
    policy = flow_rl.Policy(velocity, reference, frozen=base)
    iteration = make(policy=policy, objective={"kl_coefficient": 0.1})
    adapters = lora.init(jax.random.key(1), base, 2, ["out/kernel"])
    state, first = iteration(fresh(adapters), BATCH, KEY)
    assert first["kl"] == 0  # the adapters start at the base
    for _ in range(2):
        state, later = iteration(state, BATCH, KEY)
    assert later["kl"] > 0
    moved = update_of(state.params, adapters)["out"]["kernel"]
    assert moved["a"].any() and moved["b"].any()
    same(base, before)


def test_the_ratio_is_checked_once_there_is_something_to_check(refused):
    """A policy that differs between rollout and update is stopped then."""

    def changed(params, frozen):
        return lambda x, t, cond: x @ params["w"] + 0.1 * (x.shape[0] == 36)

    iteration = make(policy=flow_rl.Policy(changed), reward=scaled)
    state, metrics = iteration(fresh(), {"scale": np.zeros(4, np.float32)}, KEY)
    assert metrics["tied_group_fraction"] == 1 and metrics["ratio_error"] == 0
    given = (state, {"scale": np.ones(4, np.float32)}, KEY)
    refused("before any update.*dropout", iteration, *given, error=rl.RatioError)


def test_skipped_updates_are_counted_and_iterations_go_on():
    numbers = []

    class Counted(flow_grpo.Chains):
        def plan(self, iteration):
            numbers.append(iteration)
            return super().plan(iteration)

    iteration, state = make(chains(Counted), updates=3, skip_above=1e-9), fresh()
    numbers.clear()
    for _ in range(3):
        state, metrics = iteration(state, BATCH, KEY)
        assert metrics["loss"] == metrics["grad_norm"] == 0  # means over good updates
    assert numbers == [0, 1, 2]
    assert int(state.step) == int(state.skipped) == int(state.skipped_in_a_row) == 9
    same(state.params, PARAMS)
    # a resumed state says itself where to go on
    iteration(fresh().replace(step=jnp.int32(21)), BATCH, KEY)
    assert numbers[-1] == 7


def test_bad_settings_batches_and_keys(refused):
    refused("updates=0 must be at least 1", make, updates=0)
    refused("microbatches=0 must be at least 1", make, microbatches=0)
    refused("chunks=0 must be at least 1", make, chunks=0)
    refused(r"low=0.0 is outside \(0, 1\]", make, objective={"clip_range": 0.0})
    refused("clip_range low=1.5 is outside", make, objective={"clip_range": 1.5})
    refused("kl_coefficient=-1.0 is outside", make, objective={"kl_coefficient": -1.0})
    refused("kl_kind='k3' is not one of", make, objective={"kl_kind": "k3"})
    refused("step_weight='gain' is not one of", make, objective={"step_weight": "gain"})
    refused("reduction='max' is not one of", make, objective={"reduction": "max"})
    mixed = "objective reduces log-probs by 'sum', the method by 'mean'"
    refused(mixed, make, objective={"reduction": "sum"})
    given = {"policy": flow_rl.Policy(affine), "objective": {"kl_coefficient": 0.1}}
    refused("kl_coefficient=0.1 needs a reference policy", make, **given)
    with pytest.warns(UserWarning, match="no clipping will ever happen"):
        flow_rl.FlowObjective(clip_range=0.5)
    iterate, state = make(chunks=3), fresh()
    refused("4 prompts do not divide into chunks=3", iterate, state, BATCH, KEY)
    refused("the batch holds no arrays", iterate, state, {}, KEY)
    uneven = {"a": np.arange(3), "b": np.arange(6)}
    refused(r"has shape \(6,\).*batch, 3", iterate, state, uneven, KEY)
    uneven = POLICY._replace(condition=lambda frozen, batch: jnp.ones((5, 2)))
    words = r"a condition has shape \(5, 2\); give one a prompt, \(4, ...\), or one"
    refused(words, make(policy=uneven), state, BATCH, KEY)
    refused("typed key", make(), state, BATCH, jax.random.PRNGKey(0), error=TypeError)
