"""Text encoder and TextDiT: padding, parity of raw and encoded texts, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from model_helpers import close, draw, equal, jitted, shapes_of
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import flows, models
from tmdjax.core import trees
from tmdjax.models import TextDiT, TextEncoder, functional, init_params
from tmdjax.quant import RECIPES

BATCH, LENGTH, WORDS = 3, 5, 11
IMAGES = dict(patch_size=2, hidden=16, depth=2, heads=2, mlp_ratio=2.0)
TEXTS = dict(text_width=8, text_depth=2, text_heads=2)
SPEC = dict(vocabulary=WORDS, max_length=7) | TEXTS | IMAGES


def small(**options):
    return TextDiT(**SPEC | options)


def encoder(**options):
    sizes = dict(vocabulary=WORDS, max_length=7, width=8, heads=2, mlp_ratio=2.0)
    return TextEncoder(**sizes | options)


def texts():
    rng = np.random.default_rng(1)
    return {
        "ids": jnp.asarray(rng.integers(0, WORDS, (BATCH, LENGTH)), jnp.int32),
        "mask": jnp.array([[True] * 5, [True, True, False, True, False], [False] * 5]),
    }


def inputs():
    return draw(BATCH, 4, 8, 2), jnp.array([0.1, 0.5, 1.0]), texts()


@functools.cache
def initial():
    return init_params(small(), jax.random.key(0), *inputs())


@functools.cache
def initial_encoder(**options):
    return init_params(encoder(**options), jax.random.key(0), texts())


@functools.cache
def gradient(**options):
    apply_fn = functional(small(**options))
    return jax.jit(jax.grad(lambda *inputs: jnp.square(apply_fn(*inputs) - 1).mean()))


def numpy_encoder(params, ids, positions):
    """One text, its padding cut out: plain float64 numpy, a loop over the blocks."""

    def norm(x):
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return (x - x.mean(-1, keepdims=True)) / deviation

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = params["word_embedding"][ids] + params["position_embedding"][positions]
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])

        def dense(x, at):
            return x @ at["kernel"] + at["bias"]

        x, parts = norm(h), block["attention"]
        heads = []
        for columns in (slice(0, 4), slice(4, 8)):
            names = ("query", "key", "value")
            q, k, v = (dense(x, parts[name])[:, columns] for name in names)
            heads.append(scipy.special.softmax(q @ k.T / 2, axis=-1) @ v)
        h = h + dense(np.concatenate(heads, -1), parts["out"])
        y = dense(norm(h), block["mlp_in"])
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        h = h + dense(y, block["mlp_out"])
    return norm(h)


def test_encoder_equals_numpy_without_the_padding(stir):
    params, cond = stir(initial_encoder(), 0.5), texts()
    out = jitted(encoder())(params, cond)
    assert set(out) == {"tokens", "mask"}
    assert out["tokens"].shape == (BATCH, LENGTH, 8)
    assert_array_equal(out["mask"], cond["mask"])
    for row in range(2):
        positions = np.flatnonzero(cond["mask"][row])
        want = numpy_encoder(params, np.asarray(cond["ids"])[row, positions], positions)
        assert_allclose(out["tokens"][row, positions], want, atol=2e-5)


def test_padding_influences_nothing(stir):
    params, cond = stir(initial_encoder(), 0.5), texts()
    apply_fn = jitted(encoder())
    out = apply_fn(params, cond)
    other = jnp.where(cond["mask"], cond["ids"], (cond["ids"] + 3) % WORDS)
    assert (other != cond["ids"]).sum() == 7
    changed = apply_fn(params, cond | {"ids": other})
    assert_array_equal(changed["tokens"], out["tokens"])
    # Not even ids that are none: inside a jitted function they pass unseen.
    wild = jnp.where(cond["mask"], cond["ids"], -7)
    assert_array_equal(apply_fn(params, cond | {"ids": wild})["tokens"], out["tokens"])
    assert_array_equal(out["tokens"][~cond["mask"]], 0.0)
    # Nor how much of it there is.
    longer = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 2))), cond)
    close(apply_fn(params, longer)["tokens"][:, :LENGTH], out["tokens"])


def test_a_traced_word_out_of_range_is_not_silent(stir):
    params, cond = stir(initial_encoder()), texts()
    for word in (WORDS, -1):
        out = jitted(encoder())(params, cond | {"ids": cond["ids"].at[0, 1].set(word)})
        assert np.isnan(out["tokens"][0]).all()
        assert np.isfinite(out["tokens"][1:]).all()


def test_word_order_matters_and_words_see_both_sides(stir):
    params = stir(initial_encoder(), 0.5)
    ids = jnp.array([[1, 2, 3, 4, 5], [1, 3, 2, 4, 5]])
    cond = {"ids": ids, "mask": jnp.ones((2, LENGTH), bool)}
    first, second = jitted(encoder())(params, cond)["tokens"]
    change = np.abs(first - second).max(-1)
    assert (change > 1e-3).all()
    # Positions are what tells the orders apart.
    params["position_embedding"] = 0 * params["position_embedding"]
    first, second = jitted(encoder())(params, cond)["tokens"]
    close(first[jnp.array([0, 2, 1, 3, 4])], second)


def test_encoder_starts_as_its_normed_embeddings():
    """Blocks are the identity at the start; depth 0 has none."""
    params, cond = initial_encoder(), texts()
    tokens = jitted(encoder())(params, cond)["tokens"]
    bare = {name: leaf for name, leaf in params.items() if name != "blocks"}
    assert_array_equal(jitted(encoder(depth=0))(bare, cond)["tokens"], tokens)
    assert set(initial_encoder(depth=0)) == {"word_embedding", "position_embedding"}
    real = tokens[cond["mask"]]
    close(real.mean(-1), np.zeros(len(real)))
    close(real.std(-1), np.ones(len(real)), atol=1e-4)


def test_parameters_are_those_of_the_two_networks():
    """Counted by hand: dense layers [in, out] are in x out + out."""
    params = initial()
    assert set(params) == {"encoder", "dit"}
    text_block = 4 * (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8)
    assert trees.count(params["encoder"]) == 11 * 8 + 7 * 8 + 2 * text_block == 1280
    block = 8 * (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + (16 * 96 + 96)
    ends = (8 * 16 + 16) + (16 * 32 + 32) + (16 * 8 + 8)
    time = (256 * 16 + 16) + (16 * 16 + 16)
    text = (8 * 16 + 16) + 16
    assert trees.count(params["dit"]) == 2 * block + ends + time + text == 15128
    x, t, cond = inputs()
    shapes = jax.eval_shape(lambda: params)
    assert shapes_of(encoder(), cond) == shapes["encoder"]
    tokens = {"tokens": jnp.zeros((BATCH, LENGTH, 8)), "mask": cond["mask"]}
    dit = small().dit_module()
    assert dit == models.DiT(**IMAGES, token_width=8)
    assert shapes_of(dit, x, t, tokens) == shapes["dit"]
    for example in (None, tokens):
        equal(init_params(small(), jax.random.key(0), x, t, example), params)


def test_attributes_reach_both_networks():
    shared = dict(recipe="bf16", remat=False, attention_implementation="xla")
    spec = shared | dict(time_scale=9.0, out_channels=3)
    module = models.build({"name": "text_dit"} | SPEC | spec)
    assert module == small(**spec)
    dit, text = module.dit_module(), module.bind({"params": initial()}).encoder
    spec["recipe"] = shared["recipe"] = RECIPES["bf16"]
    assert {name: getattr(dit, name) for name in spec} == spec
    assert {name: getattr(text, name) for name in shared} == shared
    text = small(attention_implementation="cudnn").bind({"params": initial()}).encoder
    assert text.attention_implementation == "auto"
    encoded = jax.eval_shape(jitted(module, "encode"), initial(), texts())
    assert encoded["tokens"].shape == (BATCH, LENGTH, 8)
    assert encoded["tokens"].dtype == jnp.float32 and encoded["mask"].dtype == bool


def test_raw_and_encoded_texts_give_one_velocity(stir):
    params, (x, t, cond) = stir(initial()), inputs()
    velocity = jitted(small())(params, x, t, cond)
    assert np.abs(velocity).max() > 0.1
    encoded = jitted(small(), "encode")(params, cond)
    close(encoded, jitted(encoder())(params["encoder"], cond), atol=0)
    close(jitted(small())(params, x, t, encoded), velocity, atol=1e-6)
    dit = jitted(small().dit_module())
    close(dit(params["dit"], x, t, encoded), velocity, atol=1e-6)
    # Encoding what is encoded, or no text, changes nothing.
    again = functional(small())(params, encoded, method="encode")
    close(again, encoded, atol=0)
    assert functional(small())(params, None, method="encode") is None


def test_null_condition_is_no_text(stir):
    params, (x, t, cond) = stir(initial()), inputs()
    apply_fn = jitted(small())
    velocity, without = apply_fn(params, x, t, cond), apply_fn(params, x, t, None)
    close(velocity[2], without[2])  # its mask is False everywhere
    assert np.abs(velocity[0] - without[0]).max() > 1e-3
    encoded = jitted(small(), "encode")(params, cond)
    run = functools.partial(apply_fn, params)
    nulls = models.null_condition(LENGTH), models.null_condition(LENGTH, 8)
    for given, null in zip((cond, encoded), nulls):
        described = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), given)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), null) == described
        guided = flows.classifier_free_guidance(run, 3.0, null)
        close(guided(x, t, given), without + 3 * (velocity - without), atol=5e-5)
        keys = jax.random.split(jax.random.key(0), BATCH)
        dropped = flows.drop_condition(keys, given, null, 1.0)
        close(apply_fn(params, x, t, dropped), without)


def test_gradient_reaches_the_words_that_stand_there(stir):
    cond = texts() | {"ids": jnp.arange(15).reshape(3, 5) % WORDS}
    found = gradient()(stir(initial()), *inputs()[:2], cond)["encoder"]
    # Words 7 and 9 stand in padding alone, the last two positions nowhere.
    words = np.abs(found["word_embedding"]).max(-1) > 0
    assert_array_equal(np.flatnonzero(~words), [7, 9, 10])
    positions = np.abs(found["position_embedding"]).max(-1) > 0
    assert_array_equal(positions, [True] * 5 + [False] * 2)


def test_remat_recomputes_both_stacks(equations):
    arguments = initial(), *inputs()
    plain = equations(gradient(remat=False), *arguments)
    rematted = equations(gradient(), *arguments)
    # The gelu of a block runs a second time, once a network.
    assert plain["tanh"] == 2 and rematted["tanh"] == 4


def test_bad_attributes(refused):
    refused("text_width=8 must be a multiple of text_heads=3", small, text_heads=3)
    refused("hidden=16 must be a multiple of heads=3 and of 4", small, heads=3)
    refused(r"int\(width \* mlp_ratio\)=0 must be at least 1", small, mlp_ratio=0.1)
    refused("also needs vocabulary, max_length", models.build, {"name": "text_dit"})
    refused("^width=8 must be a multiple of heads=3", encoder, heads=3)
    refused("mlp_ratio=-1.0 is outside", encoder, mlp_ratio=-1.0)
    flash = dict(attention_implementation="flash")
    refused("attention_implementation='flash'", encoder, **flash)
    refused("unknown GEMM recipe", encoder, recipe="fp23")
    refused("depth=2.0 is of type float", encoder, depth=2.0, error=TypeError)
    refused("length=0 must be at least 1", models.null_condition, 0)
    refused("width=2.0 is of", models.null_condition, 3, 2.0, error=TypeError)


def test_bad_conditions(refused):
    x, t, _ = inputs()
    apply_fn = functools.partial(functional(small()), initial(), x, t)
    mask, ids = np.ones((BATCH, LENGTH), bool), np.zeros((BATCH, LENGTH), np.int32)

    def refused_text(message, ids, mask, **options):
        refused(message, apply_fn, {"ids": ids, "mask": mask}, **options)

    refused_text("integer array.*float64", ids + 0.0, mask, error=TypeError)
    refused_text("integer array.*list", ids.tolist(), mask, error=TypeError)
    refused_text(r"\(words\)=11 is outside \[0, 10\]", ids + WORDS, mask)
    refused_text(r"\(words\)=-1 is outside", ids - 1, mask)
    refused_text(r"float64\[3, 5\]; give booleans", ids, mask * 1.0)
    refused_text(r"booleans of shape \(3, 5\)", ids, mask[:, 1:])
    refused_text(r"None\[3, 5\]; give booleans", ids, mask.tolist())
    refused_text(r"shape \(3, 8\); .* of 1 to max_length=7", *np.zeros((2, 3, 8), int))
    refused_text(r"length of 1 to", ids[:, :0], mask[:, :0])
    refused_text(r"give \[batch, length\]", ids[:, 0], mask[:, 0])
    refused_text(r"cond\['ids'\] .*the batch, 3", ids[:2], mask[:2])
    for message, cond in (
        (r"'ids' and 'mask' .*got the keys \['ids'\]", {"ids": ids}),
        (r"\['ids', 'mask', 'x'\]", {"ids": ids, "mask": mask, "x": ids}),
        ("got a value of type ndarray", ids),
    ):
        refused(message, apply_fn, cond, error=TypeError)
    narrow, wide = ({"tokens": np.zeros((3, 5, n)), "mask": mask} for n in (6, 8))
    refused(r"token_width\] = \(3, length, 8\)", apply_fn, narrow)
    # The encoder takes raw texts alone.
    raw = functools.partial(functional(encoder()), initial_encoder())
    refused(r"keys 'ids' and 'mask', got .*'tokens'", raw, wide, error=TypeError)
