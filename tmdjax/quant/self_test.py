"""Whether a device rounds to 8 bits where it is told to, and multiplies in them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.quant.fp8 import cast_for_good
from tmdjax.quant.recipes import Precision

# Numbers, and what they are in fewer bits: a tie to even down (17) and up (19), numbers
# between two others, subnormal ones, and the largest.
_GIVEN = np.array([448, 17, 19, -0.3, 1 + 2**-9, 2**-9, 2**-10, 1.5 * 2**-10, 0])
_ROUNDED = {
    "float8_e4m3fn": [448, 16, 20, -0.3125, 1, 2**-9, 0, 2**-9, 0],
    "float8_e5m2": [448, 16, 20, -0.3125, 1, 2**-9, 2**-10, 1.5 * 2**-10, 0],
    "bfloat16": [448, 17, 19, -0.30078125, 1, 2**-9, 2**-10, 1.5 * 2**-10, 0],
}


@jax.jit
def _round_trips(x: Any) -> dict[str, Any]:
    return {name: cast_for_good(x, name).astype(jnp.float32) for name in _ROUNDED}


def check_rounding() -> None:
    """Rounds known numbers in a compiled program of the default backend, once.

    Products of 8-bit recipes call it when they are traced: what they say they round
    can then not be left as it was.

    Raises:
        RuntimeError: the program did not round as it was told to.
    """
    _check_rounding(jax.default_backend())


@functools.cache
def _check_rounding(backend: str) -> None:
    with jax.ensure_compile_time_eval():
        rounded = _round_trips(_GIVEN.astype(np.float32))
        found = {name: np.asarray(y) for name, y in rounded.items()}
    _compare(found, backend)


def _compare(found: dict[str, np.ndarray], backend: str) -> None:
    for name, wanted in _ROUNDED.items():
        wrong = found[name] != np.asarray(wanted, np.float32)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise RuntimeError(
                f"self-test of 8-bit products on backend {backend!r}: "
                f"{_GIVEN[first]:g} in {name} came back as {found[name][first]:g} and "
                f"not {wanted[first]:g}: the compiler left the rounding out, and every "
                f"result would be one of no quantisation. Set "
                f"XLA_FLAGS=--xla_allow_excess_precision=false, or use the recipes "
                f"'bf16' or 'fp32'."
            )


def has_fp8(device: Any) -> bool:
    """Whether a device multiplies float8 numbers in hardware.

    These are known to: GPUs of NVIDIA of compute capability 8.9 and above (Ada, Hopper,
    Blackwell), and TPUs of the seventh generation (Ironwood).

    Args:
        device: a ``jax.Device``, or what has its ``platform``, ``device_kind`` and (of
            a GPU) ``compute_capability``.
    """
    if device.platform == "tpu":
        kind = device.device_kind.replace(" ", "").upper()
        return kind.startswith(("TPUV7", "TPU7"))
    return _compute_capability(device) >= (8, 9)


def is_hopper(device: Any) -> bool:
    """Whether a device is a GPU of NVIDIA of compute capability 9.0.

    Args:
        device: as :func:`has_fp8` takes it.
    """
    return _compute_capability(device) == (9, 0)


def _compute_capability(device: Any) -> tuple[int, int]:
    """Of a GPU of NVIDIA; (0, 0) of any other device."""
    nvidia = "NVIDIA" in device.device_kind.upper()
    if device.platform not in ("gpu", "cuda") or not nvidia:
        return 0, 0
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return int(major), int(minor or 0)


def check_device(device: Any = None, *, allow_emulation: bool = False) -> None:
    """Before training or rollouts in 8 bits: the device can, and it does round.

    Args:
        device: a ``jax.Device``; None is the first of the default backend.
        allow_emulation: where the device has no float8 products, compute the same
            numbers in float32. This is for checks and for small models: it is slower
            than 'bf16'. 'fp8_block' is computed so on every device, unless its recipe
            has ``kernel='hopper'``.

    Raises:
        ValueError: a device without float8 products, which is named.
        RuntimeError: from :func:`check_rounding`.
    """
    device = jax.devices()[0] if device is None else device
    if not has_fp8(device) and not allow_emulation:
        raise ValueError(
            f"{device.device_kind!r} (platform {device.platform!r}) has no float8 "
            f"products; NVIDIA GPUs have them from compute capability 8.9, TPUs from "
            f"v7. Use the recipe 'bf16', or allow_emulation=True: the same numbers by "
            f"float32 products, slower than 'bf16'."
        )
    check_rounding()


def check_precision(precision: Precision, device: Any = None) -> bool:
    """Before training and rollouts: the device has the products of both recipes.

    Args:
        precision: recipes of rollouts and training, and whether 8 bits may be emulated.
        device: a ``jax.Device``; None is the first of the default backend.

    Returns:
        Whether products of 8 bits are emulated, in either recipe: computed in float32,
        as the device has none of its own, or none that the recipe uses (as of
        'fp8_block', see :func:`check_device`).

    Raises:
        ValueError: 8 bits on a device without float8 products, where emulation is not
            allowed; device and recipe are named.
        RuntimeError: from :func:`check_rounding`.
    """
    pair = {"rollout": precision.rollout, "train": precision.train}
    found = [side for side, recipe in pair.items() if recipe.float8]
    if not found:
        return False
    device = jax.devices()[0] if device is None else device
    try:
        check_device(device, allow_emulation=precision.allow_emulation)
    except ValueError as error:
        name = pair[found[0]].name
        raise ValueError(f"precision.{found[0]}={name!r}: {error}") from None
    used = all(pair[side].in_hardware(device) for side in found)
    return not (used and has_fp8(device))
