"""Shared by video experiments: moving sprites, their prompts and their teacher.

Every network is conditioned on the number of a prompt; what it reads are the prompt's
words. The teacher is a trained network, or the exact flow of all videos of a prompt;
then the trained network is only where students start.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.supervised import Supervised
from tmdjax import data, flows, models, quant, train
from tmdjax.core import prng, trees
from tmdjax.data import moving_sprites
from tmdjax.domains.sprites import checks as checker
from tmdjax.harness import StageContext, StageResult
from tmdjax.harness.config import to_plain

Config = Any
LATENTS, TEXT = (21, 60, 104, 16), (512, 4096)
"""Shapes of the paper's latents (81 frames of 480 x 832) and text states."""


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
    """The data set.

    Raises:
        ValueError: the latents of the paper, which nobody has published.
    """
    if not has_prompts(config):
        raise ValueError(
            "the paper's latents and text states are not published: this tier is "
            "planned (--dry_run, experiments.plan), not run. Train on your own by "
            "train.Distillation and tmd.generate, see docs/tmd.md."
        )
    return _load(**to_plain(config.data))


def rows(config: Config) -> dict[str, np.ndarray]:
    """Training rows as losses want them."""
    loaded = load(config).train
    return {"x_data": loaded["video"], "cond": loaded["prompt"]}


def null_prompt(config: Config) -> Any:
    """The prompt that stands for none."""
    if not has_prompts(config):
        return np.zeros(TEXT, np.float32)
    return np.int32(scale_of(config).num_prompts)


def has_prompts(config: Config) -> bool:
    """Whether conditions are numbers of prompts (else states of a text encoder)."""
    return config.data.scale != "latents"


def event_shape(config: Config) -> tuple[int, ...]:
    """(frame, height, width, channel) of a video."""
    return scale_of(config).event_shape if has_prompts(config) else LATENTS


def example(config: Config) -> tuple[Any, Any]:
    """Shapes of a video and its text, a batch of one."""
    text = TEXT
    if has_prompts(config):
        text = (scale_of(config).length, moving_sprites.TEXT_WIDTH)
    x = jax.ShapeDtypeStruct((1, *event_shape(config)), jnp.float32)
    return x, jax.ShapeDtypeStruct((1, *text), jnp.float32)


def network_spec(config: Config, when: str = "train") -> dict[str, Any]:
    """The teacher's network, as it is computed in training or 'rollout'."""
    return {
        "name": "video_dit",
        "out_channels": event_shape(config)[-1],
        "text_width": example(config)[1].shape[-1],
        "recipe": getattr(quant.Precision(**to_plain(config.precision)), when).name,
        **to_plain(config.model),
    }


def on_prompts(config: Config, module: Any) -> Any:
    """A network's function, its text given by the number of a prompt.

    The condition is the last input, but for the methods that take none.
    """
    apply_fn = models.functional(module)
    if not has_prompts(config):
        return apply_fn
    scale = scale_of(config)

    def on_prompt(params: Any, *inputs: Any, **options: Any) -> Any:
        if options.get("method") != "head":
            text = moving_sprites.text_embedding(inputs[-1], scale)
            inputs = (*inputs[:-1], text)
        return apply_fn(params, *inputs, **options)

    return on_prompt


def initial_params(config: Config, module: Any, key: Any, times: int = 1) -> Any:
    """Parameters of a network of so many times."""
    x, text = example(config)
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
    """Flow matching on the data, conditions dropped at times.

    Beside the exact teacher it may take no steps: students start from what is drawn.
    """
    settings = config.teacher
    module = models.build(network_spec(config))
    params = initial_params(config, module, context.key)
    model: dict[str, Any] = {"model": network_spec(config)}
    model["meta"] = {"scale": config.data.scale}
    if not settings.steps:
        found = {"parameters": trees.count(params), "skipped_updates": 0.0}
        return StageResult({"params": params}, found, **model)
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

    training = Supervised(
        init=lambda key: params,
        loss=loss,
        optimizer=optimizer(settings, settings.steps),
        ema_decay=settings.ema_decay,
    )
    state = training.fit(context, rows(config), settings)
    found = teacher_adherence(config, state.eval_params)
    if found < settings.gate:
        raise ValueError(
            f"the teacher's videos show what was asked for in {found:.1%} of cases, "
            f"below teacher.gate={settings.gate}: students of it would say little. "
            f"Train longer (teacher.steps), or lower the gate."
        )
    return StageResult(
        {"params": state.eval_params},
        {
            "parameters": trees.count(params),
            "skipped_updates": state.skipped,
            "trained_adherence": found,
        },
        **model,
    )


def teacher_adherence(config: Config, params: Any, steps: int = 50) -> float:
    """Share of the network's guided videos that show what was asked for."""
    module = models.build(network_spec(config))
    velocity = flows.classifier_free_guidance(
        functools.partial(on_prompts(config, module), params),
        config.teacher.guidance,
        null_prompt(config),
    )
    asked = _spread(config, 256, 256)
    keys = prng.sample_keys(jax.random.key(7000), len(asked))
    noise = prng.normal(keys, event_shape(config))
    grid = flows.shifted_grid(steps, config.teacher.sample_shift)
    videos = flows.endpoints(velocity, noise, grid, jnp.asarray(asked))
    right = checker.check(np.asarray(videos), asked, scale_of(config))
    return float(np.mean(right["all"]))


def exact_velocity(config: Config) -> Any:
    """The flow to all videos of a prompt, in closed form."""
    return flows.empirical_flow(moving_sprites.bank(scale_of(config)))


def teacher_velocity(config: Config, params: Any, guidance: float) -> Any:
    """The teacher as it is sampled."""
    if config.teacher.exact:
        velocity = exact_velocity(config)
    else:
        module = models.build(network_spec(config, "rollout"))
        velocity = functools.partial(on_prompts(config, module), params)
    return flows.classifier_free_guidance(velocity, guidance, null_prompt(config))


def judges(config: Config) -> train.Networks:
    """What judges a student."""
    settings = config.distill
    module = models.build(network_spec(config))
    apply_fn = on_prompts(config, module)
    taps = models.default_taps(module.depth) if settings.adversarial_weight else ()

    def scorer(params: Any, x: Any, t: Any, cond: Any) -> Any:
        return apply_fn(params, x, t, cond, method="velocity_and_features", taps=taps)

    def exact(flow: Any, x: Any, t: Any, cond: Any) -> Any:
        return flow(x, t, cond), ()

    read = None
    if settings.adversarial_weight:
        read = models.functional(discriminator(config))
    teacher = exact if config.teacher.exact else scorer
    return train.Networks(teacher, scorer, read)


def frozen_teacher(config: Config, params: Any) -> Any:
    """What the teacher's function takes: its parameters, or all videos."""
    if config.teacher.exact:
        return flows.as_pytree(exact_velocity(config))
    kept = quant.as_recipe(config.precision.train).dtype
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, kept), params)


def discriminator(config: Config) -> models.VideoDiscriminator:
    """What reads features of the critic, or of the teacher."""
    width, recipe = config.distill.discriminator_width, config.precision.train
    return models.VideoDiscriminator(width, recipe)


def first_critic(config: Config, params: Any, key: Any) -> dict[str, Any]:
    """The critic's parameters: the teacher's, and a new discriminator."""
    critic = {"score": jax.tree.map(jnp.asarray, params)}
    settings = config.distill
    if not settings.adversarial_weight:
        return critic
    x, text = example(config)
    module = models.build(network_spec(config))
    features = jax.eval_shape(
        functools.partial(
            models.functional(module),
            method="velocity_and_features",
            taps=models.default_taps(module.depth),
        ),
        params,
        x,
        jnp.ones(1),
        text,
    )[1]
    drawn = models.init_params(discriminator(config), key, features)
    return {**critic, "discriminator": drawn}


def prompts(config: Config) -> np.ndarray:
    """What is asked for: 'sample.per_prompt' videos of each of as many prompts as fit.

    The prompts are chosen at random, the same in every arm and seed.
    """
    settings = config.sample
    return _spread(config, settings.count, settings.count // settings.per_prompt)


def _spread(config: Config, count: int, distinct: int) -> np.ndarray:
    """So many videos of so many prompts."""
    order = np.random.default_rng(0).permutation(int(null_prompt(config)))
    return np.resize(order[: max(1, distinct)].astype(np.int32), count)


def noise_of(config: Config, key: Any) -> tuple[Any, Any]:
    """Starting noise, and keys of whatever else is drawn, one a sample."""
    keys = prng.sample_keys(key, config.sample.count)
    shape = scale_of(config).event_shape
    return prng.normal(keys, shape), prng.fold_in(keys, 1)
