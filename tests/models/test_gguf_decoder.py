"""GGUF files: rotary order, quantised blocks, refusals; the packaged SmolLM2."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import below, checkpoint, equal, golden
from numpy.testing import assert_allclose

from tmdjax.core.trees import count
from tmdjax.data.weights import find_weights
from tmdjax.generation import gguf_tokenizer, render_chat
from tmdjax.models import DecoderConfig, RopeScaling, load_gguf, prefill
from tmdjax.models.checkpoints.decoder import params_from_hf
from tmdjax.models.checkpoints.gguf import dequantise, gguf_value, open_gguf

gguf = pytest.importorskip("gguf")


def interleaved(weight, heads):
    """Rows (i, i + half) of each head side by side, as llama.cpp stores them."""
    half = weight.shape[0] // heads // 2
    order = [
        head * 2 * half + pair + part * half
        for head in range(heads)
        for pair in range(half)
        for part in (0, 1)
    ]
    return weight[order]


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    path,
    case="llama_grouped_tied",
    change=(),
    quantised=(),
    skip=(),
    more=(),
    order=gguf.GGUFEndian.LITTLE,
):
    """A golden checkpoint as llama.cpp's converter writes it."""
    config, weights = checkpoint(case) if isinstance(case, str) else case
    kind = config.model_type
    architecture = getattr(gguf.MODEL_ARCH, kind.upper())
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    values = {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "context_length": config.max_position_embeddings,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    } | dict(change)
    name = values.pop("architecture", kind)
    writer = gguf.GGUFWriter(path, name, endianess=order)
    kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    kinds |= {bool: writer.add_bool, list: writer.add_array}
    for key in values.keys() - set(skip):
        full = key if key.startswith(("general.", "split.")) else f"{kind}.{key}"
        kinds[type(values[key])](full, values[key])
    for name, weight in weights.items():
        for part, heads in (("q_proj", "num_heads"), ("k_proj", "num_kv_heads")):
            if kind == "llama" and part in name:
                weight = interleaved(weight, getattr(config, heads))
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target in quantised:
            kind_of, raw = quantised[target]
            writer.add_tensor(target, raw, raw_dtype=kind_of)
        elif target not in skip:
            writer.add_tensor(target, weight)
    for target, tensor in dict(more).items():
        writer.add_tensor(target, tensor)
    finish(writer)
    return path


@pytest.mark.parametrize(
    "case", ["llama_grouped_tied", "llama_full_untied", "qwen3_wide_untied"]
)
def test_is_the_checkpoint(tmp_path, case):
    expected_config, weights = checkpoint(case)
    config, params = load_gguf(write(tmp_path / "a.gguf", case))
    assert config == expected_config
    equal(params, params_from_hf(expected_config, weights))
    assert load_gguf(tmp_path / "a.gguf", recipe="bf16")[0].recipe.name == "bf16"


def test_blocks_of_four_and_eight_bits(tmp_path):
    # A block of 32 numbers: scale and minimum in float16, then 4 bits each, the first
    # half of the numbers in the lower ones; or a scale, then 8 bits each.
    rng = np.random.default_rng(0)
    four = rng.integers(0, 16, (8, 2, 32))
    scale, low = rng.normal(size=(2, 8, 2, 1)).astype(np.float16)
    nibbles = (four[..., :16] | four[..., 16:] << 4).astype(np.uint8)
    raw4 = np.concatenate([scale.view(np.uint8), low.view(np.uint8), nibbles], -1)
    eight = rng.integers(-128, 128, (8, 2, 32)).astype(np.int8)
    raw8 = np.concatenate([scale.view(np.uint8), eight.view(np.uint8)], -1)
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("four", raw4.reshape(8, -1), raw_dtype=kinds.Q4_1)
    writer.add_tensor("eight", raw8.reshape(8, -1), raw_dtype=kinds.Q8_0)
    finish(writer)
    read = open_gguf(tmp_path / "q.gguf").tensors
    tensors = {tensor.name: dequantise(tensor, "") for tensor in read}
    scale, low = np.float32(scale), np.float32(low)
    expected = (four * scale + low).reshape(8, 64)
    assert_allclose(tensors["four"], expected, rtol=1e-5, atol=1e-6)
    expected = (eight * scale).reshape(8, 64)
    assert_allclose(tensors["eight"], expected, rtol=1e-5)


def test_quantisations_of_files_in_use(tmp_path):
    """Those the package can write, and one by hand, are the numbers they stand for."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 512)).astype("f4")
    kinds = gguf.GGMLQuantizationType
    # steps of a quantisation: half of one, of the widest block, is what is lost at most
    levels = dict(Q4_0=16, Q5_0=32, Q5_1=32, Q8_0=256)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for name in ("BF16", *levels):
        raw = gguf.quants.quantize(weights, kinds[name])
        writer.add_tensor(name, raw, raw_dtype=kinds[name])
    writer.add_tensor("F16", weights.astype("f2"), raw_dtype=kinds.F16)
    # Q6_K, 256 numbers: low 4 bits, high 2 bits, 16 scales of 8 bits, one in float16
    six = rng.integers(0, 64, (4, 2, 2, 4, 32))  # row, block, half, quarter, number
    scales = rng.integers(-128, 128, (4, 2, 16)).astype("i1")
    d = rng.normal(size=(4, 2, 1)).astype("f2")
    low, high = six & 15, six >> 4
    ql = low[..., :2, :] | low[..., 2:, :] << 4
    qh = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4
    qh |= high[..., 3, :] << 6
    parts = [ql.reshape(4, 2, 128), qh.reshape(4, 2, 64)]
    parts = [part.astype("u1") for part in parts]
    raw = np.concatenate([*parts, scales.view("u1"), d.view("u1")], -1)
    writer.add_tensor("Q6_K", raw.reshape(4, -1), raw_dtype=kinds.Q6_K)
    finish(writer)
    tensors = {
        t.name: dequantise(t, "") for t in open_gguf(tmp_path / "q.gguf").tensors
    }
    steps = (six.reshape(4, 2, 16, 16) - 32) * np.float32(scales)[..., None]
    expected = (steps * np.float32(d)[..., None]).reshape(4, 512)
    assert_allclose(tensors["Q6_K"], expected, rtol=1e-5)
    assert_allclose(tensors["F16"], weights, atol=2e-3)
    assert_allclose(tensors["BF16"], weights, rtol=2**-8)
    blocks = weights.reshape(4, -1, 32)
    for name, steps in levels.items():
        step = 2 * np.abs(blocks).max(-1, keepdims=True) / steps
        wrong = np.abs(tensors[name].reshape(blocks.shape) - blocks)
        assert (wrong <= 1.01 * step).all() and tensors[name].dtype == np.float32, name


def f16(block, at):
    return float(block[at : at + 2].astype("u1").view("f2")[0])


def q2_k(block, i):
    half, quarter, byte = i // 128, i % 128 // 32, i % 32
    q = block[16 + 32 * half + byte] >> 2 * quarter & 3
    scale = block[i // 16]
    return f16(block, 80) * (scale & 15) * q - f16(block, 82) * (scale >> 4)


def q3_k(block, i):
    half, quarter, byte = i // 128, i % 128 // 32, i % 32
    q = block[32 + 32 * half + byte] >> 2 * quarter & 3
    q -= 0 if block[byte] >> (4 * half + quarter) & 1 else 4
    at, packed = i // 16, block[96:108]
    low = packed[at] & 15 if at < 8 else packed[at - 8] >> 4
    high = packed[8 + at % 4] >> 2 * (at // 4) & 3
    return f16(block, 108) * ((low | high << 4) - 32) * q


def of_4_and_5(block, i, bits):
    group, byte, packed = i // 32, i % 32, block[4:16]
    if group < 4:
        scale, low = packed[group] & 63, packed[group + 4] & 63
    else:
        scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
        low = packed[group + 4] >> 4 | packed[group] >> 6 << 4
    nibbles = 16 if bits == 4 else 48
    q = block[nibbles + 32 * (group // 2) + byte] >> 4 * (group % 2) & 15
    if bits == 5:
        q += 16 * (block[16 + byte] >> group & 1)
    return f16(block, 0) * scale * q - f16(block, 2) * low


# levels of the non-linear quantisations, ggml-common.h
LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10]
LEVELS += [1, 13, 25, 38, 53, 69, 89, 113]


def iq4_nl(block, i):
    return f16(block, 0) * LEVELS[block[2 + i % 16] >> 4 * (i // 16) & 15]


def iq4_xs(block, i):
    group, high = i // 32, int(block[2]) | int(block[3]) << 8
    scale = block[4 + group // 2] >> 4 * (group % 2) & 15
    scale = (scale | (high >> 2 * group & 3) << 4) - 32
    q = block[8 + 16 * group + i % 16] >> 4 * (i % 32 // 16) & 15
    return f16(block, 0) * scale * LEVELS[q]


FORMATS = {
    # bytes and numbers of a block, where its scales in float16 stand, one number
    "Q2_K": (84, 256, (80, 82), q2_k),
    "Q3_K": (110, 256, (108,), q3_k),
    "Q4_K": (144, 256, (0, 2), functools.partial(of_4_and_5, bits=4)),
    "Q5_K": (176, 256, (0, 2), functools.partial(of_4_and_5, bits=5)),
    "IQ4_NL": (18, 32, (0,), iq4_nl),
    "IQ4_XS": (136, 256, (0,), iq4_xs),
}


def test_blocks_of_any_bits_are_the_numbers_of_ggml(tmp_path):
    """Against a loop over the numbers of ggml's blocks, on bytes drawn at random."""
    rng, kinds = np.random.default_rng(3), gguf.GGMLQuantizationType
    writer, raw = gguf.GGUFWriter(tmp_path / "q.gguf", "llama"), {}
    for name, (size, _, scales, _) in FORMATS.items():
        blocks = rng.integers(0, 256, (2, 3, size)).astype("u1")
        for at in scales:
            drawn = rng.normal(size=(2, 3, 1)).astype("f2")
            blocks[..., at : at + 2] = drawn.view("u1")
        raw[name] = blocks
        writer.add_tensor(name, blocks.reshape(2, -1), raw_dtype=kinds[name])
    finish(writer)
    read = {t.name: dequantise(t, "") for t in open_gguf(tmp_path / "q.gguf").tensors}
    for name, (_, size, _, number) in FORMATS.items():
        expected = [
            [[number(block, i) for block in row.astype(int) for i in range(size)]]
            for row in raw[name]
        ]
        assert_allclose(read[name], np.concatenate(expected), rtol=1e-5, atol=1e-4)
        assert len(np.unique(read[name])) > 20, name


def test_rotary_scaling_is_what_llama_cpp_makes_of_it(tmp_path):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    yarn |= {"rope.scaling.original_context_length": 16}
    for number, (change, expected) in enumerate(
        (
            ({"rope.scaling.factor": 2.0}, dict(rope_type="linear", factor=2.0)),
            ({"rope.scale_linear": 4.0}, dict(rope_type="linear", factor=4.0)),
            (
                {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
                dict(rope_type="linear", factor=8.0),
            ),
            (
                yarn,
                dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
            ),
            ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, None),
            ({"rope.scaling.factor": 1.0, "attention.causal": True}, None),
            ({"rope.dimension_count": 4, "attention.sliding_window": 0}, None),
        )
    ):
        config, _ = load_gguf(write(tmp_path / f"{number}.gguf", change=change))
        assert config.rope_scaling == (expected and RopeScaling(**expected)), change
    # Llama 3.1 and later: a divisor of each frequency
    factors = np.array([1, 5.5], "f4")
    path = write(tmp_path / "f.gguf", more={"rope_freqs.weight": factors})
    config, params = load_gguf(path)
    plain = checkpoint("llama_grouped_tied")[0].rotary_frequencies()
    assert_allclose(config.rotary_frequencies(), plain / factors)
    assert config.rope_scaling.scale == 1
    equal(params, load_gguf(tmp_path / "0.gguf")[1])
    assert type(config).from_hf(config.to_hf()) == config  # can be saved


def test_windows(tmp_path, refused):
    full, sliding = "full_attention", "sliding_attention"
    pattern = "attention.sliding_window_pattern"
    for number, (case, change, kinds) in enumerate(
        (
            ("llama_grouped_tied", {}, None),  # Mistral: all layers
            ("llama_grouped_tied", {pattern: [True, False]}, (sliding, full)),
            ("llama_grouped_tied", {pattern: 2}, (sliding, full)),
            ("qwen3_full_tied", {pattern: [False, True]}, (full, sliding)),
            ("qwen2_single_tied", {pattern: [True, True]}, None),
        )
    ):
        change = {"attention.sliding_window": 5} | change
        config, _ = load_gguf(write(tmp_path / f"{number}.gguf", case, change=change))
        assert (config.sliding_window, config.layer_types) == (5, kinds), change
        assert DecoderConfig.from_hf(config.to_hf()) == config
    # a size of a damaged file allocates nothing
    change = {"attention.sliding_window": 5, pattern: 2, "block_count": 2**32 - 1}
    path = write(tmp_path / "deep.gguf", change=change)
    refused("deep.gguf: the configuration has 4294967295 layers", load_gguf, path)
    change = {"attention.sliding_window": 5, pattern: [False, False]}
    config, _ = load_gguf(write(tmp_path / "none.gguf", change=change))
    assert config.sliding_window is None


@pytest.mark.parametrize("case", ["llama_bias", "qwen3_bias"])
def test_biases_of_the_attention(tmp_path, case):
    stored = golden(case, "decoder_variants.npz")
    expected = DecoderConfig.from_hf(json.loads(str(stored["config"])))
    weights = below(stored, "weights/")
    config, params = load_gguf(write(tmp_path / "a.gguf", (expected, weights)))
    assert config == expected and config.out_bias
    equal(params, params_from_hf(expected, weights))


def test_refusals(tmp_path, refused):
    whole = {"output_norm.weight": (gguf.GGMLQuantizationType.I8, np.zeros(16, "i1"))}
    gemma, yarn = {"architecture": "gemma"}, {"rope.scaling.type": "longrope"}
    factors, one = {"rope_freqs.weight": np.ones(2, "f4")}, np.ones(1, "f4")
    for name, message, options in (
        ("a", "has architecture 'gemma'; known", dict(change=gemma)),
        ("b", "lacks the key llama.block_count", dict(skip=["block_count"])),
        ("c", r"layers.1.self_attn.k_proj.w", dict(skip=["blk.1.attn_k.weight"])),
        ("d", "rope.scaling.type='longrope'; the decoder has", dict(change=yarn)),
        ("e", "'output_norm.weight' is quantised as I8;.*Q4_1", dict(quantised=whole)),
        (
            "f",
            "2, and rope_freqs",
            dict(change={"rope.scale_linear": 2.0}, more=factors),
        ),
        *(
            (
                f"key{i}",
                f"{'='.join(map(str, *change.items()))}",
                dict(change=change),
            )
            for i, change in enumerate(
                (
                    {"rope.dimension_count": 2},
                    {"attention.value_length": 8},
                    {"attention.key_length_swa": 4096},
                    {"attention.causal": False},
                    {"attention.scale": 0.5},
                    {"rope.scaling.attn_factor": 2.0},
                    {"rope.scaling.yarn_log_multiplier": 0.5},
                    {"expert_count": 8},
                    {"final_logit_softcapping": 30.0},
                    {"a_key_of_tomorrow": 3},
                    {"split.count": 2},
                )
            )
        ),
        (
            "window",
            "qwen2.attention.sliding_window=4 and .*=None, which does not say for each",
            dict(case="qwen2_single_tied", change={"attention.sliding_window": 4}),
        ),
        ("g", "general.type='adapter'", dict(change={"general.type": "adapter"})),
        ("h", "attention.head_count=0", dict(change={"attention.head_count": 0})),
        (
            "i",
            r"count=\[4, 4\] is of type",
            dict(change={"attention.head_count": [4, 4]}),
        ),
        (
            "j",
            "lacks the key llama.attention.layer_norm_rms",
            dict(skip=["attention.layer_norm_rms_epsilon"]),
        ),
        ("k", "q_proj.scale .* is not exp", dict(more={"blk.0.attn_q.scale": one})),
        ("l", "short_factor has 1 numbers", dict(more={"rope_freqs.weight": one})),
    ):
        path = write(tmp_path / f"{name}.gguf", **options)
        refused(f"{path}.*{message}", load_gguf, path)


def test_the_other_byte_order_is_refused_with_what_turns_it(tmp_path, refused):
    """Its numbers were read as they lie: weights of 1e32, and no word."""
    path = write(tmp_path / "b.gguf", order=gguf.GGUFEndian.BIG)
    refused("b.gguf is of the other byte order, .* Turn it: python -m", load_gguf, path)
    with pytest.raises(ValueError) as error:
        load_gguf(path)
    command = str(error.value).rpartition("Turn it: python ")[2].rstrip(".").split()
    subprocess.run([sys.executable, *command], input=b"YES\n", check=True, stderr=-3)
    equal(load_gguf(path)[1], load_gguf(write(tmp_path / "a.gguf"))[1])
    wrong = dict(recip="bf16", error=TypeError)
    refused("no setting 'recip'; .* Did you mean 'recipe'", load_gguf, path, **wrong)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(tmp_path, kept, refused):
    path = write(tmp_path / "a.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    refused(r"a.gguf \(\d+ bytes\) is cut off or no GGUF", load_gguf, path)
    none = tmp_path / "none.gguf"
    refused(r"none.gguf is absent", load_gguf, none, error=FileNotFoundError)


@pytest.fixture
def smollm2():
    pytest.importorskip("tokenizers")
    try:
        return find_weights("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_smollm2_tokenizer(smollm2):
    tokenizer = gguf_tokenizer(smollm2)
    ids = tokenizer.encode("The capital of France is 12")
    assert ids == [504, 3575, 282, 4649, 314, 216, 33, 34]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (49152, 2, 2)
    messages = [{"role": "user", "content": "Hi"}]
    text = render_chat(messages, "smollm2")
    ids = tokenizer.encode(text)
    assert ids[:2] == [1, 9690] and ids.count(2) == 2
    assert tokenizer.decode(ids) == text
    # the template in the file is the one rendered
    jinja2 = pytest.importorskip("jinja2")
    source = gguf_value(open_gguf(smollm2), "tokenizer.chat_template")
    template = jinja2.Template(source)
    assert template.render(messages=messages, add_generation_prompt=True) == text


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    path, tokenizer = smollm2, gguf_tokenizer(smollm2)
    config, params = load_gguf(path)
    assert count(params) == 134_515_008 and config.tied_embedding
    ids = tokenizer.encode("The capital of France is")
    tokens = jnp.zeros((1, 8), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
    run = jax.jit(functools.partial(prefill, config))
    logits, _ = run(params, tokens, jnp.array([len(ids)]))
    assert tokenizer.decode([int(logits[0].argmax())]) == " Paris"
