"""A trained network on disk: what it is, its parameters, what it was trained on."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax import models
from tmdjax.core.types import ApplyFn, Params
from tmdjax.train.checkpoint import CheckpointError, Checkpoints


def save_model(
    directory: str | os.PathLike,
    spec: dict[str, Any],
    params: Params,
    meta: dict[str, Any] | None = None,
) -> None:
    """Writes parameters with the spec that rebuilds their network.

    Args:
        directory: made if absent; an earlier model in it is replaced.
        spec: as :func:`tmdjax.models.build` takes it, JSON-able.
        params: nested dict.
        meta: JSON-able: config, data shape, grid, metrics...
    """
    extra = {"spec": spec, "meta": meta or {}}
    Checkpoints(directory, keep_last=1).save(0, jax.device_get(params), extra)


def load_model(
    directory: str | os.PathLike,
) -> tuple[ApplyFn, Params, dict[str, Any]]:
    """Reads what :func:`save_model` wrote.

    Returns:
        ``apply_fn(params, *inputs)``, params on the default device, and meta.

    Raises:
        CheckpointError: there is no model, or its files are damaged.
    """
    restored = Checkpoints(directory).restore()
    if restored is None:
        raise CheckpointError(f"there is no whole model in {os.fspath(directory)}.")
    spec, meta = restored.extra["spec"], restored.extra["meta"]
    params = jax.tree.map(jnp.asarray, restored.tree)
    return models.functional(models.build(spec)), params, {**meta, "spec": spec}


def model_meta(directory: str | os.PathLike) -> dict[str, Any] | None:
    """The meta of a stored model, or None; its parameters are not read."""
    extra = Checkpoints(directory).peek()
    return None if extra is None else {**extra["meta"], "spec": extra["spec"]}
