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


def test_mismatch_is_that_of_its_definition_token_by_token():
    """Against plain sums; responses of 1 to 7 tokens, what is masked out is not read."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 5, 7, 0]
    train, rollout = rng.normal(-2, 1, (2, 6, 8)).astype(np.float32)
    mask = np.arange(8) < np.array(lengths)[:, None]
    train[~mask], rollout[5] = np.nan, np.inf
    each, early, late, kl = [], [], [], []
    for row, n in enumerate(lengths):
        d = np.float64(train[row, :n]) - rollout[row, :n]
        third = -(-n // 3)
        each += [*abs(d)]
        early += [*abs(d[:third])]
        late += [*abs(d[n - third :])]
        kl += [*(np.exp(d) - 1 - d)]
    found = jax.jit(rl.mismatch)(train, rollout, mask)
    expected = {"kl": kl, "mean": each, "early": early, "late": late}
    assert found.keys() == {f"mismatch_{name}" for name in (*expected, "max")}
    for name, values in expected.items():
        assert_allclose(found[f"mismatch_{name}"], np.mean(values), rtol=1e-5)
    assert_allclose(found["mismatch_max"], max(each), rtol=1e-6)
    assert max(early) != max(late)
    # d grows along a text: early and late tell
    grown = rollout + 1e-3 * np.arange(8, dtype=np.float32)
    found = jax.jit(rl.mismatch)(grown, rollout, mask)
    assert found["mismatch_late"] > 2 * found["mismatch_early"] > 0
    gradient = jax.grad(lambda x: rl.mismatch(x, rollout, mask)["mismatch_mean"])
    assert_array_equal(gradient(grown), 0)
    nothing = rl.mismatch(train, rollout, np.zeros_like(mask))
    assert set(map(float, nothing.values())) == {0.0}


def test_8_the_kl_of_a_mismatch_is_never_negative():
    d = np.concatenate([10.0 ** np.arange(-9, 2.1, 0.01), [0, 300]])
    d = np.concatenate([d, -d])[:, None].astype(np.float32)
    one = np.ones_like(d, bool)
    kl = np.asarray(rl.mismatch_terms(d - 1, 0 * d - 1, one)["mismatch_kl"])[:, 0]
    exact = np.float64(d[:, 0] - 1) + 1  # what float32 has of d
    near = abs(exact) < 19
    assert (kl >= 0).all() and np.isfinite(kl).all()
    assert_allclose(
        kl[near], np.expm1(exact[near]) - exact[near], rtol=1e-4, atol=1e-15
    )


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
