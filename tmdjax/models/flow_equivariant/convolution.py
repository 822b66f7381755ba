"""Convolution of maps that wrap around, in the form that a backend is fast at."""

import functools

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice
from tmdjax.core.types import Array, Float

IMPLEMENTATIONS = ("auto", "shifts", "native")
PADDINGS = ("circular", "zeros")


def convolve(
    x: Float[Array, "*lead row column input"],
    kernel: Float[Array, "height width input output"],
    *,
    padding: str = "circular",
    implementation: str = "auto",
) -> Float[Array, "*lead row column output"]:
    """Cross-correlation of odd size, of the size of its input. No bias; no TF32.

    Args:
        x: maps or images, with any axes before (row, column, channel).
        kernel: its sides odd and at most twice those of x, plus 1.
        padding: what lies beyond the edges: 'circular', the other edge, or 'zeros'.
        implementation: 'shifts', shifted copies and one matrix product;
            'native', XLA's convolution; 'auto' is 'shifts' on a CPU, where gradients
            of native ones inside loops are slow, and 'native' elsewhere. They agree to
            rounding.

    Raises:
        ValueError: an unknown padding or implementation.
    """
    check_choice("padding", padding, PADDINGS)
    rows, columns = x.shape[-3:-1]
    x = _padded(x, kernel.shape[:2], padding)
    if choose(implementation) == "shifts":
        # Rows side by side, one product for all columns of the kernel, and the sum of
        # its shifted parts: a third of the copies of all nine windows side by side.
        height, width, _, outputs = kernel.shape
        shifted = [x[..., i : i + rows, :, :] for i in range(height)]
        weights = kernel.transpose(0, 2, 1, 3).reshape(-1, width * outputs)
        y = jnp.matmul(jnp.concatenate(shifted, -1), weights, precision="highest")
        parts = [
            y[..., j : j + columns, j * outputs : (j + 1) * outputs]
            for j in range(width)
        ]
        return functools.reduce(jnp.add, parts)
    flat = x.reshape(-1, *x.shape[-3:])
    y = jax.lax.conv_general_dilated(
        flat,
        kernel,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def mix_velocities(
    maps: Float[Array, "batch velocity row column channel"],
    kernel: Float[Array, "height width velocity velocity_out channel"],
    implementation: str = "auto",
) -> Float[Array, "batch velocity_out row column channel"]:
    """A circular convolution that mixes the velocity channels of every feature alone.

    Args:
        maps: latent maps.
        kernel: of odd sides.
        implementation: as of :func:`convolve`.
    """
    x = _padded(maps, kernel.shape[:2], "circular")
    if choose(implementation) == "shifts":
        shifted = jnp.concatenate([*_shifted(x, kernel.shape[:2])], 1)
        flat = kernel.reshape(-1, *kernel.shape[-2:])
        return jnp.einsum("bkrcd,kud->burcd", shifted, flat, precision="highest")
    channels, outputs = x.shape[-1], kernel.shape[3]
    grouped = x.transpose(0, 2, 3, 4, 1)
    grouped = grouped.reshape(*grouped.shape[:3], -1)
    weights = kernel.transpose(0, 1, 2, 4, 3).reshape(*kernel.shape[:3], -1)
    y = jax.lax.conv_general_dilated(
        grouped,
        weights,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        precision="highest",
    )
    y = y.reshape(*y.shape[:3], channels, outputs)
    return y.transpose(0, 4, 1, 2, 3)


def choose(implementation: str) -> str:
    """What 'auto' stands for on the default backend.

    Raises:
        ValueError: an unknown implementation.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation != "auto":
        return implementation
    return "shifts" if jax.default_backend() == "cpu" else "native"


def _padded(x: Array, sides: tuple[int, ...], padding: str) -> Array:
    ends = [(side // 2, side // 2) for side in sides]
    widths = [(0, 0)] * (x.ndim - 3) + ends + [(0, 0)]
    return jnp.pad(x, widths, mode="wrap" if padding == "circular" else "constant")


def _shifted(x: Array, sides: tuple[int, ...]):
    """The windows of a padded x that the entries of a kernel multiply, in its order."""
    rows, columns = x.shape[-3] - sides[0] + 1, x.shape[-2] - sides[1] + 1
    for i in range(sides[0]):
        for j in range(sides[1]):
            yield x[..., i : i + rows, j : j + columns, :]
