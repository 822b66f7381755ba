"""Decoders from GGUF files (llama.cpp): sizes, de-quantised weights."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import brief, check_count, check_fields
from tmdjax.core.optional import import_optional
from tmdjax.core.registry import suggestion
from tmdjax.models.checkpoints.decoder import params_from_hf
from tmdjax.models.checkpoints.layout import check_depth
from tmdjax.models.decoder.config import LAYER_TYPES, DecoderConfig
from tmdjax.models.decoder.rope import RopeScaling

_MOST_ENTRIES = 10_000_000
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's is llama
QUANTISATIONS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)

# Keys below '<architecture>.' that are read; those whose value changes no network; and
# those that stand for parts the decoder lacks, with their values of no effect.
_READ = (
    *("vocab_size", "embedding_length", "feed_forward_length", "block_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.layer_norm_rms_epsilon"),
    *("context_length", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.original_context_length", "attention.sliding_window"),
    "attention.sliding_window_pattern",
)
_NO_EFFECT = ("rope.scaling.finetuned", "tensor_data_layout")
_PLAIN: dict[str, Any] = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
}

_FACTORS = "rope_freqs.weight"
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
    if not path.is_file():
        raise FileNotFoundError(f"{path} is absent; give the path of a GGUF file.")
    try:
        return _bounded(gguf)(path)
    except Exception as error:  # whatever numpy makes of what is not there
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is cut off or no GGUF file: "
            f"{error}. Copy it again."
        ) from error


def _bounded(gguf: Any) -> Any:
    """The library's reader, which trusts the lengths in a file, made to check them."""

    class Reader(gguf.GGUFReader):
        entries = 0  # of all lists: each becomes an object of a hundred bytes

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **kw: Any):
            end = offset + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it says something ends at byte {end}")
            return super()._get(offset, dtype, count, *order, **kw)

        def _get_field_parts(self, orig_offs: Any, raw_type: Any):
            if raw_type == gguf.GGUFValueType.ARRAY:
                length = int(self._get(orig_offs + 4, np.uint64)[0])
                self.entries += length
                if self.entries > _MOST_ENTRIES:
                    raise ValueError(f"it says that a list has {length} entries")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensor_info(self, offs: Any, count: Any):
            if count > _MOST_ENTRIES:
                raise ValueError(f"it says that it has {count} tensors")
            return super()._build_tensor_info(offs, count)

    return Reader


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
        TypeError: an option that is no attribute.
        ValueError: the file is damaged or of the other byte order; an architecture, a
            key of it, a rotary scaling or a quantisation that is not known here, by
            name; a part of a file that was split; tensors missing, not expected or of
            another shape.
    """
    check_fields(DecoderConfig, options)
    reader = open_gguf(path)
    if reader.byte_order == "S":
        raise ValueError(
            f"{os.fspath(path)} is of the other byte order, in which the blocks of its "
            f"weights are not read. Turn it: python -m "
            f"gguf.scripts.gguf_convert_endian {os.fspath(path)} native."
        )
    try:
        config = _read_config(reader, path)
        kind = gguf_value(reader, "general.architecture")
        tensors = {}
        for tensor in reader.tensors:
            name = _hf_name(tensor.name)
            array = dequantise(tensor, path)
            projects = ".q_proj." in name or ".k_proj." in name
            if kind == "llama" and projects and len(array) % config.head_dim == 0:
                # llama.cpp rotates the pairs (2 i, 2 i + 1) of a head, not (i, i +
                # half).
                pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
            tensors[name] = array
        tensors.pop(_FACTORS, None)  # in the configuration
        params = params_from_hf(config, tensors, dtype)
    except (TypeError, ValueError) as error:  # of another kind, size or number
        where = os.fspath(path)
        told = str(error) if where in str(error) else f"{where}: {error}"
        raise ValueError(told) from None
    return DecoderConfig(**vars(config) | options), params


def _read_config(reader: Any, path: str | os.PathLike[str]) -> DecoderConfig:
    kind = gguf_value(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{os.fspath(path)} has architecture {kind!r}; known: "
            f"{', '.join(ARCHITECTURES)}.{suggestion(str(kind), ARCHITECTURES)}"
        )

    def value(key: str, default: Any = None) -> Any:
        found = gguf_value(reader, f"{kind}.{key}", default)
        if found is None:
            raise ValueError(f"{os.fspath(path)} lacks the key {kind}.{key}.")
        return found

    def whole(key: str, default: int | None = None) -> int:
        return check_count(f"{kind}.{key}", value(key, default))

    def number(key: str, default: float | None = None) -> float:
        # A float32 in the file: its shortest decimal is what was meant.
        return float(str(np.float32(value(key, default))))

    _check_keys(reader, kind, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers = whole("block_count")
    check_depth(layers, tensors)
    heads, hidden = whole("attention.head_count"), whole("embedding_length")
    head_dim = whole("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if value(key, head_dim) != head_dim:
            raise ValueError(
                f"{os.fspath(path)} has {kind}.{key}={value(key)}; the decoder is "
                f"built for {head_dim}, the width of a head."
            )
    context = value("context_length", 32768)
    factors = tensors.get(_FACTORS)
    scaling = _scaling(
        path,
        value("rope.scaling.type", ""),
        # Its name in files of before 2023-11, which llama.cpp reads too.
        number("rope.scaling.factor", number("rope.scale_linear", 1.0)),
        value("rope.scaling.original_context_length", context),
        None if factors is None else dequantise(factors, path),
    )
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    window, kinds = _windows(
        path,
        kind,
        value("attention.sliding_window", 0),
        gguf_value(reader, f"{kind}.attention.sliding_window_pattern"),
        layers,
    )
    return DecoderConfig(
        vocab_size=value("vocab_size", None if tokens is None else len(tokens.data)),
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=number("rope.freq_base", 10000.0),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_scaling=scaling,
        tied_embedding="output.weight" not in tensors,
        qkv_bias=kind == "qwen2" or "blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        qk_norm=kind == "qwen3",
        sliding_window=window,
        layer_types=kinds,
        max_position_embeddings=context,
    )


def _check_keys(reader: Any, kind: str, path: str | os.PathLike[str]) -> None:
    """Refuses what changes the network and is not known here."""
    plain = {"general.type": "model", "split.count": 1}
    plain |= {f"{kind}.{key}": value for key, value in _PLAIN.items()}
    known = [f"{kind}.{key}" for key in (*_READ, *_NO_EFFECT)]
    for key in reader.fields:
        inside = key.startswith((f"{kind}.", "adapter.")) or key in plain
        value = gguf_value(reader, key) if inside and key not in known else None
        allowed = (plain[key],) if key in plain else (0, None, "", [])
        if value is not None and value not in allowed:
            raise ValueError(
                f"{os.fspath(path)} has {key}={brief(value)}, which is not supported; "
                f"the decoder is built for {key}={allowed[0]!r}. Take another file of "
                f"the same model."
            )


def _windows(
    path: str | os.PathLike[str], kind: str, window: int, pattern: Any, layers: int
) -> tuple[int | None, tuple[str, ...] | None]:
    """The window and, where layers differ, which have it.

    A pattern says so of each layer, or is the n of which every nth layer sees all.
    Without one all layers of Mistral have the window; of Qwen, none or some may.
    """
    full, sliding = LAYER_TYPES
    if not window:
        return None, None
    if pattern is None and kind == "llama":
        return window, None
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise ValueError(
            f"{os.fspath(path)} has {kind}.attention.sliding_window={window} and "
            f"sliding_window_pattern={pattern!r}, which does not say for each of "
            f"{layers} layers whether it has the window. Take another file of the same "
            f"model."
        )
    kinds = tuple(sliding if one else full for one in pattern)
    if sliding not in kinds:
        return None, None
    return window, kinds if full in kinds else None


def _scaling(
    path: str | os.PathLike[str],
    kind: str,
    factor: float,
    length: int,
    factors: np.ndarray | None,
) -> RopeScaling | None:
    """Rotary scaling as llama.cpp reads it: linear where a factor stands alone."""
    kind = kind or "linear"
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{os.fspath(path)} has rope.scaling.type={kind!r}; the decoder has none, "
            f"linear, yarn, and factors of frequencies ({_FACTORS})."
        )
    found: dict[str, Any] = {"rope_type": kind, "factor": factor or 1.0}
    if kind == "yarn":
        found["original_max_position_embeddings"] = length
    scaled = kind == "yarn" or (kind == "linear" and factor not in (0, 1))
    if factors is None:
        return RopeScaling(**found) if scaled else None
    if scaled:
        raise ValueError(
            f"{os.fspath(path)} has rope.scaling.type={kind!r} with a factor of "
            f"{factor:g}, and {_FACTORS}; the decoder takes one of them."
        )
    # Llama 3.1 and later: what divides each frequency was computed by the converter.
    each = tuple(factors.reshape(-1).tolist())
    return RopeScaling(
        rope_type="longrope",
        short_factor=each,
        long_factor=each,
        original_max_position_embeddings=length,
        attention_factor=1.0,
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
