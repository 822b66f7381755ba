"""Video DiT: start, parts, positions, sizes, bad inputs.

What it shares with every network stands in test_contract.py.
Its forward and input gradient are compared with diffusers in test_hf_video_dit.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.core import trees
from tmdjax.models import (
    WAN_1_3B,
    WAN_14B,
    VideoDiT,
    build,
    functional,
    init_params,
    patchify_video,
    rotary_tables,
    unpatchify_video,
)

BATCH, SIZE, CHANNEL, LENGTH = 3, (2, 4, 6), 2, 5


def small(**options):
    options = (
        dict(heads=2, head_dim=8, depth=4, mlp_width=24, text_width=6, frequency_dim=8)
        | options
    )
    return VideoDiT(**options)


def draw():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, *SIZE, CHANNEL)), jnp.float32)
    cond = rng.normal(size=(BATCH, LENGTH, 6))
    cond[0, 3:] = 0  # past the true length
    return x, jnp.array([0.1, 0.5, 1.0]), jnp.asarray(cond, jnp.float32)


@functools.cache
def initial():
    return init_params(small(), jax.random.key(0), *draw())


@functools.cache
def jitted(module, method=None, **options):
    return jax.jit(functools.partial(functional(module), method=method, **options))


def close(a, b, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), a, b)


def test_initial_sizes():
    """Xavier kernels, tables of variance 1 / width, embeddings of 0.02."""
    module = small(head_dim=32, mlp_width=96, frequency_dim=64, text_width=80)
    x, t, _ = draw()
    cond = jnp.zeros((BATCH, 1, 80))
    params = init_params(module, jax.random.key(0), x, t, cond)
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

    (h, c), patches, (time, modulation), text, one = parts(stir(initial()), *draw())
    close(patches, h, atol=1e-6)
    close((time, modulation), (c["time"], c["modulation"]), atol=1e-6)
    close(text, c["text"], atol=1e-6)
    close(rotary_tables((2, 2, 3), 8), (c["cos"], c["sin"]), atol=1e-7)
    assert modulation.shape == (BATCH, 6, 16) and time.dtype == jnp.float32
    close(one[0], time[1:2], atol=1e-6)  # a scalar is a batch of one


def test_what_is_narrow_under_the_bfloat16_recipe():
    embed = jitted(small(recipe="bf16"), "embed")
    h, c = jax.eval_shape(embed, initial(), *draw())
    assert h.dtype == c["text"].dtype == jnp.bfloat16
    assert c["time"].dtype == c["modulation"].dtype == jnp.float32


def test_time_text_and_zero_rows_matter(stir):
    params, (x, t, cond) = stir(initial()), draw()
    base = jitted(small())(params, x, t, cond)
    later = jitted(small())(params, x, t * 0.5, cond)
    other = jitted(small())(params, x, t, -cond)
    assert np.abs(later - base).max() > 1e-3 and np.abs(other - base).max() > 1e-3
    # Rows of zeros are looked at: a longer text is another one.
    longer = jnp.pad(cond, ((0, 0), (0, 3), (0, 0)))
    assert np.abs(jitted(small())(params, x, t, longer) - base).max() > 1e-3
    # But their order is not.
    turned = jitted(small())(params, x, t, cond[:, ::-1])
    close(turned, base)


def test_derivative_along_a_path_equals_finite_differences(stir):
    """Forward mode, as a flow map needs it, with the blocks recomputed or not."""
    params, (x, t, cond) = stir(initial(), 0.1), draw()
    dx = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def velocity(step):
        return functional(small(time_scale=10.0))(
            params, x + step * dx, 0.5 * t + 0.1 + step, cond
        )

    @jax.jit
    def both(step):
        return jax.jvp(velocity, (step,), (1.0,))

    (_, slope), (plus, _), (minus, _) = map(both, (0.0, 1e-2, -1e-2))
    want = (plus - minus) / 2e-2
    assert np.linalg.norm(slope - want) < 5e-3 * np.linalg.norm(want)


def test_rotary_tables_by_hand():
    """Frames take what rows and columns leave: of 64 pairs 22, 21 and 21."""
    cos, sin = rotary_tables((3, 2, 4), 128)
    assert cos.shape == sin.shape == (24, 64) and cos.dtype == jnp.float32
    frame, row, column = 2, 1, 3
    angles = np.concatenate(
        [
            frame * 10000.0 ** (-2 * np.arange(22) / 44),
            row * 10000.0 ** (-2 * np.arange(21) / 42),
            column * 10000.0 ** (-2 * np.arange(21) / 42),
        ]
    )
    at = (frame * 2 + row) * 4 + column
    close((cos[at], sin[at]), (np.cos(angles), np.sin(angles)), atol=1e-7)


def test_scores_depend_on_distances_alone(stir):
    """A video of one repeated patch: attention cannot tell where its centre is."""
    module = small(depth=1, patch_size=(1, 1, 1))
    params = stir(initial())
    params = params | {
        "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"]),
        "patch_embedding": {
            "kernel": params["patch_embedding"]["kernel"][:CHANNEL],
            "bias": params["patch_embedding"]["bias"],
        },
    }
    _, t, cond = draw()
    h = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 6, 16)), jnp.float32)
    _, c = jitted(module, "embed")(params, jnp.zeros((BATCH, 1, 2, 3, 2)), t, cond)
    base, _ = jitted(module, "blocks")(params, h, c)
    # All positions further by two columns: the angles grow, the differences do not.
    cos, sin = rotary_tables((1, 2, 5), 8)
    grid = np.arange(10).reshape(2, 5)[:, 2:].ravel()
    moved = c | {"cos": cos[grid], "sin": sin[grid]}
    close(jitted(module, "blocks")(params, h, moved)[0], base)
    flat = c | {"cos": jnp.ones_like(c["cos"]), "sin": jnp.zeros_like(c["sin"])}
    assert np.abs(jitted(module, "blocks")(params, h, flat)[0] - base).max() > 1e-2


def test_patches_in_order_and_back():
    x = jnp.arange(2 * 4 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 4, 6, 3)
    tokens = patchify_video(x, (2, 2, 3))
    assert tokens.shape == (2, 8, 36)
    # Position (frame 1, row 0, column 1); inside frame 1, row 0, column 2, channel 1.
    assert (
        tokens[1, (1 * 2 + 0) * 2 + 1, ((1 * 2 + 0) * 3 + 2) * 3 + 1]
        == (x[1, 2 + 1, 0, 3 + 2, 1])
    )
    np.testing.assert_array_equal(unpatchify_video(tokens, (2, 2, 3), (4, 4, 6)), x)


@pytest.mark.parametrize(
    ("spec", "count", "depth"),
    [(WAN_1_3B, 1_418_996_800, 30), (WAN_14B, 14_288_491_584, 40)],
)
def test_published_sizes(spec, count, depth):
    """Parameter counts of the published checkpoints, nothing allocated."""
    module = build(spec)
    shaped = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = shaped((1, 21, 60, 104, 16)), shaped((1,)), shaped((1, 512, 4096))
    params = jax.eval_shape(
        lambda key: init_params(module, key, *inputs), jax.random.key(0)
    )
    assert trees.count(params) == count
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {depth}
    velocity = jax.eval_shape(functional(module), params, *inputs)
    assert velocity.shape == (1, 21, 60, 104, 16)
    h, _ = jax.eval_shape(
        functools.partial(functional(module), method="embed"), params, *inputs
    )
    assert h.shape == (1, 32760, module.width)


def test_out_channels_and_patches_in_time():
    module = small(patch_size=(2, 2, 1), out_channels=5, cross_attention_norm=False)
    params = jax.eval_shape(lambda: init_params(module, jax.random.key(0), *draw()))
    assert "cross_norm" not in params["blocks"]
    assert jax.eval_shape(jitted(module), params, *draw()).shape == (BATCH, *SIZE, 5)
    h, _ = jax.eval_shape(jitted(module, "embed"), params, *draw())
    assert h.shape == (BATCH, 1 * 2 * 6, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=0), "depth=0 must be at least 1"),
        (dict(head_dim=7), "head_dim=7 must be even and at least 6"),
        (dict(head_dim=4), "head_dim=4 must be even and at least 6"),
        (dict(patch_size=(2, 2)), r"patch_size=\(2, 2\) must be a tuple of three"),
        (dict(patch_size=(1, 0, 2)), "patch_size=0 must be at least 1"),
        (dict(frequency_dim=5), "frequency_dim=5 must be even"),
        (dict(rope_length=0), "rope_length=0 must be at least 1"),
        (dict(epsilon=0.0), "epsilon=0.0 is outside"),
        (dict(recipe="fp23"), "unknown GEMM recipe 'fp23'.*Did you mean"),
        (dict(attention_implementation="flash"), "is not one of 'auto', 'xla'"),
        (dict(out_channels=0), "out_channels=0 must be at least 1"),
    ],
)
def test_bad_attributes(as_shipped, options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_attributes_of_the_wrong_type(as_shipped):
    for name in ("heads", "depth", "mlp_width", "text_width", "rope_length"):
        with pytest.raises(TypeError, match=f"{name}=2.0 is of type float"):
            small(**{name: 2.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((3, 4, 4, 2))), "give videos"),
        (
            dict(x=jnp.zeros((3, 2, 4, 5, 2))),
            "patch_size=1 x 2 x 2 does not divide a video of 2 x 4 x 5",
        ),
        (
            dict(x=jnp.zeros((3, 9, 2, 2, 2))),
            "a video of 9 x 2 x 2 .* has 9 patches .* rope_length=8",
        ),
        (dict(t=jnp.zeros(2)), "t has shape .* one time a sample"),
        (dict(t=jnp.array([0, 1, 1])), r"t has dtype int32; times are in \[0, 1\]"),
        (dict(t=np.array([1, 500, 999])), r"times are in \[0, 1\]"),
        (dict(t=jnp.array([0.0, 1.0, 999.0])), r"outside \[0, 1\].*first is 999"),
        (dict(t=1000.0), r"outside \[0, 1\]"),
        (dict(cond=None), r"cond is NoneType\[\].*\[batch, length, 6\]"),
        (dict(cond=jnp.zeros((3, 5, 7))), r"cond is float32\[3, 5, 7\].*length, 6\]"),
        (dict(cond=jnp.zeros((3, 6))), r"cond is float32\[3, 6\]"),
        (dict(cond=jnp.zeros((3, 5, 6), int)), r"cond is int32.*floating numbers"),
        (dict(cond=jnp.zeros((2, 5, 6))), "leading axis must be the batch of x, 3"),
    ],
)
def test_bad_inputs(as_shipped, change, message):
    x, t, cond = draw()
    inputs = dict(x=x, t=t, cond=cond) | change
    with pytest.raises(ValueError, match=message):
        functional(small(rope_length=8))(
            initial(), inputs["x"], inputs["t"], inputs["cond"], method="embed"
        )


@pytest.mark.parametrize("tap", [4, -1])
def test_taps_are_layers(as_shipped, tap):
    message = rf"taps holds \[{tap}\]; a network of depth=4 has the layers 0..3"
    with pytest.raises(ValueError, match=message):
        functional(small())(
            initial(), *draw(), method="velocity_and_features", taps=(1, tap)
        )
    with pytest.raises(TypeError, match="integer"):
        functional(small())(
            initial(), *draw(), method="velocity_and_features", taps=(1.5,)
        )


def test_integer_times_are_refused_under_jit(as_shipped):
    apply_fn = jitted(small(), "embed_time")
    with pytest.raises(ValueError, match="t has dtype int32"):
        apply_fn(initial(), jnp.array([0, 1, 1]))


def test_output_asks_for_a_size_that_fits(as_shipped):
    h, c = jnp.zeros((BATCH, 12, 16)), {"time": jnp.zeros((BATCH, 16))}
    with pytest.raises(ValueError, match="2 x 4 x 4 .* needs 8 positions"):
        functional(small())(initial(), h, c, (2, 4, 4), method="output")
    with pytest.raises(ValueError, match="does not divide a video of 2 x 4 x 5"):
        functional(small())(initial(), h, c, (2, 4, 5), method="output")
