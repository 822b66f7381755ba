"""Makes video_dit.npz and video_dit_tensors.json: WanTransformer3DModel of diffusers.

    pip install 'tmdjax[parity]' && python tests/goldens/make_video_dit.py

Of each small random network the first holds the configuration as diffusers saves it,
all weights under their names (whole numbers, in units of 1 / 64), inputs, the float32
output, and the gradient of sum(output * weights) to the video and to the text states;
videos are [batch, channel, frame, height, width] as there. The second holds names and
shapes of all tensors of the two published sizes.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
from diffusers import WanTransformer3DModel

CASES = {
    "wan": dict(
        num_attention_heads=2, attention_head_dim=24, num_layers=3, patch_size=(1, 2, 2),
        in_channels=4, out_channels=4, ffn_dim=40,
    ),
    "wide_patches": dict(
        num_attention_heads=3, attention_head_dim=16, num_layers=2, patch_size=(2, 2, 2),
        in_channels=3, out_channels=5, ffn_dim=32, cross_attn_norm=False,
    ),
}  # fmt: skip
COMMON = dict(text_dim=10, freq_dim=12, rope_max_seq_len=32)
UNIT = 64
SIZES = {"wan": (3, 4, 6), "wide_patches": (4, 6, 4)}
PUBLISHED = {
    "1.3B": dict(num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "14B": dict(num_attention_heads=40, num_layers=40, ffn_dim=13824),
}


def make(case):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**CASES[case] | COMMON).eval().float()
    with torch.no_grad():  # scales at 1 and biases at 0 hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.12 * torch.randn_like(parameter))
            parameter.copy_((UNIT * parameter).round().clamp(-127, 127) / UNIT)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = pathlib.Path(folder, "config.json").read_text()
    x = torch.randn(2, CASES[case]["in_channels"], *SIZES[case], requires_grad=True)
    t = torch.tensor([0.137, 0.999])
    text = torch.randn(2, 7, COMMON["text_dim"])
    text[0, 4:] = 0  # past the true length
    text.requires_grad_()
    output = model(x, 1000 * t, text).sample
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    arrays = dict(
        x=x, t=t, text=text, output=output, weights=weights,
        gradient=x.grad, text_gradient=text.grad,
    )  # fmt: skip
    arrays = {name: tensor.detach().numpy() for name, tensor in arrays.items()}
    arrays["config"] = np.array(config)
    for name, tensor in model.state_dict().items():
        arrays[f"tensors/{name}"] = (UNIT * tensor).to(torch.int8).numpy()
    return arrays


def published(size):
    with torch.device("meta"):
        model = WanTransformer3DModel(**PUBLISHED[size])
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    here = pathlib.Path(__file__)
    everything = {
        f"{case}/{key}": value for case in CASES for key, value in make(case).items()
    }
    np.savez_compressed(here.with_name("video_dit.npz"), **everything)
    tables = {}
    for size in PUBLISHED:
        # Blocks are alike: they are written once, with what else there is.
        tensors = published(size)
        layers = 1 + max(int(k.split(".")[1]) for k in tensors if k[:7] == "blocks.")
        block = {k[9:]: v for k, v in tensors.items() if k.startswith("blocks.0.")}
        whole = {f"blocks.{i}.{k}": v for i in range(layers) for k, v in block.items()}
        rest = {k: v for k, v in tensors.items() if not k.startswith("blocks.")}
        assert whole | rest == tensors
        tables[size] = {"layers": layers, "block": block, "rest": rest}
    text = json.dumps(tables, indent=1)
    here.with_name("video_dit_tensors.json").write_text(text + "\n")
