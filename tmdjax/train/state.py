"""Train state and the update: microbatches, EMA, non-finite guard; one jit."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tmdjax.core import prng, trees
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Params, PyTree, SampleKeys

RESERVED = ("loss", "grad_norm")
"""Metrics that the train step reports itself."""

LossFn = Callable[[Params, Any, SampleKeys], tuple[Array, dict[str, Array]]]
"""``loss_fn(params, batch, keys) -> (loss [batch], metrics {name: [batch]})``."""


@struct.dataclass
class TrainState:
    """Everything that an update changes.

    Attributes:
        step: updates attempted, int32.
        params: nested dict, float32.
        opt_state: of the optimiser.
        ema_params: exponential moving average of params, or None.
        skipped: updates skipped because loss, gradient or what they led to was not
            finite (or the gradient larger than was allowed).
        skipped_in_a_row: updates skipped since the last good one.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any
    skipped: Any
    skipped_in_a_row: Any

    @property
    def eval_params(self) -> Any:
        """The averaged parameters where there are any, else the raw ones."""
        return self.params if self.ema_params is None else self.ema_params


class LearnerCounts:
    """What was skipped, for a state whose ``learner`` is a :class:`TrainState`.

    The learner may hold several runs side by side, with a leading axis of runs.
    """

    learner: Any

    @property
    def skipped(self) -> Array:
        """Updates that were skipped, of all runs together."""
        return jnp.sum(self.learner.skipped)

    @property
    def skipped_in_a_row(self) -> Array:
        """Updates skipped since the last good one, of the run that has most."""
        return jnp.max(self.learner.skipped_in_a_row)


def create_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state before the first update; the EMA starts at the parameters.

    Parameters are copied: train steps donate the state, and neither the caller's
    tree nor one buffer twice may be donated.
    """
    params = jax.tree.map(jnp.array, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.array, params) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def ema_update(average: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """Moves the average: d average + (1 - d) params, d = min(decay, (1+n)/(10+n)).

    The ramp lets the average forget its start when runs are short.
    """
    n = step.astype(jnp.float32)
    rate = jnp.minimum(decay, (1 + n) / (10 + n))
    return optax.incremental_update(params, average, 1 - rate)


def _microbatches(tree: PyTree, count: int) -> PyTree:
    """[batch, ...] -> [count, batch / count, ...]; sample i goes to i mod count.

    Striding keeps every microbatch spread over the devices of a sharded batch.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1),
        tree,
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    microbatches: int = 1,
    unroll: bool = False,
    reductions: Mapping[str, Callable[[Array], Array]] | None = None,
    skip_above: float | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]:
    """Builds ``step(state, batch, key) -> (state, metrics)``; jit it with donation.

    The gradient is that of the mean loss over the whole batch whatever the number
    of microbatches. Sample i of the batch at step n uses the key
    ``fold_in(fold_in(key, n), i)``. An update is left out and counted, with parameters,
    optimiser state and average as they were, whose loss or gradient is not finite, or
    after which a parameter would not be.

    Args:
        loss_fn: per-example loss and metrics.
        optimizer: optax transformation.
        ema_decay: of the averaged parameters; None keeps no average (the state
            must agree).
        microbatches: how many parts the batch is cut into (memory, not maths).
        unroll: unroll them instead of scanning: for networks with convolutions on
            CPU, where XLA runs convolution gradients inside loops many times slower.
        reductions: how a metric of loss_fn, [batch], becomes a number, such as
            ``{'ratio_error': jnp.max}``; the mean where it is not named.
        skip_above: updates with a larger gradient norm are skipped and counted like
            non-finite ones; None skips none.

    Returns:
        The step. Its metrics are float32 scalars: 'loss', 'grad_norm' and what loss_fn
        reports, reduced. The state counts what was skipped.

    Raises:
        ValueError: a number out of range; on tracing: the batch does not divide into
            microbatches, loss_fn returns a scalar or a reserved metric, a reduction of
            none of its metrics, or state and ema_decay disagree.
    """
    check_count("microbatches", microbatches)
    if ema_decay is not None:
        check_range("ema_decay", ema_decay, 0, 1)
    if skip_above is not None:
        check_range("skip_above", skip_above, 0, open_low=True)

    def loss_sum(params: Params, part: Any, keys: SampleKeys) -> Any:
        loss, metrics = loss_fn(params, part, keys)
        if loss.ndim != 1:
            raise ValueError(
                f"loss_fn must return one loss an example, [batch]; got shape "
                f"{loss.shape}. Leave the mean to the caller."
            )
        for name, value in metrics.items():
            if name in RESERVED or jnp.shape(value) != loss.shape:
                raise ValueError(
                    f"loss_fn reports metric {name!r} of shape {jnp.shape(value)}; "
                    f"metrics are [batch], one number an example, and "
                    f"{', '.join(RESERVED)} are taken."
                )
        for name in reductions or {}:
            if name not in metrics:
                raise ValueError(
                    f"reductions names {name!r}, but loss_fn reports "
                    f"{', '.join(metrics) or 'no metrics'}; reduce one of these."
                )
        return jnp.sum(loss), {**metrics, "loss": loss}

    grad_fn = jax.grad(loss_sum, has_aux=True)

    def gradients(params: Params, batch: Any, keys: SampleKeys) -> Any:
        size = keys.shape[0]
        if size % microbatches:
            raise ValueError(
                f"a batch of {size} does not divide into {microbatches} microbatches."
            )
        if microbatches == 1:
            total, each = grad_fn(params, batch, keys)
        else:
            parts = _microbatches((batch, keys), microbatches)

            def add(total: Any, part: Any) -> tuple[Any, Any]:
                grads, each = grad_fn(params, *part)
                return jax.tree.map(jnp.add, total, grads), each

            zero = jax.tree.map(jnp.zeros_like, params)
            total, each = jax.lax.scan(add, zero, parts, unroll=unroll or 1)
            each = jax.tree.map(jnp.ravel, each)
        metrics = {
            name: (reductions or {}).get(name, jnp.mean)(values)
            for name, values in each.items()
        }
        return jax.tree.map(lambda x: x / size, total), metrics

    def step(
        state: TrainState, batch: Any, key: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        if (ema_decay is None) != (state.ema_params is None):
            raise ValueError(
                f"ema_decay={ema_decay} but the state was made with "
                f"ema={state.ema_params is not None}; create_state(ema=True) goes "
                f"with an ema_decay."
            )
        size = jax.tree.leaves(batch)[0].shape[0]
        keys = prng.sample_keys(jax.random.fold_in(key, state.step), size)
        grads, metrics = gradients(state.params, batch, keys)
        grad_norm = optax.global_norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        if skip_above is not None:
            good &= grad_norm <= skip_above
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        good &= trees.all_finite(params)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = ema_update(ema_params, params, state.step, ema_decay)
        new = trees.select(
            good,
            (params, opt_state, ema_params),
            (state.params, state.opt_state, state.ema_params),
        )
        bad = 1 - good.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=new[0],
            opt_state=new[1],
            ema_params=new[2],
            skipped=state.skipped + bad,
            skipped_in_a_row=bad * (state.skipped_in_a_row + 1),
        )
        return state, metrics | {"grad_norm": grad_norm}

    return step


def nonfinite_report(
    loss_fn: LossFn, params: Params, batch: Any, keys: SampleKeys
) -> str:
    """Says which examples and which parameters' gradients are not finite."""
    limit = 5  # of each kind
    loss, _ = jax.jit(loss_fn)(params, batch, keys)
    examples = [int(i) for i in jnp.flatnonzero(~jnp.isfinite(loss))[:limit]]
    named = {
        name: bool(trees.all_finite(leaf))
        for name, leaf in trees.flatten({"batch": batch, "params": params}).items()
    }
    grads = jax.jit(jax.grad(lambda p: jnp.mean(loss_fn(p, batch, keys)[0])))(params)
    layers = [n for n, g in trees.flatten(grads).items() if not trees.all_finite(g)]
    inputs = [name for name, finite in named.items() if not finite]
    if not (inputs or examples or layers):
        return (
            "inputs, loss and gradient are finite, what the optimiser makes of them is "
            "not: look at its numbers (learning rate, clip_norm, b1, b2, eps)"
        )
    return (
        f"non-finite inputs: {inputs[:limit] or 'none'}; examples of the batch with "
        f"a non-finite loss: {examples or 'none'}; parameters with a non-finite "
        f"gradient: {layers[:limit] or 'none'}{' ...' if len(layers) > limit else ''}"
    )
