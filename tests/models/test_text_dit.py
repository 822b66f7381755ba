"""Text encoder and TextDiT: padding, parity of raw and encoded texts, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tmdjax import flows
from tmdjax.core import trees
from tmdjax.models import (
    DiT,
    TextDiT,
    TextEncoder,
    build,
    functional,
    init_params,
    lora,
    null_condition,
)

BATCH, LENGTH, WORDS = 3, 5, 11
SPEC = dict(
    vocabulary=WORDS,
    max_length=7,
    text_width=8,
    text_depth=2,
    text_heads=2,
    patch_size=2,
    hidden=16,
    depth=2,
    heads=2,
    mlp_ratio=2.0,
)


def small(**options):
    return TextDiT(**SPEC | options)


def encoder(**options):
    return TextEncoder(
        **dict(vocabulary=WORDS, max_length=7, width=8, heads=2, mlp_ratio=2.0)
        | options
    )


def texts():
    rng = np.random.default_rng(1)
    return {
        "ids": jnp.asarray(rng.integers(0, WORDS, (BATCH, LENGTH)), jnp.int32),
        "mask": jnp.array([[True] * 5, [True, True, False, True, False], [False] * 5]),
    }


def draw():
    x = np.random.default_rng(0).normal(size=(BATCH, 4, 8, 2))
    return jnp.asarray(x, jnp.float32), jnp.array([0.1, 0.5, 1.0]), texts()


@functools.cache
def initial():
    return init_params(small(), jax.random.key(0), *draw())


@functools.cache
def initial_encoder(**options):
    return init_params(encoder(**options), jax.random.key(0), texts())


@functools.cache
def jitted(module, method=None):
    return jax.jit(functools.partial(functional(module), method=method))


@functools.cache
def value_and_gradient(**options):
    apply_fn = functional(small(**options))
    return jax.jit(
        jax.value_and_grad(
            lambda params, inputs: jnp.square(apply_fn(params, *inputs) - 1).mean()
        )
    )


def shaped(tree):
    return jax.eval_shape(lambda tree: tree, tree)


def close(a, b, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), a, b)


def numpy_encoder(params, ids, positions):
    """One text, its padding cut out: plain float64 numpy, a loop over the blocks."""

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + 1e-6
        )

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h = params["word_embedding"][ids] + params["position_embedding"][positions]
    for layer in range(2):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])

        def dense(x, at):
            return x @ at["kernel"] + at["bias"]

        x, parts = norm(h), block["attention"]
        heads = []
        for columns in (slice(0, 4), slice(4, 8)):
            q, k, v = (
                dense(x, parts[name])[:, columns] for name in ("query", "key", "value")
            )
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
    np.testing.assert_array_equal(out["mask"], cond["mask"])
    for row in range(2):
        positions = np.flatnonzero(cond["mask"][row])
        want = numpy_encoder(params, np.asarray(cond["ids"])[row, positions], positions)
        np.testing.assert_allclose(out["tokens"][row, positions], want, atol=2e-5)


def test_padding_influences_nothing(stir):
    params, cond = stir(initial_encoder(), 0.5), texts()
    apply_fn = jitted(encoder())
    out = apply_fn(params, cond)
    other = jnp.where(cond["mask"], cond["ids"], (cond["ids"] + 3) % WORDS)
    assert (other != cond["ids"]).sum() == 7
    changed = apply_fn(params, cond | {"ids": other})
    np.testing.assert_array_equal(changed["tokens"], out["tokens"])
    # Not even ids that are none: inside a jitted function they pass unseen.
    wild = jnp.where(cond["mask"], cond["ids"], -7)
    np.testing.assert_array_equal(
        apply_fn(params, cond | {"ids": wild})["tokens"], out["tokens"]
    )
    np.testing.assert_array_equal(out["tokens"][~cond["mask"]], 0.0)
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
    np.testing.assert_array_equal(
        jitted(encoder(depth=0))(bare, cond)["tokens"], tokens
    )
    assert set(initial_encoder(depth=0)) == {"word_embedding", "position_embedding"}
    real = tokens[cond["mask"]]
    close(real.mean(-1), np.zeros(len(real)))
    close(real.std(-1), np.ones(len(real)), atol=1e-4)


def test_twelve_text_layers_are_one_program(equations):
    counts = []
    for depth in (2, 12):
        module = encoder(depth=depth)
        params = jax.eval_shape(
            lambda module=module: init_params(module, jax.random.key(0), texts())
        )
        assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {depth}

        def loss(params, module=module):
            return jnp.square(functional(module)(params, texts())["tokens"]).sum()

        counts.append(equations(jax.grad(loss), params).total())
    assert counts[0] == counts[1] > 50


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_shapes_and_dtypes(recipe):
    module = small(recipe=recipe)
    params, inputs = shaped((initial(), draw()))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    velocity = jax.eval_shape(functional(module), params, *inputs)
    assert velocity.shape == inputs[0].shape and velocity.dtype == jnp.float32
    encoded = jax.eval_shape(jitted(module, "encode"), params, inputs[2])
    assert encoded["tokens"].shape == (BATCH, LENGTH, 8)
    assert encoded["tokens"].dtype == jnp.float32
    assert encoded["mask"].shape == (BATCH, LENGTH) and encoded["mask"].dtype == bool


def test_bfloat16_recipe_stays_close(stir):
    params, cond = stir(initial_encoder(), 0.2), texts()
    exact = jitted(encoder())(params, cond)["tokens"]
    rough = jitted(encoder(recipe="bf16"))(params, cond)["tokens"]
    error = np.sqrt(np.square(rough - exact).mean() / np.square(exact).mean())
    assert 1e-4 < error < 0.05


def test_out_channels(stir):
    module = small(out_channels=3)
    params = jax.eval_shape(lambda: init_params(module, jax.random.key(0), *draw()))
    assert jax.eval_shape(jitted(module), params, *draw()).shape == (BATCH, 4, 8, 3)


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

    def described(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    x, t, cond = draw()
    alone = jax.eval_shape(lambda: init_params(encoder(), jax.random.key(0), cond))
    assert described(alone) == described(params["encoder"])
    tokens = {"tokens": jnp.zeros((BATCH, LENGTH, 8)), "mask": cond["mask"]}
    dit = small().dit_module()
    assert dit == DiT(
        patch_size=2, hidden=16, depth=2, heads=2, mlp_ratio=2.0, token_width=8
    )
    alone = jax.eval_shape(lambda: init_params(dit, jax.random.key(0), x, t, tokens))
    assert described(alone) == described(params["dit"])
    for example in (None, tokens):
        other = init_params(small(), jax.random.key(0), x, t, example)
        jax.tree.map(np.testing.assert_array_equal, other, params)


def test_attributes_reach_both_networks():
    spec = dict(
        recipe="bf16", remat=False, attention_implementation="xla", time_scale=9.0
    )
    module = build({"name": "text_dit"} | SPEC | spec)
    assert module == small(**spec)
    dit, text = module.dit_module(), module.bind({"params": initial()}).encoder
    assert {name: getattr(dit, name) for name in spec} == spec
    assert (text.recipe, text.remat, text.attention_implementation) == (
        "bf16",
        False,
        "xla",
    )
    text = small(attention_implementation="cudnn").bind({"params": initial()}).encoder
    assert text.attention_implementation == "auto"


def test_raw_and_encoded_texts_give_one_velocity(stir):
    params, (x, t, cond) = stir(initial()), draw()
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


def test_text_matters_and_padding_does_not(stir):
    params, (x, t, cond) = stir(initial()), draw()
    velocity = jitted(small())(params, x, t, cond)
    one = cond | {"ids": cond["ids"].at[0, 1].set((cond["ids"][0, 1] + 1) % WORDS)}
    moved = np.abs(jitted(small())(params, x, t, one) - velocity).max((1, 2, 3))
    assert moved[0] > 1e-3
    close(moved[1:], np.zeros(2))
    other = jnp.where(cond["mask"], cond["ids"], (cond["ids"] + 3) % WORDS)
    close(jitted(small())(params, x, t, cond | {"ids": other}), velocity)


def test_null_condition_is_no_text(stir):
    params, (x, t, cond) = stir(initial()), draw()
    apply_fn = jitted(small())
    velocity, without = apply_fn(params, x, t, cond), apply_fn(params, x, t, None)
    close(velocity[2], without[2])  # its mask is False everywhere
    assert np.abs(velocity[0] - without[0]).max() > 1e-3
    encoded = jitted(small(), "encode")(params, cond)
    for given, null in (
        (cond, null_condition(LENGTH)),
        (encoded, null_condition(LENGTH, 8)),
    ):
        described = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), given)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), null) == described
        guided = flows.classifier_free_guidance(
            functools.partial(apply_fn, params), 3.0, null
        )
        close(guided(x, t, given), without + 3 * (velocity - without), atol=5e-5)
        keys = jax.random.split(jax.random.key(0), BATCH)
        dropped = flows.drop_condition(keys, given, null, 1.0)
        close(apply_fn(params, x, t, dropped), without)


def test_gradient_reaches_the_words_that_stand_there(stir):
    cond = texts() | {"ids": jnp.arange(15).reshape(3, 5) % WORDS}
    inputs = (*draw()[:2], cond)
    params = stir(initial())
    _, gradient = value_and_gradient()(params, inputs)
    # Words 7 and 9 stand in padding alone, the last two positions nowhere.
    words = np.abs(gradient["encoder"]["word_embedding"]).max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(~words), [7, 9, 10])
    positions = np.abs(gradient["encoder"]["position_embedding"]).max(-1) > 0
    np.testing.assert_array_equal(positions, [True] * 5 + [False] * 2)


def test_remat_recomputes_both_stacks(equations):
    shapes = shaped((initial(), draw()))
    plain = equations(value_and_gradient(remat=False), *shapes)
    rematted = equations(value_and_gradient(), *shapes)
    # The gelu of a block runs a second time, once a network.
    assert plain["tanh"] == 2 and rematted["tanh"] == 4


def test_adapters_of_the_image_network_alone(stir):
    params, (x, t, cond) = stir(initial()), draw()
    encoded = jitted(small(), "encode")(params, cond)
    dit = functional(small().dit_module())
    adapters = lora.init(jax.random.key(1), params["dit"], 2, ["attention"])
    names = {path.split("/")[1] for path in trees.flatten(adapters)}
    assert names == {"attention", "cross_attention"}

    @jax.jit
    def adapted(adapters, base):
        return lora.apply_fn(dit, base, 4.0)(adapters, x, t, encoded)

    close(adapted(adapters, params["dit"]), jitted(small())(params, x, t, cond))
    moved = adapted(stir(adapters), params["dit"])
    whole = params | {"dit": lora.merge(params["dit"], stir(adapters), 4.0)}
    close(moved, jitted(small())(whole, x, t, cond))
    assert np.abs(moved - adapted(adapters, params["dit"])).max() > 1e-3
    # The whole tree takes adapters in both stacks.
    both = lora.init(jax.random.key(1), params, 2, ["attention"])
    assert set(both) == {"encoder", "dit"}


def test_one_shape_compiles_once(stir, count_compiles):
    params, (x, t, cond) = initial(), draw()
    apply_fn = jax.jit(functional(small()))
    other = {"ids": (cond["ids"] + 1) % WORDS, "mask": ~cond["mask"]}
    with count_compiles() as compiled:
        apply_fn(params, x, t, cond).block_until_ready()
        apply_fn(params, x, t, other).block_until_ready()
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(text_heads=3), "text_width=8 must be a multiple of text_heads=3"),
        (dict(heads=3), "hidden=16 must be a multiple of heads=3 and of 4"),
        (dict(vocabulary=0), "vocabulary=0 must be at least 1"),
        (dict(max_length=0), "max_length=0 must be at least 1"),
        (dict(text_width=0), "text_width=0 must be at least 1"),
        (dict(text_depth=-1), "text_depth=-1 must be at least 0"),
        (dict(mlp_ratio=0.1), r"int\(width \* mlp_ratio\)=0 must be at least 1"),
        (dict(recipe="fp23"), "unknown GEMM recipe 'fp23'.*Did you mean"),
        (dict(attention_implementation="flash"), "is not one of 'auto', 'xla'"),
    ],
)
def test_bad_attributes(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_attributes_of_the_encoder(as_shipped):
    with pytest.raises(ValueError, match="^width=8 must be a multiple of heads=3"):
        encoder(heads=3)
    with pytest.raises(ValueError, match="mlp_ratio=-1.0 is outside"):
        encoder(mlp_ratio=-1.0)
    with pytest.raises(ValueError, match="attention_implementation='flash'"):
        encoder(attention_implementation="flash")
    with pytest.raises(ValueError, match="unknown GEMM recipe"):
        encoder(recipe="fp23")
    with pytest.raises(TypeError, match="depth=2.0 is of type float"):
        encoder(depth=2.0)
    with pytest.raises(TypeError, match="text_width=True is of type bool"):
        small(text_width=True)
    with pytest.raises(ValueError, match="also needs vocabulary, max_length"):
        build({"name": "text_dit"})


def test_bad_null_conditions(as_shipped):
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        null_condition(0)
    with pytest.raises(TypeError, match="width=2.0 is of type float"):
        null_condition(3, 2.0)


MASK = np.ones((BATCH, LENGTH), bool)
IDS = np.zeros((BATCH, LENGTH), np.int32)


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        ({"ids": IDS}, TypeError, r"'ids' and 'mask' .*got the keys \['ids'\]"),
        (
            {"ids": IDS, "mask": MASK, "style": IDS},
            TypeError,
            r"got the keys \['ids', 'mask', 'style'\]",
        ),
        (IDS, TypeError, "got a value of type ndarray"),
        ({"ids": IDS + 0.0, "mask": MASK}, TypeError, "integer array.*float64"),
        ({"ids": IDS.tolist(), "mask": MASK}, TypeError, "integer array.*list"),
        (
            {"ids": IDS + WORDS, "mask": MASK},
            ValueError,
            r"\(a word\)=11 is outside \[0, 10\]",
        ),
        ({"ids": IDS - 1, "mask": MASK}, ValueError, r"\(a word\)=-1 is outside"),
        (
            {"ids": IDS, "mask": MASK * 1.0},
            ValueError,
            r"float64\[3, 5\]; give booleans",
        ),
        ({"ids": IDS, "mask": MASK[:, 1:]}, ValueError, r"booleans of shape \(3, 5\)"),
        (
            {"ids": IDS, "mask": MASK.tolist()},
            ValueError,
            r"None\[3, 5\]; give booleans",
        ),
        (
            {"ids": np.zeros((3, 8), int), "mask": np.ones((3, 8), bool)},
            ValueError,
            r"shape \(3, 8\); .* of 1 to max_length=7",
        ),
        ({"ids": IDS[:, :0], "mask": MASK[:, :0]}, ValueError, r"length of 1 to"),
        ({"ids": IDS[:, 0], "mask": MASK[:, 0]}, ValueError, r"give \[batch, length\]"),
        (
            {"ids": IDS[:2], "mask": MASK[:2]},
            ValueError,
            r"cond\['ids'\] .*the batch, 3",
        ),
        (
            {"tokens": np.zeros((3, 5, 6), np.float32), "mask": MASK},
            ValueError,
            r"token_width\] = \(3, length, 8\)",
        ),
    ],
)
def test_bad_conditions(as_shipped, cond, error, message):
    x, t, _ = draw()
    with pytest.raises(error, match=message):
        functional(small())(initial(), x, t, cond)


def test_the_encoder_takes_raw_texts_alone(as_shipped):
    cond = {"tokens": np.zeros((3, 5, 8), np.float32), "mask": MASK}
    with pytest.raises(TypeError, match=r"keys 'ids' and 'mask', got .*'tokens'"):
        functional(encoder())(initial_encoder(), cond)
