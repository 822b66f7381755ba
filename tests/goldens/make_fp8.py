"""Makes fp8.npz: matrices in float8, as DeepGEMM's casts have them.

    pip install 'tmdjax[parity]' && python tests/goldens/make_fp8.py CLONE

CLONE is one of github.com/deepseek-ai/DeepGEMM, of which deep_gemm/utils/math.py is run
on a CPU. Of each granularity and kind of scale the file holds codes (uint8) and scales.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
CASES = {
    "1x128": ("per_token_cast_to_fp8", (7, 200)),
    "128x1": ("per_channel_cast_to_fp8", (256, 5)),
    "128x128": ("per_block_cast_to_fp8", (150, 136)),
}


def matrix(shape):
    """Several magnitudes in every group, an outlier, and groups below the floor."""
    random = np.random.RandomState(0)
    x = random.standard_normal(shape) * 2.0 ** random.randint(-8, 4, shape)
    x[3, 4], x[:, :1], x[128:, :] = 3e4, 0, 1e-5 * x[128:, :]
    return np.float32(x)


def main(clone):
    path = pathlib.Path(clone, "deep_gemm", "utils", "math.py")
    spec = importlib.util.spec_from_file_location("deep_gemm_math", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for granularity, (name, shape) in CASES.items():
        x = torch.from_numpy(matrix(shape))
        for scale in ("fp32", "pow2"):
            values, scales = getattr(module, name)(x, scale == "pow2")
            case = f"{granularity}/{scale}"
            found[f"{case}/codes"] = values.view(torch.uint8).numpy()
            found[f"{case}/scale"] = scales.numpy()
    np.savez_compressed(HERE / "fp8.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
