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
from model_helpers import both_parts, close, jitted, shapes_of, small_decoder
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models, quant
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
SMALL = dict(heads=2, head_dim=8, depth=3, mlp_width=24)
VIDEO = models.VideoDiT(**SMALL, text_width=6, frequency_dim=8)


@dataclasses.dataclass(frozen=True)
class Network:
    module: Any
    inputs: tuple  # arrays and trees of them, samples first
    times: tuple[int, ...] = (1,)  # inputs that are times: one a sample, or one for all
    zero: bool = False  # it starts as the velocity zero
    fn: Callable = models.functional
    example: tuple | None = None  # what its parameters are drawn for
    eps: float = 1e-2  # of the finite difference


NETWORKS = {
    "mlp": Network(
        models.VelocityMLP(hidden=16, depth=2, num_classes=4),
        (draw(BATCH, 2), T, CLASSES),
    ),
    "unet": Network(
        models.UNet(8, (1, 2), blocks=1, attention_levels=(1,), heads=2, num_classes=4),
        (IMAGES, T, CLASSES), zero=True,
    ),
    "dit": Network(models.DiT(**TINY), (IMAGES, T), zero=True),
    "class_dit": Network(
        models.DiT(**TINY, num_classes=4), (IMAGES, T, CLASSES), zero=True
    ),
    "token_dit": Network(
        models.DiT(**TINY, token_width=6),
        (IMAGES, T, {"tokens": draw(BATCH, 3, 6), "mask": SOME}), zero=True,
    ),
    "text_dit": Network(
        models.TextDiT(
            vocabulary=9, max_length=3, text_width=8, text_depth=2, text_heads=2,
            **TINY | {"depth": 2},
        ),
        (IMAGES, T, {"ids": WORDS[::-1], "mask": SOME | np.eye(3, dtype=bool)}),
        zero=True,
    ),
    "video_dit": Network(VIDEO, (VIDEOS, T, TEXT), zero=True),
    "split_dit": Network(
        models.SplitDiT(shared=VIDEO, head_blocks=1, initial_gate=0.3),
        (VIDEOS, T, VIDEOS[::-1], T, R * T, TEXT), (1, 3, 4), fn=both_parts,
        example=(VIDEOS, T, TEXT),
    ),
    "two_time_dit": Network(
        models.TwoTimeDiT(shared=VIDEO), (VIDEOS, T, R * T, TEXT), (1, 2), zero=True
    ),
    "decoder": Network(
        models.Decoder(small_decoder(vocab_size=9, num_layers=2, qk_norm=True)),
        (WORDS,), (), eps=1e-3,
    ),
    "classifier": Network(
        models.Classifier(num_classes=3, width=4, feature_dim=5),
        (draw(BATCH, 8, 8, 2),), (),
    ),
    "discriminator": Network(
        models.VideoDiscriminator(width=4),
        ([draw(BATCH, 2, 8, 8, 4, seed=seed) for seed in (0, 1)],), (), eps=2e-3,
    ),
    "control_velocity": Network(
        models.ControlVelocity(2, (16, 8), out_scale=1.0),
        (draw(BATCH, 2), T, draw(BATCH, 4, seed=1)), (),
    ),
    "fine_tuned_velocity": Network(
        models.FineTunedVelocity(
            models.ControlVelocity(
                2, (8, 8, 8), out_scale=1.0, residual=True, time_hidden=5,
                step_size=True,
            ),
            time=0.3,
        ),
        (draw(BATCH, 2), T, draw(BATCH, 4, seed=1), R), (),
    ),
    "control_mlp": Network(models.ControlMLP(3, (8, 6), "tanh"), (draw(BATCH, 4),), ()),
}  # fmt: skip
UNET = pytest.param("unet", marks=pytest.mark.slow)  # where it is dear


def every(*names, but=()):
    """The networks of these names, or all."""
    chosen = [name for name in names or NETWORKS if name not in but]
    return pytest.mark.parametrize("name", chosen)


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
        batched = list(inputs)
        for i, value in enumerate(inputs):
            if i not in network.times:
                batched[i] = jax.tree.map(lambda leaf: leaf[None], value)
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

    def of(params, target):
        if network.zero:  # one program for a target of any kind
            target = np.broadcast_to(np.float32(target), network.inputs[0].shape)
        return loss(params, target, network.inputs)

    return of


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
    given, _ = answers(name)(params, (x, t, cond))
    dropped = jitted(NETWORKS[name].module)(params, x, t, None)
    given, dropped = np.asarray(given), np.asarray(dropped)
    close(given[2], dropped[2], atol=2e-6)
    assert np.abs(given[0] - dropped[0]).max() > 1e-3


@every("unet", "class_dit", "token_dit")
def test_all_leaves_learn_within_three_steps(name):
    """The output layer first, what lies behind its zeros after it."""
    target = NETWORKS[name].inputs[0][..., ::-1]
    params, found = initial(name), []
    for _ in range(4):
        _, gradient = value_and_gradient(name)(params, target)
        params, gradient = jax.tree.map(np.asarray, (params, gradient))
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
        found.append(trees.flatten(gradient))
    first = {path.rpartition("/")[0] for path, g in found[0].items() if np.any(g)}
    assert first == {"output" if name == "unet" else "final/projection"}
    assert all(np.isfinite(g).all() for g in found[-1].values())
    # A key's bias shifts all scores of a query alike: softmax does not see it.
    silent = [path for path, g in found[-1].items() if not np.any(g)]
    assert not [path for path in silent if not path.endswith("key/bias")]


@every(but=("dit", "class_dit"))
def test_gradient_is_the_slope_and_reaches_every_leaf(name, stir, check_slope):
    params = stir(initial(name))
    fn = functools.partial(value_and_gradient(name), target=1.0)
    silent = check_slope(fn, params, eps=NETWORKS[name].eps)
    assert not [path for path in silent if not path.endswith("key/bias")]
    if "blocks" in params.get("shared", params):  # every layer of a stack
        _, gradient = value_and_gradient(name)(params, 1.0)
        stack = gradient.get("shared", gradient)["blocks"]
        for path, leaf in trees.flatten(jax.tree.map(np.asarray, stack)).items():
            layers = np.abs(leaf).reshape(len(leaf), -1).max(1)
            assert path.endswith("key/bias") or (layers > 0).all(), path


TEXT_TOO = pytest.param("text_dit", marks=pytest.mark.slow)  # the stack of video_dit


@every(UNET, TEXT_TOO, "video_dit")
def test_remat_changes_neither_value_nor_gradient(name, stir):
    params = stir(initial(name))
    value, gradient = value_and_gradient(name)(params, 0.0)
    plain_value, plain = value_and_gradient(name, remat=False)(params, 0.0)
    assert_allclose(value, plain_value, rtol=1e-5)
    flat = trees.flatten(jax.tree.map(np.asarray, plain))
    for path, leaf in trees.flatten(gradient).items():
        atol = 1e-5 * np.abs(flat[path]).max() + 1e-7
        assert_allclose(leaf, flat[path], rtol=1e-4, atol=atol, err_msg=path)


OWN = quant.rounding_recipe("own", jnp.float16)
"""A recipe that nothing else knows."""
SIXTEEN_BITS = [
    ("mlp", "bf16"), ("text_dit", "bf16"), ("video_dit", "bf16"),
    ("discriminator", "bf16"), ("control_velocity", "bf16"),
    ("dit", OWN), ("decoder", OWN),
    pytest.param("unet", OWN, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("name", "recipe"), SIXTEEN_BITS)
def test_sixteen_bits_stay_close(name, recipe, stir):
    network, params = NETWORKS[name], stir(initial(name), 0.1)
    exact, _ = answers(name)(params, network.inputs)
    narrow = models.with_recipe(network.module, recipe)
    rough = jax.jit(network.fn(narrow))(params, *network.inputs)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    unit = {"bf16": 2.0**-9}.get(recipe, 2.0**-12)
    assert unit / 20 < error < 25 * unit


@every()
def test_every_product_is_in_the_dtype_of_the_recipe(name, equation_list):
    """None is cast by hand; only what is documented to be in float32 is."""
    network, params = NETWORKS[name], initial(name)
    module = models.with_recipe(network.module, OWN)
    assert module != network.module
    assert models.with_recipe(module, "fp32") == network.module
    exact = {"classifier": 3, "video_dit": 3, "two_time_dit": 9, "split_dit": 12}
    wide = 0
    for equation in equation_list(network.fn(module), params, *network.inputs):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            operands = {v.aval.dtype for v in equation.invars}
            wide += operands == {jnp.dtype(jnp.float32)}
            assert len(operands) == 1
    assert wide == exact.get(name, 0)


@every("unet", "text_dit", "video_dit")
def test_training_gradient_lowers_for_cuda_and_tpu(name):
    network = NETWORKS[name]
    fn = network.fn(network.module.clone(recipe="bf16", attention_implementation="xla"))

    def loss(params, *inputs):
        v = fn(params, *inputs)
        return jnp.square(v).mean(), v

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    inputs = jax.tree.map(jnp.asarray, network.inputs)
    export = jax.export.export(step, platforms=["cuda", "tpu"])
    exported = export(initial(name), *inputs)
    assert exported.platforms == ("cuda", "tpu")


@every("token_dit", "text_dit", "video_dit")
def test_forty_layers_are_one_program(name, equations):
    network = NETWORKS[name]
    counts = []
    for depth in (2, 40):
        module = network.module.clone(depth=depth)
        if name == "text_dit":
            module = module.clone(text_depth=depth)
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

        starts = ("h", 0), ("first", 1)
        return [jax.grad(loss)(params, found[h], i)["blocks"] for h, i in starts]

    whole, part = map(trees.flatten, jax.tree.map(np.asarray, gradients(params)))
    for path, leaf in part.items():
        assert_array_equal(leaf[:1], 0.0)
        atol = 1e-4 * np.abs(whole[path]).max() + 1e-6
        assert_allclose(leaf[1:], whole[path][1:], rtol=1e-3, atol=atol)


@STACKS
def test_hidden_state_is_narrow_under_the_bfloat16_recipe(name):
    """The times are not."""
    embed = jitted(NETWORKS[name].module.clone(recipe="bf16"), "embed")
    h, c = jax.eval_shape(embed, initial(name), *NETWORKS[name].inputs)
    text = c["tokens" if name == "token_dit" else "text"]
    assert h.dtype == text.dtype == jnp.bfloat16
    assert c["modulation"].dtype == jnp.float32


def test_blocks_of_a_dit_start_as_the_identity():
    found = stack("token_dit")[0](initial("token_dit"))
    assert np.abs(found["h"]).max() > 0.05
    assert_array_equal(found["whole"], found["h"])


@every(*(name for name, network in NETWORKS.items() if network.times == (1,)))
def test_bad_times(name, refused):
    module, (x, _, *cond) = NETWORKS[name].module, NETWORKS[name].inputs
    call = functools.partial(models.functional(module), initial(name), x)
    refused("t has shape .* one time a sample", call, jnp.zeros(2), *cond)
    for t in (1.5, -0.1, jnp.nan, jnp.array([0.0, 1.0, 999.0])):
        refused(r"t has 1 value\(s\) outside \[0, 1\]", call, t, *cond)


@every(but=("control_velocity", "control_mlp"))
def test_bad_attributes(name, refused):
    """Sizes are whole and positive; recipes and implementations have known names."""
    module = NETWORKS[name].module
    clone, fields = module.clone, dataclasses.fields(module)
    for size in [field.name for field in fields if field.type in (int, int | None)]:
        low = -1 if size in ("text_depth", "scalars") else 0
        refused(f"{size}={low} must be at least {low + 1}", clone, **{size: low})
        refused(f"{size}=2.0 is of type float", clone, error=TypeError, **{size: 2.0})
    names = {field.name for field in fields}
    if "recipe" in names:
        refused("unknown GEMM recipe 'fp23'.*Did you mean", clone, recipe="fp23")
    if "attention_implementation" in names:
        other = dict(attention_implementation="flash")
        refused("is not one of 'auto', 'xla'", clone, **other)


@every("mlp", "unet", "class_dit")
def test_bad_classes(name, refused):
    module, (x, t, classes) = NETWORKS[name].module, NETWORKS[name].inputs
    call = functools.partial(models.functional(module), initial(name), x, t)
    refused(r"=5 is outside \[0, 4\]", call, classes + 1)
    refused(r"classes\) must be an integer array", call, classes * 1.0, error=TypeError)
    plain = module.clone(num_classes=None)
    params = shapes_of(plain, x, t)
    given = (models.functional(plain), params, x, t, classes)
    refused("built unconditional but got cond", jax.eval_shape, *given)
