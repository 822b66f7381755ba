"""The iteration of a config that aligns a flow model with a reward.

A config is that of one arm here, see :func:`experiments.arms.of_arm`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import alignment_tasks as tasks
from experiments.arms import build_method, tuples
from tmdjax import train
from tmdjax.core import prng, trees
from tmdjax.harness.config import to_plain
from tmdjax.train import flow_rl

Config = Any


def setup(config: Config, event_shape: tuple[int, ...]) -> flow_rl.Setup:
    """Method, objective and number of updates, by the preset of the method's system."""
    changed = tuples(to_plain(config.objective))
    return build_method(
        to_plain(config.method),
        flow_rl.Setup,
        event_shape,
        objective={k: v for k, v in changed.items() if v is not None},
        steps=config.rollout.steps,
        shift=config.rollout.shift,
        updates=config.rl.updates,
    )


def build(
    config: Config,
    task: tasks.Task,
    params: Any,
    key: Any,
    policy: Any = tasks.policy,
) -> Any:
    """What is trained, and how.

    Args:
        config: of an arm.
        task: of it.
        params: of the base.
        key: of adapters.
        policy: see :func:`experiments.alignment_tasks.policy`.

    Returns:
        Initial state, iteration, ``trained -> whole params`` and method.
    """
    method, objective, updates = setup(config, task.event_shape)
    trained, policy, whole = policy(config, params, key)
    settings = config.rl
    rule = train.make_optimizer(
        train.OptimizerConfig(
            name="adamw",
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
    )
    iteration = flow_rl.make_iteration(
        policy,
        method,
        task.reward,
        rule,
        objective,
        updates=updates,
        microbatches=settings.microbatches,
        chunks=settings.chunks,
        ema_decay=settings.ema_decay,
    )
    return iteration.init(trained), iteration, whole, method


def calls_per_sample(config: Config, method: Any) -> float:
    """Network evaluations of a rollout over its samples, counted as they happen."""
    rows: list[int] = []

    def velocity(x: Any, t: Any, cond: Any) -> Any:
        jax.debug.callback(lambda t: rows.append(len(t)), t)
        return jnp.zeros_like(x)

    table, plan = method.plan(0)
    keys = prng.sample_keys(jax.random.key(0), 1)
    walk = jax.jit(
        lambda samples, table: method.rollout(samples, velocity, table, plan)
    )
    jax.block_until_ready(walk(flow_rl.samples_of(keys, method.group_size), table))
    jax.effects_barrier()
    guided = config.task.name != "mixture" and config.rl.guidance != 1.0
    return sum(rows) * (1 + guided) / method.group_size


def linear_policy(config: Config, params: Any, key: Any) -> Any:
    """In place of a network that was traced under another arm already."""
    linear = flow_rl.Policy(
        velocity=lambda params, frozen: lambda x, t, cond=None: params["scale"] * x,
        reference=lambda frozen: lambda x, t, cond=None: x,
    )
    return {"scale": jnp.ones(())}, linear, lambda trained: trained


def trace(config: Config, task: tasks.Task, params: Any, policy: Any) -> None:
    """Traces one iteration from the shapes of a base's parameters."""
    available = len(next(iter(task.prompts.values())))
    if config.rl.prompts > available:
        raise ValueError(
            f"rl.prompts={config.rl.prompts} an iteration, but task.prompts="
            f"{available}; draw more of them."
        )
    batch = trees.take(task.prompts, np.arange(config.rl.prompts // config.rl.chunks))

    def once(params: Any, key: Any) -> Any:
        state, iteration, _, method = build(config, task, params, key, policy)
        table, plan = method.plan(0)
        zero = np.int32(0)
        samples, record = iteration.programs["rollout"](
            state.params, params, batch, key, zero, zero, table, plan
        )
        rewards = jnp.zeros(samples.shape[0])
        return iteration.programs["update"](
            state, params, batch, (record,), rewards, key, zero, table, plan
        )

    jax.eval_shape(once, params, jax.random.key(0))
