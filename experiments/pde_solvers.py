"""Neural solvers that an experiment trains: data, network, method, training, by config.

Each function is given the config of an arm.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import arms
from experiments.arms import tuples
from experiments.curves import seconds_per_step
from experiments.supervised import Supervised
from tmdjax import models, quant, train
from tmdjax.core import trees
from tmdjax.core.checks import check_fields
from tmdjax.data import pde
from tmdjax.harness import StageContext, StageResult, Update
from tmdjax.harness.config import to_plain
from tmdjax.systems.pde_refiner import PDERefiner
from tmdjax.train.neural_solvers import OneStep

Config = Any
SETS = ("train", "validation", "test")
OF_AN_ARM = ("share", "stride", "conditions")
"""Settings of data that trajectories do not depend on."""


def method_of(config: Config) -> PDERefiner | OneStep:
    """The method of an arm: 'one_step', or a preset of a system."""
    given = tuples(to_plain(config.method))
    if given.get("name") == "one_step":
        del given["name"]
        check_fields(OneStep, given)
        return OneStep(**given)
    return arms.build_method(to_plain(config.method), PDERefiner)


def network_of(config: Config, when: str = "train") -> Any:
    """The module of an arm, in training or 'rollout'."""
    recipe = getattr(quant.Precision(**to_plain(config.precision)), when).name
    scalars = len(condition_names(config))
    spec = to_plain(config.model) | {"recipe": recipe, "out_channels": 1}
    return models.build(spec | {"scalars": scalars})


def condition_names(config: Config) -> tuple[str, ...]:
    """What the network is told of the equation."""
    if not config.data.conditions:
        return ()
    low, high = config.data.viscosity
    return ("dt", "dx", "viscosity") if low < high else ("dt", "dx")


def condition(config: Config, columns: Mapping[str, Any]) -> Any:
    """Conditions of a batch, or None."""
    names = condition_names(config)
    given = {name: columns[name] for name in names}
    return pde.conditions(**given) if names else None


def check_data(config: Config) -> None:
    """Raises ValueError for trajectories that cannot be made, or not be used so."""
    given, method = config.data, method_of(config)
    if given.points % 2 or given.points < 4:
        raise ValueError(f"data.points={given.points} must be even, and at least 4.")
    for name in ("length", "dt", "viscosity"):
        low, high = given[name]
        if low > high:
            raise ValueError(f"data.{name}=({low}, {high}) must rise, or be equal.")
    if condition_names(config):
        ends = {name: np.array(given[name]) for name in ("dt", "viscosity")}
        ends["dx"] = np.array(given.length) / given.points
        condition(config, ends)
    highest = np.pi * given.points / np.mean(given.length)
    if config.evaluate.wavenumber > highest:
        raise ValueError(
            f"evaluate.wavenumber={config.evaluate.wavenumber} is beyond "
            f"{highest:.3g}, the highest of data.points={given.points} in data.length="
            f"{given.length}."
        )
    span = given.stride * (method.window - 1) + 1
    starts = given.frames - span + 1
    longest = (given.test_frames - 1) // given.stride - method.history + 1
    if starts < 1 or longest < 1:
        raise ValueError(
            f"no targets: a window of {method.window} states at data.stride="
            f"{given.stride} spans {span} frames; data.frames={given.frames}, "
            f"data.test_frames={given.test_frames}."
        )
    windows = max(1, round(given.share * given.train_count)) * starts
    if windows < config.train.batch_size:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} is larger than the {windows} "
            f"windows of the training data; use a smaller one, or more data."
        )


def channels(config: Config) -> int:
    """Of the network's input: a history, and a refiner's noised answer."""
    method = method_of(config)
    return method.history + isinstance(method, PDERefiner)


def solve(config: Config, context: StageContext) -> StageResult:
    """The three sets, each from a key of its own."""
    given = config.data
    outputs, found = {}, {}
    for number, name in enumerate(SETS):
        training = name == "train"
        made = pde.ks_trajectories(
            jax.random.key(number),
            given.train_count if training else given.test_count,
            points=given.points,
            frames=given.frames if training else given.test_frames,
            warm_up=given.warm_up,
            length=tuple(given.length),
            dt=tuple(given.dt),
            viscosity=tuple(given.viscosity),
        )
        outputs[name] = {"states": made.states, **made.columns()}
        found[f"{name}_deviation"] = float(made.states.std())
    return StageResult(outputs, found)


def set_of(context: StageContext, name: str, share: float = 1.0) -> pde.Trajectories:
    """One of the sets, or the first part of it."""
    arrays = dict(context.inputs["trajectories"].outputs[name])
    count = max(1, round(share * len(arrays["dt"])))
    arrays = {k: v[:count] for k, v in arrays.items()}
    known = {k: arrays.pop(k) for k in ("states", "dt", "dx")}
    return pde.Trajectories(**known, parameters=arrays)


def training(config: Config) -> Supervised:
    """How an arm's network is trained."""
    network, method = network_of(config), method_of(config)
    apply_fn, settings = models.functional(network), config.train

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        given = {"states": batch["states"], "cond": condition(config, batch)}
        return method.loss(params, apply_fn, given, keys), {}

    x = jnp.zeros((1, config.data.points, channels(config)))
    names = condition_names(config)
    cond = jnp.zeros((1, len(names))) if names else None
    return Supervised(
        init=lambda key: models.init_params(network, key, x, jnp.zeros(1), cond),
        loss=loss,
        optimizer=train.make_optimizer(
            train.OptimizerConfig(
                **tuples(to_plain(config.optimizer)), total_steps=settings.steps
            )
        ),
        ema_decay=settings.ema_decay,
    )


def train_solver(config: Config, context: StageContext) -> StageResult:
    """Trains on windows of the training trajectories; keeps averaged parameters."""
    batches = pde.windows(
        set_of(context, "train", config.data.share),
        config.train.batch_size,
        context.seed,
        frames=method_of(config).window,
        stride=config.data.stride,
    )
    state = training(config).fit(context, batches, config.train)
    return StageResult(
        {"params": state.eval_params},
        {"parameters": trees.count(state.params), "skipped_updates": state.skipped},
        model=models.spec_of(network_of(config, "rollout")),
        timings={"seconds_per_update": seconds_per_step(context.rows())},
    )


def update(config: Config) -> Update:
    """The update of an arm, and the shapes of its arguments."""
    check_data(config)
    size, window = config.train.batch_size, method_of(config).window
    columns = ("dt", "dx", "viscosity")
    batch = {k: jax.ShapeDtypeStruct((size,), jnp.float32) for k in columns}
    shape = (size, window, config.data.points, 1)
    batch["states"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return training(config).update(batch)
