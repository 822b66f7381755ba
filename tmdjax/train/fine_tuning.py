"""Fine-tuning on arrays in memory: the short runs that follow a pretrained network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tmdjax import data
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Params
from tmdjax.train.optimizer import OptimizerConfig, make_optimizer
from tmdjax.train.sharding import jit_train_step, make_mesh
from tmdjax.train.state import create_state, make_train_step
from tmdjax.train.supervised import fit as supervised_fit


class FineTuned(NamedTuple):
    """A network tuned to few steps.

    Attributes:
        params: averaged parameters, to sample with.
        raw_params: the last ones, not averaged.
    """

    params: Params
    raw_params: Params


def fine_tune(
    params: Params,
    loss_fn: Callable[..., Any],
    arrays: Mapping[str, Any],
    *,
    constants: Any = None,
    key: Any,
    steps: int = 12_000,
    batch_size: int = 128,
    optimizer: OptimizerConfig | None = None,
    ema_half_life: float = 0.05,
    microbatches: int = 1,
    seed: int = 0,
    fit: Callable[..., Any] | None = None,
) -> FineTuned:
    """Trains a copy of the parameters on arrays in memory.

    Args:
        params: where to start.
        loss_fn: ``(params, batch, keys) -> (loss [batch], metrics)``, with the
            constants as a fourth argument if there are any.
        arrays: {name: [n, ...]}.
        constants: pytree of arrays that stay as they are, such as the base of
            adapters; None means none.
        key: typed key of the run.
        steps: updates.
        batch_size: examples an update.
        optimizer: None is Adam, learning rate 2e-4, clipping at 1, warm-up
            over 5,000 of 12,000 steps (in proportion for fewer).
        ema_half_life: of the averaged parameters, as a fraction of the run, in (0, 1].
        microbatches: parts of a batch, see :func:`tmdjax.train.make_train_step`.
        seed: of the batch order.
        fit: ``(state, step, batches, num_steps=) -> state``; None is
            :func:`tmdjax.train.fit` without checkpoints.

    Raises:
        ValueError: settings out of range.
        NonFiniteError: updates that stay non-finite.
    """
    check_count("steps", steps)
    check_range("ema_half_life", ema_half_life, 0, 1, open_low=True)
    if optimizer is None:
        warmup = min(5000, steps * 5 // 12)
        optimizer = OptimizerConfig(
            name="adam", learning_rate=2e-4, warmup_steps=warmup
        )
    rule = make_optimizer(optimizer)
    ema_decay = 0.5 ** (1 / (ema_half_life * steps))

    def update(state: Any, batch: Any, key: Any, *constants: Any) -> Any:
        def loss(params: Params, part: Any, keys: Any) -> Any:
            return loss_fn(params, part, keys, *constants)

        step = make_train_step(
            loss, rule, ema_decay=ema_decay, microbatches=microbatches
        )
        return step(state, batch, key)

    state = create_state(params, rule, ema=True)
    step, state, place = jit_train_step(update, state, make_mesh(), constants)
    batches = data.in_memory(arrays, batch_size, seed=seed)
    if fit is None:
        result = supervised_fit(
            state, step, batches, key=key, num_steps=steps, place=place
        )
        state = result.state
    else:
        state = fit(state, step, batches, num_steps=steps, place=place)
    return FineTuned(state.eval_params, state.params)
