"""Makes wan_original.json: tensors and settings of Wan 2.1 as its own code names them.

    pip install 'tmdjax[parity]' && python tests/goldens/make_wan_original.py CLONE

CLONE is one of github.com/Wan-Video/Wan2.1, of which wan/modules/model.py is run, with
torch's attention for the fused one. Its network is given the weights of the case 'wan'
in video_dit.npz under its own names; what it computes must be the output stored there,
which is diffusers'. The file holds the name in diffusers of each tensor, and config.json.
"""

import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from make_video_dit import CASES, COMMON, UNIT

HERE = pathlib.Path(__file__).parent


def attention(q, k, v, k_lens=None, **_):
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)


def their_network(clone):
    package = types.ModuleType("wan_modules")
    package.__path__ = []
    fused = types.ModuleType("wan_modules.attention")
    fused.flash_attention = attention
    sys.modules |= {"wan_modules": package, "wan_modules.attention": fused}
    path = pathlib.Path(clone, "wan", "modules", "model.py")
    spec = importlib.util.spec_from_file_location("wan_modules.model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = CASES["wan"]
    heads = case["num_attention_heads"]
    return module.WanModel(
        in_dim=case["in_channels"], out_dim=case["out_channels"], num_heads=heads,
        dim=heads * case["attention_head_dim"], num_layers=case["num_layers"],
        ffn_dim=case["ffn_dim"], text_len=7, text_dim=COMMON["text_dim"],
        freq_dim=COMMON["freq_dim"],
    )  # fmt: skip


if __name__ == "__main__":
    network = their_network(sys.argv[1]).eval()
    shapes = network.state_dict()
    tokens = {name: torch.tensor(i) for i, name in enumerate(shapes)}
    converted = convert_wan_transformer_to_diffusers(dict(tokens))
    theirs = {int(token): name for name, token in converted.items()}
    names = {name: theirs[i] for i, name in enumerate(shapes)}
    with np.load(HERE / "video_dit.npz") as stored:
        arrays = {k.removeprefix("wan/"): stored[k] for k in stored if k[:4] == "wan/"}
    weights = {
        name: torch.tensor(arrays[f"tensors/{there}"].astype(np.float32) / UNIT)
        for name, there in names.items()
    }
    network.load_state_dict(weights)
    x, t, text = (torch.tensor(arrays[name]) for name in ("x", "t", "text"))
    with torch.no_grad():
        positions = x[0, 0, :, ::2, ::2].numel()  # no padding, which needs a mask
        output = torch.stack(network(list(x), 1000 * t, list(text), positions))
    np.testing.assert_allclose(output, arrays["output"], atol=2e-5)
    config = {k: v for k, v in network.config.items() if k != "_use_default_values"}
    ignored = network.ignore_for_config
    config = {"_class_name": "WanModel"} | {
        key: value for key, value in config.items() if key not in ignored
    }
    made = json.dumps({"config": config, "names": names}, indent=1)
    (HERE / "wan_original.json").write_text(made + "\n")
