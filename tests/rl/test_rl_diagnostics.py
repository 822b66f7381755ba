import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl


def statistics(ratios, mask=None, clip_range=0.2):
    d = jnp.log(jnp.asarray(ratios, jnp.float32))
    stats = rl.ratio_statistics(d - 3, jnp.full_like(d, -3.0), mask, clip_range)
    assert all(v.shape == () and v.dtype == jnp.float32 for v in stats.values())
    return {name: float(value) for name, value in stats.items()}


def test_by_hand():
    stats = statistics([0.5, 1.0, 2.0, 1.25])
    assert stats == {
        "clip_fraction_low": 0.25,
        "clip_fraction_high": 0.5,
        "log_ratio_abs_mean": pytest.approx((2 * math.log(2) + math.log(1.25)) / 4),
        "log_ratio_abs_max": pytest.approx(math.log(2)),
        "ratio_error_max": pytest.approx(1, rel=1e-5),
        "kl_k3": pytest.approx((0.75 - math.log(1.25)) / 4, rel=1e-5),
        "effective_sample_fraction": pytest.approx(4.75**2 / (4 * 6.8125), rel=1e-5),
    }
    pair = statistics([0.5, 1.0, 2.0, 1.25], clip_range=(0.6, 0.3))
    assert (pair["clip_fraction_low"], pair["clip_fraction_high"]) == (0, 0.25)


def test_only_live_elements_count_large_and_small():
    of = jax.jit(lambda x: rl.ratio_statistics(x, jnp.zeros_like(x), None, 0.2))
    stats = of(jnp.zeros(10).at[3].set(300.0))
    assert_allclose(stats["effective_sample_fraction"], 0.1, rtol=1e-6)
    assert all(np.isfinite(v) for v in stats.values())
    stats = of(np.array([0.0, 1e-6, -2e-6], np.float32))
    assert_allclose(stats["ratio_error_max"], 2e-6, rtol=1e-5)
    assert_allclose(stats["kl_k3"], 2.5e-12 / 3, rtol=1e-4)
    ratios = np.array([[0.5, 1.0, 2.0], [1.25, np.nan, np.inf]])
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    assert statistics(ratios, mask) == pytest.approx(statistics([0.5, 1, 2, 1.25]))
    rows = statistics(ratios, np.array([True, False]))
    assert rows == pytest.approx(statistics([0.5, 1, 2]))
    assert set(statistics(ratios, np.zeros((2, 3), bool)).values()) == {0.0}


def test_equal_policies_no_gradient_and_bad_inputs(refused):
    stats = statistics(np.ones(7))
    assert stats.pop("effective_sample_fraction") == 1
    assert set(stats.values()) == {0.0}
    of = lambda x: rl.ratio_statistics(x, jnp.zeros(3), None, 0.2)  # noqa: E731
    gradient = jax.grad(lambda x: sum(of(x).values()))(jnp.array([0.1, -0.3, 0.5]))
    assert_array_equal(gradient, 0)
    of, zeros = rl.ratio_statistics, np.zeros(3)
    refused(r"shape \(3,\) but the other log_prob", of, zeros, np.zeros(4), None, 0.2)
    refused(r"mask has shape \(2,\)", of, zeros, zeros, np.ones(2), 0.2)
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
    for bad in (0.0201, math.nan, math.inf):
        with pytest.raises(rl.RatioError, match=r"clip_range 0\.2"):
            rl.check_first_ratio(bad, (0.2, 0.28))
