"""Class-conditional flow matching on images: the base that papers start from.

Stages: a small classifier learns the real images and names the Frechet distance;
a DiT learns their velocity; it is sampled at several budgets (NFE) with each
solver; the samples are compared with held-out images.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import image_quality
from experiments.arms import tuples
from experiments.supervised import Supervised
from tmdjax import flows, models, quant, train
from tmdjax.core import prng, trees
from tmdjax.harness import Report, Stage, StageContext, StageResult, Update
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import image_grid
from tmdjax.harness.plots import line_plot

Config = Any
MEANINGS = image_quality.MEASURES


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm (there is only 'main')."""
    plain = to_plain(config)
    return [
        image_quality.stage(config),
        Stage(
            name="train",
            run=functools.partial(train_flow, config),
            config=base_of(plain),
            files=image_quality.files(config),
        ),
        Stage(
            name="sample",
            run=functools.partial(sample, config),
            config={"sample": plain["sample"], "recipe": plain["precision"]["rollout"]},
            parents=("train",),
        ),
        Stage(
            name="evaluate",
            run=functools.partial(evaluate, config),
            config={"evaluate": plain["evaluate"]},
            parents=("features", "sample"),
            version=2,
        ),
    ]


def base_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Of a plain config: what the training of the network depends on."""
    found = {name: plain[name] for name in ("data", "model", "optimizer", "train")}
    return found | {"recipe": plain["precision"]["train"]}


def model_spec(config: Config, when: str = "train") -> dict[str, Any]:
    """The network's spec in training or 'rollout', its classes taken from the data."""
    recipe = getattr(quant.Precision(**to_plain(config.precision)), when).name
    classes = config.data.num_classes
    return {**to_plain(config.model), "num_classes": classes, "recipe": recipe}


def training(config: Config) -> Supervised:
    """Flow matching of the images, classes dropped at times."""
    module = models.build(model_spec(config))
    apply_fn = models.functional(module)
    classes, settings = config.data.num_classes, config.train

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        return flows.flow_matching_loss(
            params,
            apply_fn,
            batch["image"],
            keys,
            batch["label"],
            null_cond=classes,
            drop_rate=settings.drop_rate,
        )

    image, label = jnp.zeros((1, *config.data.shape)), jnp.zeros(1, jnp.int32)
    return Supervised(
        init=lambda key: models.init_params(module, key, image, jnp.zeros(1), label),
        loss=loss,
        optimizer=train.make_optimizer(
            train.OptimizerConfig(
                **tuples(to_plain(config.optimizer)), total_steps=settings.steps
            )
        ),
        ema_decay=settings.ema_decay,
        microbatches=settings.microbatches,
    )


def train_flow(config: Config, context: StageContext) -> StageResult:
    """Trains the velocity network; the result holds its averaged parameters."""
    dataset, found = image_quality.load_data(config), training(config)
    initial = jax.device_get(found.init(context.key))
    state = found.fit(context, dataset.train, config.train)
    return StageResult(
        {"params": state.eval_params, "initial": initial},
        {"parameters": trees.count(initial), "skipped_updates": state.skipped},
        model=model_spec(config),
    )


def sample(config: Config, context: StageContext) -> StageResult:
    """Draws one set a solver and budget, from the same noise and labels."""
    dataset = image_quality.load_data(config)
    module = models.build(model_spec(config, "rollout"))
    apply_fn = models.functional(module)
    trained = context.inputs["train"].outputs
    labels = jnp.asarray(dataset.test["label"][: config.sample.count])
    keys = prng.sample_keys(context.key, len(labels))

    @functools.partial(jax.jit, static_argnames="method")
    def draw(params: Any, table: flows.CoefficientTable, method: str) -> Any:
        velocity = flows.classifier_free_guidance(
            functools.partial(apply_fn, params),
            config.sample.guidance,
            dataset.num_classes,
        )
        noise = prng.normal(keys, config.data.shape)
        return flows.rollout(
            None, velocity, noise, table, labels, method=method, store=False
        )

    sets = {}
    for name, method, steps in budgets(config):
        table = flows.make_table("ode", flows.uniform_grid(steps))
        sets[name] = draw(trained["params"], table, method)
    table = flows.make_table("ode", flows.uniform_grid(config.sample.euler_nfe[-1]))
    sets["untrained"] = draw(trained["initial"], table, "euler")
    return StageResult({"sets": sets, "labels": labels})


def budgets(config: Config) -> list[tuple[str, str, int]]:
    """(name, method, steps) of every sampled set: 'euler8' costs 8 NFE."""
    found = []
    for method in ("euler", "heun", "midpoint"):
        stages_a_step = len(flows.METHODS[method][1])
        counts = config.sample[f"{method}_nfe"]
        if len({*counts}) < len(counts):
            raise ValueError(
                f"sample.{method}_nfe={counts} has a number twice; give each once."
            )
        for nfe in counts:
            if nfe % stages_a_step:
                raise ValueError(
                    f"sample.{method}_nfe has {nfe}, but a {method} step costs "
                    f"{stages_a_step} evaluation(s); give positive multiples."
                )
            found.append((f"{method}{nfe}", method, nfe // stages_a_step))
    return found


def evaluate(config: Config, context: StageContext) -> StageResult:
    """Compares every set with held-out images; 'real' is the floor."""
    outputs = context.inputs["sample"].outputs
    sets, labels = outputs["sets"].items(), outputs["labels"]
    found = image_quality.compare(config, context, sets, labels)
    return StageResult({}, found)


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    names = ["untrained", "real", *(name for name, _, _ in budgets(config))]
    return {f"{name}.{what}" for name in names for what in image_quality.MEASURES}


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table quality against NFE; 'real against real' is the floor."""
    columns = ("sliced_wasserstein", "frechet", "label_agreement")
    solvers: dict[str, tuple[str, int | None]] = {"untrained": ("untrained", None)}
    for name, method, steps in budgets(config):
        solvers[name] = (method, steps * len(flows.METHODS[method][1]))
    solvers["real"] = ("real against real", None)
    return [
        {"solver": solver, "NFE": nfe}
        | {c.replace("_", " "): found.get(f"{name}.{c}") for c in columns}
        for name, (solver, nfe) in solvers.items()
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Distances against NFE, a line a solver."""
    figures = []
    for what in ("frechet", "sliced_wasserstein"):
        curves = {}
        for method in ("euler", "heun", "midpoint"):
            nfe = config.sample[f"{method}_nfe"]
            names = [f"{method}{n}.{what}" for n in nfe]
            if names and found.keys() >= {*names}:
                curves[method] = (np.array(nfe), [found[name] for name in names])
        label = f"{what.replace('_', ' ')} distance to held-out images"
        path = folder / f"{what}.png"
        if curves:
            path = line_plot(curves, path, "Uniform grids", "NFE", label, log_y=True)
            figures.append((f"{label[0].upper()}{label[1:]} against NFE", path))
    return figures


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """Samples of every solver and budget."""
    shown = Report()
    if "sample" in results:
        outputs = results["sample"].outputs
        names = ["untrained", *(name for name, _, _ in budgets(config))]
        columns = min(16, len(outputs["labels"]))
        rows = {name: outputs["sets"][name][:columns] for name in names}
        path = image_grid(rows, folder / "samples.png")
        shown.figures.append(("One row a solver and NFE, from the same noise", path))
    return shown


def describe(config: Config) -> dict[str, Any]:
    """Sizes of the network and its training, nothing allocated."""
    # and the untrained one
    return {**describe_training(config), "sets sampled": len(budgets(config)) + 1}


def describe_training(config: Config) -> dict[str, Any]:
    """Sizes; traces one update, so settings that cannot work are refused here."""
    image_quality.check_sizes(config)
    step, shapes, _ = updates(config)["update"]
    state, _ = jax.eval_shape(step, *shapes)
    return {
        "parameters": trees.count(state.params),
        "train state, GB": trees.nbytes(state) / 1e9,
        "batch, GB": trees.nbytes(shapes[1]["image"]) / 1e9,
        "updates": config.train.steps,
        "images seen": config.train.steps * config.train.batch_size,
    }


def updates(config: Config) -> dict[str, Update]:
    """The update, the shapes of its arguments, and which it may write over."""
    size = config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *config.data.shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    return {"update": training(config).update(batch)}
