"""Loads the model of a finished run."""

import os
import pathlib
from typing import Any

from tmdjax import train
from tmdjax.core.types import ApplyFn, Params

MODELS = "models"


def model_folder(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
    """Where a run keeps the model of one arm and seed."""
    return workdir / MODELS / f"{arm}-seed{seed}"


def load(
    workdir: str | os.PathLike, arm: str = "main", seed: int | None = None
) -> tuple[ApplyFn, Params, dict[str, Any]]:
    """The network that a run trained.

    Args:
        workdir: of the run.
        arm: of the experiment.
        seed: None takes the lowest there is.

    Returns:
        ``apply_fn(params, *inputs)``, params, and meta: model spec, config, seed
        and metrics, and what the stage that trained it adds (a time grid, say). Of
        several trained stages it is the last.

    Raises:
        FileNotFoundError: no such run, arm or seed; what there is is named.
        CheckpointError: its files are damaged.
    """
    workdir = pathlib.Path(workdir)
    folders = sorted((workdir / MODELS).glob("*-seed*"))
    found = [folder.name for folder in folders if train.model_meta(folder) is not None]
    if seed is None:
        names = (name.rpartition("-seed") for name in found)
        seeds = [int(n) for owner, _, n in names if owner == arm and n.isdecimal()]
        seed = min(seeds, default=0)
    folder = model_folder(workdir, arm, seed)
    if f"{arm}-seed{seed}" not in found:
        remedy = (
            "This run finished without a model: none of its stages returns one."
            if (workdir / "summary.json").exists() and not found
            else "Finish the run first (the same command goes on where it stopped)."
        )
        raise FileNotFoundError(
            f"{workdir} holds no model of arm {arm!r} and seed {seed}; it holds: "
            f"{', '.join(found) or 'none'}. {remedy}"
        )
    return train.load_model(folder)
