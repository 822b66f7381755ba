"""Low-rank adapters of video transformers, in the layouts that Wan's users have.

Each adapter is two matrices, A [rank, in] and B [out, rank], and a scale of their
product: alpha / rank, where alpha stands beside them (kohya's tools), in the settings
(PEFT, diffusers), or nowhere (alpha is the rank). Modules go by their names in
diffusers or in Wan's own code, after a prefix.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tmdjax.core.checks import check_choice, check_range, first_few
from tmdjax.core.files import write_together
from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.checkpoints.adapters import (
    ADAPTER,
    ADAPTER_CONFIG,
    PEFT_PREFIX,
    check_settings,
    rank_and_alpha,
    write_peft,
)
from tmdjax.models.checkpoints.layout import Folder, read_json, read_weights
from tmdjax.models.checkpoints.safetensors import (
    encode_safetensors,
    read_metadata,
    read_safetensors,
)
from tmdjax.models.checkpoints.video_dit import video_param_shapes
from tmdjax.models.checkpoints.wan_names import LAYOUTS, module_name
from tmdjax.models.videos.dit import VideoDiT

_WEIGHTS = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_DIFFUSERS_PREFIX, _ORIGINAL_PREFIX = "transformer.", "diffusion_model."
_KOHYA_PREFIX = "lora_unet_"  # before a name whose dots are underscores
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_A.default.weight": "A",
    ".lora_down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.default.weight": "B",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}

Place = tuple[str, int]
"""A kernel's path, and the layer; 0 outside the stack."""


def load_video_adapters(path: Folder, module: VideoDiT) -> tuple[dict[str, Any], float]:
    """Reads low-rank adapters of a video transformer.

    Args:
        path: a safetensors file with names of diffusers ('transformer.'), of Wan's own
            code ('diffusion_model.') or of kohya's tools ('lora_unet_'); or a folder
            with diffusers' pytorch_lora_weights.safetensors, or with PEFT's
            adapter_model.safetensors (or its shards) and adapter_config.json.
        module: the network that they belong to.

    Returns:
        Adapters as :mod:`tmdjax.models.lora` takes them and their alpha, see
        :func:`adapters_from_hf_video`.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a folder with both kinds of files; a damaged file; what
            :func:`adapters_from_hf_video` refuses.
    """
    path = Path(path)
    peft, folder, settings = path.name == ADAPTER, path.parent, None
    if path.is_dir():
        folder = path
        found = [name for name in (ADAPTER_CONFIG, _WEIGHTS) if (path / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"{path} has neither {ADAPTER_CONFIG} nor {_WEIGHTS}; give the file "
                f"itself."
            )
        if len(found) > 1:
            raise ValueError(
                f"{path} holds two sets of adapters, those of {' and '.join(found)}; "
                f"give {ADAPTER} or {_WEIGHTS} itself."
            )
        peft = found[0] == ADAPTER_CONFIG
        path = path / (ADAPTER if peft else _WEIGHTS)
    if peft:
        settings = read_json(folder / ADAPTER_CONFIG)
        tensors = read_weights(folder, path.stem)
    else:
        tensors = read_safetensors(path)
    try:
        if not peft:
            settings = _stored_settings(read_metadata(path))
        return adapters_from_hf_video(module, tensors, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _stored_settings(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The settings that diffusers stores beside the tensors, if it does."""
    if _METADATA not in metadata:
        return None
    stored = json.loads(metadata[_METADATA])
    if not isinstance(stored, dict):
        raise ValueError(f"its {_METADATA} are {stored!r}, no mapping of settings.")
    others = [key for key in stored if not key.startswith(_DIFFUSERS_PREFIX)]
    if others:
        raise ValueError(
            f"its {_METADATA} have {first_few(others)}; those of a video transformer "
            f"begin with {_DIFFUSERS_PREFIX!r}."
        )
    return {k.removeprefix(_DIFFUSERS_PREFIX): value for k, value in stored.items()}


def adapters_from_hf_video(
    module: VideoDiT,
    tensors: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], float]:
    """Low-rank adapters of a video transformer from tensors in memory.

    Understood are the matrices and alphas of linear layers (not of the embedding of
    patches), under the names that :func:`load_video_adapters` lists. A layer without
    an adapter gets one of zeros, and one of a smaller rank than its module has in other
    layers is filled up with zeros: the change of the network is the same.

    Args:
        module: the network that they belong to.
        tensors: arrays by name.
        settings: content of adapter_config.json; None where there is none.

    Returns:
        Adapters as :mod:`tmdjax.models.lora` takes them, float32 on the host, and
        their alpha. Where scales differ between modules, b is scaled.

    Raises:
        ValueError: tensors that are not understood (DoRA, LoKr, LoHa, differences of
            weights and biases, image inputs, other networks), in excess, missing or of
            another shape, all of them by name; a setting that is not known or out of
            range; PEFT's names without settings; alphas beside settings.

    References:
        arXiv 2106.09685 (LoRA).
    """
    kernels = _kernels(module)
    found, names = _by_place(module, kernels, tensors)
    if settings is not None:
        check_settings(settings)
    elif any(name.startswith(PEFT_PREFIX) for name in tensors):
        raise ValueError(
            f"tensors named {PEFT_PREFIX}... are PEFT's, which keeps their scale in "
            f"{ADAPTER_CONFIG}; give its content as settings."
        )
    _refuse(module.depth, _misfits(kernels, found, names, settings))
    ranks: dict[str, int] = {}
    for (path, _), parts in found.items():
        ranks[path] = max(ranks.get(path, 1), parts["A"].shape[0])
    # The alpha that makes alpha / rank of the path the scale of each adapter.
    alphas = {
        place: _scale(parts, names[place], settings) * ranks[place[0]]
        for place, parts in found.items()
    }
    alpha = max(alphas.values())
    adapters: dict[str, np.ndarray] = {}
    for path, rank in ranks.items():
        stack, (inputs, outputs) = kernels[path]
        a = np.zeros((*stack, inputs, rank), np.float32)
        b = np.zeros((*stack, rank, outputs), np.float32)
        for (own, layer), parts in found.items():
            if own != path:
                continue
            at = (layer,) if stack else ()
            size = parts["A"].shape[0]
            factor = alphas[own, layer] / alpha if alpha else 1.0
            a[(*at, slice(None), slice(size))] = parts["A"].T
            b[(*at, slice(size))] = parts["B"].T * np.float32(factor)
        adapters |= {f"{path}/a": a, f"{path}/b": b}
    return traverse_util.unflatten_dict(adapters, sep="/"), alpha


def _kernels(module: VideoDiT) -> dict[str, tuple[tuple[int, ...], tuple[int, int]]]:
    """Axes of the stack, and the sizes of in- and output, of each linear layer."""
    return {
        path: (struct.shape[:-2], struct.shape[-2:])
        for path, struct in flatten(video_param_shapes(module, 1)).items()
        if path.endswith("/kernel") and path != "patch_embedding/kernel"
    }


def _by_place(
    module: VideoDiT, kernels: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[Place, dict[str, np.ndarray]], dict[Place, str]]:
    """The parts of each adapter, and what its module is called in the file."""
    places: dict[str, Place] = {}
    for path, (stack, _) in kernels.items():
        for layout in LAYOUTS:
            name = module_name(path.removesuffix("/kernel"), layout)
            for layer in range(stack[0] if stack else 1):
                full = name.format(layer=layer)
                prefixes = ("", PEFT_PREFIX, _DIFFUSERS_PREFIX, _ORIGINAL_PREFIX)
                spelled = [prefix + full for prefix in prefixes]
                spelled += [_KOHYA_PREFIX + full.replace(".", "_")]
                places |= dict.fromkeys(spelled, (path, layer))
    found: dict[Place, dict[str, np.ndarray]] = {}
    names: dict[Place, str] = {}
    problems = []
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
        place = places.get(name.removesuffix(suffix)) if suffix else None
        if suffix is None or place is None:
            problems.append(f"{name} {list(np.shape(tensor))} is not understood")
        elif _PARTS[suffix] in found.setdefault(place, {}):
            problems.append(f"{name} is the second of its kind for one module")
        elif not jnp.issubdtype(
            np.asarray(tensor).dtype,
            # torch.tensor(16), as kohya's tools keep an alpha, is an integer
            jnp.number if _PARTS[suffix] == "alpha" else jnp.floating,
        ):
            problems.append(f"{name} is {tensor.dtype}, expected floating numbers")
        else:
            found[place][_PARTS[suffix]] = np.asarray(tensor, np.float32)
            names[place] = name.removesuffix(suffix)
    if not tensors:
        problems.append("it has none")
    _refuse(module.depth, problems)
    return found, names


def _refuse(depth: int, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"{len(problems)} tensor(s) are no plain low-rank adapters of the linear "
            f"layers of a video transformer of {depth} layers: {first_few(problems)}. "
            f"Merge other kinds into their base with the library that made them."
        )


def _misfits(
    kernels: Mapping[str, Any],
    found: Mapping[Place, Mapping[str, np.ndarray]],
    names: Mapping[Place, str],
    settings: Mapping[str, Any] | None,
) -> list[str]:
    """What is missing of the adapters, and what does not fit its kernel."""
    problems = []
    for place, parts in found.items():
        name, (inputs, outputs) = names[place], kernels[place[0]][1]
        problems += [f"{name} has no {part}" for part in "AB" if part not in parts]
        if "alpha" in parts:
            if parts["alpha"].size != 1:
                problems.append(
                    f"{name}.alpha has {parts['alpha'].size} numbers, not 1"
                )
            elif settings is not None:
                problems.append(f"{name}.alpha stands beside settings that have alpha")
        if not {"A", "B"} <= parts.keys():
            continue
        rank = max(parts["A"].shape[0], 1) if parts["A"].ndim else 1
        if settings is not None:
            rank = _settled(settings, name)[0]
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            have = parts[part].shape
            if have != shape:
                problems.append(f"{part} of {name} is {[*have]}, expected {[*shape]}")
    return problems


def _settled(settings: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and alpha of a module, which settings know without a prefix."""
    for prefix in (PEFT_PREFIX, _DIFFUSERS_PREFIX):
        name = name.removeprefix(prefix)
    return rank_and_alpha(settings, name)


def _scale(
    parts: Mapping[str, np.ndarray], name: str, settings: Mapping[str, Any] | None
) -> float:
    """What an adapter's product is multiplied by."""
    rank = parts["A"].shape[0]
    if settings is not None:
        return _settled(settings, name)[1] / rank
    alpha = float(parts["alpha"].reshape(())) if "alpha" in parts else float(rank)
    check_range(f"{name}.alpha", alpha, 0, np.inf, open_high=True)
    return alpha / rank


def save_video_adapters(
    folder: Folder,
    adapters: Params,
    alpha: float,
    *,
    layout: str = "diffusers",
    base: str | None = None,
) -> None:
    """Writes adapters of a video transformer.

    Args:
        folder: made if absent; adapters in it stay until the new ones are whole.
        adapters: from :func:`tmdjax.models.lora.init`, or trained.
        alpha: their scale.
        layout: 'diffusers' writes pytorch_lora_weights.safetensors for
            ``pipeline.load_lora_weights(folder)``, 'original' the same file with the
            names of Wan's own code, for tools that know no others (alpha / rank is
            multiplied into B in both: readers differ in where they look for a scale);
            'peft' writes adapter_model.safetensors and adapter_config.json.
        base: name or folder of the checkpoint they belong to, for 'peft'.

    Raises:
        ValueError: no adapters, adapters of another network or of the embedding of
            patches, an unknown layout, an alpha out of range.
        OSError: a file cannot be written.
    """
    check_choice("layout", layout, (*LAYOUTS, "peft"))
    check_range("alpha", alpha, 0, np.inf, open_high=True)
    folder, leaves = Path(folder), flatten(adapters)
    if not leaves:
        raise ValueError("there are no adapters to save; make them with lora.init.")
    peft = layout == "peft"
    prefix = PEFT_PREFIX if peft else _DIFFUSERS_PREFIX
    if layout == "original":
        prefix = _ORIGINAL_PREFIX
    tensors, ranks = {}, {}
    names = "original" if layout == "original" else "diffusers"
    for path, leaf in leaves.items():
        module, _, side = path.rpartition("/kernel/")
        name = module_name(module, names)
        if module == "patch_embedding":
            raise ValueError(
                "adapters of patch_embedding are convolutions in these layouts; leave "
                "it out of the targets, or merge with lora.merge and save the network."
            )
        value = np.asarray(leaf, np.float32)
        if side == "b" and not peft:
            value = value * np.float32(alpha / value.shape[-2])
        for layer, row in enumerate(value if "{layer}" in name else value[None]):
            full = f"{prefix}{name.format(layer=layer)}.lora_{side.upper()}.weight"
            tensors[full] = np.ascontiguousarray(row.T)
        if side == "a":
            ranks[name.removeprefix("blocks.{layer}.")] = value.shape[-1]
    if peft:
        write_peft(folder, tensors, ranks, alpha, base, None)
    else:
        write_together({folder / _WEIGHTS: encode_safetensors(tensors)})
