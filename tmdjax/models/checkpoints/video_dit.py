"""Video transformers as folders in the two layouts of Wan 2.1, both ways.

That of diffusers has the class ``WanTransformer3DModel``, that of the published
repositories ``WanModel``: the same tensors under other names (wan_names.py). They are
stored [out, in], one a layer; here kernels are [in, out], stacked on a layer axis.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import brief, check_choice, check_count
from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.build import init_params
from tmdjax.models.checkpoints.layout import (
    Folder,
    Leaf,
    cast_tensor,
    check_depth,
    params_from_tensors,
    read_json,
    read_weights,
    tensors_from_params,
    write_checkpoint,
)
from tmdjax.models.checkpoints.wan_names import LAYOUTS, TABLE, parameter_name
from tmdjax.models.videos.dit import VideoDiT

_STEM = "diffusion_pytorch_model"
_CLASS, _ORIGINAL_CLASS = "WanTransformer3DModel", "WanModel"

# Keys of config.json, and the attributes they are. Only the last three may be absent.
_ATTRIBUTES = {
    "patch_size": "patch_size",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_dim",
    "num_layers": "depth",
    "ffn_dim": "mlp_width",
    "out_channels": "out_channels",
    "text_dim": "text_width",
    "freq_dim": "frequency_dim",
    "cross_attn_norm": "cross_attention_norm",
    "rope_max_seq_len": "rope_length",
    "eps": "epsilon",
}
_OPTIONAL = ("cross_attn_norm", "rope_max_seq_len", "eps")
# Keys that stand for parts this network lacks, and their values of no effect.
_PLAIN = {
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}

# Keys of config.json in the original layout, and those of diffusers. What its network
# has besides is not stored, or has these values.
_ORIGINAL_KEYS = {
    "num_heads": "num_attention_heads",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "eps": "eps",
}
_ORIGINAL_DEFAULTS = {
    "patch_size": (1, 2, 2),
    "text_dim": 4096,
    "cross_attn_norm": True,
}
_ORIGINAL_PLAIN = {"model_type": "t2v", "qk_norm": True, "window_size": [-1, -1]}
_TEXT_LENGTH = 512
"""To so many rows, zeros, the original network fills up the condition."""


def video_dit_from_hf(config: Mapping[str, Any], **options: Any) -> VideoDiT:
    """The network that a config.json describes, of diffusers or the original layout.

    Args:
        config: its keys and values.
        **options: attributes of the network that take precedence, such as ``recipe``.

    Raises:
        ValueError: another class; a key that is missing; a part that this network
            lacks (image inputs, another norm of queries and keys); a size that the
            network refuses.
        TypeError: an attribute of the wrong type.
    """
    return _module_and_channels(config, options)[0]


def _module_and_channels(
    config: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[VideoDiT, int]:
    kind = config.get("_class_name", _CLASS)
    if kind == _ORIGINAL_CLASS:
        config = _in_keys_of_diffusers(config)
    elif kind != _CLASS:
        raise ValueError(
            f"config.json is of a {kind!r}; this network reads {_CLASS!r} and "
            f"{_ORIGINAL_CLASS!r} alone."
        )
    for key, value in config.items():
        if key.startswith("_") or key in _ATTRIBUTES or key == "in_channels":
            continue
        _check_plain(key, value, _PLAIN.get(key))
    _check_keys(
        config,
        [
            key
            for key in (*_ATTRIBUTES, "in_channels")
            if key not in (*_OPTIONAL, "out_channels")
        ],
    )
    attributes = {
        name: config[key] for key, name in _ATTRIBUTES.items() if key in config
    }
    attributes["patch_size"] = tuple(config["patch_size"])
    if attributes.get("out_channels") is None:
        attributes["out_channels"] = config["in_channels"]
    return VideoDiT(**attributes | dict(options)), config["in_channels"]


def _check_plain(key: str, value: Any, allowed: Any) -> None:
    if value != allowed:
        raise ValueError(
            f"config.json has {key}={brief(value)}, a part this network lacks; it "
            f"takes {key}={allowed!r} alone (text to video, queries and "
            f"keys normed over all heads)."
        )


def _check_keys(config: Mapping[str, Any], needed: Iterable[str]) -> None:
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}; take the one that came with the "
            f"weights."
        )


def _in_keys_of_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an original checkpoint as diffusers would state it."""
    known = ("dim", "text_len", *_ORIGINAL_KEYS, *_ORIGINAL_DEFAULTS)
    for key, value in config.items():
        if not key.startswith("_") and key not in known:
            value = list(value) if isinstance(value, tuple) else value
            _check_plain(key, value, _ORIGINAL_PLAIN.get(key))
    _check_keys(config, ["dim", *_ORIGINAL_KEYS])
    found = {key: config.get(key, value) for key, value in _ORIGINAL_DEFAULTS.items()}
    found |= {there: config[key] for key, there in _ORIGINAL_KEYS.items()}
    width, heads = (
        check_count(f"{key} of config.json", config[key])
        for key in ("dim", "num_heads")
    )
    if width % heads:
        raise ValueError(
            f"config.json has dim={width}, which num_heads={heads} does not divide; "
            f"take the one that came with the weights."
        )
    return found | {"attention_head_dim": width // heads}


def video_dit_to_hf(
    module: VideoDiT, in_channels: int, layout: str = "diffusers"
) -> dict[str, Any]:
    """The inverse of :func:`video_dit_from_hf`: config.json of a layout.

    Args:
        module: the network.
        in_channels: channels of its input.
        layout: 'diffusers' or 'original'.

    Raises:
        ValueError: an unknown layout.
    """
    check_choice("layout", layout, LAYOUTS)
    config: dict[str, Any] = {key: getattr(module, a) for key, a in _ATTRIBUTES.items()}
    config["patch_size"] = list(module.patch_size)
    config["in_channels"] = in_channels
    if module.out_channels is None:
        config["out_channels"] = in_channels
    if layout == "diffusers":
        return {"_class_name": _CLASS} | config | _PLAIN
    original = {key: config[there] for key, there in _ORIGINAL_KEYS.items()}
    original |= {"dim": module.width, "text_len": _TEXT_LENGTH}
    # Their class takes these too, though it does not store them.
    original |= {key: config[key] for key in _ORIGINAL_DEFAULTS}
    return {"_class_name": _ORIGINAL_CLASS, "model_type": "t2v"} | original


def params_from_hf_video(
    module: VideoDiT,
    in_channels: int,
    tensors: Mapping[str, Any],
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Parameters of a VideoDiT from the tensors of a checkpoint.

    Args:
        module: the network.
        in_channels: channels of its input.
        tensors: arrays by their names in either layout.
        dtype: of the parameters; None keeps that of the tensors, and takes float32
            where those of the blocks differ. What diffusers keeps
            in float32 (the time embedding, tables of shifts and scales, the norm
            before the cross-attention) is float32 under a narrower dtype too.

    Returns:
        A nested dict of numpy arrays.

    Raises:
        ValueError: tensors that are missing, not expected or of another shape, all
            of them by name; names of both layouts; more blocks than tensors.
    """
    check_depth(module.depth, tensors)
    leaves = {
        layout: list(checkpoint_leaves(module, in_channels, layout))
        for layout in LAYOUTS
    }
    layout = _layout_of(leaves, tensors)

    def dtype_of(leaf: Leaf) -> Any:
        kept = ("time_embedding/", TABLE, "cross_norm/")
        if dtype is not None and any(part in leaf.path for part in kept):
            return jnp.promote_types(dtype, jnp.float32)
        return dtype

    network = f"a video transformer of {module.depth} layers, {module.width} wide"
    return params_from_tensors(leaves[layout], tensors, dtype_of, network)


def _layout_of(leaves: Mapping[str, list[Leaf]], tensors: Mapping[str, Any]) -> str:
    """The layout that the names are of; that of diffusers where they are of none."""
    names = {
        layout: {name for leaf in of_layout for name in leaf.names}
        for layout, of_layout in leaves.items()
    }
    shared = set.intersection(*names.values())
    found = {
        layout: name
        for layout, own in names.items()
        for name in tensors
        if name in own - shared
    }
    if len(found) > 1:
        listed = ", ".join(f"{name} ({layout})" for layout, name in found.items())
        raise ValueError(
            f"the tensors have names of two layouts, {listed}; take those of one "
            f"checkpoint."
        )
    return next(iter(found), LAYOUTS[0])


def params_to_hf_video(
    module: VideoDiT, params: Params, layout: str = "diffusers"
) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_hf_video`, in the dtype of each parameter.

    Args:
        module: the network.
        params: its parameters.
        layout: of the names, 'diffusers' or 'original'.

    Raises:
        ValueError: parameters that are missing, not expected or of another shape; an
            unknown layout.
    """
    channels = in_channels_of(module, params)
    shapes = video_param_shapes(module, channels)
    leaves = checkpoint_leaves(module, channels, layout)
    return tensors_from_params(leaves, shapes, params, "video transformer")


def load_video_dit(
    folder: Folder, *, dtype: Any = np.float32, **options: Any
) -> tuple[VideoDiT, dict[str, Any]]:
    """Reads a checkpoint of Wan 2.1 (text to video) in either of its layouts.

    Args:
        folder: with config.json and diffusion_pytorch_model.safetensors, or the
            shards that its index names: 'transformer' in the folder of a pipeline of
            diffusers, or a repository of Wan 2.1 itself.
        dtype: of the parameters, see :func:`params_from_hf_video`.
        **options: attributes of the network that take precedence, such as ``recipe``
            or ``attention_implementation``.

    Returns:
        The network, and parameters on the host: ``apply_fn = functional(module)``
        takes them.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a configuration the network does not have; a damaged file; tensors
            missing, not expected or of another shape, all by name.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    module, in_channels = _module_and_channels(config, options)
    tensors = read_weights(folder, _STEM)
    return module, params_from_hf_video(module, in_channels, tensors, dtype)


def save_video_dit(
    folder: Folder,
    module: VideoDiT,
    params: Params,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 4 * 2**30,
    extra: Mapping[str, Any] | None = None,
    layout: str = "diffusers",
) -> None:
    """Writes a checkpoint that :func:`load_video_dit` reads, and the layout's library.

    Args:
        folder: made if absent. An earlier checkpoint in it goes once the new one is
            whole; files that are not of it stay.
        module: the network.
        params: its parameters.
        dtype: of the tensors; None keeps that of each parameter.
        max_shard_bytes: a larger checkpoint is cut into files of at most this size
            (a larger tensor has a file of its own).
        extra: more keys for config.json.
        layout: 'diffusers', or 'original', of Wan 2.1's own code.

    Raises:
        ValueError: parameters of another network; numbers beyond the range of
            ``dtype``; an unknown layout.
        TypeError: a setting in ``extra`` that JSON lacks.
        OSError: a file cannot be written.
    """
    tensors = params_to_hf_video(module, params, layout)
    if dtype is not None:
        kind = jnp.dtype(dtype)
        tensors = {k: cast_tensor(k, tensor, kind) for k, tensor in tensors.items()}
    config = video_dit_to_hf(module, in_channels_of(module, params), layout)
    config |= dict(extra or {})
    write_checkpoint(folder, _STEM, tensors, config, max_shard_bytes)


def in_channels_of(module: VideoDiT, params: Params) -> int:
    """Channels of the videos that a network with these parameters takes.

    Raises:
        ValueError: no embedding of patches among them.
    """
    leaf = flatten(params).get("patch_embedding/kernel")
    volume = int(np.prod(module.patch_size))
    if leaf is None or np.ndim(leaf) != 2 or leaf.shape[0] % volume:
        raise ValueError(
            f"patch_embedding/kernel is {getattr(leaf, 'shape', 'missing')}; a video "
            f"transformer with patches of {volume} positions has [{volume} x channels, "
            f"{module.width}]."
        )
    return leaf.shape[0] // volume


def video_param_shapes(module: VideoDiT, in_channels: int) -> dict[str, Any]:
    """Shape structs of the parameters; nothing is allocated."""
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    video = struct((1, *module.patch_size, in_channels))
    inputs = video, struct((1,)), struct((1, 1, module.text_width))
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0), *inputs))


def checkpoint_leaves(
    module: VideoDiT, in_channels: int, layout: str = "diffusers"
) -> Iterator[Leaf]:
    """Every parameter, and the tensors of a checkpoint in a layout that hold it."""
    check_choice("layout", layout, LAYOUTS)
    for path, struct in flatten(video_param_shapes(module, in_channels)).items():
        stacked = path.startswith("blocks/")
        shape = struct.shape[1:] if stacked else struct.shape
        there, read, write = _turns(path, shape, module.patch_size)
        name = parameter_name(path, layout)
        layers = range(module.depth if stacked else 1)
        yield Leaf(
            path=path,
            names=[name.format(layer=i) for i in layers],
            shape=there,
            stacked=stacked,
            read=read,
            write=write,
        )


Turn = Callable[[np.ndarray], np.ndarray]


def _turns(
    path: str, shape: tuple[int, ...], patch_size: tuple[int, int, int]
) -> tuple[tuple[int, ...], Turn, Turn]:
    """Shape of a tensor in the checkpoint, and the ways from it and to it."""
    if path.endswith(TABLE):
        return (1, *shape), lambda tensor: tensor[0], lambda leaf: leaf[None]
    if not path.endswith("/kernel"):
        return shape, np.asarray, np.asarray
    if path != "patch_embedding/kernel":
        return shape[::-1], np.transpose, np.transpose
    # A convolution [out, channel, frame, row, column]; the channel is fastest here.
    inputs, outputs = shape
    channels = inputs // int(np.prod(patch_size))
    return (
        (outputs, channels, *patch_size),
        lambda tensor: tensor.transpose(2, 3, 4, 1, 0).reshape(inputs, outputs),
        lambda leaf: leaf.reshape(*patch_size, channels, outputs).transpose(
            4, 3, 0, 1, 2
        ),
    )
