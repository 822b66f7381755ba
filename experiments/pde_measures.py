"""What is measured of the rollouts of solvers: times, errors, spectra, seconds.

Rollouts begin at the first states of test and validation trajectories, which no
training saw; all trajectories of a set are one batch.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pde_solvers
from tmdjax import metrics, models
from tmdjax.core import prng
from tmdjax.data import pde
from tmdjax.harness import StageContext, StageResult
from tmdjax.systems.pde_refiner import PDERefiner
from tmdjax.train import neural_solvers

Config = Any
MEANINGS = {
    "high_correlation_horizon": "time until the correlation with the truth, the mean "
    "over test trajectories, falls below the threshold; where their steps differ, the "
    "mean of each one's own time",
    "high_correlation_count": "the same by the published count of all steps above it",
    "validation_horizon": "high_correlation_horizon of the validation trajectories, "
    "by which settings are chosen",
    "censored": "1 where that time is beyond the end of the trajectories; where steps "
    "differ, the share of such trajectories",
    "one_step_mse": "mean squared error of one step from true states",
    "error_high": "relative error of one step, wavenumbers from evaluate.wavenumber on",
    "error_low": "relative error of one step, wavenumbers below evaluate.wavenumber",
    "failed": "share of rollouts with a value that is not finite or above 100",
    "reliability": "correlation, over test trajectories, of the time for which an "
    "ensemble agrees with itself and the time for which a rollout is right",
    "calls": "network calls a step",
    "test_at_rest": "share of test trajectories that are steady patterns at their end",
    "error": "relative error of rollouts, those that failed left out, after that time",
    "power": "mean square of rollouts, those that failed left out, in the later half "
    "of the test time, at so many waves in the domain",
    "true_power": "the same of the true trajectories",
    "seconds_per_time": "seconds that a unit of simulated time takes, all test "
    "trajectories together, compiled",
    "seconds_per_update": "seconds an update",
}
"""A sentence a measure."""

_BOUND = 100.0
_TIMES = ("high_correlation_horizon", "high_correlation_count", "censored")
_BY_TIME, _BY_WAVES = ("error",), ("power", "true_power")
_CLOCKED = ("seconds_per_time", "seconds_per_update")


def measures(config: Config) -> set[str]:
    """The metrics of an arm, given its config."""
    names = {*MEANINGS} - {*_BY_TIME, *_BY_WAVES, *_CLOCKED}
    if not _is_random(pde_solvers.method_of(config)):
        names -= {"reliability"}
    names |= {at_time(h, n) for h in config.evaluate.horizons for n in _BY_TIME}
    return names | {at_waves(w, n) for w in config.evaluate.waves for n in _BY_WAVES}


def at_time(horizon: float, name: str) -> str:
    """The metric that is told after a time."""
    return f"time{horizon:g}.{name}"


def at_waves(waves: int, name: str) -> str:
    """The metric that is told of so many waves in the domain."""
    return f"waves{waves}.{name}"


def evaluate(config: Config, context: StageContext) -> StageResult:
    """Rollouts from the first states of test and validation trajectories."""
    trained, sets = context.inputs.get("train"), pde_solvers.SETS[1:]
    params = trained.outputs["params"] if trained else {}
    sets = {name: pde_solvers.set_of(context, name) for name in sets}
    test, stride = sets["test"], config.data.stride
    method = pde_solvers.method_of(config)
    apply_fn = models.functional(pde_solvers.network_of(config, "rollout"))
    keys = prng.sample_keys(context.key, config.data.test_count)
    truth = {name: pde.every(s.states, stride) for name, s in sets.items()}
    first, length = method.history, len(truth["test"]) - method.history

    def stepper(params: Any, solver: Any, cond: Any) -> Any:
        own = pde_solvers.with_solver(method, solver)
        return lambda history, keys: own.step(params, apply_fn, history, keys, cond)

    def start(states: Any) -> Any:
        return jnp.moveaxis(jnp.asarray(states[:first]), 0, 1)

    @jax.jit
    def roll(given: Any, history: Any) -> Any:
        step = stepper(*given)
        found = neural_solvers.rollout(step, history, keys, length, bound=_BOUND)
        return found.outputs, found.failed

    @jax.jit
    def once(given: Any, history: Any) -> Any:
        return stepper(*given)(history, keys)

    @jax.jit
    def together(given: Any, history: Any) -> Any:
        run = stepper(*given), history, keys, length
        members = config.evaluate.members
        return neural_solvers.ensemble_rollout(*run, members, bound=_BOUND).outputs

    def given(columns: Mapping[str, Any]) -> Any:
        own = pde_solvers.solver_of(pde_solvers.method_of(config, columns))
        return params, own, pde_solvers.condition(config, columns)

    inputs = {n: (given(s.columns()), start(truth[n])) for n, s in sets.items()}

    def run(name: str) -> tuple[np.ndarray, np.ndarray, float]:
        begun = time.perf_counter()
        states, failed = jax.block_until_ready(roll(*inputs[name]))
        seconds = time.perf_counter() - begun
        return np.asarray(states), np.asarray(failed), seconds

    threshold = config.evaluate.threshold
    states, _, _ = run("validation")
    r = metrics.pearson_correlation(states, truth["validation"][first:])
    times = time_of(r, sets["validation"].dt * stride, threshold)
    found = {"validation_horizon": times[0]}
    states, failed, seconds = run("test")  # which was compiled by the first
    right, dt = truth["test"][first:], test.dt * stride
    r = metrics.pearson_correlation(states, right)
    found |= dict(zip(_TIMES, time_of(r, dt, threshold)))
    found |= {"failed": float(np.mean(failed)), "calls": _calls(method)}
    found |= _by_time(config, states, right, ~failed, dt)
    found |= _by_waves(config, states, right, ~failed)
    errors = []
    for begin in np.linspace(0, length - 1, 4).astype(int):
        part = truth["test"][begin:]
        after = once(inputs["test"][0], start(part))
        errors.append((np.asarray(after), part[first]))
    after, wanted = (np.stack(part) for part in zip(*errors))
    spectrum, of_a_step = errors_of(config, after, wanted, test)
    found |= of_a_step
    if _is_random(method):
        ensemble = together(*inputs["test"])
        agreed = neural_solvers.reliable_time(ensemble, threshold, dt)
        true = metrics.high_correlation_time(r, threshold, dt, interpolate=True)
        found["reliability"] = float(
            metrics.pearson_correlation(agreed.time, true.time, 0)
        )
    shown = np.stack([right[:, 0], states[:, 0]])
    outputs = {"curve": r.mean(1), "spectrum": spectrum, "shown": shown}
    timings = {"seconds_per_time": seconds / (length * float(np.mean(dt)))}
    return StageResult(outputs, found, timings=timings)


def _is_random(method: Any) -> bool:
    """Whether rollouts from one state differ, by refinement noise."""
    return isinstance(method, PDERefiner) and method.refinements > 0


def _calls(method: Any) -> float:
    if isinstance(method, pde_solvers.Coarse):
        return 0.0
    return float(getattr(method, "refinements", 0) + 1)


def time_of(r: np.ndarray, dt: np.ndarray, threshold: float) -> tuple[float, ...]:
    """High-correlation time, published count, and whether it is censored (a share).

    Args:
        r: correlation [step, trajectory].
        dt: time of a step, [trajectory]. Where steps are equal, the time is that of the
            mean curve; elsewhere it is the mean over trajectories of each one's own.
        threshold: of the correlation.
    """
    if np.ptp(dt) == 0:
        r, dt = r.mean(1), dt[0]
    found = metrics.high_correlation_time(r, threshold, dt, interpolate=True)
    found = found.time, found.count, found.censored
    return tuple(float(np.mean(part)) for part in found)


def errors_of(
    config: Config, after: np.ndarray, right: np.ndarray, test: pde.Trajectories
) -> tuple[np.ndarray, dict[str, float]]:
    """Relative errors of one step by wavenumber, and over the low and the high ones.

    Args:
        config: of the arm.
        after: predictions [start, trajectory, x, channel].
        right: what they should be.
        test: the trajectories; the mean length of their domains tells which waves
            count as high.
    """
    over = (0, 1, 3)
    error = metrics.power_spectrum(after - right).sum(over)
    power = metrics.power_spectrum(right).sum(over)
    length = float(np.mean(test.dx)) * config.data.points
    cut = math.ceil(config.evaluate.wavenumber * length / (2 * np.pi))
    found = {"one_step_mse": float(np.mean((after - right) ** 2))}
    for name, part in (("low", slice(0, cut)), ("high", slice(cut, None))):
        found[f"error_{name}"] = float(np.sqrt(error[part].sum() / power[part].sum()))
    return metrics.error_by_wavenumber(after, right), found


def _by_time(
    config: Config, states: Any, right: Any, whole: np.ndarray, dt: np.ndarray
) -> dict[str, float]:
    """Relative errors of whole rollouts after the times of evaluate.horizons."""
    error = np.square(np.asarray(states, np.float64) - right).sum((2, 3))
    power = np.square(np.asarray(right, np.float64)).sum((2, 3))
    found = {}
    for horizon in config.evaluate.horizons:
        step = np.clip(np.rint(horizon / dt).astype(int), 1, len(error)) - 1
        a, b = (x[step, np.arange(len(dt))][whole].sum() for x in (error, power))
        found[at_time(horizon, "error")] = float(np.sqrt(a / b)) if b else math.nan
    return found


def _by_waves(
    config: Config, states: Any, right: Any, whole: np.ndarray
) -> dict[str, float]:
    """Power of whole rollouts and of the truth, later half, at evaluate.waves."""
    half, found = len(states) // 2, {}
    for name, fields in (("power", states[half:, whole]), ("true_power", right[half:])):
        power = np.full(config.data.points, math.nan)  # where every rollout failed
        if fields.size:
            power = metrics.power_spectrum(fields).mean((0, 1)).sum(-1)
        found |= {at_waves(w, name): float(power[w]) for w in config.evaluate.waves}
    return found
