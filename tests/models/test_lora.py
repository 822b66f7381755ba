"""LoRA: the start is the base, the change has the rank, only adapters learn."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from model_helpers import close, draw, equal, jitted, stirred
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.core import trees
from tmdjax.models import Dense, DiT, functional, init_params, lora

DIT = DiT(patch_size=2, hidden=8, depth=3, heads=2, mlp_ratio=2.0)
TARGETS = ["attention/(query|value)", "mlp_in"]
X = draw(2, 4, 4, 1)
T = jnp.array([0.2, 0.9])
KEY = jax.random.key(3)


@functools.cache
def initial():
    return init_params(DIT, jax.random.key(0), X, T)


@pytest.fixture
def base(stir):
    return stir(initial())


@functools.cache
def fresh(rank=2, targets=tuple(TARGETS)):
    """Adapters of the whole tree, drawn by one program."""
    return jax.jit(lambda base: lora.init(KEY, base, rank, list(targets)))(initial())


merge = jax.jit(lora.merge, static_argnums=2)


def trained(adapters):
    """Adapters as if training had moved them."""
    return stirred(jax.tree.map(jnp.zeros_like, adapters), 1.0, seed=5)


def test_adapters_are_a_cut_of_the_tree(base):
    adapters = fresh()
    attention = {"kernel": {"a": (3, 8, 2), "b": (3, 2, 8)}}
    mlp = {"kernel": {"a": (3, 8, 2), "b": (3, 2, 16)}}
    both = {"query": attention, "value": attention}
    tree = {"blocks": {"attention": both, "mlp_in": mlp}}
    assert jax.tree.map(jnp.shape, adapters) == tree
    assert lora.count(adapters) == 3 * 2 * (16 + 16 + 24)
    a = np.asarray(adapters["blocks"]["mlp_in"]["kernel"]["a"])
    assert 0.2 < np.abs(a).max() <= 8**-0.5
    assert np.abs(a[0] - a[1]).max() > 0.01
    shapes = jax.eval_shape(lambda p: lora.init(KEY, p, 2, TARGETS), base)
    assert lora.count(shapes) == lora.count(adapters)


def test_an_adapter_depends_on_key_and_path_alone(base):
    def pick(tree):
        return tree["blocks"]["mlp_in"]["kernel"]["a"]

    few = pick(fresh(2, ("mlp_in",)))
    assert_array_equal(few, pick(fresh()))
    assert np.any(few != pick(lora.init(jax.random.key(4), base, 2, ["mlp_in"])))
    query = fresh(2, ("query",))["blocks"]["attention"]["query"]
    assert np.any(few != query["kernel"]["a"])


def test_start_and_off_equal_the_base_bit_for_bit(base):
    apply_fn = functional(DIT)
    want = jitted(DIT)(base, X, T)
    assert np.abs(want).max() > 0.1
    adapters = fresh()

    @functools.partial(jax.jit, static_argnums=2)
    def adapted(base, adapters, alpha):
        return lora.apply_fn(apply_fn, base, alpha)(adapters, X, T)

    assert_array_equal(adapted(base, adapters, 16.0), want)
    moved = trained(adapters)
    assert np.abs(adapted(base, moved, 16.0) - want).max() > 1e-2
    assert_array_equal(adapted(base, moved, 0.0), want)
    assert lora.merge(base, moved, np.float32(0)) is base
    assert_array_equal(adapted(base, {}, 16.0), want)
    assert_array_equal(adapted(base, None, 16.0), want)
    equal(merge(base, adapters, 16.0), base)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_change_has_the_rank_in_every_layer(base, rank):
    adapters = trained(fresh(rank))
    merged = trees.flatten(merge(base, adapters, 4.0))
    changed = set()
    for path, before in trees.flatten(base).items():
        delta = np.asarray(merged[path], np.float64) - np.asarray(before, np.float64)
        if np.any(delta):
            changed.add(path)
            values = np.linalg.svd(delta, compute_uv=False)
            assert values.shape[0] == 3
            assert (values[:, rank - 1] > 1e-2 * values[:, 0]).all()
            assert (values[:, rank] < 1e-5 * values[:, 0]).all()
    parts = ("attention/query", "attention/value", "mlp_in")
    assert changed == {f"blocks/{part}/kernel" for part in parts}


def test_merge_equals_the_low_rank_path():
    """(x W + b) + (alpha / r) (x a) b_up, two thin products beside the layer."""
    layer, x = Dense(6), draw(7, 5)
    params = init_params(layer, jax.random.key(0), x)
    adapters = trained(lora.init(KEY, params, 2, ["kernel"]))
    got = lora.apply_fn(functional(layer), params, 3.0)(adapters, x)
    a, b = adapters["kernel"]["a"], adapters["kernel"]["b"]
    beside = 1.5 * (np.asarray(x) @ np.asarray(a)) @ np.asarray(b)
    assert_allclose(got, functional(layer)(params, x) + beside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stride", "window"), [(1, (3, 3)), (2, (2, 3))])
def test_a_convolution_equals_a_thin_one_and_a_1_by_1_beside_it(stride, window):
    """conv(x, W) + bias + (alpha / r) conv(conv(x, a), b); the rank is 1 here."""
    layer, x = nn.Conv(6, window, strides=stride), draw(2, 5, 4, 3)
    params = init_params(layer, jax.random.key(0), x)
    unmoved = lora.init(KEY, params, 1, ["kernel"])
    shapes = {"kernel": {"a": (*window, 3, 1), "b": (1, 6)}}
    assert jax.tree.map(jnp.shape, unmoved) == shapes
    base = functional(layer)(params, x)
    adapted = jax.jit(lora.apply_fn(functional(layer), params, 3.0))
    assert_array_equal(adapted(unmoved, x), base)
    adapters = trained(unmoved)
    thin = nn.Conv(1, window, strides=stride, use_bias=False)
    up = nn.Conv(6, (1, 1), use_bias=False)
    h = functional(thin)({"kernel": adapters["kernel"]["a"]}, x)
    beside = functional(up)({"kernel": adapters["kernel"]["b"][None, None]}, h)
    assert np.abs(beside).max() > 1
    assert_allclose(adapted(adapters, x), base + 3.0 * beside, rtol=1e-4, atol=1e-4)


def test_the_fan_in_of_a_convolution_is_its_window(refused):
    params = {"kernel": jnp.zeros((3, 3, 2, 20))}
    a = np.asarray(lora.init(KEY, params, 18, ["kernel"])["kernel"]["a"])
    assert 0.9 * 18**-0.5 < np.abs(a).max() <= 18**-0.5
    assert np.abs(a).max((2, 3)).min() > 0.5 * 18**-0.5  # at every offset
    for channels, rank, most in ((20, 19, 18), (4, 5, 4)):
        params = {"kernel": jnp.zeros((3, 3, 2, channels))}
        message = rf"rank \(of kernel\)={rank} is outside \[1, {most}\]"
        refused(message, lora.init, KEY, params, rank, ["kernel"])


def test_a_stack_is_merged_layer_by_layer():
    stacked = {"kernel": draw(3, 4, 5)}
    adapters = {"kernel": {"a": draw(3, 4, 2, seed=1), "b": draw(3, 2, 5, seed=2)}}
    merged = lora.merge(stacked, adapters, 2.0)["kernel"]
    for layer in range(3):
        own = jax.tree.map(lambda leaf, i=layer: leaf[i], (stacked, adapters))
        close(merged[layer], lora.merge(*own, 2.0)["kernel"], atol=1e-6)


def test_the_product_is_taken_in_float32():
    """Adapters stored in bfloat16 whose product is not a bfloat16 number."""
    params = {"kernel": jnp.zeros((1, 1))}
    thin = 1 + 2**-7
    adapters = {"kernel": {"a": jnp.full((1, 1), thin), "b": jnp.full((1, 1), thin)}}
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapters)
    for alpha in (1.0, np.float32(1), np.int64(1), jnp.ones(())):
        merged = lora.merge(params, narrow, alpha)["kernel"]
        assert float(merged[0, 0]) == thin**2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_base_is_not_adapted_but_merged_into(dtype, refused):
    layer, x = Dense(4), jnp.ones((1, 4))
    params = init_params(layer, jax.random.key(0), x)
    adapters = trained(lora.init(KEY, params, 2, ["kernel"]))
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    fn = lora.apply_fn(functional(layer), narrow, 1.0)
    wide = f"'kernel' is {dtype}.* base in float32"
    refused(wide, jax.jit(fn), adapters, x, error=TypeError)
    assert fn({}, x).shape == (1, 4)
    assert lora.merge(narrow, adapters, 1.0)["kernel"].dtype == dtype
    # Leaves that are not adapted may be narrow.
    mixed = params | {"bias": narrow["bias"]}
    assert lora.apply_fn(functional(layer), mixed, 1.0)(adapters, x).shape == (1, 4)


def test_only_adapters_get_gradients(base, check_slope):
    adapters = fresh()

    def loss(adapters, base):
        fn = lora.apply_fn(functional(DIT), base, 4.0)
        return jnp.square(fn(adapters, X, T) - 1).mean()

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(adapters, base)
    ours, theirs = jax.device_get(slopes)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(theirs))
    for path, gradient in trees.flatten(ours).items():
        assert np.any(gradient) == path.endswith("/b")  # b = 0 holds a back at first
    moved = jax.tree.map(lambda leaf: 0.3 * leaf, trained(adapters))
    slope = jax.jit(jax.value_and_grad(lambda adapters: loss(adapters, base)))
    assert not check_slope(slope, moved)


def test_options_reach_the_base(base):
    fn, adapters = lora.apply_fn(functional(DIT), base, 4.0), fresh()
    h, c = jax.eval_shape(functools.partial(fn, method="embed"), adapters, X, T)
    blocks = functools.partial(fn, method="blocks", stop=1, taps=(0,))
    assert set(jax.eval_shape(blocks, adapters, h, c)[1]) == {0}


def test_init_refusals(refused, base):
    init = functools.partial(lora.init, KEY)
    misspelt = ["mlp_in", "atention/qery"]
    refused(r"'atention/qery' matches no kernel; .*query", init, base, 2, misspelt)
    nine, message = np.int64(9), r"rank \(of blocks/.*\)=9 is outside \[1, 8\]"
    refused(message, init, base, nine, TARGETS)
    for rank in (0, -2, np.int32(-2)):
        refused(f"rank={rank} must be at least 1", fresh, rank)
    refused(r"rank=2\.0 is of type float", init, base, 2.0, TARGETS, error=TypeError)
    refused("give a list of one or more", init, base, 2, "query", error=TypeError)
    refused("give a list of one or more", init, base, 2, [])
    raw = jnp.zeros(2, jnp.uint32)
    refused("typed key", lora.init, raw, base, 2, TARGETS, error=TypeError)
    trees = [{"kernel": jnp.ones(5)}, {"kernel": jnp.ones((2, 3, 3, 4, 5))}]
    for tree in (*trees, {"blocks": {"stack": {"kernel": jnp.ones((2, 3, 4, 5))}}}):
        shape = re.escape(str(jax.tree.leaves(tree)[0].shape))
        message = rf"kernel has shape {shape}; .*\[kh, kw"
        refused(message, init, tree, 1, ["kernel"])


def test_merge_refusals(refused, base):
    adapters = fresh(2, ("query",))
    for alpha in (-1.0, np.float32(-1), jnp.float32(-1)):
        refused(r"alpha=-1.0 is outside \[0, inf\)", lora.merge, base, adapters, alpha)
    merge = lora.merge
    for alpha in ("16", None, np.ones(2)):
        refused("alpha=.* must be one", merge, base, adapters, alpha, error=TypeError)
    lost = {"block": {"query": {"a": KEY, "b": KEY}}}
    refused("'block/query' has no parameter; the nearest", merge, base, lost, 1.0)
    shallow = jax.tree.map(lambda leaf: leaf[:2], base)
    refused(r"\(3, 8, 2\) x \(3, 2, 8\), does not", merge, shallow, adapters, 1.0)


def test_only_stacks_have_a_layer_axis(refused):
    """[in, heads, head_dim], as flax's attention stores it, is not three layers."""
    params = {"attention": {"query": {"kernel": jnp.ones((8, 2, 4))}}}
    init = functools.partial(lora.init, KEY, rank=1, targets=["query"])
    refused(r"query/kernel has shape \(8, 2, 4\).*stacked=", init, params)
    refused("name the stack", init, {"my_blocks": params})
    nested, layers = {"net": {"blocks": params}}, {"layers": params}
    found = init({"blocks": params}), init(nested), init(layers, stacked="^layers/")
    for adapters in found:
        leaves = jax.tree.leaves(adapters)
        assert sorted(leaf.shape for leaf in leaves) == [(8, 1, 4), (8, 2, 1)]
