"""A trained network on disk: what it is, its parameters, what it was trained on."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax import models
from tmdjax.core.types import ApplyFn, Params
from tmdjax.train.checkpoint import CheckpointError, Checkpoints, write_json

_SPEC = "model.json"


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
    folder = pathlib.Path(directory)
    Checkpoints(folder, keep_last=1).save(0, params)
    write_json(folder / _SPEC, {"spec": spec, "meta": meta or {}})


def load_model(
    directory: str | os.PathLike,
) -> tuple[ApplyFn, Params, dict[str, Any]]:
    """Reads what :func:`save_model` wrote.

    Returns:
        ``apply_fn(params, *inputs)``, params on the default device, and meta.

    Raises:
        CheckpointError: there is no model, or its files are damaged.
    """
    folder = pathlib.Path(directory)
    if not (folder / _SPEC).is_file():
        raise CheckpointError(f"there is no model in {folder} (no {_SPEC}).")
    described = json.loads((folder / _SPEC).read_text())
    restored = Checkpoints(folder).restore(step=0)
    apply_fn = models.functional(models.build(described["spec"]))
    params = jax.tree.map(jnp.asarray, restored.tree)
    return apply_fn, params, {"spec": described["spec"], **described["meta"]}
