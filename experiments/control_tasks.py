"""Environments of control experiments, and how a policy in them is judged."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import envs
from tmdjax.core import prng
from tmdjax.core.checks import check_choice
from tmdjax.harness.config import to_plain

Config = Any
Act = Callable[[Any, Any], Any]
ENVIRONMENTS = {
    "multi_goal": envs.MultiGoal,
    "point_maze": envs.PointMaze,
    "push": envs.Push,
}
SHOWN_PATHS = 200


def build(config: Config) -> Any:
    """The environment of a config."""
    given = dict(to_plain(config.env))
    name = given.pop("name")
    check_choice("env.name", name, ENVIRONMENTS)
    return ENVIRONMENTS[name](**given)


def measures(config: Config) -> tuple[str, ...]:
    """Names of what :func:`judge` finds."""
    return {
        "multi_goal": ("goal_entropy", "covered_goals", "reached", "reward"),
        "point_maze": ("cells_visited", "success", "reward"),
        "push": ("success", "reward"),
    }[config.env.name]


def map_of(config: Config) -> dict[str, Any]:
    """What a plot of paths also shows: marks and squares."""
    environment = build(config)
    if config.env.name == "multi_goal":
        return {"marks": environment.goal_positions}
    if config.env.name == "point_maze":
        return {"marks": environment.cells("g"), "squares": environment.cells("1")}
    return {}


def judge(config: Config, act: Act, key: Any) -> tuple[dict[str, float], Any]:
    """One episode of many agents, acting as in training.

    Returns:
        Measures by name, and paths [agent, time, 2] or None.
    """
    environment, agents = build(config), config.evaluate.agents
    start_key, walk_key = jax.random.split(key)
    if config.env.name == "multi_goal":
        state, seen = environment.at((0.0, 0.0))
        repeat = functools.partial(jnp.repeat, repeats=agents, axis=0)
        start = jax.tree.map(lambda x: repeat(x[None]), (state, seen))
        steps = environment.horizon
    else:
        keys = prng.sample_keys(start_key, agents)
        start = jax.vmap(environment.reset)(keys)
        steps = environment.horizon
    path, reward, ended = _episode(environment, act, start, walk_key, steps)
    alive = np.cumsum(ended, 0) - ended == 0  # up to and with the last step
    found = {"reward": float((reward * alive).sum() / alive.sum())}
    if config.env.name == "multi_goal":
        place = np.asarray(path.position)
        counts = envs.goal_counts(environment, place[-1], ~ended.any(0))
        found |= {
            "goal_entropy": envs.goal_entropy(counts),
            "covered_goals": float((counts >= 0.02 * agents).sum()),
            "reached": float(counts.sum() / agents),
        }
        place = np.where(alive[..., None], place, np.nan)
        return found, place[:, :SHOWN_PATHS].transpose(1, 0, 2)
    if config.env.name == "point_maze":
        place = np.asarray(path.position)
        row, column = (np.asarray(x) for x in environment.cell_of(place))
        cells = row * environment.shape[1] + column
        free = int((~environment.walls).sum())
        visited = [len(np.unique(cells[:, i])) for i in range(agents)]
        found |= {
            "cells_visited": float(np.mean(visited) / free),
            "success": float(np.asarray(environment.success(path)).any(0).mean()),
        }
        return found, place[:, :SHOWN_PATHS].transpose(1, 0, 2)
    found["success"] = float((ended & alive & (reward > 0)).any(0).mean())
    return found, np.asarray(path.object)[:, :SHOWN_PATHS].transpose(1, 0, 2)


def _episode(environment: Any, act: Act, start: Any, key: Any, steps: int) -> Any:
    """States [time, agent, ...], rewards and ends [time, agent], without resets."""

    @jax.jit
    def walk(start: Any, key: Any) -> Any:
        count = start[1].shape[0]

        def body(carry: Any, key: Any) -> tuple[Any, Any]:
            state, seen = carry
            act_key, step_key = jax.random.split(key)
            action = act(seen, act_key)
            keys = prng.sample_keys(step_key, count)
            step = jax.vmap(environment.step)(state, action, keys)
            carry = (step.state, step.observation)
            return carry, (step.state, step.reward, step.terminated)

        return jax.lax.scan(body, start, jax.random.split(key, steps))[1]

    path, reward, ended = walk(start, key)
    return path, np.asarray(reward), np.asarray(ended)
