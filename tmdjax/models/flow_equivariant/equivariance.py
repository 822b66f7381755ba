"""Is a recurrent cell equivariant? A test for cells of any group, one's own too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_range, first_few
from tmdjax.core.types import Array, Float


def equivariance_errors(
    cell: Callable[[Any, Any], Any],
    state: Any,
    inputs: Any,
    moved_inputs: Any,
    act: Callable[[Any, Any], Any],
    *,
    select: Callable[[Any], Any] = lambda state: state,
) -> Float[Array, "time"]:
    """How far the states of a moved world are from the moved states of a world.

    A cell is equivariant to a flow (a motion of the world in time) where moving its
    inputs moves its states: h'_t = act(t, h_t) for the states after input t, with
    h from ``inputs`` and h' from ``moved_inputs``. Jittable.

    Args:
        cell: ``cell(state, input) -> state``.
        state: before the first input, of both; moving it changes nothing, as of zeros.
        inputs: tree of [time, ...].
        moved_inputs: the same in the moved world, tree of [time, ...].
        act: ``act(t, state) -> state``, how the motion of t steps moves a state; t is a
            traced int32 scalar, 0 for the state after the first input.
        select: what of a state is compared; the whole unless some parts have no image
            under the motion, such as velocity channels at the edge of their set.

    Returns:
        float32 [time], the largest absolute difference in any selected leaf; 0, or
        rounding, for a cell that is exactly equivariant.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.eye(3)
        >>> moved = jnp.stack([jnp.roll(row, t) for t, row in enumerate(x)])
        >>> fade = lambda state, x: 0.5 * state + x  # its memory does not move
        >>> act = lambda t, state: jnp.roll(state, t)
        >>> equivariance_errors(fade, jnp.zeros(3), x, moved, act).tolist()
        [0.0, 0.5, 0.25]
    """
    times = jnp.arange(len(jax.tree.leaves(inputs)[0]))

    def step(states: Any, given: Any) -> Any:
        t, one, other = given
        still, moved = (cell(s, x) for s, x in zip(states, (one, other)))
        pairs = zip(
            jax.tree.leaves(select(act(t, still))),
            jax.tree.leaves(select(moved)),
            strict=True,
        )
        worst = [jnp.abs(a - b).max() for a, b in pairs]
        return (still, moved), jnp.max(jnp.stack(worst)).astype(jnp.float32)

    return jax.lax.scan(step, (state, state), (times, inputs, moved_inputs))[1]


def check_equivariance(
    *arguments: Any, tolerance: float = 1e-5, **options: Any
) -> None:
    """Raises ValueError unless a cell is equivariant.

    Args:
        *arguments: of :func:`equivariance_errors`.
        tolerance: of the absolute difference, at least 0.
        **options: of :func:`equivariance_errors`.

    Raises:
        ValueError: states that differ; with the steps at which they do.
    """
    check_range("tolerance", tolerance, 0)
    errors = np.asarray(jax.jit(lambda: equivariance_errors(*arguments, **options))())
    wrong = np.flatnonzero(~(errors <= tolerance))
    if wrong.size:
        steps = first_few([f"{i} (by {errors[i]:.2g})" for i in wrong], 3, ", ")
        raise ValueError(
            f"the cell is not equivariant: the states after the inputs {steps} are not "
            f"the moved states, with tolerance={tolerance:g}. If parts of a state have "
            f"no image under the motion, leave them out with select=."
        )
