"""Video transformers from diffusers and from Wan's own code: parity, names, folders,
what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from model_helpers import GOLDENS, below, equal, golden
from numpy.testing import assert_allclose

from tmdjax import models
from tmdjax.core.trees import flatten
from tmdjax.models import functional, load_video_dit, save_video_dit
from tmdjax.models.checkpoints import video_dit as hf_video_dit
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors
from tmdjax.models.checkpoints.video_dit import params_from_hf_video, video_dit_from_hf

CASES = ("wan", "wide_patches")
LORAS = ("diffusers", "metadata", "original", "kohya", "peft")
STEM = "diffusion_pytorch_model"


@functools.cache
def stored(case):
    arrays = golden(case, "video_dit.npz")
    tensors = {k: v / np.float32(64) for k, v in below(arrays, "tensors/").items()}
    return arrays | {"config": json.loads(str(arrays["config"]))}, tensors


@functools.cache
def network(case):
    values, tensors = stored(case)
    config = values["config"]
    module = video_dit_from_hf(config)
    return module, params_from_hf_video(module, config["in_channels"], tensors)


@functools.cache
def original():
    """The case 'wan' as Wan's own code stores it, which computes the same there."""
    found = json.loads((GOLDENS / "wan_original.json").read_text())
    _, tensors = stored("wan")
    # what that class does not store differs from its defaults in this small network
    config = found["config"] | {"text_dim": stored("wan")[0]["config"]["text_dim"]}
    return config, {name: tensors[there] for name, there in found["names"].items()}


def channels_last(array):
    return jnp.asarray(array.transpose(0, 2, 3, 4, 1))


@functools.cache
def gradients(case):
    """A compiled function of parameters: input gradients, and the velocity."""
    values, _ = stored(case)
    apply_fn = functional(network(case)[0])
    given = channels_last(values["x"]), jnp.asarray(values["text"])

    @jax.jit
    def run(params):
        def weighted(x, text):
            v = apply_fn(params, x, values["t"], text)
            return (v * channels_last(values["weights"])).sum(), v

        return jax.grad(weighted, (0, 1), has_aux=True)(*given)

    return run


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as the library of the format writes it."""
    library = pytest.importorskip("safetensors.numpy")
    values, tensors = stored("wan")
    library.save_file(tensors, tmp_path / f"{STEM}.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(values["config"]))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_forward_and_input_gradient_equal_diffusers(case):
    values, _ = stored(case)
    (slope, text_slope), v = gradients(case)(network(case)[1])
    assert_allclose(v, channels_last(values["output"]), atol=2e-5)
    slopes = channels_last(values["gradient"]), values["text_gradient"]
    for got, want in zip((slope, text_slope), slopes):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
        assert_allclose(got, want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "spec", "count"),
    [("1.3B", models.WAN_1_3B, 825), ("14B", models.WAN_14B, 1095)],
)
def test_all_tensors_of_the_published_sizes(name, spec, count):
    """Names and shapes as diffusers lists them; nothing is allocated."""
    listed = json.loads((GOLDENS / "video_dit_tensors.json").read_text())[name]
    want = dict(listed["rest"])
    for layer in range(listed["layers"]):
        want |= {f"blocks.{layer}.{k}": v for k, v in listed["block"].items()}
    leaves = hf_video_dit.checkpoint_leaves(models.build(spec), 16)
    got = {tensor: list(leaf.shape) for leaf in leaves for tensor in leaf.names}
    assert len(got) == count
    assert got == want


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_configuration_round_trip(case):
    values, tensors = stored(case)
    module, params = network(case)
    equal(hf_video_dit.params_to_hf_video(module, params), tensors)
    config = hf_video_dit.video_dit_to_hf(module, values["config"]["in_channels"])
    want = {k: v for k, v in values["config"].items() if not k.startswith("_diff")}
    assert config == want
    assert video_dit_from_hf(config) == module


def test_the_original_layout_is_the_same_network(tmp_path, refused):
    module, params = network("wan")
    config, tensors = original()
    want = module.clone(rope_length=1024)
    assert video_dit_from_hf(config) == want
    equal(params_from_hf_video(module, 4, tensors), params)
    equal(hf_video_dit.params_to_hf_video(module, params, "original"), tensors)
    written = hf_video_dit.video_dit_to_hf(module, 4, "original")
    assert {key: written[key] for key in config} == config | {"text_len": 512}
    save_video_dit(tmp_path, module, params, layout="original")
    assert read_safetensors(tmp_path / f"{STEM}.safetensors").keys() == tensors.keys()
    again, read = load_video_dit(tmp_path)
    assert again == want
    equal(read, params)
    # the repository of the 1.3 B network, key by key
    published = dict(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, freq_dim=256)
    published |= dict(in_dim=16, out_dim=16, eps=1e-6, text_len=512, model_type="t2v")
    published |= {"_class_name": "WanModel", "_diffusers_version": "0.30.0"}
    assert video_dit_from_hf(published) == models.build(models.WAN_1_3B)
    for change, message in (
        (dict(model_type="i2v"), "model_type='i2v', a part this network lacks"),
        (dict(window_size=[9, 9]), r"window_size=\[9, 9\].*\[-1, -1\] alone"),
        (dict(vace_layers=[0]), r"vace_layers=\[0\], a part"),
        (dict(num_heads=7), "dim=1536, which num_heads=7 does not divide"),
        (dict(num_heads=0), "num_heads of config.json=0 must be at least 1"),
    ):
        refused(message, video_dit_from_hf, published | change)
    del published["out_dim"]
    refused("config.json lacks out_dim", video_dit_from_hf, published)
    refused(
        "layout='wan' is not one of",
        save_video_dit,
        tmp_path,
        *network("wan"),
        layout="wan",
    )


def test_names_of_two_layouts_are_not_mixed(refused):
    module, _ = network("wan")
    _, theirs = stored("wan")
    _, tensors = original()
    mixed = {k: v for k, v in tensors.items() if "head" not in k}
    mixed |= {k: v for k, v in theirs.items() if "proj_out" in k or k[:5] == "scale"}
    both = r"names of two layouts, .*\(diffusers\), .*\(original\)"
    for given in (mixed, tensors | theirs):
        refused(both, params_from_hf_video, module, 4, given)
    short = {k: v for k, v in tensors.items() if k != "blocks.1.norm3.bias"}
    refused("blocks.1.norm3.bias is missing", params_from_hf_video, module, 4, short)


def test_folders_round_trip(folder, tmp_path, refused):
    """In one file, and then in several that replace it."""
    module, params = load_video_dit(folder, recipe="bf16", depth=3)
    assert module == network("wan")[0].clone(recipe="bf16")
    equal(params, network("wan")[1])
    saved = tmp_path / "saved"
    for size, least in ((10**9, 1), (100_000, 3)):
        extra = {"_diffusers_version": "0.42"}
        save_video_dit(saved, module, params, extra=extra, max_shard_bytes=size)
        files = sorted(saved.glob("*.safetensors"))
        assert len(files) >= least and all(f.stat().st_size < 1.2 * size for f in files)
        again, params_again = load_video_dit(saved)
        assert again == module.clone(recipe="fp32")
        equal(params_again, params)
        assert json.loads((saved / "config.json").read_text())["_diffusers_version"]
    assert files[0].name.startswith(f"{STEM}-00001-of-0000")
    index = json.loads((saved / f"{STEM}.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored("wan")[1])
    deep = module.clone(depth=10**9)
    refused("1000000000 layers", params_from_hf_video, deep, 16, {})
    files[1].unlink()
    absent = dict(error=FileNotFoundError)
    refused("is absent; .*index.json puts", load_video_dit, saved, **absent)


def test_narrow_parameters_keep_the_time_in_float32(folder, tmp_path):
    module, params = load_video_dit(folder, dtype=ml_dtypes.bfloat16)
    kinds = {path: leaf.dtype for path, leaf in flatten(params).items()}
    wide = {path for path, kind in kinds.items() if kind == np.float32}
    layers = ("hidden", "out")
    time = {f"time_embedding/{a}/{b}" for a in layers for b in ("kernel", "bias")}
    tables = {"blocks/scale_shift_table", "final/scale_shift_table"}
    assert wide == time | tables | {"blocks/cross_norm/scale", "blocks/cross_norm/bias"}
    save_video_dit(tmp_path / "saved", module, params, dtype=ml_dtypes.bfloat16)
    tensors = read_safetensors(tmp_path / "saved" / f"{STEM}.safetensors")
    found = {tensor.dtype for tensor in tensors.values()}
    assert found == {np.dtype(ml_dtypes.bfloat16)}
    _, kept = load_video_dit(tmp_path / "saved", dtype=None)
    assert kept["final"]["scale_shift_table"].dtype == ml_dtypes.bfloat16


@functools.cache
def adapted(layout):
    """Adapters of the network as a layout has them: tensors, settings, output."""
    arrays = golden(layout, "wan_loras.npz")
    whole = below(arrays, "tensors/")
    tensors = {k: np.asarray(v / np.float32(64)) for k, v in whole.items()}
    return tensors, json.loads(str(arrays["settings"])), arrays["output"]


def write_adapters(folder, layout):
    """As the library of the layout does: a folder or a file."""
    library = pytest.importorskip("safetensors.numpy")
    tensors, settings, _ = adapted(layout)
    if layout == "peft":
        library.save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder
    stored = {"lora_adapter_metadata": json.dumps(settings)} if settings else None
    name = "pytorch_lora_weights" if layout == "diffusers" else layout
    library.save_file(tensors, folder / f"{name}.safetensors", stored)
    return folder if layout == "diffusers" else folder / f"{name}.safetensors"


def changes(adapters, alpha):
    """What adapters add to each kernel."""
    leaves = {path: np.float64(leaf) for path, leaf in flatten(adapters).items()}
    return {
        path: alpha / leaf.shape[-1] * leaf @ leaves[f"{path[:-1]}b"]
        for path, leaf in leaves.items()
        if path.endswith("/a")
    }


@pytest.mark.parametrize("layout", LORAS)
def test_adapters_do_what_they_do_in_the_library_of_their_layout(layout, tmp_path):
    """And again, merged, after they were written in each layout."""
    module, params = network("wan")
    adapters, alpha = models.load_video_adapters(
        write_adapters(tmp_path, layout), module
    )
    want = changes(adapters, alpha)
    leaves = {
        path: np.float32(leaf + want.get(f"{path}/a", 0))
        for path, leaf in flatten(params).items()
    }
    merged = traverse_util.unflatten_dict(leaves, sep="/")
    output = gradients("wan")(merged)[1]
    assert_allclose(output, channels_last(adapted(layout)[2]), atol=2e-4)
    for other in ("diffusers", "original", "peft"):
        saved = tmp_path / f"again_{other}"
        models.save_video_adapters(saved, adapters, alpha, layout=other)
        again = models.load_video_adapters(saved, module)
        same = changes(*again)
        assert same.keys() == want.keys()
        for path, change in same.items():
            assert_allclose(change, want[path], atol=1e-6)
        if other == "peft":
            assert again[1] == alpha
            equal(again[0], adapters)


def test_adapters_of_some_layers_are_zero_in_the_others():
    module, _ = network("wan")
    tensors, _, _ = adapted("diffusers")
    adapters, alpha = models.adapters_from_hf_video(module, tensors)
    query = adapters["blocks"]["attention"]["query"]["kernel"]
    assert query["a"].shape == (3, 48, 2) and query["b"].dtype == np.float32
    assert [bool(np.any(layer)) for layer in query["b"]] == [True, False, True]
    assert adapters["blocks"]["mlp_in"]["kernel"]["a"].shape == (3, 48, 4)
    assert alpha == 4  # ranks of 2, 3 and 4, each its own alpha


def test_adapters_are_known_by_a_list_of_what_is_understood(refused, tmp_path):
    module, params = network("wan")
    tensors, _, _ = adapted("kohya")
    load = functools.partial(models.adapters_from_hf_video, module)
    name = "lora_unet_blocks_1_self_attn_q"
    for extra, message in (
        (f"{name}.dora_scale", "dora_scale .* is not understood"),
        (f"{name}.lokr_w1", "lokr_w1 .* is not understood"),
        (f"{name}.diff_b", "diff_b .* is not understood"),
        ("lora_unet_blocks_3_self_attn_q.alpha", "blocks_3_self_attn_q.alpha .* not"),
        ("lora_te_text_model_q.alpha", "lora_te_text_model_q.alpha .* not underst"),
        ("diffusion_model.patch_embedding.lora_A.weight", "patch_embedding.* not und"),
        ("diffusion_model.blocks.1.cross_attn.k_img.lora_A.weight", "k_img.* not und"),
        ("transformer.blocks.1.attn1.to_q.lora_A.weight", "second of its kind"),
    ):
        refused(message, load, tensors | {extra: np.float32(np.ones((2, 48)))})
    both = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
    for missing, part in zip(both, "AB"):
        less = {k: v for k, v in tensors.items() if k != missing}
        refused(f"1 tensor.*{name} has no {part}", load, less)
    words = rf"A of {name} is \[2, 47\], expected \[2, 48\]"
    refused(words, load, tensors | {both[0]: np.ones((2, 47), np.float32)})
    refused("has 2 numbers", load, tensors | {f"{name}.alpha": np.ones(2, np.float32)})
    refused(f"{name}.alpha=-1", load, tensors | {f"{name}.alpha": np.float32(-1)})
    refused(r"alpha=nan", load, tensors | {f"{name}.alpha": np.float32(np.nan)})
    assert load(tensors | {f"{name}.alpha": np.int64(16)})[1] == 16  # torch.tensor(16)
    refused("expected floating", load, tensors | {both[0]: np.ones((2, 48), int)})
    refused("beside settings", load, tensors, {"r": 2, "lora_alpha": 2})
    refused("it has none", load, {})
    tensors, settings, _ = adapted("peft")
    refused("give its content as settings", load, tensors)
    refused("use_dora=True", load, tensors, settings | {"use_dora": True})
    refused(r"expected \[8, 48\]", load, tensors, settings | {"r": 8})
    file = functools.partial(models.load_video_adapters, tmp_path, module)
    refused("neither adapter_config", file, error=FileNotFoundError)
    write_adapters(tmp_path, "peft")
    write_adapters(tmp_path, "diffusers")
    refused("holds two sets of adapters.*give adapter_model.safetensors or", file)
    for name in ("adapter_model", "pytorch_lora_weights"):
        models.load_video_adapters(tmp_path / f"{name}.safetensors", module)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "lora.safetensors")
    own = tmp_path / "lora.safetensors"
    refused("give its content as settings", models.load_video_adapters, own, module)
    save = functools.partial(models.save_video_adapters, tmp_path)
    refused("there are no adapters", save, {}, 1.0)
    refused("layout='kohya' is not one of", save, {}, 1.0, layout="kohya")
    drawn = models.lora.init(jax.random.key(0), params, 2, ["patch_embedding"])
    refused("leave it out of the targets", save, drawn, 1.0)
    alien = {
        "blocks": {"gate": {"kernel": {"a": np.ones((2, 2)), "b": np.ones((2, 2))}}}
    }
    refused("'blocks/gate' is no module of a video", save, alien, 1.0)
    refused("alpha=-1", save, drawn, -1.0)


@pytest.mark.nightly
def test_diffusers_reads_what_is_written(folder, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs tmdjax[parity]")
    torch = pytest.importorskip("torch", reason="needs tmdjax[parity]")
    saved = tmp_path / "saved"
    save_video_dit(saved, *load_video_dit(folder), max_shard_bytes=100_000)
    peer = diffusers.WanTransformer3DModel.from_pretrained(saved)
    values, _ = stored("wan")
    x, t, text = (torch.tensor(values[name]) for name in ("x", "t", "text"))
    with torch.no_grad():
        output = peer(x, 1000 * t, text).sample
    assert_allclose(output, values["output"], atol=2e-5)
    peft = pytest.importorskip("peft")
    tensors, _, want = adapted("kohya")
    adapters = models.adapters_from_hf_video(network("wan")[0], tensors)
    for layout in ("diffusers", "peft"):
        models.save_video_adapters(saved / layout, *adapters, layout=layout)
        again = diffusers.WanTransformer3DModel.from_pretrained(saved)
        if layout == "peft":
            again = peft.PeftModel.from_pretrained(again, saved / layout)
        else:
            file = "pytorch_lora_weights.safetensors"
            again.load_lora_adapter(saved / layout, weight_name=file)
        with torch.no_grad():
            output = again.eval()(x, 1000 * t, text).sample
        assert_allclose(output, want, atol=2e-4)


def test_all_unfit_tensors_are_named(folder, refused):
    tensors = dict(stored("wan")[1])
    tensors["blocks.3.attn1.to_q.bias"] = tensors.pop("blocks.1.attn1.to_q.bias")
    tensors["proj_out.bias"] = tensors["proj_out.bias"][1:]
    write_safetensors(folder / f"{STEM}.safetensors", tensors)
    for message in (
        r"3 tensor\(s\) do not fit a video",
        r"blocks.1.attn1.to_q.bias is missing, expected \[48\]",
        r"blocks.3.attn1.to_q.bias \[48\] is not expected",
        r"proj_out.bias has shape \[15\], expected \[16\]",
    ):
        refused(message, load_video_dit, folder)


def test_other_networks_are_refused(refused):
    config = stored("wan")[0]["config"]
    for change, message in (
        (dict(image_dim=1280), "image_dim=1280, a part this network lacks"),
        (dict(added_kv_proj_dim=5120), "added_kv_proj_dim=5120, a part"),
        (dict(qk_norm="rms_norm"), "qk_norm='rms_norm'.*'rms_norm_across_heads'"),
        (dict(vace_layers=[0, 5]), r"vace_layers=\[0, 5\], a part"),
        (dict(_class_name="FluxTransformer2DModel"), "of a 'FluxTransformer2DModel'"),
        (dict(attention_head_dim=25), "head_dim=25 must be even"),
    ):
        refused(message, video_dit_from_hf, config | change)
    absent = ("ffn_dim", "in_channels", "eps", "pos_embed_seq_len")
    rest = {key: value for key, value in config.items() if key not in absent}
    refused(r"config.json lacks ffn_dim, in_channels;", video_dit_from_hf, rest)


def test_missing_files(tmp_path, refused):
    missing = dict(error=FileNotFoundError)
    refused("config.json is absent", load_video_dit, tmp_path, **missing)
    (tmp_path / "config.json").write_text(json.dumps(stored("wan")[0]["config"]))
    refused(f"neither {STEM}.safetensors nor", load_video_dit, tmp_path, **missing)


def test_parameters_of_another_network_are_not_saved(tmp_path, refused):
    module, params = network("wan")
    message = "not the parameters of that video transf"
    refused(message, save_video_dit, tmp_path, module.clone(depth=2), params)
    refused("patch_embedding/kernel is missing", save_video_dit, tmp_path, module, {})
    assert not list(tmp_path.iterdir())
