"""tmdjax: flow-matching post-training and RL as pure JAX functions.

Time runs from noise to data: ``t = 1`` is noise, ``t = 0`` is data, and a
velocity is ``v = x_noise - x_data`` (see :mod:`tmdjax.core.conventions`).

Sub-packages are imported on first use, so ``import tmdjax`` costs little more
than importing jax::

    import tmdjax

    table = tmdjax.flows.make_table("ode", tmdjax.flows.uniform_grid(8))
    x = tmdjax.flows.rollout(keys, velocity, noise, table, store=False)
    apply_fn, params, meta = tmdjax.load("runs/boss-cpu")
"""

import importlib
import signal
import sys
from typing import Any

__version__ = "0.1.0"

if sys.argv[0] == "-m" and any(a.startswith("tmdjax.") for a in sys.orig_argv):
    # a command of ours that is still imported has nothing to say or save
    signal.signal(signal.SIGINT, signal.SIG_DFL)

_SUBPACKAGES = (
    "core",
    "data",
    "domains",
    "envs",
    "flows",
    "generation",
    "harness",
    "metrics",
    "models",
    "quant",
    "rewards",
    "rl",
    "runtime",
    "systems",
    "train",
)

__all__ = ["__version__", "load", *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"tmdjax.{name}")
    if name == "load":
        return importlib.import_module("tmdjax.harness.load").load
    raise AttributeError(f"module 'tmdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
