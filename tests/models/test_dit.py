"""DiT: a block by other layers, conditions, sizes, bad inputs.

What it shares with every network stands in test_contract.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from model_helpers import close, draw, flax_attention, flax_dense, jitted, shapes_of
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.core import trees
from tmdjax.models import DiT, functional, init_params

BATCH, HEIGHT, WIDTH, CHANNEL = 3, 8, 4, 2


def small(kind="class", **options):
    options = dict(patch_size=2, hidden=16, depth=3, heads=2, mlp_ratio=2.0) | options
    if kind == "class":
        options["num_classes"] = 4
    if kind == "tokens":
        options["token_width"] = 6
    return DiT(**options)


def inputs(kind="class"):
    mask = jnp.array([[True, True, True], [True, False, True], [False] * 3])
    tokens = {"tokens": draw(BATCH, 3, 6, seed=1), "mask": mask}
    cond = tokens if kind == "tokens" else jnp.array([0, 3, 4])
    return draw(BATCH, HEIGHT, WIDTH, CHANNEL), jnp.array([0.1, 0.5, 1.0]), cond


@functools.cache
def initial(kind="class"):
    return init_params(small(kind), jax.random.key(0), *inputs(kind))


@pytest.mark.parametrize("kind", ["class", "tokens"])
def test_block_equals_flax_layers(kind, stir):
    """The same block from flax's own norm, attention and dense layers."""
    module, params = small(kind), stir(initial(kind))
    apply_fn = functional(module)

    @jax.jit
    def ours(params):
        h, c = apply_fn(params, *inputs(kind), method="embed")
        return h, c, apply_fn(params, h, c, method="blocks", start=1, stop=2)[0]

    h, c, got = ours(params)
    block = jax.tree.map(lambda leaf: np.asarray(leaf)[1], params["blocks"])

    def norm(x):
        return nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6).apply({}, x)

    def peer(h):
        parts = flax_dense(block["modulation"], nn.silu(c["modulation"]))[:, None, :]
        shift, scale, gate, *mlp = jnp.split(parts, 6, axis=-1)
        x = norm(h) * (1 + scale) + shift
        h = h + gate * flax_attention(block["attention"], x, x)
        if kind == "tokens":
            crossing, mask = block["cross_attention"], c["mask"][:, None, None, :]
            h = h + flax_attention(crossing, norm(h), c["tokens"], mask)
        mlp_shift, mlp_scale, mlp_gate = mlp
        x = norm(h) * (1 + mlp_scale) + mlp_shift
        x = nn.gelu(flax_dense(block["mlp_in"], x))
        return h + mlp_gate * flax_dense(block["mlp_out"], x)

    close(got, jax.jit(peer)(h))


def test_bad_layer_indices(refused):
    h, c = jnp.zeros((BATCH, 8, 16)), {"modulation": jnp.zeros((BATCH, 16))}
    blocks = functools.partial(functional(small()), initial(), h, c, method="blocks")
    refused("negative indices are not read", blocks, start=-1)
    refused("stop=4 must satisfy .* depth=3", blocks, stop=4)
    refused("start=2, stop=1", blocks, start=2, stop=1)
    refused(r"taps holds \[3\], outside the layers 0..2", blocks, taps=(3,))
    refused(r"skip holds \[2\], outside the layers 0..1", blocks, stop=2, skip=(2,))
    refused(r"layers \[1\] are both tapped and", blocks, taps=(1,), skip=(1,))
    refused("integer", blocks, taps=(1.5,), error=TypeError)


def test_masked_tokens_are_not_seen(stir):
    params, (x, t, cond) = stir(initial("tokens")), inputs("tokens")
    apply_fn = jitted(small("tokens"))
    given = apply_fn(params, x, t, cond)
    # Whatever stands at masked positions, and however many of them there are.
    tokens = jnp.where(cond["mask"][..., None], cond["tokens"], 7.0)
    more = ((0, 0), (0, 2))
    tokens = jnp.pad(tokens, (*more, (0, 0)), constant_values=-50.0)
    padded = {"tokens": tokens, "mask": jnp.pad(cond["mask"], more)}
    close(apply_fn(params, x, t, padded), given)
    # Tokens are a set.
    turned = jax.tree.map(lambda leaf: leaf[:, ::-1], cond)
    close(apply_fn(params, x, t, turned), given)


def test_parameters_do_not_depend_on_the_example_condition():
    x, t, _ = inputs()
    without = init_params(small("tokens"), jax.random.key(0), x, t, None)
    jax.tree.map(assert_array_equal, without, initial("tokens"))


def test_remat_recomputes_the_blocks(equations):
    arguments = initial(), *inputs()

    def counted(remat):
        apply_fn = functional(small(remat=remat))
        return equations(jax.grad(lambda *args: apply_fn(*args).sum()), *arguments)

    plain, rematted = counted(False), counted(True)
    assert not any("remat" in name or "checkpoint" in name for name in plain)
    assert any("remat" in name or "checkpoint" in name for name in rematted)
    # A block takes eight products forward (four projections, two of attention, two
    # of the MLP) and one for its modulation; all but the last run a second time.
    assert 7 <= rematted["dot_general"] - plain["dot_general"] <= 9
    assert plain["tanh"] == 1 and rematted["tanh"] == 2  # the gelu


@pytest.mark.slow
def test_bfloat16_gradients_over_many_rows(stir):
    """4096 rows a sum: a bfloat16 sum over them stalls (half of it was lost)."""
    module = DiT(patch_size=1, hidden=8, depth=1, heads=1, mlp_ratio=1.0)
    x, t = 1 + draw(64, 8, 8, 1), jnp.linspace(0, 1, 64)
    params = stir(init_params(module, jax.random.key(0), x, t), 0.3)

    def gradient(recipe):
        net = functional(module.clone(recipe=recipe))
        loss = jax.grad(lambda p: jnp.square(net(p, x, t) - 3).mean())
        return trees.flatten(jax.jit(loss)(params))

    exact, rough = gradient("fp32"), gradient("bf16")
    errors = {
        path: np.linalg.norm(rough[path] - want) / np.linalg.norm(want)
        for path, want in exact.items()
        # Zero but for rounding: softmax does not see a key's bias.
        if not path.endswith("key/bias")
    }
    assert max(e for path, e in errors.items() if path.endswith("bias")) < 0.03, errors
    # Kernels differ by 1 % under jax 0.10.2 and 3 % under 0.12.
    assert 1e-3 < max(errors.values()) < 0.06, errors


def test_query_key_and_value_start_like_one_fused_kernel():
    """Xavier of [hidden, 3 hidden], as the published code draws them."""
    module = DiT(patch_size=1, hidden=96, depth=1, heads=2)
    x = jnp.zeros((1, 2, 2, 1))
    params = init_params(module, jax.random.key(0), x, jnp.zeros(1))
    fused = jax.nn.initializers.xavier_uniform()(jax.random.key(1), (96, 3 * 96))
    for name in ("query", "key", "value"):
        kernel = params["blocks"]["attention"][name]["kernel"]
        assert_allclose(kernel.std(), fused.std(), rtol=0.02)
        assert_allclose(kernel.max(), fused.max(), rtol=0.01)
    own = jax.nn.initializers.xavier_uniform()(jax.random.key(1), (96, 96))
    out = params["blocks"]["attention"]["out"]["kernel"]
    assert_allclose(out.std(), own.std(), rtol=0.02)


def test_xl_2_has_the_published_size():
    """675 M parameters: arXiv 2212.09748, table 4, made without allocating them."""
    module = DiT(patch_size=2, hidden=1152, depth=28, heads=16, num_classes=1000)
    inputs = jnp.zeros((2, 32, 32, 4)), jnp.zeros(2), jnp.zeros(2, int)
    params = shapes_of(module, *inputs)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {28}
    assert trees.count(params) / 1e6 == pytest.approx(675, abs=0.5)
    velocity = jax.eval_shape(functional(module), params, *inputs)
    assert velocity.shape == (2, 32, 32, 4) and velocity.dtype == jnp.float32


def test_out_channels_and_sizes():
    module, (x, t, cond) = small(out_channels=5), inputs()
    params = shapes_of(module, x, t, cond)
    velocity = jax.eval_shape(jitted(module), params, x, t, cond)
    assert velocity.shape == (BATCH, HEIGHT, WIDTH, 5)
    h, c = jax.eval_shape(jitted(module, "embed"), params, x[:, :4], t, cond)
    # Four patches are a square as well as a strip: the caller says which.
    for size in ((4, 4), (2, 8)):
        output = jitted(module, "output", size=size)
        assert jax.eval_shape(output, params, h, c).shape == (BATCH, *size, 5)


def test_bad_attributes(refused):
    refused("hidden=18 must be a multiple of heads=2 and of 4", small, hidden=18)
    refused("multiple of heads=3", small, heads=3)
    refused("mlp_ratio=0.0 is outside", small, mlp_ratio=0.0)
    refused(r"int\(hidden \* mlp_ratio\)=0 must be", small, mlp_ratio=0.05)
    refused("num_classes=4 and token_width=3 are both given", small, token_width=3)
    for name, value in {"hidden": "32", "token_width": True}.items():
        message = f"{name}={value!r} is of type .* an integer"
        refused(message, small, "", error=TypeError, **{name: value})


def test_bad_inputs(refused):
    x, t, cond = inputs()
    call = functools.partial(functional(small()), initial())
    refused("give images", call, x[0], t, cond)
    refused("patch_size=2 does not divide", call, x[:, 1:], t, cond)
    h, c = jnp.zeros((BATCH, 4, 16)), {"modulation": jnp.zeros((BATCH, 16))}
    output = functools.partial(call, h, c, method="output")
    refused("size", output, error=TypeError)
    refused("needs 8 positions", output, size=(4, 8))
    tokens, mask = inputs("tokens")[2].values()
    call = functools.partial(functional(small("tokens")), initial("tokens"), x, t)
    refused("dict with the keys", call, cond, error=TypeError)
    refused(r"got \['tokens'\]", call, {"tokens": 0}, error=TypeError)
    narrow, real = tokens[..., 1:], mask * 1.0
    refused(r"\(3, length, 6\)", call, {"tokens": narrow, "mask": mask})
    refused("give booleans of shape", call, {"tokens": tokens, "mask": real})
