"""What every network keeps, asked of one table; what is special stands in its file.

Three programs a network serve all of it: the batch beside its samples one by one, the
gradient, and the forward pass in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import close, shapes_of
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models
from tmdjax.core import trees

BATCH = 3


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


T, R = np.array([0.1, 0.5, 1.0], np.float32), np.array([0.0, 0.5, 0.2], np.float32)
CLASSES = np.array([0, 3, 4])
SOME = np.array([[True] * 3, [True, False, True], [False] * 3])
IMAGES, VIDEOS = draw(BATCH, 8, 4, 2), draw(BATCH, 2, 4, 6, 2)
TEXT, WORDS = draw(BATCH, 4, 6, seed=1), np.arange(9).reshape(3, 3)
TINY = dict(patch_size=2, hidden=16, depth=3, heads=2, mlp_ratio=2.0)
VIDEO = models.VideoDiT(
    heads=2, head_dim=8, depth=3, mlp_width=24, text_width=6, frequency_dim=8
)


def both_parts(module):
    """The head of a split network on the features of its backbone."""
    apply_fn = models.functional(module)

    def fn(params, x, t, y, s, r, text):
        features = apply_fn(params, x, t, text, method="backbone")
        return apply_fn(params, y, s, r, features, method="head")

    return fn


@dataclasses.dataclass(frozen=True)
class Network:
    module: Any
    inputs: tuple  # arrays and trees of them, samples first
    times: tuple[int, ...] = ()  # which inputs are times: one a sample, or one for all
    zero: bool = False  # it starts as the velocity zero
    fn: Callable = models.functional
    example: tuple | None = None  # what its parameters are drawn for
    eps: float = 1e-2  # of the finite difference


NETWORKS = {
    "mlp": Network(
        models.VelocityMLP(hidden=16, depth=2, num_classes=4),
        (draw(BATCH, 2), T, CLASSES),
        (1,),
    ),
    "unet": Network(
        models.UNet(
            width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2,
            num_classes=4,
        ),
        (IMAGES, T, CLASSES),
        (1,),
        zero=True,
    ),
    "dit": Network(models.DiT(**TINY), (IMAGES, T), (1,), zero=True),
    "class_dit": Network(
        models.DiT(**TINY, num_classes=4), (IMAGES, T, CLASSES), (1,), zero=True
    ),
    "token_dit": Network(
        models.DiT(**TINY, token_width=6),
        (IMAGES, T, {"tokens": draw(BATCH, 3, 6), "mask": SOME}),
        (1,),
        zero=True,
    ),
    "text_dit": Network(
        models.TextDiT(
            vocabulary=9, max_length=3, text_width=8, text_depth=2, text_heads=2,
            **TINY | {"depth": 2},
        ),
        (IMAGES, T, {"ids": WORDS[::-1], "mask": SOME | np.eye(3, dtype=bool)}),
        (1,),
        zero=True,
    ),
    "video_dit": Network(VIDEO, (VIDEOS, T, TEXT), (1,), zero=True),
    "split_dit": Network(
        models.SplitDiT(shared=VIDEO, head_blocks=1, initial_gate=0.3),
        (VIDEOS, T, VIDEOS[::-1], T, R * T, TEXT),
        (1, 3, 4),
        fn=both_parts,
        example=(VIDEOS, T, TEXT),
    ),
    "two_time_dit": Network(
        models.TwoTimeDiT(shared=VIDEO), (VIDEOS, T, R * T, TEXT), (1, 2), zero=True
    ),
    "decoder": Network(
        models.Decoder(
            models.DecoderConfig(
                vocab_size=9, hidden_size=8, intermediate_size=12, num_layers=2,
                num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=True,
            )
        ),
        (WORDS,),
        eps=1e-3,
    ),
    "classifier": Network(
        models.Classifier(num_classes=3, width=4, feature_dim=5),
        (draw(BATCH, 8, 8, 2),),
    ),
    "discriminator": Network(
        models.VideoDiscriminator(width=4),
        ([draw(BATCH, 2, 8, 8, 4, seed=seed) for seed in (0, 1)],),
        eps=2e-3,
    ),
    "control_velocity": Network(
        models.ControlVelocity(2, (16, 8), out_scale=1.0),
        (draw(BATCH, 2), T, draw(BATCH, 4, seed=1)),
    ),
    "control_mlp": Network(models.ControlMLP(3, (8, 6), "tanh"), (draw(BATCH, 4),)),
}  # fmt: skip
HEAVY = {"unet": [pytest.mark.slow]}


def every(*names, but=(), heavy=None):
    """The networks of these names, or all; ``heavy`` ones with their marks."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=(heavy or {}).get(name, ()))
            for name in names or NETWORKS
            if name not in but
        ],
    )


@functools.cache
def initial(name):
    network = NETWORKS[name]
    example = network.example or network.inputs
    return models.init_params(network.module, jax.random.key(0), *example)


@functools.cache
def answers(name):
    """``(params, inputs) -> batch, samples one by one with one time for all``."""
    network = NETWORKS[name]
    fn = network.fn(network.module)

    def one(params, *inputs):
        batched = (
            value
            if i in network.times
            else jax.tree.map(lambda leaf: leaf[None], value)
            for i, value in enumerate(inputs)
        )
        return fn(params, *batched)[0]

    @jax.jit
    def both(params, inputs):
        singly = jax.vmap(one, (None, *(0 for _ in inputs)))(params, *inputs)
        return fn(params, *inputs), singly

    return both


@functools.cache
def value_and_gradient(name, **options):
    """``(params, target)`` to mean (answer - target)^2 and its gradient to params."""
    network = NETWORKS[name]
    fn = network.fn(network.module.clone(**options))

    @jax.jit
    @jax.value_and_grad
    def loss(params, target, inputs):
        return jnp.square(fn(params, *inputs) - target).mean()

    return lambda params, target: loss(params, target, network.inputs)


@every()
def test_samples_do_not_meet(name, stir):
    """A batch is its samples one by one, in any order; a scalar time is everybody's."""
    params, inputs = stir(initial(name)), NETWORKS[name].inputs
    batch, singly = answers(name)(params, inputs)
    assert batch.dtype == jnp.float32 and len(batch) == BATCH
    size = np.abs(batch).max()
    assert np.isfinite(batch).all() and size > 0.05
    assert_allclose(singly, batch, atol=1e-5 * max(1, size))
    order = np.array([2, 0, 1])
    turned, _ = answers(name)(params, jax.tree.map(lambda a: a[order], inputs))
    assert_allclose(turned, batch[order], atol=1e-5 * max(1, size))
    assert np.abs(batch - turned).max() > 1e-3 * size


@every(*(name for name, network in NETWORKS.items() if network.zero))
def test_velocity_starts_at_zero(name):
    batch, _ = answers(name)(initial(name), NETWORKS[name].inputs)
    assert batch.shape == NETWORKS[name].inputs[0].shape
    assert_array_equal(batch, 0.0)


@every(*(name for name, network in NETWORKS.items() if network.times))
def test_every_input_matters(name, stir):
    network = NETWORKS[name]
    params = stir(initial(name))
    base, _ = answers(name)(params, network.inputs)
    base = np.asarray(base)

    def moved(i, value):
        if i in network.times:
            return value / 2
        if isinstance(value, dict):  # another sample's words under the same mask
            return {k: v if k == "mask" else np.roll(v, 1, 0) for k, v in value.items()}
        return np.roll(value, 1, 0) if value.dtype == int else -value

    for i, value in enumerate(network.inputs):
        inputs = list(network.inputs)
        inputs[i] = moved(i, value)
        other, _ = answers(name)(params, tuple(inputs))
        assert np.abs(base - other).max() > 1e-3, i


@every("mlp", "unet", "class_dit", "token_dit")
def test_null_class_and_masked_tokens_are_no_condition(name, stir):
    params, (x, t, cond) = stir(initial(name)), NETWORKS[name].inputs
    given, dropped = (answers(name)(params, (x, t, c))[0] for c in (cond, None))
    close(given[2], dropped[2], atol=2e-6)
    assert np.abs(given[0] - dropped[0]).max() > 1e-3


@every("unet", "class_dit", "token_dit")
def test_all_leaves_learn_within_three_steps(name):
    """The output layer first, what lies behind its zeros after it."""
    target = NETWORKS[name].inputs[0][..., ::-1]
    params, found = initial(name), []
    for _ in range(4):
        _, gradient = value_and_gradient(name)(params, target)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
        found.append(trees.flatten(jax.tree.map(np.asarray, gradient)))
    first = {path.rpartition("/")[0] for path, g in found[0].items() if np.any(g)}
    assert first == {"output" if name == "unet" else "final/projection"}
    assert all(np.isfinite(g).all() for g in found[-1].values())
    # A key's bias shifts all scores of a query alike: softmax does not see it.
    assert not [
        path
        for path, g in found[-1].items()
        if not np.any(g) and not path.endswith("key/bias")
    ]


@every(but=("dit", "class_dit"))
def test_gradient_is_the_slope_and_reaches_every_leaf(name, stir, check_slope):
    params = stir(initial(name))
    silent = check_slope(
        lambda p: value_and_gradient(name)(p, 1.0), params, eps=NETWORKS[name].eps
    )
    assert not [path for path in silent if not path.endswith("key/bias")]
    if "blocks" in params.get("shared", params):  # every layer of a stack
        _, gradient = value_and_gradient(name)(params, 1.0)
        stack = gradient.get("shared", gradient)["blocks"]
        for path, leaf in trees.flatten(jax.tree.map(np.asarray, stack)).items():
            layers = np.abs(leaf).reshape(len(leaf), -1).max(1)
            assert path.endswith("key/bias") or (layers > 0).all(), path


@every("unet", "text_dit", "video_dit", heavy=HEAVY)  # text_dit: of tokens too
def test_remat_changes_neither_value_nor_gradient(name, stir):
    params = stir(initial(name))
    value, gradient = value_and_gradient(name)(params, 0.0)
    plain_value, plain = value_and_gradient(name, remat=False)(params, 0.0)
    assert_allclose(value, plain_value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-7
        ),
        gradient,
        plain,
    )


@every("mlp", "unet", "text_dit", "video_dit", heavy=HEAVY)
def test_bfloat16_recipe_stays_close(name, stir):
    network, params = NETWORKS[name], stir(initial(name), 0.1)
    exact, _ = answers(name)(params, network.inputs)
    rough = jax.jit(network.fn(network.module.clone(recipe="bf16")))(
        params, *network.inputs
    )
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05


@every("unet", "text_dit", "video_dit")
def test_training_gradient_lowers_for_cuda_and_tpu(name):
    network = NETWORKS[name]
    fn = network.fn(network.module.clone(recipe="bf16", attention_implementation="xla"))

    def loss(params, *inputs):
        v = fn(params, *inputs)
        return jnp.square(v).mean(), v

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    exported = jax.export.export(step, platforms=["cuda", "tpu"])(
        initial(name), *jax.tree.map(jnp.asarray, network.inputs)
    )
    assert exported.platforms == ("cuda", "tpu")


@every("token_dit", "video_dit")
def test_forty_layers_are_one_program(name, equations):
    network = NETWORKS[name]
    counts = []
    for depth in (2, 40):
        module = network.module.clone(depth=depth)
        apply_fn = models.functional(module)
        gradient = jax.grad(lambda *inputs, fn=apply_fn: fn(*inputs).sum())
        params = shapes_of(module, *network.inputs)
        counts.append(equations(gradient, params, *network.inputs).total())
    assert counts[0] == counts[1] > 100


STACKS = every("token_dit", "video_dit")


@functools.cache
def stack(name):
    """Ways to run a stack of three, in one program; one layer alone in another."""
    network = NETWORKS[name]
    run = models.functional(network.module)
    one = models.functional(network.module.clone(depth=1))

    @jax.jit
    def ways(params, inputs):
        h, c = run(params, *inputs, method="embed")
        blocks = functools.partial(run, params, method="blocks")
        whole, none = blocks(h, c)
        first, _ = blocks(h, c, stop=1)
        rest, _ = blocks(first, c, start=1)
        output = run(params, rest, c, network.inputs[0].shape[1:-1], method="output")
        return dict(
            h=h, c=c, whole=whole, none=none, first=first, rest=rest, output=output,
            tapped=blocks(h, c, taps=(2, 0)), skipped=blocks(h, c, skip=(1,), taps=(2,)),
            empty=blocks(h, c, start=3)[0],
        )  # fmt: skip

    @jax.jit
    def layer(params, i, h, c):
        own = jax.tree.map(lambda leaf: leaf[i][None], params["blocks"])
        return one(params | {"blocks": own}, h, c, method="blocks")[0]

    return lambda params: ways(params, network.inputs), layer


@STACKS
def test_parts_of_a_stack_are_a_loop_over_its_layers(name, stir):
    params = stir(initial(name))
    ways, layer = stack(name)
    found = ways(params)

    def loop(*layers):
        outputs, h = [], found["h"]
        for i in layers:
            h = layer(params, i, h, found["c"])
            outputs.append(np.asarray(h))
        return outputs

    outputs, without = loop(0, 1, 2), loop(0, 2)
    assert np.abs(outputs[2] - outputs[1]).max() > 0.1
    assert np.abs(without[1] - outputs[2]).max() > 1e-2
    assert found["none"] == {}
    close(found["whole"], outputs[2])
    close(found["first"], outputs[0])
    close(found["rest"], found["whole"], atol=2e-6)
    close(found["tapped"], (outputs[2], {0: outputs[0], 2: outputs[2]}))
    close(found["skipped"], (without[1], {2: without[1]}))
    assert_array_equal(found["empty"], found["h"])
    batch, _ = answers(name)(params, NETWORKS[name].inputs)
    close(found["output"], batch)


def test_a_part_of_a_stack_has_the_gradient_of_the_whole(stir):
    network, params = NETWORKS["token_dit"], stir(initial("token_dit"))
    run = models.functional(network.module)
    found = stack("token_dit")[0](params)

    @jax.jit
    def gradients(params):
        def loss(params, h, start):
            out, _ = run(params, h, found["c"], method="blocks", start=start)
            return jnp.square(out).mean()

        return [
            jax.grad(loss)(params, found[h], start)["blocks"]
            for h, start in (("h", 0), ("first", 1))
        ]

    whole, part = (
        trees.flatten(jax.tree.map(np.asarray, tree)) for tree in gradients(params)
    )
    for path, leaf in part.items():
        assert_array_equal(leaf[:1], 0.0)
        assert_allclose(
            leaf[1:],
            whole[path][1:],
            rtol=1e-3,
            atol=1e-4 * np.abs(whole[path]).max() + 1e-6,
        )


@STACKS
def test_where_a_stack_starts(name):
    """A DiT's blocks are the identity at first; a video DiT's are not."""
    found = stack(name)[0](initial(name))
    assert np.abs(found["h"]).max() > 0.05
    if name == "token_dit":
        assert_array_equal(found["whole"], found["h"])
    else:
        assert np.abs(found["whole"] - found["h"]).max() > 0.1


@every(*(name for name, network in NETWORKS.items() if network.times == (1,)))
def test_common_refusals(name, refused):
    module, (x, _, *cond) = NETWORKS[name].module, NETWORKS[name].inputs
    call = functools.partial(models.functional(module), initial(name), x)
    refused("t has shape .* one time a sample", call, jnp.zeros(2), *cond)
    for t in (1.5, -0.1, jnp.nan, jnp.array([0.0, 1.0, 999.0])):
        refused(r"t has 1 value\(s\) outside \[0, 1\]", call, t, *cond)
    refused("unknown GEMM recipe 'fp23'.*Did you mean", module.clone, recipe="fp23")
    if name != "mlp":
        flash = dict(attention_implementation="flash")
        refused("is not one of 'auto', 'xla'", module.clone, **flash)
