"""What a network returns is refused wherever it does not fit its state.

An axis of length 1, one channel too few, would be broadcast and never be seen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows, train
from tmdjax.systems import boss, dmd2, meanflow, reflow, tmd

KEYS = jax.random.split(jax.random.key(0), 4)
X = jnp.ones((4, 3, 2))
TIMES = jnp.full(4, 0.5)
GRID = flows.truncated_grid(2, 1.0)
BATCH = {"x_data": X, "cond": jnp.ones((4, 1))}
PLAN = tmd.make_plan(2, 2, 1, 4)
GUIDED = flows.FlowMapConfig(guidance=2.0)
NULL = np.zeros(1, np.float32)
OUTPUTS = {
    "narrow": lambda x: x[..., :1],
    "flat": lambda x: x[:, :1],
    "scalar": lambda x: jnp.mean(x),
    "whole": lambda x: jnp.ones(x.shape, jnp.int32),
    "several": lambda x: (x, x),
}


def velocity_network(wrong):
    return lambda params, x, *rest: OUTPUTS[wrong](x)


def head(wrong):
    def network(params, y, *rest, method):
        return y if method == "backbone" else OUTPUTS[wrong](y)

    return network


def scorer(output):
    return lambda params, x, t, cond: (OUTPUTS.get(output, lambda x: x)(x), ())


def distilled(networks, loss="generator_loss", **options):
    config = train.DistillationConfig(adversarial_weight=0.0, **options)
    generate = lambda params, batch, keys: params * batch["x_data"]  # noqa: E731
    method = train.Distillation(generate, networks, config, NULL)
    if loss == "generator_loss":
        return method.generator_loss(jnp.ones(()), BATCH, KEYS, {"score": 0.0}, 0.0)
    return method.critic_loss({"score": 0.0}, BATCH, KEYS, jnp.ones(()), 0.0)


def entrances(wrong):
    """Every way by which a network's output meets a state, as functions of nothing."""
    network, split = velocity_network(wrong), head(wrong)
    velocity = functools.partial(network, None)
    right, bad = scorer("right"), scorer(wrong)
    table = flows.make_table("ode", GRID)
    noisy = flows.make_table("flow_cps", flows.uniform_grid(2))
    fine = lambda x, t, cond: x  # noqa: E731
    states = flows.Trajectory(jnp.stack([X] * 3), jnp.zeros((2, 4)), noisy.mask, X)
    average = lambda y, s, r: velocity(y)  # noqa: E731
    return {
        "rollout": lambda: flows.rollout(None, velocity, X, table),
        "pull": lambda: flows.rollout(None, fine, X, table, g=velocity),
        "heun": lambda: flows.rollout(None, velocity, X, table, method="heun"),
        "unipc": lambda: flows.rollout(None, velocity, X, table, method="unipc"),
        "tree": lambda: flows.tree_rollout(KEYS, velocity, X, noisy, splits=[0]),
        "endpoints": lambda: flows.endpoints(velocity, X, GRID),
        "guidance": lambda: flows.classifier_free_guidance(velocity, 2.0, NULL)(
            X, TIMES, BATCH["cond"]
        ),
        "rescore": lambda: flows.rescore(velocity, states, noisy, steps=[0]),
        "convert": lambda: flows.convert(velocity(X), "velocity", "data", X, TIMES),
        "as_velocity": lambda: flows.as_velocity(velocity, "data")(X, TIMES),
        "flow matching": lambda: flows.flow_matching_loss(None, network, X, KEYS),
        "reflow": lambda: reflow.pair_loss(
            None, network, {"x_noise": X, "x_data": X}, KEYS
        ),
        "straightening": lambda: boss.straightening_loss(
            None, network, {"x": X, "x_next": 2 * X, "t": TIMES, "t_next": 0 * TIMES}
        ),
        "step search": lambda: boss.search(velocity, KEYS, (3, 2), 1, knots=2),
        "flow map": lambda: flows.apply_map(average, X, TIMES, 0 * TIMES),
        "map endpoints": lambda: flows.map_endpoints(average, X, jnp.asarray(GRID)),
        "difference": lambda: flows.total_derivative(
            average, X, TIMES, 0 * TIMES, X, derivative="difference"
        ),
        "meanflow loss": lambda: meanflow.meanflow_loss(
            None, network, BATCH, KEYS, flows.FlowMapConfig(drop_rate=0.0)
        ),
        "meanflow guidance": lambda: meanflow.meanflow_loss(
            None, network, BATCH, KEYS, GUIDED, NULL
        ),
        "meanflow": lambda: meanflow.sample(network, None, X, None, GRID),
        "dmd2 training": lambda: dmd2.generate(network, GRID, None, BATCH, KEYS),
        "dmd2": lambda: dmd2.sample(network, None, X, None, GRID),
        "dmd2 re-noised": lambda: dmd2.sample(
            network, None, X, None, GRID, transfer="renoise", keys=KEYS
        ),
        "tmd training": lambda: tmd.generate(split, PLAN, None, BATCH, KEYS),
        "tmd pretraining": lambda: tmd.pretraining_loss(
            None, split, BATCH, KEYS, PLAN, flows.FlowMapConfig(drop_rate=0.0)
        ),
        "tmd": lambda: tmd.sample(split, None, X, None, KEYS, PLAN),
        "teacher": lambda: distilled(train.Networks(bad, right)),
        "negative": lambda: distilled(
            train.Networks(right, right, None, lambda *args: bad(*args)[0])
        ),
        "critic": lambda: distilled(train.Networks(right, bad), guidance=1.0),
        "critic's training": lambda: distilled(
            train.Networks(right, bad), "critic_loss"
        ),
    }


@pytest.mark.parametrize("wrong", OUTPUTS)
def test_no_output_of_another_shape_or_kind_meets_a_state(wrong, as_shipped):
    words = "its state x has shape|a network must return one array of floats"
    for name, call in entrances(wrong).items():
        with pytest.raises((ValueError, TypeError), match=words):
            jax.eval_shape(call)
            pytest.fail(f"{name}: nothing was refused")


def test_states_and_noise_of_two_shapes_are_refused(refused):
    narrow = X[..., :1]
    words = "has shape"
    refused(words, flows.interpolate, X, narrow, TIMES)
    refused(words, flows.conditional_velocity, X, narrow)
    refused(words, flows.gaussian_log_prob, X, narrow, 1.0)
    refused(words, flows.gaussian_transition, X, 1.0, narrow)
    refused(words, flows.squared_l2, narrow, X)
    still = lambda x, t, cond: 0 * x  # noqa: E731
    refused(words, flows.terminal_errors, still, X, narrow, [GRID])
