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
import optax

from tmdjax import data, flows, metrics, models, train
from tmdjax.core import prng, trees
from tmdjax.harness import Report, Stage, StageContext, StageResult
from tmdjax.harness.config import to_plain
from tmdjax.harness.report import image_grid, line_plot

Config = Any


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm (there is only 'main')."""
    plain = to_plain(config)
    dataset = plain["data"]
    return [
        Stage(
            name="features",
            run=functools.partial(train_features, config),
            config={"data": dataset, "features": plain["features"]},
            seeded=False,
        ),
        Stage(
            name="train",
            run=functools.partial(train_flow, config),
            config={k: plain[k] for k in ("data", "model", "optimizer", "train")},
        ),
        Stage(
            name="sample",
            run=functools.partial(sample, config),
            config={"sample": plain["sample"]},
            parents=("train",),
        ),
        Stage(
            name="evaluate",
            run=functools.partial(evaluate, config),
            config={"evaluate": plain["evaluate"]},
            parents=("features", "sample"),
        ),
    ]


def load_data(config: Config) -> data.Dataset:
    """The data set, checked against the shape that the config announces."""
    dataset = data.load(config.data.name, **to_plain(config.data.options))
    found = (*dataset.train["image"].shape[1:], dataset.num_classes)
    announced = (*config.data.shape, config.data.num_classes)
    if found != announced:
        raise ValueError(
            f"data.shape and data.num_classes announce {announced}, but "
            f"{config.data.name} has {found}; mend the config."
        )
    return dataset


def model_spec(config: Config) -> dict[str, Any]:
    """The network's spec, its classes taken from the data."""
    return {**to_plain(config.model), "num_classes": config.data.num_classes}


def feature_spec(config: Config) -> dict[str, Any]:
    """The spec of the network whose features name the Frechet distance."""
    return {
        "name": "classifier",
        "num_classes": config.data.num_classes,
        "width": config.features.width,
        "feature_dim": config.features.feature_dim,
    }


def optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """The optimiser of the config, its schedule ending at `steps`."""
    return train.make_optimizer(
        train.OptimizerConfig(**to_plain(config.optimizer), total_steps=steps)
    )


def train_features(config: Config, context: StageContext) -> StageResult:
    """A classifier of the real images; its penultimate layer gives the features."""
    dataset = load_data(config)
    settings = config.features
    module = models.build(feature_spec(config))
    apply_fn = models.functional(module)
    params = models.init_params(module, context.key, dataset.train["image"][:1])

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        del keys
        logits = apply_fn(params, batch["image"])
        right = jnp.argmax(logits, -1) == batch["label"]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"]
        ), {"accuracy": right.astype(jnp.float32)}

    rule = train.make_optimizer(
        train.OptimizerConfig(
            learning_rate=settings.learning_rate,
            schedule="cosine",
            total_steps=settings.steps,
        )
    )
    state = context.fit(
        train.create_state(params, rule),
        jax.jit(train.make_train_step(loss, rule), donate_argnums=0),
        data.in_memory(dataset.train, settings.batch_size, seed=0),
        num_steps=settings.steps,
    )
    logits = jax.jit(apply_fn)(state.params, dataset.test["image"])
    accuracy = np.mean(np.argmax(logits, -1) == dataset.test["label"])
    return StageResult(
        {"params": state.params},
        {"feature_net.accuracy": accuracy},
        labels={"frechet": metrics.frechet_label(config.data.name, state.params)},
    )


def train_flow(config: Config, context: StageContext) -> StageResult:
    """Trains the velocity network; the result holds its averaged parameters."""
    dataset = load_data(config)
    settings = config.train
    module = models.build(model_spec(config))
    apply_fn = models.functional(module)
    image, label = dataset.train["image"][:1], dataset.train["label"][:1]
    initial = models.init_params(module, context.key, image, np.ones(1), label)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        return flows.flow_matching_loss(
            params,
            apply_fn,
            batch["image"],
            keys,
            batch["label"],
            null_cond=dataset.num_classes,
            drop_rate=settings.drop_rate,
        )

    rule = optimizer(config, settings.steps)
    step = train.make_train_step(
        loss,
        rule,
        ema_decay=settings.ema_decay,
        microbatches=settings.microbatches,
    )
    state = train.create_state(initial, rule, ema=True)
    step, state, place = train.jit_train_step(step, state, train.make_mesh())

    def diagnose(state: Any, batch: Any, key: Any) -> str:
        keys = prng.sample_keys(key, settings.batch_size)
        return train.nonfinite_report(loss, state.params, batch, keys)

    state = context.fit(
        state,
        step,
        data.in_memory(dataset.train, settings.batch_size, seed=context.seed),
        num_steps=settings.steps,
        place=place,
        log_every=settings.log_every,
        diagnose=diagnose,
    )
    return StageResult(
        {"params": state.eval_params, "initial": initial},
        {"parameters": trees.count(initial), "skipped_updates": state.skipped},
        model=model_spec(config),
    )


def sample(config: Config, context: StageContext) -> StageResult:
    """Draws one set a solver and budget, from the same noise and labels."""
    dataset = load_data(config)
    module = models.build(model_spec(config))
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
        for nfe in config.sample[f"{method}_nfe"]:
            if nfe % stages_a_step:
                raise ValueError(
                    f"sample.{method}_nfe has {nfe}, but a {method} step costs "
                    f"{stages_a_step} evaluations; give multiples."
                )
            found.append((f"{method}{nfe}", method, nfe // stages_a_step))
    return found


def evaluate(config: Config, context: StageContext) -> StageResult:
    """Compares every set with held-out images; 'real' is the floor."""
    dataset = load_data(config)
    net = models.functional(models.build(feature_spec(config)))
    params = context.inputs["features"].outputs["params"]
    features = jax.jit(functools.partial(net, method="features"))
    logits = jax.jit(net)
    outputs = context.inputs["sample"].outputs
    labels = np.asarray(outputs["labels"])
    held_out = dataset.test["image"][: len(labels)]
    rows = np.random.default_rng(0).permutation(len(dataset.train["image"]))
    real = dataset.train["image"][rows[: len(labels)]]
    reference = metrics.gaussian_statistics(features(params, held_out))
    found = {}
    for name, images in {**outputs["sets"], "real": real}.items():
        found[f"{name}.sliced_wasserstein"] = metrics.sliced_wasserstein(
            images, held_out, projections=config.evaluate.projections
        )
        found[f"{name}.frechet"] = metrics.frechet_distance(
            features(params, images), reference
        )
        if name != "real":
            said = np.argmax(logits(params, images), -1)
            found[f"{name}.label_agreement"] = np.mean(said == labels)
    return StageResult({}, found)


def quality_rows(config: Config, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """The table quality against NFE."""
    columns = ("sliced_wasserstein", "frechet", "label_agreement")
    solvers: dict[str, tuple[str, int | None]] = {"untrained": ("untrained", None)}
    for name, method, steps in budgets(config):
        solvers[name] = (method, steps * len(flows.METHODS[method][1]))
    solvers["real"] = ("real against real", None)
    return [
        {"solver": solver, "NFE": nfe}
        | {column: found.get(f"{name}.{column}") for column in columns}
        for name, (solver, nfe) in solvers.items()
    ]


def report(
    config: Config, results: dict[str, StageResult], folder: pathlib.Path
) -> Report:
    """Sample grids, and the table if the samples were evaluated."""
    shown = Report([], [])
    if "sample" in results:
        outputs = results["sample"].outputs
        names = ["untrained", *(name for name, _, _ in budgets(config))]
        columns = min(16, len(outputs["labels"]))
        grid = np.concatenate([outputs["sets"][name][:columns] for name in names])
        path = image_grid(
            grid, folder / "samples.png", columns=columns, row_labels=names
        )
        shown.figures.append(("One row a solver and NFE, from the same noise", path))
    if "evaluate" in results:
        found = results["evaluate"].metrics
        shown.tables.append(("Quality against NFE", quality_rows(config, found)))
        euler = config.sample.euler_nfe
        curves = {
            column: (euler, [found[f"euler{nfe}.{column}"] for nfe in euler])
            for column in ("frechet", "sliced_wasserstein")
        }
        path = line_plot(
            curves,
            folder / "quality.png",
            title="Euler on a uniform grid",
            x_label="NFE",
            y_label="distance to held-out images",
            log_y=True,
        )
        shown.figures.append(("Distance against NFE", path))
    return shown


def describe(config: Config) -> dict[str, Any]:
    """Sizes of the network and its training, nothing allocated."""
    module = models.build(model_spec(config))
    image = jax.ShapeDtypeStruct((1, *config.data.shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(
        lambda key: models.init_params(module, key, image, t, label), jax.random.key(0)
    )
    rule = optimizer(config, config.train.steps)
    state = jax.eval_shape(
        lambda params: train.create_state(params, rule, ema=True), params
    )
    batch = (config.train.batch_size, *config.data.shape)
    return {
        "parameters": trees.count(params),
        "train state, GB": trees.nbytes(state) / 1e9,
        "batch, GB": 4 * float(np.prod(batch)) / 1e9,
        "updates": config.train.steps,
        "images seen": config.train.steps * config.train.batch_size,
        "sets sampled": len(budgets(config)) + 1,  # and the untrained one
    }
