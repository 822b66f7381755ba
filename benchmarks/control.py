"""What an on-policy iteration costs: methods beside each other, and brax's PPO.

    python -m benchmarks.control [--json=PATH]
    python -m benchmarks.control --parts methods --envs=4096

methods  PolicyFlow's and FPO's iteration over Gaussian PPO's, networks of one size, on
         MultiGoal. The update is what five more epochs add; the rollout is the rest.
brax     environment steps a second of our Gaussian PPO over brax's own trainer (pip
         install 'tmdjax[brax]'), on MultiGoal, networks and batches of one size.

Methods run in random order in every repeat, in one process, compiled before; brax and
ours in turn. A ratio is the median over repeats of ours over the rival's in the same
repeat. Run it alone.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contest import Row, Seconds, compare, in_turn, show, timed
from tmdjax import envs
from tmdjax.harness.environment import device_name, versions
from tmdjax.systems import fpo, policyflow, ppo
from tmdjax.train import on_policy

PARTS = ("methods", "brax")
GOALS = {"update": 2.2, "whole": 1.8}
"""Of PolicyFlow over Gaussian PPO."""

WIDTHS = {"hidden": (32, 32, 32, 32), "activation": "silu"}
BRAX = on_policy.Settings(
    unroll=80,
    epochs=4,
    minibatches=8,
    learning_rate=3e-4,
    weight_decay=0.0,
    clip_norm=None,
    discount=0.97,
    value_clip=None,
    advantages="minibatch",
    value_coefficient=0.25,
    normalise="running",
    critic_hidden=(256,) * 5,
    critic_activation="silu",
)
"""As many samples, minibatches and epochs as brax takes of 1024 environments, with its
defaults: 10 steps, batches of 1024 unrolls, 8 minibatches, 4 passes."""


class Ours:
    """Iterations of a method; phases by the time of some epochs more."""

    def __init__(self, method: Any, settings: on_policy.Settings, count: int):
        vector = envs.Vector(envs.MultiGoal(), count)
        self.programs, self.states = [], []
        self.key = jax.random.key(0)
        for factor in (1, 2):
            changed = dataclasses.replace(settings, epochs=factor * settings.epochs)
            trainer = on_policy.make_trainer(vector, method, changed)
            self.programs.append(on_policy.jit_iterations(trainer))
            self.states.append(trainer.init(self.key))
        self.steps = count * settings.unroll

    def __call__(self) -> Seconds:
        """Seconds of an iteration and its phases."""
        taken = []
        for i, program in enumerate(self.programs):
            call = functools.partial(program, self.states[i], self.key)
            seconds, (self.states[i], _) = timed(call)
            taken.append(seconds)
        update = taken[1] - taken[0]
        return {"whole": taken[0], "update": update, "rollout": taken[0] - update}


def method_rows(count: int, repeats: int) -> list[Row]:
    """PolicyFlow and FPO over Gaussian PPO."""
    hidden = (256, 128, 64)
    settings = on_policy.Settings(target_kl=None)
    methods: dict[str, Any] = {
        "ppo": ppo.GaussianPolicy(hidden=hidden),
        "policyflow": policyflow.PolicyFlow(hidden=hidden),
        "fpo": fpo.FPO(hidden=hidden, activation="mish"),
    }
    contenders: dict[str, Callable[[], Seconds]] = {
        name: Ours(method, settings, count) for name, method in methods.items()
    }
    found = in_turn(contenders, repeats)
    rows = compare("policyflow / ppo", found["policyflow"], found["ppo"], GOALS)
    rows += compare("fpo / ppo", found["fpo"], found["ppo"])
    steps = count * settings.unroll
    for name, each in found.items():
        fastest = steps / min(one["whole"] for one in each)
        rows.append(
            {"what": f"{name}: environment steps", "unit": "1/s", "ours": fastest}
        )
    return rows


def brax_rows(repeats: int) -> list[Row]:
    """Steps a second of our Gaussian PPO over brax's."""
    count = 1024
    ours = Ours(ppo.GaussianPolicy(**WIDTHS), BRAX, count)
    rates: dict[str, list[float]] = {"ours": [], "brax": []}
    ours()
    for _ in range(repeats):
        rates["brax"].append(_brax_rate(count))
        rates["ours"].append(ours.steps / ours()["whole"])
    ratios = [a / b for a, b in zip(rates["ours"], rates["brax"])]
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return [
        {
            "what": "training steps a second, ours / brax",
            "unit": "1/s",
            "ours": float(np.median(rates["ours"])),
            "rival": float(np.median(rates["brax"])),
            "ratio": float(ratio),
            "quartiles": [float(low), float(high)],
            "goal": 1.0,
        }
    ]


def _brax_rate(count: int) -> float:
    """Steps a second of brax's trainer after its first epoch, which compiles."""
    from brax.envs.base import Env, State
    from brax.training.agents.ppo import train as brax_ppo

    if not hasattr(jax, "device_put_replicated"):  # brax issue 671

        def replicated(tree: Any, devices: Any) -> Any:
            return jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)

        jax.device_put_replicated = replicated  # pyright: ignore

    ours = envs.MultiGoal()

    class MultiGoal(Env):
        """Ours as brax wants it: its wrappers end episodes after 50 steps."""

        def reset(self, rng: Any) -> State:
            state, seen = ours.reset(rng)
            zero = jnp.zeros(())
            return State(state, seen, zero, zero)

        def step(self, state: State, action: Any) -> State:
            step = ours.step(state.pipeline_state, 5 * action, None)  # pyright: ignore
            return state.replace(  # pyright: ignore
                pipeline_state=step.state,
                obs=step.observation,
                reward=step.reward,
                done=step.terminated.astype(jnp.float32),
            )

        @property
        def observation_size(self) -> int:
            return 4

        @property
        def action_size(self) -> int:
            return ours.action_size

        @property
        def backend(self) -> str:
            return "generalized"

    rates: list[float] = []

    def progress(step: int, metrics: dict[str, Any]) -> None:
        if "training/sps" in metrics:
            rates.append(float(metrics["training/sps"]))

    brax_ppo.train(
        environment=MultiGoal(),
        num_timesteps=600_000,
        num_envs=count,
        episode_length=50,
        unroll_length=10,
        batch_size=1024,
        num_minibatches=8,
        num_updates_per_batch=4,
        normalize_observations=True,
        discounting=0.97,
        learning_rate=3e-4,
        entropy_cost=1e-2,
        num_evals=3,
        num_eval_envs=128,
        progress_fn=progress,
    )
    return rates[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    flags.add_argument("--envs", type=int, default=512, help="of the part methods")
    flags.add_argument("--repeats", type=int, default=5)
    flags.add_argument("--json", type=pathlib.Path, help="also written there")
    given = flags.parse_args(arguments)
    load, notes = os.getloadavg()[0], {}
    rows: list[Row] = []
    if "methods" in given.parts:
        rows += method_rows(given.envs, given.repeats)
    if "brax" in given.parts:
        if importlib.util.find_spec("brax") is None:
            notes["brax"] = "not installed: pip install 'tmdjax[brax]'"
        else:
            rows += brax_rows(given.repeats)
    found = {
        "benchmark": "control",
        "envs": given.envs,
        "device": device_name(),
        "versions": versions(),
        "load_before_after": [load, os.getloadavg()[0]],
        "repeats": given.repeats,
        **notes,
        "rows": rows,
    }
    show(rows, f"on-policy RL, {found['device']}")
    for name, value in found.items():
        if name not in ("rows", "versions"):
            print(f"{name}: {value}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
