"""Which noise goes with which sample: optimal transport inside a batch.

Paths between data and the noise that is near it cross less, so their marginal velocity
is straighter and its regression less noisy. Both marginals stay what they were.

References:
    Tong et al., arXiv 2302.00482, sec. 3.2.2; Pooladian et al., arXiv 2304.14772.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tmdjax.core.checks import check_batch, check_count, check_range, check_same_shape
from tmdjax.core.types import Array, Data, Float, Int, SampleKeys

Coupling = Callable[[Data, Data, SampleKeys], Data]
"""``coupling(x_data, x_noise, keys) -> x_noise``, its rows in another order. The keys
are free to draw from: those of the noise are others."""


def transport_cost(x_data: Data, x_noise: Data) -> Float[Array, "batch other"]:
    """Squared Euclidean distances, float32 or wider, of every sample to every noise."""
    x, y = (a.reshape(len(a), -1) for a in (x_data, x_noise))
    x, y = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, y))
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(x * x, -1)[:, None] + jnp.sum(y * y, -1) - 2 * product
    return jnp.maximum(squares, 0)


def optimal_coupling(
    x_data: Data,
    x_noise: Data,
    keys: SampleKeys | None = None,
    *,
    labels: Int[Array, "batch"] | None = None,
) -> Data:
    """The noise in the order that makes the batch's sum of squared distances least.

    Exact, by the Hungarian method: batch^3 operations, one row after another, so it
    pays for batches up to some hundreds; :func:`entropic_coupling` is for larger ones.
    What makes up a batch matters: in a train step of several microbatches each is
    coupled alone.

    Args:
        x_data: [batch, *event].
        x_noise: [batch, *event].
        keys: not used; there so that couplings can stand for each other.
        labels: [batch]. Noise is exchanged between rows of one label alone, so that it
            stays independent of the label, as a sampler that is given one assumes.

    Returns:
        x_noise, its rows permuted, [batch, *event]; no gradient passes the choice.

    Raises:
        ValueError: shapes that differ.

    References:
        arXiv 2302.00482, algorithm 3; of labels: arXiv 2503.10636.
    """
    check_same_shape("x_noise", x_noise, "x_data", x_data)
    cost = _cost(x_data, x_noise, labels)
    # more than any assignment inside the labels costs, of which there is one
    apart = 1 + len(cost) * jnp.max(jnp.where(jnp.isfinite(cost), cost, 0))
    cost = jnp.where(jnp.isfinite(cost), cost, apart)
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return x_noise[jnp.zeros(len(cost), int).at[rows].set(columns)]


def entropic_coupling(
    x_data: Data,
    x_noise: Data,
    keys: SampleKeys,
    *,
    labels: Int[Array, "batch"] | None = None,
    regularisation: float = 0.05,
    iterations: int = 100,
) -> Data:
    """Noise drawn for each sample from the batch's entropic transport plan.

    Rows are drawn independently, so some noise serves twice and some not at all; over
    batches its law stays that of the noise.

    Args:
        x_data: [batch, *event].
        x_noise: [batch, *event].
        keys: [batch], for the draws.
        labels: [batch]; noise is drawn among rows of one label alone.
        regularisation: of the plan's entropy, over the mean cost, > 0.
        iterations: of the scalings that make the plan, >= 1.

    Returns:
        Rows of x_noise, [batch, *event].

    Raises:
        ValueError: shapes that differ, or what :func:`transport_plan` refuses.
    """
    check_same_shape("x_noise", x_noise, "x_data", x_data)
    cost = _cost(x_data, x_noise, labels)
    log_plan = _log_plan(cost, regularisation, iterations)
    return x_noise[jax.vmap(jax.random.categorical)(keys, log_plan)]


def transport_plan(
    cost: Float[Array, "batch other"],
    *,
    regularisation: float = 0.05,
    iterations: int = 100,
) -> Float[Array, "batch other"]:
    """Sinkhorn's plan between uniform weights, in the log domain.

    Args:
        cost: finite.
        regularisation: of the entropy, over the mean cost, > 0: towards 0 the plan
            becomes an assignment and needs more iterations.
        iterations: >= 1, of both scalings; the rows are scaled last, so their sums are
            exact, and those of columns as near as the iterations got.

    Returns:
        [batch, other], each row summing to 1 / batch.

    Raises:
        ValueError: regularisation or iterations out of range.

    References:
        Cuturi, arXiv 1306.0895.
    """
    return jnp.exp(_log_plan(cost, regularisation, iterations))


def _log_plan(cost: Array, regularisation: float, iterations: int) -> Array:
    check_range("regularisation", regularisation, 0, open_low=True)
    check_count("iterations", iterations)
    finite = jnp.isfinite(cost)
    mean = jnp.sum(jnp.where(finite, cost, 0)) / jnp.sum(finite)
    # a batch of equal points costs nothing however it is coupled
    kernel = -cost / (regularisation * jnp.where(mean > 0, mean, 1.0))
    sizes = [math.log(count) for count in cost.shape]

    def scale(_: Any, potentials: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, _ = potentials
        columns = -jax.nn.logsumexp(kernel + rows[:, None], 0) - sizes[1]
        rows = -jax.nn.logsumexp(kernel + columns, 1) - sizes[0]
        return rows, columns

    start = (jnp.zeros(cost.shape[0], cost.dtype), jnp.zeros(cost.shape[1], cost.dtype))
    rows, columns = jax.lax.fori_loop(0, iterations, scale, start)
    return kernel + rows[:, None] + columns


def _cost(x_data: Data, x_noise: Data, labels: Any) -> Array:
    """Transport costs, infinite where labels differ; what is not finite costs 0.

    A damaged sample may go with any noise: its loss tells, and no loop waits for it.
    """
    cost = jax.lax.stop_gradient(transport_cost(x_data, x_noise))
    cost = jnp.where(jnp.isfinite(cost), cost, 0)
    if labels is None:
        return cost
    check_batch("labels", labels, len(cost))
    return jnp.where(labels[:, None] == labels, cost, jnp.inf)
