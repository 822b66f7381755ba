"""Checkpoints of float8 weights and scales, made here, against plain indexing."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from model_helpers import equal

from tmdjax import models
from tmdjax.models import load_decoder
from tmdjax.models.checkpoints.decoder import (
    param_shapes,
    params_from_hf,
    params_to_hf,
)
from tmdjax.models.checkpoints.layout import write_checkpoint

CONFIG = models.DecoderConfig(
    vocab_size=13, hidden_size=200, intermediate_size=300, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=70, dtype="bfloat16", recipe="bf16",
)  # fmt: skip
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["a"]}
PACKED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "version": "0.9",
    "quantization_status": "compressed", "ignore": ["lm_head"],
    "kv_cache_scheme": {"num_bits": 8}, "sparsity_config": {"format": "dense"},
}  # fmt: skip
UP = "model.layers.1.mlp.up_proj"


def packed(strategy, **weights):
    given = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": given | weights}
    return PACKED | {"config_groups": {"group_0": group}}


def per_block(rows, columns):
    return lambda shape: (
        np.arange(shape[0])[:, None] // rows,
        np.arange(shape[1]) // columns,
        (-(-shape[0] // rows), -(-shape[1] // columns)),
    )


def per_tensor(*stored):
    return lambda shape: (*np.zeros((2, 1, 1), int), stored)


def per_row(*more):
    return lambda shape: (
        np.arange(shape[0])[:, None],
        np.zeros((1, 1), int),
        (shape[0], *more),
    )


CASES = {
    "blocks": (BLOCK, per_block(128, 128), "weight_scale_inv", "f4", E4M3),
    "small blocks": (
        BLOCK | {"weight_block_size": [64, 48], "modules_to_not_convert": ["lm_head"]},
        per_block(64, 48), "weight_scale_inv", ml_dtypes.bfloat16, E5M2,
    ),
    "static": (STATIC, per_tensor(), "weight_scale", "f4", E4M3),
    "static 1": (STATIC, per_tensor(1), "weight_scale", ml_dtypes.bfloat16, E4M3),
    "packed": (packed("tensor"), per_tensor(1), "weight_scale", "f4", E4M3),
    "rows": (packed("channel"), per_row(1), "weight_scale", ml_dtypes.bfloat16, E4M3),
    "packed blocks": (
        packed("block", block_structure=[128, 64]), per_block(128, 64), "weight_scale",
        "f4", E4M3,
    ),
}  # fmt: skip


def made(name):
    """Settings, tensors of a checkpoint, and the numbers these stand for."""
    settings, group_of, suffix, scale_dtype, kind = CASES[name]
    rng, tensors, plain = np.random.default_rng(0), {}, {}
    drawn = jax.tree.map(
        lambda leaf: np.float32(rng.normal(size=leaf.shape)), param_shapes(CONFIG)
    )
    for key, weight in params_to_hf(CONFIG, drawn).items():
        if "_proj.weight" not in key or "1.self_attn.o_proj" in key:
            tensors[key] = plain[key] = weight.astype(ml_dtypes.bfloat16)
            continue
        rows, columns, stored = group_of(weight.shape)
        groups = [int(index.max()) + 1 for index in (rows, columns)]
        scale = rng.uniform(0.5, 2, groups).astype(scale_dtype)
        tensors[key] = weight.astype(kind)
        each = scale.astype("f4")[rows, columns]
        plain[key] = tensors[key].astype("f4") * each
        stem = key.removesuffix(".weight")
        tensors[f"{stem}.{suffix}"] = scale.reshape(stored)
        if settings is STATIC:
            tensors[f"{stem}.input_scale"] = np.ones((), "f4")
            tensors["model.layers.0.self_attn.k_scale"] = np.ones(1, "f4")
    return {**CONFIG.to_hf(), "quantization_config": settings}, tensors, plain


@pytest.mark.parametrize("name", CASES)
def test_weights_are_values_times_the_scale_of_their_group(name, tmp_path):
    settings, tensors, plain = made(name)
    write_checkpoint(tmp_path, "model", tensors, settings, 10**9)
    config, params = load_decoder(tmp_path)
    assert config == CONFIG
    equal(params, params_from_hf(CONFIG, plain))
    rounded = load_decoder(tmp_path, dtype=ml_dtypes.bfloat16)[1]
    equal(rounded, params_from_hf(CONFIG, plain, ml_dtypes.bfloat16))
    kept = load_decoder(tmp_path, dtype=None, recipe="fp8_block")[1]
    assert kept["blocks"]["mlp"]["up"]["kernel"].dtype == np.float32
    assert kept["embedding"].dtype == ml_dtypes.bfloat16


def test_a_weight_and_its_scale_in_two_files(tmp_path):
    settings, tensors, plain = made("blocks")
    last = sorted(tensors, key=lambda key: "scale_inv" in key)
    write_checkpoint(
        tmp_path, "model", {key: tensors[key] for key in last}, settings, 50_000
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    where = index["weight_map"]
    assert where[f"{UP}.weight"] != where[f"{UP}.weight_scale_inv"]
    equal(load_decoder(tmp_path)[1], params_from_hf(CONFIG, plain))


def test_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path, refused):
    settings, tensors, _ = made("blocks")
    weight, scale = f"{UP}.weight", f"{UP}.weight_scale_inv"
    bf16 = tensors[weight].astype(ml_dtypes.bfloat16)
    for change, message in (
        (
            {scale: np.ones((2, 2), "f4")},
            rf"{scale} has shape \[2, 2\], which does not fit {weight} \[300, 200\] in "
            r"blocks of \[128, 128\] \(wanted: \[3, 2\]\)",
        ),
        ({scale: np.full((3, 2), np.nan, "f4")}, f"{scale} has .* negative or not fin"),
        ({scale: np.full((3, 2), -1, "f4")}, f"{scale} has numbers that are negative"),
        ({scale: np.full((3, 2), 127, "u1")}, f"{scale} is uint8, expected floating"),
        ({scale: None}, f"{weight} is float8_e4m3fn and has no scale"),
        ({weight: bf16}, f"{scale} scales {weight}, which is bfloat16"),
        ({weight: None}, f"{scale} scales {weight}, which is absent"),
        ({f"{UP}.weight_scale": np.ones(1, "f4")}, "has .*_inv and .*_scale. T"),
        ({"model.norm.odd": np.ones(2, E4M3)}, "model.norm.odd is float8_e4m3fn and h"),
        ({f"{UP}.weight_zero_point": np.ones(1, "f4")}, "zero_point .* is not expecte"),
    ):
        given = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        write_checkpoint(tmp_path, "model", given, settings, 10**9)
        refused(message, load_decoder, tmp_path)
    settings, tensors, _ = made("static")
    tensors[f"{UP}.weight_scale"] = np.ones((300, 200), "f4")
    write_checkpoint(tmp_path, "model", tensors, settings, 10**9)
    message = r"\[300, 200\] .*\(wanted: \[\], \[1\], \[300\] or \[300, 1\]\)"
    refused(message, load_decoder, tmp_path)


def test_quantisations_that_are_not_understood_are_met_with_those_that_are(
    tmp_path, refused
):
    listed = "Understood: quant_method 'fp8': .*'compressed-tensors': symmetric float"
    for given, message in (
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq' is not understood"),
        ({"bits": 4}, "quant_method=None is not understood"),
        (BLOCK | {"rotation": "hadamard"}, "rotation='hadamard' is not understood"),
        (packed("tensor", num_bits=4), "weights of group_0 have num_bits=4, which is"),
        (packed("tensor", type="int"), "type='int'"),
        (packed("group"), "strategy='group'"),
        (packed("tensor", symmetric=False), "symmetric=False"),
        (packed("block"), "block_structure of group_0='absent' is no pair"),
        (packed("block", block_structure="128x128"), "='128x128' is no pair"),
        (PACKED | {"config_groups": {"FP8": ["Linear"]}}, r"FP8=\['Linear'\] of con"),
        (PACKED | {"config_groups": {"a": {"weights": "fp8"}}}, "a={'weights': 'fp8'}"),
        (PACKED | {"format": "pack-quantized"}, "format='pack-quantized'"),
        (PACKED | {"sparsity_config": {"format": "24"}}, "sparsity_config={'format'"),
        ("fp8", "quantization_config='fp8' is no mapping"),
    ):
        settings = {**CONFIG.to_hf(), "quantization_config": given}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        refused(f"{message}.*{listed}", load_decoder, tmp_path)
    for size in ([128], "128", [0, 128]):
        given = BLOCK | {"weight_block_size": size}
        settings = {**CONFIG.to_hf(), "compression_config": given}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        refused("compression_config: weight_block_size=", load_decoder, tmp_path)
    two = {**CONFIG.to_hf(), "quantization_config": BLOCK, "compression_config": BLOCK}
    (tmp_path / "config.json").write_text(json.dumps(two))
    refused("both describe weights; keep one", load_decoder, tmp_path)
    message = "='fp8' is not supported: .*models.load_decoder reads them where they are"
    refused(message, models.DecoderConfig.from_hf, two)
