"""Where an iteration of ReinFlow and of DPPO goes, and what their algorithms allow.

    python -m benchmarks.control_profile [--json=PATH]
    python -m benchmarks.control_profile --hidden 512 512 512 --critic 256 256 256

Every part of an iteration is a program of its own, run as often as an iteration runs
it; all of them, and the whole, in one process, compiled before. Methods take turns
in random order.

environment  steps of the environments, with actions at hand
acting       the chains of actions, without environments: K calls of the network each
gradients    log-probs of the chains and their gradients, all epochs of minibatches
critic       its values and gradients, likewise
optimizer    its updates
whole        the iteration; 'rest' is what the parts leave of it: returns, shuffling,
             and what a program gains or loses by being whole (it may be negative)

Counted beside them: calls of the network an action (a gradient counts as three), and
operations (FLOP) by the compiler's analysis of a chain and of a minibatch's gradient.
'allowed' is the ratio of whole iterations if chains and gradients took the time of
DPPO's in proportion to their operations, and everything else the time that it takes
there. ReinFlow walks 4 steps; with one noisy step (``stochastic_steps=1``) its update
asks the network once an action. DPPO walks 20 steps and trains 10. Run it alone.
"""

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contest import Row, Seconds, compare, conclude, in_turn, options, timed
from tmdjax import envs, models
from tmdjax.core import prng
from tmdjax.systems import dppo, reinflow
from tmdjax.train import on_policy
from tmdjax.train.on_policy.update import make_rule

PARTS = ("environment", "acting", "gradients", "critic", "optimizer")
GOALS = {"whole": 0.5}
RIVAL = "dppo"


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """An iteration of a method, whole and in parts.

    Attributes:
        parts: what each of them runs, by name; 'whole' too.
        calls: of the network an action: acting, and in all gradients.
        flops: operations an iteration: acting, and all gradients.
    """

    parts: dict[str, Callable[[], Any]]
    calls: tuple[int, int]
    flops: tuple[float, float]

    def __call__(self) -> Seconds:
        """Seconds of every part, of the whole, and of the rest."""
        found = {name: timed(run)[0] for name, run in self.parts.items()}
        return found | {"rest": found["whole"] - sum(found[n] for n in PARTS)}


def profile(
    method: Any, settings: on_policy.ControlSettings, count: int, environment: Any
) -> Profile:
    """Programs of an iteration and of its parts, and their counts.

    Args:
        method: ReinFlow or DPPO.
        settings: of its training.
        count: of environments.
        environment: of one.
    """
    vector, key = envs.Vector(environment, count, "fresh"), jax.random.key(0)
    trainer = on_policy.make_trainer(vector, method, settings)
    state = jax.jit(trainer.init)(key)
    rollout = jax.jit(lambda state: trainer.collect(state, None, key))(state)
    params, numbers = state.learner.params, state.numbers
    keys, updates = prng.sample_keys(key, count), settings.epochs * settings.minibatches
    size = trainer.steps // settings.minibatches
    seen, record, value = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:])[:size],
        (rollout.observation, rollout.record, rollout.step.reward),
    )
    samples = on_policy.Samples(seen, record, value)
    own = prng.sample_keys(key, size)
    critic = models.functional(
        models.ControlMLP(
            1, settings.critic_hidden, settings.critic_activation, out_scale=0.01
        )
    )
    rule = make_rule(settings, method.frozen)
    action = jnp.zeros((count, vector.action_size))

    def steps(state: Any) -> Any:
        def one(vector_state: Any, i: Any) -> Any:
            return vector.step(vector_state, action, prng.fold_in(keys, i))

        return jax.lax.scan(one, state.vector, jnp.arange(settings.unroll))

    def act(params: Any, i: Any) -> Any:
        first = state.vector.observation
        return method.act(params, first, prng.fold_in(keys, i), numbers)

    def chains(state: Any) -> Any:
        one = lambda _, i: (None, act(state.learner.params["policy"], i))  # noqa: E731
        return jax.lax.scan(one, None, jnp.arange(settings.unroll))

    def of_policy(params: Any) -> Any:
        return method.loss(params, params, samples, own, numbers)[0].mean()

    def of_critic(params: Any) -> Any:
        return jnp.square(critic(params, seen)[:, 0] - value).mean()

    def descended(loss: Callable[[Any], Any], params: Any) -> Any:
        def one(params: Any, _: Any) -> Any:  # each gradient needs the one before
            slope = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 1e-9 * g, params, slope), None

        return jax.lax.scan(one, params, None, length=updates)[0]

    def optimised(state: Any) -> Any:
        def one(carry: Any, _: Any) -> Any:
            params, opt_state = carry
            change, opt_state = rule.update(params, opt_state, params)
            return (jax.tree.map(jnp.add, params, change), opt_state), None

        first = state.learner.params, state.learner.opt_state
        return jax.lax.scan(one, first, None, length=updates)[0]

    def values(state: Any) -> Any:
        """Values of all that was seen and of what follows, and the gradients."""
        params = state.learner.params["critic"]
        whole = rollout.observation.reshape(-1, *seen.shape[1:])
        before, after = critic(params, whole), critic(params, whole[::-1])
        return before, after, descended(of_critic, params)

    programs = {
        "whole": lambda state: trainer.iterate(state, None, key),
        "environment": steps,
        "acting": chains,
        "gradients": lambda state: descended(of_policy, state.learner.params["policy"]),
        "critic": values,
        "optimizer": optimised,
    }
    scored = record["chain"].shape[1] - 1
    return Profile(
        parts={n: functools.partial(jax.jit(fn), state) for n, fn in programs.items()},
        calls=(method.steps, 3 * settings.epochs * scored),
        flops=(
            settings.unroll * operations(act, params["policy"], 0),
            updates * operations(jax.grad(of_policy), params["policy"]),
        ),
    )


def operations(fn: Callable[..., Any], *given: Any) -> float:
    """FLOP of a call, by the compiler's analysis of what it would compile."""
    analysis: Any = jax.jit(fn).lower(*given).cost_analysis()
    return analysis["flops"]


def rows_of(profiles: dict[str, Profile], found: dict[str, list[Seconds]]) -> list[Row]:
    """Parts beside the rival's, counts beside its counts, and the ratio allowed."""
    rows, rival = [], profiles[RIVAL]
    median = {
        name: statistics.median(one[name] for one in found[RIVAL])
        for name in found[RIVAL][0]
    }
    network = median["acting"] + median["gradients"]
    for name, own in profiles.items():
        if name == RIVAL:
            continue
        what = f"{name} / {RIVAL}"
        rows += compare(what, found[name], found[RIVAL], GOALS)
        counted = {
            "network calls an action, acting": (own.calls[0], rival.calls[0]),
            "... and training": (sum(own.calls), sum(rival.calls)),
            "GFLOP an iteration": (sum(own.flops) / 1e9, sum(rival.flops) / 1e9),
        }
        for label, (ours, theirs) in counted.items():
            rows.append(
                {
                    "what": f"{what}: {label}",
                    "unit": "",
                    "ours": ours,
                    "rival": theirs,
                    "ratio": ours / theirs,
                }
            )
        share = [a / b for a, b in zip(own.flops, rival.flops)]
        least = share[0] * median["acting"] + share[1] * median["gradients"]
        least += median["whole"] - network
        rows.append(
            {
                "what": f"{what}: allowed",
                "unit": "s",
                "ours": least,
                "rival": median["whole"],
                "ratio": least / median["whole"],
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    flags = options(__doc__, repeats=5)
    flags.add_argument("--envs", type=int, default=512)
    for name, of in (("hidden", "the policy's network"), ("critic", "the critic")):
        widths = {"type": int, "nargs": "+", "default": (128,) * 3}
        flags.add_argument(f"--{name}", **widths, help=f"widths of {of}")
    given = flags.parse_args(arguments)
    load = os.getloadavg()[0]
    hidden: dict[str, Any] = {"hidden": tuple(given.hidden)}
    settings = on_policy.ControlSettings(
        target_kl=None, critic_hidden=tuple(given.critic)
    )
    methods: dict[str, Any] = {
        "reinflow": reinflow.ReinFlow(**hidden),
        "reinflow, 1 noisy step": reinflow.ReinFlow(**hidden, stochastic_steps=1),
        RIVAL: dppo.DPPO(**hidden),
    }
    profiles = {
        name: profile(method, settings, given.envs, envs.MultiGoal())
        for name, method in methods.items()
    }
    rows = rows_of(profiles, in_turn(profiles, given.repeats))
    facts = {"envs": given.envs, "repeats": given.repeats, **hidden}
    conclude("control_profile", rows, load, given.json, **facts)


if __name__ == "__main__":
    main()
