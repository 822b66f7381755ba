"""Samples of video models: how each is drawn and measured, and what it costs."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import video_measures as measuring
from experiments import video_students as students
from experiments import video_tasks as tasks
from tmdjax import flows, models, train
from tmdjax.core import prng
from tmdjax.harness import StageContext, StageResult
from tmdjax.models.videos.flow_maps import GATE_SCALE
from tmdjax.systems import dmd2, meanflow, tmd

Config = Any
SHOWN = 8
REAL = "real."


def ways(config: Config) -> dict[str, str]:
    """How an arm is sampled: words for a reader by the prefix of its metrics.

    The arm's own way comes first and has the prefix ''.
    """
    settings = config.student
    if settings.kind == "teacher":
        own, *others = counts = config.sample.teacher_steps
        if len({*counts}) < len(counts):
            raise ValueError(
                f"sample.teacher_steps={counts} has a number twice; give each once."
            )
        names = {"": own} | {f"steps{k}.": k for k in others}
        return {name: f"{k} step{'s' * (k != 1)}" for name, k in names.items()}
    if settings.kind != "tmd":
        return {"": f"{settings.outer} step{'s' * (settings.outer != 1)}"}
    found = {"": f"{settings.outer} x {settings.inner} steps"}
    if settings.inner > 1:
        found["inner1."] = f"{settings.outer} x 1 steps"
    return found


def pictures(config: Config, shown: Any) -> dict[str, Any]:
    """The videos that :func:`sample` kept of an arm, by words for a reader."""
    titles = ways(config) | {REAL: "real videos"}
    return {
        title: shown[_kept(name)]
        for name, title in titles.items()
        if _kept(name) in shown
    }


def _kept(name: str) -> str:
    """Under what the videos of a way are stored."""
    return name.rstrip(".") or "own"


def samplers(config: Config, params: Any) -> dict[str, tuple[Any, float]]:
    """How an arm is sampled, ``(noise, prompts, keys) -> videos``, and its NFE.

    By name; the arm's own way has the name ''.
    """
    kind, settings = config.student.kind, config.student
    if kind == "teacher":
        velocity = tasks.teacher_velocity(config, params, config.distill.guidance)
        calls = 1 if config.distill.guidance == 1 else 2
        solver = config.sample.teacher_solver

        def walk(steps: int) -> tuple[Any, float]:
            grid = flows.shifted_grid(steps, config.teacher.sample_shift)
            evaluations = flows.nfe(flows.make_table("ode", grid), solver)

            def draw(noise: Any, asked: Any, keys: Any) -> Any:
                return flows.endpoints(velocity, noise, grid, asked, method=solver)

            return draw, float(evaluations * calls)

        return {
            f"steps{k}." if k != config.sample.teacher_steps[0] else "": walk(k)
            for k in config.sample.teacher_steps
        }
    module = models.build(students.student_spec(config, "rollout"))
    apply_fn = tasks.on_prompts(config, module)
    if kind == "tmd":

        def tmd_walk(inner: int) -> Any:
            plan = students.plan_of(config, inner)
            return (
                lambda noise, asked, keys: tmd.sample(
                    apply_fn, params, noise, asked, keys, plan
                ),
                plan.nfe,
            )

        found = {"": tmd_walk(settings.inner)}
        if settings.inner > 1:
            found["inner1."] = tmd_walk(1)
        return found
    rule = meanflow if kind == "meanflow" else dmd2

    def few(noise: Any, asked: Any, keys: Any) -> Any:
        return rule.sample(apply_fn, params, noise, asked, students.times_of(config))

    return {"": (few, float(settings.outer))}


def sample(config: Config, context: StageContext) -> StageResult:
    """Samples every way of an arm, and measures each."""
    params = jax.tree.map(jnp.asarray, students.trained(context.inputs))
    noise, keys = tasks.noise_of(config, context.key)
    asked = jnp.asarray(tasks.prompts(config))
    found: dict[str, float] = {}
    timings: dict[str, float] = {}
    shown: dict[str, Any] = {}
    for name, (draw, nfe) in samplers(config, params).items():
        videos = jax.block_until_ready(draw(noise, asked, keys))
        began = time.perf_counter()
        jax.block_until_ready(draw(noise, asked, keys))
        timings[f"{name}seconds"] = time.perf_counter() - began
        found[f"{name}nfe"] = nfe
        videos = np.asarray(videos)
        measured = measuring.measure(config, videos, np.asarray(asked))
        found |= {f"{name}{what}": value for what, value in measured.items()}
        shown[_kept(name)] = videos[:SHOWN]
    if config.student.kind == "teacher":  # what any distance is at least
        real = measuring.real_videos(config, tasks.prompts(config), draw=1)
        measured = measuring.measure(config, real, np.asarray(asked))
        found |= {f"{REAL}{what}": value for what, value in measured.items()}
        shown[_kept(REAL)] = real[:SHOWN]
    found |= cost(config, params)
    outputs = {"shown": shown, "asked": np.asarray(asked)[:SHOWN]}
    return StageResult(outputs, found, timings=timings)


def cost(config: Config, params: Any) -> dict[str, float]:
    """Operations of a TMD student over those that its NFE says, as their traces say."""
    if config.student.kind != "tmd":
        return {}
    scale = tasks.scale_of(config)
    x = jax.ShapeDtypeStruct((1, *scale.event_shape), jnp.float32)
    asked = jax.ShapeDtypeStruct((1,), jnp.int32)
    keys = jax.eval_shape(lambda: prng.sample_keys(jax.random.key(0), 1))
    module = models.build(students.student_spec(config))
    apply_fn = tasks.on_prompts(config, module)
    plan = students.plan_of(config)
    student = train.count_flops(
        lambda p, x, c, k: tmd.sample(apply_fn, p, x, c, k, plan),
        params,
        x,
        asked,
        keys,
    )
    alone = tasks.on_prompts(config, module.shared)
    whole = train.count_flops(
        lambda p, x, c: alone(p, x, jnp.full(1, 0.5), c), params["shared"], x, asked
    )
    ratio = sum(student.values()) / sum(whole.values())
    found = {"cost": ratio, "cost_over_nfe": ratio / plan.nfe}
    if config.student.fusion == "gated" and hasattr(params["joint"]["gate"], "item"):
        found["gate"] = GATE_SCALE * params["joint"]["gate"].item()
    return found
