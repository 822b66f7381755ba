"""Checkpoints in and out: configurations, names, files, adapters, damage."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from model_helpers import below, equal, golden, jitted
from numpy.testing import assert_allclose

from tmdjax import models
from tmdjax.models import DecoderConfig, load_adapters, load_decoder, lora, save_decoder
from tmdjax.models.checkpoints.decoder import params_from_hf, params_to_hf
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors

CASE = "qwen2_grouped_untied"
SLIDING = "sliding_attention"
OLD = dict(
    model_type="qwen2", vocab_size=32, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=64,
    sliding_window=32768, use_sliding_window=False, max_window_layers=2,
    tie_word_embeddings=False, torch_dtype="float32",
)  # fmt: skip


def parts(prefix, case=CASE):
    return below(golden(case), f"{prefix}/")


def new_config(case=CASE):
    return json.loads(str(golden(case)["config"]))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as the library of the format writes it."""
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    library.save_file(parts("weights"), path, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(new_config()))
    return tmp_path


def test_old_new_and_written_layouts_are_one_configuration():
    new = DecoderConfig.from_hf(new_config())
    assert new == DecoderConfig.from_hf(OLD)
    assert (new.rope_theta, new.qkv_bias, new.head_dim) == (1e6, True, 4)
    half = DecoderConfig.from_hf(OLD | {"torch_dtype": "bfloat16"})
    assert (half.dtype, half.recipe.name) == ("bfloat16", "bf16")
    assert DecoderConfig.from_hf(OLD, recipe="bf16").dtype == "float32"
    for case in (CASE, "llama_grouped_tied", "qwen3_wide_untied", "qwen3_full_tied"):
        config = DecoderConfig.from_hf(new_config(case))
        written = json.loads(json.dumps(config.to_hf()))
        assert DecoderConfig.from_hf(written) == config, case


def test_defaults_of_absent_keys():
    small = {k: v for k, v in OLD.items() if k not in ("rope_theta", "torch_dtype")}
    absent = dict(model_type="llama", sliding_window=None, head_dim=None)
    config = DecoderConfig.from_hf(small | absent)
    assert (config.rope_theta, config.head_dim, config.recipe.name) == (
        10000.0,
        4,
        "fp32",
    )
    assert DecoderConfig.from_hf(OLD | {"model_type": "qwen3"}).head_dim == 128


def test_configurations_the_decoder_does_not_have(refused):
    yarn, llama3 = {"type": "yarn"}, {"rope_type": "llama3", "factor": 8.0}
    rope = {"rope_theta": 5.0, "rope_type": "default"}
    linear, same = {"type": "linear", "factor": 2.0}, {"rope_theta": 1e6}
    length = {"original_max_position_embeddings": 8, "attention_factor": 1.0}
    longrope = dict(type="longrope", short_factor=[1, 1], long_factor=[1, 2], **length)
    quantised = {"quant_method": "gptq", "bits": 4}
    for change, message in (
        (dict(model_type="gemma2"), "model_type='gemma2' is not supported"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (dict(quantization_config=quantised), "quantization_config='gptq' is not supp"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings='false' is no switch"),
        (
            dict(dtype={"text": "float32"}),
            "dtype={.*} and torch_dtype='float32' disagr",
        ),
        (dict(rope_scaling=llama3), "'llama3' lacks low_freq_factor, high_freq_factor"),
        (dict(rope_scaling=yarn), "rope_scaling: rope_type='yarn' lacks factor;"),
        (
            dict(rope_scaling=linear | {"factor": 0}),
            "rope_scaling: factor=0 is outside",
        ),
        (dict(rope_scaling=linear | {"low": 1}), r"'linear' and \['low'\], not known"),
        (
            dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
            "has rope_type='dynami",
        ),
        (
            dict(rope_scaling={"factor": 2.0}),
            r"'default' and \['factor'\]; the decoder",
        ),
        (dict(rope_scaling=longrope), "short_factor and long_factor differ"),
        (dict(rope_scaling=linear, rope_parameters=same), "disagree"),
        (dict(rope_scaling=[1]), r"rope_scaling=\[1\] is no mapping"),
        (
            dict(rope_scaling={"type": ["linear"]}),
            r"rope_type=\['linear'\], which is no",
        ),
        (dict(rms_norm_eps=10**30), "rms_norm_eps=10+ is outside"),
        (
            dict(logits_scaling=8.0),
            "logits_scaling=8.0 is not supported; .* delete the",
        ),
        (dict(num_experts=4), "num_experts=4 is not supported"),
        (dict(is_causal=False), "is_causal=False is not supported"),
        (dict(auto_map={"AutoModel": "a.B"}), "auto_map={'AutoModel': 'a.B'} is not"),
        (dict(rope_parameters=rope), "disagree"),
        (dict(layer_types=["chunked_attention"] * 2), "layer_types holds .'chunked_at"),
        (dict(layer_types=["full_attention"]), "layer_types has 1 entries; give one a"),
        (dict(layer_types="full_attention"), "layer_types='full_attention' is no list"),
        (dict(layer_types=[SLIDING] * 2), "'sliding_attention', but there is no windo"),
        (dict(model_type="llama"), "sliding_window=32768 is not .* set model_type to "),
        (
            dict(model_type="llama", sliding_window=None, layer_types=[SLIDING] * 2),
            "no",
        ),
        (
            dict(model_type="mistral", layer_types=["full_attention", SLIDING]),
            "Set model_type to 'ministral' if only some",
        ),
        (dict(model_type="mistral", sliding_window=-1), "sliding_window=-1 must be at"),
        (dict(torch_dtype="float64"), "dtype='float64' is not one of"),
        (dict(hidden_size=None), "the configuration lacks hidden_size"),
        (dict(num_key_value_heads=3), "num_heads=4 must be a multiple of num_kv_head"),
        (dict(head_dim=5), "head_dim=5 must be even"),
        (dict(vocab_size=0), "vocab_size=0 must be at least 1"),
        (dict(num_hidden_layers=10**30), "num_hidden_layers=10+ is outside"),
        (dict(head_dim=10**30), "head_dim=10+ is outside"),
        (dict(rope_theta="1e6"), "rope_theta='1e6' is no number"),
        (dict(rope_theta=np.nan), "rope_theta=nan is outside"),
        (
            dict(rope_theta=None, rope_parameters={"rope_theta": [1]}),
            "rope_parameters: r",
        ),
        (dict(attention_bias="no"), "attention_bias='no' is no switch"),
    ):
        refused(message, DecoderConfig.from_hf, OLD | change)
    change = {"rms_norm_eps": "1e-5"}
    refused(
        "eps='1e-5' is no number", DecoderConfig.from_hf, OLD | change, error=TypeError
    )
    both = DecoderConfig.from_hf(OLD, out_bias=True, sliding_window=3)
    refused("llama has no window, mistral no bias", both.to_hf)
    both = DecoderConfig.from_hf(OLD, qk_norm=True)  # biases and norms
    refused("of qwen2 qkv_bias is set alone, of llama", both.to_hf)


def test_keys_that_change_no_network_are_read_past():
    plain = DecoderConfig.from_hf(OLD)
    for change in (
        dict(use_sliding_window=True),  # from layer 2 of 2 on
        dict(use_sliding_window=True, sliding_window=None, max_window_layers=0),
        dict(use_sliding_window=True, layer_types=["full_attention"] * 2),
        dict(
            eos_token_id=[1, 2], use_cache=False, _name_or_path="a/b", pretraining_tp=2
        ),
        dict(a_key_of_tomorrow=None, another=False, num_experts=0, is_causal=True),
        dict(rope_scaling={"type": "default"}, unsloth_version="2025.1"),
    ):
        assert DecoderConfig.from_hf(OLD | change) == plain, change


def test_windows_are_those_transformers_makes_of_a_configuration():
    full, windowed = "full_attention", dict(use_sliding_window=True)
    mistral = {k: v for k, v in OLD.items() if "window" not in k}
    mistral["model_type"] = "mistral"
    for change, window, kinds in (
        ({}, None, None),
        (windowed | dict(max_window_layers=1), 32768, (full, SLIDING)),
        (windowed | dict(max_window_layers=0, sliding_window=8), 8, None),
        (windowed | dict(layer_types=[SLIDING, full]), 32768, (SLIDING, full)),
        (windowed | dict(layer_types=[SLIDING] * 2), 32768, None),
        (windowed | dict(sliding_window=0, max_window_layers=0), None, None),
        (dict(sliding_window=3, max_window_layers=0), None, None),  # not in use
        (mistral, 4096, None),  # the default of an absent key
        (mistral | dict(sliding_window=None), None, None),
        (mistral | dict(sliding_window=0), None, None),
        (mistral | dict(sliding_window=5, layer_types=[SLIDING] * 2), 5, None),
        (mistral | dict(sliding_window=5, attention_bias=True), 5, None),
        (mistral | dict(model_type="ministral", sliding_window=5), 5, None),
    ):
        given = change if "model_type" in change else OLD | change
        config = DecoderConfig.from_hf(given)
        assert (config.sliding_window, config.layer_types) == (window, kinds), change
        written = json.loads(json.dumps(config.to_hf()))
        assert DecoderConfig.from_hf(written) == config, change
        # readers of before layer_types take max_window_layers
        older = {k: v for k, v in written.items() if k != "layer_types"}
        if kinds != (SLIDING, full):
            assert DecoderConfig.from_hf(older) == config, change


VARIANTS = ("llama3", "linear", "yarn", "yarn_mscale", "yarn_attention_factor")


PLAIN = ("llama_bias", "qwen3_bias", "mistral_window")
PLAIN += ("ministral_windows", "qwen2_windows", "qwen3_windows")


@pytest.mark.parametrize("case", [*VARIANTS, *PLAIN])
def test_scaled_rotations_biases_and_windows_are_those_of_transformers(case, tmp_path):
    stored = golden(case, "decoder_variants.npz")
    saved = json.loads(str(stored["config"]))
    config, weights = DecoderConfig.from_hf(saved), below(stored, "weights/")
    assert (config.rope_scaling is None) == (case in PLAIN)
    assert (config.sliding_window is None) == ("window" not in case)
    assert config.model_type == case.split("_")[0] or case in VARIANTS
    params = params_from_hf(config, weights)
    tokens = jnp.asarray(stored["tokens"], jnp.int32)
    logits = jitted(models.Decoder(config))(params, tokens)
    assert_allclose(logits, stored["logits"], atol=2e-4)
    equal(params_to_hf(config, params), weights)
    # the cache reads the same rotation and the same biases
    fused = models.fuse_projections(jax.tree.map(jnp.asarray, params))
    last, _ = models.prefill(config, fused, tokens, jnp.array([9, 9]))
    assert_allclose(last, stored["logits"][:, -1], atol=2e-4)
    # both ways, in the layout of transformers 4 and as a spec
    written = json.loads(json.dumps(config.to_hf()))
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    for again in (written, old):
        assert DecoderConfig.from_hf(again) == config
    spec = json.loads(json.dumps(models.spec_of(models.Decoder(config))))
    assert models.build(spec) == models.Decoder(config)


def test_round_trip_is_byte_equal(folder, tmp_path):
    config, params = load_decoder(folder)
    assert params["blocks"]["attention"]["query"]["kernel"].shape == (2, 16, 16)
    save_decoder(tmp_path / "out", config, params, extra={"eos_token_id": 7})
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 7
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert written == (folder / "model.safetensors").read_bytes()


def test_shards(folder, tmp_path, refused):
    config, params = load_decoder(folder)
    out = tmp_path / "out"
    save_decoder(out, config, params, max_shard_bytes=4000)
    assert not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and files == {f.name for f in out.glob("*.safetensors")}
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == total
    again, params_again = load_decoder(out)
    assert again == config
    equal(params_again, params)
    name, file = next(iter(index["weight_map"].items()))
    shard = read_safetensors(out / file)
    write_safetensors(out / file, {k: v for k, v in shard.items() if k != name})
    refused(f"{file} lacks {name}", load_decoder, out)
    (out / file).unlink()
    refused(f"{file} is absent", load_decoder, out, error=FileNotFoundError)
    index["weight_map"][name] = f"../{folder.name}/model.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("a file of .*index.json=.* names a file", load_decoder, out)
    # a smaller checkpoint leaves nothing of the larger one, and all that is another's
    (out / "model_lora.safetensors").write_bytes(b"mine")
    for size in (2000, 4000, 10**9):
        save_decoder(out, config, params, max_shard_bytes=size)
        equal(load_decoder(out)[1], params)
    left = {"model.safetensors", "model_lora.safetensors"}
    assert {f.name for f in out.glob("model*")} == left


def test_half_precision_files(folder, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    _, params = load_decoder(folder)
    config = DecoderConfig.from_hf(OLD, dtype="bfloat16")
    save_decoder(tmp_path / "out", config, params)
    config, kept = load_decoder(tmp_path / "out", dtype=None)
    assert config.recipe.name == "bf16"
    kinds = {leaf.dtype for leaf in jax.tree.leaves(kept)}
    assert kinds == {np.dtype(ml_dtypes.bfloat16)}
    _, wide = load_decoder(tmp_path / "out")
    equal(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    name = "model.norm.weight"
    theirs = library.load_file(tmp_path / "out/model.safetensors")[name]
    equal(theirs, kept["norm"]["scale"])


def test_redundant_tensors(refused):
    case = "llama_grouped_tied"
    config, weights = DecoderConfig.from_hf(new_config(case)), parts("weights", case)
    embedding = weights["model.embed_tokens.weight"]
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}
    params = params_from_hf(config, weights | rotary | {"lm_head.weight": embedding})
    assert "head" not in params
    assert set(params_to_hf(config, params)) == set(weights)
    other = weights | {"lm_head.weight": embedding + 1}
    message = "lm_head.weight differs from model.embed_tokens.weight, .*Set it to false"
    refused(message, params_from_hf, config, other)
    untied = dataclasses.replace(config, tied_embedding=False)  # the remedy
    apart = params_from_hf(untied, other)
    equal(apart["head"]["kernel"], other["lm_head.weight"].T)
    # a library that stores shared tensors once keeps the first name in the alphabet
    del other["model.embed_tokens.weight"]
    equal(params_from_hf(config, other | {"lm_head.weight": embedding}), params)


def test_tensors_that_do_not_fit_are_all_named(refused):
    config, weights = DecoderConfig.from_hf(OLD), parts("weights")
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((16, 24))
    weights["score.weight"] = np.zeros((2, 16))
    for message in (
        r"3 tensor\(s\) do not fit a qwen2 decoder of 2 layers",
        r"model.norm.weight is missing, expected \[16\]",
        r"layers.1.mlp.up_proj.weight has shape \[16, 24\], expected \[24, 16\]",
        r"score.weight \[2, 16\] is not expected",
    ):
        refused(message, params_from_hf, config, weights)
    for more, less, message in (
        ("module.", "", "begin with 'module.'; save the tensors without it"),
        ("", "model.", "lack 'model.' in front; save the tensors with it"),
    ):
        names = [name for name in parts("weights") if name != "lm_head.weight"]
        renamed = {more + name.removeprefix(less): np.zeros(1) for name in names}
        refused(message, params_from_hf, config, renamed | {"x": 0 * np.ones(1)})
    params = params_from_hf(config, parts("weights"))
    less = {k: v for k, v in params.items() if k != "norm"}
    refused(r"norm/scale: None, not \(16,\)", params_to_hf, config, less)


def test_damaged_files(folder, refused):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(f"{path} is cut off in tensor", load_decoder, folder)
    path.unlink()
    refused("neither model.safet", load_decoder, folder, error=FileNotFoundError)
    (folder / "config.json").write_text("{")
    refused("config.json is not JSON", load_decoder, folder)


@pytest.fixture
def adapter_folder(tmp_path):
    write_safetensors(tmp_path / "adapter_model.safetensors", parts("adapters"))
    (tmp_path / "adapter_config.json").write_text(str(golden(CASE)["adapter_config"]))
    return tmp_path


def test_adapters_are_those_of_peft(adapter_folder):
    config = DecoderConfig.from_hf(OLD)
    params = params_from_hf(config, parts("weights"))
    adapters, alpha = load_adapters(adapter_folder, config)
    assert alpha == 6 and set(adapters["blocks"]) == {"attention", "mlp"}
    merged = lora.merge(jax.tree.map(jnp.asarray, params), adapters, alpha)
    tokens = golden(CASE)["tokens"].astype(np.int32)
    logits = jitted(models.Decoder(config))(merged, tokens)
    assert_allclose(logits, golden(CASE)["adapted_logits"], atol=2e-4)


def test_adapters_round_trip(adapter_folder, tmp_path):
    config = DecoderConfig.from_hf(OLD)
    adapters, alpha = load_adapters(adapter_folder, config)
    models.save_adapters(tmp_path / "out", adapters, alpha, base="some/model")
    written = tmp_path / "out/adapter_model.safetensors"
    equal(read_safetensors(written), parts("adapters"))
    ours = json.loads((tmp_path / "out/adapter_config.json").read_text())
    theirs = json.loads(str(golden(CASE)["adapter_config"]))
    for key in ("peft_type", "r", "lora_alpha", "task_type", "bias"):
        assert ours[key] == theirs[key]
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    # one made here, of the head too
    params = params_from_hf(config, parts("weights"))
    made = lora.init(jax.random.key(0), params, 2, ["head/", "mlp/up"])
    models.save_adapters(tmp_path / "made", made, 4.0)
    again, alpha = load_adapters(tmp_path / "made", config)
    assert alpha == 4
    equal(again, made)


REFUSED_ADAPTERS = [
    *(
        (dict(init_lora_weights=start), f"init_lora_weights='{start}' is not supported")
        for start in ("olora", "corda", "loftq", "pissa", "pissa_niter_4", "lora_ga")
    ),
    (dict(layer_replication=[[0, 2], [1, 2]]), r"layer_replication=\[\[0, 2\], "),
    (dict(target_parameters=["mlp.experts"]), "target_parameters=.* is not supported"),
    (dict(trainable_token_indices=[3]), r"trainable_token_indices=\[3\] is not"),
    (dict(use_qalora=True), "use_qalora=True is not supported"),
    (dict(lora_bias=True), "lora_bias=True is not supported"),
    (dict(bias="lora_only"), "bias='lora_only' is not supported; .* bias='none'"),
    (dict(alora_invocation_tokens=[1]), r"alora_invocation_tokens=\[1\] is not"),
    (dict(peft_type="LOHA"), "peft_type='LOHA' is not supported"),
    (dict(a_setting_of_tomorrow=0.5), "a_setting_of_tomorrow=0.5 is not .* delete th"),
    (dict(r="3"), "r='3' is no number"),
    (dict(r=0), "r=0 is outside"),
    (dict(r=4), r"lora_A.weight has shape \[3, 16\], expected \[4, 16\]"),
    (dict(rank_pattern={"q_proj": 2}), r"has shape \[3, 16\], expected \[2, 16\]"),
    (dict(lora_alpha=-1), "lora_alpha=-1 is outside"),
    (dict(alpha_pattern={"q_proj": "a"}), r"alpha_pattern\['q_proj'\]='a' is no numb"),
    (dict(alpha_pattern=[1]), r"alpha_pattern=\[1\] is no mapping"),
    (dict(alpha_pattern={"(": 1}), "alpha_pattern holds .* no regular expression"),
    (dict(target_modules=3), "target_modules=3 is not understood; it is a regular"),
    (dict(layers_to_transform="0"), "layers_to_transform='0' is not understood"),
    (dict(exclude_modules=["a", 1]), "exclude_modules=.* is not understood"),
    (dict(use_rslora="false"), "use_rslora='false' is not understood; it is true or"),
    (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\] is not supp"),
]
PLAIN_ADAPTERS = [
    dict(init_lora_weights="gaussian"),
    dict(init_lora_weights="eva", eva_config={"rho": 2.0}),
    dict(loftq_config={"loftq_bits": 4}, lora_dropout=0.1, revision="main"),
    dict(inference_mode=False, a_setting_of_tomorrow=None, another={}, third=False),
    dict(alpha_pattern={"another_module": 3}, rank_pattern={"q_pro": 7}),
]


def test_scales_of_adapters_are_those_of_peft(adapter_folder):
    """rsLoRA and patterns against PEFT's formula, module by module and layer by layer."""
    config = DecoderConfig.from_hf(OLD)
    params = jax.tree.map(jnp.asarray, params_from_hf(config, parts("weights")))
    theirs = json.loads(str(golden(CASE)["adapter_config"]))
    tensors = parts("adapters")
    for change, scale in (
        ({}, lambda name: 6 / 3),
        (dict(use_rslora=True), lambda name: 6 / 3**0.5),
        (
            dict(alpha_pattern={"q_proj": 9}),
            lambda name: (9 if "q_proj" in name else 6) / 3,
        ),
        (
            dict(alpha_pattern={r"layers\.1\..*": 0, "down_proj": 1}, use_rslora=True),
            lambda name: (
                (0 if "layers.1." in name else 1 if "down_proj" in name else 6) / 3**0.5
            ),
        ),
        (
            dict(lora_alpha=0, alpha_pattern={"^model.layers.0.self_attn.q_proj": 4}),
            lambda name: (4 if "layers.0.self_attn.q_proj" in name else 0) / 3,
        ),
        (dict(r=8, rank_pattern={"q_proj|down_proj": 3}), lambda name: 6 / 3),
    ):
        adapters, alpha = models.adapters_from_hf(config, tensors, theirs | change)
        merged = params_to_hf(config, lora.merge(params, adapters, alpha))
        for name, weight in parts("weights").items():
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{prefix}A.weight" in tensors:
                product = tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
                weight = weight + scale(name) * product
            assert_allclose(merged[name], weight, atol=1e-5, err_msg=name)


def test_layers_of_other_ranks_or_none_are_filled_up_with_zeros():
    """Adapters of some layers, and of ranks that differ by layer, against PEFT's sum."""
    config = DecoderConfig.from_hf(OLD)
    params = jax.tree.map(jnp.asarray, params_from_hf(config, parts("weights")))
    theirs = json.loads(str(golden(CASE)["adapter_config"]))
    every, prefix = parts("adapters"), "base_model.model.model.layers."
    first = {k: v for k, v in every.items() if k.startswith(f"{prefix}0.")}
    narrow = {
        k: (v[:1] if "lora_A" in k else v[:, :1]) if ".1.self_attn.q" in k else v
        for k, v in every.items()
    }
    no_mlp = {k: v for k, v in every.items() if ".1.mlp" not in k}
    one = {"layers.1.self_attn.q_proj": 1}
    for tensors, change, scale in (
        (first, dict(layers_to_transform=[0]), 6 / 3),
        (first, dict(layers_to_transform=0, layers_pattern="layers"), 6 / 3),
        (first, dict(target_modules=r".*layers\.0\..*(q|down)_proj"), 6 / 3),
        (first, dict(exclude_modules=r".*layers\.1\..*", use_rslora=True), 6 / 3**0.5),
        (no_mlp, dict(exclude_modules=["layers.1.mlp.down_proj"]), 6 / 3),
        (narrow, dict(rank_pattern=one), 6 / 3),
        (narrow, dict(rank_pattern=one, alpha_pattern={"down_proj": 4.5}), 6 / 3),
        (narrow, dict(rank_pattern=one, use_rslora=True), 6 / 3**0.5),
    ):
        adapters, alpha = models.adapters_from_hf(config, tensors, theirs | change)
        merged = params_to_hf(config, lora.merge(params, adapters, alpha))
        for name, weight in parts("weights").items():
            names = [
                f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"
                for side in "AB"
            ]
            if names[0] in tensors:
                a, b = (tensors[each] for each in names)
                own = 6.0 if len(a) == 1 else scale
                if "down_proj" in name and "alpha_pattern" in change:
                    own = 4.5 / 3
                weight = weight + own * b @ a
            assert_allclose(merged[name], weight, atol=1e-5, err_msg=name)


def test_adapters_that_do_not_fit(adapter_folder, refused):
    config = DecoderConfig.from_hf(OLD)
    path = adapter_folder / "adapter_model.safetensors"
    tensors = parts("adapters")
    lost = next(name for name in tensors if "q_proj.lora_B" in name)
    odd = next(name for name in tensors if "down_proj.lora_A" in name)
    rest = {name: tensor for name, tensor in tensors.items() if name != lost}
    write_safetensors(path, rest | {"other": np.zeros(1)})
    load = functools.partial(load_adapters, adapter_folder, config)
    refused(r"lora_B.weight is missing, .*; other \[1\] is not exp", load)
    # a layer that settings do not leave out
    rest = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    write_safetensors(path, rest)
    refused(r"layers.0.mlp.down_proj.lora_A.weight is missing", load)
    # nor do settings of another adapter, which leave out a layer that is there
    settings = json.loads(str(golden(CASE)["adapter_config"]))
    for change in (dict(layers_to_transform=[0]), dict(target_modules=".*v_proj")):
        refused(
            r"layers.0.self_attn.q_proj.lora_B.weight is missing",
            models.adapters_from_hf,
            config,
            rest,
            settings | change,
        )
    write_safetensors(path, {"other": np.zeros(1)})
    refused("holds no adapter of this decoder, but other", load)
    base = {"base_model.model.lm_head.base_layer.weight": np.zeros((32, 16), "f4")}
    write_safetensors(path, tensors | base)
    refused("weights of the base, .*lm_head.* with save_embedding_layers=False", load)
    write_safetensors(path, tensors | {odd: np.zeros((3, 7), np.float32)})
    refused(r"has shape \[3, 7\], expected \[3, 24\]", load)
    settings = json.loads(str(golden(CASE)["adapter_config"])) | {"use_dora": True}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(settings))
    refused("use_dora=True is not supported", load)
    write_safetensors(path, tensors)
    theirs = json.loads(str(golden(CASE)["adapter_config"]))
    for change, message in REFUSED_ADAPTERS:
        settings = json.dumps(theirs | change)
        (adapter_folder / "adapter_config.json").write_text(settings)
        refused(f"adapter_model.safetensors: .*{message}", load)
    for change in PLAIN_ADAPTERS:
        settings = json.dumps(theirs | change)
        (adapter_folder / "adapter_config.json").write_text(settings)
        assert load()[1] == 6
    path.rename(adapter_folder / "adapter_model.bin")
    message = "neither adapter_model.safetensors .*It holds adapter_model.bin: load it"
    refused(message, load, error=FileNotFoundError)
    save = functools.partial(models.save_adapters, adapter_folder)
    refused("there are no adapters to save", save, {}, 1.0)
    for alpha in (-1.0, np.nan, np.inf):  # which could not be read again
        refused("alpha=.* is outside", save, {}, alpha)
    foreign = {"mlp_in": {"kernel": {"a": np.ones((2, 1))}}}
    refused("'mlp_in' is no module of a decoder", save, foreign, 1.0)
