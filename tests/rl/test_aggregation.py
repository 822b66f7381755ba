import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl

LOSS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)


# value and count, by hand
MODES = {
    "token-mean": (10 / 4, 4),
    "seq-mean-token-sum": ((6 + 4) / 2, 2),
    "seq-mean-token-mean": ((2 + 4) / 2, 2),
    "seq-mean-token-sum-norm": ((6 + 4) / 2 / 8, 2),
}


def aggregate(loss, mask, mode, **given):
    length = {"length": 8} if mode == "seq-mean-token-sum-norm" else {}
    return rl.aggregate(loss, mask, mode, **length, **given)


@pytest.mark.parametrize("mode", MODES)
def test_by_hand(mode):
    value, count = MODES[mode]
    ours = aggregate(LOSS, MASK, mode)
    assert ours.shape == () and ours.dtype == jnp.float32
    assert ours == pytest.approx(value)
    assert rl.denominators(MASK, mode) == count
    assert aggregate(LOSS, MASK.astype(np.float32), mode) == ours


@functools.cache
def of_rows(mode):
    """Value and gradient to a scale of the losses of some rows."""

    @jax.jit
    @jax.value_and_grad
    def loss(scale, logits, mask, keep, denominator):
        losses = jnp.sin(scale * logits)
        return aggregate(losses, mask, mode, keep=keep, denominator=denominator)

    return loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 4])
def test_microbatches_add_up_to_the_whole(mode, size):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 6)).astype(np.float32)
    mask = np.arange(6) < rng.integers(0, 7, 8)[:, None]
    keep = rng.random((8, 6)) < 0.8
    total = rl.denominators(mask, mode)
    whole = of_rows(mode)(1.5, logits, mask, keep, None)
    parts = [
        of_rows(mode)(1.5, *(a[i : i + size] for a in (logits, mask, keep)), total)
        for i in range(0, 8, size)
    ]
    assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_rejection_does_not_inflate_the_rest(mode):
    # Equal losses: dropping half of the positions halves the loss.
    mask, keep = np.ones((2, 4), bool), np.array([[1, 0, 1, 0], [0, 1, 0, 1]], bool)
    ones = np.ones((2, 4))
    whole = aggregate(ones, mask, mode)
    assert aggregate(ones, mask, mode, keep=keep) == whole / 2
    # A weight of 0 does the same as keep.
    assert aggregate(ones * keep, mask, mode) == whole / 2
    assert aggregate(ones, mask & keep, "token-mean") == 1


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_order_do_not_matter(mode):
    ours = aggregate(LOSS, MASK, mode)
    wide = np.pad(LOSS, ((0, 2), (0, 3)), constant_values=np.nan)
    wide_mask = np.pad(MASK, ((0, 2), (0, 3)))
    value, gradient = jax.value_and_grad(aggregate)(wide, wide_mask, mode)
    assert_allclose(value, ours, rtol=1e-6)
    assert_array_equal(gradient != 0, wide_mask)
    assert_allclose(aggregate(LOSS[::-1], MASK[::-1], mode), ours, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_under_jit_the_same_and_nothing_live_is_zero(mode):
    @jax.jit
    def jitted(loss, mask):
        count = jnp.maximum(rl.denominators(mask, mode), 1)
        return aggregate(loss, mask, mode, denominator=count)

    assert_allclose(jitted(LOSS, MASK), aggregate(LOSS, MASK, mode), rtol=1e-6)
    assert jitted(LOSS, np.zeros_like(MASK)) == 0
    value, gradient = jax.value_and_grad(aggregate)(LOSS, np.zeros_like(MASK), mode)
    assert value == 0 and (gradient == 0).all()


def test_other_shapes_and_half_precision():
    assert aggregate(LOSS[0], MASK[1], "token-mean") == 1
    deep_loss, deep_mask = LOSS.reshape(3, 3, 1), MASK.reshape(3, 3, 1)
    for mode in MODES:
        assert aggregate(deep_loss, deep_mask, mode) == aggregate(LOSS, MASK, mode)
    ones = jnp.ones((2, 1000), jnp.bfloat16)
    ours = aggregate(ones, jnp.ones((2, 1000), bool), "seq-mean-token-sum")
    assert ours.dtype == jnp.float32 and ours == 1000


def test_bad_inputs(refused):
    row, sums, norm = MASK[0], "seq-mean-token-sum", "seq-mean-token-sum-norm"
    for message, loss, mask, mode, options in (
        ("'token_mean' is not.*Did you mean 'token-mean'", LOSS, MASK, "token_mean", {}),
        (r"mask has shape \(3,\) but loss has shape \(3, 3\)", LOSS, row, "token-mean", {}),
        (r"keep has shape \(3,\) but loss", LOSS, MASK, "token-mean", {"keep": row}),
        (rf"loss has shape \(3,\); mode='{sums}' needs \[batch, position\]", LOSS[0], row, sums, {}),
        (f"length=None with mode='{norm}'.*needs the largest response length", LOSS, MASK, norm, {}),
        ("length=3 with mode='token-mean'", LOSS, MASK, "token-mean", {"length": 3}),
        ("length=0 is outside", LOSS, MASK, norm, {"length": 0}),
        ("denominator=0.0 is outside", LOSS, MASK, "token-mean", {"denominator": 0}),
    ):  # fmt: skip
        refused(message, rl.aggregate, loss, mask, mode, **options)
    message = r"mask has shape \(\); mode='token-mean' needs \[element\]"
    refused(message, rl.denominators, True, "token-mean")
