"""Environments of control experiments, and how a policy in them is judged."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arms import tuples
from tmdjax import envs, rl
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice
from tmdjax.harness import StageResult

Act = Callable[[Any, Any, Any], Any]
"""(policy, observations, key) -> actions; hashable, so that a program is kept."""

ENVIRONMENTS = {
    "multi_goal": envs.MultiGoal,
    "point_maze": envs.PointMaze,
    "push": envs.Push,
    "brax": envs.Brax,
    "playground": envs.Playground,
}
SIMULATORS = {"brax": "brax", "playground": "mujoco_playground"}
"""Packages of environments that are dear to trace and to reset."""
SHOWN_PATHS = 200


def build(env: Mapping[str, Any]) -> Any:
    """From 'name' and the fields of its class ('task' for the name in a simulator).

    'chunk' is how many of its actions are one (:class:`tmdjax.envs.Chunked`).
    """
    given = tuples(env)
    name, chunk = given.pop("name"), given.pop("chunk", 1)
    check_choice("env.name", name, ENVIRONMENTS)
    if "task" in given:
        given["name"] = given.pop("task")
    environment = ENVIRONMENTS[name](**given)
    return environment if chunk == 1 else envs.Chunked(environment, chunk)


def without_chunks(env: Mapping[str, Any]) -> dict[str, Any]:
    """The same environment, acted in step by step."""
    return {k: v for k, v in env.items() if k != "chunk"}


def vector(env: Mapping[str, Any], count: int) -> envs.Vector:
    """Many of them."""
    resets = "first" if env["name"] in SIMULATORS else "fresh"
    return envs.Vector(build(env), count, resets)


def absent(env: Mapping[str, Any]) -> str | None:
    """The package that is needed and not installed."""
    package = SIMULATORS.get(env["name"])
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return package


def measures(env: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what :func:`judge` finds."""
    return {
        "multi_goal": ("goal_entropy", "covered_goals", "reached", "reward"),
        "point_maze": ("cells_visited", "success", "reward"),
        "push": ("success", "reward"),
    }.get(env["name"], ("judged_return", "reward"))


def map_of(env: Mapping[str, Any]) -> dict[str, Any]:
    """What a plot of paths also shows: marks and squares."""
    environment = build(without_chunks(env))
    if env["name"] == "multi_goal":
        return {"marks": environment.goal_positions}
    if env["name"] == "point_maze":
        return {"marks": environment.cells("g"), "squares": environment.cells("1")}
    return {}


def judge(
    env: Mapping[str, Any], agents: int, act: Act, policy: Any, key: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """One episode of many agents, acting as in training.

    Returns:
        Measures by name, and what may be shown: 'paths' [agent, time, 2]; 'states' of
        the first agent in a brax simulator, flattened.
    """
    name, environment, acted = env["name"], build(without_chunks(env)), build(env)
    start_key, walk_key = jax.random.split(key)
    if name == "multi_goal":
        state, seen = environment.at((0.0, 0.0))
        repeat = functools.partial(jnp.repeat, repeats=agents, axis=0)
        start = jax.tree.map(lambda x: repeat(x[None]), (state, seen))
    else:
        keys = prng.sample_keys(start_key, agents)
        start = jax.vmap(environment.reset)(keys)
    kept, reward, ended = _episode(acted, act, name, policy, start, walk_key)
    reward, ended = np.asarray(reward), np.asarray(ended)
    alive = np.cumsum(ended, 0) - ended == 0  # up to and with the last step
    found = {"reward": float((reward * alive).sum() / alive.sum())}
    if name in SIMULATORS:
        found["judged_return"] = float((reward * alive).sum(0).mean())
        leaves = {f"{i:04}": x for i, x in enumerate(jax.tree.leaves(kept))}
        return found, {"states": leaves} if leaves else {}
    if name == "multi_goal":
        place = np.asarray(kept)
        counts = envs.goal_counts(environment, place[-1], ~ended.any(0))
        found |= {
            "goal_entropy": envs.goal_entropy(counts),
            "covered_goals": float((counts >= 0.02 * agents).sum()),
            "reached": float(counts.sum() / agents),
        }
        place = np.where(alive[..., None], place, np.nan)
    elif name == "point_maze":
        place, success = (np.asarray(x) for x in kept)
        row, column = (np.asarray(x) for x in environment.cell_of(place))
        cells = row * environment.shape[1] + column
        free = int((~environment.walls).sum())
        visited = [len(np.unique(cells[:, i])) for i in range(agents)]
        found |= {
            "cells_visited": float(np.mean(visited) / free),
            "success": float(success.any(0).mean()),
        }
    else:
        place = np.asarray(kept)
        found["success"] = float((ended & alive & (reward > 0)).any(0).mean())
    return found, {"paths": place[:, :SHOWN_PATHS].transpose(1, 0, 2)}


def judged(
    method: Any,
    policy: Any,
    statistics: rl.RunningStatistics | None,
    found: dict[str, float],
    shown: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> StageResult:
    """What was measured and shown of a policy, and its model as others load it.

    Args:
        method: of the policy.
        policy: its parameters.
        statistics: by which it normalises observations; None if it does not.
        found: measures.
        shown: outputs beside the parameters.
        facts: of the model, beside those of the method.
    """
    model, network, meta = method.exported(policy)
    meta = {**meta, **facts}
    if statistics is not None:
        meta |= {
            k: np.asarray(getattr(statistics, k)).tolist() for k in ("mean", "variance")
        }
    return StageResult({"params": network, **shown}, found, model=model, meta=meta)


def _kept(environment: Any, name: str, state: Any) -> Any:
    """Of the states [agent, ...] of a step: what is measured or shown."""
    if name == "playground":
        return None
    if name == "brax":
        return jax.tree.map(lambda x: x[0], state[0].pipeline_state)
    if name == "point_maze":
        inner = getattr(environment, "environment", environment)  # of chunks
        return state.position, inner.success(state)
    return state.position if name == "multi_goal" else state.object


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _episode(
    environment: Any, act: Act, name: str, policy: Any, start: Any, key: Any
) -> Any:
    """What is kept, rewards and ends, [time, agent, ...] each, without resets."""
    count = start[1].shape[0]

    def body(carry: Any, key: Any) -> tuple[Any, Any]:
        state, seen = carry
        act_key, step_key = jax.random.split(key)
        action = act(policy, seen, act_key)
        step = jax.vmap(environment.step)(
            state, action, prng.sample_keys(step_key, count)
        )
        kept = _kept(environment, name, step.state)
        return (step.state, step.observation), (kept, step.reward, step.terminated)

    return jax.lax.scan(body, start, jax.random.split(key, environment.horizon))[1]


def record(
    env: Mapping[str, Any],
    agents: int,
    act: Act,
    policy: Any,
    key: Any,
    shown: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One episode of many agents, as demonstrations: one after the other.

    Args:
        env: without chunks, its actions in +-1.
        agents: how many.
        act: how they act.
        policy: handed to it.
        key: typed key.
        shown: the same environment with the observations to record, where they are not
            those that the agents see.

    Returns:
        The arrays of :class:`tmdjax.data.Demonstrations`, without steps after an end.

    Raises:
        ValueError: actions have another bound.
    """
    environment, other = build(env), None if shown is None else build(shown)
    if environment.action_bound != 1:
        raise ValueError(
            f"actions of {env['name']} are in +-{environment.action_bound}; policies "
            f"are cloned from actions in +-1."
        )
    start_key, walk_key = jax.random.split(key)
    start = jax.vmap(environment.reset)(prng.sample_keys(start_key, agents))
    rows = _recorded(environment, other, act, policy, start, walk_key)
    # [agent, time, ...]: an episode after the other
    rows = [np.asarray(x).swapaxes(0, 1) for x in rows]
    seen, action, reward, terminated, truncated = rows
    truncated = truncated & ~terminated
    truncated[:, -1] |= ~terminated[:, -1]
    ended = terminated | truncated
    alive = np.cumsum(ended, 1) - ended == 0
    return {
        "observation": seen[alive],
        "action": action[alive],
        "reward": reward[alive],
        "terminated": terminated[alive],
        "truncated": truncated[alive],
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _recorded(
    environment: Any, shown: Any, act: Act, policy: Any, start: Any, key: Any
) -> Any:
    """What was seen, done and earned, and ends, [time, agent, ...], without resets."""
    count = start[1].shape[0]

    def body(carry: Any, key: Any) -> tuple[Any, Any]:
        state, seen = carry
        act_key, step_key = jax.random.split(key)
        action = jnp.clip(act(policy, seen, act_key), -1, 1)
        keys = prng.sample_keys(step_key, count)
        step = jax.vmap(environment.step)(state, action, keys)
        picture = seen if shown is None else jax.vmap(shown.observe)(state)
        row = picture, action, step.reward, step.terminated, step.truncated
        return (step.state, step.observation), row

    return jax.lax.scan(body, start, jax.random.split(key, environment.horizon))[1]


def film(env: Mapping[str, Any], states: Any) -> str | None:
    """A page that plays the states of a brax simulator; None where there is none."""
    if env["name"] != "brax":
        return None
    from brax.io import html

    horizon, simulator = build(env).horizon, build(without_chunks(env)).simulator
    shape = jax.eval_shape(lambda: simulator.reset(jax.random.key(0)).pipeline_state)
    tree = jax.tree.structure(shape)
    stacked = jax.tree.unflatten(tree, [np.asarray(states[k]) for k in sorted(states)])
    frames = [trees.take(stacked, i) for i in range(horizon)]
    return html.render(
        simulator.sys.tree_replace({"opt.timestep": simulator.dt}), frames
    )
