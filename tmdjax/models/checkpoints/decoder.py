"""Decoders as folders in the Hugging Face layout, both ways.

PyTorch stores a linear layer [out, in], one tensor a layer; here kernels are [in,
out], stacked on a layer axis. Everything is on the host, in numpy.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.build import init_params
from tmdjax.models.checkpoints import float8
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
from tmdjax.models.decoder.config import DecoderConfig
from tmdjax.models.decoder.network import Decoder

_STEM = "model"
_TOP = {
    "embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_MODULES = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def param_shapes(config: DecoderConfig) -> dict[str, Any]:
    """Shape structs of the parameters of a Decoder; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(
        lambda: init_params(Decoder(config), jax.random.key(0), tokens)
    )


def hf_module(path: str) -> str:
    """The name of a module in a checkpoint, '{layer}' standing for the layer.

    Args:
        path: of a module here, such as 'blocks/attention/query' or 'head'.

    Raises:
        ValueError: there is no such module.

    Example:
        >>> hf_module("blocks/attention/query")
        'model.layers.{layer}.self_attn.q_proj'
    """
    inner = path.removeprefix("blocks/")
    if inner != path and inner in _MODULES:
        return f"model.layers.{{layer}}.{_MODULES[inner]}"
    for name, tensor in _TOP.items():
        if path == name.partition("/")[0]:
            return tensor.removesuffix(".weight")
    known = [*(f"blocks/{name}" for name in _MODULES), "embedding", "norm", "head"]
    raise ValueError(
        f"{path!r} is no module of a decoder; known: {', '.join(known)}. Parameters "
        f"with fused projections have no counterpart: give those they were made of."
    )


def _names(path: str, layers: int) -> list[str]:
    """The tensors that hold one leaf: a name, or one a layer."""
    if path in _TOP:
        return [_TOP[path]]
    module, _, leaf = path.rpartition("/")
    name = f"{hf_module(module)}.{_LEAVES[leaf]}"
    return [name.format(layer=layer) for layer in range(layers)]


def _leaves(config: DecoderConfig) -> Iterator[Leaf]:
    for path, struct in flatten(param_shapes(config)).items():
        stacked = path not in _TOP
        shape = struct.shape[1:] if stacked else struct.shape
        kernel = path.endswith("/kernel")
        turn = np.transpose if kernel else np.asarray
        yield Leaf(
            path=path,
            names=_names(path, config.num_layers),
            shape=shape[::-1] if kernel else shape,
            stacked=stacked,
            read=turn,
            write=turn,
        )


def params_from_hf(
    config: DecoderConfig, tensors: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, Any]:
    """Parameters of a Decoder from the tensors of a checkpoint.

    Args:
        config: of the checkpoint.
        tensors: arrays by name. Of a tied embedding and its head one is enough, and two
            must be equal; stored rotary frequencies are ignored.
        dtype: of the parameters; None keeps that of the tensors, and takes float32
            where those of the layers differ.

    Returns:
        A nested dict of numpy arrays.

    Raises:
        ValueError: tensors that are missing, not expected, of another shape or no
            floating numbers, all of them by name; a head that differs from the
            embedding it is tied to; numbers that the dtype cannot hold.
    """
    check_depth(config.num_layers, tensors)
    embedding, head = _TOP["embedding"], _TOP["head/kernel"]
    if config.tied_embedding and head in tensors:
        first = np.asarray(tensors.get(embedding, tensors[head]))
        if not np.array_equal(first, np.asarray(tensors[head])):
            raise ValueError(
                f"{head} differs from {embedding}, which tie_word_embeddings=True says "
                f"are one. Set it to false in config.json (tied_embedding=False here) "
                f"if the head was trained apart, or remove {head}."
            )
        tensors = {k: v for k, v in tensors.items() if k != head} | {embedding: first}
    return params_from_tensors(
        _leaves(config),
        tensors,
        lambda leaf: dtype,
        f"a {config.model_type} decoder of {config.num_layers} layers",
        lambda name: name.endswith("rotary_emb.inv_freq"),
    )


def params_to_hf(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_hf`, in the dtype of each leaf.

    Raises:
        ValueError: leaves that are missing, not expected or of another shape.
    """
    return tensors_from_params(_leaves(config), param_shapes(config), params, "decoder")


def load_decoder(
    folder: Folder, *, dtype: Any = np.float32, **options: Any
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a checkpoint of Qwen2, Qwen2.5, Qwen3, Mistral or Llama type.

    Weights in float8 with scales (:data:`tmdjax.models.checkpoints.float8.UNDERSTOOD`
    says which) are read as the numbers they stand for, value times scale. They are no
    8-bit weights of a recipe: which numbers are rounded to 8 bits again is for
    ``recipe`` to say.

    Args:
        folder: with config.json and model.safetensors, or the shards that
            model.safetensors.index.json names.
        dtype: of the parameters; None keeps that of the file, and takes float32 where
            those of the layers differ, or weights are in float8 with scales.
        **options: attributes of the configuration that take precedence, such as
            ``recipe``, see :meth:`tmdjax.models.DecoderConfig.from_hf`.

    Returns:
        The configuration, and parameters on the host: ``apply_fn =
        functional(Decoder(config))`` takes them.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a configuration the decoder does not have, or a quantisation that is
            not understood; a damaged file; tensors missing, not expected or of another
            shape, all by name.
    """
    folder = Path(folder)
    settings, quantised = float8.without_quantisation(read_json(folder / "config.json"))
    config = DecoderConfig.from_hf(settings, **options)
    tensors: Mapping[str, Any] = read_weights(folder, _STEM)
    if quantised is not None:
        tensors = float8.dequantised(tensors, quantised)
    return config, params_from_hf(config, tensors, dtype)


def save_decoder(
    folder: Folder,
    config: DecoderConfig,
    params: Params,
    *,
    max_shard_bytes: int = 4 * 2**30,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that transformers (4 and 5) and :func:`load_decoder` read.

    Adapters are merged first (:func:`tmdjax.models.lora.merge`), or saved by
    :func:`save_adapters`.

    Args:
        folder: made if absent. An earlier checkpoint in it goes once the new one is
            whole; files that are not of it stay.
        config: of the decoder; weights are written in ``config.dtype``.
        params: of the decoder.
        max_shard_bytes: a larger checkpoint is cut into files of at most this size
            (a larger tensor has a file of its own).
        extra: more keys for config.json, such as ``eos_token_id``.

    Raises:
        ValueError: parameters of another decoder, or one that no checkpoint has;
            numbers beyond the range of ``config.dtype``.
        TypeError: a setting in ``extra`` that JSON lacks.
        OSError: a file cannot be written.
    """
    settings = config.to_hf() | dict(extra or {})
    dtype = jnp.dtype(config.dtype)
    tensors = {
        name: cast_tensor(name, tensor, dtype)
        for name, tensor in params_to_hf(config, params).items()
    }
    write_checkpoint(folder, _STEM, tensors, settings, max_shard_bytes)
