"""Makes decoder.npz: logits of transformers on tiny random models.

    pip install 'tmdjax[parity]' && python tests/goldens/make_decoder.py

Of each case it holds the configuration as transformers saves it, all weights under
their names in a checkpoint, token ids and float32 logits; of one case also adapters
as peft saves them, and the logits with them.
"""

import pathlib
import tempfile

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers

SIZES = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
CASES = {
    "llama_grouped_tied": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e5)),
    "llama_full_untied": ("Llama", dict(num_key_value_heads=4)),
    "qwen2_grouped_untied": ("Qwen2", dict(num_key_value_heads=2, rope_theta=1e6)),
    "qwen2_single_tied": ("Qwen2", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3_wide_untied": ("Qwen3", dict(num_key_value_heads=2, head_dim=6, rope_theta=1e6)),
    "qwen3_full_tied": ("Qwen3", dict(num_key_value_heads=4, head_dim=8, tie_word_embeddings=True)),
}  # fmt: skip
ADAPTED = "qwen2_grouped_untied"


def adapted(model, tokens):
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():  # the second factor starts at 0
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        logits = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = pathlib.Path(folder, "adapter_config.json").read_text()
        tensors = safetensors.numpy.load_file(f"{folder}/adapter_model.safetensors")
    arrays = {"adapter_config": np.array(saved), "adapted_logits": logits.numpy()}
    return arrays | {f"adapters/{name}": tensor for name, tensor in tensors.items()}


def make(case, kind, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().float()
    with torch.no_grad():  # biases start at 0 and scales at 1, which hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 9))
    with torch.no_grad():
        logits = model(tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = pathlib.Path(folder, "config.json").read_text()
    weights = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if not (options.get("tie_word_embeddings") and name == "lm_head.weight")
    }
    arrays = {"config": np.array(saved)}
    arrays |= {"tokens": tokens.numpy(), "logits": logits.numpy()}
    arrays |= {f"weights/{name}": tensor for name, tensor in weights.items()}
    return arrays | adapted(model, tokens) if case == ADAPTED else arrays


if __name__ == "__main__":
    everything = {
        f"{case}/{key}": value
        for case, (kind, options) in CASES.items()
        for key, value in make(case, kind, options).items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_name("decoder.npz"), **everything)
