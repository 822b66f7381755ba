"""Trees of arrays: paths, sizes, rows, hashes."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
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


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """True if no floating leaf holds NaN or infinity (traceable)."""
    leaves = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


def select(condition: Bool[Array, ""], on_true: PyTree, on_false: PyTree) -> PyTree:
    """Leaf-wise ``where`` with one scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def take(tree: PyTree, rows: Any) -> PyTree:
    """Rows of every leaf of a tree of [samples, ...] arrays."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tree)


def in_every_row(row: PyTree, like: PyTree) -> PyTree:
    """A tree of [...] leaves in every row of a tree of [batch, ...], in its dtypes."""
    return jax.tree.map(
        lambda leaf, one: jnp.broadcast_to(jnp.asarray(one, leaf.dtype), leaf.shape),
        like,
        row,
    )


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
