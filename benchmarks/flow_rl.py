"""What RL on a flow model costs: log-probs, batching, PyTorch, trees, memory.

    python -m benchmarks.flow_rl [--json=PATH]
    python -m benchmarks.flow_rl --config=configs/flow_grpo.py:gpu --prompts=16
    python -m benchmarks.flow_rl --parts rollout branch --hidden=128 --depth=6

Network, prompts, steps and updates are those of a tier of configs/flow_grpo.py, trees
and the chains beside them those of the same tier of configs/branchgrpo.py. The network
is the DiT alone: it is given random encoded texts, no guidance, no average of
parameters, and a reward that costs next to nothing. Parts:

rollout   a rollout with log-probs and its record, over plain ODE sampling.
one       DanceGRPO's iteration, over one sample at a time and one transition at a
          time, as the reference code does it: the same compiled pieces at batch 1.
torch     DanceGRPO's iteration, over that in PyTorch (pip install 'tmdjax[parity]').
branch    BranchGRPO's iteration, over DanceGRPO's with as many samples.
memory    bytes of the stored states, and of the compiled programs.

Contenders run in random order in every repeat, in one process, compiled before; a
ratio is the median over repeats of ours over the rival's in the same repeat.

Run it alone: where other processes want the cores, the threads of PyTorch's OpenMP wait
for each other, and it takes ten times as long or more. The load is printed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.contest import (
    Contender,
    Row,
    Seconds,
    compare,
    conclude,
    in_turn,
    options,
    timed,
)
from experiments import alignment_iteration as alignment
from experiments import alignment_tasks as tasks
from experiments.arms import of_arm
from tmdjax import flows, models, rl, train
from tmdjax.core import prng, trees
from tmdjax.core.types import Array
from tmdjax.harness import load_config
from tmdjax.systems import branchgrpo, flow_grpo
from tmdjax.train import flow_rl

PARTS = ("rollout", "one", "torch", "branch", "memory")
ROLLOUT_GOAL = 1.03
_FIELDS = {
    "hidden": "model.hidden",
    "depth": "model.depth",
    "heads": "model.heads",
    "patch": "model.patch_size",
    "recipe": "model.recipe",
    "size": "task.size",
    "prompts": "rl.prompts",
    "updates": "rl.updates",
    "microbatches": "rl.microbatches",
}
_CHAIN_FIELDS = {"steps": "rollout.steps"}
"""Of chains alone: the splits of a tree belong to its number of steps."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and a batch of conditions.

    Attributes:
        config: of an alignment experiment.
        network: DiT conditioned on tokens.
        params: its parameters, none of them zero.
        batch: {'tokens': [prompt, length, width], 'mask': [prompt, length]}.
        event_shape: of a sample.
        group_size: chains a prompt; trees have a size of their own.
    """

    config: Any
    network: models.DiT
    params: Any
    batch: Any
    event_shape: tuple[int, ...]
    group_size: int

    @property
    def prompts(self) -> int:
        """How many."""
        return self.batch["mask"].shape[0]


def make_problem(
    config: Any, group_size: int = 8, remat: bool | None = None
) -> Problem:
    """Network and conditions of a config; remat is the config's where it is None."""
    spec = tasks.model_spec(config)
    if remat is not None:
        spec["remat"] = remat
    network: Any = models.build(spec)
    network, length = network.dit_module(), spec["max_length"]
    prompts, size = config.rl.prompts, config.task.size
    random = np.random.default_rng(0)
    tokens = random.normal(size=(prompts, length, network.token_width))
    lengths = random.integers(1, length + 1, (prompts, 1))
    image = jnp.zeros((1, size, size, 3))
    init = functools.partial(models.init_params, network)
    shapes = jax.eval_shape(init, jax.random.key(0), image, jnp.zeros(1), None)

    def draw(name: str, leaf: Any) -> Array:
        # none is zero, as initial outputs are, so that velocities can be compared
        deviation = 0.5 / leaf.shape[-2] ** 0.5 if name.endswith("kernel") else 0.02
        return jnp.asarray(deviation * random.normal(size=leaf.shape), jnp.float32)

    params = trees.map_with_path(draw, shapes)
    batch = {
        "tokens": jnp.asarray(tokens, jnp.float32),
        "mask": jnp.asarray(np.arange(length) < lengths),
    }
    return Problem(config, network, params, batch, (size, size, 3), group_size)


def redness(samples: Array, prompts: Any) -> Array:
    """The reward: how much redder than green and blue an image is."""
    del prompts
    return samples[..., 0].mean((1, 2)) - samples[..., 1:].mean((1, 2, 3))


_CLIP_RANGE = 0.1
"""Wide enough for the rounding of 16-bit networks; it costs as much as any other."""


def dance_grpo(problem: Problem) -> flow_rl.Setup:
    """DanceGRPO's preset with the problem's sizes."""
    return flow_grpo.preset(
        "dance_grpo",
        problem.event_shape,
        objective={"clip_range": _CLIP_RANGE},
        group_size=problem.group_size,
        steps=problem.config.rollout.steps,
        shift=problem.config.rollout.shift,
        updates=problem.config.rl.updates,
    )


def arm(problem: Problem, name: str) -> flow_rl.Setup:
    """An arm of the problem's config."""
    found = alignment.setup(of_arm(problem.config, name), problem.event_shape)
    objective = dataclasses.replace(found.objective, clip_range=_CLIP_RANGE)
    return found._replace(objective=objective)


def trained_steps(method: Any) -> tuple[int, int]:
    """Steps that are stored, and how many of them train, a sample."""
    table, plan = method.plan(0)

    def edges(key: Any) -> Any:
        keys = prng.sample_keys(key, 1)
        samples = flow_rl.samples_of(keys, method.group_size)
        drawn, record = method.rollout(samples, lambda x, t, cond: x, table, plan)
        rewards = jnp.zeros(drawn.shape[0])
        credit = method.credit(rewards, samples.group, record, plan, key)
        return record.log_prob, credit.edge

    counts = jax.eval_shape(edges, jax.random.key(0))
    stored, trained = (found.shape[0] // method.group_size for found in counts)
    return stored, trained


def _velocity(problem: Problem) -> Callable[[Any], Any]:
    return functools.partial(functools.partial, models.functional(problem.network))


def _optimizer(config: Any) -> Any:
    settings = config.rl
    return train.make_optimizer(
        train.OptimizerConfig(
            name="adamw",
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
    )


# -- contenders ------------------------------------------------------------------------


class Ours:
    """An iteration, with its two compiled programs."""

    def __init__(self, problem: Problem, setup: flow_rl.Setup):
        self.batch, self.key = problem.batch, jax.random.key(1)
        self.method = setup.method
        optimizer = _optimizer(problem.config)
        velocity = _velocity(problem)
        self.iteration: Any = flow_rl.make_iteration(
            flow_rl.Policy(
                velocity=lambda params, frozen: velocity(params),
                condition=lambda frozen, batch: batch,
            ),
            self.method,
            redness,
            optimizer,
            setup.objective,
            updates=setup.updates,
            microbatches=problem.config.rl.microbatches,
        )
        self.state = train.create_state(problem.params, optimizer)
        self.metrics: Any = {}
        samples = problem.prompts * self.method.group_size
        self.rewards = np.linspace(0, 1, samples, dtype=np.float32)

    def collect_arguments(self) -> tuple[Any, ...]:
        """What the rollout is called with."""
        zero = np.int32(0)
        plan = self.method.plan(0)
        return self.state.params, (), self.batch, self.key, zero, zero, *plan

    def learn_arguments(self, record: Any) -> tuple[Any, ...]:
        """What the update is called with; it donates the first, a copy."""
        state = jax.tree.map(jnp.copy, self.state)
        given = (state, (), self.batch, (record,), self.rewards, self.key)
        return *given, np.int32(0), *self.method.plan(0)

    def rollout(self) -> tuple[Array, Any]:
        """Samples and record."""
        return self.iteration.programs["rollout"](*self.collect_arguments())

    def whole(self) -> Any:
        """One iteration."""
        self.state, self.metrics = self.iteration(self.state, self.batch, self.key)
        return self.state, self.metrics

    def __call__(self) -> Seconds:
        """Seconds of both programs, and of a whole iteration."""
        rollout, (_, record) = timed(self.rollout)
        given = jax.block_until_ready(self.learn_arguments(record))
        update, _ = timed(lambda: self.iteration.programs["update"](*given))
        whole, _ = timed(self.whole)
        return {"rollout": rollout, "update": update, "whole": whole}


class OneAtATime:
    """DanceGRPO as the reference code runs it: everything at batch 1, in Python loops.

    Each step of each sample is one compiled call, and so is each transition's
    gradient; gradients are accumulated to one optimiser step a minibatch.
    """

    def __init__(self, problem: Problem):
        method, objective, self.updates = dance_grpo(problem)
        self.method, self.event_shape = method, problem.event_shape
        self.stored, self.trained = trained_steps(method)
        table = method.plan(0)[0]
        self.rows = [jax.device_put(table[i : i + 1]) for i in range(len(table))]
        self.random, self.key = np.random.default_rng(0), jax.random.key(1)
        self.cond = [
            jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], problem.batch)
            for i in range(problem.prompts)
            for _ in range(method.group_size)
        ]
        optimizer = _optimizer(problem.config)
        self.params = jax.tree.map(jnp.copy, problem.params)
        self.opt_state = optimizer.init(self.params)
        velocity = _velocity(problem)

        @jax.jit
        def step(params: Any, key: Any, x: Any, row: Any, cond: Any) -> Any:
            drawn = flows.rollout(
                key, velocity(params), x, row, cond, reduction=method.reduction
            )
            return drawn.states[-1], drawn.log_prob[0]

        @functools.partial(jax.jit, donate_argnums=0)
        def accumulate(
            total: Any,
            params: Any,
            x: Any,
            x_next: Any,
            row: Any,
            cond: Any,
            log_prob: Any,
            advantage: Any,
        ) -> Any:
            def loss(params: Any) -> Array:
                scores = flows.score_transitions(
                    velocity(params),
                    x,
                    x_next,
                    row.rows(slice(None), x.dtype),
                    cond,
                    reduction=method.reduction,
                )
                surrogate = rl.clipped_surrogate(
                    scores.log_prob,
                    log_prob,
                    advantage,
                    clip_range=objective.clip_range,
                )
                return surrogate[0]

            return jax.tree.map(jnp.add, total, jax.grad(loss)(params))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def apply(params: Any, opt_state: Any, total: Any, count: Any) -> Any:
            grads = jax.tree.map(lambda g: g / count, total)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, changes)
            return params, opt_state, optax.global_norm(grads)

        self.step, self.accumulate, self.apply = step, accumulate, apply
        group = np.repeat(np.arange(problem.prompts), method.group_size)
        self.credit = jax.jit(
            lambda rewards: rl.group_advantages(
                rewards,
                group,
                num_groups=problem.prompts,
                scale=method.scale,
                ddof=method.ddof,
                eps=method.eps,
                clip=method.advantage_clip,
            )
        )
        self.zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params))
        self.score = jax.jit(lambda samples: redness(samples, None))
        shape = (1, *self.event_shape)
        self.draw = jax.jit(lambda key: jax.random.normal(key, shape))

    def rollout(self, keys: Any = None, start: Any = None) -> list[Any]:
        """A list of (states, log-probs) a sample; keys and starts may be given."""
        count = len(self.cond)
        shared = self.method.group_size if self.method.same_noise else 1
        if keys is None:
            self.key, key = jax.random.split(self.key)
            keys = prng.sample_keys(key, count)
        found = []
        for i in range(count):
            key = keys[i : i + 1]
            of_start = i - i % shared
            x = start[i : i + 1] if start is not None else self.draw(keys[of_start])
            states, log_probs = [x], []
            for row in self.rows:
                x, log_prob = self.step(self.params, key, x, row, self.cond[i])
                states.append(x)
                log_probs.append(log_prob)
            found.append((states, log_probs))
        return found

    def update(self, drawn: list[Any], rewards: Any) -> list[Array]:
        """All updates; returns the gradient norm of each."""
        count = len(drawn)
        advantage = self.credit(rewards)
        advantage = [advantage[i : i + 1] for i in range(count)]
        pairs = [
            (i, int(step))
            for i in range(count)
            for step in self.random.permutation(self.stored)[: self.trained]
        ]
        order = self.random.permutation(len(pairs))
        share = -(-len(pairs) // self.updates)
        norms = []
        for first in range(0, len(pairs), share):
            part = order[first : first + share]
            total = self.zeros(self.params)
            for number in part:
                i, step = pairs[number]
                states, log_probs = drawn[i]
                total = self.accumulate(
                    total,
                    self.params,
                    states[step],
                    states[step + 1],
                    self.rows[step],
                    self.cond[i],
                    log_probs[step],
                    advantage[i],
                )
            self.params, self.opt_state, norm = self.apply(
                self.params, self.opt_state, total, np.float32(len(part))
            )
            norms.append(norm)
        return norms

    def __call__(self) -> Seconds:
        """Seconds of each phase of one iteration."""
        start = time.perf_counter()
        rollout, drawn = timed(self.rollout)
        samples = jnp.concatenate([states[-1] for states, _ in drawn])
        rewards = np.asarray(self.score(samples))
        update, _ = timed(lambda: (self.update(drawn, rewards), self.params))
        whole = time.perf_counter() - start
        return {"rollout": rollout, "update": update, "whole": whole}


class Torch:
    """:class:`benchmarks.torch_dance_grpo.Rival`; eager where it does not compile."""

    def __init__(self, problem: Problem):
        import torch

        self.name = f"torch {torch.__version__}"
        self.peak: Callable[[], int] | None = None
        try:
            self.rival = make_torch(problem, compiled=True)
            self()
            self.name += ", compiled"
        except Exception as error:  # whatever its compiler stumbles over
            reason = (str(error).strip().splitlines() or [""])[0]
            self.name += f", eager ({type(error).__name__}: {reason})"
            self.rival = make_torch(problem, compiled=False)
        if self.rival.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.peak = torch.cuda.max_memory_allocated

    def __call__(self) -> Seconds:
        """Seconds of each phase of one iteration."""
        rival = self.rival

        def now() -> float:
            rival.synchronise()
            return time.perf_counter()

        start = now()
        samples, *record = rival.rollout()
        drawn = now()
        rewards = rival.reward(samples)
        scored = now()
        rival.update(*record, rewards)
        end = now()
        return {"rollout": drawn - start, "update": end - scored, "whole": end - start}


def make_torch(problem: Problem, compiled: bool) -> Any:
    """A :class:`benchmarks.torch_dance_grpo.Rival` that does as :class:`Ours` does."""
    from benchmarks import torch_dance_grpo

    method, objective, updates = dance_grpo(problem)
    stored, trained = trained_steps(method)
    settings = problem.config.rl
    return torch_dance_grpo.Rival(
        problem.network,
        problem.params,
        method,
        objective,
        method.plan(0)[0],
        stored,
        trained,
        problem.batch,
        updates=updates,
        microbatches=settings.microbatches,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        compiled=compiled,
    )


def check_torch(problem: Problem, tolerance: float = 1e-4) -> dict[str, float]:
    """Compares the rival in PyTorch with ours, in float32, on one prompt.

    Returns:
        Largest differences of velocities and states (over the largest value), of
        log-probs, and of the gradient's norm (relative).

    Raises:
        AssertionError: one of them is above the tolerance.
    """
    problem = dataclasses.replace(
        problem,
        network=problem.network.clone(recipe="fp32"),
        batch=jax.tree.map(lambda leaf: leaf[:1], problem.batch),
    )
    one, rival = OneAtATime(problem), make_torch(problem, compiled=False)
    count, steps = len(one.cond), len(one.rows)
    keys = prng.sample_keys(jax.random.key(2), count)
    start = prng.normal(keys, problem.event_shape)
    drawn = one.rollout(keys, start)
    states = np.stack([np.concatenate(each) for each, _ in drawn])
    log_prob = np.stack([np.concatenate(each) for _, each in drawn])[:, : one.stored]
    noise = [prng.normal(prng.fold_in(keys, i), one.event_shape) for i in range(steps)]
    found = rival.rollout(rival.tensor(start), rival.tensor(np.stack(noise)))
    samples, rival_states, rival_log_prob = (each.cpu().numpy() for each in found)

    times = np.linspace(0, 1, count, dtype=np.float32)
    cond = jax.tree.map(lambda *rows: jnp.concatenate(rows), *one.cond)
    velocity = _velocity(problem)(problem.params)(start, jnp.asarray(times), cond)
    condition = (rival.tensor(cond["tokens"]), rival.tensor(cond["mask"]))
    rival_velocity = rival.network(
        rival.tensor(start), rival.tensor(times), *condition
    ).detach()

    advantage = np.where(np.arange(count) % 2, 1.0, -0.5).astype(np.float32)
    pairs = [(i, step) for i in range(count) for step in range(one.stored)]
    total = one.zeros(one.params)
    for i, step in pairs:
        before, after = drawn[i][0][step : step + 2]
        total = one.accumulate(
            total, one.params, before, after, one.rows[step], one.cond[i],
            drawn[i][1][step], advantage[i : i + 1],
        )  # fmt: skip
    norm = float(optax.global_norm(total)) / len(pairs)
    of_sample, of_step = (rival.tensor(np.asarray(side)) for side in zip(*pairs))
    rival_norm = rival.gradient(
        rival.tensor(states), rival.tensor(log_prob), of_sample, of_step,
        rival.tensor(advantage),
        rival.tensor(np.full(len(pairs), 1 / len(pairs), np.float32)),
    )  # fmt: skip

    def worst(a: Any, b: Any) -> float:
        return float(np.abs(np.asarray(a) - b).max() / np.abs(np.asarray(a)).max())

    differences = {
        "velocity": worst(velocity, rival_velocity.cpu().numpy()),
        "states": worst(states[:, : one.stored + 1], rival_states),
        "samples": worst(states[:, -1], samples),
        "log_prob": float(np.abs(log_prob - rival_log_prob).max()),
        "gradient_norm": abs(float(rival_norm) / norm - 1),
    }
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise AssertionError(
                f"PyTorch's {name} differs from ours by {difference:.2g}, more than "
                f"{tolerance:g}: it would be another computation that is timed."
            )
    return differences


# -- parts -----------------------------------------------------------------------------


def rollout_rows(problem: Problem, ours: Ours, repeats: int) -> list[Row]:
    """A rollout with log-probs and record, over plain ODE sampling."""
    method, velocity = ours.method, _velocity(problem)
    table = flows.make_table("ode", method.grid)
    samples = problem.prompts * method.group_size

    @jax.jit
    def sample(params: Any, batch: Any, key: Any) -> Array:
        cond = jax.tree.map(lambda leaf: jnp.repeat(leaf, method.group_size, 0), batch)
        start = prng.normal(prng.sample_keys(key, samples), problem.event_shape)
        return flows.rollout(None, velocity(params), start, table, cond, store=False)

    def plain() -> Seconds:
        seconds, _ = timed(lambda: sample(ours.state.params, problem.batch, ours.key))
        return {"rollout": seconds}

    def scored() -> Seconds:
        return {"rollout": timed(ours.rollout)[0]}

    found = in_turn({"ours": scored, "rival": plain}, repeats)
    goals = {"rollout": ROLLOUT_GOAL}
    return compare("log-probs and record / ODE", found["ours"], found["rival"], goals)


def iteration_rows(
    ours: Ours, rivals: Mapping[str, Contender], repeats: int
) -> list[Row]:
    """An iteration over those of rivals."""
    found = in_turn({"ours": ours, **rivals}, repeats)
    return [
        row
        for name in rivals
        for row in compare(f"batched / {name}", found["ours"], found[name])
    ]


def branch_rows(problem: Problem, repeats: int) -> list[Row]:
    """Iterations of trees over that of chains; the problem's config is BranchGRPO's."""
    claims = problem.config.claims
    names = ("dance", "branch", "branch_depth")
    arms = {name: Ours(problem, arm(problem, name)) for name in names}
    found = in_turn(arms, repeats)
    rows = []
    for name, claim in (("branch", "B2a"), ("branch_depth", "B2b")):
        goal = {"whole": float(claims[claim].threshold)} if claim in claims else {}
        rows += compare(f"{name} / dance", found[name], found["dance"], goal)
    calls = {
        name: alignment.calls_per_sample(problem.config, arms[name].method)
        for name in names
    }
    trained = {name: _trained_edges(arms[name].method) for name in names}
    for what, counts in (("network calls", calls), ("trained edges", trained)):
        for name in ("branch", "branch_depth"):
            rows.append(_count_row(f"{what} a sample, {name} / dance", counts, name))
    return rows


def _count_row(what: str, counts: Mapping[str, float], name: str) -> Row:
    ours, rival = counts[name], counts["dance"]
    return {
        "what": what,
        "unit": "",
        "ours": ours,
        "rival": rival,
        "ratio": ours / rival,
    }


def _trained_edges(method: Any) -> float:
    """Transitions with a weight, a sample; those of trees are known beforehand."""
    if not isinstance(method, branchgrpo.Trees):
        return float(trained_steps(method)[1])
    plan = method.plan(0)[1]
    return float(plan["weight"].sum()) / method.group_size


def memory_rows(contenders: Mapping[str, Ours]) -> list[Row]:
    """Bytes of states a sample, over whole trajectories; and of both programs."""
    rows = []
    for name, ours in contenders.items():
        samples, record = jax.eval_shape(ours.rollout)
        count, method = samples.shape[0], ours.method
        state = 4 * int(np.prod(method.event_shape))
        stored, whole = trees.nbytes(record.states) / count, state * len(method.grid)
        rows.append(
            {
                "what": f"{name}: stored states a sample / whole trajectories",
                "unit": "B",
                "ours": stored,
                "rival": whole,
                "ratio": stored / whole,
            }
        )
        for program, given in (
            ("rollout", ours.collect_arguments()),
            ("update", ours.learn_arguments(record)),
        ):
            compiled = ours.iteration.programs[program].lower(*given).compile()
            found = compiled.memory_analysis()
            peak = (
                found.argument_size_in_bytes
                + found.output_size_in_bytes
                + found.temp_size_in_bytes
                - found.alias_size_in_bytes
            )
            rows.append({"what": f"{name}: {program}", "unit": "B", "ours": peak})
    return rows


def device_peak() -> list[Row]:
    """Peak of the device's memory in this process so far, where it is known."""
    statistics_ = jax.devices()[0].memory_stats() or {}
    peak = statistics_.get("peak_bytes_in_use")
    if peak is None:
        return []
    return [{"what": "device peak, one iteration", "unit": "B", "ours": peak}]


# -- the program -----------------------------------------------------------------------


def measure(
    problem: Problem, trees_problem: Problem, parts: Sequence[str], repeats: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the parts asked for, and what else is worth knowing."""
    ours = Ours(problem, dance_grpo(problem))
    ours()
    rows = device_peak() if "memory" in parts else []
    notes: dict[str, Any] = {"first_ratio_error": float(ours.metrics["ratio_error"])}
    if "rollout" in parts:
        rows += rollout_rows(problem, ours, repeats)
    rivals: dict[str, Contender] = {}
    if "one" in parts:
        rivals["one at a time"] = OneAtATime(problem)
    if "torch" in parts:
        if importlib.util.find_spec("torch") is None:
            notes["torch"] = "not installed: pip install 'tmdjax[parity]'"
        else:
            try:
                notes["torch_differences"] = check_torch(problem)
                rivals["torch"] = rival = Torch(problem)
                notes["torch"] = rival.name
            except (AssertionError, RuntimeError) as error:  # the rest is still wanted
                notes["torch"] = f"not timed: {error}"
    if rivals:
        rows += iteration_rows(ours, rivals, repeats)
    torch_rival = rivals.get("torch")
    if isinstance(torch_rival, Torch) and torch_rival.peak is not None:
        peak = torch_rival.peak()
        rows.append({"what": "device peak, torch", "unit": "B", "ours": peak})
    if "branch" in parts:
        rows += branch_rows(trees_problem, repeats)
    if "memory" in parts:
        trees_ours = Ours(trees_problem, arm(trees_problem, "branch"))
        rows += memory_rows({"dance_grpo": ours, "branch": trees_ours})
    return rows, notes


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The options."""
    flags = options(__doc__, repeats=5)
    flags.add_argument("--config", default="configs/flow_grpo.py:cpu")
    for name, field in {**_FIELDS, **_CHAIN_FIELDS}.items():
        flags.add_argument(f"--{name}", help=f"{field} of the config")
    flags.add_argument("--group", type=int, default=8, help="chains a prompt")
    flags.add_argument("--remat", action=argparse.BooleanOptionalAction)
    flags.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return flags.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    given = parse(arguments)
    network, chains = (
        [f"{field}={value}" for name, field in fields.items()
         if (value := getattr(given, name)) is not None]
        for fields in (_FIELDS, _CHAIN_FIELDS)
    )  # fmt: skip
    tier = given.config.rpartition(":")[2]
    config = load_config(given.config, [*network, *chains])
    branch_config = load_config(f"configs/branchgrpo.py:{tier}", network)
    problem = make_problem(config, given.group, given.remat)
    trees_problem = dataclasses.replace(problem, config=branch_config)
    load = os.getloadavg()[0]
    rows, notes = measure(problem, trees_problem, given.parts, given.repeats)
    conclude(
        "flow_rl",
        rows,
        load,
        given.json,
        config=given.config,
        overrides=[*network, *chains],
        group_size=given.group,
        remat=problem.network.remat,
        parameters=trees.count(problem.params),
        repeats=given.repeats,
        **notes,
    )


if __name__ == "__main__":
    main()
