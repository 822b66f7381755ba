"""How generation and training take turns or overlap, and what that saves: no learning.

An arm is a schedule. Responses have lengths and no content, and all work takes what a
small decoder was measured to take on this machine ('calibrate', once for all arms), on
a virtual clock ('simulate'). Each arm runs through the cases of the config: tails of
the lengths, and costs of decoding that go with occupied slots not at all, or wholly,
beside the measured ones. Under one seed a request has the same length in all
arms; each arm is set beside its baseline ('compare').
"""

import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import language_tasks as tasks
from experiments import simulated_runs, work_rates
from experiments.arms import arms, baseline_stages, of_arm, tuples
from experiments.figures import side_by_side
from experiments.work_rates import Rates
from tmdjax import runtime
from tmdjax.core import trees
from tmdjax.core.checks import check_choice
from tmdjax.harness import Report, Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.harness.plots import line_plot

Config = Any
CURVES = {"score": "mean score of rollouts"}
COMPARED = {
    "speedup": "simulated hours of the baseline, over those of the arm",
    "rollout_gain": "tokens trained on a second of rollout, over those of the baseline",
}
MEANINGS = {
    **simulated_runs.MEASURES,
    **COMPARED,
    **work_rates.MEANINGS,
    "events_rate": "steps of workers simulated a second of this machine",
}
SHOWN = ("hours", "speedup", "rollout_gain", "off_policy", "length_ratio")
SHOWN += ("generate_busy", "train_busy")


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    given = to_plain(of_arm(config, arm))
    baseline, is_measured = given["compare"]["baseline"], given["costs"]["measured"]
    own = [
        Stage(
            name="calibrate",
            run=functools.partial(work_rates.calibrate, given),
            config={k: given[k] for k in ("model", "precision", "engine", "calibrate")},
            seeded=False,
        ),
        Stage(
            name="simulate",
            run=functools.partial(simulate, given),
            config={k: given[k] for k in ("schedule", "devices", "workload", "costs")}
            | {"cases": cases_of(given), "engine": given["engine"]},
            parents=("calibrate",) if is_measured else (),
        ),
    ]
    other, source = baseline_stages(arm, baseline, stages, config, "simulate")
    compared = Stage(
        name="compare",
        run=functools.partial(compare, given, source),
        config={"cases": given["workload"]["cases"]},
        parents=tuple(dict.fromkeys(("simulate", source))),
    )
    return [*own, *other, compared]


def cases_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The cases that an arm runs through, by name.

    Raises:
        ValueError: an unknown one.
    """
    for name in given["workload"]["cases"]:
        check_choice("workload.cases", name, given["cases"])
    return {name: given["cases"][name] for name in given["workload"]["cases"]}


def schedule_of(given: Mapping[str, Any]) -> tuple[runtime.Schedule, bool]:
    """The schedule of an arm, and whether its generators are interruptible.

    Raises:
        TypeError, ValueError: settings that are none of a schedule, or out of range.
    """
    own, load = tuples(given["schedule"]), given["workload"]
    interruptible = own.pop("interruptible", True)
    schedule = simulated_runs.schedule_of(
        **own,
        batch=load["batch"],
        samples=load["samples"],
        updates=load["updates"],
        max_new_tokens=load["longest"],
        slots=given["engine"]["slots"],
    )
    return schedule, interruptible


def rates_of(given: Mapping[str, Any], measured: Mapping[str, Any], case: Any) -> Rates:
    """What work takes in a case: as measured, or as the config says, but for its own.

    Raises:
        ValueError: a number out of range.
    """
    costs, load = dict(given["costs"]), given["workload"]
    if costs.pop("measured"):
        costs = {name: float(measured[name]) for name in costs}
    own = {name: case[name] for name in costs if case.get(name) is not None}
    rates = Rates(**costs | own)
    if case["rollout_share"] is None:
        return rates
    return rates.with_rollout_share(
        case["rollout_share"],
        slots=given["engine"]["slots"],
        prompt=load["prompt"],
        response=load["mean"],
    )


def simulate(given: dict[str, Any], context: StageContext) -> StageResult:
    """Runs the schedule through the cases.

    Where costs are measured, what comes out depends on the clock of the machine, and
    stands among the timings.
    """
    load, devices, rates = given["workload"], given["devices"], {}
    schedule, interruptible = schedule_of(given)
    if "calibrate" in context.inputs:
        rates = context.inputs["calibrate"].outputs["rates"]
    found: dict[str, float] = {}
    lags, waits = {}, {}
    count, start = 0, time.perf_counter()
    for name, case in cases_of(given).items():
        run = simulated_runs.simulate(
            schedule,
            rates_of(given, rates, case),
            simulated_runs.lognormal_lengths(
                load["mean"], case["sigma"], load["longest"], context.seed
            ),
            devices=devices["count"],
            train=devices["train"],
            chunk=given["engine"]["chunk"],
            prompt=load["prompt"],
            interruptible=interruptible,
        )
        own = simulated_runs.measured(run)
        found |= {f"{name}.{what}": value for what, value in own.items()}
        lags[name] = simulated_runs.shares_of_lags(run)
        waits[name] = simulated_runs.shares_of_waits(run)
        count += len(run.events)
    timings = {"events_rate": count / (time.perf_counter() - start)}
    outputs = {"lags": lags, "waits": jax.tree.map(np.float64, waits)}
    if rates:
        return StageResult(outputs, {}, timings=found | timings)
    return StageResult(outputs, found, timings=timings)


def compare(given: dict[str, Any], source: str, context: StageContext) -> StageResult:
    """Sets an arm beside its baseline, whose run is the parent ``source``."""
    own, base = (context.inputs[name] for name in ("simulate", source))
    ours, theirs = ({**each.metrics, **each.timings} for each in (own, base))
    found = {}
    for case in given["workload"]["cases"]:
        hours, rollout = f"{case}.hours", f"{case}.rollout"
        found[f"{case}.speedup"] = theirs[hours] / ours[hours]
        found[f"{case}.rollout_gain"] = ours[rollout] / theirs[rollout]
    if given["costs"]["measured"]:
        return StageResult({}, {}, timings=found)
    return StageResult({}, found)


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    names = {*simulated_runs.MEASURES, *COMPARED}
    cases = of_arm(config, arm).workload.cases
    return {f"{case}.{name}" for case in cases for name in names}


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of arms and cases."""
    return [
        {"arm": arm, "case": case}
        | {n: found.get(metric_name(arm, f"{case}.{n}")) for n in SHOWN}
        for arm in arms(config)
        for case in of_arm(config, arm).workload.cases
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Speed-ups, an arm a row; and throughput by the number of devices."""
    scaled = {arm: of_arm(config, arm) for arm in config.one_seed_arms}
    rows = {
        arm: {
            case: metric_name(arm, f"{case}.speedup")
            for case in of_arm(config, arm).workload.cases
        }
        for arm in arms(config)
        if arm not in scaled
    }
    path, label = folder / "speedup.png", COMPARED["speedup"]
    figures = side_by_side(found, rows, path, "Schedules", label)
    series: dict[str, list[tuple[int, Any]]] = {}
    for arm, own in scaled.items():
        (case, *_), count = own.workload.cases, own.devices.count
        if (metric := metric_name(arm, f"{case}.rollout")) in found:
            name = arm.removesuffix(f"_{count}")
            series.setdefault(name, []).append((count, found[metric]))
    if series:
        title, label = "Throughput by devices", "tokens trained on a simulated second"
        drawn = {
            name: (np.array([count for count, _ in points]), [y for _, y in points])
            for name, points in series.items()
        }
        path = folder / "devices.png"
        figures.append((title, line_plot(drawn, path, title, "devices", label)))
    return figures


def report(
    config: Config, arm: str, results: Mapping[str, StageResult], folder: pathlib.Path
) -> Report:
    """How old trained tokens are, and why devices wait."""
    if "simulate" not in results:
        return Report()
    found = results["simulate"].outputs
    rows = [
        {"case": case, "role": role, "reason": reason, "share of its time": float(part)}
        for case, by_role in found["waits"].items()
        for role, reasons in by_role.items()
        for reason, part in reasons.items()
    ]
    lags = {case: np.asarray(share) for case, share in found["lags"].items()}
    title = "Age of the tokens trained on"
    path = line_plot(
        {case: (np.arange(len(share)), share) for case, share in lags.items()},
        folder / f"lags-{arm}.png",
        title,
        "updates since their weights",
        "share of tokens",
    )
    return Report([("Why devices wait", rows)], [(title, path)])


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every arm, so that what cannot work is refused."""
    plain = to_plain(config)
    language = tasks.language(plain)
    language.engine(plain["engine"])
    work_rates.learner_of(plain, language)
    shapes = jax.eval_shape(language.parameters, jax.random.key(0))
    rows: dict[str, Any] = {"parameters": trees.count(shapes)}
    for arm in arms(config):
        given = to_plain(of_arm(config, arm))
        check_choice("compare.baseline", given["compare"]["baseline"], arms(config))
        load, (schedule, _) = given["workload"], schedule_of(given)
        for case in cases_of(given).values():
            lengths = load["mean"], case["sigma"], load["longest"]
            simulated_runs.lognormal_lengths(*lengths, seed=0)
            rates_of(given | {"costs": {**given["costs"], "measured": False}}, {}, case)
        sizes = given["devices"]["count"], given["devices"]["train"]
        generate, learn = simulated_runs.roles(schedule, *sizes)
        rows[f"{arm}: devices that generate, that train"] = f"{generate}, {learn}"
        rows[f"{arm}: responses"] = load["updates"] * load["batch"] * load["samples"]
    return rows
