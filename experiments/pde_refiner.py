"""Solvers of Kuramoto-Sivashinsky: for how long they follow the truth, at what cost.

Stages: trajectories are solved, the same for all seeds, and for all arms that do not
change them; each arm trains its network, where it has one, on windows of them; its
averaged parameters are rolled out from states that no training saw
(:mod:`experiments.pde_measures`).
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import arms as arms_of_config
from experiments import pde_measures, pde_solvers
from experiments.arms import of_arm
from experiments.figures import side_by_side
from tmdjax.core import trees
from tmdjax.harness import Report, Stage, StageResult, Update
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import image_grid
from tmdjax.harness.plots import line_plot, point_plot

Config = Any
MEANINGS = pde_measures.MEANINGS


def arms(config: Config) -> tuple[str, ...]:
    """Names of the arms."""
    return arms_of_config.arms(config)


def stages(config: Config, arm: str) -> list[Stage]:
    """Trajectories, then what an arm trains, where it does, and measures."""
    own = of_arm(config, arm)
    plain = to_plain(own)
    of_an_arm = pde_solvers.OF_AN_ARM
    made = {k: v for k, v in plain["data"].items() if k not in of_an_arm}
    method = {"method": plain["method"]}
    method["data"] = {k: plain["data"][k] for k in of_an_arm}
    if pde_solvers.solver_of(pde_solvers.method_of(own)) is not None:
        method["coarse"] = plain["coarse"]
    learned = {k: plain[k] for k in ("model", "optimizer", "train")}
    learned["recipe"] = plain["precision"]["train"]
    found = [
        Stage(
            name="trajectories",
            run=functools.partial(pde_solvers.solve, own),
            config=made,
            seeded=False,
        )
    ]
    if pde_solvers.is_trained(own):
        found.append(
            Stage(
                name="train",
                run=functools.partial(pde_solvers.train_solver, own),
                config=method | learned,
                parents=("trajectories",),
            )
        )
    judged = plain["evaluate"] | {"recipe": plain["precision"]["rollout"]}
    return [
        *found,
        Stage(
            name="evaluate",
            run=functools.partial(pde_measures.evaluate, own),
            config=judged | method,
            parents=tuple(stage.name for stage in found),
        ),
    ]


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    return pde_measures.measures(of_arm(config, arm))


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row an arm."""
    columns = ("high_correlation_horizon", "validation_horizon", "one_step_mse")
    columns = (*columns, "error_low", "error_high", "reliability", "calls")
    columns = (*columns, "seconds_per_time")
    return [
        {"arm": arm} | {c.replace("_", " "): found.get(f"{arm}/{c}") for c in columns}
        for arm in arms(config)
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Times and errors, an arm a row; both against what they cost; curves of arms."""
    title, figures = "Solvers of Kuramoto-Sivashinsky", []
    horizon = f"time until the correlation is below {config.evaluate.threshold:g}"
    for what, label in (
        ("high_correlation_horizon", horizon),
        ("error_high", "relative one-step error at high wavenumbers"),
    ):
        rows = {arm: {what: f"{arm}/{what}"} for arm in arms(config)}
        figures += side_by_side(found, rows, folder / f"{what}.png", title, label)
    seconds, times = "{}/seconds_per_time", "{}/high_correlation_horizon"
    pairs = {
        arm: (found[seconds.format(arm)], found[times.format(arm)])
        for arm in arms(config)
        if found.keys() >= {seconds.format(arm), times.format(arm)}
    }
    if pairs:
        label = f"seconds a unit of time, {config.data.test_count} trajectories"
        path = point_plot(pairs, folder / "cost.png", title, label, horizon)
        figures.append(("Accuracy against cost, an arm a point", path))
    return figures + _curves(config, found, folder, title)


def _curves(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path, title: str
) -> list[tuple[str, pathlib.Path | None]]:
    """Errors against the time of a rollout, and spectra beside that of the truth."""
    given, figures = config.evaluate, []
    for what, axis, name, labels in (
        ("error", given.horizons, pde_measures.at_time, ("time", "relative error")),
        ("power", given.waves, pde_measures.at_waves, ("waves", "mean square")),
    ):

        def curve(arm: str, what: str, axis: Any = axis, name: Any = name) -> Any:
            return np.array(axis), [found.get(f"{arm}/{name(x, what)}") for x in axis]

        lines = {arm: curve(arm, what) for arm in arms(config)}
        if what == "power":
            lines = {"truth": curve(arms(config)[0], "true_power")} | lines
        lines = {arm: line for arm, line in lines.items() if None not in line[1]}
        if lines:
            path = folder / f"{what}.png"
            path = line_plot(lines, path, title, *labels, log_y=True)
            figures.append((MEANINGS[what].capitalize(), path))
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
        if not pde_solvers.is_trained(own):
            pde_solvers.check_data(own)
            found[f"{arm}/parameters"] = 0
            continue
        # what an arm's program is made of; the rest of a method changes numbers alone
        method = pde_solvers.method_of(own)
        kind = type(method), pde_solvers.channels(own)
        step, shapes, _ = pde_solvers.update(own)
        corrects = pde_solvers.solver_of(method) is not None
        kind = (*kind, corrects, own.model.to_json(), str(shapes[1]))
        if kind not in traced:
            state, _ = jax.eval_shape(step, *shapes)
            traced[kind] = trees.count(state.params)
        found[f"{arm}/parameters"] = traced[kind]
    data = config.data
    size = data.train_count * data.frames * data.points * 4 / 1e9
    return found | {"training data, GB": size, "updates": config.train.steps}


def updates(config: Config) -> dict[str, Update]:
    """The update of each arm that is trained."""
    owns = {arm: of_arm(config, arm) for arm in arms(config)}
    trained = {arm: own for arm, own in owns.items() if pde_solvers.is_trained(own)}
    return {arm: pde_solvers.update(own) for arm, own in trained.items()}
