"""Video DiT: start, parts, positions, sizes, bad inputs.

What it shares with every network stands in test_contract.py.
Its forward and input gradient are compared with diffusers in test_hf_video_dit.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import close, draw, jitted, shapes_of
from numpy.testing import assert_array_equal

from tmdjax.core import trees
from tmdjax.models import VideoDiT, functional, init_params
from tmdjax.models.videos import patches

BATCH, SIZE, CHANNEL, LENGTH = 3, (2, 4, 6), 2, 5


def small(**options):
    sizes = dict(heads=2, head_dim=8, depth=4, mlp_width=24)
    return VideoDiT(**sizes | dict(text_width=6, frequency_dim=8) | options)


def inputs():
    cond = draw(BATCH, LENGTH, 6, seed=1).at[0, 3:].set(0)  # past the true length
    return draw(BATCH, *SIZE, CHANNEL), jnp.array([0.1, 0.5, 1.0]), cond


@functools.cache
def initial():
    return init_params(small(), jax.random.key(0), *inputs())


def test_initial_sizes():
    """Xavier kernels, tables of variance 1 / width, embeddings of 0.02."""
    module = small(head_dim=32, mlp_width=96, frequency_dim=64, text_width=80)
    x, t, _ = inputs()
    cond = jnp.zeros((BATCH, 1, 80))
    params = jax.device_get(init_params(module, jax.random.key(0), x, t, cond))
    std = {path: np.std(leaf) for path, leaf in trees.flatten(params).items()}
    width = 64
    for path, want in {
        "blocks/attention/query/kernel": (1 / width) ** 0.5,
        "blocks/cross_attention/value/kernel": (1 / width) ** 0.5,
        "blocks/mlp_in/kernel": (2 / (width + 96)) ** 0.5,
        "time_projection/kernel": (2 / (7 * width)) ** 0.5,
        "blocks/scale_shift_table": width**-0.5,
        "time_embedding/hidden/kernel": 0.02,
        "text_embedding/out/kernel": 0.02,
    }.items():
        assert std[path] == pytest.approx(want, rel=0.1), path


def test_parts_of_the_embedding(stir):
    run = functional(small())

    @jax.jit
    def parts(params, x, t, cond):
        def part(name, *inputs):
            return run(params, *inputs, method=f"embed{name}")

        text, one = part("_text", cond), part("_time", 0.5)
        whole = part("", x, t, cond)
        return whole, part("_patches", x), part("_time", t), text, one

    (h, c), embedded, (time, modulation), text, one = parts(stir(initial()), *inputs())
    close(embedded, h, atol=1e-6)
    close((time, modulation), (c["time"], c["modulation"]), atol=1e-6)
    close(text, c["text"], atol=1e-6)
    close(patches.rotary_tables((2, 2, 3), 8), (c["cos"], c["sin"]), atol=1e-7)
    assert modulation.shape == (BATCH, 6, 16) and time.dtype == jnp.float32
    close(one[0], time[1:2], atol=1e-6)  # a scalar is a batch of one


def test_zero_rows_matter_and_their_order_does_not(stir):
    params, (x, t, cond) = stir(initial()), inputs()
    base = jitted(small())(params, x, t, cond)
    longer = jnp.pad(cond, ((0, 0), (0, 3), (0, 0)))
    assert np.abs(jitted(small())(params, x, t, longer) - base).max() > 1e-3
    close(jitted(small())(params, x, t, cond[:, ::-1]), base)


def test_derivative_along_a_path_equals_finite_differences(stir):
    """Forward mode, as a flow map needs it, with the blocks recomputed or not."""
    params, (x, t, cond) = stir(initial(), 0.1), inputs()
    apply_fn, dx = functional(small(time_scale=10.0)), draw(*x.shape, seed=2)

    def velocity(step):
        return apply_fn(params, x + step * dx, 0.5 * t + 0.1 + step, cond)

    both = jax.jit(lambda step: jax.jvp(velocity, (step,), (1.0,)))
    (_, slope), (plus, _), (minus, _) = map(both, (0.0, 1e-2, -1e-2))
    want = (plus - minus) / 2e-2
    assert np.linalg.norm(slope - want) < 5e-3 * np.linalg.norm(want)


def test_rotary_tables_by_hand():
    """Frames take what rows and columns leave: of 64 pairs 22, 21 and 21."""
    cos, sin = patches.rotary_tables((3, 2, 4), 128)
    assert cos.shape == sin.shape == (24, 64) and cos.dtype == jnp.float32
    frame, row, column = 2, 1, 3
    axes = (frame, 22), (row, 21), (column, 21)
    parts = [i * 10000.0 ** (-2 * np.arange(n) / (2 * n)) for i, n in axes]
    angles = np.concatenate(parts)
    at = (frame * 2 + row) * 4 + column
    close((cos[at], sin[at]), (np.cos(angles), np.sin(angles)), atol=1e-7)


def test_scores_depend_on_distances_alone(stir):
    """A video of one repeated patch: attention cannot tell where its centre is."""
    module = small(depth=1, patch_size=(1, 1, 1))
    params = stir(initial())
    embedding = params["patch_embedding"]
    params["blocks"] = jax.tree.map(lambda leaf: leaf[:1], params["blocks"])
    embedding["kernel"] = embedding["kernel"][:CHANNEL]
    _, t, cond = inputs()
    h = draw(BATCH, 6, 16, seed=3)
    _, c = jitted(module, "embed")(params, jnp.zeros((BATCH, 1, 2, 3, 2)), t, cond)
    base, _ = jitted(module, "blocks")(params, h, c)
    # All positions further by two columns: the angles grow, the differences do not.
    cos, sin = patches.rotary_tables((1, 2, 5), 8)
    grid = np.arange(10).reshape(2, 5)[:, 2:].ravel()
    moved = c | {"cos": cos[grid], "sin": sin[grid]}
    close(jitted(module, "blocks")(params, h, moved)[0], base)
    flat = c | {"cos": jnp.ones_like(c["cos"]), "sin": jnp.zeros_like(c["sin"])}
    assert np.abs(jitted(module, "blocks")(params, h, flat)[0] - base).max() > 1e-2


def test_patches_in_order_and_back():
    x = jnp.arange(2 * 4 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 4, 6, 3)
    tokens = patches.patchify_video(x, (2, 2, 3))
    assert tokens.shape == (2, 8, 36)
    # Position (frame 1, row 0, column 1); inside frame 1, row 0, column 2, channel 1.
    found = tokens[1, (1 * 2 + 0) * 2 + 1, ((1 * 2 + 0) * 3 + 2) * 3 + 1]
    assert found == x[1, 2 + 1, 0, 3 + 2, 1]
    assert_array_equal(patches.unpatchify_video(tokens, (2, 2, 3), (4, 4, 6)), x)


def test_out_channels_and_patches_in_time():
    module = small(patch_size=(2, 2, 1), out_channels=5, cross_attention_norm=False)
    params = shapes_of(module, *inputs())
    assert "cross_norm" not in params["blocks"]
    assert jax.eval_shape(jitted(module), params, *inputs()).shape == (BATCH, *SIZE, 5)
    h, _ = jax.eval_shape(jitted(module, "embed"), params, *inputs())
    assert h.shape == (BATCH, 1 * 2 * 6, 16)


def test_bad_attributes(refused):
    for size in (4, 7):
        refused(f"head_dim={size} must be even and at least 6", small, head_dim=size)
    refused(r"patch_size=\(2, 2\) must be a tuple of three", small, patch_size=(2, 2))
    refused("patch_size=0 must be at least 1", small, patch_size=(1, 0, 2))
    refused("frequency_dim=5 must be even", small, frequency_dim=5)
    refused("epsilon=0.0 is outside", small, epsilon=0.0)


def test_bad_inputs(refused):
    x, t, cond = inputs()
    run = functools.partial(functional(small(rope_length=8)), initial(), method="embed")
    for shape, message in (
        ((3, 4, 4, 2), "give videos"),
        ((3, 2, 4, 5, 2), "patch_size=1 x 2 x 2 does not divide a video of 2 x 4 x 5"),
        ((3, 9, 2, 2, 2), "a video of 9 x 2 x 2 .* has 9 patches .* rope_length=8"),
    ):
        refused(message, run, jnp.zeros(shape), t, cond)
    whole = jnp.array([0, 1, 1])
    refused(r"t has dtype int32; times are in \[0, 1\]", run, x, whole, cond)
    refused(r"times are in \[0, 1\]", run, x, np.array([1, 500, 999]), cond)
    refused(r"\[0, 1\].*first is 999", run, x, jnp.array([0.0, 1.0, 999.0]), cond)
    refused("t has dtype int32", jitted(small(), "embed_time"), initial(), whole)
    for other, message in (
        (None, r"cond is NoneType\[\].*\[batch, length, 6\]"),
        (jnp.zeros((3, 5, 7)), r"cond is float32\[3, 5, 7\].*length, 6\]"),
        (jnp.zeros((3, 6)), r"cond is float32\[3, 6\]"),
        (jnp.zeros((3, 5, 6), int), r"cond is int32.*floating numbers"),
        (jnp.zeros((2, 5, 6)), "leading axis must be the batch of x, 3"),
    ):
        refused(message, run, x, t, other)


def test_taps_are_layers_and_the_output_has_a_size_that_fits(refused):
    run = functools.partial(functional(small()), initial())
    tapped = functools.partial(run, *inputs(), method="velocity_and_features")
    for tap in (4, -1):
        message = rf"taps holds \[{tap}\], outside the layers 0..3"
        refused(message, tapped, taps=(1, tap))
    refused("integer", tapped, taps=(1.5,), error=TypeError)
    h, c = jnp.zeros((BATCH, 12, 16)), {"time": jnp.zeros((BATCH, 16))}
    output = functools.partial(run, h, c, method="output")
    refused("2 x 4 x 4 .* needs 8 positions", output, (2, 4, 4))
    refused("does not divide a video of 2 x 4 x 5", output, (2, 4, 5))
