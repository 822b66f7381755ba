"""What an on-policy iteration costs: methods beside each other, and brax's PPO.

    python -m benchmarks.control [--json=PATH]
    python -m benchmarks.control --parts methods --envs=4096
    python -m benchmarks.control --parts fpo --fpo=PATH/playground/src

methods  PolicyFlow's and FPO's iteration over Gaussian PPO's, networks of one size, on
         MultiGoal. The update is what five more epochs add; the rollout is the rest.
         The same with twice the solver steps: the update should not care. ReinFlow's (4
         steps) over DPPO's (20, of which 10 are trained) and over PPO's, theirs of
         three layers of 128, because residual networks have equal widths. The share of
         the FLOP bound counts the products of the networks' layers against the largest
         rate of a float32 product of two 2048 x 2048 matrices on the same device.
physics  the same for PolicyFlow and Gaussian PPO in brax's hopper (tmdjax[brax]).
brax     environment steps a second of our Gaussian PPO over brax's own trainer (pip
         install 'tmdjax[brax]'), on MultiGoal, networks and batches of one size:
         advantages once an iteration, as ours do, and in every minibatch, as there.
fpo      an iteration of our FPO, as released, over that of its public JAX trainer (from
         a clone, Python >= 3.12, with jax_dataclasses, wandb and playground installed).

Methods run in random order in every repeat, in one process, compiled before; brax and
ours in turn. A ratio is the median over repeats of ours over the rival's in the same
repeat. Run it alone.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from benchmarks.contest import Row, Seconds, compare, conclude, in_turn, options, timed
from tmdjax import envs
from tmdjax.systems import dppo, fpo, policyflow, ppo, reinflow
from tmdjax.train import on_policy

PARTS = ("methods", "physics", "brax", "fpo")
GOALS = {"update": 2.2, "whole": 1.8}
PHYSICS_GOALS = {"whole": 1.5}
"""Of PolicyFlow over Gaussian PPO."""
CHAIN_GOALS = {"whole": 0.5}
"""Of ReinFlow over DPPO."""

WIDTHS = {"hidden": (32, 32, 32, 32), "activation": "silu"}
BRAX = on_policy.ControlSettings(
    unroll=80,
    epochs=4,
    minibatches=8,
    learning_rate=3e-4,
    weight_decay=0.0,
    clip_norm=None,
    discount=0.97,
    value_clip=None,
    advantages="minibatch",
    gae="per_minibatch",
    value_coefficient=0.25,
    normalise="running",
    critic_hidden=(256,) * 5,
    critic_activation="silu",
)
"""As many samples, minibatches and epochs as brax takes of 1024 environments, with its
defaults: 10 steps, batches of 1024 unrolls, 8 minibatches, 4 passes."""


class Ours:
    """Iterations of a method; phases by the time of some epochs more."""

    def __init__(
        self,
        method: Any,
        settings: on_policy.ControlSettings,
        count: int,
        environment: Any = None,
    ):
        vector = envs.Vector(
            environment or envs.MultiGoal(), count, "first" if environment else "fresh"
        )
        self.programs, self.states = [], []
        self.key = jax.random.key(0)
        for factor in (1, 2):
            changed = dataclasses.replace(settings, epochs=factor * settings.epochs)
            trainer = on_policy.make_trainer(vector, method, changed)
            self.programs.append(on_policy.jit_iterations(trainer))
            self.states.append(trainer.init(self.key))
        self.steps = count * settings.unroll
        params = self.states[0].learner.params
        sizes = [_products(params[name]) for name in ("policy", "critic")]
        acting, training = _evaluations(method)
        self.flops = self.steps * (
            2 * (acting * sizes[0] + 2 * sizes[1])
            + 2 * settings.epochs * (training * sizes[0] + 3 * sizes[1])
        )

    def __call__(self) -> Seconds:
        """Seconds of an iteration and its phases."""
        taken = []
        for i, program in enumerate(self.programs):
            call = functools.partial(program, self.states[i], self.key)
            seconds, (self.states[i], _) = timed(call)
            taken.append(seconds)
        update = taken[1] - taken[0]
        return {"whole": taken[0], "update": update, "rollout": taken[0] - update}


def _products(params: Any) -> int:
    """Multiplications of one evaluation: the sizes of all kernels."""
    return sum(x.size for x in jax.tree.leaves(params) if x.ndim == 2)


def _evaluations(method: Any) -> tuple[int, int]:
    """Evaluations of all the policy's networks a transition: acting, and one epoch.

    A backward pass counts two.
    """
    if isinstance(method, policyflow.PolicyFlow):
        return 2 * method.steps, 3 + 1
    if isinstance(method, fpo.FPO):
        return method.steps + method.pairs, 3 * method.pairs
    if isinstance(method, reinflow.ReinFlow):
        return method.steps, 3 * method.steps
    if isinstance(method, dppo.DPPO):  # of its two networks each step asks one
        return method.steps // 2, 3 * method.fine_tuned_steps // 2
    return 1, 3


def _peak() -> float:
    """Multiplications and additions a second of a float32 matrix product."""
    side = 2048
    a = jax.random.normal(jax.random.key(0), (side, side))
    product = jax.jit(lambda a: a @ a)
    product(a)
    return 2 * side**3 / min(timed(lambda: product(a))[0] for _ in range(10))


def _speeds(
    found: dict[str, list[Seconds]], contenders: dict[str, Ours], where: str = ""
) -> list[Row]:
    """Environment steps a second, and how much of the device that is."""
    rows, peak = [], _peak()
    for name, each in found.items():
        fastest = min(one["whole"] for one in each)
        ours = contenders[name]
        rows += [
            {
                "what": f"{name}: environment steps{where}",
                "unit": "1/s",
                "ours": ours.steps / fastest,
            },
            {
                "what": f"{name}: share of the FLOP bound{where}",
                "unit": "",
                "ours": ours.flops / peak / fastest,
            },
        ]
    return rows


def method_rows(count: int, repeats: int) -> list[Row]:
    """PolicyFlow and FPO over Gaussian PPO."""
    hidden = (256, 128, 64)
    settings = on_policy.ControlSettings(target_kl=None)
    methods: dict[str, Any] = {
        "ppo": ppo.GaussianPolicy(hidden=hidden),
        "policyflow": policyflow.PolicyFlow(hidden=hidden),
        "policyflow, 20 steps": policyflow.PolicyFlow(hidden=hidden, steps=20),
        "fpo": fpo.FPO(hidden=hidden, activation="mish"),
        "reinflow": reinflow.ReinFlow(hidden=(128,) * 3),
        "dppo": dppo.DPPO(hidden=(128,) * 3),
    }
    contenders = {
        name: Ours(method, settings, count) for name, method in methods.items()
    }
    found = in_turn(contenders, repeats)
    rows = compare("policyflow / ppo", found["policyflow"], found["ppo"], GOALS)
    rows += compare(
        "policyflow, 20 solver steps / 10",
        found.pop("policyflow, 20 steps"),
        found["policyflow"],
        {"update": 1.0},
    )
    rows += compare("fpo / ppo", found["fpo"], found["ppo"])
    rows += compare("reinflow / ppo", found["reinflow"], found["ppo"])
    rows += compare("reinflow / dppo", found["reinflow"], found["dppo"], CHAIN_GOALS)
    return rows + _speeds(found, contenders)


def physics_rows(count: int, repeats: int) -> list[Row]:
    """PolicyFlow over Gaussian PPO where a simulator takes part of the time."""
    settings = on_policy.ControlSettings(target_kl=None, unroll=24, normalise="running")
    hopper = envs.Brax("hopper", backend="spring")
    methods: dict[str, Any] = {
        "ppo": ppo.GaussianPolicy(hidden=(128,) * 3),
        "policyflow": policyflow.PolicyFlow(hidden=(128,) * 3),
    }
    contenders = {
        name: Ours(method, settings, count, hopper) for name, method in methods.items()
    }
    found = in_turn(contenders, repeats)
    rows = compare(
        "policyflow / ppo, brax hopper",
        found["policyflow"],
        found["ppo"],
        PHYSICS_GOALS,
    )
    return rows + _speeds(found, contenders, ", brax hopper")


def brax_rows(repeats: int) -> list[Row]:
    """Steps a second of our Gaussian PPO over brax's."""
    count = 1024
    contenders = {
        name: Ours(
            ppo.GaussianPolicy(**WIDTHS), dataclasses.replace(BRAX, gae=gae), count
        )
        for name, gae in (("once", "once"), ("in every minibatch", "per_minibatch"))
    }
    rates: dict[str, list[float]] = {name: [] for name in (*contenders, "brax")}
    for ours in contenders.values():
        ours()
    for _ in range(repeats):
        rates["brax"].append(_brax_rate(count))
        for name, ours in contenders.items():
            rates[name].append(ours.steps / ours()["whole"])
    rows = []
    for name in contenders:
        ratios = [a / b for a, b in zip(rates[name], rates["brax"])]
        low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows.append(
            {
                "what": f"training steps a second, advantages {name}, ours / brax",
                "unit": "1/s",
                "ours": float(np.median(rates[name])),
                "rival": float(np.median(rates["brax"])),
                "ratio": float(ratio),
                "quartiles": [float(low), float(high)],
                "goal": 1.0,
                "better": "greater",
            }
        )
    return rows


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
            return State(state, seen, zero, zero)  # pyright: ignore

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
        progress_fn=progress,  # pyright: ignore
    )
    return rates[-1]


def fpo_rows(path: pathlib.Path, repeats: int) -> list[Row]:
    """An iteration of our FPO over the released trainer's."""
    count, sizes = 1024, ("unroll", "epochs", "minibatches")
    changed = {name: getattr(BRAX, name) for name in sizes}
    method, settings = fpo.preset("released", settings=changed, bound=5.0)
    contenders: dict[str, Callable[[], Seconds]] = {
        "ours": Ours(method, settings, count),
        "released": _released_fpo(path, count),
    }
    found = in_turn(contenders, repeats)
    whole = [{"whole": one["whole"]} for one in found["ours"]]
    return compare("fpo, ours / released", whole, found["released"], {"whole": 1.0})


def _released_fpo(path: pathlib.Path, count: int) -> Callable[[], Seconds]:
    """Seconds of a rollout and a training step of the public trainer on MultiGoal."""
    if not (path / "flow_policy" / "fpo.py").is_file():
        raise FileNotFoundError(
            f"{path} has no flow_policy/fpo.py; give --fpo=.../playground/src of a "
            f"clone of akanazawa/fpo."
        )
    sys.path.insert(0, str(path))
    released = importlib.import_module("flow_policy.fpo")
    rollouts = importlib.import_module("flow_policy.rollouts")
    ours = envs.MultiGoal()

    @struct.dataclass
    class State:
        data: Any
        obs: Any
        reward: Any
        done: Any

    class MultiGoal:
        """Ours as that trainer wants it."""

        observation_size = 4
        action_size = 2

        def reset(self, key: Any) -> State:
            state, seen = ours.reset(key)
            return State(state, seen, jnp.zeros(()), jnp.zeros(()))

        def step(self, state: State, action: Any) -> State:
            step = ours.step(state.data, 5 * action, None)  # pyright: ignore
            done = step.terminated.astype(jnp.float32)
            return State(step.state, step.observation, step.reward, done)

    config = released.FpoConfig(
        batch_size=1024,
        num_envs=count,
        num_minibatches=8,
        num_updates_per_batch=4,
        unroll_length=10,
        episode_length=50,
    )
    environment, key = MultiGoal(), jax.random.key(0)
    state = [
        released.FpoState.init(key, environment, config),
        rollouts.BatchedRolloutState.init(environment, key, count),
    ]

    def iteration() -> Any:
        state[1], transitions = state[1].rollout(
            state[0], episode_length=50, iterations_per_env=config.iterations_per_env
        )
        state[0], metrics = state[0].training_step(transitions)
        return metrics

    return lambda: {"whole": timed(iteration)[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    flags = options(__doc__, repeats=5)
    flags.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    flags.add_argument("--fpo", type=pathlib.Path, help="its trainer's playground/src")
    flags.add_argument("--envs", type=int, default=512, help="of the part methods")
    given = flags.parse_args(arguments)
    load, notes = os.getloadavg()[0], {}
    rows: list[Row] = []
    if "methods" in given.parts:
        rows += method_rows(given.envs, given.repeats)
    for part in ("physics", "brax"):
        if part in given.parts and importlib.util.find_spec("brax") is None:
            notes[part] = "not installed: pip install 'tmdjax[brax]'"
        elif part in given.parts:
            rows += (
                physics_rows(given.envs, given.repeats)
                if part == "physics"
                else brax_rows(given.repeats)
            )
    if "fpo" in given.parts:
        if given.fpo is None:
            notes["fpo"] = "left out: give --fpo=.../playground/src"
        else:
            rows += fpo_rows(given.fpo, given.repeats)
    conclude(
        "control",
        rows,
        load,
        given.json,
        envs=given.envs,
        repeats=given.repeats,
        **notes,
    )


if __name__ == "__main__":
    main()
