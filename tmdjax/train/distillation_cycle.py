"""The cycle of a distillation: one update of the generator, several of its critic.

Two jitted steps, so that the two optimisers stay apart and each compiles alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tmdjax.core.types import Params, PyTree
from tmdjax.train.distillation import Distillation
from tmdjax.train.sharding import Rules, jit_on_mesh, make_mesh
from tmdjax.train.state import TrainState, create_state, make_train_step


@struct.dataclass
class DistillationState:
    """Generator and critic, each with its optimiser.

    Attributes:
        generator: its train state.
        critic: train state of ``{'score': ..., 'discriminator': ...}``.
    """

    generator: TrainState
    critic: TrainState

    @property
    def step(self) -> Any:
        """Cycles done."""
        return self.generator.step

    @property
    def skipped(self) -> Any:
        """Updates of either that were not finite."""
        return self.generator.skipped + self.critic.skipped

    @property
    def skipped_in_a_row(self) -> Any:
        """Updates skipped since the last good one, of the network that has more."""
        return jnp.maximum(
            self.generator.skipped_in_a_row, self.critic.skipped_in_a_row
        )


def create_distillation_state(
    generator: Params,
    critic: Mapping[str, Any],
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    *,
    ema: bool = False,
) -> DistillationState:
    """The state before the first cycle.

    Args:
        generator: its parameters.
        critic: {'score': parameters, usually the teacher's, 'discriminator': ...}.
        optimizers: of generator and critic.
        ema: keep averaged parameters of the generator.
    """
    return DistillationState(
        create_state(generator, optimizers[0], ema=ema),
        create_state(critic, optimizers[1]),
    )


def make_steps(
    method: Distillation,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    *,
    ema_decay: float | None = None,
    microbatches: int = 1,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The updates of generator and critic, to be jitted.

    Args:
        method: losses.
        optimizers: of generator and critic.
        ema_decay: of the generator's average; None keeps none.
        microbatches: parts of a batch, see :func:`tmdjax.train.make_train_step`.

    Returns:
        ``generator_step(state, batch, key, critic, frozen)`` and ``critic_step(state,
        batch, key, generator, frozen)``, each on its own :class:`TrainState`. Both
        take the key of the run.
    """

    def critic_key(key: Any, step: Any) -> Any:
        cycle = step // method.config.critic_updates
        return method.critic_key(jax.random.fold_in(key, cycle))

    def step_of(
        loss: Any, rule: Any, key_of: Callable[..., Any] | None = None, **options: Any
    ) -> Any:
        def step(
            state: TrainState, batch: Any, key: Any, other: Any, frozen: Any
        ) -> Any:
            update = make_train_step(
                lambda params, part, keys: loss(params, part, keys, other, frozen),
                rule,
                microbatches=microbatches,
                unroll=True,
                **options,
            )
            return update(state, batch, key_of(key, state.step) if key_of else key)

        return step

    return (
        step_of(
            method.generator_loss,
            optimizers[0],
            ema_decay=ema_decay,
            reductions={"weight_max": jnp.max},
        ),
        step_of(method.critic_loss, optimizers[1], critic_key),
    )


def compile_cycle(
    method: Distillation,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    state: DistillationState,
    frozen: PyTree,
    *,
    mesh: Any = None,
    rules: Rules = (),
    ema_decay: float | None = None,
    microbatches: int = 1,
) -> tuple[Callable[..., Any], DistillationState, Callable[[Any], Any]]:
    """One cycle as ``(state, parts, key) -> (state, metrics)``; do not jit it again.

    Its updates are dispatched without waiting for the device.

    Args:
        method: losses.
        optimizers: of generator and critic.
        state: the initial state.
        frozen: parameters of the teacher.
        mesh: of devices; None is all of them, data parallel.
        rules: cuts by path, see :func:`tmdjax.train.fsdp_shardings`.
        ema_decay: of the generator's average; None keeps none.
        microbatches: parts of a batch (memory, not maths).

    Returns:
        The cycle, the state placed on the mesh, and the function that cuts a batch of
        ``config.batches`` batches in a row (the generator's, then the critic's) into
        placed parts. Metrics: those of the generator, the critic's last ones under
        'critic/'.
    """
    mesh = make_mesh() if mesh is None else mesh
    steps = make_steps(
        method, optimizers, ema_decay=ema_decay, microbatches=microbatches
    )
    update_generator, place_generator, place = jit_on_mesh(
        steps[0], state.generator, mesh, state.critic.params, frozen, rules=rules
    )
    update_critic, place_critic, _ = jit_on_mesh(
        steps[1], state.critic, mesh, state.generator.params, frozen, rules=rules
    )
    generator, _, frozen = place_generator(state.generator, state.critic.params, frozen)
    critic = place_critic(state.critic)[0]

    def cycle(state: DistillationState, parts: Any, key: Any) -> Any:
        generator, metrics = update_generator(
            state.generator, parts[0], key, state.critic.params, frozen
        )
        critic, found = state.critic, {}
        for part in parts[1:]:
            critic, found = update_critic(critic, part, key, generator.params, frozen)
        metrics |= {f"critic/{name}": value for name, value in found.items()}
        return DistillationState(generator, critic), metrics

    count = method.config.batches

    def cut(batch: Any) -> tuple[Any, ...]:
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % count:
            raise ValueError(
                f"a cycle takes {count} batches, but {size} rows were given; choose a "
                f"multiple of {count}."
            )
        starts = range(0, size, size // count)
        parts = (slice(start, start + size // count) for start in starts)
        return tuple(place(_rows(batch, part)) for part in parts)

    return cycle, DistillationState(generator, critic), cut


def _rows(batch: Any, rows: slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], batch)
