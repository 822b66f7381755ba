"""TMD beside DMD2-v, MeanFlow and k-step distillation, on videos of moving sprites.

An arm is a student (or the teacher itself). Stages: a teacher learns the videos, once
for all seeds; where the method asks for it, its head is pretrained (TM-MF) or pairs of
noise and its samples are made; the student is distilled; its samples are checked
against their prompts and compared with held-out videos.
"""

import functools
import pathlib
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import video_tasks as tasks
from tmdjax import data, flows, models, train
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice, check_count
from tmdjax.harness import Report, Stage, StageContext, StageResult
from tmdjax.harness.config import to_plain
from tmdjax.harness.video_report import animation, video_strips
from tmdjax.rewards.sprite_prompts import prompt_words
from tmdjax.systems import dmd2, meanflow, reflow, tmd

Config = Any
KINDS = ("teacher", "tmd", "dmd2", "kstep", "meanflow")
REPORT_ARMS = True
RULES = train.VIDEO_DIT_RULES
SHOWN = 8
GROUPS = ("student", "pretrain", "distill", "pairs")
"""Groups of settings that an arm may change."""


def arms(config: Config) -> tuple[str, ...]:
    """One arm a student."""
    return tuple(config.arms)


def of_arm(config: Config, arm: str) -> Config:
    """The config with an arm's changes; its kind and steps stand in 'student'."""
    config = config.copy_and_resolve_references()
    given = to_plain(config.arms[arm])
    check_choice(f"arms.{arm}.kind", given.get("kind", "?"), KINDS)
    with config.unlocked():
        for group in GROUPS:
            changes = given.pop(group, {})
            for name in changes:
                if name not in config[group]:
                    raise ValueError(
                        f"arms.{arm}.{group}.{name} changes no setting; {group} has "
                        f"{', '.join(config[group])}."
                    )
            config[group].update(changes)
        config.student.update(given)
    return config


def student_spec(config: Config) -> dict[str, Any]:
    """The student's network."""
    shared, settings = tasks.network_spec(config), config.student
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


def plan_of(config: Config, inner: int | None = None) -> tmd.Plan:
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


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    config = of_arm(config, arm)
    plain, kind = to_plain(config), config.student.kind
    groups = {k: plain[k] for k in ("data", "model", "teacher")}
    found = [
        Stage(
            name="teacher",
            run=functools.partial(tasks.train_teacher, config),
            config={**groups, "teacher": {**groups["teacher"], "exact": None}},
            seeded=False,
        )
    ]

    def add(name: str, run: Any, *parents: str, **settings: Any) -> None:
        run = functools.partial(run, config)
        found.append(Stage(name=name, run=run, config=settings, parents=parents))

    last, student = "teacher", {"student": plain["student"]}
    exact = {"exact": plain["teacher"]["exact"]}
    if kind in ("kstep", "meanflow") or (kind == "dmd2" and config.student.warm_up):
        if kind != "meanflow":
            add("pairs", make_pairs, last, pairs=plain["pairs"], **exact)
            add("fit", fit_pairs, last, "pairs", pairs=plain["pairs"], **student)
        else:
            add("fit", fit_meanflow, last, pretrain=plain["pretrain"], **student)
        last = "fit"
    if kind == "tmd" and config.pretrain.steps:
        add("pretrain", pretrain, last, pretrain=plain["pretrain"], **student)
        last = "pretrain"
    if kind in ("tmd", "dmd2") and config.distill.cycles:
        before = dict.fromkeys(("teacher", last))
        add("distill", distill, *before, distill=plain["distill"], **student, **exact)
        last = "distill"
    parents = dict.fromkeys(("teacher", last))
    add(
        "sample",
        functools.partial(sample, arm=arm),
        *parents,
        sample=plain["sample"],
        **student,
        **exact,
    )
    return found


def initial_student(config: Config, context: StageContext) -> tuple[Any, Any, Any]:
    """Network, function and parameters of a student that starts from the teacher."""
    module = models.build(student_spec(config))
    apply_fn = tasks.on_prompts(config, module)
    teacher = context.inputs["teacher"].outputs["params"]
    if config.student.kind in ("dmd2", "kstep"):
        return module, apply_fn, teacher
    times = 2 if config.student.kind == "meanflow" else 1
    params = tasks.initial_params(config, module, context.key, times)
    return module, apply_fn, {**params, "shared": teacher}


def fit_simple(
    config: Config,
    context: StageContext,
    loss: Any,
    params: Any,
    arrays: Any,
    settings: Config,
) -> StageResult:
    """A supervised stage: parameters, averaged, and updates that were skipped."""
    rule = tasks.optimizer(settings, settings.steps)
    step = train.make_train_step(loss, rule, ema_decay=settings.ema_decay)
    state = train.create_state(params, rule, ema=True)
    step, state, place = train.jit_train_step(step, state, train.make_mesh())
    state = context.fit(
        state,
        step,
        data.in_memory(arrays, settings.batch_size, seed=context.seed),
        num_steps=settings.steps,
        place=place,
        log_every=settings.log_every,
    )
    return StageResult(
        {"params": state.eval_params},
        {f"{context.name}.skipped_updates": state.skipped},
        model=student_spec(config),
    )


def map_config(config: Config) -> flows.FlowMapConfig:
    """Settings of flow-map losses."""
    settings = to_plain(config.pretrain)
    names = (
        "map_rate",
        "guidance",
        "drop_rate",
        "shift",
        "derivative",
        "loss_constant",
    )
    return flows.FlowMapConfig(**{name: settings[name] for name in names})


def pretrain(config: Config, context: StageContext) -> StageResult:
    """Stage 1 of TMD: the head learns to jump along the inner flow."""
    _, apply_fn, params = initial_student(config, context)
    plan, settings = plan_of(config), map_config(config)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        null = tasks.null_prompt(config)
        return tmd.pretraining_loss(params, apply_fn, batch, keys, plan, settings, null)

    rows = tasks.rows(config)
    return fit_simple(config, context, loss, params, rows, config.pretrain)


def fit_meanflow(config: Config, context: StageContext) -> StageResult:
    """MeanFlow from the teacher's weights, on the data."""
    _, apply_fn, params = initial_student(config, context)
    settings = map_config(config)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        null = tasks.null_prompt(config)
        return meanflow.meanflow_loss(params, apply_fn, batch, keys, settings, null)

    rows = tasks.rows(config)
    return fit_simple(config, context, loss, params, rows, config.pretrain)


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
    settings = to_plain(config.distill)
    names = (
        "guidance",
        "critic_updates",
        "shift",
        "normalisation",
        "adversarial_weight",
        "features",
    )
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
        train.DistillationConfig(**{name: settings[name] for name in names}),
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
    for name in ("pretrain", "fit"):
        if name in context.inputs:
            params = context.inputs[name].outputs["params"]
    critic = tasks.first_critic(config, teacher)
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
        diagnose=method.report,
    )
    meta: dict[str, Any] = {"times": times_of(config).tolist()}
    if config.student.kind == "tmd":
        meta = {"plan": plan_of(config).to_dict()}
    return StageResult(
        {"params": state.generator.eval_params},
        {"distill.skipped_updates": state.skipped},
        model=student_spec(config),
        meta={**meta, "scale": config.data.scale},
    )


def samplers(config: Config, params: Mapping[str, Any]) -> dict[str, tuple[Any, float]]:
    """How an arm is sampled, ``(noise, prompts, keys) -> videos``, and its NFE.

    By name; the arm's own way has the name ''.
    """
    kind, settings = config.student.kind, config.student
    if kind == "teacher":
        velocity = tasks.teacher_velocity(
            config, params["teacher"], config.distill.guidance
        )
        calls = 1 if config.distill.guidance == 1 else 2

        def walk(steps: int) -> Any:
            grid = flows.shifted_grid(steps, config.teacher.sample_shift)
            return lambda noise, asked, keys: flows.endpoints(
                velocity, noise, grid, asked
            )

        return {
            f"steps{k}." if k != config.sample.teacher_steps[0] else "": (
                walk(k),
                float(k * calls),
            )
            for k in config.sample.teacher_steps
        }
    apply_fn = tasks.on_prompts(config, models.build(student_spec(config)))
    trained = params[max(params, key=("teacher", "fit", "pretrain", "distill").index)]
    if kind == "tmd":

        def tmd_walk(inner: int) -> Any:
            plan = plan_of(config, inner)
            return (
                lambda noise, asked, keys: tmd.sample(
                    apply_fn, trained, noise, asked, keys, plan
                ),
                plan.nfe,
            )

        found = {"": tmd_walk(settings.inner)}
        if settings.inner > 1:
            found["inner1."] = tmd_walk(1)
        return found
    rule = meanflow if kind == "meanflow" else dmd2

    def few(noise: Any, asked: Any, keys: Any) -> Any:
        return rule.sample(apply_fn, trained, noise, asked, times_of(config))

    return {"": (few, float(settings.outer))}


def sample(config: Config, context: StageContext, arm: str) -> StageResult:
    """Samples every way of an arm, and measures each."""
    params = {
        name: jax.tree.map(jnp.asarray, result.outputs["params"])
        for name, result in context.inputs.items()
    }
    noise, keys = tasks.noise_of(config, context.key)
    asked = jnp.asarray(tasks.prompts(config))
    found: dict[str, float] = {}
    shown: dict[str, Any] = {}
    for name, (draw, nfe) in samplers(config, params).items():
        videos = jax.block_until_ready(draw(noise, asked, keys))
        began = time.perf_counter()
        jax.block_until_ready(draw(noise, asked, keys))
        found[f"{name}seconds"] = time.perf_counter() - began
        found[f"{name}nfe"] = nfe
        videos = np.asarray(videos)
        measured = tasks.measure(config, videos, np.asarray(asked))
        found |= {f"{name}{what}": value for what, value in measured.items()}
        shown[f"videos{len(shown)}"] = videos[:SHOWN]
    found |= cost(config, params)
    return StageResult({"shown": shown}, found, meta={"arm": arm})


def cost(config: Config, params: Mapping[str, Any]) -> dict[str, float]:
    """Operations of a TMD student over those that its NFE says, by the planner."""
    if config.student.kind != "tmd":
        return {}
    scale = tasks.scale_of(config)
    x = jax.ShapeDtypeStruct((1, *scale.event_shape), jnp.float32)
    asked = jax.ShapeDtypeStruct((1,), jnp.int32)
    keys = jax.eval_shape(lambda: prng.sample_keys(jax.random.key(0), 1))
    module = models.build(student_spec(config))
    apply_fn = tasks.on_prompts(config, module)
    last = params[max(params, key=("teacher", "fit", "pretrain", "distill").index)]
    plan = plan_of(config)
    student = train.plan(
        lambda p, x, c, k: tmd.sample(apply_fn, p, x, c, k, plan), last, x, asked, keys
    )
    alone = tasks.on_prompts(config, module.shared)
    whole = train.plan(
        lambda p, x, c: alone(p, x, jnp.full(1, 0.5), c), last["shared"], x, asked
    )
    ratio = sum(student.flops.values()) / sum(whole.flops.values())
    return {"cost": ratio, "cost_over_nfe": ratio / plan.nfe}


def measures(config: Config) -> set[str]:
    """The metrics that claims may be about."""
    found = set()
    for arm in arms(config):
        settings, names = of_arm(config, arm), [""]
        if settings.student.kind == "teacher":
            names += [f"steps{k}." for k in config.sample.teacher_steps[1:]]
        if settings.student.kind == "tmd":
            names += ["inner1."] if settings.student.inner > 1 else []
            found |= {f"{arm}/cost", f"{arm}/cost_over_nfe"}
        what = (*tasks.MEASURES, "seconds", "nfe")
        found |= {f"{arm}/{name}{measure}" for name in names for measure in what}
    return found


def summary_rows(config: Config, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """The table of students, from the metrics of a record."""
    rows = []
    for arm in arms(config):
        for name in ("", *(f"steps{k}." for k in config.sample.teacher_steps[1:])):
            if f"{arm}/{name}nfe" in found:
                rows.append(
                    {"student": f"{arm} {name.rstrip('.')}".strip()}
                    | {
                        what.replace("_", " "): found.get(f"{arm}/{name}{what}")
                        for what in ("nfe", *tasks.MEASURES, "seconds")
                    }
                )
    return rows


def report(
    config: Config, results: dict[str, StageResult], folder: pathlib.Path
) -> Report:
    """Of one arm: its measures, a contact sheet and an animation of its videos."""
    shown = Report([], [])
    if "sample" not in results:
        return shown
    found = results["sample"].metrics
    table = [{"measure": name, "value": value} for name, value in found.items()]
    shown.tables.append((f"{results['sample'].meta['arm']}: samples", table))
    asked = tasks.prompts(config)[:SHOWN]
    scale = tasks.scale_of(config)
    labels = [" ".join(prompt_words(int(p), scale)) for p in asked]
    names = [n.removesuffix("adherence") for n in found if n.endswith("adherence")]
    videos = results["sample"].outputs["shown"]
    blocks = {n or "own steps": videos[f"videos{i}"] for i, n in enumerate(names)}
    arm = results["sample"].meta["arm"]
    path = video_strips(blocks, folder / f"{arm}-frames.png", row_labels=labels)
    title = f"{arm}: frames from left to right; one prompt a row"
    shown.figures.append((title, path))
    path = animation(blocks, folder / f"{arm}-videos.gif", row_labels=labels)
    shown.figures.append((f"{arm}, moving", path))
    return shown


def planned(config: Config) -> dict[str, tuple[Any, tuple[Any, ...], int]]:
    """The updates of the first TMD arm: step, shapes of its arguments, donated ones."""
    arm = next(a for a in arms(config) if config.arms[a].kind == "tmd")
    config = of_arm(config, arm)
    method, rules = distillation(config), optimizers(config)
    module = models.build(student_spec(config))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def initial(key: Any) -> Any:
        params = tasks.initial_params(config, module, key)
        critic = tasks.first_critic(config, params["shared"])
        state = train.create_distillation_state(params, critic, rules, ema=True)
        kept = jnp.bfloat16 if config.model.recipe == "bf16" else jnp.float32
        return state, jax.tree.map(lambda leaf: leaf.astype(kept), params["shared"])

    state, frozen = jax.eval_shape(initial, key)
    if config.teacher.exact:
        frozen = tasks.frozen_teacher(config, None)
    size = config.distill.batch_size
    x, text = tasks.example(config)
    cond = (text.shape[1:], jnp.float32)
    if tasks.has_prompts(config):
        cond = ((), jnp.int32)
    batch = {
        "x_data": jax.ShapeDtypeStruct((size, *x.shape[1:]), jnp.float32),
        "cond": jax.ShapeDtypeStruct((size, *cond[0]), cond[1]),
    }
    steps = train.make_steps(
        method,
        rules,
        ema_decay=config.distill.ema_decay,
        microbatches=config.distill.microbatches,
    )
    return {
        "generator update": (
            steps[0],
            (state.generator, batch, key, state.critic.params, frozen),
            0,
        ),
        "critic update": (
            steps[1],
            (state.critic, batch, key, state.generator.params, frozen),
            0,
        ),
    }


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every arm, so that what cannot work is refused."""
    rows: dict[str, Any] = {}
    for group, name in (
        ("sample", "count"),
        ("distill", "cycles"),
        ("teacher", "steps"),
    ):
        check_count(f"{group}.{name}", config[group][name])
    for arm in arms(config):
        settings = of_arm(config, arm)
        module = models.build(student_spec(settings))
        times = 2 if settings.student.kind == "meanflow" else 1
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(
            functools.partial(tasks.initial_params, settings, module, times=times), key
        )
        rows[f"{arm}: parameters"] = trees.count(params)
        if settings.student.kind == "tmd":
            rows[f"{arm}: effective NFE"] = round(plan_of(settings).nfe, 3)
        if settings.student.kind == "dmd2":
            rows[f"{arm}: NFE"] = settings.student.outer
    return rows | check_memory(config)


def check_memory(config: Config) -> dict[str, Any]:
    """What a device holds on the config's mesh.

    Raises:
        ValueError: it does not fit; the smallest mesh that does is named.
    """
    if not config.mesh:
        return {}
    found: dict[str, Any] = {}
    mesh = train.abstract_mesh(**to_plain(config.mesh))
    for name, (step, shapes, donated) in planned(config).items():
        plan = train.plan(
            step,
            *shapes,
            donate_argnums=donated,
            mesh=mesh,
            rules=RULES,
            device=config.device,
        )
        train.check_fits(plan, config.device)
        found[f"{name}: GB a {config.device}"] = round(plan.total / 1e9, 1)
        flops = sum(plan.flops.values())
        found[f"{name}: PFLOP a {config.device}"] = round(flops / 1e15, 2)
    return found
