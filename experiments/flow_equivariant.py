"""World models rolled out far beyond their training, and what their memory is made of.

Stages: test videos are drawn, the same for all seeds and all arms of a world, and the
predictions that need no learning are judged on them; each arm trains its network; it
sees the first frames of the test videos, predicts all that follow, and is judged by
the error at each horizon and on what was out of view.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import arms as arms_of_config
from experiments import world_tasks
from experiments.arms import of_arm
from experiments.figures import side_by_side
from tmdjax import metrics, models
from tmdjax.core import prng, trees
from tmdjax.harness import Report, Stage, StageContext, StageResult, Update
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import animation
from tmdjax.harness.plots import line_plot
from tmdjax.metrics.intervals import Interval
from tmdjax.train import world_models

Config = Any
TRIVIAL = ("zero", "mean", "shifted")
MEANINGS = {
    "mean_late": "mean squared error of the last third of the predicted frames, over "
    "the rollouts that did not break",
    "median_late": "the same, the median over rollouts",
    "mean_early": "mean_late of the first third",
    "growth": "mean_late over mean_early",
    "failed": "share of rollouts with a value that is not finite or above "
    "rollout.state_bound; failed_1_20: before the end of the horizon 1-20",
    "unseen": "mean squared error where the window shows a part of a digit's square "
    "that was out of view in the last frame of the context",
    "trivial_late": "mean_late of the best of zero, mean and shifted",
    "psnr_late": "peak signal-to-noise ratio of the last third in decibels, frames "
    "clipped to [0, 1], the median",
    "ssim_late": "structural similarity of the last third, frames clipped, the median",
    "largest_state": "largest value of the state in the rollouts that did not break",
    "saturated": "share of rollouts whose state reached rollout.state_clip; one that "
    "diverges does not break then, and its error counts",
    "predictor": "an arm, or what needs no learning: zero, black frames; mean, the "
    "mean frame of the context; shifted, its last one, moved against the motion",
}
_COLUMNS = ("mean_late", "median_late", "growth", "failed", "saturated", "unseen")
_SHOWN = 64  # frames of an animation, at most


def arms(config: Config) -> tuple[str, ...]:
    """Names of the arms."""
    return arms_of_config.arms(config)


def stages(config: Config, arm: str) -> list[Stage]:
    """Test videos, then what an arm trains and measures."""
    own = of_arm(config, arm)
    plain = to_plain(own)
    asked = {k: plain["evaluate"][k] for k in ("length", "horizons")}
    made = {k: v for k, v in plain["data"].items() if k != "train_count"}
    groups = ("data", "model", "rollout", "rssm", "optimizer", "train")
    trained = {name: plain[name] for name in groups}
    trained["data"] = {k: v for k, v in plain["data"].items() if k != "test_count"}
    return [
        Stage(
            name="videos",
            run=functools.partial(videos, own),
            config={"data": made, **asked},
            seeded=False,
        ),
        Stage(
            name="train",
            run=functools.partial(world_tasks.train_world_model, own),
            config=trained | {"recipe": plain["precision"]["train"]},
        ),
        Stage(
            name="evaluate",
            run=functools.partial(evaluate, own),
            config=plain["evaluate"] | {"recipe": plain["precision"]["rollout"]},
            parents=("videos", "train"),
        ),
    ]


def videos(config: Config, context: StageContext) -> StageResult:
    """Draws the test videos, and judges the predictions that need no learning."""
    made = world_tasks.evaluation_videos(config)
    predictions, found = world_tasks.trivial(config, made), {}
    for name in TRIVIAL:
        table = judged(config, predictions[name], made)
        kept = {k: v for k, v in table.items() if k in _of_trivial(config)}
        found |= {f"{name}.{k}": v for k, v in kept.items()}
    found["trivial_late"] = min(found[f"{name}.mean_late"] for name in TRIVIAL)
    return StageResult(made, found)


def evaluate(config: Config, context: StageContext) -> StageResult:
    """Rolls the trained model out after the context of each test video."""
    made = context.inputs["videos"].outputs
    apply_fn = models.functional(world_tasks.network_of(config, "rollout"))
    rollout = evaluated(config)

    @jax.jit
    def roll(params: Any, seen: Any, actions: Any, keys: Any) -> Any:
        given = params, apply_fn, seen, actions, rollout
        return world_models.rollout(*given, keys=keys).outputs

    frames, actions = made["frames"], made["actions"]
    keys = prng.sample_keys(context.key, len(frames))
    params = context.inputs["train"].outputs["params"]
    outputs = jax.device_get(roll(params, frames[:, : rollout.context], actions, keys))
    predicted, target = outputs["frame"], frames[:, rollout.context :]
    found = judged(config, predicted, made)
    found |= state_measures(outputs["amplitude"], rollout.state_clip)
    count = config.evaluate.shown
    shown = np.stack([target[:count], np.swapaxes(predicted[:, :count], 0, 1)])
    return StageResult({"shown": shown[:, :, :_SHOWN]}, found)


def evaluated(config: Config) -> world_models.RolloutConfig:
    """How frames are fed back in evaluation: as in training, none of them forced."""
    given = world_tasks.rollout_of(config)
    return dataclasses.replace(given, teacher_forcing=0.0, remat_steps=None)


def judged(
    config: Config, predicted: np.ndarray, made: Mapping[str, Any]
) -> dict[str, float]:
    """What is measured of predictions of the test videos.

    Args:
        config: of an arm.
        predicted: [time, batch, height, width, channel], NaN where a rollout broke.
        made: the test videos.
    """
    target = np.swapaxes(made["frames"][:, config.data.context :], 0, 1)
    square = np.square(predicted - target)
    errors = square.mean((2, 3, 4))
    found = metrics.horizon_errors(errors, world_tasks.spans(config))
    held = np.isfinite(errors).all(0)
    if "unseen" in made:
        found["unseen"] = unseen_error(square[:, held], made["unseen"][held])
    third = max(len(errors) // 3, 1)
    late = np.clip(predicted[-third:, held], 0, 1), target[-third:, held]
    found["psnr_late"] = _median(metrics.psnr(*late))
    if min(target.shape[2:4]) >= 11:
        found["ssim_late"] = _median(metrics.ssim(*late) if held.any() else late[0])
    return found


def state_measures(amplitude: np.ndarray, clip: float | None) -> dict[str, float]:
    """How large states became: [time, batch], NaN where a rollout broke, and a clip."""
    held = np.isfinite(amplitude).all(0)
    found = {"largest_state": float(amplitude[:, held].max(initial=0))}
    if clip is not None:
        found["saturated"] = float((amplitude >= clip).any(0).mean())
    return found


def unseen_error(square: np.ndarray, unseen: np.ndarray) -> float:
    """Mean squared error of the pixels that show what was out of view.

    Args:
        square: squared errors [time, batch, height, width, channel].
        unseen: bool [batch, time, height, width].

    Returns:
        NaN where there is no such pixel.
    """
    where = np.swapaxes(np.asarray(unseen), 0, 1)
    return float(square[where].mean()) if where.any() else float("nan")


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if values.size else float("nan")


def _horizons(config: Config) -> dict[str, int]:
    """The last frame of each horizon, by its name in metrics."""
    return {f"{a + 1}_{b}": b for a, b in world_tasks.spans(config)}


def _of_trivial(config: Config) -> set[str]:
    found = {f"mean_{name}" for name in (*_horizons(config), "early", "late")}
    return found | {"unseen"} if config.data.name == "torus" else found


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    own = of_arm(config, arm)
    nothing = np.zeros((own.evaluate.length, 1))
    found = {*metrics.horizon_errors(nothing, world_tasks.spans(own))}
    found |= {f"{n}.{name}" for n in TRIVIAL for name in _of_trivial(own)}
    found |= {"trivial_late", "psnr_late", "largest_state"}
    found |= {"saturated"} if own.rollout.state_clip is not None else set()
    sides = own.data.window if own.data.name == "torus" else own.data.image_size
    found |= {"ssim_late"} if sides >= 11 else set()
    return found | {"unseen"} if own.data.name == "torus" else found


def _predictors(config: Config) -> dict[str, dict[str, tuple[str, str]]]:
    """(arm, prefix of its metrics) by the name of a predictor, by world in words.

    A world is the name of an arm's data, and what differs from those of the config.
    """
    worlds: dict[str, list[str]] = {}
    for arm in arms(config):
        own, usual = of_arm(config, arm).data, config.data
        changed = {} if own.name != usual.name else own
        words = [f"{k}={v}" for k, v in changed.items() if usual[k] != v]
        worlds.setdefault(", ".join([own.name, *words]), []).append(arm)
    return {
        world: {arm: (arm, "") for arm in names}
        | {name: (names[0], f"{name}.") for name in TRIVIAL}
        for world, names in worlds.items()
    }


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a predictor; those without learning stand below the arms of their world."""
    rows = []
    for world, predictors in _predictors(config).items():
        for name, (arm, prefix) in predictors.items():
            of = f"{arm}/{prefix}"
            row: dict[str, Any] = {"predictor": f"{name}, {world}" if prefix else name}
            for horizon in _horizons(of_arm(config, arm)):
                column = horizon.replace("_", "-")
                row[f"error {column}"] = found.get(f"{of}mean_{horizon}")
            for measure in _COLUMNS:
                row[measure.replace("_", " ")] = found.get(f"{of}{measure}")
            rows.append(row)
    return rows


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Error against horizon, a figure a world; error of what was out of view."""
    figures: list[tuple[str, pathlib.Path | None]] = []
    for world, predictors in _predictors(config).items():
        lines: dict[str, tuple[np.ndarray, list[Interval]]] = {}
        for name, (arm, prefix) in predictors.items():
            ends = _horizons(of_arm(config, arm)).items()
            points = [(b, found.get(f"{arm}/{prefix}mean_{h}")) for h, b in ends]
            kept = [(b, i) for b, i in points if i is not None and np.isfinite(i.value)]
            if kept:
                lines[name] = np.array([b for b, _ in kept]), [i for _, i in kept]
        if lines:
            label = "predicted frame, the last of its horizon"
            path = folder / f"horizon-{world.replace(', ', '-')}.png"
            title, measure = f"World models: {world}", "mean squared error"
            path = line_plot(lines, path, title, label, measure, log_y=True)
            figures.append((f"Error against horizon, {world}", path))
    rows = {arm: {"unseen": f"{arm}/unseen"} for arm in arms(config)}
    label = "mean squared error of what was out of view"
    path = folder / "unseen.png"
    return figures + side_by_side(found, rows, path, "World models", label)


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """The first test videos after their context: truth, and what the arm predicts."""
    if "evaluate" not in results:
        return Report()
    truth, predicted = results["evaluate"].outputs["shown"]
    sides = {"truth": truth, arm: predicted}
    sides = {name: 2 * np.nan_to_num(x, nan=0.0) - 1 for name, x in sides.items()}
    path = animation(sides, folder / "rollouts.gif", scale=max(1, 64 // truth.shape[2]))
    title = "Predicted frames from the first on; broken ones are black"
    return Report([], [(title, path)])


def describe(config: Config) -> dict[str, Any]:
    """Sizes; traces what each arm runs, so that bad settings are refused."""
    found: dict[str, Any] = {}
    for arm in arms(config):
        own = of_arm(config, arm)
        found[f"{arm}/parameters"] = _traced(own)
        found[f"{arm}/updates"] = own.train.steps
    return found


def _traced(config: Config) -> int:
    """How many parameters an arm has, once its programs were traced."""
    world_tasks.spans(config)
    step, shapes, _ = world_tasks.update(config)
    state, _ = jax.eval_shape(step, *shapes)
    apply_fn = models.functional(world_tasks.network_of(config, "rollout"))
    made = world_tasks.shapes(config, 1, config.evaluate.length)
    keys = jax.eval_shape(lambda: prng.sample_keys(jax.random.key(0), 1))

    def roll(params: Any, frames: Any, actions: Any, keys: Any) -> Any:
        given = params, apply_fn, frames, actions, evaluated(config)
        return world_models.rollout(*given, keys=keys).outputs

    jax.eval_shape(roll, state.params, made["frames"], made["actions"], keys)
    return trees.count(state.params)


def updates(config: Config) -> dict[str, Update]:
    """The update of each arm."""
    return {arm: world_tasks.update(of_arm(config, arm)) for arm in arms(config)}
