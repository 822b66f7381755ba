"""BOSS: step sizes by dynamic programming, then straightening, beside its baselines.

Stages: a teacher is trained (shared with flow_matching, or known in closed form);
grids of all budgets are searched on it; its fine trajectories are kept; from them one
network a budget is straightened and one distilled by reflow; everything is sampled
from the same noise and compared with the teacher's fine samples and held-out data.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import boss_stages, few_step, flow_matching, image_quality
from experiments.arms import arms, of_arm
from tmdjax import flows
from tmdjax.core import trees
from tmdjax.core.checks import check_choice
from tmdjax.harness import Report, Stage, StageResult
from tmdjax.harness.claims import MAIN_ARM, metric_name
from tmdjax.harness.config import to_plain
from tmdjax.harness.plots import line_plot
from tmdjax.systems import boss

Config = Any
SHOWN = ("uniform", "bellman", "polished", "straightened", "distilled")
"""Rows of the table, each at every budget."""

MEANINGS = few_step.MEANINGS | {
    "objective": "sum of local errors along a model's own fine trajectories",
    "chord_error": "what straightening lowers: squared distance between the end of a "
    "step and of the teacher's trajectory, summed over steps and coordinates",
}

SETS = (*SHOWN, "edm", "gaussian", "heun", "midpoint", "reflow")


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    config = of_arm(config, arm)
    plain = to_plain(config)
    budgets = config.search.budgets
    # the last one trained, on the longest grid, is the model of the run
    tuned = ["reflow"] + [f"{s}{k}" for s in ("distill", "straighten") for k in budgets]

    def stage(name: str, run: Any, settings: Any, *parents: str, **more: Any) -> Stage:
        return Stage(
            name=name,
            run=functools.partial(run, config),
            config=settings,
            parents=parents,
            **more,
        )

    def groups(*names: str) -> dict[str, Any]:
        return {name: plain[name] for name in names}

    guided = groups("search") | {"guidance": config.sample.guidance}
    guided["recipe"] = plain["precision"]["rollout"]
    noises = {"noises": config.fine_tune.noises}
    files = image_quality.files(config)
    found = [
        stage("train", few_step.teacher, flow_matching.base_of(plain), files=files),
        stage("search", boss_stages.search, guided, "train"),
        stage("trajectories", boss_stages.trajectories, noises, "train", "search"),
    ]
    for name in tuned:
        tune = boss_stages.straighten
        if not name.startswith("straighten"):
            tune = boss_stages.rectify
        settings = groups("fine_tune")
        found.append(stage(name, tune, settings, "train", "search", "trajectories"))
    parents = ("train", "search", *tuned)
    if few_step.has_images(config):
        label = "frechet" if arm == MAIN_ARM else f"frechet {arm}"
        found.insert(0, image_quality.stage(config, label))
        parents = ("features", *parents)
    return [
        *found,
        stage("sample", boss_stages.sample, groups("sample", "evaluate"), *parents),
    ]


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    straight = boss_stages.straightness_budget(config)
    names = {"search.uniform_cheaper", f"straightened{straight}.chord_error_ratio"}
    names |= {f"{m}{straight}.objective" for m in ("bellman", "straightened")}
    for k in config.search.budgets:
        sets = [m for m in SETS if k % 2 == 0 or m not in ("heun", "midpoint")]
        what = ("terminal_error", "error_to_rk45", *few_step.measures(config))
        names |= {f"{m}{k}.{w}" for m in sets for w in what}
        names.add(f"gaussian{k}.position")
    return names


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table: terminal error / Frechet distance."""
    return few_step.summary_rows(config, found, SHOWN)


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """The curves of the table."""
    return few_step.summary_figures(config, found, folder, SHOWN)


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """Samples side by side, and the grids found."""
    config = of_arm(config, arm)
    shown = few_step.report(config, results, folder, SHOWN)
    if "search" in results:
        index = results["search"].outputs["index"]["bellman"]
        widths = {
            f"K = {k}": (np.arange(k), np.diff(index[str(k)]))
            for k in config.search.budgets
        }
        path = line_plot(
            widths,
            folder / "steps.png",
            title="Bellman-optimal steps",
            x_label="step, from noise to data",
            y_label=f"width, in {config.search.knots}ths of the way",
        )
        shown.figures.append(("Widths of the steps", path))
    return shown


def describe(config: Config) -> dict[str, Any]:
    """Sizes of the networks and of the search, nothing allocated."""
    settings, tuned = config.search, config.fine_tune
    check_choice("fine_tune.weight", tuned.weight, boss.WEIGHTS)
    for budget in settings.budgets:
        flows.check_budget(budget, settings.knots)
    if list(settings.budgets) != sorted(set(settings.budgets)):
        raise ValueError(f"search.budgets={settings.budgets} must increase.")
    held_out = int(tuned.eval_fraction * tuned.noises)
    if held_out < 1:
        raise ValueError(
            f"fine_tune.eval_fraction={tuned.eval_fraction} of {tuned.noises} noises "
            f"holds out nothing; raise it."
        )
    if tuned.batch_size > tuned.noises - held_out:
        raise ValueError(
            f"fine_tune.batch_size={tuned.batch_size}, but {tuned.noises - held_out} "
            f"of fine_tune.noises={tuned.noises} are left to train on; draw more."
        )
    found: dict[str, Any] = {}
    for arm in arms(config):
        one = of_arm(config, arm)
        image_quality.check_sizes(one)
        shape = tuple(one.data.shape)
        each = flows.cost_memory(shape, settings.knots) / 1e9
        batch = min(settings.samples, int(settings.memory_limit_gb // each))
        if not batch:
            raise ValueError(
                f"one trajectory of {settings.knots} knots takes {each:.2g} GB, more "
                f"than search.memory_limit_gb={settings.memory_limit_gb}; raise it or "
                f"take fewer knots."
            )
        kept = 4e-9 * tuned.noises * (sum(settings.budgets) + 2) * np.prod(shape)
        sizes = {
            "parameters": trees.count(
                jax.eval_shape(few_step.network(one)[1], jax.random.key(0))
            ),
            **(
                flow_matching.describe_training(one) if few_step.has_images(one) else {}
            ),
            "evaluations of one search": settings.samples * settings.knots,
            "search: trajectories at a time": batch,
            "search, GB": batch * each,
            "kept states, GB (at most)": kept,
            "fine-tuning updates": tuned.steps * (2 * len(settings.budgets) + 1),
        }
        found |= {metric_name(arm, name): value for name, value in sizes.items()}
    return found
