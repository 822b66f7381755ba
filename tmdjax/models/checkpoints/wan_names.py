"""Names of the video transformer's modules in checkpoints of Wan 2.1."""

LAYOUTS = ("diffusers", "original")
"""Of ``WanTransformer3DModel``, and of ``WanModel``, Wan's own code."""

TABLE = "scale_shift_table"

_TOP = {
    # path here: name in diffusers, original name
    "patch_embedding": ("patch_embedding", "patch_embedding"),
    "time_embedding/hidden": (
        "condition_embedder.time_embedder.linear_1",
        "time_embedding.0",
    ),
    "time_embedding/out": (
        "condition_embedder.time_embedder.linear_2",
        "time_embedding.2",
    ),
    "time_projection": ("condition_embedder.time_proj", "time_projection.1"),
    "text_embedding/hidden": (
        "condition_embedder.text_embedder.linear_1",
        "text_embedding.0",
    ),
    "text_embedding/out": (
        "condition_embedder.text_embedder.linear_2",
        "text_embedding.2",
    ),
    "final/projection": ("proj_out", "head.head"),
    f"final/{TABLE}": (TABLE, "head.modulation"),
}
_BLOCK = {
    "cross_norm": ("norm2", "norm3"),
    "mlp_in": ("ffn.net.0.proj", "ffn.0"),
    "mlp_out": ("ffn.net.2", "ffn.2"),
    TABLE: (TABLE, "modulation"),
}
_ATTENTION = {
    "query": ("to_q", "q"),
    "key": ("to_k", "k"),
    "value": ("to_v", "v"),
    "out": ("to_out.0", "o"),
    "query_norm": ("norm_q", "norm_q"),
    "key_norm": ("norm_k", "norm_k"),
}
for _here, *_there in (
    ("attention", "attn1", "self_attn"),
    ("cross_attention", "attn2", "cross_attn"),
):
    _BLOCK |= {
        f"{_here}/{part}": tuple(".".join(pair) for pair in zip(_there, names))
        for part, names in _ATTENTION.items()
    }
_NAMES = _TOP | {
    f"blocks/{path}": tuple("blocks.{layer}." + name for name in names)
    for path, names in _BLOCK.items()
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def module_name(path: str, layout: str) -> str:
    """The name of a module or of a table, '{layer}' standing for the layer.

    Args:
        path: here, such as 'blocks/attention/query'.
        layout: 'diffusers' or 'original'.

    Raises:
        ValueError: there is no such module.

    Example:
        >>> module_name("blocks/attention/query", "original")
        'blocks.{layer}.self_attn.q'
    """
    if path not in _NAMES:
        raise ValueError(
            f"{path!r} is no module of a video transformer; known: {', '.join(_NAMES)}."
        )
    return _NAMES[path][LAYOUTS.index(layout)]


def parameter_name(path: str, layout: str) -> str:
    """The name of a parameter, such as 'blocks/attention/query/kernel' here."""
    module, _, last = path.rpartition("/")
    if last == TABLE:
        return module_name(path, layout)
    return f"{module_name(module, layout)}.{_LEAVES[last]}"
