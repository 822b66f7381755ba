"""Sets of trajectories that the solvers make, each a function of a key and a number.

Made on the CPU or a GPU in float64, which is switched on for the solver alone, and
stored as float32. A trajectory does not depend on the others of its set.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core import prng
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Key, SampleKeys
from tmdjax.data.pde.equations import burgers, kolmogorov_flow, kuramoto_sivashinsky
from tmdjax.data.pde.etdrk4 import Equation, solve
from tmdjax.data.pde.trajectories import Trajectories

Interval = float | tuple[float, float]
"""A number, or the ends of an interval that each trajectory draws from."""

# Largest error of Kuramoto-Sivashinsky of length 64 on 256 points at times 2, 10, 30.
_ERRORS = {0.2: "1e-6, 7e-5, 3e-3", 0.05: "6e-9, 1e-6, 4e-5", 0.01: "1e-11, 4e-9, 1e-7"}


def ks_trajectories(
    key: Key[Array, ""],
    count: int,
    *,
    points: int = 256,
    frames: int = 140,
    warm_up: int = 360,
    length: Interval = (57.6, 70.4),
    dt: Interval = (0.18, 0.22),
    viscosity: Interval = 1.0,
    substeps: int = 4,
    chunk: int = 256,
    start: int = 0,
) -> Trajectories:
    """Kuramoto-Sivashinsky from ten random sines, after it has become chaotic.

        u(x, 0) = sum_i A_i sin(2 pi l_i x / length + phase_i)

    with A in (-1/2, 1/2), phases in (0, 2 pi) and l 1 or 2; the defaults are those of
    the published set (2048 trajectories of 140 frames to train on, 128 of 640 to test).

    Args:
        key: typed key; a set of its own seed for each of training, validation, test.
        count: trajectories.
        points: of the grid, even.
        frames: of a trajectory.
        warm_up: frames that pass before the first of them.
        length: of the domain; a number or an interval to draw from, of each
            trajectory.
        dt: time between frames, likewise.
        viscosity: of the fourth derivative, likewise.
        substeps: solver steps between frames; a warning says where they are too long.
        chunk: trajectories that are solved at a time.
        start: number of the first trajectory, to make a set in parts.

    Returns:
        Trajectories with the parameter 'viscosity', one channel.

    Raises:
        TypeError, ValueError: a number out of range.
        FloatingPointError: a trajectory that diverged.

    References:
        PDE-Refiner, arXiv 2308.05732, appendix; Lie point symmetry data augmentation,
        arXiv 2202.07643, for the initial conditions.
    """
    longest = _interval("dt", dt)[1] / check_count("substeps", substeps)
    if longest > 0.1:
        told = "; ".join(f"{step:g}: {error}" for step, error in _ERRORS.items())
        warnings.warn(
            f"solver steps of {longest:.3g} (dt / substeps={substeps}) are long; "
            f"largest errors at times 2, 10 and 30 by step, {told}. Use more.",
            stacklevel=2,
        )
    return _sine_trajectories(
        kuramoto_sivashinsky, key, count, points, frames, warm_up, length, dt,
        viscosity, substeps, chunk, start,
    )  # fmt: skip


def burgers_trajectories(
    key: Key[Array, ""],
    count: int,
    *,
    points: int = 256,
    frames: int = 100,
    warm_up: int = 0,
    length: Interval = 2 * np.pi,
    dt: Interval = 0.05,
    viscosity: Interval = 0.05,
    substeps: int = 10,
    chunk: int = 256,
    start: int = 0,
) -> Trajectories:
    """Burgers' equation from the ten random sines of :func:`ks_trajectories`.

    Args:
        key: typed key.
        count: trajectories.
        points: of the grid, even.
        frames: of a trajectory.
        warm_up: frames that pass before the first of them.
        length: of the domain; a number or an interval.
        dt: time between frames; a number or an interval.
        viscosity: a number or an interval.
        substeps: solver steps between frames.
        chunk: trajectories that are solved at a time.
        start: number of the first trajectory.

    Returns:
        Trajectories with the parameter 'viscosity', one channel.

    Raises:
        TypeError, ValueError: a number out of range.
        FloatingPointError: a trajectory that diverged.
    """
    return _sine_trajectories(
        burgers, key, count, points, frames, warm_up, length, dt, viscosity, substeps,
        chunk, start,
    )  # fmt: skip


def kolmogorov_trajectories(
    key: Key[Array, ""],
    count: int,
    *,
    points: int = 64,
    solver_points: int | None = None,
    frames: int = 100,
    warm_up: int = 200,
    dt: Interval = 0.1,
    viscosity: Interval = 1e-3,
    drag: float = 0.1,
    speed: float = 1.0,
    substeps: int = 20,
    chunk: int = 16,
    start: int = 0,
) -> Trajectories:
    """Vorticity of Kolmogorov flow on [0, 2 pi]^2 from a random smooth flow.

    The initial energy spectrum is k^4 exp(-2 (k / 4)^2), with random phases.

    Args:
        key: typed key.
        count: trajectories.
        points: of each side of the stored grid, even.
        solver_points: of each side of the solver's grid, of which the spectrum is cut;
            None solves on the stored one. The published set has 2048 for 64.
        frames: of a trajectory.
        warm_up: frames that pass before the first of them.
        dt: time between frames; a number or an interval.
        viscosity: a number or an interval.
        drag: >= 0.
        speed: root mean square of the initial velocity, > 0.
        substeps: solver steps between frames; a step moves less than a point.
        chunk: trajectories that are solved at a time.
        start: number of the first trajectory.

    Returns:
        Trajectories [trajectory, frame, x, y, 1] with the parameter 'viscosity'.

    Raises:
        TypeError, ValueError: a number out of range.
        FloatingPointError: a trajectory that diverged.

    References:
        Kochkov et al. 2021.
    """
    fine = points if solver_points is None else solver_points
    check_range("speed", speed, 0, open_low=True)

    def initial(keys: SampleKeys) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(_random_vorticity(keys, points=fine)) * speed

    def equation(drawn: dict[str, np.ndarray]) -> Equation:
        return kolmogorov_flow(fine, viscosity=drawn["viscosity"], drag=drag)

    return _made(
        equation, initial, key, count, {"dt": dt, "viscosity": viscosity}, points,
        frames, warm_up, substeps, chunk, start,
    )  # fmt: skip


def _sine_trajectories(
    equation: Callable[..., Equation], key, count, points, frames, warm_up, length, dt,
    viscosity, substeps, chunk, start,
) -> Trajectories:  # fmt: skip
    def initial(keys: SampleKeys) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(_random_sines(keys, points=points))

    def of(drawn: dict[str, np.ndarray]) -> Equation:
        return equation(points, drawn["length"], drawn["viscosity"])

    intervals = {"length": length, "dt": dt, "viscosity": viscosity}
    return _made(
        of, initial, key, count, intervals, points, frames, warm_up, substeps, chunk,
        start,
    )  # fmt: skip


def _made(
    equation, initial, key, count, intervals, points, frames, warm_up, substeps, chunk,
    start,
) -> Trajectories:  # fmt: skip
    count, chunk = check_count("count", count), check_count("chunk", chunk)
    ends = {name: _interval(name, value) for name, value in intervals.items()}
    length = ends.get("length", (2 * np.pi,) * 2)
    parts, columns, name = [], [], ""
    for first in range(0, count, chunk):
        size = min(chunk, count - first)
        keys = prng.sample_keys(key, size, start=start + first)
        drawn = _drawn(keys, ends)
        made = equation(drawn)
        name = made.name
        solved = solve(
            made, initial(keys), drawn["dt"], frames, substeps=substeps,
            skip=warm_up, points=points,
        )  # fmt: skip
        parts.append(np.moveaxis(solved, 0, 1)[..., None].astype(np.float32))
        columns.append(drawn)
    drawn = {k: np.concatenate([part[k] for part in columns]) for k in columns[0]}
    lengths = drawn.pop("length", np.full(count, length[0]))
    settings = {"warm_up": warm_up, "substeps": substeps, "start": start, "key": [
        int(word) for word in np.ravel(jax.random.key_data(key))
    ]}  # fmt: skip
    return Trajectories(
        states=np.concatenate(parts),
        dt=drawn.pop("dt"),
        dx=lengths / points,
        parameters=drawn,
        equation=name,
        meta=settings | {name: list(pair) for name, pair in ends.items()},
    )


def _interval(name: str, value: Interval) -> tuple[float, float]:
    low, high = value if isinstance(value, (tuple, list)) else (value, value)
    check_range(name, low, 0, open_low=True)
    check_range(name, high, low)
    return float(low), float(high)


def _drawn(
    keys: SampleKeys, ends: dict[str, tuple[float, float]]
) -> dict[str, np.ndarray]:
    """A number in each interval for each trajectory, float64 [trajectory]."""
    found = {}
    with jax.enable_x64(True):
        for number, (name, (low, high)) in enumerate(sorted(ends.items())):
            draws = prng.uniform(prng.fold_in(keys, number), jnp.float64)
            found[name] = low + (high - low) * np.asarray(draws)
    return found


@functools.partial(jax.jit, static_argnames="points")
def _random_sines(keys: SampleKeys, *, points: int) -> Array:
    """Ten sines of one or two waves a domain, float64 [trajectory, points]."""
    x = 2 * jnp.pi * jnp.arange(points) / points

    def draw(key: Array) -> Array:
        one, two, three = jax.random.split(jax.random.fold_in(key, 1000), 3)
        amplitude = jax.random.uniform(one, (10, 1), jnp.float64, -0.5, 0.5)
        phase = jax.random.uniform(two, (10, 1), jnp.float64, 0, 2 * jnp.pi)
        waves = jax.random.randint(three, (10, 1), 1, 3)
        return jnp.sum(amplitude * jnp.sin(waves * x + phase), 0)

    return jax.vmap(draw)(keys)


@functools.partial(jax.jit, static_argnames="points")
def _random_vorticity(keys: SampleKeys, *, points: int) -> Array:
    """Vorticity of random flows of root mean square speed 1, float64 [.., x, y]."""
    k = np.hypot(
        np.fft.fftfreq(points, 1 / points)[:, None], np.arange(points // 2 + 1)
    )
    # energy k^4 exp(-2 (k/4)^2) is spread over a ring of k modes
    velocity = k**1.5 * np.exp(-((k / 4) ** 2)) * (k < points / 3)

    def draw(key: Array) -> Array:
        white = jax.random.normal(jax.random.fold_in(key, 1000), (points, points))
        modes = jnp.fft.rfft2(white) * velocity
        along = jnp.fft.irfft2(modes, (points, points))  # as strong as the speed
        scale = jnp.sqrt(jnp.mean(along**2))
        return jnp.fft.irfft2(modes * k, (points, points)) / scale

    return jax.vmap(draw)(keys)
