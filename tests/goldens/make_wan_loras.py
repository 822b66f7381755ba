"""Makes wan_loras.npz: adapters of the network 'wan' of video_dit.npz in four layouts.

    pip install 'tmdjax[parity]' peft && python tests/goldens/make_wan_loras.py

Of each layout it holds tensors by name (whole numbers, in units of 1 / 64), settings
(adapter_config.json, or the metadata that diffusers stores), and the output of the
network with these adapters as diffusers, or PEFT, applies them.
"""

import copy
import json
import pathlib
import tempfile

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from make_video_dit import CASES, COMMON, UNIT
from peft import PeftModel
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
GENERATOR = np.random.default_rng(0)
WIDTH, HIDDEN, LAYERS = 48, CASES["wan"]["ffn_dim"], CASES["wan"]["num_layers"]
TEMPORAL = ("condition_embedder.time_proj", WIDTH, 6 * WIDTH, 3)


def pair(inputs, outputs, rank):
    """The two matrices of an adapter [out, in] in units of 1 / 64."""
    shapes = (rank, inputs), (outputs, rank)
    return [torch.tensor(GENERATOR.integers(-32, 33, shape)) / UNIT for shape in shapes]


def of_modules(modules, a=".lora_A.weight", b=".lora_B.weight"):
    tensors = {}
    for name, inputs, outputs, rank in modules:
        tensors[name + a], tensors[name + b] = pair(inputs, outputs, rank)
    return tensors


def attention(i, blocks, names, rank):
    return [
        (f"blocks.{i}.{block}.{name}", WIDTH, WIDTH, rank)
        for block in blocks
        for name in names
    ]


def ours_in_diffusers():
    """Of some modules alone; queries of all layers but the second."""
    modules = [TEMPORAL, ("proj_out", WIDTH, 16, 2)]
    for i in range(LAYERS):
        modules += attention(i, ["attn1"], ["to_q", "to_out.0"][i == 1 :], 2)
        modules += [(f"blocks.{i}.ffn.net.0.proj", WIDTH, HIDDEN, 2 + i)]
    named = [("transformer." + name, *rest) for name, *rest in modules]
    return of_modules(named), {}, None


def with_metadata():
    """As diffusers stores an adapter that has a scale and ranks of its own."""
    modules = [m for i in range(LAYERS) for m in attention(i, ["attn2"], ["to_k"], 3)]
    modules += [("proj_out", WIDTH, 16, 2)]
    named = [("transformer." + name, *rest) for name, *rest in modules]
    settings = {
        "r": 3, "lora_alpha": 7, "rank_pattern": {"proj_out": 2}, "peft_type": "LORA",
        "target_modules": ["attn2.to_k", "proj_out"], "bias": "none",
    }  # fmt: skip
    settings = {f"transformer.{key}": value for key, value in settings.items()}
    return of_modules(named), settings, None


def original():
    modules = [("time_projection.1", WIDTH, 6 * WIDTH, 2), ("head.head", WIDTH, 16, 2)]
    for i in range(LAYERS):
        modules += attention(i, ["self_attn", "cross_attn"], "qkvo", 2)
        modules += [(f"blocks.{i}.ffn.2", HIDDEN, WIDTH, 2)]
    named = [("diffusion_model." + name, *rest) for name, *rest in modules]
    tensors = of_modules(named, ".lora_down.weight", ".lora_up.weight")
    for i in range(LAYERS):  # of some modules alone
        tensors[f"diffusion_model.blocks.{i}.ffn.2.alpha"] = torch.tensor(1.0 + i)
    return tensors, {}, _convert_non_diffusers_wan_lora_to_diffusers


def kohya():
    tensors = {}
    for i in range(LAYERS):
        modules = attention(i, ["self_attn", "cross_attn"], "qkvo", 2)
        modules += [(f"blocks.{i}.ffn.0", WIDTH, HIDDEN, 4)]
        modules += [(f"blocks.{i}.ffn.2", HIDDEN, WIDTH, 4)]
        named = [("lora_unet_" + m.replace(".", "_"), *rest) for m, *rest in modules]
        tensors |= of_modules(named, ".lora_down.weight", ".lora_up.weight")
        for j, (name, *_) in enumerate(named):
            tensors[name + ".alpha"] = torch.tensor(1.0 + (i + j) % 3)
    return tensors, {}, _convert_musubi_wan_lora_to_diffusers


def peft():
    modules = [TEMPORAL]
    for i in range(LAYERS):
        modules += attention(i, ["attn1"], ["to_q", "to_v"], 4)
    named = [("base_model.model." + name, *rest) for name, *rest in modules]
    settings = {
        "peft_type": "LORA", "task_type": None, "r": 4, "lora_alpha": 6, "bias": "none",
        "use_rslora": True, "rank_pattern": {"time_proj": 3},
        "alpha_pattern": {"to_v": 3.0},
        "target_modules": ["attn1.to_q", "attn1.to_v", "time_proj"],
    }  # fmt: skip
    return of_modules(named), settings, None


def adapted(network, name, tensors, settings, convert):
    network = copy.deepcopy(network)
    if name == "peft":
        with tempfile.TemporaryDirectory() as folder:
            save_file(tensors, pathlib.Path(folder, "adapter_model.safetensors"))
            text = json.dumps(settings)
            pathlib.Path(folder, "adapter_config.json").write_text(text)
            return PeftModel.from_pretrained(network, folder).eval()
    copied = {key: tensor.clone() for key, tensor in tensors.items()}  # scaled in place
    converted = convert(copied) if convert else copied
    network.load_lora_adapter(
        converted, prefix="transformer", metadata=settings or None
    )
    return network.eval()


if __name__ == "__main__":
    with np.load(HERE / "video_dit.npz") as stored:
        arrays = {k.removeprefix("wan/"): stored[k] for k in stored if k[:4] == "wan/"}
    network = WanTransformer3DModel(**CASES["wan"] | COMMON).eval()
    weights = {
        k.removeprefix("tensors/"): torch.tensor(v.astype(np.float32) / UNIT)
        for k, v in arrays.items()
        if k.startswith("tensors/")
    }
    network.load_state_dict(weights)
    x, t, text = (torch.tensor(arrays[name]) for name in ("x", "t", "text"))
    made = {}
    for make in (ours_in_diffusers, with_metadata, original, kohya, peft):
        name = make.__name__.removeprefix("ours_in_").removeprefix("with_")
        tensors, settings, convert = make()
        with torch.no_grad():
            peer = adapted(network, name, tensors, settings, convert)
            made[f"{name}/output"] = peer(x, 1000 * t, text).sample.numpy()
            assert np.abs(made[f"{name}/output"] - arrays["output"]).max() > 0.1
        made[f"{name}/settings"] = np.array(json.dumps(settings))
        for key, tensor in tensors.items():
            whole = (UNIT * tensor).numpy()
            kind = np.int16 if key.endswith(".alpha") else np.int8
            made[f"{name}/tensors/{key}"] = whole.astype(kind)
    np.savez_compressed(HERE / "wan_loras.npz", **made)
