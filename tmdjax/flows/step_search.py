"""Step sizes by dynamic programming over the local errors of a fine trajectory.

A fine Euler trajectory X[0..n] visits knots t[0] = 1 > ... > t[n] = 0. Jumping from
knot j straight to knot k costs what one Euler step misses,

    c[j, k] = E || X[j] - (t[j] - t[k]) v(X[j], t[j]) - X[k] ||^2,

and the cheapest path of exactly K jumps from knot 0 to knot n is a K-step grid.
One matrix serves every K.

References:
    Nguyen et al., arXiv 2312.16414, eqs. 5-8 (its time runs from 0, noise, to 1).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core import prng, trees
from tmdjax.core.checks import (
    check_batch,
    check_choice,
    check_count,
    check_output,
    check_range,
    check_same_shape,
)
from tmdjax.core.functions import as_pytree
from tmdjax.core.types import Array, Cond, Data, Float, Grid, PerExample, Velocity
from tmdjax.flows.grids import custom_grid, uniform_grid
from tmdjax.flows.rollout import (
    METHODS,
    check_times,
    solver_velocity,
    start_noise,
)
from tmdjax.flows.table import CoefficientTable

Metric = Callable[[Data, Data], PerExample]
"""``metric(estimate, target) -> cost [batch]``, both [batch, *event]; traceable."""


def squared_l2(estimate: Data, target: Data) -> PerExample:
    """Squared Euclidean distance, summed over event dimensions.

    Raises:
        ValueError: shapes that differ.
    """
    check_same_shape("estimate", estimate, "target", target)
    error = jnp.square(estimate - target)
    return jnp.sum(error, axis=tuple(range(1, error.ndim)))


def fine_knots(knots: Any) -> Grid:
    """The knots of a fine trajectory.

    Args:
        knots: a number of uniform steps, times from 1 (or just below, at least 0.99)
            down to exactly 0, or a coefficient table without noise.

    Raises:
        ValueError: times that do not strictly decrease from 1 to 0 (the first bad knot
            is named), or a table that adds noise.
    """
    if isinstance(knots, CoefficientTable):
        if knots.stochastic:
            raise ValueError(
                "this table adds noise, but local errors are those of the "
                "deterministic flow; search on its 'ode' table and use the grid found."
            )
        knots = np.append(knots.t, knots.t_next[-1])
    if np.ndim(knots) == 0:
        return uniform_grid(check_count("knots", knots))
    grid = custom_grid(knots)
    if grid[0] < 0.99:
        raise ValueError(
            f"knots must begin at 1 (noise), but knot 0 is {grid[0]}. Networks that do "
            f"not know t = 1 may begin just below, from 0.99 on: there the state is "
            f"taken to be noise alone."
        )
    return grid


def checked(velocity: Velocity) -> Velocity:
    """A velocity whose every value passes :func:`~tmdjax.core.checks.check_output`.

    Inside a jitted function this is before anything is compiled, and costs nothing
    on later calls.
    """
    return lambda x, t, cond: check_output(velocity(x, t, cond), x)


def cost_memory(shape: tuple[int, ...], knots: Any) -> int:
    """Bytes that :func:`local_error_costs` keeps of one trajectory.

    States and velocities at every knot, float32. What the network needs for a call
    comes on top.
    """
    steps = len(fine_knots(knots)) - 1
    return 4 * int(np.prod(shape)) * (2 * steps + 4)


def check_samples(keys: Any, cond: Cond) -> int:
    """The number of samples that keys (or noise) and conditions agree on.

    Raises:
        TypeError: raw keys.
        ValueError: not one key a sample, none, or conditions of another batch.
    """
    noise = jnp.issubdtype(getattr(keys, "dtype", object), jnp.floating)
    if not noise:
        prng.check_key(keys, "keys")
    if not len(keys) or (keys.ndim != 1 and not noise):
        raise ValueError(
            f"keys have shape {keys.shape}; give one a sample, as from "
            f"prng.sample_keys(key, 100)."
        )
    for leaf in jax.tree.leaves(cond):
        check_batch("cond", leaf, len(keys))
    return len(keys)


def fitting_batch(
    samples: int,
    shape: tuple[int, ...],
    knots: Grid,
    micro_batch: int | None,
    memory_limit: float,
    dtype: Any = jnp.float32,
) -> int:
    """How many trajectories to keep at a time.

    Args:
        samples: in all.
        shape: of one sample.
        knots: of the trajectories.
        micro_batch: what is asked for; None takes as many as fit.
        memory_limit: bytes for their states and velocities (:func:`cost_memory`).
        dtype: of the states.

    Raises:
        ValueError: more than the limit holds; the estimate and the remedy are named.
    """
    each = cost_memory(shape, knots) * jnp.dtype(dtype).itemsize // 4
    if micro_batch is None:
        micro_batch = max(1, min(samples, int(memory_limit // each)))
    micro_batch = min(check_count("micro_batch", micro_batch), samples)
    if micro_batch * each > memory_limit:
        fits = int(memory_limit // each)
        raise ValueError(
            f"{micro_batch} trajectories of {len(knots) - 1} steps and shape {shape} "
            f"take {micro_batch * each / 1e9:.2f} GB, more than memory_limit="
            f"{memory_limit / 1e9:.2f} GB; "
            + (f"give micro_batch<={fits}." if fits else "use fewer knots.")
        )
    return micro_batch


def local_error_costs(
    velocity: Velocity,
    keys: Any,
    shape: tuple[int, ...],
    cond: Cond = None,
    *,
    knots: Any = 100,
    metric: Metric = squared_l2,
    method: str = "euler",
    micro_batch: int | None = None,
    memory_limit: float = 2e9,
    dtype: Any = jnp.float32,
) -> Float[np.ndarray, "from_knot to_knot"]:
    """The matrix c[j, k], averaged over samples.

    Args:
        velocity: ``(x, t, cond) -> v``, guided or not; parameters that it holds by
            ``functools.partial`` are not compiled in.
        keys: [samples] typed keys of the noise, or the noise [samples, *shape].
        shape: of one sample.
        cond: pytree of [samples, ...], or None.
        knots: of the fine trajectory: a number of uniform steps, times from 1 to 0,
            or a coefficient table without noise.
        metric: per-sample cost of an estimate; arrays that it holds by
            ``functools.partial`` (a network's, say) are not compiled in.
        method: one-step solver (of ``METHODS``) whose steps are judged. 'euler' needs
            one evaluation a knot and sample; others as many more a *pair* of knots as
            they have stages after the first: n (n + 1) / 2 times one for 'heun'.
        micro_batch: trajectories at a time; None takes as many as fit.
        memory_limit: bytes for their states and velocities (:func:`cost_memory`).
        dtype: of the states; float64 under x64.

    Returns:
        [knot, knot] float64 on the host, zero on and below the diagonal.

    Raises:
        TypeError: a velocity that does not return floats.
        ValueError: a velocity of another shape than its state, bad knots or keys, a
            table that adds noise, conditions of another batch, a batch beyond the
            limit.
    """
    grid = fine_knots(knots)
    check_choice("method", method, METHODS)
    check_times(velocity, grid, method)
    samples = check_samples(keys, cond)
    micro_batch = fitting_batch(samples, shape, grid, micro_batch, memory_limit, dtype)
    compiled = as_pytree(velocity), as_pytree(metric)
    total = np.zeros((len(grid) - 1, len(grid)))
    for rows, counted in micro_batches(samples, micro_batch):
        sums = _cost_sums(
            *compiled,
            *trees.take((keys, cond), rows),
            jnp.asarray(grid, dtype),
            np.arange(micro_batch) < counted,
            tuple(shape),
            method,
        )
        total += np.asarray(sums, np.float64)
    return np.concatenate([total / samples, np.zeros((1, len(grid)))])


def micro_batches(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts samples into batches of one size, so that one compilation serves all.

    Yields:
        Rows [size] of a batch, and how many of them count: the last batch is filled
        up with samples that another batch has.
    """
    for start in range(0, count, size):
        yield np.arange(start, start + size) % count, min(size, count - start)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _cost_sums(
    velocity: Any,
    metric: Any,
    keys: Any,
    cond: Cond,
    knots: Array,
    counted: Array,
    shape: tuple[int, ...],
    method: str,
) -> Array:
    """Sums over counted samples, [knot - 1, knot]."""
    batch, n = len(keys), len(knots) - 1
    velocity = checked(velocity)

    def fine_step(x: Array, times: tuple[Array, Array]) -> tuple[Array, Any]:
        t, t_next = times
        v = velocity(x, jnp.broadcast_to(t, (batch,)), cond).astype(x.dtype)
        return x - (t - t_next) * v, (x, v)

    noise = start_noise(keys, shape, knots.dtype)
    last, (states, velocities) = jax.lax.scan(fine_step, noise, (knots[:-1], knots[1:]))
    if method == "euler" and metric.func is squared_l2:
        return _squared_l2_sums(states, velocities, last, knots, counted)

    def cost(j: Array, target: Array, t_next: Array) -> Array:
        x, v = states[j], velocities[j]
        if method != "euler":
            v = solver_velocity(velocity, x, knots[j], t_next, cond, method, v)
        costs = metric(x - (knots[j] - t_next) * v, target)
        return jnp.sum(jnp.where(counted, costs, 0))

    # one pair of knots at a time: a metric or a solver may run a network
    j, k = np.triu_indices(n, 1)
    inner = jax.lax.map(lambda at: cost(at[0], states[at[1]], knots[at[1]]), (j, k))
    sums = jnp.zeros((n, n + 1), knots.dtype).at[j, k].set(inner)
    to_last = jax.lax.map(lambda j: cost(j, last, knots[-1]), jnp.arange(n))
    return sums.at[:, n].set(to_last)


_CACHE_ENTRIES = 2**18  # of states and velocities each, looked at together: 1 MB


def _squared_l2_sums(
    states: Array, velocities: Array, last: Array, knots: Array, counted: Array
) -> Array:
    """:func:`_cost_sums` for Euler and squared L2, summed over pieces of the event.

    All pairs of knots of a piece are one fused reduction over data that stay in the
    cache; a pass over whole states would stream them from memory n times.
    """
    n, batch = states.shape[:2]
    states, velocities = (a.reshape(n, batch, -1) for a in (states, velocities))
    last = last.reshape(batch, -1)
    size = states.shape[-1]
    width = min(size, max(64, _CACHE_ENTRIES // (n * batch)))
    j, k = jnp.arange(n)[:, None], jnp.arange(n + 1)
    jumps = (knots[j] - knots[k])[..., None, None]

    def piece(start: Any, width: int) -> Array:
        def cut(a: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(a, start, width, a.ndim - 1)

        x, v = cut(states), cut(velocities)
        targets = jnp.concatenate([x, cut(last)[None]])
        miss = x[:, None] - jumps * v[:, None] - targets
        return jnp.sum(jnp.where(counted[:, None], jnp.square(miss), 0), (2, 3))

    whole, rest = divmod(size, width)
    sums = jax.lax.fori_loop(
        0,
        whole,
        lambda i, total: total + piece(i * width, width),
        jnp.zeros((n, n + 1), states.dtype),
    )
    if rest:
        sums += piece(size - rest, rest)
    return jnp.where(k > j, sums, 0)


class Paths(NamedTuple):
    """Cheapest paths for every budget.

    Attributes:
        cost: [budget], of 1, 2, ... jumps.
        index: the knots of each path, int [jumps + 1], first 0 and last n.
    """

    cost: np.ndarray
    index: tuple[np.ndarray, ...]


def check_costs(costs: Any) -> Float[np.ndarray, "knot knot"]:
    """Returns a cost matrix as float64.

    Raises:
        ValueError: not square; an entry above the diagonal that is not finite or is
            negative (the first is named).
    """
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or len(costs) < 2:
        raise ValueError(
            f"a cost matrix must be square, [knot, knot], with two knots or more; got "
            f"shape {costs.shape}."
        )
    upper = np.triu(np.ones(costs.shape, bool), 1)
    for bad, rule in (
        (
            ~np.isfinite(costs),
            "must be finite. A velocity that is singular at t = 1 or t = 0 is the "
            "usual cause: keep the network's time a little inside (eps of "
            "models.rectified_flow)",
        ),
        (costs < 0, "must not be negative"),
    ):
        where = np.argwhere(bad & upper)
        if len(where):
            j, k = (int(i) for i in where[0])
            raise ValueError(f"costs[{j}, {k}] = {costs[j, k]}: costs {rule}.")
    return costs


def check_budget(budget: Any, steps: int) -> int:
    """Returns the budget K as int; raises ValueError unless 1 <= K <= steps."""
    budget = check_count("budget", budget, -(2**31))
    if not 1 <= budget <= steps:
        raise ValueError(f"budget K={budget} must be in [1, K_max={steps}].")
    return budget


def cheapest_paths(costs: Any, budget: int, *, future_weight: float = 1.0) -> Paths:
    """Cheapest paths of exactly 1, ..., budget jumps from the first knot to the last.

    J[i, 1] = c[i, n] and J[i, k] = min over i < m < n of c[i, m] + w J[m, k - 1].
    Of equal choices the smallest m is taken, so ties spend the small steps first.
    O(budget n^2) time, on the host in float64.

    Args:
        costs: [n + 1, n + 1], read above the diagonal.
        budget: most jumps wanted, 1 to n.
        future_weight: w; above 1 the later a jump the more it weighs (GITS takes
            1.15, to make up for judging local errors alone). The cost is then the
            weighted sum.

    Raises:
        ValueError: a matrix with entries that are negative or not finite, a bad budget
            or weight.

    References:
        arXiv 2312.16414, eqs. 6-8.
    """
    costs = check_costs(costs)
    n = len(costs) - 1
    budget = check_budget(budget, n)
    check_range("future_weight", future_weight, 0, open_low=True)
    inner = np.triu(np.ones(costs.shape, bool), 1)
    inner[:, n] = False
    jumps = np.where(inner, costs, np.inf)
    value = np.append(costs[:n, n], np.inf)
    totals, choices = [value[0]], []
    for _ in range(1, budget):
        through = jumps + future_weight * value
        choices.append(np.argmin(through, axis=1))
        value = through[np.arange(n + 1), choices[-1]]
        totals.append(value[0])
    paths = []
    for k in range(1, budget + 1):
        path = [0]
        for choice in reversed(choices[: k - 1]):
            path.append(int(choice[path[-1]]))
        paths.append(np.array([*path, n]))
    return Paths(np.array(totals), tuple(paths))


def uniform_index(steps: int, budget: int) -> np.ndarray:
    """The knots nearest to the uniform grid of a budget, int [budget + 1]."""
    check_budget(budget, steps)
    return np.rint(np.linspace(0, steps, budget + 1)).astype(int)


def path_cost(costs: Any, index: Any) -> float:
    """Sum of the costs of a path's jumps."""
    index = np.asarray(index)
    return float(np.asarray(costs)[index[:-1], index[1:]].sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A time grid found on the knots of a fine trajectory.

    Attributes:
        index: knots walked, int [K + 1], from 0 to the last.
        knots: times of all knots, from 1 to 0.
        cost: sum of its local errors, in the units of the metric.
        guidance_scale: of the velocity that was searched; None is unknown.
    """

    index: np.ndarray
    knots: Grid
    cost: float
    guidance_scale: float | None = None

    @property
    def times(self) -> Grid:
        """The grid, [K + 1] from exactly 1 to exactly 0."""
        return self.knots[self.index]


def costs_fingerprint(
    velocity: Velocity,
    keys: Any,
    shape: tuple[int, ...],
    cond: Cond,
    *,
    knots: Grid,
    metric: Metric = squared_l2,
    method: str = "euler",
    dtype: Any = jnp.float32,
) -> str:
    """Hash of everything that a cost matrix depends on.

    A function has no content to hash, so velocity and metric are asked for their
    values at every knot, of one sample each: another model, or another version of
    it, gives other bits. The arguments are those of :func:`local_error_costs`.
    """
    rows = np.arange(len(knots) - 1) % len(keys)
    own_keys, own_cond = trees.take((keys, cond), rows)
    values = _probe(
        as_pytree(velocity),
        as_pytree(metric),
        own_keys,
        jnp.asarray(knots[:-1], dtype),
        own_cond,
        tuple(shape),
    )
    inputs = {
        "values": values,
        "keys": jax.random.key_data(keys)
        if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
        else keys,
        "cond": cond,
        "knots": knots,
        "method": np.frombuffer(method.encode(), np.uint8),
    }
    return trees.content_hash(inputs)


@functools.partial(jax.jit, static_argnums=5)
def _probe(
    velocity: Any,
    metric: Any,
    keys: Any,
    times: Array,
    cond: Cond,
    shape: tuple[int, ...],
) -> tuple[Array, Array]:
    velocity = checked(velocity)

    def one(item: Any) -> tuple[Array, Array]:
        key, t, c = jax.tree.map(lambda leaf: leaf[None], item)
        x = start_noise(key, shape, times.dtype)
        v = velocity(x, t, c)
        return v, metric(x - v.astype(times.dtype), x)

    return jax.lax.map(one, (keys, times, cond))
