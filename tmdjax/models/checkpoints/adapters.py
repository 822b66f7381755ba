"""Low-rank adapters of decoders as folders in the layout of the PEFT library."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.checkpoints.decoder import hf_module, param_shapes
from tmdjax.models.checkpoints.layout import (
    Folder,
    Leaf,
    params_from_tensors,
    read_json,
    write_json,
)
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors
from tmdjax.models.decoder.config import DecoderConfig

_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."

# Settings of an adapter that change what it computes, and their values of no effect.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
}


def load_adapters(
    folder: Folder, config: DecoderConfig
) -> tuple[dict[str, Any], float]:
    """Reads low-rank adapters in the layout of the PEFT library.

    Args:
        folder: with adapter_model.safetensors and adapter_config.json.
        config: of the decoder they belong to.

    Returns:
        Adapters as :mod:`tmdjax.models.lora` takes them, float32 on the host, and
        their alpha.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a kind of adapter that is not a plain low-rank one; a damaged
            file; tensors missing, not expected or of another shape, by name.
    """
    folder = Path(folder)
    settings = read_json(folder / _ADAPTER_CONFIG)
    for key, values in _PLAIN.items():
        if key in settings and settings[key] not in values:
            raise ValueError(
                f"{folder / _ADAPTER_CONFIG}: {key}={settings[key]!r} is not "
                f"supported; adapters here have {key}={values[0]!r}."
            )
    tensors = read_safetensors(folder / _ADAPTER)
    leaves = list(_leaves(config, tensors))
    if not leaves:
        raise ValueError(
            f"{folder / _ADAPTER} holds no adapter of this decoder, but "
            f"{', '.join(sorted(tensors)[:3]) or 'no tensors'}."
        )
    adapters = params_from_tensors(
        leaves,
        tensors,
        lambda leaf: np.float32,
        f"adapters of all layers of this decoder ({folder / _ADAPTER})",
    )
    return adapters, float(settings.get("lora_alpha", 8))


def _leaves(config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> Iterator[Leaf]:
    """Adapters of the modules of which there is any tensor, of the first's rank."""
    for path, struct in flatten(param_shapes(config)).items():
        module, _, last = path.rpartition("/")
        if last != "kernel":
            continue
        stacked, name = struct.ndim == 3, _PREFIX + hf_module(module)
        layers = range(config.num_layers if stacked else 1)
        a, b = (
            [f"{name.format(layer=i)}.lora_{side}.weight" for i in layers]
            for side in "AB"
        )
        ranks = [n for key in a if key in tensors for n in tensors[key].shape[:1]]
        ranks += [n for key in b if key in tensors for n in tensors[key].shape[-1:]]
        if not ranks:
            continue
        inputs, outputs = struct.shape[-2:]
        for side, names, shape in (
            ("a", a, (ranks[0], inputs)),
            ("b", b, (outputs, ranks[0])),
        ):
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
        folder: made if absent.
        adapters: from :func:`tmdjax.models.lora.init`, or trained.
        alpha: their scale.
        base: name or folder of the checkpoint they belong to.

    Raises:
        ValueError: no adapters, or adapters of another network.
        OSError: a file cannot be written.
    """
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
            full = f"{_PREFIX}{name.format(layer=layer)}.lora_{side.upper()}.weight"
            tensors[full] = np.ascontiguousarray(row.T)
        if side == "a":
            ranks[name.rpartition(".")[2]] = rows.shape[-1]
    rank = max(ranks.values())
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
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
    write_safetensors(folder / _ADAPTER, tensors)
    write_json(folder / _ADAPTER_CONFIG, settings)
