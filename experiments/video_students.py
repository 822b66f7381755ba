"""Students of a video model and how they are trained, one function a stage.

A config is that of one arm here, see :func:`experiments.arms.of_arm`: its kind and its
steps stand in 'student'.
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import video_tasks as tasks
from experiments.arms import fields_given
from experiments.supervised import Supervised
from tmdjax import data, flows, models, quant, train
from tmdjax.core import prng
from tmdjax.core.checks import check_choice, check_range
from tmdjax.harness import StageContext, StageResult
from tmdjax.systems import dmd2, meanflow, reflow, tmd

Config = Any
RULES = train.VIDEO_DIT_RULES
KINDS = ("teacher", "tmd", "dmd2", "kstep", "meanflow")
TRAINING = ("teacher", "fit", "pretrain", "distill")
"""Stages that train a network, in the order in which an arm may have them."""


def student_spec(config: Config, when: str = "train") -> dict[str, Any]:
    """The student's network, as it is computed in training or 'rollout'."""
    shared, settings = tasks.network_spec(config, when), config.student
    check_choice("student.kind", settings.kind, KINDS)
    if settings.kind == "meanflow":
        return {"name": "two_time_dit", "shared": shared}
    if settings.kind != "tmd":
        return shared
    return {
        "name": "split_dit",
        "shared": shared,
        "head_blocks": settings.head_blocks,
        "fusion": settings.fusion,
        "initial_gate": settings.initial_gate,
    }


def plan_of(config: Config, inner: int | None = None) -> tmd.StudentPlan:
    """The plan of a TMD student, or the same with other inner steps."""
    settings = config.student
    return tmd.make_plan(
        settings.outer,
        settings.inner if inner is None else inner,
        settings.head_blocks,
        config.model.depth,
        outer_shift=settings.outer_shift,
        inner_shift=settings.inner_shift,
        average=settings.average,
    )


def times_of(config: Config) -> np.ndarray:
    """The outer grid of any student."""
    return flows.truncated_grid(config.student.outer, config.student.outer_shift)


def facts(config: Config) -> dict[str, Any]:
    """What a finished student carries: how it steps, and of what scale it is."""
    steps: dict[str, Any] = {"times": times_of(config).tolist()}
    if config.student.kind == "tmd":
        steps = {"plan": plan_of(config).to_dict()}
    return {**steps, "scale": config.data.scale}


def trained(inputs: Mapping[str, StageResult]) -> Any:
    """Parameters of the last training among these stages."""
    return inputs[max(inputs, key=TRAINING.index)].outputs["params"]


def initial_student(config: Config, context: StageContext) -> tuple[Any, Any, Any]:
    """Network, function and parameters of a student that starts from the teacher."""
    module: Any = models.build(student_spec(config))
    apply_fn = tasks.on_prompts(config, module)
    teacher = context.inputs["teacher"].outputs["params"]
    if config.student.kind in ("dmd2", "kstep"):
        return module, apply_fn, teacher
    times = 2 if config.student.kind == "meanflow" else 1
    params = tasks.initial_params(config, module, context.key, times)
    own: Any = models.build(tasks.network_spec(config))
    return module, apply_fn, models.student_from_teacher(module, params, own, teacher)


def fit_simple(
    config: Config,
    context: StageContext,
    loss: Any,
    params: Any,
    arrays: Any,
    settings: Config,
) -> StageResult:
    """A supervised stage: parameters, averaged, and updates that were skipped."""
    found = Supervised(
        init=lambda key: params,
        loss=loss,
        optimizer=tasks.optimizer(settings, settings.steps),
        ema_decay=settings.ema_decay,
    )
    state = found.fit(context, arrays, settings)
    return StageResult(
        {"params": state.eval_params},
        {f"{context.name}.skipped_updates": state.skipped},
        model=student_spec(config),
        meta=facts(config),
    )


def derivative_function(config: Config) -> Any:
    """The student's network as du/ds is taken of it; None is the network itself.

    In 16 bits attention may be fused, which has no forward mode, and differences drown.
    """
    if quant.as_recipe(config.precision.train).exact:
        return None
    spec = student_spec(config)
    # all scores of Wan's lengths fit no device
    attention = "blocks" if config.data.scale == "latents" else "xla"
    shared = {**spec["shared"], "attention_implementation": attention}
    if config.pretrain.derivative == "difference":
        shared["recipe"] = "fp32"
    return tasks.on_prompts(config, models.build({**spec, "shared": shared}))


def map_config(config: Config) -> flows.FlowMapConfig:
    """Settings of flow-map losses."""
    return flows.FlowMapConfig(**fields_given(config.pretrain, flows.FlowMapConfig))


def pretrain(config: Config, context: StageContext) -> StageResult:
    """Stage 1 of TMD: the head learns to jump along the inner flow."""
    _, apply_fn, params = initial_student(config, context)
    plan, settings = plan_of(config), map_config(config)
    moving = derivative_function(config)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        null = tasks.null_prompt(config)
        return tmd.pretraining_loss(
            params,
            apply_fn,
            batch,
            keys,
            plan,
            settings,
            null,
            derivative_apply_fn=moving,
        )

    rows = tasks.rows(config)
    return fit_simple(config, context, loss, params, rows, config.pretrain)


def fit_meanflow(config: Config, context: StageContext) -> StageResult:
    """MeanFlow from the teacher's weights, on the data."""
    _, apply_fn, params = initial_student(config, context)
    settings, moving = map_config(config), derivative_function(config)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        null = tasks.null_prompt(config)
        return meanflow.meanflow_loss(
            params, apply_fn, batch, keys, settings, null, derivative_apply_fn=moving
        )

    rows = tasks.rows(config)
    return fit_simple(config, context, loss, params, rows, config.pretrain)


def check_settings(config: Config) -> None:
    """Builds what an arm is trained with, so that what cannot work is refused.

    Raises:
        ValueError: a setting out of range, or a batch larger than its data.
    """
    kind, batches = config.student.kind, {}
    if not config.teacher.exact:
        batches["teacher.batch_size"] = config.teacher.batch_size
    if kind in ("tmd", "meanflow"):
        map_config(config)
        batches["pretrain.batch_size"] = config.pretrain.batch_size
    if kind in ("tmd", "dmd2"):
        parts = distillation(config).config.batches
        batches[f"distill.batch_size times {parts}"] = config.distill.batch_size * parts
    if kind != "teacher":
        times_of(config)
    if tasks.has_prompts(config):
        for name, size in batches.items():
            check_range(name, size, 1, config.data.train_count)
    if kind == "kstep" or config.student.warm_up:
        check_range("pairs.batch_size", config.pairs.batch_size, 1, config.pairs.count)


def make_pairs(config: Config, context: StageContext) -> StageResult:
    """Noise, and what the guided teacher makes of it."""
    settings = config.pairs
    velocity = tasks.teacher_velocity(
        config, context.inputs["teacher"].outputs["params"], config.distill.guidance
    )
    asked = jnp.arange(settings.count, dtype=jnp.int32) % tasks.null_prompt(config)
    keys = prng.sample_keys(context.key, settings.count)
    noise = prng.normal(keys, tasks.scale_of(config).event_shape)
    grid = flows.shifted_grid(settings.teacher_steps, config.teacher.sample_shift)
    x = flows.endpoints(velocity, noise, grid, asked, micro_batch=256)
    return StageResult({"x_noise": noise, "x_data": x, "cond": asked})


def fit_pairs(config: Config, context: StageContext) -> StageResult:
    """k-step distillation: the straight line of each pair, at the student's times."""
    if config.student.kind == "dmd2" and config.student.outer > 1:
        warnings.warn(
            f"warm-up on pairs with {config.student.outer} outer steps: with two, the "
            f"paper scores 83.79 with it and 84.39 without (VBench total).",
            UserWarning,
            stacklevel=1,
        )
    _, apply_fn, params = initial_student(config, context)
    times = flows.discrete_time(times_of(config)[:-1])

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        return reflow.pair_loss(params, apply_fn, batch, keys, times)

    pairs = dict(context.inputs["pairs"].outputs)
    return fit_simple(config, context, loss, params, pairs, config.pairs)


def distillation(config: Config) -> train.Distillation:
    """Generator, judges and settings of an arm."""
    apply_fn = tasks.on_prompts(config, models.build(student_spec(config)))
    if config.student.kind == "tmd":
        # without a rollout the head is trained as if it made one step
        plan = plan_of(config, None if config.student.rollout else 1)
        generate = functools.partial(tmd.generate, apply_fn, plan)
    else:
        generate = functools.partial(dmd2.generate, apply_fn, times_of(config))
    return train.Distillation(
        generate,
        tasks.judges(config),
        train.DistillationConfig(
            **fields_given(config.distill, train.DistillationConfig)
        ),
        tasks.null_prompt(config),
    )


def optimizers(config: Config) -> tuple[Any, Any]:
    """Of generator and critic."""
    settings = config.distill
    return (
        tasks.optimizer(settings, settings.cycles, clip_norm=10.0),
        tasks.optimizer(
            settings,
            settings.cycles * settings.critic_updates,
            learning_rate=settings.critic_learning_rate,
        ),
    )


def distill(config: Config, context: StageContext) -> StageResult:
    """Stage 2: distribution matching against the guided teacher."""
    settings = config.distill
    teacher = context.inputs["teacher"].outputs["params"]
    method, optimisers = distillation(config), optimizers(config)
    _, _, params = initial_student(config, context)
    if context.inputs.keys() > {"teacher"}:
        params = trained(context.inputs)
    critic = tasks.first_critic(config, teacher, context.key)
    frozen = tasks.frozen_teacher(config, teacher)
    state = train.create_distillation_state(params, critic, optimisers, ema=True)
    cycle, state, place = train.compile_cycle(
        method,
        optimisers,
        state,
        frozen,
        rules=RULES,
        ema_decay=settings.ema_decay,
        microbatches=settings.microbatches,
    )
    state = context.fit(
        state,
        cycle,
        data.in_memory(
            tasks.rows(config),
            settings.batch_size * method.config.batches,
            seed=context.seed,
        ),
        num_steps=settings.cycles,
        place=place,
        log_every=settings.log_every,
        diagnose=functools.partial(method.report, frozen=frozen),
    )
    return StageResult(
        {"params": state.generator.eval_params},
        {"distill.skipped_updates": state.skipped},
        model=student_spec(config),
        meta=facts(config),
    )
