"""Low-rank adapters of decoders as folders in the layout of the PEFT library."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import brief, check_range, first_few
from tmdjax.core.files import write_together
from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.checkpoints.decoder import hf_module, param_shapes
from tmdjax.models.checkpoints.layout import (
    Folder,
    Leaf,
    encode_json,
    older_weights,
    params_from_tensors,
    read_json,
    read_weights,
)
from tmdjax.models.checkpoints.safetensors import encode_safetensors
from tmdjax.models.decoder.config import DecoderConfig

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."

# Settings that leave a trained adapter what it is, whatever their value.
_NO_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "peft_version", "lora_dropout", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of the start
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"),
    *("qalora_group_size", "runtime_config"),
)
# Settings of parts that adapters here lack, and their values of no effect. A start of
# another name ('pissa', 'olora', 'corda', 'loftq', 'lora_ga') may have changed the
# base, to which the file belongs then.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Settings that are scales.
_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# What says which modules have an adapter, and a switch: their types, in words too.
_KINDS: dict[str, tuple[type, str]] = {
    "target_modules": (str, "a regular expression, or a list of names of modules"),
    "exclude_modules": (str, "a regular expression, or a list of names of modules"),
    "layers_to_transform": (int, "the number of a layer, or a list of them"),
    "use_rslora": (bool, "true or false"),
}
_OFF = (None, False, [], {}, "")


def load_adapters(
    folder: Folder, config: DecoderConfig
) -> tuple[dict[str, Any], float]:
    """Reads low-rank adapters in the layout of the PEFT library.

    Args:
        folder: with adapter_model.safetensors, or the shards that its index names, and
            adapter_config.json.
        config: of the decoder they belong to.

    Returns:
        Adapters as :mod:`tmdjax.models.lora` takes them, float32 on the host, and
        their alpha, see :func:`adapters_from_hf`.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a kind of adapter that is not a plain low-rank one, or a setting
            that is not known, by name; a damaged file; tensors missing, not expected
            or of another shape, by name.
    """
    folder = Path(folder)
    settings = read_json(folder / ADAPTER_CONFIG)
    tensors = read_weights(folder, "adapter_model")
    try:
        return adapters_from_hf(config, tensors, settings)
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER}: {error}") from None


def adapters_from_hf(
    config: DecoderConfig, tensors: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], float]:
    """Low-rank adapters from the tensors and the settings of the PEFT library.

    PEFT adds ``s b a`` to a kernel, s = alpha / r, or alpha / √r under ``use_rslora``;
    ``rank_pattern`` and ``alpha_pattern`` give modules an r and an alpha of their own.
    Here s is alpha / rank with one alpha for all: where modules differ, b is scaled.
    Layers of a stack have one rank here: those of a lower one, and layers without an
    adapter (``layers_to_transform``, a regular expression in ``target_modules``), are
    filled up with zeros, which leaves the network as it is.

    Args:
        config: of the decoder they belong to.
        tensors: arrays by their names in adapter_model.safetensors.
        settings: content of adapter_config.json.

    Returns:
        Adapters as :mod:`tmdjax.models.lora` takes them, float32 on the host, and
        their alpha.

    Raises:
        ValueError: a kind of adapter that is not a plain low-rank one, a setting that
            is not known or out of range, by name; tensors missing, not expected or of
            another shape, by name.

    References:
        arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA); PEFT's ``LoraConfig``.
    """
    check_settings(settings)
    base = sorted(name for name in tensors if ".base_layer." in name)
    if base:
        raise ValueError(
            f"the file holds weights of the base, {first_few(base, 3, ', ')}, which "
            f"adapters here lack. Save it with save_embedding_layers=False if they are "
            f"those of the base, else merge it with PEFT (merge_and_unload)."
        )
    whole: dict[str, Any] = dict(tensors)
    scales: dict[str, float] = {}
    leaves = list(_leaves(config, whole, scales, settings))
    if not leaves:
        raise ValueError(
            f"the file holds no adapter of this decoder, but "
            f"{', '.join(sorted(tensors)[:3]) or 'no tensors'}; the names that PEFT's "
            f"save_pretrained writes are {PEFT_PREFIX}<module>.lora_A.weight."
        )
    alpha = max(scales.values())
    for name, own in scales.items():
        if own != alpha and name in tensors:
            factor = np.float32(own / alpha)
            whole[name] = np.asarray(whole[name], np.float32) * factor
    adapters = params_from_tensors(
        leaves,
        whole,
        lambda leaf: np.float32,
        "adapters of all layers of this decoder",
    )
    return adapters, alpha


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError unless adapter_config.json is of plain low-rank adapters."""
    for key, value in settings.items():
        if key in _NO_EFFECT or key in _SCALES:
            continue
        allowed = _PLAIN.get(key, _OFF)
        if value not in allowed:
            allowed = (None,) if allowed is _OFF else allowed
            plain = " or ".join(f"{key}={value!r}" for value in allowed)
            raise ValueError(
                f"{key}={brief(value)} is not supported; adapters here have {plain}. "
                f"Merge it into its base with PEFT (merge_and_unload) and load that, "
                f"or delete the key from {ADAPTER_CONFIG} if it changes nothing."
            )
    for key, (one, words) in _KINDS.items():
        value = settings.get(key)
        if isinstance(value, one) and (one is bool or not isinstance(value, bool)):
            continue
        if one is not bool and isinstance(value, list):
            if all(isinstance(each, one) for each in value):
                continue
        if value:
            raise ValueError(f"{key}={brief(value)} is not understood; it is {words}.")
    numbers = {"r": _first(settings, "r", 8)}
    numbers["lora_alpha"] = _first(settings, "lora_alpha", 8)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{key}={patterns!r} is no mapping of modules to numbers.")
        numbers |= {f"{key}[{name!r}]": value for name, value in patterns.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}={brief(value)} is no number.")
        least = 1 if key.startswith("r") else 0
        check_range(key, value, least, math.inf, open_high=True)


def _first(settings: Mapping[str, Any], key: str, default: Any) -> Any:
    value = settings.get(key)
    return default if value is None else value


def rank_and_alpha(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank of a module, and the alpha that makes alpha / rank its scale.

    A pattern of PEFT is a regular expression of the end of the module's name.

    Args:
        settings: content of adapter_config.json.
        module: its name, without PEFT's prefix.
    """

    def of(patterns: str, default: Any) -> Any:
        for pattern, value in (settings.get(patterns) or {}).items():
            if _match(patterns, rf"(.*\.)?({pattern})$", module):
                return value
        return default

    rank = int(of("rank_pattern", _first(settings, "r", 8)))
    alpha = float(of("alpha_pattern", _first(settings, "lora_alpha", 8)))
    return rank, alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _match(key: str, pattern: Any, text: str) -> re.Match[str] | None:
    try:
        return re.match(pattern, text)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{key} holds {pattern!r}, which is no regular expression ({error})."
        ) from None


def _adapted(settings: Mapping[str, Any], module: str, layer: int) -> bool:
    """Whether PEFT gives a module an adapter; it does where settings do not say."""

    def named(key: str) -> bool:
        wanted = settings.get(key)
        if isinstance(wanted, str):
            return wanted == "all-linear" or bool(
                _match(key, rf"(?:{wanted})\Z", module)
            )
        return any(f".{module}".endswith(f".{name}") for name in wanted or ())

    if settings.get("exclude_modules") and named("exclude_modules"):
        return False
    layers = settings.get("layers_to_transform")
    if isinstance(layers, int | list) and layers != []:
        if layer not in ([layers] if isinstance(layers, int) else layers):
            return False
    return not settings.get("target_modules") or named("target_modules")


def _leaves(
    config: DecoderConfig,
    tensors: dict[str, Any],
    scales: dict[str, float],
    settings: Mapping[str, Any],
) -> Iterator[Leaf]:
    """Adapters of the modules of which there is any tensor.

    Layers that settings leave out get zeros in ``tensors``, and those of a lower rank
    than others are filled up with zeros: neither changes the sum of the kernel and its
    adapter. ``scales`` gets, by the name of each second factor, the alpha that makes
    alpha / rank its scale.
    """
    for path, struct in flatten(param_shapes(config)).items():
        leaf_of, _, last = path.rpartition("/")
        if last != "kernel":
            continue
        stacked, name = struct.ndim == 3, hf_module(leaf_of)
        modules = [
            name.format(layer=i) for i in range(struct.shape[0] if stacked else 1)
        ]
        a, b = (
            [f"{PEFT_PREFIX}{m}.lora_{side}.weight" for m in modules] for side in "AB"
        )
        given = [one in tensors or other in tensors for one, other in zip(a, b)]
        if not any(given):
            continue
        inputs, outputs = struct.shape[-2:]
        own = [rank_and_alpha(settings, module) for module in modules]
        rank = max(r for (r, _), there in zip(own, given) if there)
        expected = [_adapted(settings, module, i) for i, module in enumerate(modules)]
        # settings that leave out what is there are those of another adapter
        told = all(wanted for wanted, there in zip(expected, given) if there)
        for i, (r, alpha) in enumerate(own):
            if not given[i]:
                if told and not expected[i]:
                    tensors[a[i]] = np.zeros((rank, inputs), np.float32)
                    tensors[b[i]] = np.zeros((outputs, rank), np.float32)
                continue
            scales[b[i]] = alpha * (rank / r)
            for side, shape, room in (
                (a[i], (r, inputs), ((0, rank - r), (0, 0))),
                (b[i], (outputs, r), ((0, 0), (0, rank - r))),
            ):
                if r < rank and np.shape(tensors.get(side, ())) == shape:
                    tensors[side] = np.pad(np.asarray(tensors[side], np.float32), room)
        for side, names, shape in (("a", a, (rank, inputs)), ("b", b, (outputs, rank))):
            yield Leaf(
                path=f"{path}/{side}",
                names=names,
                shape=shape,
                stacked=stacked,
                read=np.transpose,
                write=np.transpose,
            )


def save_adapters(
    folder: Folder, adapters: Params, alpha: float, *, base: str | None = None
) -> None:
    """Writes adapters of a decoder in the layout of the PEFT library.

    Args:
        folder: made if absent; adapters in it stay until the new ones are whole.
        adapters: from :func:`tmdjax.models.lora.init`, or trained.
        alpha: their scale.
        base: name or folder of the checkpoint they belong to.

    Raises:
        ValueError: no adapters, adapters of another network, or an alpha out of range.
        OSError: a file cannot be written.
    """
    check_range("alpha", alpha, 0, math.inf, open_high=True)
    folder = Path(folder)
    leaves = flatten(adapters)
    if not leaves:
        raise ValueError("there are no adapters to save; make them with lora.init.")
    tensors, ranks = {}, {}
    for path, leaf in leaves.items():
        module, _, side = path.rpartition("/kernel/")
        name = hf_module(module)
        rows = np.asarray(leaf) if "{layer}" in name else np.asarray(leaf)[None]
        for layer, row in enumerate(rows):
            full = f"{PEFT_PREFIX}{name.format(layer=layer)}.lora_{side.upper()}.weight"
            tensors[full] = np.ascontiguousarray(row.T)
        if side == "a":
            ranks[name.rpartition(".")[2]] = rows.shape[-1]
    write_peft(folder, tensors, ranks, alpha, base, "CAUSAL_LM")


def write_peft(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    ranks: Mapping[str, int],
    alpha: float,
    base: str | None,
    task: str | None,
) -> None:
    """Writes the files of adapters in the layout of the PEFT library.

    Args:
        folder: made if absent; adapters in it, whole or in shards, stay until the new
            ones are whole.
        tensors: arrays by their names in adapter_model.safetensors.
        ranks: of the modules, by the ends of their names.
        alpha: of all modules.
        base: name or folder of the checkpoint they belong to.
        task: PEFT's name of what the network is for.

    Raises:
        OSError: a file cannot be written.
    """
    rank = max(ranks.values())
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    files = {
        folder / ADAPTER: encode_safetensors(tensors),
        folder / ADAPTER_CONFIG: [encode_json(settings)],
    }
    write_together(files, remove_after=older_weights(folder, Path(ADAPTER).stem, files))
