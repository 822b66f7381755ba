"""The updates of a student's distillation, and what they take on each device of a mesh.

Nothing is allocated: shapes go through the planner.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import video_students as students
from experiments import video_tasks as tasks
from tmdjax import models, quant, train
from tmdjax.harness import Update
from tmdjax.harness.config import to_plain

Config = Any


def updates(config: Config) -> dict[str, Update]:
    """Of generator and critic, with all four networks; the config is of one arm."""
    method, rules = students.distillation(config), students.optimizers(config)
    module = models.build(students.student_spec(config))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def initial(key: Any) -> Any:
        params = tasks.initial_params(config, module, key)
        teacher = params["shared"] if config.student.kind == "tmd" else params
        critic = tasks.first_critic(config, teacher, key)
        state = train.create_distillation_state(params, critic, rules, ema=True)
        kept = quant.as_recipe(config.precision.train).dtype
        return state, jax.tree.map(lambda leaf: leaf.astype(kept), teacher)

    state, frozen = jax.eval_shape(initial, key)
    if config.teacher.exact:
        frozen = tasks.frozen_teacher(config, None)
    steps = train.make_steps(
        method,
        rules,
        ema_decay=config.distill.ema_decay,
        microbatches=config.distill.microbatches,
    )
    generator, critic, batch = state.generator, state.critic, batch_of(config)
    return {
        "generator update": Update(
            steps[0],
            (generator, batch, key, critic.params, frozen),
            0,
        ),
        "critic update": Update(
            steps[1],
            (critic, batch, key, generator.params, frozen),
            0,
        ),
    }


def batch_of(config: Config) -> dict[str, Any]:
    """Shapes of a batch of the distillation."""
    size = config.distill.batch_size
    x, text = tasks.example(config)
    cond = jax.ShapeDtypeStruct((size, *text.shape[1:]), jnp.float32)
    if tasks.has_prompts(config):
        cond = jax.ShapeDtypeStruct((size,), jnp.int32)
    video = jax.ShapeDtypeStruct((size, *x.shape[1:]), jnp.float32)
    return {"x_data": video, "cond": cond}


def check_memory(config: Config, steps: Mapping[str, Update]) -> dict[str, Any]:
    """What a device holds on the config's mesh, in GB, and computes, in PFLOP.

    Raises:
        ValueError: it does not fit; the smallest mesh that does is named.
    """
    found: dict[str, Any] = {}
    mesh = train.abstract_mesh(**to_plain(config.mesh))
    for name, (step, shapes, donated) in steps.items():
        plan = train.plan(
            step,
            *shapes,
            donate_argnums=donated,
            mesh=mesh,
            rules=students.RULES,
            device=config.device,
        )
        train.check_fits(plan, config.device)
        found[f"{name}: GB a {config.device}"] = round(plan.total / 1e9, 1)
        flops = sum(plan.flops.values())
        found[f"{name}: PFLOP a {config.device}"] = round(flops / 1e15, 2)
    return found
