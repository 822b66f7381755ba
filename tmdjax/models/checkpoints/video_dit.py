"""Video transformers as folders in the layout of diffusers, both ways.

The class there is ``WanTransformer3DModel``; its parameters are stored [out, in], one
tensor a layer, here kernels are [in, out], stacked on a layer axis.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from tmdjax.models.videos.dit import VideoDiT

_STEM = "diffusion_pytorch_model"
_CLASS = "WanTransformer3DModel"

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

_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding/hidden": "condition_embedder.time_embedder.linear_1",
    "time_embedding/out": "condition_embedder.time_embedder.linear_2",
    "time_projection": "condition_embedder.time_proj",
    "text_embedding/hidden": "condition_embedder.text_embedder.linear_1",
    "text_embedding/out": "condition_embedder.text_embedder.linear_2",
    "final/projection": "proj_out",
    "blocks/cross_norm": "norm2",
    "blocks/mlp_in": "ffn.net.0.proj",
    "blocks/mlp_out": "ffn.net.2",
}
_MODULES |= {
    f"blocks/{here}/{part}": f"{there}.{name}"
    for here, there in (("attention", "attn1"), ("cross_attention", "attn2"))
    for part, name in {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "out": "to_out.0",
        "query_norm": "norm_q",
        "key_norm": "norm_k",
    }.items()
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_TABLE = "scale_shift_table"


def video_dit_from_hf(config: Mapping[str, Any], **options: Any) -> VideoDiT:
    """The network that a config.json of diffusers describes.

    Args:
        config: its keys and values.
        **options: attributes of the network that take precedence, such as ``recipe``.

    Raises:
        ValueError: another class; a key that is missing; a part that this network
            lacks (image inputs, another norm of queries and keys); a size that the
            network refuses.
        TypeError: an attribute of the wrong type.
    """
    kind = config.get("_class_name", _CLASS)
    if kind != _CLASS:
        raise ValueError(
            f"config.json is of a {kind!r}; this network reads {_CLASS!r} alone."
        )
    for key, value in config.items():
        if key.startswith("_") or key in _ATTRIBUTES or key == "in_channels":
            continue
        if value != _PLAIN.get(key):
            raise ValueError(
                f"config.json has {key}={value!r}, a part this network lacks; it "
                f"takes {key}={_PLAIN.get(key)!r} alone (text to video, queries and "
                f"keys normed over all heads)."
            )
    missing = [
        key
        for key in (*_ATTRIBUTES, "in_channels")
        if key not in config and key not in (*_OPTIONAL, "out_channels")
    ]
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}; take the one that came with the "
            f"weights."
        )
    attributes = {
        name: config[key] for key, name in _ATTRIBUTES.items() if key in config
    }
    attributes["patch_size"] = tuple(config["patch_size"])
    if attributes.get("out_channels") is None:
        attributes["out_channels"] = config["in_channels"]
    return VideoDiT(**attributes | options)


def video_dit_to_hf(module: VideoDiT, in_channels: int) -> dict[str, Any]:
    """The inverse of :func:`video_dit_from_hf`: config.json of diffusers."""
    config: dict[str, Any] = {"_class_name": _CLASS}
    config |= {key: getattr(module, name) for key, name in _ATTRIBUTES.items()}
    config["patch_size"] = list(module.patch_size)
    config["in_channels"] = in_channels
    if module.out_channels is None:
        config["out_channels"] = in_channels
    return config | _PLAIN


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
        tensors: arrays by name.
        dtype: of the parameters; None keeps that of the tensors, and takes float32
            where those of the blocks differ. What diffusers keeps
            in float32 (the time embedding, tables of shifts and scales, the norm
            before the cross-attention) is float32 under a narrower dtype too.

    Returns:
        A nested dict of numpy arrays.

    Raises:
        ValueError: tensors that are missing, not expected or of another shape, all
            of them by name; more blocks than tensors.
    """
    check_depth(module.depth, tensors)

    def dtype_of(leaf: Leaf) -> Any:
        kept = ("time_embedding/", _TABLE, "cross_norm/")
        if dtype is not None and any(part in leaf.path for part in kept):
            return jnp.promote_types(dtype, jnp.float32)
        return dtype

    network = f"a video transformer of {module.depth} layers, {module.width} wide"
    leaves = checkpoint_leaves(module, in_channels)
    return params_from_tensors(leaves, tensors, dtype_of, network)


def params_to_hf_video(module: VideoDiT, params: Params) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_hf_video`, in the dtype of each parameter.

    Raises:
        ValueError: parameters that are missing, not expected or of another shape.
    """
    channels = in_channels_of(module, params)
    shapes = _shapes(module, channels)
    leaves = checkpoint_leaves(module, channels)
    return tensors_from_params(leaves, shapes, params, "video transformer")


def load_video_dit(
    folder: Folder, *, dtype: Any = np.float32, **options: Any
) -> tuple[VideoDiT, dict[str, Any]]:
    """Reads a checkpoint of Wan 2.1 (text to video) in the layout of diffusers.

    Args:
        folder: with config.json and diffusion_pytorch_model.safetensors, or the
            shards that its index names: 'transformer' in the folder of a pipeline.
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
    module = video_dit_from_hf(config, **options)
    tensors = read_weights(folder, _STEM)
    return module, params_from_hf_video(module, config["in_channels"], tensors, dtype)


def save_video_dit(
    folder: Folder,
    module: VideoDiT,
    params: Params,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 4 * 2**30,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that diffusers and :func:`load_video_dit` read.

    Args:
        folder: made if absent. An earlier checkpoint in it goes once the new one is
            whole; files that are not of it stay.
        module: the network.
        params: its parameters.
        dtype: of the tensors; None keeps that of each parameter.
        max_shard_bytes: a larger checkpoint is cut into files of at most this size
            (a larger tensor has a file of its own).
        extra: more keys for config.json.

    Raises:
        ValueError: parameters of another network; numbers beyond the range of
            ``dtype``.
        TypeError: a setting in ``extra`` that JSON lacks.
        OSError: a file cannot be written.
    """
    tensors = params_to_hf_video(module, params)
    if dtype is not None:
        kind = jnp.dtype(dtype)
        tensors = {k: cast_tensor(k, tensor, kind) for k, tensor in tensors.items()}
    config = video_dit_to_hf(module, in_channels_of(module, params))
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


def _shapes(module: VideoDiT, in_channels: int) -> dict[str, Any]:
    """Shape structs of the parameters; nothing is allocated."""
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    video = struct((1, *module.patch_size, in_channels))
    inputs = video, struct((1,)), struct((1, 1, module.text_width))
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0), *inputs))


def checkpoint_leaves(module: VideoDiT, in_channels: int) -> Iterator[Leaf]:
    """Every parameter, and the tensors of a checkpoint that hold it."""
    for path, struct in flatten(_shapes(module, in_channels)).items():
        stacked = path.startswith("blocks/")
        shape = struct.shape[1:] if stacked else struct.shape
        there, read, write = _layout(path, shape, module.patch_size)
        prefix = "blocks.{layer}." if stacked else ""
        layers = range(module.depth if stacked else 1)
        yield Leaf(
            path=path,
            names=[(prefix + _name(path)).format(layer=i) for i in layers],
            shape=there,
            stacked=stacked,
            read=read,
            write=write,
        )


def _name(path: str) -> str:
    inner, _, last = path.rpartition("/")
    return _TABLE if last == _TABLE else f"{_MODULES[inner]}.{_LEAVES[last]}"


Turn = Callable[[np.ndarray], np.ndarray]


def _layout(
    path: str, shape: tuple[int, ...], patch_size: tuple[int, int, int]
) -> tuple[tuple[int, ...], Turn, Turn]:
    """Shape of a tensor in the checkpoint, and the ways from it and to it."""
    if path.endswith(_TABLE):
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
