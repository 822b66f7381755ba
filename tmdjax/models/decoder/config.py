"""Sizes of a decoder language model, and the config.json they are read from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tmdjax.core.checks import check_choice, check_range
from tmdjax.models.layers import check_attributes
from tmdjax.quant import Recipe, as_recipe

DTYPES = ("float32", "bfloat16", "float16")
MODEL_TYPES = ("llama", "qwen2", "qwen3")

# Keys of config.json that change the network, and the values that leave it as it is.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder: rotary grouped-query attention and a gated SiLU MLP.

    Qwen2 and Qwen2.5 have ``qkv_bias``, Qwen3 has ``qk_norm``, Llama-type models
    (SmolLM2 too) have neither.

    Attributes:
        vocab_size: entries of the embedding.
        hidden_size: width.
        intermediate_size: width of the MLP.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``.
        head_dim: width of one head, even; ``num_heads * head_dim`` need not be
            ``hidden_size``.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        tied_embedding: the head is the embedding, transposed.
        qkv_bias: query, key and value projections have a bias.
        qk_norm: query and key heads are normalised before the rotation.
        max_position_embeddings: positions the weights were trained on. It is carried
            to config.json and limits nothing here.
        dtype: of the weights in a checkpoint, one of 'float32', 'bfloat16',
            'float16'.
        recipe: a :class:`tmdjax.quant.Recipe` or its name, of every dense layer; it
            sets the dtype of activations.
        head_recipe: of the head, which decides most of how far log-probs of rollout and
            training differ; None means ``recipe``. Under 'bf16' logits are rounded to 8
            bits before they become float32.
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
    rms_norm_eps: float = 1e-6
    tied_embedding: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 32768
    dtype: str = "float32"
    recipe: Any = "fp32"
    head_recipe: Any = None
    remat: bool = True
    attention_implementation: str = "auto"

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers")
        sizes += ("num_heads", "num_kv_heads", "head_dim", "max_position_embeddings")
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
        for name in ("rope_theta", "rms_norm_eps"):
            check_range(name, getattr(self, name), 0, open_low=True, open_high=True)
        check_choice("dtype", self.dtype, DTYPES)
        if self.head_recipe is not None:
            object.__setattr__(self, "head_recipe", as_recipe(self.head_recipe))

    @property
    def output_recipe(self) -> Recipe:
        """The recipe of the head."""
        return self.recipe if self.head_recipe is None else self.head_recipe

    @property
    def model_type(self) -> str:
        """Its name in config.json.

        Raises:
            ValueError: biases and head norms together, which none of the three has.
        """
        if self.qkv_bias and self.qk_norm:
            raise ValueError(
                "qkv_bias and qk_norm are both set; a checkpoint has one of them "
                "(qwen2, qwen3) or neither (llama)."
            )
        return "qwen2" if self.qkv_bias else "qwen3" if self.qk_norm else "llama"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **options: Any) -> "DecoderConfig":
        """Reads the mapping in a config.json, of transformers 4 or 5.

        Args:
            config: the mapping.
            **options: attributes that take precedence, such as ``recipe``; without,
                the recipe is 'fp32' for float32 weights and 'bf16' for others.

        Raises:
            ValueError: a model, activation, rope type, attention, quantisation or
                dtype that the network does not have, by its key and value; a missing
                key; a value out of range.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type={model_type!r} is not supported; the decoder reads "
                f"{', '.join(MODEL_TYPES)}."
            )
        _check_neutral(config, model_type)
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
        values |= dict(
            num_kv_heads=_first(config.get("num_key_value_heads"), heads),
            head_dim=head_dim,
            rope_theta=_rope_theta(config),
            rms_norm_eps=_first(config.get("rms_norm_eps"), 1e-6),
            tied_embedding=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
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
        kind = self.model_type
        architecture = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[kind]
        return {
            "architectures": [f"{architecture}ForCausalLM"],
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
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": self.tied_embedding,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": self.qkv_bias,
            "use_sliding_window": False,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _either(config: Mapping[str, Any], new: str, old: str, default: Any) -> Any:
    """One value under its new or its old key; two must agree."""
    given = {key: config[key] for key in (new, old) if config.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ValueError(
            f"{new}={given[new]!r} and {old}={given[old]!r} disagree; keep one."
        )
    return next(iter(given.values()), default)


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base, from the layout of transformers 5 or the older one."""
    values = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        extra = set(rope) - {"rope_theta", "rope_type", "type"}
        if kind != "default" or extra:
            raise ValueError(
                f"{key} has rope_type={kind!r}"
                f"{f' and {sorted(extra)}' if extra else ''}; the decoder has "
                f"the 'default' rotation alone (rope_theta)."
            )
        values["new"] = rope.get("rope_theta", values.get("new"))
    values["old"] = config.get("rope_theta")
    return float(_either(values, "new", "old", 10000.0))


def _check_neutral(config: Mapping[str, Any], model_type: str) -> None:
    allowed = dict(_NEUTRAL)
    if model_type != "qwen2":  # Qwen2 has its biases whatever this key says
        allowed["attention_bias"] = (False, None)
    if not config.get("use_sliding_window") and model_type == "llama":
        allowed["sliding_window"] = (None,)
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            given = config[key]
            if isinstance(given, Mapping):
                given = given.get("quant_method", dict(given))
            raise ValueError(
                f"{key}={given!r} is not supported; the decoder is built for "
                f"{key}={values[0]!r}. Take a checkpoint without it."
            )
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"layer_types holds {sorted(kinds)}; every layer of the decoder has "
            f"'full_attention'."
        )
