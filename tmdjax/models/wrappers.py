"""Networks of others as ``apply_fn(params, *inputs)``, under the time used here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from tmdjax.core.checks import check_range, first_few
from tmdjax.core.prng import check_key
from tmdjax.core.trees import flatten
from tmdjax.core.types import ApplyFn, Data, Params, Time


def from_nnx(module: Any) -> tuple[ApplyFn, Params]:
    """A flax.nnx module as ``(apply_fn, params)``, the contract of this project.

    The module itself is left alone: its parameters are copied, so that a train step may
    write over them. What else it holds (running statistics, say) stays as it is now.

    Args:
        module: an ``nnx.Module``, called as ``module(*inputs, **options)``.

    Returns:
        ``apply_fn(params, *inputs, key=None, **options)``, pure: without a key the
        module is in evaluation mode (``module.eval()``: no dropout, running averages);
        with a typed key it is in training mode, its random streams seeded by that key.
        And the parameters, a nested dict of arrays with string keys.

    Raises:
        TypeError: not an nnx module; at the call, a key that is not a typed one.
        ValueError: two parameters whose paths read alike; at the call, a key for a
            module with running statistics, whose updates would be lost, or parameters
            of another structure.

    Example:
        >>> from flax import nnx
        >>> apply_fn, params = from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> apply_fn(params, jax.numpy.ones((4, 3))).shape
        (4, 2)
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"module is of type {type(module).__name__}; give an instance of "
            f"nnx.Module (a linen module is a function by models.functional)."
        )
    graph, weights, rest = nnx.split(module, nnx.Param, ...)
    rest = jax.tree.map(jnp.asarray, rest)  # no longer the module's own variables
    flat: dict[tuple[str, ...], Any] = {}
    for path, variable in nnx.to_flat_state(weights):
        name = tuple(map(str, path))
        if name in flat:
            raise ValueError(
                f"two parameters are called {'/'.join(name)}; rename an attribute."
            )
        flat[name] = jnp.array(variable.get_value())
    params = traverse_util.unflatten_dict(flat)
    structure = jax.tree.structure(params)
    statistics = [
        "/".join(map(str, path))
        for path, variable in nnx.to_flat_state(rest)
        if isinstance(variable, nnx.BatchStat)
    ]

    def apply_fn(params: Params, *inputs: Any, key: Any = None, **options: Any) -> Any:
        if jax.tree.structure(params) != structure:
            own = {"/".join(path) for path in flat}
            given = {*flatten(params)}
            apart = [f"without {name}" for name in sorted(own - given)]
            apart += [f"with {name}" for name in sorted(given - own)]
            raise ValueError(
                f"params have another structure than the module: "
                f"{first_few(apart) or jax.tree.structure(params)}; give the "
                f"parameters that from_nnx returned, or others like them."
            )
        if key is not None:
            check_key(key)
            if statistics:
                raise ValueError(
                    f"a key means training mode, in which {', '.join(statistics)} "
                    f"would be updated, and a pure function cannot; leave the key "
                    f"out, or use a normalisation without running statistics."
                )
        leaves = traverse_util.flatten_dict(params)
        state = nnx.from_flat_state(
            [
                (path, variable.replace(leaves[tuple(map(str, path))]))
                for path, variable in nnx.to_flat_state(weights)
            ]
        )
        made = nnx.merge(graph, state, rest, copy=True)
        if key is None:
            made.eval()
        else:
            made.train()
            # a stream of stacked layers holds a key a layer
            nnx.reseed(made, policy="match_shape", **_streams(nnx, made, key))
        return made(*inputs, **options)

    return apply_fn, params


def _streams(nnx: Any, module: Any, key: Any) -> dict[str, Any]:
    """A key a random stream of the module, by name."""
    names = {
        node.tag
        for _, node in nnx.iter_graph(module)
        if isinstance(node, nnx.RngStream)
    }
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(sorted(names))}


def rectified_flow(apply_fn: ApplyFn, eps: float = 1e-3) -> ApplyFn:
    """A rectified-flow network (0 is noise, u = data - noise) as a velocity here.

    Its time input is 999 (tau (1 - eps) + eps) with tau = 1 - t, that is
    999 (1 - (1 - eps) t): never 0, where such networks were not trained. The remap
    is the network's alone; solvers and grids step in the t of this project.

    Args:
        apply_fn: ``(params, x, time, *inputs) -> u``, time [batch] in [999 eps, 999].
        eps: in [0, 1).

    Returns:
        ``(params, x, t, *inputs) -> v``, v = -u.

    References:
        arXiv 2209.03003 and the code of arXiv 2312.16414.
    """
    check_range("eps", eps, 0, 1, open_high=True)
    return functools.partial(_rectified_flow, apply_fn, eps)


def _rectified_flow(
    apply_fn: ApplyFn, eps: float, params: Params, x: Data, t: Time, *inputs: Any
) -> Any:
    return -apply_fn(params, x, 999 * (1 - (1 - eps) * t), *inputs)
