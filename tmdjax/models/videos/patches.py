"""Videos cut into patches, and the rotary positions of a grid of them."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tmdjax.core.types import Array, Float

Size = tuple[int, int, int]
"""Frames, rows and columns."""


def rotary_tables(
    grid: Sequence[int], head_dim: int
) -> tuple[Float[Array, "position angle"], Float[Array, "position angle"]]:
    """Cosines and sines of the rotary angles of a grid of patches.

    Of the ``head_dim / 2`` angles of a position, columns and rows have
    ``head_dim // 6`` each and frames, which come first, the others. Angle i of an
    axis with d features is p 10000^(-2i / d), p the index of the patch along it.

    Args:
        grid: patches along (frames, rows, columns).
        head_dim: width of a head, even and at least 6.

    Returns:
        Two float32 arrays [position, head_dim / 2], columns running fastest; angles
        are taken in float64 on the host, one axis at a time.

    Raises:
        ValueError: a head_dim that leaves an axis without a whole pair.

    References:
        arXiv 2104.09864; three axes as in arXiv 2503.20314.
    """
    check_head_dim(head_dim)
    side = 2 * (head_dim // 6)
    tables: list[list[Array]] = [[], []]
    for axis, (count, width) in enumerate(
        zip(grid, (head_dim - 2 * side, side, side), strict=True)
    ):
        frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
        angles = np.arange(count)[:, None] * frequencies
        shape = [1, 1, 1, width // 2]
        shape[axis] = count
        for table, values in zip(tables, (np.cos(angles), np.sin(angles))):
            # Spread on the device: a program then holds one axis, not the grid.
            along = jnp.asarray(values.astype(np.float32)).reshape(shape)
            table.append(jnp.broadcast_to(along, (*grid, width // 2)))
    cos, sin = (jnp.concatenate(t, -1).reshape(-1, head_dim // 2) for t in tables)
    return cos, sin


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError unless each of the three axes gets whole pairs."""
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"head_dim={head_dim} must be even and at least 6: rotary positions turn "
            f"pairs of features, at least one pair for each of frames, rows and "
            f"columns."
        )


def rotate_pairs(
    x: Float[Array, "batch position heads head_dim"],
    cos: Float[Array, "position angle"],
    sin: Float[Array, "position angle"],
) -> Float[Array, "batch position heads head_dim"]:
    """Rotates the neighbouring pairs (2k, 2k + 1) by angle k, in float32."""
    x = x.astype(jnp.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape)


def patchify_video(
    x: Float[Array, "batch frame height width channel"], patch_size: Sequence[int]
) -> Float[Array, "batch position features"]:
    """Cuts videos into boxes, frame by frame and row by row.

    Args:
        x: videos [batch, frame, height, width, channel].
        patch_size: (frames, rows, columns) of a box; they divide those of x.

    Returns:
        [batch, position, p_f p_h p_w channel]; inside a box the order is frame, row,
        column, channel, the channel fastest.

    Raises:
        ValueError: x is no batch of videos, or patch_size does not divide its sizes.
    """
    if x.ndim != 5:
        raise ValueError(
            f"x has shape {x.shape}; give videos [batch, frame, height, width, "
            f"channel]."
        )
    batch, *size, channel = x.shape
    boxes = patch_grid(size, patch_size)
    split = [n for pair in zip(boxes, patch_size) for n in pair]
    x = x.reshape(batch, *split, channel).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, np.prod(boxes), np.prod(patch_size) * channel)


def unpatchify_video(
    tokens: Float[Array, "batch position features"],
    patch_size: Sequence[int],
    size: Sequence[int],
) -> Float[Array, "batch frame height width channel"]:
    """The inverse of :func:`patchify_video`.

    Args:
        tokens: [batch, position, p_f p_h p_w channel].
        patch_size: (frames, rows, columns) of a box.
        size: (frames, height, width) of the videos.

    Raises:
        ValueError: the boxes do not fill a video of that size.
    """
    boxes = patch_grid(size, patch_size)
    batch, positions, features = tokens.shape
    if positions != np.prod(boxes) or features % np.prod(patch_size):
        raise ValueError(
            f"tokens have shape {tokens.shape}; a video of {_times(size)} (frames x "
            f"height x width) in patches of {_times(patch_size)} needs "
            f"{np.prod(boxes)} positions and a multiple of {np.prod(patch_size)} "
            f"features."
        )
    x = tokens.reshape(batch, *boxes, *patch_size, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *size, -1)


def patch_grid(size: Sequence[int], patch_size: Sequence[int]) -> Size:
    """Patches along (frames, rows, columns) of a video of that size.

    Raises:
        ValueError: patch_size does not divide it.
    """
    if any(n % p for n, p in zip(size, patch_size, strict=True)):
        raise ValueError(
            f"patch_size={_times(patch_size)} does not divide a video of "
            f"{_times(size)} (frames x height x width)."
        )
    frames, rows, columns = (n // p for n, p in zip(size, patch_size))
    return frames, rows, columns


def _times(size: Sequence[int]) -> str:
    return " x ".join(str(n) for n in size)
