"""Decoders from GGUF files (llama.cpp): sizes, de-quantised weights."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.optional import import_optional
from tmdjax.core.registry import suggestion
from tmdjax.models.checkpoints.decoder import params_from_hf
from tmdjax.models.decoder.config import MODEL_TYPES, DecoderConfig

QUANTISATIONS = ("F32", "Q4_1", "Q8_0")

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(path: str | os.PathLike[str]) -> Any:
    """Opens a file; returns a ``gguf.GGUFReader``, which maps it into memory.

    Raises:
        ImportError: the gguf package is absent.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or cut off.
    """
    gguf = import_optional("gguf", "reading a GGUF file", "llm")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is absent; give the path of a GGUF file.")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever numpy makes of what is not there
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is cut off or no GGUF file: "
            f"{error}. Copy it again."
        ) from error


def gguf_value(reader: Any, key: str, default: Any = None) -> Any:
    """The value of a key, or the default; numbers, strings and lists."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def load_gguf(
    path: str | os.PathLike[str], *, dtype: Any = np.float32, **options: Any
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a decoder; quantised weights are de-quantised.

    Args:
        path: of the file, of one of the architectures llama, qwen2, qwen3.
        dtype: of the parameters.
        **options: attributes of the configuration that take precedence, such as
            ``recipe``.

    Returns:
        The configuration, and parameters on the host.

    Raises:
        ImportError: the gguf package is absent.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged; an architecture, a rotary scaling or a
            quantisation that is not read here, by name; tensors missing, not expected
            or of another shape.
    """
    reader = open_gguf(path)
    config = _read_config(reader, path)
    tensors = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        array = dequantise(tensor, path)
        if config.model_type == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):
            # llama.cpp rotates the pairs (2 i, 2 i + 1) of a head, not (i, i + half).
            pairs = array.reshape(-1, config.head_dim // 2, 2, array.shape[-1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        tensors[name] = array
    # Only what a llama checkpoint never has: a table of frequencies.
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{os.fspath(path)} scales its rotary frequencies (rope_freqs.weight); the "
            f"decoder has the default rotation alone."
        )
    try:
        params = params_from_hf(config, tensors, dtype)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    return DecoderConfig(**vars(config) | options), params


def _read_config(reader: Any, path: str | os.PathLike[str]) -> DecoderConfig:
    kind = gguf_value(reader, "general.architecture")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"{os.fspath(path)} has architecture {kind!r}; known: "
            f"{', '.join(MODEL_TYPES)}.{suggestion(str(kind), MODEL_TYPES)}"
        )

    def value(key: str, default: Any = None) -> Any:
        found = gguf_value(reader, f"{kind}.{key}", default)
        if found is None:
            raise ValueError(f"{os.fspath(path)} lacks the key {kind}.{key}.")
        return found

    def number(key: str, default: float) -> float:
        # A float32 in the file: its shortest decimal is what was meant.
        return float(str(np.float32(value(key, default))))

    scaling = value("rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"{os.fspath(path)} has {kind}.rope.scaling.type={scaling!r}; the decoder "
            f"has the default rotation alone."
        )
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    heads, hidden = value("attention.head_count"), value("embedding_length")
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    return DecoderConfig(
        vocab_size=value("vocab_size", None if tokens is None else len(tokens.data)),
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", hidden // heads),
        rope_theta=number("rope.freq_base", 10000.0),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon", 1e-6),
        tied_embedding="output.weight" not in shapes,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        max_position_embeddings=value("context_length", 32768),
    )


def _hf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    module, _, leaf = rest.rpartition(".")
    if block == "blk" and module in _MODULES:
        return f"model.layers.{layer}.{_MODULES[module]}.{leaf}"
    return name


def dequantise(tensor: Any, path: str | os.PathLike[str]) -> np.ndarray:
    """A tensor of the reader as float32.

    Raises:
        ValueError: a quantisation other than ``QUANTISATIONS``.
    """
    from gguf import quants

    kind = tensor.tensor_type.name
    if kind not in QUANTISATIONS:
        raise ValueError(
            f"{os.fspath(path)}: tensor {tensor.name!r} is quantised as {kind}; known: "
            f"{', '.join(QUANTISATIONS)}. Take another file of the same model."
        )
    return quants.dequantize(tensor.data, tensor.tensor_type)
