"""Equations of the benchmarks: Kuramoto-Sivashinsky, Burgers, Kolmogorov flow.

Each has a periodic domain, two thirds of its modes take part in products (Orszag's
rule), and its coefficients may differ from one trajectory of a batch to the next.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array
from tmdjax.data.pde.etdrk4 import Equation


def kuramoto_sivashinsky(
    points: int, length: Any = 64.0, viscosity: Any = 1.0
) -> Equation:
    """u_t + u u_x + u_xx + viscosity u_xxxx = 0, chaotic in long domains.

    Args:
        points: of the grid, even; a warning says where they are too few.
        length: of the domain, > 0: a scalar or [batch].
        viscosity: > 0, a scalar or [batch].

    Raises:
        TypeError, ValueError: a number out of range, or lengths that differ.
    """
    length, viscosity = _per_trajectory(length=length, viscosity=viscosity)
    q, keep = _waves(points, length)
    cutoff = (q * keep).max(1)
    needed = 1.5 / np.sqrt(viscosity)  # the linear part damps beyond viscosity^-1/2
    if np.any(cutoff < needed):
        i = int(np.argmin(cutoff / needed))
        warnings.warn(
            f"points={points} of a domain of {length[i]:g} keep wavenumbers up to "
            f"{cutoff[i]:.3g} a unit of length, and the spectrum of viscosity "
            f"{viscosity[i]:g} is cut below {needed[i]:.3g}; use more points.",
            stacklevel=2,
        )
    linear = q**2 - viscosity[:, None] * q**4
    factors = {"keep": keep, "convection": -0.5j * q * keep}
    return Equation("kuramoto_sivashinsky", linear, _convection, factors, points, 1)


def burgers(points: int, length: Any = 2 * np.pi, viscosity: Any = 0.05) -> Equation:
    """u_t + u u_x = viscosity u_xx, where waves steepen into shocks that decay.

    Args:
        points: of the grid, even.
        length: of the domain, > 0: a scalar or [batch].
        viscosity: > 0, a scalar or [batch].

    Raises:
        TypeError, ValueError: a number out of range, or lengths that differ.
    """
    length, viscosity = _per_trajectory(length=length, viscosity=viscosity)
    q, keep = _waves(points, length)
    factors = {"keep": keep, "convection": -0.5j * q * keep}
    linear = -viscosity[:, None] * q**2
    return Equation("burgers", linear, _convection, factors, points, 1)


def kolmogorov_flow(
    points: int,
    *,
    length: Any = 2 * np.pi,
    viscosity: Any = 1e-3,
    drag: Any = 0.1,
    force: Any = 1.0,
    force_mode: int = 4,
) -> Equation:
    """Vorticity of a flow in two dimensions that is pushed by a sine.

        w_t + u . grad w = viscosity laplace w - drag w - m force cos(m y)

    for m = 2 pi force_mode / length: the velocity u is pushed by (force sin(m y), 0).
    Fields are [batch, x, y]; w = dv/dx - du/dy for the velocity (u, v).

    Args:
        points: of each side of the grid, even.
        length: of each side of the domain, > 0: a scalar or [batch].
        viscosity: >= 0, a scalar or [batch].
        drag: >= 0, a scalar or [batch].
        force: amplitude of the push, a scalar or [batch].
        force_mode: its waves in the domain, >= 1.

    Raises:
        TypeError, ValueError: a number out of range, or lengths that differ.

    References:
        Kochkov et al. 2021 (viscosity 1e-3, drag 0.1, mode 4).
    """
    check_count("force_mode", force_mode)
    check_range("force_mode", force_mode, 1, points // 3)
    length, viscosity, drag, force = _per_trajectory(
        length=length, viscosity=viscosity, drag=drag, force=force, positive=("length",)
    )
    waves = _plane(points, length)
    kx, ky, square, keep = (waves[n] for n in ("x", "y", "square", "keep"))
    number = 2 * np.pi * force_mode / length
    push = np.zeros(square.shape)
    push[:, 0, force_mode] = -number * force * points**2 / 2
    over = keep / np.where(square, square, np.inf)
    factors = {
        **{"u": 1j * ky * over, "v": -1j * kx * over, "push": push},
        **{"x": 1j * kx * keep, "y": 1j * ky * keep, "keep": keep},
    }
    linear = -viscosity[:, None, None] * square - drag[:, None, None]
    return Equation("kolmogorov_flow", linear, _advection, factors, points, 2)


def velocity_of(vorticity: Any, length: float = 2 * np.pi) -> np.ndarray:
    """The flow without divergence or mean that has a vorticity.

    Args:
        vorticity: [..., x, y], w = dv/dx - du/dy.
        length: of each side of the domain.

    Returns:
        float64 [..., x, y, 2], the velocity (u, v).
    """
    vorticity = np.asarray(vorticity, np.float64)
    points = vorticity.shape[-1]
    waves = _plane(points, np.array([length]))
    over = 1j / np.where(waves["square"], waves["square"], np.inf)[0]
    inner = np.abs(waves["y"]) < np.pi * points / length  # Nyquist has no derivative
    inner = (inner & (np.abs(waves["x"]) < np.pi * points / length))[0]
    modes = np.fft.rfft2(vorticity) * over * inner
    parts = [np.fft.irfft2(k * modes) for k in (waves["y"][0], -waves["x"][0])]
    return np.stack(parts, -1)


def _convection(v: Array, factors: Mapping[str, Any]) -> Array:
    """-u u_x of modes."""
    points = 2 * (v.shape[-1] - 1)
    u = jnp.fft.irfft(v * factors["keep"], points)
    return factors["convection"] * jnp.fft.rfft(u * u)


def _advection(v: Array, factors: Mapping[str, Any]) -> Array:
    """-u . grad w + push of modes of the vorticity w."""
    sizes = (v.shape[-2], v.shape[-2])

    def field(factor: str) -> Array:
        return jnp.fft.irfft2(v * factors[factor], sizes)

    product = field("u") * field("x") + field("v") * field("y")
    return factors["push"] - factors["keep"] * jnp.fft.rfft2(product)


def _waves(points: int, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wavenumbers [batch, mode], and 1 for those that take part in products."""
    if check_count("points", points, 4) % 2:
        raise ValueError(f"points={points} must be even.")
    mode = np.arange(points // 2 + 1)
    keep = (mode < points / 3).astype(np.float64)[None]
    return 2 * np.pi * mode / length[:, None], keep


def _plane(points: int, length: np.ndarray) -> dict[str, np.ndarray]:
    """Wavenumbers along x and y, their squared length, and a mask, [batch, x, y]."""
    q, keep = _waves(points, length)
    mode = np.fft.fftfreq(points, 1 / points)
    kx = (2 * np.pi / length)[:, None, None] * mode[:, None]
    kept = (np.abs(mode) < points / 3).astype(np.float64)[:, None] * keep[:, None]
    square = kx**2 + q[:, None] ** 2
    x, y = np.broadcast_arrays(kx, q[:, None])
    return {"x": x, "y": y, "square": square, "keep": kept}


def _per_trajectory(
    positive: tuple[str, ...] = ("length", "viscosity"), **values: Any
) -> list[np.ndarray]:
    """Scalars and [batch] arrays as [batch] or [1] each."""
    arrays = {k: np.atleast_1d(np.asarray(v, np.float64)) for k, v in values.items()}
    count = max(len(array) for array in arrays.values())
    for name, array in arrays.items():
        if array.ndim != 1 or len(array) not in (1, count):
            raise ValueError(
                f"{name} has shape {array.shape}; give one number, or one a trajectory "
                f"({count})."
            )
        if name == "force":
            continue
        check_range(name, float(array.min()), 0, open_low=name in positive)
        check_range(name, float(array.max()), 0, np.inf, open_high=True)
    return [np.broadcast_to(array, (count,)) for array in arrays.values()]
