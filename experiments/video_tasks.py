"""Shared by video experiments: moving sprites, their teacher, and how students compare.

Every network is conditioned on the number of a prompt; what it reads are the prompt's
words. The teacher is a trained network, or the exact flow of all videos of a prompt;
then the trained network is only where students start.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import data, flows, metrics, models, train
from tmdjax.core import prng, trees
from tmdjax.data import moving_sprites
from tmdjax.harness import StageContext, StageResult
from tmdjax.harness.config import to_plain
from tmdjax.rewards import moving_sprites as checker

Config = Any
MEASURES = (
    "adherence",
    "colour",
    "shape",
    "motion",
    "sliced_wasserstein",
    "feature_wasserstein",
    "frechet",
    "start_entropy",
)
"""What :func:`measure` finds of a set of videos."""


def scale_of(config: Config) -> moving_sprites.Scale:
    """What the videos may show."""
    return moving_sprites.get_scale(config.data.scale)


@functools.lru_cache(maxsize=2)
def _load(scale: str, levels: int, train_count: int, test_count: int) -> data.Dataset:
    return data.load(
        "moving_sprites",
        scale=scale,
        levels=levels,
        train_count=train_count,
        test_count=test_count,
    )


def load(config: Config) -> data.Dataset:
    """The data set."""
    return _load(**to_plain(config.data))


def rows(config: Config) -> dict[str, np.ndarray]:
    """Training rows as losses want them."""
    loaded = load(config).train
    return {"x_data": loaded["video"], "cond": loaded["prompt"]}


def null_prompt(config: Config) -> Any:
    """The prompt that stands for none."""
    return np.int32(scale_of(config).num_prompts)


def network_spec(config: Config) -> dict[str, Any]:
    """The teacher's network."""
    return {
        "name": "video_dit",
        "out_channels": 3,
        "text_width": moving_sprites.TEXT_WIDTH,
        **to_plain(config.model),
    }


def on_prompts(config: Config, module: Any) -> Any:
    """A network's function, its text given by the number of a prompt.

    The condition is the last input, but for the methods that take none.
    """
    apply_fn, scale = models.functional(module), scale_of(config)

    def on_prompt(params: Any, *inputs: Any, **options: Any) -> Any:
        if options.get("method") != "head":
            text = moving_sprites.text_embedding(inputs[-1], scale)
            inputs = (*inputs[:-1], text)
        return apply_fn(params, *inputs, **options)

    return on_prompt


def initial_params(config: Config, module: Any, key: Any, times: int = 1) -> Any:
    """Parameters of a network of so many times."""
    scale = scale_of(config)
    x = jnp.zeros((1, *scale.event_shape))
    text = jnp.zeros((1, scale.length, moving_sprites.TEXT_WIDTH))
    return models.init_params(module, key, x, *[jnp.zeros(1)] * times, text)


def optimizer(settings: Config, steps: int, **options: Any) -> Any:
    """AdamW as the paper has it, with a schedule."""
    return train.make_optimizer(
        train.OptimizerConfig(
            **{
                "learning_rate": settings.learning_rate,
                "schedule": "cosine",
                "clip_norm": 1.0,
                **options,
            },
            b2=0.99,
            weight_decay=0.01,
            total_steps=steps,
            warmup_steps=steps // 20,
        )
    )


def train_teacher(config: Config, context: StageContext) -> StageResult:
    """Flow matching on the data, conditions dropped at times."""
    settings = config.teacher
    module = models.build(network_spec(config))
    apply_fn = on_prompts(config, module)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        return flows.flow_matching_loss(
            params,
            apply_fn,
            batch["x_data"],
            keys,
            batch["cond"],
            time_sampler=flows.logit_normal_time(settings.time_mean),
            null_cond=null_prompt(config),
            drop_rate=settings.drop_rate,
        )

    rule = optimizer(settings, settings.steps)
    step = train.make_train_step(loss, rule, ema_decay=settings.ema_decay)
    params = initial_params(config, module, context.key)
    state = train.create_state(params, rule, ema=True)
    step, state, place = train.jit_train_step(step, state, train.make_mesh())
    state = context.fit(
        state,
        step,
        data.in_memory(rows(config), settings.batch_size, seed=context.seed),
        num_steps=settings.steps,
        place=place,
        log_every=settings.log_every,
    )
    return StageResult(
        {"params": state.eval_params},
        {"parameters": trees.count(params), "skipped_updates": state.skipped},
        model=network_spec(config),
        meta={"scale": config.data.scale},
    )


def exact_velocity(config: Config) -> Any:
    """The flow to all videos of a prompt, in closed form."""
    return flows.empirical_flow(moving_sprites.bank(scale_of(config)))


def teacher_velocity(config: Config, params: Any, guidance: float) -> Any:
    """The teacher as it is sampled."""
    if config.teacher.exact:
        velocity = exact_velocity(config)
    else:
        module = models.build(network_spec(config))
        velocity = functools.partial(on_prompts(config, module), params)
    return flows.classifier_free_guidance(velocity, guidance, null_prompt(config))


def judges(config: Config, params: Any) -> tuple[train.Networks, Any, Any]:
    """What judges a student: networks, what they hold frozen, and the first critic."""
    settings, key = config.distill, jax.random.key(0)
    module = models.build(network_spec(config))
    apply_fn = on_prompts(config, module)
    taps = models.default_taps(module.depth) if settings.adversarial_weight else ()

    def scorer(params: Any, x: Any, t: Any, cond: Any) -> Any:
        return apply_fn(params, x, t, cond, method="velocity_and_features", taps=taps)

    frozen, teacher = jax.tree.map(jnp.asarray, params), scorer
    if config.teacher.exact:
        frozen = flows.as_pytree(exact_velocity(config))

        def teacher(params: Any, x: Any, t: Any, cond: Any) -> Any:
            return params(x, t, cond), ()

    critic = {"score": jax.tree.map(jnp.asarray, params)}
    if not settings.adversarial_weight:
        return train.Networks(teacher, scorer), frozen, critic
    discriminator = models.VideoDiscriminator(settings.discriminator_width)
    scale = scale_of(config)
    x = jnp.zeros((1, *scale.event_shape))
    cond = jnp.zeros(1, jnp.int32)
    reader, owner = (
        (teacher, frozen)
        if settings.features == "teacher"
        else (scorer, critic["score"])
    )
    shapes = jax.eval_shape(lambda p: reader(p, x, jnp.ones(1), cond)[1], owner)
    example = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    critic["discriminator"] = jax.jit(discriminator.init)(key, example)["params"]
    read = models.functional(discriminator)
    return train.Networks(teacher, scorer, read), frozen, critic


def prompts(config: Config) -> np.ndarray:
    """What is asked for: every prompt equally often."""
    return np.arange(config.sample.count, dtype=np.int32) % null_prompt(config)


def measure(config: Config, videos: Any, asked: Any) -> dict[str, float]:
    """Adherence to the prompts, distances to held-out videos, and diversity."""
    scale, held_out = scale_of(config), load(config).test["video"]
    right = checker.check(videos, asked, scale)
    found = {k: float(np.mean(v)) for k, v in right.items() if k in MEASURES}
    features = metrics.video_features(videos)
    reference = metrics.video_features(held_out)
    distance = functools.partial(
        metrics.sliced_wasserstein, projections=config.sample.projections
    )
    start = checker.recognise(videos, scale)["start"]
    return found | {
        "adherence": float(np.mean(right["all"])),
        "sliced_wasserstein": distance(videos, held_out),
        "feature_wasserstein": distance(features, reference),
        "frechet": metrics.frechet_distance(features, reference),
        "start_entropy": metrics.position_entropy(start, np.asarray(asked)),
    }


def noise_of(config: Config, key: Any) -> tuple[Any, Any]:
    """Starting noise, and keys of whatever else is drawn, one a sample."""
    keys = prng.sample_keys(key, config.sample.count)
    shape = scale_of(config).event_shape
    return prng.normal(keys, shape), prng.fold_in(keys, 1)
