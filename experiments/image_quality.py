"""Shared by image experiments: the data, and how near generated images come to it.

A small classifier learns the real images in a cached stage; its penultimate layer
names the Frechet distance, its logits tell which class a generated image shows.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.supervised import Supervised
from tmdjax import data, metrics, models, train
from tmdjax.core.types import Params
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.config import to_plain

Config = Any
MEASURES = {
    "sliced_wasserstein": "distance to held-out data, in units of the data (pixels in "
    "[-1, 1]), averaged over random directions; 0 is equal, less is better",
    "frechet": "Frechet distance to held-out data; of images in the features of a "
    "classifier trained on them, comparable only under one net; less is better",
    "precision": "share of generated images that lie among real ones, in [0, 1]",
    "recall": "share of real images that lie among generated ones, in [0, 1]",
    "label_agreement": "share of images that the classifier gives the class that was "
    "asked for, in [0, 1]",
}
"""What :func:`compare` finds of each set, and what it means."""


def check_sizes(config: Config) -> None:
    """Refuses images of another size or more of them than the data set is asked for."""
    options, shape = config.data.options, tuple(config.data.shape)
    size = options.get("size")
    if size is not None and shape[:2] != (size, size):
        raise ValueError(
            f"data.options.size={size}, but data.shape={shape}; both say how large the "
            f"images are: change them together."
        )
    for group, name, made in (
        ("sample", "count", "test_count"),
        ("train", "batch_size", "train_count"),
        ("features", "batch_size", "train_count"),
    ):
        if config[group][name] > options.get(made, config[group][name]):
            raise ValueError(
                f"{group}.{name}={config[group][name]}, but data.options.{made}="
                f"{options[made]}; ask for at most as many."
            )


def load_data(config: Config) -> data.Dataset:
    """The data set, checked against what the config announces and asks for."""
    dataset = data.load(config.data.name, **to_plain(config.data.options))
    found = (*dataset.train["image"].shape[1:], dataset.num_classes)
    announced = (*config.data.shape, config.data.num_classes)
    if found != announced:
        raise ValueError(
            f"data.shape and data.num_classes announce {announced}, but "
            f"{config.data.name} has {found}; mend the config."
        )
    held_out = len(dataset.test["label"])
    if config.sample.count > held_out:
        raise ValueError(
            f"sample.count={config.sample.count}, but {config.data.name} holds out "
            f"{held_out} images to compare with; ask for at most as many."
        )
    return dataset


def files(config: Config) -> tuple[pathlib.Path, ...]:
    """What a stage that reads the data depends on, besides the config."""
    if config.data.name not in data.SOURCES:  # sizes need none; loading refuses it
        return ()
    return data.files_of(config.data.name, **to_plain(config.data.options))


def stage(config: Config, label: str = "frechet") -> Stage:
    """The stage 'features'; equal data and settings give one net for all seeds.

    Args:
        config: of the experiment.
        label: under which a record names the net; arms with nets of their own differ.
    """
    plain = to_plain(config)
    return Stage(
        name="features",
        run=functools.partial(_train, config, label),
        config={"data": plain["data"], "features": plain["features"]},
        seeded=False,
        files=files(config),
    )


def compare(
    config: Config,
    context: StageContext,
    sets: Iterable[tuple[str, Any]],
    labels: Any,
) -> dict[str, float]:
    """Distances of image sets to held-out images, and of real ones ('real').

    Args:
        config: of the experiment.
        context: of a stage whose parents include 'features'.
        sets: (name, images [n, height, width, channel]), each used once.
        labels: classes asked for, [n].

    Returns:
        'NAME.WHAT' for every set, and for real images, and WHAT in ``MEASURES``.
    """
    dataset, labels = load_data(config), np.asarray(labels)
    apply_fn = models.functional(_module(config))
    params = context.inputs["features"].outputs["params"]
    features = jax.jit(functools.partial(apply_fn, method="features"))
    logits = jax.jit(apply_fn)
    held_out = dataset.test["image"][: len(labels)]
    real = dataset.train["image"][same_classes(dataset.train["label"], labels)]
    held_out_features = np.asarray(features(params, held_out))
    reference = metrics.gaussian_statistics(held_out_features)
    found = {}
    for name, images in itertools.chain(sets, [("real", real)]):
        found[f"{name}.sliced_wasserstein"] = metrics.sliced_wasserstein(
            images, held_out, projections=config.evaluate.projections
        )
        generated = np.asarray(features(params, images))
        found[f"{name}.frechet"] = metrics.frechet_distance(generated, reference)
        precision, recall = metrics.precision_recall(generated, held_out_features)
        found[f"{name}.precision"], found[f"{name}.recall"] = precision, recall
        agree = np.argmax(logits(params, images), -1) == labels
        found[f"{name}.label_agreement"] = float(np.mean(agree))
    return found


def same_classes(available: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows of `available` labels that show the `wanted` classes, in random order.

    A class with too few rows repeats them.
    """
    order = np.random.default_rng(0).permutation(len(available))
    chosen = np.empty(len(wanted), int)
    for label in np.unique(wanted):
        rows = order[available[order] == label]
        places = np.flatnonzero(wanted == label)
        chosen[places] = np.resize(rows, len(places))
    return chosen


def _module(config: Config) -> Any:
    return models.build(
        {
            "name": "classifier",
            "num_classes": config.data.num_classes,
            "width": config.features.width,
            "feature_dim": config.features.feature_dim,
        }
    )


def _train(config: Config, label: str, context: StageContext) -> StageResult:
    dataset = load_data(config)
    settings = config.features
    module = _module(config)
    apply_fn = models.functional(module)

    def loss(params: Params, batch: Any, keys: Any) -> Any:
        del keys
        logits = apply_fn(params, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = jnp.argmax(logits, -1) == batch["label"]
        return losses, {"accuracy": right.astype(jnp.float32)}

    rule = train.make_optimizer(
        train.OptimizerConfig(
            learning_rate=settings.learning_rate,
            schedule="cosine",
            total_steps=settings.steps,
        )
    )
    image = dataset.train["image"][:1]
    found = Supervised(
        init=lambda key: models.init_params(module, key, image),
        loss=loss,
        optimizer=rule,
    )
    state = found.fit(context, dataset.train, settings)
    logits = jax.jit(apply_fn)(state.params, dataset.test["image"])
    accuracy = np.mean(np.argmax(logits, -1) == dataset.test["label"])
    return StageResult(
        {"params": state.params},
        {"feature_net.accuracy": accuracy},
        labels={label: metrics.frechet_label(config.data.name, state.params)},
    )
