"""Shared by few-step experiments: teachers, their data, and how samples compare.

A teacher is a network trained on images, or the exact flow of a Gaussian mixture plus
a small network that starts at no correction: then everything runs in seconds, and the
teacher has no error of its own.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flow_matching, image_quality
from experiments.arms import arms
from tmdjax import data, flows, metrics, models, train
from tmdjax.core import prng
from tmdjax.harness import Report, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import image_grid
from tmdjax.harness.plots import line_plot
from tmdjax.harness.report import format_value
from tmdjax.models import lora

Config = Any

POINT_MEASURES = ("sliced_wasserstein", "frechet")
MEANINGS = {
    "grid or model": "one a row; a cell is its terminal error / Frechet distance",
    **image_quality.MEASURES,
    "terminal_error": "mean squared distance of samples to those of the teacher's fine "
    "walk from the same noise, a coordinate; 0 is equal",
    "error_to_rk45": "the same distance to an adaptive solution of the teacher's flow",
}
MICRO_BATCH = 1000
"""Samples walked at a time."""


def has_images(config: Config) -> bool:
    """Whether samples are images (else points)."""
    return len(config.data.shape) == 3


def load(config: Config) -> data.Dataset:
    """The data set of the config."""
    if has_images(config):
        return image_quality.load_data(config)
    return data.load(config.data.name, **to_plain(config.data.options))


def network(config: Config, when: str = "train") -> tuple[Any, Any]:
    """``apply_fn(params, x, t, cond)`` in training or 'rollout', and ``init(key)``."""
    spec = flow_matching.model_spec(config, when)
    if not has_images(config):
        del spec["num_classes"]
    module = models.build(spec)
    apply_fn = models.functional(module)
    x, t = jnp.zeros((1, *config.data.shape)), jnp.zeros(1)
    if has_images(config):
        return apply_fn, lambda key: models.init_params(
            module, key, x, t, jnp.zeros(1, jnp.int32)
        )

    def no_correction(key: Any) -> Any:
        params = models.init_params(module, key, x, t, None)
        return {**params, "out": jax.tree.map(jnp.zeros_like, params["out"])}

    return functools.partial(_corrected, apply_fn), no_correction


_EXACT = flows.gaussian_mixture(**data.MIXTURE)


def _corrected(apply_fn: Any, params: Any, x: Any, t: Any, cond: Any) -> Any:
    return _EXACT.velocity(x, t) + apply_fn(params, x, t)


def velocity_of(config: Config, params: Any, guided: bool = False) -> Any:
    """The velocity of a network; the teacher's is guided."""
    apply_fn, _ = network(config, "rollout")
    velocity = functools.partial(apply_fn, params)
    scale = config.sample.guidance if guided else 1.0
    return flows.classifier_free_guidance(velocity, scale, config.data.num_classes)


def teacher_evaluations(config: Config) -> int:
    """Network evaluations that one call of the teacher's velocity costs."""
    return 1 if config.sample.guidance == 1.0 else 2


def teacher(config: Config, context: StageContext) -> StageResult:
    """The pretrained model: trained on images, exact on the mixture."""
    if has_images(config):
        return flow_matching.train_flow(config, context)
    _, init = network(config)
    return StageResult({"params": init(context.key)})


def draw(config: Config, key: Any, count: int) -> tuple[Any, Any]:
    """Keys of noise, and classes to condition on (every class alike)."""
    labels = jnp.arange(count, dtype=jnp.int32) % config.data.num_classes
    return prng.sample_keys(key, count), labels


def data_spectrum(config: Config) -> np.ndarray:
    """Standard deviations of the training data along its principal axes."""
    loaded = load(config).train
    x = loaded["image" if has_images(config) else "point"]
    fit = metrics.gaussian_statistics(x.reshape(len(x), -1)[:10_000])
    return np.maximum(np.linalg.svd(fit.factor, compute_uv=False), 1e-3)


def compare(config: Config, context: StageContext, sets: Any, labels: Any) -> Any:
    """Distances to held-out data: of images in a feature net, of points as they are."""
    if has_images(config):
        return image_quality.compare(config, context, sets, labels)
    loaded, found = load(config), {}
    held_out = loaded.test["point"][: len(labels)]
    for name, x in [*sets, ("real", loaded.train["point"][: len(labels)])]:
        found[f"{name}.sliced_wasserstein"] = metrics.sliced_wasserstein(
            x, held_out, projections=config.evaluate.projections
        )
        found[f"{name}.frechet"] = metrics.frechet_distance(x, held_out)
    return found


def measures(config: Config) -> tuple[str, ...]:
    """What :func:`compare` finds of each set."""
    return tuple(image_quality.MEASURES) if has_images(config) else POINT_MEASURES


def _budget(config: Config) -> str:
    """How a budget is called: a guided teacher's step costs two evaluations."""
    return "NFE {}" if teacher_evaluations(config) == 1 else "{} steps"


def summary_rows(
    config: Config, found: Mapping[str, Any], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The table, a row a name: a cell is terminal error / Frechet distance."""
    calls, column = teacher_evaluations(config), _budget(config)
    rows = []
    for arm in arms(config):

        def cell(name: str, arm: str = arm) -> str:
            values = (
                found.get(metric_name(arm, f"{name}.{what}"))
                for what in ("terminal_error", "frechet")
            )
            return " / ".join(format_value(value, 3) for value in values)

        for name in names:
            rows.append(
                {"grid or model": metric_name(arm, name)}
                | {column.format(k): cell(f"{name}{k}") for k in config.search.budgets}
            )
        nfe = format_value(found.get(metric_name(arm, "rk45.nfe")), 3)
        for title, name in (
            (f"RK45, {nfe} NFE", "rk45"),
            (f"fine, {config.search.knots * calls} NFE", "fine"),
            ("real against real", "real"),
        ):
            columns = dict.fromkeys(rows[0])
            first = column.format(config.search.budgets[0])
            rows.append(
                columns | {"grid or model": metric_name(arm, title), first: cell(name)}
            )
    return rows


def summary_figures(
    config: Config,
    found: Mapping[str, Any],
    folder: pathlib.Path,
    names: Sequence[str],
) -> list[tuple[str, pathlib.Path | None]]:
    """Terminal error and Frechet distance against the budget, of all seeds."""
    figures, budgets = [], config.search.budgets
    unit = _budget(config).replace("{}", "").strip()
    for what in ("terminal_error", "frechet"):
        curves = {}
        for arm in arms(config):
            for name in names:
                metrics = [metric_name(arm, f"{name}{k}.{what}") for k in budgets]
                if found.keys() >= {*metrics}:
                    each = (np.array(budgets), [found[m] for m in metrics])
                    curves[metric_name(arm, name)] = each
        label = what.replace("_", " ")
        title = f"{label[0].upper()}{label[1:]} against {unit}"
        path = folder / f"{what}.png"
        if curves:
            path = line_plot(curves, path, title, unit, label, log_y=True)
            figures.append((title, path))
    return figures


def report(
    config: Config,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
    names: Sequence[str],
) -> Report:
    """Images of every grid and model from the same noise."""
    if "sample" not in results:
        return Report()
    images, budgets = results["sample"].outputs["shown"], config.search.budgets
    if images["fine"].ndim != 4:
        return Report()
    k = budgets[len(budgets) // 2 - 1]
    rows = {label: images[label] for label in [f"{name}{k}" for name in names]}
    path = image_grid(rows | {"fine": images["fine"]}, folder / "samples.png")
    title = f"From the same noise, {_budget(config).format(k)}; fine: the teacher's"
    return Report([], [(title, path)])


def tuning(config: Config, context: StageContext) -> dict[str, Any]:
    """What all fine-tuning has in common: steps, batch, optimiser."""
    settings = config.fine_tune
    return {
        "key": context.key,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "optimizer": train.OptimizerConfig(
            name="adam",
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
        ),
        "ema_half_life": settings.ema_half_life,
        "seed": context.seed,
        "fit": functools.partial(context.fit, log_every=settings.log_every),
    }


def tuned_part(config: Config, context: StageContext) -> tuple[Any, Any, Any]:
    """What is trained, its apply_fn, and how whole parameters are made of it."""
    apply_fn, _ = network(config)
    base = jax.tree.map(jnp.asarray, context.inputs["train"].outputs["params"])
    rank = config.fine_tune.lora_rank
    if not rank:
        return base, apply_fn, lambda params: params
    key = jax.random.fold_in(context.key, 2)
    adapters = lora.init(key, base, rank, ["kernel"])
    adapted = lora.apply_fn(apply_fn, base, rank)
    return adapters, adapted, lambda params: lora.merge(base, params, rank)
