"""A cached stage that several experiments share: the net that names a Frechet distance.

A small classifier learns the real images; its penultimate layer gives the features,
its logits tell which class a generated image shows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tmdjax import data, metrics, models, train
from tmdjax.core.types import Params
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.config import to_plain

Config = Any


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


def stage(config: Config) -> Stage:
    """The stage 'features'; equal data and settings give one net for all seeds."""
    plain = to_plain(config)
    return Stage(
        name="features",
        run=functools.partial(_train, config),
        config={"data": plain["data"], "features": plain["features"]},
        seeded=False,
    )


def networks(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Jitted ``features(params, images)`` and ``logits(params, images)``."""
    apply_fn = models.functional(_module(config))
    return jax.jit(functools.partial(apply_fn, method="features")), jax.jit(apply_fn)


def _module(config: Config) -> Any:
    return models.build(
        {
            "name": "classifier",
            "num_classes": config.data.num_classes,
            "width": config.features.width,
            "feature_dim": config.features.feature_dim,
        }
    )


def _train(config: Config, context: StageContext) -> StageResult:
    dataset = load_data(config)
    settings = config.features
    module = _module(config)
    apply_fn = models.functional(module)
    params = models.init_params(module, context.key, dataset.train["image"][:1])

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
