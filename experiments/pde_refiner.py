"""Neural solvers of Kuramoto-Sivashinsky: how long their rollouts follow the truth.

Stages: trajectories are solved, the same for all arms and seeds; each arm trains its
network on windows of them; its averaged parameters are rolled out from states that no
training saw.
"""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import arms as arms_of_config
from experiments import pde_solvers
from experiments.arms import of_arm
from experiments.figures import side_by_side
from tmdjax import metrics, models
from tmdjax.core import prng, trees
from tmdjax.data import pde
from tmdjax.harness import Report, Stage, StageContext, StageResult, Update
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import image_grid
from tmdjax.harness.report import line_plot
from tmdjax.systems.pde_refiner import PDERefiner
from tmdjax.train import neural_solvers

Config = Any
MEANINGS = {
    "high_correlation_horizon": "time until the correlation with the truth, the mean "
    "over test trajectories, falls below the threshold",
    "high_correlation_count": "the same by the published count of all steps above it",
    "validation_horizon": "high_correlation_horizon of the validation trajectories, "
    "by which settings are chosen",
    "censored": "1 where that time is beyond the end of the trajectories",
    "one_step_mse": "mean squared error of one step from true states",
    "error_high": "relative error of one step, wavenumbers from evaluate.wavenumber on",
    "error_low": "relative error of one step, wavenumbers below evaluate.wavenumber",
    "failed": "share of rollouts with a value that is not finite or above 100",
    "reliability": "correlation, over test trajectories, of the time for which an "
    "ensemble agrees with itself and the time for which a rollout is right",
    "calls": "network calls a step",
    "seconds_per_update": "seconds an update",
}
_BOUND = 100.0


def arms(config: Config) -> tuple[str, ...]:
    """Names of the arms."""
    return arms_of_config.arms(config)


def stages(config: Config, arm: str) -> list[Stage]:
    """Trajectories for all, then what an arm trains and measures."""
    own = of_arm(config, arm)
    plain = to_plain(own)
    made = {k: v for k, v in plain["data"].items() if k not in pde_solvers.OF_AN_ARM}
    used = {k: plain["data"][k] for k in pde_solvers.OF_AN_ARM}
    names = ("method", "model", "optimizer", "train")
    trained = {"data": used, "recipe": plain["precision"]["train"]}
    return [
        Stage(
            name="trajectories",
            run=functools.partial(pde_solvers.solve, config),
            config=made,
            seeded=False,
        ),
        Stage(
            name="train",
            run=functools.partial(pde_solvers.train_solver, own),
            config={k: plain[k] for k in names} | trained,
            parents=("trajectories",),
        ),
        Stage(
            name="evaluate",
            run=functools.partial(evaluate, own),
            config=plain["evaluate"] | {"recipe": plain["precision"]["rollout"]},
            parents=("trajectories", "train"),
        ),
    ]


def evaluate(config: Config, context: StageContext) -> StageResult:
    """Rollouts from the first states of test and validation trajectories."""
    method, params = (
        pde_solvers.method_of(config),
        context.inputs["train"].outputs["params"],
    )
    apply_fn = models.functional(pde_solvers.network_of(config, "rollout"))
    sets = {name: pde_solvers.set_of(context, name) for name in pde_solvers.SETS[1:]}
    keys = prng.sample_keys(context.key, config.data.test_count)
    stride, first = config.data.stride, method.history
    truth = {name: pde.every(s.states, stride) for name, s in sets.items()}
    length = len(truth["test"]) - first

    def stepper(params: Any, cond: Any) -> Any:
        return lambda history, keys: method.step(params, apply_fn, history, keys, cond)

    def start(states: Any) -> Any:
        return jnp.moveaxis(jnp.asarray(states[:first]), 0, 1)

    @jax.jit
    def roll(params: Any, history: Any, cond: Any) -> Any:
        step = stepper(params, cond)
        found = neural_solvers.rollout(step, history, keys, length, bound=_BOUND)
        return found.outputs, found.failed

    @jax.jit
    def once(params: Any, history: Any, cond: Any) -> Any:
        return stepper(params, cond)(history, keys)

    @jax.jit
    def together(params: Any, history: Any, cond: Any) -> Any:
        given = stepper(params, cond), history, keys, length
        members = config.evaluate.members
        return neural_solvers.ensemble_rollout(*given, members, bound=_BOUND).outputs

    conds = {
        name: pde_solvers.condition(config, s.columns()) for name, s in sets.items()
    }
    dt, threshold = sets["test"].dt * stride, config.evaluate.threshold
    found, curves = {}, {}
    for name in pde_solvers.SETS[1:]:
        states, failed = roll(params, start(truth[name]), conds[name])
        curves[name] = metrics.pearson_correlation(states, truth[name][first:])
        time = _time(curves[name], sets[name].dt * stride, threshold)
        if name == "validation":
            found["validation_horizon"] = time[0]
            continue
        found |= dict(zip(_TIMES, time))
        found["failed"] = float(np.mean(failed))
        shown = np.stack([truth[name][first:, 0], np.asarray(states)[:, 0]])
    errors = []
    for begin in np.linspace(0, length - 1, 4).astype(int):
        part = truth["test"][begin:]
        after = once(params, start(part), conds["test"])
        errors.append((np.asarray(after), part[first]))
    after, right = (np.stack(part) for part in zip(*errors))
    spectrum, found_here = _errors(config, after, right, sets["test"])
    found |= found_here | {"calls": float(getattr(method, "refinements", 0) + 1)}
    if isinstance(method, PDERefiner) and method.refinements:
        ensemble = together(params, start(truth["test"]), conds["test"])
        agreed = neural_solvers.reliable_time(ensemble, threshold, dt)
        own = metrics.high_correlation_time(
            curves["test"], threshold, dt, interpolate=True
        )
        found["reliability"] = _correlation(agreed.time, own.time)
    curve = curves["test"].mean(1)
    return StageResult({"curve": curve, "spectrum": spectrum, "shown": shown}, found)


_TIMES = ("high_correlation_horizon", "high_correlation_count", "censored")


def _time(r: np.ndarray, dt: np.ndarray, threshold: float) -> tuple[float, ...]:
    """Of the mean curve; where steps differ, the mean of each trajectory's own."""
    if np.ptp(dt) == 0:
        r, dt = r.mean(1), dt[0]
    found = metrics.high_correlation_time(r, threshold, dt, interpolate=True)
    return tuple(float(np.mean(part)) for part in (found.time, found.count, found[1]))


def _errors(
    config: Config, after: np.ndarray, right: np.ndarray, test: pde.Trajectories
) -> tuple[np.ndarray, dict[str, float]]:
    """Relative errors by wavenumber, and over the low and the high ones."""
    over = (0, 1, 3)
    error = metrics.power_spectrum(after - right).sum(over)
    power = metrics.power_spectrum(right).sum(over)
    length = float(np.mean(test.dx)) * config.data.points
    cut = math.ceil(config.evaluate.wavenumber * length / (2 * np.pi))
    found = {"one_step_mse": float(np.mean((after - right) ** 2))}
    for name, part in (("low", slice(0, cut)), ("high", slice(cut, None))):
        found[f"error_{name}"] = float(np.sqrt(error[part].sum() / power[part].sum()))
    return metrics.error_by_wavenumber(after, right), found


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(metrics.pearson_correlation(a, b, 0))


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    method = pde_solvers.method_of(of_arm(config, arm))
    names = {*MEANINGS} - {"seconds_per_update"}
    refines = isinstance(method, PDERefiner) and method.refinements
    return names if refines else names - {"reliability"}


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row an arm."""
    columns = ("high_correlation_horizon", "validation_horizon", "one_step_mse")
    columns = (*columns, "error_low", "error_high", "reliability", "calls")
    return [
        {"arm": arm} | {c.replace("_", " "): found.get(f"{arm}/{c}") for c in columns}
        for arm in arms(config)
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Times and errors, an arm a row."""
    figures = []
    threshold = f"{config.evaluate.threshold:g}"
    for what, label in (
        (
            "high_correlation_horizon",
            f"time until the correlation is below {threshold}",
        ),
        ("error_high", "relative one-step error at high wavenumbers"),
    ):
        rows = {arm: {what: f"{arm}/{what}"} for arm in arms(config)}
        title = "Neural solvers of Kuramoto-Sivashinsky"
        figures += side_by_side(found, rows, folder / f"{what}.png", title, label)
    return figures


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """Truth and rollout in space and time, correlation, errors by wavenumber."""
    shown = Report()
    if "evaluate" not in results:
        return shown
    outputs = results["evaluate"].outputs
    truth, found = (np.nan_to_num(x, nan=0.0) for x in outputs["shown"])
    pictures = {"truth": truth, "rollout": found, "difference": found - truth}
    rows = {name: x[None] / 3 for name, x in pictures.items()}
    path = image_grid(rows, folder / "space_time.png", scale=2)
    shown.figures.append(("Space to the right, time downwards", path))
    for name, values, label in (
        ("correlation", outputs["curve"], "step of the model"),
        ("error", outputs["spectrum"], "waves in the domain"),
    ):
        axis = np.arange(len(values)) + (name == "correlation")
        kept = np.isfinite(values)
        line = {arm: (axis[kept], np.asarray(values)[kept])}
        path = line_plot(
            line, folder / f"{name}.png", arm, label, name, log_y=name == "error"
        )
        shown.figures.append((f"{name.capitalize()} by {label}", path))
    return shown


def describe(config: Config) -> dict[str, Any]:
    """Sizes; traces an update of each arm, so that bad settings are refused."""
    found: dict[str, Any] = {}
    traced: dict[Any, int] = {}
    for arm in arms(config):
        own = of_arm(config, arm)
        pde_solvers.network_of(own, "rollout")
        # what an arm's program is made of; the rest of a method changes numbers alone
        kind = type(pde_solvers.method_of(own)), pde_solvers.channels(own)
        step, shapes, _ = pde_solvers.update(own)
        kind = (*kind, own.model.to_json(), str(shapes[1]))
        if kind not in traced:
            state, _ = jax.eval_shape(step, *shapes)
            traced[kind] = trees.count(state.params)
        found[f"{arm}/parameters"] = traced[kind]
    data = config.data
    size = data.train_count * data.frames * data.points * 4 / 1e9
    return found | {"training data, GB": size, "updates": config.train.steps}


def updates(config: Config) -> dict[str, Update]:
    """The update of each arm."""
    return {arm: pde_solvers.update(of_arm(config, arm)) for arm in arms(config)}
