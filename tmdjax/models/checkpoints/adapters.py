"""Low-rank adapters of decoders as folders in the layout of the PEFT library."""

from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.checkpoints.decoder import hf_module, param_shapes
from tmdjax.models.checkpoints.layout import Folder, read_json, write_json
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
    names = set(tensors)
    adapters: dict[str, Any] = {}
    problems = []
    for path, leaf in flatten(param_shapes(config)).items():
        module, _, last = path.rpartition("/")
        if last != "kernel":
            continue
        stacked = leaf.ndim == 3
        layers = range(config.num_layers if stacked else 1)
        modules = [_PREFIX + hf_module(module).format(layer=i) for i in layers]
        wanted = {
            side: [f"{name}.lora_{side.upper()}.weight" for name in modules]
            for side in "ab"
        }
        if not names.intersection(*[wanted["a"] + wanted["b"]]):
            continue
        problems += [
            f"{name} is missing"
            for side in wanted.values()
            for name in side
            if name not in names
        ]
        names -= {*wanted["a"], *wanted["b"]}
        if problems:
            continue
        sides = {
            side: [np.asarray(tensors[name], np.float32).T for name in listed]
            for side, listed in wanted.items()
        }
        rank = sides["a"][0].shape[-1]
        shapes = {"a": (leaf.shape[-2], rank), "b": (rank, leaf.shape[-1])}
        for side, listed in wanted.items():
            problems += [
                f"{name} has shape {list(array.shape[::-1])}, expected "
                f"{list(shapes[side][::-1])}"
                for name, array in zip(listed, sides[side])
                if array.shape != shapes[side]
            ]
        if problems:
            continue
        node = adapters
        for parent in module.split("/"):
            node = node.setdefault(parent, {})
        node["kernel"] = {
            side: np.stack(arrays) if stacked else np.ascontiguousarray(arrays[0])
            for side, arrays in sides.items()
        }
    problems += [f"{name} is not expected" for name in names]
    if problems or not adapters:
        raise ValueError(
            f"{folder / _ADAPTER} does not hold adapters of this decoder: "
            f"{'; '.join(sorted(problems)) or 'it is empty'}. Adapters belong to the "
            f"checkpoint they were trained on, and to all of its layers."
        )
    return adapters, float(settings.get("lora_alpha", 8))


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
