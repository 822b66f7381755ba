"""The on-policy iteration: what it learns, and what it must never do.

On eight devices it is what it is on one: tests/train/test_sharding.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import lowered, same
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import envs, models, quant, rl, train
from tmdjax.systems.fpo import FPO
from tmdjax.systems.policyflow import PolicyFlow
from tmdjax.systems.ppo import GaussianPolicy
from tmdjax.train import NonFiniteError, on_policy
from tmdjax.train.on_policy import ControlSettings, check, jit_iterations, make_trainer
from tmdjax.train.on_policy.state import Parts

KEY = jax.random.key(0)
METHODS = {
    "ppo": GaussianPolicy(hidden=(16,), entropy_coefficient=0.0, initial_std=0.5),
    # with 5 steps all of these diverge once the flow is narrow, whatever the rate
    "policyflow": PolicyFlow(
        hidden=(16,), steps=10, entropy_coefficient=0.0, brownian_coefficient=0.0,
        initial_std=0.5,
    ),
    "fpo": FPO(hidden=(16,), steps=3, pairs=2),
}  # fmt: skip
TINY = ControlSettings(unroll=8, epochs=2, minibatches=2, critic_hidden=(16,))
MULTI = envs.MultiGoal()
LEARNING = {
    "iterations": 120, "learning_rate": 3e-3, "discount": 0.9, "epochs": 4,
    "value_clip": None,
}  # fmt: skip
AFRESH = {"gae": "per_minibatch", "advantages": "none", "value_clip": None}
AFRESH["learning_rate"] = 0.1
_QUIET = ("skipped_in_a_row", "first_ratio_error", "action_clip_fraction")
_QUIET += ("invalid_steps", "broken_environments")
GOOD = {"action_abs_max": np.ones(2), "action_abs_max_env": np.arange(2.0)}
GOOD |= dict.fromkeys(_QUIET, np.zeros(2))
PAIRS = [(name, probe) for name in ("ppo", "policyflow") for probe in envs.PROBES]
# the trainer's parts once, and the choice that only a flow need not make
CHEAP = [("ppo", "follow"), ("ppo", "delayed"), ("ppo", "endless")]
CHEAP += [("policyflow", "two_peaks")]


def trained(method, environment=MULTI, count=16, iterations=3, **changes):
    settings = dataclasses.replace(TINY, **changes)
    trainer = make_trainer(envs.Vector(environment, count), method, settings)
    run = jit_iterations(trainer, iterations)
    state, metrics = run(jax.jit(trainer.init)(KEY), KEY)
    return trainer, state, jax.device_get(metrics)


@dataclasses.dataclass(frozen=True)
class Breaking(envs.MultiGoal):
    """A point mass whose simulator breaks beyond x = 3."""

    def step(self, state, action, key):
        step = super().step(state, action, key)
        bad = step.state.position[0] > 3
        broken = lambda x: jnp.where(bad, jnp.nan, x)  # noqa: E731
        seen, reward = broken(step.observation), broken(step.reward)
        return step._replace(observation=seen, reward=reward)


@functools.cache
def compiled(name):
    """A trainer in an environment that breaks, its start, and two iterations."""
    changes = {"normalise": "running", "learning_rate": 1e-3, "diagnosed_samples": 32}
    changes["target_kl"] = None if name == "fpo" else 0.01
    settings = dataclasses.replace(TINY, **changes)
    trainer = make_trainer(envs.Vector(Breaking(), 16), METHODS[name], settings)
    return trainer, jax.jit(trainer.init), jit_iterations(trainer, 2)


@functools.cache
def four_iterations(name):
    """The state and both halves' metrics."""
    _, start, run = compiled(name)
    state, first = run(start(KEY), KEY)
    state, second = run(state, KEY)
    metrics = jax.tree.map(lambda *x: np.concatenate(x), first, second)
    return jax.device_get(state), metrics


@pytest.mark.parametrize("name", METHODS)
def test_16_compiled_once_donated_and_repeatable(name, count_compiles):
    _, start, run = compiled(name)
    first = start(KEY)
    state, early = run(first, KEY)
    assert all(x.is_deleted() for x in jax.tree.leaves(first.learner.params))
    with count_compiles() as found:
        state, late = run(state, KEY)
        jax.block_until_ready(state)
    assert not found
    again, metrics = four_iterations(name)
    same(again, state)
    same(metrics, jax.tree.map(lambda *x: np.concatenate(x), early, late))
    assert state.iteration == 4
    assert (np.diff(metrics["reward_mean"]) != 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_broken_steps_are_counted_and_never_learned_from(name):
    state, metrics = four_iterations(name)
    assert metrics["invalid_steps"].sum() > 0 and state.skipped == 0
    broken = 16 * metrics["broken_environments"]
    assert (broken == np.round(broken)).all() and broken.max() >= 1
    assert (broken <= metrics["invalid_steps"]).all()
    for leaf in jax.tree.leaves((state.learner.params, state.statistics, metrics)):
        assert np.isfinite(leaf).all()
    # statistics move after the update: what is trained on is what was seen
    assert state.statistics.count == 4 * 16 * 8
    assert metrics["first_ratio_error"].max() <= (1e-5 if name == "fpo" else 1e-6)
    if name == "policyflow":  # which is diagnosed after the update
        assert 0.3 < metrics["ratio_correlation"][0] <= 1
        assert 0 < metrics["ratio_rms_error"][0] < metrics["ratio_spread"][0]


def test_9_learning_rate_follows_the_kl():
    settings = dataclasses.replace(TINY, target_kl=0.01)
    rate = np.float32([1e-4, 1e-4, 1e-4, 1e-4, 9e-3, 1.2e-6])
    kl = np.float32([0.001, 0.03, 0.01, np.nan, 0.0, 1.0])
    found = on_policy.adapted_learning_rate(rate, kl, settings)
    expected = [1.5e-4, 1e-4 / 1.5, 1e-4, 1e-4 / 1.5, 1e-2, 1e-6]
    assert_allclose(found, expected, rtol=1e-6)
    state, metrics = four_iterations("ppo")
    assert (metrics["learning_rate"] != np.float32(1e-3)).any()
    assert state.learning_rate == metrics["learning_rate"][-1]
    assert (four_iterations("fpo")[1]["learning_rate"] == np.float32(1e-3)).all()


OPTIONS = {
    "critic_learning_rate": 0.05, "learning_rate_cycle": (2, 1, 0.5), "critic_warmup": 1,
    "critic_cycle_share": 0.8,
    "target_kl": 1e-9, "kl_rule": "stop", "scale_rewards": True, "normalise": "fixed",
    "truncation": "legacy",
}  # fmt: skip


@functools.cache
def with_options():
    """A trainer with every option that others leave out, and one iteration."""
    settings = dataclasses.replace(TINY, **OPTIONS)
    trainer = make_trainer(envs.Vector(Breaking(), 16), METHODS["ppo"], settings)
    return trainer, jit_iterations(trainer, 1)


def test_critic_warms_up_rates_cycle_and_a_kl_too_large_stops_an_iteration():
    trainer, run = with_options()
    given = {"policy": {"log_std": jnp.float32([-1, -2])}}
    given["statistics"] = rl.RunningStatistics(
        jnp.float32(0), jnp.arange(4.0), jnp.full(4, 4.0)
    )
    state = jax.jit(lambda key: trainer.init(key, **given))(KEY)
    found = []
    same(state.learner.params["policy"]["log_std"], np.float32([-1, -2]))
    for _ in range(3):
        before = jax.device_get(state)
        state, metrics = run(state, KEY)
        found.append((before, jax.device_get(state), jax.device_get(metrics)))
    (start, warm, first), (_, tuned, second), (_, _, third) = found
    same(start.learner.params["policy"], warm.learner.params["policy"])
    assert not np.array_equal(value_at_0(start, 4), value_at_0(warm, 4))
    assert np.array_equal(start.statistics.mean, tuned.statistics.mean)
    rates = [float(m["learning_rate"][0]) for m in (first, second, third)]
    assert_allclose(rates, [0, 2e-4, 1e-4], rtol=1e-6)
    critic = [optax.tree.get(s.learner.opt_state, "critic_rate") for _, s, _ in found]
    assert_allclose(critic, [0.04, 0.05, 0.04], rtol=1e-6)
    # no KL while the policy stays; then all but the first of four minibatches
    assert warm.learner.step == 4 and tuned.learner.step == 5
    assert first["stopped_fraction"][0] == 0 and second["stopped_fraction"][0] == 0.75
    count = tuned.reward_scale.statistics.count  # broken ones are out
    assert 16 * 8 < count < 2 * 16 * 8
    assert tuned.reward_scale.statistics.variance != 1
    assert max(m["first_ratio_error"][0] for m in (first, second, third)) < 1e-5
    # what is learned is the scaled rewards: of a spread of 1e4 they are next to nothing
    large = rl.RunningStatistics(jnp.float32(1e9), jnp.float32(0), jnp.float32(1e8))
    scale = rl.RewardScale(large, jnp.zeros(16))
    again = trainer.init(KEY, **given).replace(reward_scale=scale)
    _, quiet = run(again, KEY)
    assert quiet["reward_mean"][0] == first["reward_mean"][0]
    assert quiet["value_error"][0] < 0.1 * first["value_error"][0]


def test_10_a_legacy_advantage_runs_on_into_the_next_episode():
    """delta = r + discount V' (1 - terminated) - V, cut at terminations alone."""
    rng = np.random.default_rng(0)
    reward, value = np.float32(rng.normal(size=(2, 9, 3)))
    kind = rng.integers(0, 4, (9, 3))
    ended, cut = kind == 0, kind == 1
    assert ended.any() and cut.any()
    step = envs.VectorStep(None, reward, ended, cut, np.ones_like(ended))
    following = np.concatenate([value[1:], np.float32(rng.normal(size=(1, 3)))])
    unroll = on_policy.returns.Unroll(
        np.zeros((9, 3, 1)), None, step, value, following, None
    )
    settings = dataclasses.replace(TINY, truncation="legacy", advantages="none")
    numbers = {"discount": 0.9, "gae_lambda": 0.8}
    found = on_policy.returns.targets(unroll, settings, numbers)
    expected, later = np.zeros((9, 3)), 0.0
    for t in reversed(range(9)):
        delta = reward[t] + 0.9 * following[t] * ~ended[t] - value[t]
        later = expected[t] = delta + 0.72 * ~ended[t] * later
    assert_allclose(found.samples.advantage.reshape(9, 3), expected, rtol=2e-5)
    correct = dataclasses.replace(settings, truncation="final")
    other = on_policy.returns.targets(unroll, correct, numbers).samples.advantage
    assert not np.allclose(other, found.samples.advantage)


def test_10_what_follows_in_legacy_mode_is_the_next_episode():
    """Its first observation, where the last one of the old would be right."""
    trainer, _ = with_options()
    state, method = trainer.init(KEY), METHODS["ppo"]
    drawn = jax.jit(trainer.collect)(state, None, KEY)
    critic = models.ControlMLP(1, (16,), "mish", out_scale=0.01)
    vector = envs.Vector(Breaking(), 16)
    parts = Parts(vector, method, method, trainer.settings, critic, optax.identity())
    unroll = on_policy.returns.unroll_of(parts, state, drawn, state.statistics)
    assert drawn.step.truncated.any()
    assert_array_equal(unroll.next_value[:-1], unroll.value[1:])
    seen = parts.prepare(state.statistics, drawn.vector.observation)
    value = parts.value(state.learner.params["critic"], seen)
    assert_allclose(unroll.next_value[-1], value, rtol=1e-5, atol=1e-7)


def test_13_seeds_and_coefficients_side_by_side_are_runs_one_by_one():
    trainer, start, run = compiled("ppo")
    keys = jnp.stack([KEY, KEY, jax.random.key(1)])
    given = {
        "entropy_coefficient": jnp.float32([0, 3, 0]),
        "learning_rate": jnp.float32([1e-3, 2e-3, 1e-3]),
        "discount": jnp.float32([0.99, 0.5, 0.99]),
    }
    states = jax.jit(jax.vmap(lambda key, c: trainer.init(key, **c)))(keys, given)
    assert_array_equal(states.learning_rate, given["learning_rate"])
    assert_array_equal(states.coefficients["discount"], given["discount"])
    side_by_side = jit_iterations(trainer, 2, seeds=True)
    together, metrics = jax.device_get(side_by_side(states, keys))
    for i, key in ((0, KEY), (2, jax.random.key(1))):
        alone, found = run(start(key), key)
        same({k: v[i] for k, v in metrics.items()}, found, rtol=2e-3, atol=1e-4)
        params = jax.tree.map(lambda x, i=i: x[i], together.learner.params)
        same(params, alone.learner.params, atol=1e-4)
    std, reward = metrics["std"], metrics["reward_mean"]
    assert std[1, -1] > std[0, -1] and reward[0, 0] == reward[1, 0] != reward[2, 0]


def test_an_exploding_flow_is_seen_behind_its_squashing():
    trainer, start, run = compiled("fpo")
    state = start(KEY)
    out = state.learner.params["policy"]["network"]["out"]
    out["kernel"] = 1e6 * out["kernel"]
    _, metrics = run(state, KEY)
    assert metrics["action_clip_fraction"][0] == 0  # all within the bound
    with pytest.raises(NonFiniteError, match="exploded"):
        check(jax.device_get(metrics), trainer.settings)


def at_its_time(pair):
    return pytest.param(*pair, marks=[] if pair in CHEAP else pytest.mark.nightly)


@pytest.mark.parametrize("name, probe", map(at_its_time, PAIRS))
def test_known_optima_are_reached(name, probe):
    """Each probe tests one part: gradient, observation, credit, time limits, choice."""
    environment = envs.PROBES[probe]
    _, state, metrics = trained(METHODS[name], environment, count=64, **LEARNING)
    reward = metrics["reward_mean"]
    best, first, last = environment.optimum, reward[0], reward[-10:].mean()
    assert best - last < 0.2 * (best - first), (first, last)
    error = metrics["first_ratio_error"].max()
    # a narrow Gaussian makes much of rounding; the flow's ratio has none
    assert error == 0 if name == "policyflow" else error < 1e-5
    if probe == "endless":
        # reward 1 for ever is worth 10; a cut taken for an end would make it 5.5
        assert 8.5 < value_at_0(state) < 10.5


def value_at_0(state, size=1):
    critic = models.ControlMLP(1, (16,), "mish", out_scale=0.01)
    params = jax.tree.map(jnp.asarray, state.learner.params["critic"])
    return float(models.functional(critic)(params, jnp.zeros((1, size)))[0, 0])


@pytest.mark.slow
def test_a_coarse_solver_diverges_once_the_flow_is_narrow():
    """What docs/control.md says of 5 solver steps."""
    longer = LEARNING | {"iterations": 400, "learning_rate": 1e-3}
    for steps in (5, 10):
        method = dataclasses.replace(METHODS["policyflow"], steps=steps)
        for probe in ("target", "follow", "two_peaks"):
            _, _, found = trained(method, envs.PROBES[probe], count=64, **longer)
            missed = envs.PROBES[probe].optimum - found["reward_mean"][-10:].mean()
            assert missed > 0.4 if steps == 5 else missed < 0.1, (probe, steps)


def test_a_step_that_is_not_valid_has_no_weight():
    """The loss is told by the advantage alone whether it saw the broken step."""

    class Spy(GaussianPolicy):
        def loss(self, params, behaviour, samples, *rest):
            loss, metrics = super().loss(params, behaviour, samples, *rest)
            return jnp.where(samples.advantage == 0, jnp.nan, loss), metrics

    _, state, metrics = trained(Spy(hidden=(4,)), Breaking(), iterations=1)
    assert metrics["invalid_steps"][0] > 0 and state.skipped == 0


def test_bad_minibatches_are_seen_whatever_follows():
    """All are bad until the one with the marked transition; those after are good."""

    class Bad(GaussianPolicy):
        def act(self, *given):
            action, record = super().act(*given)
            return action, {**record, "marked": jnp.arange(len(action)) == 0}

        def loss(self, params, behaviour, samples, *rest):
            loss, metrics = super().loss(params, behaviour, samples, *rest)
            pairs = zip(jax.tree.leaves(params), jax.tree.leaves(behaviour))
            untouched = sum(jnp.abs(a - b).sum() for a, b in pairs) == 0
            bad = untouched & ~samples.record["marked"].any()
            return jnp.where(bad, jnp.nan, loss), metrics

    few = {"unroll": 1, "epochs": 2, "minibatches": 8, "iterations": 8}
    _, state, metrics = trained(Bad(hidden=(4,)), **few)
    skipped = metrics["skipped_in_a_row"]  # the marked one's place in an order of 8
    assert len(set(skipped)) > 1 and skipped.max() < 8
    assert state.skipped == skipped.sum() and state.skipped_in_a_row == 0


@pytest.mark.slow
def test_options_change_what_they_say():
    fast = {"iterations": 2, "learning_rate": 1e-2, "epochs": 1}
    base = trained(METHODS["ppo"], **fast)[2]
    for changes, metric in (
        ({"value_clip": None}, "value_error"),
        ({"value_clip_kind": "released"}, "value_error"),
        ({"reward_scale": 10.0}, "value_error"),
        ({"advantages": "minibatch"}, "policy_loss"),
    ):
        other = trained(METHODS["ppo"], **fast, **changes)[2]
        assert not np.allclose(base[metric], other[metric], rtol=1e-6), changes


class Reporting(GaussianPolicy):
    """Learns nothing, and reports its advantages."""

    def loss(self, params, behaviour, samples, keys, coefficients):
        zero = 0 * samples.advantage
        return zero, {"ratio_error": zero, "advantage": samples.advantage}


class Paid(type(envs.PROBES["endless"])):
    """Reward 1 for any action."""

    def step(self, state, action, key):
        return super().step(state, jnp.full_like(action, 0.7), key)


def test_advantages_follow_the_critic_where_computed_per_minibatch():
    """One observation, reward 1, discount 0: an advantage is 1 - V, V of that visit."""
    given = {"environment": Paid(), "iterations": 1, "epochs": 1, "discount": 0.0}
    method = Reporting(hidden=(4,))
    trainer, one, found = trained(method, minibatches=1, **given, **AFRESH)
    values = [value_at_0(state) for state in (jax.jit(trainer.init)(KEY), one)]
    assert abs(values[1] - values[0]) > 0.01
    assert_allclose(found["advantage"][0], 1 - values[0], rtol=1e-5)
    # half of it moves the critic as far, so that the other half meets values[1]
    for gae, expected in (("per_minibatch", np.mean(values)), ("once", values[0])):
        changes = AFRESH | {"gae": gae, "minibatches": 2}
        found = trained(method, **given, **changes)[2]
        assert_allclose(found["advantage"][0], 1 - expected, rtol=1e-5)


def test_advantages_per_minibatch_are_those_of_the_batch_before_any_update():
    """Episodes end and are cut inside: values of what followed are the right ones."""
    given = {"iterations": 1, "epochs": 1, "minibatches": 1, "value_clip": None}
    given |= {"advantages": "minibatch", "unroll": 16}
    given |= {"environment": envs.MultiGoal(start=1.0, wall=2.0, horizon=6, dt=1.0)}
    once = trained(METHODS["ppo"], **given)
    afresh = trained(METHODS["ppo"], **given, gae="per_minibatch")
    ended = once[2]["terminated_fraction"][0] * 16 * 16
    assert 0 < ended < once[2]["episodes"][0]
    for name in ("policy_loss", "value_error", "grad_norm"):
        assert_allclose(once[2][name], afresh[2][name], rtol=1e-4, atol=1e-5)
    same(once[1].learner.params, afresh[1].learner.params, atol=2e-4)


def test_an_iteration_lowers_for_accelerators():
    trainer = make_trainer(envs.Vector(MULTI, 8), METHODS["policyflow"], TINY)
    exported = lowered(
        jax.jit(trainer.iterate), jax.eval_shape(trainer.init, KEY), None, KEY
    )
    _, metrics = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert "loss" in metrics and "ratio_bias" not in metrics  # not diagnosed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "policyflow"])
def test_images_are_learned_from(name):
    pixels = envs.Push("pixels", side=16)
    _, state, metrics = trained(METHODS[name], pixels, count=8, iterations=2)
    assert state.statistics is None and np.isfinite(metrics["loss"]).all()


def test_acting_and_learning_in_two_precisions(refused):
    pair = quant.Precision(rollout="bf16", train="fp32")
    trainer, _, metrics = trained(METHODS["ppo"], iterations=1, precision=pair)
    assert 1e-4 < metrics["first_ratio_error"].max() < 0.2
    message = "rollout='bf16'.*train='fp32': set both to 'fp32', or raise max_ratio"
    refused(message, check, metrics, trainer.settings, error=rl.RatioError)
    # what ratios are of is computed in the update alone: the flow's shift
    flow = METHODS["policyflow"]
    vector = envs.Vector(MULTI, 16)
    made = make_trainer(vector, flow, dataclasses.replace(TINY, precision=pair))
    state = jax.eval_shape(made.init, KEY)
    drawn = jax.eval_shape(made.collect, state, None, KEY)
    acting, learning = (
        str(jax.make_jaxpr(part)(state, *given, KEY))
        for part, given in ((made.collect, (None,)), (made.learn, (drawn,)))
    )
    assert "bf16" in acting and "bf16" not in learning


def test_faults_stop_a_run_or_are_warned_of(refused):
    check(GOOD, TINY)
    for name, values, error, message in (
        ("first_ratio_error", [0, 1e-3], rl.RatioError, "0.001 in the first"),
        ("first_ratio_error", [0, np.nan], rl.RatioError, "nan in the first"),
        ("skipped_in_a_row", [0, 3], NonFiniteError, "3 updates in a row"),
        ("action_abs_max", [1, 2e3], NonFiniteError, "2000.* environment 1 "),
        ("action_abs_max", [np.nan, 1], NonFiniteError, "nan in environment 0"),
        ("log_prob_clipped", [0, 0.6], ValueError, "no policy gradient flows: 60%"),
    ):
        refused(message, check, GOOD | {name: np.array(values)}, TINY, error=error)
    broken = {"broken_environments": np.array([0, 0.02])}
    several, one = ({"invalid_steps": np.array([0.0, n])} for n in (2, 1))
    refused("2.0% of the environments broke", check, GOOD | broken | several, TINY,
            error=NonFiniteError)  # fmt: skip
    check(GOOD | broken | one, TINY)
    off = dataclasses.replace(TINY, max_ratio_error=None)
    check(GOOD | {"first_ratio_error": np.array([1.0])}, off)
    for name, value, message in (
        ("action_clip_fraction", 0.8, "80% of the actions lie outside"),
        ("std_at_bound", 1.0, "every standard deviation is at its bound"),
        ("log_prob_clipped", 0.2, "20% of the log-probs lie outside log_prob_range"),
    ):
        with pytest.warns(UserWarning, match=message):
            check(GOOD | {name: np.array([0.1, value])}, TINY)


def test_frozen_entries_are_left_as_they_are_by_decay_too():
    rule = on_policy.update.make_rule(
        dataclasses.replace(TINY, weight_decay=0.1), ("base",)
    )
    weight = {"kernel": np.ones((2, 2), np.float32)}
    params = {"policy": {"network": weight, "base": weight}, "critic": weight}
    given = jax.tree.map(np.zeros_like, params), rule.init(params), params
    found = jax.device_get(rule.update(*given)[0])
    assert not found["policy"]["base"]["kernel"].any()
    for moved in (found["policy"]["network"], found["critic"]):
        assert_allclose(moved["kernel"], -0.1, rtol=1e-6)


def test_bad_settings(refused):
    changed = functools.partial(dataclasses.replace, TINY)
    refused("unroll=0", changed, unroll=0)
    refused("learning_rate=0.0 is outside", changed, learning_rate=0.0)
    refused("discount=1.1 is outside", changed, discount=1.1)
    refused("Did you mean 'batch'", changed, advantages="batches")
    refused("normalise='run'", changed, normalise="run")
    refused("target_kl=0.0", changed, target_kl=0.0)
    refused("critic_cycle_share=2 is", changed, critic_cycle_share=2)
    refused("lower=0.01 is outside", changed, learning_rate_bounds=(1e-2, 1e-3))
    refused("gae='each'", changed, gae="each")
    refused("has no batch of advantages", changed, gae="per_minibatch")
    unlike = AFRESH | {"value_clip": 0.2}
    refused("value_clip=None instead of 0.2", changed, **unlike)
    refused("diagnosed_samples=-1", changed, diagnosed_samples=-1)
    refused("critic_learning_rate=0.0", changed, critic_learning_rate=0.0)
    refused("critic_warmup=-1", changed, critic_warmup=-1)
    refused("warm-up=5 is outside", changed, learning_rate_cycle=(5, 5, 0.1))
    refused("share=1.5 is outside", changed, learning_rate_cycle=(5, 1, 1.5))
    refused("must be three numbers", changed, learning_rate_cycle=("x",))
    refused("kl_rule='halt'.*'adapt', 'stop'", changed, kl_rule="halt")
    start = compiled("ppo")[0].init
    mistyped = {"entropy_coeficient": 0.1}
    refused("Did you mean 'entropy_coefficient'", start, KEY, **mistyped)
    refused("clip_range=2.0 is outside", start, KEY, clip_range=2.0)
    refused("discount=1.2 is outside", start, KEY, discount=1.2)
    refused("learning_rate=0.0 is outside", start, KEY, learning_rate=0.0)
    refused("coefficient=-1.0 is outside", start, KEY, entropy_coefficient=-1.0)
    alien = {"policy": {"weights": jnp.zeros(2)}}
    refused("entry of the given policy='weights'.*'log_std'", start, KEY, **alien)
    wide = {"policy": {"log_std": jnp.zeros(3)}}
    words = r"policy\['log_std'\] does not fit.*\(3,\), not \(2,\).*chunk"
    refused(words, start, KEY, **wide)
    few = {"statistics": rl.RunningStatistics.start((3,))}
    refused(r"statistics does not fit.*mean is \(3,\)", start, KEY, **few)
    plain = make_trainer(envs.Vector(MULTI, 4), METHODS["ppo"], TINY).init
    refused("under normalise='none' are not normalised", plain, KEY, **few)
    make = functools.partial(make_trainer, envs.Vector(MULTI, 9), METHODS["ppo"])
    refused(
        "object has no coefficients, init",
        make_trainer,
        envs.Vector(MULTI, 4),
        object(),
        TINY,
        error=TypeError,
    )
    message = "9 environments x unroll=8 = 72 transitions do"
    refused(message, make, changed(minibatches=5))
    refused("whole environments: 9 of them do not", make, changed(**AFRESH))
    four, adaptive = envs.Vector(MULTI, 4), changed(target_kl=0.01)
    trainer = make_trainer(four, METHODS["fpo"], adaptive)
    given = (trainer.iterate, jax.eval_shape(trainer.init, KEY), None, KEY)
    refused("which FPO does not report", jax.eval_shape, *given)
    mesh = train.make_mesh()
    refused("leave out the mesh", jit_iterations, trainer, seeds=True, mesh=mesh)
