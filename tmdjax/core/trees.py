"""Trees of arrays: paths, sizes, rows, hashes."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.dtypes
import jax.numpy as jnp
import numpy as np

from tmdjax.core.types import Array, Bool, PyTree


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree key path as 'a/b/0'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path name, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` whose function receives the path name first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest
    )


def count(tree: PyTree) -> int:
    """Number of scalars in all leaves."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves (arrays or shape structs)."""
    return sum(
        int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def layout(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of all leaves by path name, such as 'float32[3, 4]'."""
    return {
        name: f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for name, leaf in flatten(tree).items()
    }


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """True if no floating leaf holds NaN or infinity (traceable)."""
    bad = [
        jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    # XLA computes cheap scalars once more in everything that depends on them, but no
    # root: a step that selects by this would else grow as the square of the leaves.
    return jnp.sqrt(sum(bad, jnp.float32(0))) == 0


def select(condition: Bool[Array, ""], on_true: PyTree, on_false: PyTree) -> PyTree:
    """Leaf-wise ``where`` with one scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def take(tree: PyTree, rows: Any) -> PyTree:
    """Rows of every leaf of a tree of [samples, ...] arrays, on the device.

    Args:
        tree: of arrays, typed keys among them.
        rows: an integer, or integers [rows].
    """
    return _taken(tree, rows) if jax.tree.leaves(tree) else tree


# Outside jit it is one program, and not some for each leaf.
@functools.partial(jax.jit, inline=True)
def _taken(tree: PyTree, rows: Any) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def in_every_row(row: PyTree, like: PyTree) -> PyTree:
    """A tree of [...] leaves in every row of a tree of [batch, ...].

    Args:
        row: leaves [...], such as a null condition; one number fills a row.
        like: leaves [batch, ...], such as a condition.

    Returns:
        Leaves [batch, ...] in the dtypes of ``like``; integers in a wider one where
        theirs does not hold the row's (a null class of 300 beside classes in uint8).

    Raises:
        ValueError: a row that the other dtype cannot hold: a fraction beside integers,
            an integer that a float would round, or a float that would become infinite;
            a row of another shape, which would be broadcast without a word.
    """
    return jax.tree.map(
        lambda leaf, one: jnp.broadcast_to(_beside(one, leaf), leaf.shape), like, row
    )


def _beside(one: Any, leaf: Any) -> Array:
    """A row in a dtype that holds both it and the leaf beside it."""
    one = one if isinstance(one, jax.Array) else np.asarray(one)
    if one.shape not in ((), leaf.shape[1:], (1, *leaf.shape[1:])):
        raise ValueError(
            f"the null condition has shape {one.shape}, a row of the condition "
            f"{leaf.shape[1:]}; give one without the batch axis."
        )
    kept, dtype = np.dtype(leaf.dtype), np.dtype(leaf.dtype)
    traced = isinstance(one, jax.core.Tracer)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.issubdtype(one.dtype, jnp.integer):
        if traced or not _holds(kept, one):
            wide = jnp.promote_types(kept, jax.dtypes.canonicalize_dtype(one.dtype))
            dtype = jax.dtypes.canonicalize_dtype(wide)
    floats = jnp.issubdtype(dtype, jnp.floating)
    fits = (floats or one.dtype == dtype) if traced else _holds(dtype, one)
    if traced and jnp.issubdtype(dtype, jnp.integer):
        fits = jnp.issubdtype(one.dtype, jnp.integer)
    if not fits:
        value = "" if traced else f" ({np.asarray(one).ravel()[:3].tolist()} ...)"
        raise ValueError(
            f"the null condition is {one.dtype}{value}, the condition {kept}, which "
            f"cannot hold it. Give the null in that dtype (a class as an integer), or "
            f"the condition in a wider one."
        )
    return jnp.asarray(one, dtype)


def _holds(dtype: Any, values: Any) -> bool:
    """Whether concrete values stay themselves in a dtype (floats: finite)."""
    values = np.asarray(values)
    with np.errstate(all="ignore"):
        there = values.astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating) and values.dtype.kind in "iu":
        return bool(np.array_equal(there.astype(np.float64), values))
    if jnp.issubdtype(dtype, jnp.floating):
        # numpy: what jnp gives inside a compiled program has no value
        return bool(np.array_equal(np.isfinite(there), np.isfinite(values)))
    return bool(np.array_equal(there, values))


def in_float32(tree: PyTree) -> PyTree:
    """Floating leaves in float32, or in their own dtype where that is wider."""

    def widened(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(widened, tree)


def content_hash(tree: PyTree) -> str:
    """SHA-256 over paths, shapes, dtypes and bytes of all leaves (on the host).

    Raises:
        TypeError: a leaf holds Python objects, whose bytes are addresses.
    """
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    for name, leaf in sorted(
        ((jax.tree_util.keystr(path), leaf) for path, leaf in leaves),
        key=lambda x: x[0],
    ):
        array = np.asarray(leaf)
        if array.dtype.hasobject:
            raise TypeError(
                f"{name} has dtype {array.dtype}; only numbers have a content hash."
            )
        digest.update(f"{name}|{array.shape}|{array.dtype}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
