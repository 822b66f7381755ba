"""Makes decoder_variants.npz, as make_decoder.py does: scaled rotations, biases, windows.

pip install 'tmdjax[parity]' && python tests/goldens/make_decoder_variants.py
"""

import pathlib

import numpy as np
from make_decoder import make

SMALL = dict(
    num_hidden_layers=1, intermediate_size=8, num_key_value_heads=2, head_dim=16
)
LENGTH = dict(rope_theta=1e4, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0)
MSCALE = dict(
    mscale=0.7, mscale_all_dim=0.3, beta_fast=4, beta_slow=0.5, truncate=False
)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {
    "llama3": ("Llama", dict(rope_parameters=LLAMA3 | LENGTH)),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e5))),
    "yarn": ("Qwen2", dict(rope_parameters=YARN | LENGTH)),
    "yarn_mscale": ("Qwen3", dict(rope_parameters=YARN | LENGTH | MSCALE)),
    "yarn_attention_factor": ("Llama", dict(rope_parameters=YARN | LENGTH | dict(attention_factor=1.3))),
    "llama_bias": ("Llama", dict(attention_bias=True)),
    "qwen3_bias": ("Qwen3", dict(attention_bias=True, tie_word_embeddings=True)),
    "mistral_window": ("Mistral", dict(head_dim=4, sliding_window=3, num_hidden_layers=2)),
    "ministral_windows": ("Ministral", dict(head_dim=4, sliding_window=3, num_hidden_layers=3, layer_types=ALTERNATING)),
    "qwen2_windows": ("Qwen2", dict(head_dim=4, use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=2)),
    "qwen3_windows": ("Qwen3", dict(head_dim=4, use_sliding_window=True, sliding_window=2, num_hidden_layers=3, layer_types=ALTERNATING)),
}  # fmt: skip

if __name__ == "__main__":
    everything = {
        f"{case}/{key}": value
        for case, (kind, options) in CASES.items()
        for key, value in make(case, kind, SMALL | options).items()
    }
    path = pathlib.Path(__file__).with_name("decoder_variants.npz")
    np.savez_compressed(path, **everything)
