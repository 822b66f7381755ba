"""Jet-RL: rollouts and training of a language model in one flow of 8-bit products.

The usual way to make rollouts fast is to quantise the engine alone. What writes is then
another policy than the one that is trained, and how far apart they are grows with the
model's sensitivity to rounding. Jet-RL makes the forward pass of the rollout a part of
that of training: the same quantisers, of the same groups, at the same places; the
products of the backward pass are quantised too (:data:`tmdjax.quant.RECIPES`). An arm
is two recipes (:func:`precision`) and a group-relative objective (:func:`preset`):

    bf16            both in bfloat16
    fp8_rollout     rollout in 8 bits, training in bfloat16, nothing corrected
    truncated       the same, weighed by truncated ratios of training to rollout
    unified         Jet-RL: both in 8 bits, a scale for each 128 numbers of a token, or
                    128 x 128 of a weight
    unified_tensor  both in 8 bits, one scale a tensor: an ablation, for what a token
                    sees then depends on its batch
    calibrated      unified, and its clip range follows what bfloat16 would clip

The iteration is that of :mod:`tmdjax.runtime.lm_rl`.

References:
    Jet-RL, arXiv 2601.14243. Its text and code were not at hand: which tensors are
    quantised and how is taken from notes on it and from the kernels it builds on. Group
    size, learning rate and the other settings of its runs are not known; the objective
    is GRPO with a clip range of 0.2. Truncated weights and their bound 2: the FP8 notes
    of verl. Calibrated clipping: arXiv 2609.22870, every 20 steps, see
    :func:`tmdjax.rl.calibrate_clip_range`.
"""

import math
from typing import Any

import jax.numpy as jnp

from tmdjax.core.checks import check_choice, check_count, check_fields, check_range
from tmdjax.core.types import Params
from tmdjax.models import DecoderConfig
from tmdjax.quant import Precision
from tmdjax.runtime import GroupRelativeObjective

PRESETS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8_rollout": {},
    "truncated": {"correction": "truncate", "max_weight": 2.0},
    "unified": {},
    "unified_tensor": {},
    "calibrated": {"calibrate_every": 20},
}
"""What an arm changes of GRPO's objective."""

RECIPES: dict[str, tuple[str, str]] = {
    "bf16": ("bf16", "bf16"),
    "fp8_rollout": ("fp8_rollout_only", "bf16"),
    "truncated": ("fp8_rollout_only", "bf16"),
    "unified": ("fp8_block", "fp8_block"),
    "unified_tensor": ("fp8_tensor", "fp8_tensor"),
    "calibrated": ("fp8_block", "fp8_block"),
}
"""GEMM recipes of rollout and training by arm."""


def preset(name: str, **changes: Any) -> GroupRelativeObjective:
    """The objective of an arm.

    Args:
        name: one of :data:`PRESETS`; 'jet_rl' is 'unified'.
        **changes: fields of :class:`tmdjax.runtime.GroupRelativeObjective`.

    Raises:
        ValueError: an unknown name, or options out of range.
        TypeError: an unknown field.
    """
    name = "unified" if name == "jet_rl" else name
    check_choice("preset", name, PRESETS)
    check_fields(GroupRelativeObjective, changes)
    return GroupRelativeObjective(**PRESETS[name] | changes)


def precision(name: str) -> Precision:
    """The recipes of an arm.

    Args:
        name: one of :data:`RECIPES`.

    Raises:
        ValueError: an unknown name.
    """
    check_choice("precision", name, RECIPES)
    rollout, train = RECIPES[name]
    return Precision(rollout=rollout, train=train)


def outlier_channels(
    params: Params, config: DecoderConfig, channels: int = 1, factor: float = 32.0
) -> dict[str, Any]:
    """The same decoder, written so that arithmetic of few bits loses more of it.

    Of every head, the first ``channels`` channels of the values are added, ``factor``
    times, to the last ones, and what the output projection makes of the latter is taken
    from what it makes of the former::

        v[-1 - c] += factor * v[c]          of each key and value head
        out[c] -= factor * out[-1 - c]      of each query head, rows of the projection

    In exact arithmetic nothing changes, as attention is linear in the values: logits
    agree to about 1e-4 in float32. But products now have terms ``factor`` times as
    large that cancel, and each keeps the relative error of its rounding. Scaling a
    channel and dividing what reads it does not do that: numbers with an exponent have
    the same relative error at any size. (Nor may channels of the residual stream be
    scaled: the mean square of the norms that read it would be another.)

    Args:
        params: of a :class:`tmdjax.models.Decoder`, neither fused nor prepared, float32
            (in 16 bits the sums would be rounded, and the function another); adapters
            are put on what is returned.
        config: of the decoder.
        channels: of each head, from 1 to half of ``head_dim``.
        factor: how many times larger; finite.

    Returns:
        New parameters; 'value' and 'out' of the attention differ.

    Raises:
        TypeError, ValueError: channels or factor out of range, parameters without
            'value', or not in float32.
    """
    check_count("channels", channels)
    check_range("factor", factor, -math.inf, math.inf, open_low=True, open_high=True)
    if channels > config.head_dim // 2:
        raise ValueError(
            f"channels={channels} of head_dim={config.head_dim}: each needs another to "
            f"be added to; give at most {config.head_dim // 2}."
        )
    attention = params["blocks"]["attention"]
    if "value" not in attention:
        raise ValueError(
            f"the attention has {', '.join(attention)} and no 'value'; give the "
            f"parameters before models.fuse_projections."
        )
    for name in ("value", "out"):
        found = getattr(attention[name]["kernel"], "dtype", "no dtype: it is prepared")
        if found not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"the kernel of {name!r} has {found}; sums of terms {factor:g} times "
                f"as large would be rounded, and the function another. Give parameters "
                f"in float32, before models.prepare_weights."
            )
    layers, size = config.num_layers, config.head_dim
    first, last = jnp.arange(channels), size - 1 - jnp.arange(channels)

    def by_head(x: Any) -> Any:
        """The heads' axis [kv_head * head_dim] as two."""
        return jnp.asarray(x).reshape(*x.shape[:-1], config.num_kv_heads, size)

    value = {
        name: by_head(x).at[..., last].add(factor * by_head(x)[..., first])
        for name, x in attention["value"].items()
    }
    value = {name: x.reshape(*x.shape[:-2], -1) for name, x in value.items()}
    kernel = jnp.asarray(attention["out"]["kernel"])
    rows = kernel.reshape(layers, config.num_heads, size, -1)
    rows = rows.at[:, :, first].add(-factor * rows[:, :, last])
    out = dict(attention["out"]) | {"kernel": rows.reshape(kernel.shape)}
    return dict(params) | {
        "blocks": dict(params["blocks"])
        | {"attention": dict(attention) | {"value": value, "out": out}}
    }
