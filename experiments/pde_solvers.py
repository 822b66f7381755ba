"""Solvers that an experiment compares: data, network, method, training, by config.

Each function is given the config of an arm. Its method is 'one_step', 'corrected' (the
same beside a coarse solver), 'coarse' (that solver alone, which nothing is trained
for), or the preset of a system.
"""

import dataclasses
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
from tmdjax.harness import ConfigError, StageContext, StageResult, Update
from tmdjax.harness.config import to_plain
from tmdjax.systems.pde_refiner import PDERefiner
from tmdjax.train.neural_solvers import OneStep

Config = Any
SETS = ("train", "validation", "test")
OF_AN_ARM = ("share", "stride", "conditions")
"""Settings of data that trajectories do not depend on."""


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A coarse solver by itself, called like the methods that are trained.

    Attributes:
        solver: ``state -> next state``, [batch, *space, channel] both.
        history: states that it needs.
        window: states of a window of the data that holds a step.
    """

    solver: Any
    history: int = 1
    window: int = 2

    def step(
        self, params: Any, apply_fn: Any, history: Any, keys: Any, cond: Any = None
    ) -> Any:
        """The next state; parameters, network, keys and conditions are not needed."""
        return self.solver(history[:, -1])


def method_of(
    config: Config, columns: Mapping[str, np.ndarray] | None = None
) -> PDERefiner | OneStep | Coarse:
    """The method of an arm.

    Args:
        config: of the arm.
        columns: dt, dx and viscosity of trajectories, [trajectory] each, whose rows a
            coarse solver is set up for. None takes the middle of each interval of the
            config, for all rows.

    Raises:
        ConfigError, TypeError, ValueError: an unknown method or setting.
    """
    given = tuples(to_plain(config.method))
    name = given.pop("name", None)
    if name == "coarse":
        if given:
            raise ConfigError(
                f"method.{min(given)} of 'coarse': a coarse solver alone has no "
                f"settings here; those of the group 'coarse' are its own."
            )
        return Coarse(coarse_solver(config, columns))
    if name in ("one_step", "corrected"):
        if name == "corrected":
            given["solver"] = coarse_solver(config, columns)
        check_fields(OneStep, given)
        return OneStep(**given)
    return arms.build_method(to_plain(config.method), PDERefiner)


def coarse_solver(
    config: Config, columns: Mapping[str, np.ndarray] | None
) -> pde.Stepper:
    """ETDRK4 on the points and in the steps of the group 'coarse', in float32."""
    data, given = config.data, config.coarse
    if given.points % 2 or not 4 <= given.points <= data.points:
        raise ValueError(
            f"coarse.points={given.points} must be even, at least 4 and at most "
            f"data.points={data.points}."
        )
    if columns is None:
        means = {n: np.mean([data[n]], 1) for n in ("length", "dt", "viscosity")}
        columns = {**means, "dx": means["length"] / data.points}
    if not any(np.ptp(column) for column in columns.values()):
        columns = {name: column[:1] for name, column in columns.items()}  # for all
    equation = pde.kuramoto_sivashinsky(
        given.points, columns["dx"] * data.points, columns["viscosity"]
    )
    return pde.stepper(equation, columns["dt"] * data.stride, given.substeps)


def with_solver(method: Any, solver: pde.Stepper | None) -> Any:
    """A method beside another coarse solver; as it is, where it has none."""
    return method if solver is None else dataclasses.replace(method, solver=solver)


def solver_of(method: Any) -> pde.Stepper | None:
    """The coarse solver of a method, or None."""
    return getattr(method, "solver", None)


def is_trained(config: Config) -> bool:
    """Whether an arm has a network."""
    return config.method.get("name") != "coarse"


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
    last = min(given.dt) * given.stride * longest
    most = max(config.evaluate.horizons, default=0)
    if most > last + 1e-6:
        raise ValueError(
            f"evaluate.horizons={config.evaluate.horizons} reach beyond {last:g}, the "
            f"end of rollouts of {longest} steps, data.stride={given.stride} frames "
            f"each, data.dt={given.dt} apart; use more data.test_frames."
        )
    most = max(config.evaluate.waves, default=0)
    if most > given.points // 2:
        raise ValueError(
            f"evaluate.waves={config.evaluate.waves} are more than the "
            f"{given.points // 2} waves that data.points={given.points} tell apart."
        )
    windows = max(1, round(given.share * given.train_count)) * starts
    if windows < config.train.batch_size:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} is larger than the {windows} "
            f"windows of the training data; use a smaller one, or more data."
        )


def channels(config: Config) -> int:
    """Of the network's input: a history; a refiner's answer, or a solver's state."""
    method = method_of(config)
    more = isinstance(method, PDERefiner) or solver_of(method) is not None
    return method.history + more


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
        found[f"{name}_at_rest"] = at_rest(made)
    return StageResult(outputs, found)


def at_rest(trajectories: pde.Trajectories) -> float:
    """The share of trajectories that are steady at their end, which none ever loses.

    Those whose root mean square rate of change between the last two frames is below 2 %
    of that of the state a unit of time; chaotic ones change ten times as fast.
    """
    before, last = np.moveaxis(trajectories.states[:, -2:, ..., 0], 1, 0)
    rate = np.square(last - before).mean(1) / trajectories.dt**2
    return float(np.mean(rate < 0.02**2 * np.square(last).mean(1)))


def set_of(context: StageContext, name: str, share: float = 1.0) -> pde.Trajectories:
    """One of the sets, or the first part of it."""
    arrays = dict(context.inputs["trajectories"].outputs[name])
    count = max(1, round(share * len(arrays["dt"])))
    arrays = {k: v[:count] for k, v in arrays.items()}
    known = {k: arrays.pop(k) for k in ("states", "dt", "dx")}
    return pde.Trajectories(**known, parameters=arrays)


def training(config: Config, columns: Any = None) -> Supervised:
    """How an arm's network is trained; columns are those of :func:`method_of`."""
    network, method = network_of(config), method_of(config, columns)
    apply_fn, settings = models.functional(network), config.train
    solver = solver_of(method)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        given = {"states": batch["states"], "cond": condition(config, batch)}
        rows = None if solver is None else solver.rows(batch["trajectory"])
        own = with_solver(method, rows)
        return own.loss(params, apply_fn, given, keys), {}

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
    trajectories = set_of(context, "train", config.data.share)
    batches = pde.windows(
        trajectories,
        config.train.batch_size,
        context.seed,
        frames=method_of(config).window,
        stride=config.data.stride,
    )
    method = training(config, trajectories.columns())
    state = method.fit(context, batches, config.train)
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
    batch["trajectory"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    return training(config).update(batch)
