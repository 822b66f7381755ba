"""Attention against numpy, its choice of implementation, its refusals."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose
from scipy.special import softmax

from tmdjax.models.attention import attention, select_implementation


def draw(batch=2, queries=5, keys=5, heads=4, key_heads=4, head_dim=8, dtype="float32"):
    rng = np.random.default_rng(0)
    seen = (batch, keys, key_heads, head_dim)
    shapes = [(batch, queries, heads, head_dim), seen, seen]
    return [jnp.asarray(rng.normal(size=s) * 1.5, dtype) for s in shapes]


@functools.cache
def of_every_kind(key_heads):
    """Masks by kind, and attention under each of them, causal or not: one program."""
    rng, see = np.random.default_rng(1), np.eye(5, dtype=bool)
    masks = {
        None: None,
        "padding": np.array([[True, True, False, True, False], [True] * 5]),
        "full": (rng.random((2, 4, 5, 5)) < 0.5) | see,
        "broadcast": (rng.random((1, 1, 5, 5)) < 0.5) | see,
    }

    @jax.jit
    def run(q, k, v, *masks):
        ways = itertools.product(masks, (False, True))
        return [attention(q, k, v, mask=mask, causal=causal) for mask, causal in ways]

    found = run(*draw(key_heads=key_heads), *masks.values())
    return masks, dict(zip(itertools.product(masks, (False, True)), found))


def by_loop(q, k, v, allowed):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, n in np.ndindex(q.shape[:3]):
        see = np.flatnonzero(allowed[b, n, i])
        scores = k[b, see, n // group] @ q[b, i, n] / np.sqrt(q.shape[3])
        out[b, i, n] = softmax(scores) @ v[b, see, n // group]
    return out


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "padding", "full", "broadcast"])
def test_attention_equals_a_loop(key_heads, causal, kind):
    masks, found = of_every_kind(key_heads)
    allowed = np.tril(np.ones((2, 4, 5, 5), bool), 0 if causal else 5)
    if kind:
        mask = masks[kind]
        allowed &= mask[:, None, None, :] if kind == "padding" else mask
    expected = by_loop(*draw(key_heads=key_heads), allowed)
    assert_allclose(found[kind, causal], expected, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_key_lengths(queries):
    q, k, v = draw(queries=queries, keys=7, key_heads=2)
    allowed = np.zeros((2, 4, queries, 7), bool)
    allowed[0, :, :, :1] = allowed[1, :, :, :5] = True
    run = jax.jit(attention)
    out = run(q, k, v, key_lengths=np.array([1, 5]))
    assert_allclose(out, by_loop(q, k, v, allowed), atol=2e-6)
    everywhere = np.ones_like(allowed)
    assert_allclose(run(q, k, v), by_loop(q, k, v, everywhere), atol=2e-6)


def test_a_window_is_of_the_positions_just_before(refused):
    q, k, v = draw(key_heads=2)
    full = np.tril(np.ones((2, 4, 5, 5), bool))
    run = jax.jit(lambda w: attention(q, k, v, causal=True, window=w))
    for window in (1, 2, 4, 5, 9):  # as in transformers: query - key < window
        expected = by_loop(q, k, v, full & ~np.tril(full, -window))
        assert_allclose(run(window), expected, atol=2e-6)
    mask = np.array([[True] * 5, [False, True, True, True, True]])
    both = full & ~np.tril(full, -2) & (mask[:, None, None] | np.eye(5, dtype=bool))
    run = jax.jit(functools.partial(attention, causal=True, window=3))
    out = run(q, k, v, mask=both)
    assert_allclose(out, by_loop(q, k, v, both), atol=2e-6)
    refused("window=3 is of causal attention", attention, q, k, v, window=3)
    refused("window=0 must be", attention, q, k, v, causal=True, window=0)


def test_softmax_is_float32_for_bfloat16_inputs():
    # 300 equal scores: a bfloat16 sum of 1/300 stalls far below one.
    q, k, v = draw(queries=1, keys=300, dtype="bfloat16")
    run = jax.jit(attention)
    out = run(0 * np.asarray(q), k, np.ones_like(v))
    assert out.dtype == jnp.bfloat16
    assert_allclose(np.asarray(out, np.float32), 1.0, atol=1e-2)
    exact = by_loop(q, k, v, np.ones((2, 4, 1, 300), bool))
    error = np.abs(np.asarray(run(q, k, v), np.float64) - exact)
    assert error.max() < 0.02


def test_float32_products_are_not_tf32():
    text = str(jax.make_jaxpr(attention)(*draw()))
    assert text.count("Precision.HIGHEST") >= 2


def test_gradient_against_finite_differences():
    q, k, v = draw(batch=1, queries=3, keys=3, heads=2, key_heads=1)
    mask = jnp.array([[True, True, False]])

    @jax.jit
    def masked(*qkv):
        return attention(*qkv, mask=mask)

    bounds = dict(atol=3e-2, rtol=3e-2, eps=1e-2)
    check_grads(masked, (q, k, v), order=1, modes=["rev"], **bounds)


def device(platform, **attributes):
    return types.SimpleNamespace(platform=platform, **attributes)


DEVICES = {
    "gpu": device("gpu", compute_capability="8.0"),
    "blackwell": device("gpu", compute_capability="10.0"),
    "turing": device("gpu", compute_capability="7.5"),
    "rocm": device("gpu", compute_capability="gfx90a"),
    "tpu": device("tpu"),
    "cpu": jax.devices("cpu")[0],
    None: None,
}


Q = jax.ShapeDtypeStruct((2, 16, 4, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "length", "masked", "device", "chosen"),
    [
        ("bfloat16", 64, 16, False, "gpu", "cudnn"),
        ("float16", 128, 16, True, "gpu", "cudnn"),
        ("bfloat16", 64, 15, False, "gpu", "xla"),  # its gradient has no kernel
        ("bfloat16", 64, 1, False, "gpu", "cudnn"),
        ("bfloat16", 64, 1, True, "gpu", "xla"),
        ("bfloat16", 64, 15, True, "gpu", "xla"),
        ("float32", 64, 16, False, "gpu", "xla"),
        ("bfloat16", 20, 16, False, "gpu", "xla"),
        ("bfloat16", 136, 16, False, "gpu", "xla"),
        ("bfloat16", 64, 16, False, "tpu", "xla"),
        ("bfloat16", 64, 16, False, "blackwell", "cudnn"),
        ("bfloat16", 64, 16, False, "turing", "xla"),
        ("bfloat16", 64, 16, False, "rocm", "xla"),
        ("bfloat16", 64, 16, False, "cpu", "xla"),
        ("bfloat16", 64, 16, False, None, "xla"),
    ],
)
def test_auto(dtype, head_dim, length, masked, device, chosen):
    q = jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.dtype(dtype))
    device = DEVICES[device]
    assert select_implementation(q, q, masked=masked, device=device) == chosen


@pytest.mark.parametrize("by_name", [False, True])
def test_auto_follows_the_default_device(monkeypatch, by_name):
    cpu = jax.devices("cpu")[0]
    devices = {"cpu": [cpu], None: [DEVICES["gpu"]]}
    monkeypatch.setattr(jax, "devices", lambda name=None: devices[name])
    assert select_implementation(Q, Q, masked=False) == "cudnn"
    with jax.default_device("cpu" if by_name else cpu):
        assert select_implementation(Q, Q, masked=False) == "xla"


@pytest.mark.parametrize("masked", [False, True, "lengths", "window"])
def test_cudnn_lowers_for_cuda(traceable_cudnn, masked):
    lengths, mask = jnp.array([3, 16]), jnp.ones((2, 16), bool)
    options = {"lengths": dict(key_lengths=lengths), True: dict(mask=mask)}
    options["window"] = dict(causal=True, window=5)

    def loss(q, k, v):
        out = attention(q, k, v, implementation="cudnn", **options.get(masked, {}))
        return out.astype(jnp.float32).sum()

    checks = dict(platforms=["cuda"], disabled_checks=traceable_cudnn)
    exported = jax.export.export(jax.jit(jax.grad(loss)), **checks)(Q, Q, Q)
    text = exported.mlir_module()
    assert "__cudnn$fmha" in text
    if masked == "window":  # the kernel's own, which skips what it hides
        assert text.count("sliding_window_length\\22: 5") == 2


def test_refusals(refused):
    for message, change in (
        ("Did you mean 'cudnn'", dict(implementation="cuddn")),
        (
            "q has shape .* give .batch, position, heads",
            dict(q=np.zeros((2, 5, 8), "f")),
        ),
        ("but v has shape", dict(v=np.zeros((2, 6, 4, 8), "f"))),
        ("batch and head_dim must agree", dict(q=np.zeros((3, 5, 4, 8), "f"))),
        ("6 heads and k has 4", dict(q=np.zeros((2, 5, 6, 8), "f"))),
        (
            "queries as keys, got 3 and 5",
            dict(q=np.zeros((2, 3, 4, 8), "f"), causal=True),
        ),
        ("mask has dtype float32", dict(mask=np.ones((2, 5), "f"))),
        (r"\(3,\); give one a row, \(2,\)", dict(key_lengths=np.ones(3, int))),
        (r"give \[batch, key\] = \(2, 5\)", dict(mask=np.ones((2, 4), bool))),
        ("axes of length 1 broadcast", dict(mask=np.ones((2, 3, 5, 5), bool))),
        ("cast them to one", dict(q=np.zeros((2, 5, 4, 8), jnp.bfloat16))),
    ):
        refused(message, attention, **dict(zip("qkv", draw())) | change)
