"""Checkpoints in 8 bits: float8 weights beside scales, read as the numbers they mean.

A weight times the scale of its group is the number that was trained. Which format it
is stands in config.json; how large the groups are, in the shape of each scale.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import brief, check_count, first_few

_LOGGER = logging.getLogger(__name__)
KEYS = ("quantization_config", "compression_config")
"""Where config.json describes a quantisation; the second is an older name."""

UNDERSTOOD = (
    "quant_method 'fp8': float8 weights with a weight_scale_inv or weight_scale of a "
    "tensor, of its rows, or of blocks of weight_block_size; quant_method "
    "'compressed-tensors': symmetric float weights of 8 bits, strategy tensor, channel "
    "or block"
)
_REMEDY = (
    f"Understood: {UNDERSTOOD}. Take the checkpoint it was made of, or load it with "
    f"transformers, dequantize() and save_pretrained."
)
_SCALES = ("weight_scale_inv", "weight_scale")  # both multiply
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_STRATEGIES = ("tensor", "channel", "block")
_FORMATS = ("float-quantized", "naive-quantized", None)

# Tensors that are not read: scales by which an engine that serves the checkpoint rounds
# activations and its cache. Here a recipe finds those of activations as it runs, and
# the cache has 16 bits or more.
_OF_ACTIVATIONS = (
    *("input_scale", "activation_scale", "output_scale"),
    *("q_scale", "k_scale", "v_scale", "kv_scale"),
)
# Keys that change no weight: of activations and caches; which modules have 8 bits, and
# in which dtype, stands in the tensors themselves; notes of the program that wrote it.
_NO_EFFECT = (
    *("activation_scheme", "modules_to_not_convert", "ignored_layers", "ignore"),
    *("fmt", "scale_fmt", "kv_cache_scheme", "quantization_status", "dequantize"),
    *("global_compression_ratio", "version"),
)


@dataclasses.dataclass(frozen=True)
class Float8:
    """What a configuration says of the weights.

    Attributes:
        block: rows [out] and columns [in] of a weight that share a scale, or None where
            those of a tensor or of a row do.
    """

    block: tuple[int, int] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled:
    """A weight [out, in] that is computed where it is read: ``np.asarray`` of it.

    Attributes:
        values: float8 [out, in].
        scale: float32 [out groups, in groups].
        block: rows and columns of a group; the last ones may be smaller.
    """

    values: np.ndarray
    scale: np.ndarray
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Float32, which holds every float8 and its scale."""
        return np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Values times scales, computed anew at each call."""
        found = self.values.astype(np.float32)
        height, width = self.block
        for i, row in enumerate(self.scale):
            each = np.repeat(row, width)[: self.shape[1]]
            found[i * height : (i + 1) * height] *= each
        return found if dtype is None else found.astype(dtype, copy=False)


def without_quantisation(
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], Float8 | None]:
    """The rest of a config.json, and what it says of 8-bit weights, None for nothing.

    Raises:
        ValueError: a quantisation that is not understood; what is, is listed.
    """
    rest = {key: value for key, value in settings.items() if key not in KEYS}
    found = {key: settings[key] for key in KEYS if settings.get(key)}
    if not found:
        return rest, None
    key, given = next(iter(found.items()))
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} both describe weights; keep one.")
    if not isinstance(given, Mapping):
        raise ValueError(f"{key}={brief(given)} is no mapping. {_REMEDY}")
    method = given.get("quant_method")
    read = {"fp8": _fp8, "compressed-tensors": _compressed}.get(str(method))
    if read is None:
        raise ValueError(
            f"{key}: quant_method={brief(method)} is not understood. {_REMEDY}"
        )
    block, known = read(key, given)
    for name, value in given.items():
        if name not in (*known, *_NO_EFFECT) and value not in (None, False, [], {}, ""):
            raise ValueError(
                f"{key}: {name}={brief(value)} is not understood. {_REMEDY}"
            )
    return rest, Float8(block)


def _fp8(key: str, given: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    size = given.get("weight_block_size")
    block = None if size is None else _block(f"{key}: weight_block_size", size)
    return block, ("quant_method", "weight_block_size")


def _compressed(key: str, given: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    groups = given.get("config_groups") or {}
    kind, blocks = given.get("format"), set()
    if kind not in _FORMATS or not isinstance(groups, Mapping):
        raise ValueError(
            f"{key}: format={brief(kind)} with config_groups={brief(groups)} is not "
            f"understood. {_REMEDY}"
        )
    for name, group in groups.items():
        weights = (group.get("weights") or {}) if isinstance(group, Mapping) else group
        if not isinstance(weights, Mapping):
            raise ValueError(
                f"{key}: {name}={brief(group)} of config_groups is not understood. "
                f"{_REMEDY}"
            )
        wanted = {"type": ("float",), "num_bits": (8,), "strategy": _STRATEGIES}
        wanted["symmetric"] = (True, None)
        for field, allowed in wanted.items() if weights else ():
            if weights.get(field) not in allowed:
                raise ValueError(
                    f"{key}: weights of {name} have {field}="
                    f"{brief(weights.get(field))}, which is not understood. {_REMEDY}"
                )
        if weights.get("strategy") == "block":
            where = f"{key}: block_structure of {name}"
            blocks.add(_block(where, weights.get("block_structure", "absent")))
    if len(blocks) > 1:
        raise ValueError(
            f"{key} has groups of blocks {sorted(map(list, blocks))}; all weights need "
            f"one size. {_REMEDY}"
        )
    sparse = given.get("sparsity_config") or {}
    known = ("quant_method", "config_groups", "format")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") == "dense":
        known += ("sparsity_config",)
    return next(iter(blocks), None), known


def _block(where: str, given: Any) -> tuple[int, int]:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError(
            f"{where}={brief(given)} is no pair [rows, columns]. {_REMEDY}"
        )
    rows, columns = (check_count(where, size) for size in given)
    return rows, columns


def dequantised(tensors: Mapping[str, Any], found: Float8) -> dict[str, Any]:
    """Tensors of a checkpoint with numbers in place of 8 bits and scales.

    Scales of activations and of caches are left out: they belong to the engine that a
    checkpoint was made for, and training has none.

    Args:
        tensors: arrays by name; those of a weight and of its scale may come from two
            files. Scales are of any floating dtype, of shape [] or [1] (a tensor),
            [out] or [out, 1] (its rows), or [⌈out / rows⌉, ⌈in / columns⌉] (blocks).
        found: what the configuration says.

    Returns:
        Tensors by name; weights that had scales are :class:`Scaled`.

    Raises:
        ValueError: an 8-bit weight without its scale; a scale without its weight, of a
            shape that does not fit, of integers (such as exponents alone), or with
            numbers that are negative or not finite; all by name.
    """
    rest, problems, skipped = dict(tensors), [], []
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        if leaf in _OF_ACTIVATIONS:
            skipped.append(name)
            del rest[name]
        elif leaf in _SCALES:
            del rest[name]
            weight = f"{stem}.weight"
            kind = getattr(tensors.get(weight), "dtype", "absent")
            if str(kind) not in _FLOAT8:
                problems.append(f"{name} scales {weight}, which is {kind}")
    for name, values in tensors.items():
        if name not in rest or str(values.dtype) not in _FLOAT8:
            continue
        scales = [f"{name.rpartition('.')[0]}.{suffix}" for suffix in _SCALES]
        given = [scale for scale in scales if scale in tensors]
        if len(given) != 1 or not name.endswith(".weight"):
            problems.append(
                f"{name} is {values.dtype} and has {' and '.join(given) or 'no scale'}"
            )
            continue
        scale = np.asarray(tensors[given[0]])
        wide = scale.astype(np.float32)
        block = _group_of(values.shape, scale.shape, found.block)
        if block is None:
            problems.append(
                f"{given[0]} has shape {list(scale.shape)}, which does not fit {name} "
                f"{list(values.shape)} {_wanted(values.shape, found.block)}"
            )
        elif not jnp.issubdtype(scale.dtype, jnp.floating):
            problems.append(f"{given[0]} is {scale.dtype}, expected floating numbers")
        elif not ((0 <= wide) & (wide < np.inf)).all():
            problems.append(f"{given[0]} has numbers that are negative or not finite")
        else:
            rows = -(-values.shape[0] // block[0])
            rest[name] = Scaled(values, wide.reshape(rows, -1), block)
    if problems:
        raise ValueError(
            f"{len(problems)} tensor(s) of the 8-bit checkpoint do not fit: "
            f"{first_few(sorted(problems))}. Take configuration and tensors of one "
            f"checkpoint."
        )
    if skipped:
        _LOGGER.info(
            "%d scales of activations and caches are not read (%s): recipes find "
            "their own",
            len(skipped),
            first_few(sorted(skipped), 3, ", "),
        )
    return rest


def _group_of(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale, by the scale's shape.

    Args:
        shape: of the weight.
        scales: the shape of its scale.
        block: of the configuration, or None.

    Returns:
        None where the scale does not fit.
    """
    if len(shape) != 2:
        return None
    rows, columns = shape
    if block is not None:
        fits = scales == (-(-rows // block[0]), -(-columns // block[1]))
        return block if fits else None
    if scales in ((), (1,), (1, 1)):
        return max(rows, 1), max(columns, 1)
    return (1, max(columns, 1)) if scales in ((rows,), (rows, 1)) else None


def _wanted(shape: tuple[int, ...], block: tuple[int, int] | None) -> str:
    if len(shape) != 2:
        return "(a matrix is wanted)"
    if block is None:
        return f"(wanted: [], [1], [{shape[0]}] or [{shape[0]}, 1])"
    groups = [-(-size // length) for size, length in zip(shape, block)]
    return f"in blocks of {list(block)} (wanted: {groups})"
