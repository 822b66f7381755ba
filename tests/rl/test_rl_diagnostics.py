import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import quant, rl


def test_ratios_by_hand_small_and_large(refused):
    d = jnp.log(jnp.array([0.5, 1.0, 2.0, 1.25]))
    assert_allclose(rl.ratio_error(d), [0.5, 0, 1, 0.25], rtol=1e-5)
    low, high = rl.beyond_clip(d, 0.2)
    assert_array_equal(low, [True, False, False, False])
    assert_array_equal(high, [False, False, True, True])
    low, high = rl.beyond_clip(d, (0.6, 0.3))
    assert not low.any() and high.sum() == 1
    small = np.array([1e-6, -2e-6], np.float32)
    assert_allclose(rl.ratio_error(small), [1e-6, 2e-6], rtol=1e-5)
    assert np.isfinite(rl.ratio_error(300.0))
    gradient = jax.grad(lambda x: rl.ratio_error(x).sum())(d)
    assert_array_equal(gradient, 0)
    refused("clip_range low=-0.2", rl.beyond_clip, d, -0.2)
    refused("clip_range low=-0.2", rl.check_first_ratio, 0.0, -0.2)


def test_first_ratio():
    rl.check_first_ratio(0.0, 1e-4)
    rl.check_first_ratio(jnp.float32(9e-6), 1e-4)
    rl.check_first_ratio(0.015, (0.2, 0.28))
    with pytest.raises(rl.RatioError) as caught:
        rl.check_first_ratio(1e-3, 1e-4)
    assert isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    for part in (
        "max |ratio - 1| = 0.001",
        "below 0.1 x clip_range = 1e-05 (clip_range 0.0001)",
        "fewer bits than they were drawn in (store float32)",
        "times truncated",
        "guidance scale",
        "dropout",
    ):
        assert part in message
    assert "precision" not in message
    half = quant.Precision(rollout="bf16")
    with pytest.raises(rl.RatioError, match="precision.rollout='bf16'.*'recompute'"):
        rl.check_first_ratio(1e-3, 1e-4, half)
    rl.check_first_ratio(9e-6, 1e-4, half)
    for bad in (0.0201, math.nan, math.inf):
        with pytest.raises(rl.RatioError, match=r"clip_range 0\.2"):
            rl.check_first_ratio(bad, (0.2, 0.28))
