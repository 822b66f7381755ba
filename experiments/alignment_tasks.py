"""What flow models are aligned with: prompts, rewards, and the pretrained base.

shapes    captions of coloured shapes; an exact checker (device).
words     signs that say a word; a real OCR model reads them (host).
mixture   points of a Gaussian mixture whose flow is known exactly: no pretraining.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arms import tuples
from experiments.supervised import Supervised
from tmdjax import data, flows, models, quant, train
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice
from tmdjax.core.types import Array, Params
from tmdjax.data import captioned_shapes, rendered_text
from tmdjax.domains.shapes import captions
from tmdjax.domains.shapes import checks as shapes
from tmdjax.harness import StageContext, StageResult
from tmdjax.harness.config import to_plain
from tmdjax.models import lora
from tmdjax.rewards import ocr
from tmdjax.train import flow_rl

Config = Any
TASKS = ("shapes", "words", "mixture")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task as RL sees it.

    Attributes:
        event_shape: of a sample.
        prompts: {name: [n, ...]} to train on.
        held_out: {name: [n, ...]} that no training has seen.
        reward: of :func:`tmdjax.train.flow_rl.make_iteration`.
        measure: ``(samples, prompts) -> {name: [n]}`` for evaluation, on the host.
        measures: its names; the first is the reward.
    """

    event_shape: tuple[int, ...]
    prompts: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray]
    reward: Any
    measure: Callable[[Any, Any], Mapping[str, np.ndarray]]
    measures: tuple[str, ...]


def measures(config: Config) -> tuple[str, ...]:
    """Names of what a task measures."""
    return {
        "shapes": ("score", "strict"),
        "words": ("score", "exact"),
        "mixture": ("score",),
    }[config.task.name]


def build(config: Config) -> Task:
    """The task of a config, its prompts drawn."""
    kinds = {"shapes": _shapes, "words": _words, "mixture": _mixture}
    check_choice("task.name", config.task.name, kinds)
    return kinds[config.task.name](config)


def _shapes(config: Config) -> Task:
    settings = config.task
    tags, size = tuple(settings.tags), settings.size

    def prompts(count: int, held_out: bool) -> dict[str, np.ndarray]:
        specs = captioned_shapes.prompts(count, tags=tags, size=size, held_out=held_out)
        texts = captions.batch(specs, "W0")
        return {**specs, **captions.tokenise(texts, settings.length)}

    def score(samples: Array, batch: Mapping[str, Array]) -> dict[str, Array]:
        found = shapes.check(samples, batch)
        return {"score": found["score"], "strict": found["strict"]}

    return Task(
        event_shape=(size, size, 3),
        prompts=prompts(settings.prompts, False),
        held_out=prompts(settings.held_out, True),
        reward=lambda samples, batch: score(samples, batch)["score"],
        measure=jax.jit(score),
        measures=measures(config),
    )


def _words(config: Config) -> Task:
    settings = config.task
    reader = ocr.load(threads=1)  # absent, it is refused here

    def prompts(count: int, held_out: bool) -> dict[str, np.ndarray]:
        keys = prng.sample_keys(jax.random.key(int(held_out)), count)
        return rendered_text.encode(rendered_text.sample_words(keys, held_out))

    def reward(images: np.ndarray, rows: list[Any]) -> np.ndarray:
        words = rendered_text.decode(np.stack([row["ids"] for row in rows]))
        return ocr.score(reader(images), words)

    def measure(samples: Any, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        texts = reader(np.asarray(samples))
        words = rendered_text.decode(np.asarray(batch["ids"]))
        return {
            "score": ocr.score(texts, words),
            "exact": ocr.exact(texts, words),
        }

    return Task(
        event_shape=(settings.size, settings.size, 3),
        prompts=prompts(settings.prompts, False),
        held_out=prompts(settings.held_out, True),
        reward=flow_rl.HostReward(fn=reward, timeout=settings.timeout),
        measure=measure,
        measures=measures(config),
    )


_EXACT = flows.gaussian_mixture(**data.MIXTURE)


def _mixture(config: Config) -> Task:
    target = jnp.asarray(data.MIXTURE["means"][0])

    def reward(samples: Array, batch: Any) -> Array:
        return jnp.exp(-jnp.sum(jnp.square(samples - target), axis=-1) / 2)

    def prompts(count: int) -> dict[str, np.ndarray]:
        return {"prompt": np.arange(count, dtype=np.int32)}

    return Task(
        event_shape=(2,),
        prompts=prompts(config.task.prompts),
        held_out=prompts(config.task.held_out),
        reward=reward,
        measure=jax.jit(lambda samples, batch: {"score": reward(samples, batch)}),
        measures=measures(config),
    )


def model_spec(config: Config) -> dict[str, Any]:
    """The network's spec, its vocabulary taken from the task."""
    spec = to_plain(config.model)
    if config.task.name == "shapes":
        spec |= {
            "vocabulary": len(captions.VOCABULARY),
            "max_length": config.task.length,
        }
    elif config.task.name == "words":
        spec |= {
            "vocabulary": len(rendered_text.LETTERS) + 1,
            "max_length": rendered_text.LONGEST,
        }
    return spec


def policy(config: Config, params: Params, key: Any) -> tuple[Params, Any, Any]:
    """What RL trains, its :class:`flow_rl.Policy`, and ``trained -> whole params``.

    The text encoder is frozen; with a rank only adapters of the attention are trained,
    and the base is the reference.
    """
    settings, rank = config.rl, config.rl.lora_rank
    precision = quant.Precision(**to_plain(config.precision))
    module: Any = models.build(model_spec(config))
    exact = config.task.name == "mixture"
    network = module if exact else module.dit_module()
    acting, learning = (
        models.functional(models.with_recipe(network, recipe))
        for recipe in (precision.rollout, precision.train)
    )
    text = models.functional(models.with_recipe(module, precision.train))
    base = params if exact else params["dit"]
    null = (
        None if exact else models.null_condition(module.max_length, module.text_width)
    )
    alpha = 2.0 * rank

    def condition(frozen: Any, batch: Any) -> Any:
        raw = {"ids": batch["ids"], "mask": batch["mask"]}
        return text(frozen, raw, method="encode")

    def whole(trained: Any) -> Any:
        trained = lora.merge(base, trained, alpha) if rank else trained
        return trained if exact else {"encoder": params["encoder"], "dit": trained}

    def base_of(frozen: Any) -> Any:
        return frozen if exact else frozen["dit"]

    def guided(velocity: Any) -> Any:
        if exact:
            return lambda x, t, cond=None: _EXACT.velocity(x, t) + velocity(x, t, None)
        return flows.classifier_free_guidance(
            velocity, settings.guidance, null, freeze_null=True
        )

    def trained_by(apply_fn: Any) -> Any:
        def velocity(trained: Any, frozen: Any) -> Any:
            own = lora.apply_fn(apply_fn, base_of(frozen), alpha) if rank else apply_fn
            return guided(functools.partial(own, trained))

        return velocity

    found = flow_rl.Policy(
        velocity=trained_by(learning),
        reference=lambda frozen: guided(functools.partial(learning, base_of(frozen))),
        condition=(lambda frozen, batch: None) if exact else condition,
        frozen=params,
        rollout_velocity=trained_by(acting),
        precision=precision,
    )
    kernels = ["attention/.*/kernel"]
    first: Any = lora.init(key, base, rank, kernels) if rank else base
    return first, found, whole


def initial(config: Config, key: Any) -> Params:
    """Parameters before any training; traceable."""
    module: Any = models.build(model_spec(config))
    if config.task.name == "mixture":
        point = jnp.zeros((1, 2))
        params = models.init_params(module, key, point, jnp.zeros(1), None)
        params["out"] = jax.tree.map(jnp.zeros_like, params["out"])  # no correction
        return params
    text = jax.tree.map(
        lambda leaf: jnp.asarray(leaf)[None], models.null_condition(module.max_length)
    )
    image = jnp.zeros((1, config.task.size, config.task.size, 3))
    return models.init_params(module, key, image, jnp.zeros(1), text)


def pretraining(config: Config) -> Supervised:
    """Flow matching of the base on images and their texts."""
    module: Any = models.build(model_spec(config))
    apply_fn = models.functional(module)
    settings, null = config.train, models.null_condition(module.max_length)

    def loss(params: Params, batch: Any, keys: Any) -> Any:
        return flows.flow_matching_loss(
            params,
            apply_fn,
            batch["image"],
            keys,
            {"ids": batch["ids"], "mask": batch["mask"]},
            time_sampler=flows.logit_normal_time(),
            null_cond=null,
            drop_rate=settings.drop_rate,
        )

    rule = train.OptimizerConfig(
        **tuples(to_plain(config.optimizer)), total_steps=settings.steps
    )
    return Supervised(
        init=functools.partial(initial, config),
        loss=loss,
        optimizer=train.make_optimizer(rule),
        ema_decay=settings.ema_decay,
    )


def pretrain(config: Config, context: StageContext) -> StageResult:
    """The base: a text-conditioned network trained on images, or nothing to train."""
    if config.task.name == "mixture":
        params = initial(config, context.key)
        return StageResult({"params": params}, {"parameters": trees.count(params)})
    settings = config.task
    options: dict[str, Any] = {"size": settings.size, "test_count": 1}
    if settings.name == "shapes":
        options |= {
            "tags": tuple(settings.tags),
            "wordings": tuple(settings.wordings),
            "length": settings.length,
            "layout": settings.layout,
        }
    source = {"shapes": "captioned_shapes", "words": "rendered_text"}[settings.name]
    loaded = data.load(source, train_count=config.train.images, **options).train
    arrays = {name: loaded[name] for name in ("image", "ids", "mask")}
    state = pretraining(config).fit(context, arrays, config.train)
    found = {"parameters": trees.count(state.params)}
    return StageResult({"params": state.eval_params}, found)
