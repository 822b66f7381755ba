"""Decoder parameters under the names of Hugging Face checkpoints, both ways.

PyTorch stores a linear layer [out, in], one tensor a layer; here kernels are [in,
out], stacked on a layer axis. Everything is on the host, in numpy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.build import init_params
from tmdjax.models.decoder import Decoder
from tmdjax.models.decoder_config import DecoderConfig

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


def _expected(
    config: DecoderConfig,
) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """Path, names and the shape of one tensor, of every leaf."""
    for path, leaf in flatten(param_shapes(config)).items():
        shape = leaf.shape if path in _TOP else leaf.shape[1:]
        if path.endswith("/kernel"):
            shape = shape[::-1]
        yield path, _names(path, config.num_layers), shape


def params_from_hf(
    config: DecoderConfig, tensors: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, Any]:
    """Parameters of a Decoder from the tensors of a checkpoint.

    Args:
        config: of the checkpoint.
        tensors: arrays by name. A head beside a tied embedding, which some
            checkpoints carry, must equal it; stored rotary frequencies are ignored.
        dtype: of the parameters; None keeps that of each tensor.

    Returns:
        A nested dict of numpy arrays.

    Raises:
        ValueError: tensors that are missing, not expected or of another shape, all
            of them by name.
    """
    expected = list(_expected(config))
    shapes = {name: shape for _, names, shape in expected for name in names}
    problems = [
        f"{name} is missing, expected {list(shape)}"
        for name, shape in shapes.items()
        if name not in tensors
    ]
    for name, tensor in tensors.items():
        if name in shapes:
            if tuple(tensor.shape) != shapes[name]:
                problems.append(
                    f"{name} has shape {list(tensor.shape)}, expected "
                    f"{list(shapes[name])}"
                )
        elif not _redundant(config, name, tensors):
            problems.append(f"{name} {list(tensor.shape)} is not expected")
    if problems:
        raise ValueError(
            f"{len(problems)} tensor(s) do not fit a {config.model_type} decoder of "
            f"{config.num_layers} layers: {'; '.join(sorted(problems))}. Take the "
            f"config.json that came with the weights."
        )
    params: dict[str, Any] = {}
    for path, names, shape in expected:
        stacked = path not in _TOP
        kind = tensors[names[0]].dtype if dtype is None else dtype
        turned = shape[::-1] if path.endswith("/kernel") else shape
        leaf = np.empty((len(names), *turned), kind)
        for row, name in zip(leaf, names):
            tensor = np.asarray(tensors[name])
            row[...] = tensor.T if path.endswith("/kernel") else tensor
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf if stacked else leaf[0]
    return params


def _redundant(config: DecoderConfig, name: str, tensors: Mapping[str, Any]) -> bool:
    if name.endswith("rotary_emb.inv_freq"):
        return True
    embedding = tensors.get(_TOP["embedding"])
    return (
        config.tied_embedding
        and name == _TOP["head/kernel"]
        and embedding is not None
        and np.array_equal(np.asarray(tensors[name]), np.asarray(embedding))
    )


def params_to_hf(config: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_hf`, in the dtype of each leaf.

    Raises:
        ValueError: leaves that are missing, not expected or of another shape.
    """
    leaves = flatten(params)
    want = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    have = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
    if want != have:
        wrong = sorted(path for path in want | have if want.get(path) != have.get(path))
        listed = (f"{path}: {have.get(path)}, not {want.get(path)}" for path in wrong)
        raise ValueError(
            f"these are not the parameters of that decoder: {'; '.join(listed)}."
        )
    tensors = {}
    for path, names, _ in _expected(config):
        leaf = np.asarray(leaves[path])
        rows = [leaf] if path in _TOP else leaf
        for name, row in zip(names, rows):
            turned = row.T if path.endswith("/kernel") else row
            tensors[name] = np.ascontiguousarray(turned)
    return tensors
