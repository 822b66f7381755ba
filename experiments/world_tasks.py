"""World models that an experiment trains: data, network, loss, training, by config.

Each function is given the config of an arm. Videos are drawn from keys: number i of a
split is the same in every arm of the same data. Those of the training are drawn as they
are needed and stored nowhere.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arms import fields_given, tuples
from experiments.curves import seconds_per_step
from experiments.supervised import Supervised
from tmdjax import data, models, quant, train
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice, check_fields
from tmdjax.domains.blocks.videos import BlockWorld, block_videos
from tmdjax.domains.torus.videos import (
    TorusWorld,
    check_covered,
    out_of_view,
    torus_videos,
)
from tmdjax.harness import StageContext, StageResult, Update
from tmdjax.harness.config import config_hash, to_plain
from tmdjax.systems import diffusion_forcing, flow_equivariant, rssm
from tmdjax.train import world_models

Config = Any
WORLDS = {"torus": TorusWorld, "blocks": BlockWorld}
OWN = ("name", "images", "side", "train_count", "test_count")
"""Settings of data that are not of the world."""
SPLITS = {"train": 0, "test": 2}
"""Seeds of the keys of videos."""


def world_of(config: Config, predicted: int) -> TorusWorld | BlockWorld:
    """The world of an arm's videos, with so many frames after the context."""
    check_choice("data.name", config.data.name, WORLDS)
    kind = WORLDS[config.data.name]
    check_fields(kind, [name for name in config.data if name not in OWN])
    return kind(**fields_given(config.data, kind) | {"predicted": predicted})


def network_of(config: Config, when: str = "train") -> Any:
    """The module of an arm, of the sizes of its world, in training or 'rollout'.

    Raises:
        ValueError: a network that the world has no sizes for, or one of other sizes.
    """
    recipe = getattr(quant.Precision(**to_plain(config.precision)), when).name
    world, spec = world_of(config, 1), to_plain(config.model)
    if isinstance(world, TorusWorld):
        seen: dict[str, Any] = {"image_size": world.window}
        maps = {"torus_map": {"world": world.world, "window": world.window}}
    else:
        size = {"image_size": world.image_size}
        seen = size | {"channels": 3, "num_actions": 5}
        of_map = {"world": world.room, "view_degrees": world.view_degrees}
        maps = {"egocentric_map": size | of_map}
    sizes = {**maps, "forcing_dit": seen, "rssm": seen}
    check_choice(f"model.name under data.name={config.data.name}", spec["name"], sizes)
    of_recipe = {} if spec["name"] == "torus_map" else {"recipe": recipe}
    module = models.build({**sizes[spec["name"]], **spec, **of_recipe})
    flow_equivariant.check_world(module, world)
    return module


def rollout_of(config: Config) -> world_models.RolloutConfig:
    """How an arm's frames are seen, predicted and fed back in training."""
    context = config.data.context
    given = tuples(to_plain(config.rollout))
    return world_models.RolloutConfig(context=context, **given)


def horizons_of(config: Config) -> tuple[int, ...]:
    """Predicted frames in training: those of a closed loop grow, others are whole."""
    horizons = tuple(config.train.horizons)
    world_models.growing_horizon(0, horizons)
    grows = config.model.name in ("torus_map", "egocentric_map")
    return horizons if grows else horizons[-1:]


def spans(config: Config) -> list[tuple[int, int]]:
    """(first, one past the last) predicted frame of each horizon that is reported."""
    ends = tuple(config.evaluate.horizons)
    if list(ends) != sorted({*ends}) or ends[-1] > config.evaluate.length:
        raise ValueError(
            f"evaluate.horizons={ends} must rise, and end within evaluate.length="
            f"{config.evaluate.length}."
        )
    return list(zip((0, *ends), ends))


def drawn(
    config: Config, split: str, predicted: int
) -> Callable[[Any], dict[str, np.ndarray]]:
    """``numbers [n] -> videos [n, frame, ...]`` of a split.

    Raises:
        FileNotFoundError: the package of the images is not installed.
        ValueError: images of another size than the config says; where videos are drawn,
            a context that does not show the whole world.
    """
    world, key = world_of(config, predicted), jax.random.key(SPLITS[split])
    given: tuple[Any, ...] = ()
    if isinstance(world, BlockWorld):
        draw = functools.partial(block_videos, world=world)
    else:
        arrays = getattr(data.load(config.data.images), split)
        given = (arrays["image"] + 1) / 2, arrays["label"]
        if given[0].shape[1] != config.data.side:
            raise ValueError(
                f"data.side={config.data.side}, but images of data.images="
                f"{config.data.images!r} have {given[0].shape[1]} pixels a side."
            )
        draw = functools.partial(torus_videos, world=world)
    draw = jax.jit(draw)

    def videos(numbers: Any) -> dict[str, np.ndarray]:
        made = jax.device_get(draw(prng.fold_in(key, numbers), *given))
        if isinstance(world, TorusWorld):
            check_covered(made["covered"], world)
        return made

    return videos


def shapes(config: Config, count: int, predicted: int) -> dict[str, Any]:
    """Shapes of what :func:`drawn` makes; traced, so that bad sizes are refused."""
    world = world_of(config, predicted)
    keys = jax.eval_shape(lambda: prng.sample_keys(jax.random.key(0), count))
    if isinstance(world, BlockWorld):
        return jax.eval_shape(functools.partial(block_videos, world=world), keys)
    side = config.data.side
    images = jax.ShapeDtypeStruct((10, side, side, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((10,), jnp.int32)
    draw = functools.partial(torus_videos, world=world)
    return jax.eval_shape(draw, keys, images, labels)


def evaluation_videos(config: Config) -> dict[str, Any]:
    """The videos that every arm of these data is judged on.

    Returns:
        'frames' and 'actions'; on a torus 'unseen', see
        :func:`tmdjax.domains.torus.videos.out_of_view`.
    """
    length, count = config.evaluate.length, config.data.test_count
    made = drawn(config, "test", length)(np.arange(count))
    found = {name: made[name] for name in ("frames", "actions")}
    world = world_of(config, length)
    if isinstance(world, TorusWorld):
        of_digits = {n: made[n] for n in ("start", "velocity", "actions")}
        of_world = {"side": config.data.side, "world": world}
        follow = jax.jit(functools.partial(out_of_view, **of_world))
        found["unseen"] = jax.device_get(follow(of_digits))
    return found


def trivial(config: Config, videos: dict[str, Any]) -> dict[str, Any]:
    """Predictions of test videos that need no learning, [time, batch, ...] each."""
    world = world_of(config, config.evaluate.length)
    side = world.world if isinstance(world, TorusWorld) else None
    predict = jax.jit(
        functools.partial(
            world_models.trivial_predictions, context=world.context, world=side
        )
    )
    return jax.device_get(predict(videos["frames"], videos["actions"]))


def training(config: Config) -> Supervised:
    """How an arm's network is trained."""
    module = network_of(config)
    apply_fn, loss_fn = models.functional(module), loss_of(config, module)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        return loss_fn(params, apply_fn, batch, keys)

    made = shapes(config, 1, 1)
    frame, action = (
        jnp.zeros((1, *made[n].shape[2:]), made[n].dtype) for n in ("frames", "actions")
    )
    inputs: tuple[Any, ...] = frame, action
    if isinstance(module, models.RSSM):
        inputs = frame, action, prng.sample_keys(jax.random.key(0), 1)
    if isinstance(module, models.ForcingDiT):
        x, done = (
            jnp.broadcast_to(a[:, None], (1, module.frames, *a.shape[1:]))
            for a in (frame, action)
        )
        inputs = x, jnp.ones((1, module.frames)), done
    settings = train.OptimizerConfig(
        **tuples(to_plain(config.optimizer)), total_steps=config.train.steps
    )
    return Supervised(
        init=lambda key: models.init_params(module, key, *inputs),
        loss=loss,
        optimizer=train.make_optimizer(settings),
    )


def loss_of(config: Config, module: Any) -> Callable[..., Any]:
    """``(params, apply_fn, batch, keys) -> (loss [batch], metrics)`` of a network."""
    if isinstance(module, models.ForcingDiT):
        return functools.partial(diffusion_forcing.loss, frames=module.frames)
    if isinstance(module, models.RSSM):
        return functools.partial(rssm.loss, **to_plain(config.rssm))
    return functools.partial(world_models.loss, config=rollout_of(config))


def plan_of(config: Config, seed: int) -> data.BatchPlan:
    """Which videos make which batch of a training."""
    count, size = config.data.train_count, config.train.batch_size
    return data.BatchPlan(count=count, batch_size=size, seed=seed)


def train_world_model(config: Config, context: StageContext) -> StageResult:
    """Trains on videos that are drawn batch by batch, over horizons that grow."""
    horizons = horizons_of(config)
    draw = drawn(config, "train", horizons[-1])

    def gather(numbers: Any) -> dict[str, np.ndarray]:
        made = draw(numbers)
        return {name: made[name] for name in ("frames", "actions")}

    name = config_hash(to_plain(config.data))
    batches = data.Batches(plan_of(config, context.seed), gather, lambda: name)
    steps, seen = config.train.steps, config.data.context
    batches = world_models.GrowingVideos(batches, seen, horizons, steps)
    state = training(config).fit(context, batches, config.train)
    return StageResult(
        {"params": state.eval_params},
        {"parameters": trees.count(state.params), "skipped_updates": state.skipped},
        model=models.spec_of(network_of(config, "rollout")),
        timings={"seconds_per_update": seconds_per_step(context.rows())},
    )


def update(config: Config) -> Update:
    """The update of an arm at its last horizon, and the shapes of its arguments."""
    plan_of(config, 0)
    made = shapes(config, config.train.batch_size, horizons_of(config)[-1])
    batch = {name: made[name] for name in ("frames", "actions")}
    return training(config).update(batch)
