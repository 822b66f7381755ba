"""Checkpoints in and out: configurations, names, files, adapters, damage."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tmdjax.core.trees import flatten
from tmdjax.models import (
    Decoder,
    DecoderConfig,
    functional,
    load_adapters,
    load_decoder,
    lora,
    save_adapters,
    save_decoder,
)
from tmdjax.models.hf_decoder import params_from_hf, params_to_hf
from tmdjax.models.safetensors_files import read_safetensors, write_safetensors

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "decoder.npz"
CASE = "qwen2_grouped_untied"
OLD = dict(
    model_type="qwen2",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=64,
    sliding_window=32768,
    use_sliding_window=False,
    max_window_layers=2,
    tie_word_embeddings=False,
    torch_dtype="float32",
)


def parts(prefix, case=CASE):
    prefix = f"{case}/{prefix}/"
    with np.load(GOLDENS) as stored:
        return {
            key.removeprefix(prefix): stored[key]
            for key in stored
            if key.startswith(prefix)
        }


def entry(name, case=CASE):
    with np.load(GOLDENS) as stored:
        return stored[f"{case}/{name}"]


def new_config(case=CASE):
    return json.loads(str(entry("config", case)))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as the library of the format writes it."""
    library = pytest.importorskip("safetensors.numpy")
    library.save_file(
        parts("weights"), tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text(json.dumps(new_config()))
    return tmp_path


def test_old_and_new_layouts_are_one_configuration():
    new = DecoderConfig.from_hf(new_config())
    assert new == DecoderConfig.from_hf(OLD)
    assert (new.rope_theta, new.qkv_bias, new.head_dim) == (1e6, True, 4)
    half = DecoderConfig.from_hf(OLD | {"torch_dtype": "bfloat16"})
    assert (half.dtype, half.recipe) == ("bfloat16", "bf16")
    assert DecoderConfig.from_hf(OLD, recipe="bf16").dtype == "float32"


@pytest.mark.parametrize(
    "case", [CASE, "llama_grouped_tied", "qwen3_wide_untied", "qwen3_full_tied"]
)
def test_configuration_round_trip(case):
    config = DecoderConfig.from_hf(new_config(case))
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_defaults_of_absent_keys():
    small = {k: v for k, v in OLD.items() if k not in ("rope_theta", "torch_dtype")}
    config = DecoderConfig.from_hf(
        small | {"model_type": "llama", "sliding_window": None, "head_dim": None}
    )
    assert (config.rope_theta, config.head_dim, config.recipe) == (10000.0, 4, "fp32")
    assert DecoderConfig.from_hf(OLD | {"model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mistral"), "model_type='mistral' is not supported"),
        (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (dict(use_sliding_window=True), "use_sliding_window=True is not supported"),
        (
            dict(quantization_config={"quant_method": "gptq", "bits": 4}),
            "quantization_config='gptq' is not supported",
        ),
        (
            dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            r"rope_scaling has rope_type='llama3' and \['factor'\]",
        ),
        (
            dict(rope_scaling={"type": "yarn"}),
            "rope_scaling has rope_type='yarn'; the decoder has the 'default'",
        ),
        (dict(rope_parameters={"rope_theta": 5.0, "rope_type": "default"}), "disagree"),
        (dict(layer_types=["sliding_attention"]), "layer_types holds .'sliding_att"),
        (dict(model_type="llama"), "sliding_window=32768 is not supported"),
        (dict(model_type="qwen3", attention_bias=True), "attention_bias=True is not"),
        (dict(torch_dtype="float64"), "dtype='float64' is not one of"),
        (dict(hidden_size=None), "the configuration lacks hidden_size"),
        (dict(num_key_value_heads=3), "num_heads=4 must be a multiple of num_kv_head"),
        (dict(head_dim=5), "head_dim=5 must be even"),
        (dict(vocab_size=0), "vocab_size=0 must be at least 1"),
    ],
)
def test_configurations_the_decoder_does_not_have(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(OLD | change)


def test_biases_and_norms_have_no_checkpoint():
    config = DecoderConfig.from_hf(OLD, qk_norm=True)
    with pytest.raises(ValueError, match="a checkpoint has one of them"):
        config.to_hf()


def test_round_trip_is_byte_equal(folder, tmp_path):
    config, params = load_decoder(folder)
    assert params["blocks"]["attention"]["query"]["kernel"].shape == (2, 16, 16)
    save_decoder(tmp_path / "out", config, params, extra={"eos_token_id": 7})
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 7
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert written == (folder / "model.safetensors").read_bytes()


def test_shards(folder, tmp_path):
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
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    name, file = next(iter(index["weight_map"].items()))
    shard = read_safetensors(out / file)
    write_safetensors(out / file, {k: v for k, v in shard.items() if k != name})
    with pytest.raises(ValueError, match=f"{file} lacks {name}"):
        load_decoder(out)
    (out / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is absent"):
        load_decoder(out)
    # a smaller checkpoint leaves nothing of the larger one
    save_decoder(out, config, params)
    assert [f.name for f in out.glob("model*")] == ["model.safetensors"]


def test_half_precision_files(folder, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    _, params = load_decoder(folder)
    config = DecoderConfig.from_hf(OLD, dtype="bfloat16")
    save_decoder(tmp_path / "out", config, params)
    config, kept = load_decoder(tmp_path / "out", dtype=None)
    assert config.recipe == "bf16"
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    _, wide = load_decoder(tmp_path / "out")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
        wide,
        params,
    )
    name = "model.norm.weight"
    theirs = library.load_file(tmp_path / "out/model.safetensors")[name]
    np.testing.assert_array_equal(theirs, kept["norm"]["scale"])


def test_redundant_tensors():
    case = "llama_grouped_tied"
    config, weights = DecoderConfig.from_hf(new_config(case)), parts("weights", case)
    embedding = weights["model.embed_tokens.weight"]
    more = {
        "lm_head.weight": embedding,
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2),
    }
    params = params_from_hf(config, weights | more)
    assert "head" not in params
    assert set(params_to_hf(config, params)) == set(weights)
    with pytest.raises(ValueError, match=r"lm_head.weight \[32, 16\] is not expected"):
        params_from_hf(config, weights | {"lm_head.weight": embedding + 1})


def test_tensors_that_do_not_fit_are_all_named():
    config, weights = DecoderConfig.from_hf(OLD), parts("weights")
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((16, 24))
    weights["score.weight"] = np.zeros((2, 16))
    with pytest.raises(ValueError) as caught:
        params_from_hf(config, weights)
    message = str(caught.value)
    for part in (
        "3 tensor(s) do not fit a qwen2 decoder of 2 layers",
        "model.norm.weight is missing, expected [16]",
        "model.layers.1.mlp.up_proj.weight has shape [16, 24], expected [24, 16]",
        "score.weight [2, 16] is not expected",
    ):
        assert part in message
    params = params_from_hf(config, parts("weights"))
    with pytest.raises(ValueError, match=r"norm/scale: None, not \(16,\)"):
        params_to_hf(config, {k: v for k, v in params.items() if k != "norm"})


def test_damaged_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for cut, message in (
        (
            len(whole) - 4,
            rf"is cut off in tensor '.*': its \d+ bytes end at {len(whole)}",
        ),
        (8 + header + 5, r"is cut off in tensor"),
        (header, rf"its header should end at byte {8 + header}"),
        (3, "no whole safetensors file"),
    ):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=message) as caught:
            load_decoder(folder)
        assert str(path) in str(caught.value)
    path.write_bytes(whole[:8] + b"x" * header + whole[8 + header :])
    with pytest.raises(ValueError, match="its header is not JSON"):
        load_decoder(folder)
    path.write_bytes(whole.replace(b'"shape":[16]', b'"shape":[17]', 1))
    with pytest.raises(ValueError, match=r"of shape \[17\] and dtype F32 takes 68 byt"):
        load_decoder(folder)
    path.write_bytes(whole.replace(b'"F32"', b'"F33"', 1))
    with pytest.raises(ValueError, match="has dtype 'F33'; known: F64"):
        load_decoder(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_decoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_decoder(folder)


@pytest.mark.parametrize(
    "dtype", [np.float64, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
)
def test_file_format_is_that_of_the_library(tmp_path, dtype):
    library = pytest.importorskip("safetensors.numpy")
    tensors = {
        "b": np.arange(6).reshape(2, 3).astype(dtype),
        "a": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    write_safetensors(tmp_path / "ours", tensors, {"k": "v"})
    library.save_file(tensors, tmp_path / "theirs", {"k": "v"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, array in read_safetensors(tmp_path / "theirs").items():
        assert array.dtype == tensors[name].dtype and array.shape == tensors[name].shape
        np.testing.assert_array_equal(array, tensors[name])
    with pytest.raises(TypeError, match="'c' has dtype complex64"):
        write_safetensors(tmp_path / "c", {"c": np.zeros(2, np.complex64)})


@pytest.fixture
def adapter_folder(tmp_path):
    write_safetensors(tmp_path / "adapter_model.safetensors", parts("adapters"))
    (tmp_path / "adapter_config.json").write_text(str(entry("adapter_config")))
    return tmp_path


def test_adapters_are_those_of_peft(adapter_folder):
    config = DecoderConfig.from_hf(OLD)
    params = params_from_hf(config, parts("weights"))
    adapters, alpha = load_adapters(adapter_folder, config)
    assert alpha == 6 and set(adapters["blocks"]) == {"attention", "mlp"}
    logits = jax.jit(functional(Decoder(config)))(
        lora.merge(jax.tree.map(jnp.asarray, params), adapters, alpha),
        entry("tokens").astype(np.int32),
    )
    np.testing.assert_allclose(logits, entry("adapted_logits"), atol=2e-4)


def test_adapters_round_trip(adapter_folder, tmp_path):
    config = DecoderConfig.from_hf(OLD)
    adapters, alpha = load_adapters(adapter_folder, config)
    save_adapters(tmp_path / "out", adapters, alpha, base="some/model")
    written = read_safetensors(tmp_path / "out/adapter_model.safetensors")
    assert set(written) == set(parts("adapters"))
    for name, tensor in parts("adapters").items():
        np.testing.assert_array_equal(written[name], tensor)
    ours = json.loads((tmp_path / "out/adapter_config.json").read_text())
    theirs = json.loads(str(entry("adapter_config")))
    for key in ("peft_type", "r", "lora_alpha", "task_type", "bias"):
        assert ours[key] == theirs[key]
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    # one made here, of the head too
    params = params_from_hf(config, parts("weights"))
    made = lora.init(jax.random.key(0), params, 2, ["head/", "mlp/up"])
    save_adapters(tmp_path / "made", made, 4.0)
    again, alpha = load_adapters(tmp_path / "made", config)
    assert alpha == 4
    jax.tree.map(np.testing.assert_array_equal, again, made)
    assert set(flatten(made)) == set(flatten(again))


def test_adapters_that_do_not_fit(adapter_folder, as_shipped):
    config = DecoderConfig.from_hf(OLD)
    path = adapter_folder / "adapter_model.safetensors"
    tensors = parts("adapters")
    lost = next(name for name in tensors if "q_proj.lora_B" in name)
    odd = next(name for name in tensors if "down_proj.lora_A" in name)
    write_safetensors(
        path,
        {k: v for k, v in tensors.items() if k != lost} | {"other": np.zeros(1)},
    )
    with pytest.raises(ValueError, match="lora_B.weight is missing; other is not exp"):
        load_adapters(adapter_folder, config)
    write_safetensors(path, tensors | {odd: np.zeros((3, 7), np.float32)})
    with pytest.raises(ValueError, match=r"has shape \[3, 7\], expected \[3, 24\]"):
        load_adapters(adapter_folder, config)
    settings = json.loads(str(entry("adapter_config"))) | {"use_dora": True}
    (adapter_folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="use_dora=True is not supported"):
        load_adapters(adapter_folder, config)
    with pytest.raises(ValueError, match="there are no adapters to save"):
        save_adapters(adapter_folder, {}, 1.0)
    with pytest.raises(ValueError, match="'mlp_in' is no module of a decoder"):
        save_adapters(
            adapter_folder, {"mlp_in": {"kernel": {"a": np.ones((2, 1))}}}, 1.0
        )
