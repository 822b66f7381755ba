import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import rl

MODES = [
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
LOSS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)


def options(mode):
    return {"length": 8} if mode == "seq-mean-token-sum-norm" else {}


@pytest.mark.parametrize(
    "mode,value,count",
    [
        ("token-mean", 10 / 4, 4),
        ("seq-mean-token-sum", (6 + 4) / 2, 2),
        ("seq-mean-token-mean", (2 + 4) / 2, 2),
        ("seq-mean-token-sum-norm", (6 + 4) / 2 / 8, 2),
    ],
)
def test_by_hand(mode, value, count):
    ours = rl.aggregate(LOSS, MASK, mode, **options(mode))
    assert ours.shape == () and ours.dtype == jnp.float32
    assert ours == pytest.approx(value)
    assert rl.denominators(MASK, mode) == count
    as_numbers = rl.aggregate(LOSS, MASK.astype(np.float32), mode, **options(mode))
    assert as_numbers == ours


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_microbatches_add_up_to_the_whole(mode, size):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 6)).astype(np.float32)
    mask = np.arange(6) < rng.integers(0, 7, 8)[:, None]
    keep = rng.random((8, 6)) < 0.8
    scale = jnp.float32(1.5)

    def loss(scale, rows, **given):
        return rl.aggregate(
            jnp.sin(scale * logits[rows]),
            mask[rows],
            mode,
            keep=keep[rows],
            **options(mode),
            **given,
        )

    whole = jax.value_and_grad(loss)(scale, slice(0, 8))
    total = rl.denominators(mask, mode)
    parts = [
        jax.value_and_grad(loss)(scale, slice(i, i + size), denominator=total)
        for i in range(0, 8, size)
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_rejection_does_not_inflate_the_rest(mode):
    # Equal losses: dropping half of the positions halves the loss.
    mask, keep = np.ones((2, 4), bool), np.array([[1, 0, 1, 0], [0, 1, 0, 1]], bool)
    ones = np.ones((2, 4))
    whole = rl.aggregate(ones, mask, mode, **options(mode))
    kept = rl.aggregate(ones, mask, mode, keep=keep, **options(mode))
    assert kept == whole / 2
    # A weight of 0 does the same as keep.
    weighted = rl.aggregate(ones * keep, mask, mode, **options(mode))
    assert weighted == kept
    assert rl.aggregate(ones, mask & keep, "token-mean") == 1


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_order_do_not_matter(mode):
    ours = rl.aggregate(LOSS, MASK, mode, **options(mode))
    wide = np.pad(LOSS, ((0, 2), (0, 3)), constant_values=np.nan)
    wide_mask = np.pad(MASK, ((0, 2), (0, 3)))
    value, gradient = jax.value_and_grad(rl.aggregate)(
        wide, wide_mask, mode, **options(mode)
    )
    np.testing.assert_allclose(value, ours, rtol=1e-6)
    np.testing.assert_array_equal(gradient != 0, wide_mask)
    swapped = rl.aggregate(LOSS[::-1], MASK[::-1], mode, **options(mode))
    np.testing.assert_allclose(swapped, ours, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_under_jit_the_same_and_nothing_live_is_zero(mode):
    jitted = jax.jit(
        lambda loss, mask: rl.aggregate(
            loss,
            mask,
            mode,
            denominator=jnp.maximum(rl.denominators(mask, mode), 1),
            **options(mode),
        )
    )
    expected = rl.aggregate(LOSS, MASK, mode, **options(mode))
    np.testing.assert_allclose(jitted(LOSS, MASK), expected, rtol=1e-6)
    assert jitted(LOSS, np.zeros_like(MASK)) == 0
    value, gradient = jax.value_and_grad(rl.aggregate)(
        LOSS, np.zeros_like(MASK), mode, **options(mode)
    )
    assert value == 0 and (gradient == 0).all()


def test_other_shapes():
    assert rl.aggregate(LOSS[0], MASK[1], "token-mean") == 1
    deep_loss, deep_mask = LOSS.reshape(3, 3, 1), MASK.reshape(3, 3, 1)
    for mode in MODES:
        assert rl.aggregate(deep_loss, deep_mask, mode, **options(mode)) == (
            rl.aggregate(LOSS, MASK, mode, **options(mode))
        )


def test_half_precision_is_summed_in_float32():
    ones = jnp.ones((2, 1000), jnp.bfloat16)
    ours = rl.aggregate(ones, jnp.ones((2, 1000), bool), "seq-mean-token-sum")
    assert ours.dtype == jnp.float32 and ours == 1000


def test_bad_inputs(as_shipped):
    with pytest.raises(
        ValueError, match="mode='token_mean' is not one of.*Did you mean 'token-mean'"
    ):
        rl.aggregate(LOSS, MASK, "token_mean")
    with pytest.raises(
        ValueError, match=r"mask has shape \(3,\) but loss has shape \(3, 3\)"
    ):
        rl.aggregate(LOSS, MASK[0], "token-mean")
    with pytest.raises(ValueError, match=r"keep has shape \(3,\) but loss"):
        rl.aggregate(LOSS, MASK, "token-mean", keep=MASK[0])
    with pytest.raises(
        ValueError,
        match=r"loss has shape \(3,\); mode='seq-mean-token-sum' needs \[batch, position\]",
    ):
        rl.aggregate(LOSS[0], MASK[0], "seq-mean-token-sum")
    with pytest.raises(
        ValueError, match=r"mask has shape \(\); mode='token-mean' needs \[element\]"
    ):
        rl.denominators(True, "token-mean")
    with pytest.raises(
        ValueError,
        match="length=None with mode='seq-mean-token-sum-norm'.*needs the largest response length",
    ):
        rl.aggregate(LOSS, MASK, "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="length=3 with mode='token-mean'"):
        rl.aggregate(LOSS, MASK, "token-mean", length=3)
    with pytest.raises(ValueError, match="length=0 is outside"):
        rl.aggregate(LOSS, MASK, "seq-mean-token-sum-norm", length=0)
    with pytest.raises(ValueError, match="denominator=0.0 is outside"):
        rl.aggregate(LOSS, MASK, "token-mean", denominator=0)
