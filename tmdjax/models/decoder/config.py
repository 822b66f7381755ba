"""Sizes of a decoder language model, and the config.json they are read from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tmdjax.core.checks import (
    brief,
    check_choice,
    check_count,
    check_fields,
    check_range,
)
from tmdjax.models.decoder.rope import RopeScaling, rope_from_hf
from tmdjax.models.layers import check_attributes
from tmdjax.quant import Recipe, as_recipe

DTYPES = ("float32", "bfloat16", "float16")
MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3")
_MOST = 10_000  # layers, or numbers in a head; a file that says more is damaged
LAYER_TYPES = ("full_attention", "sliding_attention")

# Keys of config.json that change the network, and the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # one function of two names
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "is_causal": (True, None),
}
# Keys that are read.
_READ = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "dtype"),
    *("torch_dtype", "rope_theta", "rope_parameters", "rope_scaling"),
    *("attention_bias", "use_sliding_window", "sliding_window", "max_window_layers"),
    "layer_types",
)
# Keys that change no network, whatever their value: of training, of generation, of
# heads that are not read, and notes of those who made the file.
_NO_EFFECT = (
    *("architectures", "transformers_version", "use_cache", "initializer_range"),
    *("pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("sep_token_id", "unk_token_id", "decoder_start_token_id", "tokenizer_class"),
    *("task_specific_params", "finetuning_task", "problem_type", "num_labels"),
    *("id2label", "label2id", "classifier_dropout", "output_attentions"),
    *("output_hidden_states", "return_dict", "torchscript", "use_bfloat16"),
    *("tf_legacy_loss", "chunk_size_feed_forward", "is_decoder", "prefix"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
    *("begin_suppress_tokens", "exponential_decay_length_penalty", "ignore_index"),
    *("max_sequence_length", "model_max_length", "seq_length", "attn_implementation"),
    *("unsloth_fixed", "unsloth_version", "transformers.js_config"),
    *("is_llama_config", "bos_token", "eos_token", "pad_token", "name_or_path"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder: rotary grouped-query attention and a gated SiLU MLP.

    Qwen2 and Qwen2.5 have ``qkv_bias``, Qwen3 has ``qk_norm``, Llama-type models
    (SmolLM2 too) have neither; with ``attention_bias`` Llama and Qwen3 have
    ``qkv_bias`` and ``out_bias``. Mistral is of Llama type with a ``sliding_window``
    in all layers, Ministral in some; Qwen2 and Qwen3 may have one too.

    Attributes:
        vocab_size: entries of the embedding.
        num_tokens: ids below it name tokens, such as a tokenizer's ``vocab_size``; the
            embedding may have more rows, which are padding: their logits are -inf, so
            that they are neither drawn nor have a share in a log-prob. None: all do.
        hidden_size: width.
        intermediate_size: width of the MLP.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``.
        head_dim: width of one head, even; ``num_heads * head_dim`` need not be
            ``hidden_size``.
        rope_theta: base of the rotary frequencies.
        rope_scaling: a :class:`tmdjax.models.RopeScaling`, or its attributes as a
            mapping; None is the plain rotation.
        rms_norm_eps: added to the mean square in every norm.
        tied_embedding: the head is the embedding, transposed.
        qkv_bias: query, key and value projections have a bias.
        out_bias: the projection of the attention's output has one.
        qk_norm: query and key heads are normalised before the rotation.
        sliding_window: positions that a query looks at, itself and those before it, of
            its own text and as they stand in its row; None is all. One as wide as a
            text changes nothing. The cache of generation keeps all positions.
        layer_types: of each layer 'sliding_attention', which has the window, or
            'full_attention'; None where all have it, or none.
        max_position_embeddings: positions the weights were trained on. It is carried
            to config.json and limits nothing here.
        dtype: of the weights in a checkpoint, one of 'float32', 'bfloat16',
            'float16'.
        recipe: a :class:`tmdjax.quant.Recipe` or its name, of every dense layer; it
            sets the dtype of activations.
        head_recipe: of the head, which decides most of how far log-probs of rollout and
            training differ; None means ``recipe.head`` where that is set ('bf16' under
            'fp8_block' and its like), else ``recipe``. Under 'bf16' logits are rounded
            to 8 bits before they become float32.
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention.attention`.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size or a number out of range, heads that do not divide, an
            unknown dtype, recipe or implementation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: Any = None
    rms_norm_eps: float = 1e-6
    tied_embedding: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 32768
    num_tokens: int | None = None
    sliding_window: int | None = None
    layer_types: Any = None
    dtype: str = "float32"
    recipe: Any = "fp32"
    head_recipe: Any = None
    remat: bool = True
    attention_implementation: str = "auto"

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers")
        sizes += ("num_heads", "num_kv_heads", "head_dim", "max_position_embeddings")
        sizes += ("sliding_window",)
        check_attributes(self, *sizes)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}: each kv head serves as many "
                f"query heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: the rotation takes pairs."
            )
        check_range("head_dim", self.head_dim, 1, _MOST)
        check_range("rope_theta", self.rope_theta, 0, open_low=True, open_high=True)
        check_range("rms_norm_eps", self.rms_norm_eps, 0, 1, open_low=True)
        if self.num_tokens is not None:
            check_range("num_tokens", self.num_tokens, 1, self.vocab_size)
        check_choice("dtype", self.dtype, DTYPES)
        if isinstance(self.rope_scaling, Mapping):
            scaling = RopeScaling(**self.rope_scaling)
            object.__setattr__(self, "rope_scaling", scaling)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise TypeError(
                f"rope_scaling={self.rope_scaling!r}; give a RopeScaling or None."
            )
        self.rotary_frequencies()
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            _check_layer_types(self.layer_types, self.num_layers)
            if self.sliding_window is None:
                raise ValueError(
                    "layer_types says which layers have sliding_window, which is None; "
                    "give both or neither."
                )
        if self.head_recipe is not None:
            object.__setattr__(self, "head_recipe", as_recipe(self.head_recipe))

    @property
    def output_recipe(self) -> Recipe:
        """The recipe of the head."""
        return self.head_recipe or self.recipe.unquantised

    def rotary_frequencies(self) -> np.ndarray:
        """Radians a position of each pair of a head, float64 [head_dim / 2]."""
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        plain = self.rope_theta**-exponents
        scaling = self.rope_scaling
        return plain if scaling is None else scaling.scaled(plain, self.rope_theta)

    def windows(self, length: int) -> tuple[int | None, np.ndarray | None]:
        """The windows that hide any of ``length`` keys.

        Returns:
            One for all layers or None; and where layers differ, int32 [layer], those
            that see all having ``length``.
        """
        window, kinds = self.sliding_window, self.layer_types
        if window is None or window >= length:
            return None, None
        if kinds is None:
            return window, None
        sliding = np.array([kind == "sliding_attention" for kind in kinds])
        return None, np.where(sliding, window, length).astype(np.int32)

    @property
    def model_type(self) -> str:
        """Its name in config.json.

        Raises:
            ValueError: biases, or biases and windows, that none of the five has.
        """
        biases, plain = (self.qkv_bias, self.out_bias), not self.qk_norm
        if self.qkv_bias == self.out_bias and self.qk_norm:
            return "qwen3"
        if biases == (True, False) and plain:
            return "qwen2"
        if self.qkv_bias == self.out_bias and self.sliding_window is None:
            return "llama"
        if biases == (False, False):
            return "mistral" if self.layer_types is None else "ministral"
        raise ValueError(
            f"qkv_bias={self.qkv_bias}, out_bias={self.out_bias}, "
            f"qk_norm={self.qk_norm} and sliding_window={self.sliding_window} have no "
            f"checkpoint: of qwen2 qkv_bias is set alone, of llama and qwen3 (qk_norm) "
            f"both biases are or neither; llama has no window, mistral no bias."
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **options: Any) -> "DecoderConfig":
        """Reads the mapping in a config.json, of transformers 4 or 5.

        Args:
            config: the mapping.
            **options: attributes that take precedence, such as ``recipe``; without,
                the recipe is 'fp32' for float32 weights and 'bf16' for others.

        Raises:
            TypeError: an option that is no attribute.
            ValueError: a model, activation, rope type, attention, quantisation or
                dtype that the network does not have, by its key and value; a missing
                key; a value out of range.
        """
        check_fields(cls, options)
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type={model_type!r} is not supported; the decoder reads "
                f"{', '.join(MODEL_TYPES)}."
            )
        _check_neutral(config)
        needed = dict(
            vocab_size="vocab_size",
            hidden_size="hidden_size",
            intermediate_size="intermediate_size",
            num_layers="num_hidden_layers",
            num_heads="num_attention_heads",
        )
        missing = [key for key in needed.values() if config.get(key) is None]
        if missing:
            raise ValueError(
                f"the configuration lacks {', '.join(missing)}; take the config.json "
                f"that came with the weights."
            )
        values = {name: config[key] for name, key in needed.items()}
        heads = values["num_heads"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            # What transformers takes where the key is absent.
            head_dim = 128 if model_type == "qwen3" else values["hidden_size"] // heads
        dtype = _either(config, "dtype", "torch_dtype", "float32")
        # Qwen2 has its biases and Mistral none, whatever the key says.
        bias = _flag(config, "attention_bias") and model_type in ("llama", "qwen3")
        window, kinds = _windows_from_hf(config, model_type)
        theta, scaling = rope_from_hf(config)
        values |= dict(
            num_kv_heads=_first(config.get("num_key_value_heads"), heads),
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=_first(config.get("rms_norm_eps"), 1e-6),
            tied_embedding=_flag(config, "tie_word_embeddings"),
            qkv_bias=bias or model_type == "qwen2",
            out_bias=bias,
            qk_norm=model_type == "qwen3",
            sliding_window=window,
            layer_types=kinds,
            max_position_embeddings=_first(
                config.get("max_position_embeddings"), 32768
            ),
            dtype=str(dtype).removeprefix("torch."),
        )
        values["recipe"] = "fp32" if values["dtype"] == "float32" else "bf16"
        return cls(**values | options)

    def to_hf(self) -> dict[str, Any]:
        """The mapping for a config.json that transformers 4 and 5 read.

        Raises:
            ValueError: see :attr:`model_type`.
        """
        kind, scaling = self.model_type, self.rope_scaling
        rope = {"rope_type": "default"} if scaling is None else scaling.to_hf()
        return {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, **rope},
            "rope_scaling": None if scaling is None else rope,
            "tie_word_embeddings": self.tied_embedding,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": self.qkv_bias,
            **self._windows_to_hf(kind),
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }

    def _windows_to_hf(self, kind: str) -> dict[str, Any]:
        """Keys of the windows, for readers of layer_types and those before them."""
        window, kinds = self.sliding_window, self.layer_types
        if window is None:
            return {"use_sliding_window": False}
        if kind == "mistral":
            return {"sliding_window": window}
        kinds = list(kinds or [LAYER_TYPES[1]] * self.num_layers)
        found: dict[str, Any] = {"sliding_window": window, "layer_types": kinds}
        if kind != "ministral":
            first = kinds.index(LAYER_TYPES[1])
            found |= {"use_sliding_window": True, "max_window_layers": first}
        return found


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    """A switch, off where it is absent; the string 'false' is none."""
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key}={brief(value)} is no switch; write true or false.")
    return bool(value)


def _either(config: Mapping[str, Any], new: str, old: str, default: Any) -> Any:
    """One value under its new or its old key; two must agree."""
    given = {key: config[key] for key in (new, old) if config.get(key) is not None}
    if len({str(value) for value in given.values()}) > 1:
        raise ValueError(
            f"{new}={given[new]!r} and {old}={given[old]!r} disagree; keep one."
        )
    return next(iter(given.values()), default)


def _check_neutral(config: Mapping[str, Any]) -> None:
    for key, given in config.items():
        if key in _READ or key in _NO_EFFECT or key.startswith("_"):
            continue
        values = _NEUTRAL.get(key, (None, False, [], {}, ""))
        if given not in values:
            if key in ("quantization_config", "compression_config"):
                method = given.get("quant_method") if isinstance(given, Mapping) else 0
                raise ValueError(
                    f"{key}={method or given!r} is not supported: the weights are "
                    f"quantised. models.load_decoder reads them where they are float8; "
                    f"else take the checkpoint they were made of, or load them with "
                    f"transformers, dequantize() and save_pretrained."
                )
            raise ValueError(
                f"{key}={brief(given)} is not supported; the decoder is built for "
                f"{key}={values[0]!r}. Take a checkpoint without it, or delete the key "
                f"from config.json if it does not change the network."
            )


def _check_layer_types(kinds: Any, layers: int) -> None:
    """Refuses kinds of attention that no layer has, or a kind too many or too few."""
    odd = {str(kind) for kind in kinds} - set(LAYER_TYPES)
    if odd:
        raise ValueError(
            f"layer_types holds {sorted(odd)}; known: {', '.join(LAYER_TYPES)}. Take "
            f"another checkpoint."
        )
    if len(kinds) != layers:
        raise ValueError(
            f"layer_types has {len(kinds)} entries; give one a layer, {layers}."
        )


def _windows_from_hf(
    config: Mapping[str, Any], model_type: str
) -> tuple[int | None, tuple[str, ...] | None]:
    """The window and, where layers differ, which have it, as transformers has them.

    In Qwen2 and Qwen3 those from max_window_layers on, under use_sliding_window; in
    Mistral and Ministral all; in Qwen and Ministral layer_types goes before. Llama has
    no window. A window of 0 is none.
    """
    full, sliding = LAYER_TYPES
    layers = check_count("num_hidden_layers", config["num_hidden_layers"])
    check_range("num_hidden_layers", layers, 1, _MOST)
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list | tuple):
            raise ValueError(f"layer_types={kinds!r} is no list of kinds, one a layer.")
        _check_layer_types(kinds, layers)
    # A key that is absent has the value that transformers takes then.
    window = config.get("sliding_window", None if model_type == "llama" else 4096)
    if model_type == "llama" and window:
        raise ValueError(
            f"sliding_window={window!r} is not supported; a llama decoder is built for "
            f"sliding_window=None, and transformers ignores it. Delete the key, or set "
            f"model_type to 'mistral' if the model was trained with that window."
        )
    if model_type.startswith("qwen") and not _flag(config, "use_sliding_window"):
        window = None
    if window is not None and check_count("sliding_window", window, 0) == 0:
        window = None
    if kinds is None:
        first = 0
        if model_type.startswith("qwen"):
            first = check_count(
                "max_window_layers", _first(config.get("max_window_layers"), 28), 0
            )
        kinds = [
            full if window is None or i < first else sliding for i in range(layers)
        ]
    if sliding in kinds and window is None:
        raise ValueError(
            f"layer_types holds 'sliding_attention', but there is no window: "
            f"sliding_window={config.get('sliding_window')!r}, use_sliding_window="
            f"{config.get('use_sliding_window')!r}. Take the config.json that came "
            f"with the weights."
        )
    if model_type == "mistral" and window is not None and full in kinds:
        raise ValueError(
            f"layer_types holds 'full_attention' beside sliding_window={window}; a "
            f"mistral decoder has the window in every layer. Set model_type to "
            f"'ministral' if only some layers have it, or delete layer_types."
        )
    if sliding not in kinds:
        return None, None
    return window, tuple(kinds) if full in kinds else None
