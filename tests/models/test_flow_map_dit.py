"""Split and two-time video DiTs (TMD sheet, section 6: 2, 7, 8).

9, that gradients reach every block, stands in test_contract.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_helpers import both_parts, close, draw, equal, jitted, shapes_of, stirred
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models
from tmdjax.core import trees
from tmdjax.models.videos.discriminator import smallest_size
from tmdjax.models.videos.flow_maps import GATE_SCALE, Fusion
from tmdjax.quant import as_recipe

SIZES = dict(patch_size=(1, 2, 2), heads=2, head_dim=12, depth=4)
WIDTHS = dict(mlp_width=20, text_width=8, frequency_dim=16)
SHARED = {"name": "video_dit"} | SIZES | WIDTHS
SPLIT = {"name": "split_dit", "shared": SHARED, "head_blocks": 1}
TWO_TIME = {"name": "two_time_dit", "shared": SHARED}
SPECS = {"split_dit": SPLIT, "two_time_dit": TWO_TIME, "video_dit": SHARED}


def video(seed=0):
    return draw(2, 2, 4, 4, 3, seed=seed)


TEXT = draw(2, 3, 8, seed=9)
ALONE, JUMP = (video(), 0.5, TEXT), (video(), 0.5, 0.5, TEXT)
INPUTS = {"split_dit": ALONE, "two_time_dit": JUMP, "video_dit": ALONE}
STUDENTS = pytest.mark.parametrize("name", ["split_dit", "two_time_dit"])


@functools.cache
def made(name="split_dit", **options):
    """A network all of whose parameters of the pretraining are random, compiled."""
    module = models.build({**SPECS[name], **options})
    params = models.init_params(module, jax.random.key(1), *INPUTS[name])
    params["shared"] = stirred(params["shared"], 0.1, seed=2)
    return module, params


@functools.cache
def compiled(module):
    return jax.jit(both_parts(module))


def answer(module, params, y, s, r, t=0.5):
    """The head's answer to y, on features of another video at t."""
    t, s, r = (jnp.full(2, time, jnp.float32) for time in (t, s, r))
    return np.asarray(compiled(module)(params, video(), t, y, s, r, TEXT))


@pytest.mark.parametrize("fusion", ["gated", "concat"])
def test_a_pretrained_network_goes_in_and_comes_out_whole(fusion):
    module = models.build(SPLIT | {"fusion": fusion})
    params = shapes_of(module, *INPUTS["split_dit"])
    alone = shapes_of(module.shared, *INPUTS["video_dit"])
    assert jax.tree.structure(alone) == jax.tree.structure(params["shared"])
    assert models.spec_of(module)["shared"] == models.spec_of(module.shared)
    again = models.build(models.spec_of(module))
    assert models.spec_of(again) == models.spec_of(module)


def test_7_student_is_the_teacher_at_equal_times():
    module, params = made()
    alone = jitted(module.shared)
    teacher = alone(params["shared"], video(), np.full(2, 0.999, np.float32), TEXT)
    found = answer(module, params, video(5), 0.999, 0.0, t=0.999)
    assert_allclose(found, teacher, atol=1e-6)
    assert np.abs(teacher).max() > 0.1


def test_8_gate_of_zero_hides_the_state():
    module, params = made()
    one, other = (answer(module, params, video(i), 0.7, 0.2) for i in (5, 6))
    assert_array_equal(one, other)

    @jax.jit
    def moved(gate):
        times = (jnp.full(2, time) for time in (0.7, 0.2))
        opened = params | {"joint": params["joint"] | {"gate": gate}}
        inputs = video(), jnp.full(2, 0.5), video(5), *times, TEXT
        return compiled(module)(opened, *inputs)

    half, slope = jax.jvp(moved, (jnp.float32(0.5),), (jnp.ones(()),))
    assert np.abs(slope).max() > 1e-3
    assert np.abs(half - one).max() > 1e-3
    _, at_zero = jax.jvp(moved, (jnp.zeros(()),), (jnp.ones(()),))
    assert np.abs(at_zero).max() > 1e-3


def test_8_initial_gate_is_the_effective_one():
    """The parameter is a tenth of it; at 0 the feature goes on, at 1 the state."""
    m, other, q = (jax.random.normal(jax.random.key(i), (2, 5, 8)) for i in range(3))
    modulation = jax.random.normal(jax.random.key(3), (2, 6, 8))

    def fused(gate, m=m):
        module = Fusion(
            "gated", mlp_width=12, initial_gate=gate, recipe=as_recipe("fp32")
        )
        out, variables = module.init_with_output(jax.random.key(4), m, q, modulation)
        return out, variables["params"]["gate"]

    @jax.jit
    def all_of_them():
        return [*map(fused, (0.0, 1.0, 0.3)), fused(1.0, other)]

    starts = all_of_them()
    (at_zero, zero), (at_one, one), (between, parameter), (elsewhere, _) = starts
    assert GATE_SCALE == 10 and zero == 0
    assert_allclose([one, parameter], [0.1, 0.03], rtol=1e-6)
    assert_array_equal(at_zero, m)
    assert_allclose(at_one, elsewhere, atol=1e-5)
    assert_allclose(between, 0.7 * m + 0.3 * at_one, atol=1e-5)


def test_8_concatenation_starts_near_the_feature():
    gated, gated_params = made()
    module, params = made(fusion="concat")
    params = {**params, "shared": gated_params["shared"]}
    near = answer(module, params, video(5), 0.7, 0.2)
    exact = answer(gated, gated_params, video(5), 0.7, 0.2)
    gap = np.abs(near - exact).mean() / np.abs(exact).mean()
    assert 0 < gap < 0.2


@STUDENTS
def test_8_interval_embedding_learns_and_a_zero_first_layer_never_would(name):
    module, params = made(name)
    apply_fn = models.functional(module)
    same = jnp.broadcast_to(video(3)[:1], video().shape)
    text = jnp.broadcast_to(TEXT[:1], TEXT.shape)

    @jax.jit
    def fn(params, r):
        if name == "two_time_dit":
            return apply_fn(params, same, 0.7, r, text)
        features = apply_fn(params, same, 0.5, text, method="backbone")
        return apply_fn(params, same, 0.7, r, features, method="head")

    @jax.jit
    def step(params, state):
        r = jnp.array([0.0, 0.6])
        target = jnp.stack([jnp.ones((2, 4, 4, 3)), -jnp.ones((2, 4, 4, 3))])

        def loss(interval):
            return jnp.mean((fn({**params, "interval": interval}, r) - target) ** 2)

        slope = jax.grad(loss)(params["interval"])
        updates, state = optax.adam(1e-2).update(slope, state)
        interval = optax.apply_updates(params["interval"], updates)
        return {**params, "interval": interval}, state

    zero, late = np.zeros(2, np.float32), np.full(2, 0.6, np.float32)
    reaches = []  # how far the answer depends on r after five steps
    drawn = params["interval"]
    for interval in (drawn, jax.tree.map(jnp.zeros_like, drawn)):
        moved, state = params | {"interval": interval}, optax.adam(1e-2).init(interval)
        assert_array_equal(fn(moved, zero), fn(moved, late))
        for _ in range(5):
            moved, state = step(moved, state)
        reaches.append(np.abs(fn(moved, zero) - fn(moved, late)).max())
    assert reaches[0] > 1e-3 and reaches[1] < 1e-6


def test_two_times_equal_are_the_network_itself():
    module, params = made("two_time_dit")
    alone = jitted(module.shared)
    same = alone(params["shared"], video(), 0.4, TEXT)
    close(jitted(module)(params, video(), 0.4, 0.4, TEXT), same, atol=1e-6)


def test_features_are_videos_and_the_velocity_is_the_same():
    module = models.build(SHARED)
    run = functools.partial(models.functional(module), made()[1]["shared"])

    @jax.jit
    def ways():
        features = run(video(), 0.4, TEXT, method="velocity_and_features", taps=(3, 1))
        h, c = run(video(), 0.4, TEXT, method="embed")
        return features, run(video(), 0.4, TEXT), run(h, c, method="blocks", stop=2)[0]

    (velocity, features), alone, h = jax.tree.map(np.asarray, ways())
    assert_allclose(velocity, alone, atol=1e-6)
    assert [f.shape for f in features] == [(2, 2, 4, 4, 6)] * 2
    # the first patch's features stand in its 2 x 2 pixels
    assert_allclose(features[1][0, 0, :2, :2].ravel(), h[0, 0], atol=1e-5)


@pytest.mark.parametrize("width", [4, 11])
def test_discriminator(width):
    features = [draw(3, 2, 8, 8, 4, seed=seed) for seed in (0, 1)]
    module = models.VideoDiscriminator(width=width)
    params = models.init_params(module, jax.random.key(0), features)
    apply_fn = jitted(module)
    logits = apply_fn(params, features)
    assert logits.shape == (3, 2) and np.isfinite(logits).all()
    moved = apply_fn(params, [features[0], 2 * features[0]])
    assert_allclose(moved[:, 0], logits[:, 0], rtol=1e-5)  # a head a feature


def test_norms_of_the_discriminator_are_torchs(refused):
    """Their epsilon of 1e-5 shows where features hardly vary."""
    module, x = models.VideoDiscriminator(width=4), [2e-3 * draw(2, 2, 8, 8, 4)]
    params = models.init_params(module, jax.random.key(0), x)
    run = functools.partial(module.apply, capture_intermediates=True)
    _, seen = jax.jit(run)({"params": params}, x)
    head = seen["intermediates"]["head_0"]
    before, after = (
        np.asarray(head[name]["__call__"][0], np.float64)
        for name in ("convolution_0", "norm_0")
    )
    axes = (1, 2, 3, 4)  # of 4 channels one group
    deviation = before - before.mean(axes, keepdims=True)
    variance = np.square(deviation).mean(axes, keepdims=True)
    assert variance.max() < 1e-4
    assert_allclose(after, deviation / np.sqrt(variance + 1e-5), rtol=1e-3, atol=1e-5)
    refused("epsilon=0.0", models.VideoDiscriminator, epsilon=0.0)


def test_discriminator_features_that_are_just_large_enough(refused):
    least, module = smallest_size(), models.VideoDiscriminator(width=4)

    def logits(size):
        x = [jnp.zeros((1, *size, 2))]
        return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x)[0])

    assert logits(least).shape == (1, 1)
    for axis in range(3):
        if least[axis] > 1:
            small = [n - (i == axis) for i, n in enumerate(least)]
            refused("too small for four strided", logits, small)
    refused("needs features", module.init, jax.random.key(0), [])


def test_default_taps(refused):
    assert models.default_taps(30) == (15, 22, 29)
    assert models.default_taps(40) == (19, 29, 39)
    assert [models.default_taps(d) for d in (1, 2, 3)] == [(0,), (1,), (1, 2)]
    for depth in range(2, 13):
        taps = models.default_taps(depth)
        assert taps[0] > 0 and taps[-1] == depth - 1
        assert list(taps) == sorted(set(taps))
        assert len(taps) == min(3, depth - 1)
    refused("depth=0 must be at least 1", models.default_taps, 0)


def test_bad_specs(refused):
    build = models.build
    refused("must lie in 1..L-1 = 1..3", build, SPLIT | {"head_blocks": 4})
    refused("Did you mean 'gated'", build, SPLIT | {"fusion": "gate"})
    module, x = build(SHARED | {"patch_size": (1, 4, 5)}), jnp.zeros((1, 1, 4, 5, 3))
    fn = functools.partial(module.init, method="velocity_and_features", taps=(1,))
    spread = functools.partial(jax.eval_shape, fn, jax.random.key(0))
    refused("cannot spread its features", spread, x, 0.5, TEXT[:1])


@functools.cache
def jump(name):
    """``(s, r) -> answer`` of a network of either kind."""
    module, params = made(name)
    apply_fn = models.functional(module)
    if name == "two_time_dit":
        return lambda s, r: apply_fn(params, video(), s, r, TEXT)
    features = jitted(module, "backbone")(params, video(), 0.5, TEXT)
    return lambda s, r: apply_fn(params, video(), s, r, features, method="head")


@STUDENTS
def test_times_of_a_jump(name, refused):
    late = "s" if name == "split_dit" else "t"
    fn = jump(name)
    whole, zeros = np.array([999, 500]), jnp.zeros(2)
    for call in (fn, jax.jit(fn)):
        refused(f"{late} has dtype int", call, whole, zeros)
        refused("r has dtype int", call, jnp.ones(2), np.array([1, 0]))
    refused(rf"{late} has 2 .*outside \[0, 1\].* 999", fn, whole * 1.0, zeros)
    refused(r"r has 1 .*outside \[0, 1\]", fn, jnp.ones(2), -0.5)
    refused(r"1 row\(s\) have r > s", fn, jnp.array([0.5, 0.7]), 0.6)
    # numbers are known under jit
    refused(r"1 row\(s\) have r > s", jax.jit(lambda: fn(0.2, 0.6)))
    refused("one time a sample", fn, jnp.ones(3), 0.6)
    # equal in float32, though not in float64
    at = jnp.full(2, 0.7)
    assert_array_equal(*jax.jit(lambda: (fn(at, 0.7), fn(0.7, at)))())


def test_times_of_a_backbone(refused):
    module, params = made()
    apply_fn = models.functional(module)
    for method in ("backbone", None):

        def fn(t, method=method):
            return apply_fn(params, video(), t, TEXT, method=method)

        for call in (fn, jax.jit(fn)):
            refused("t has dtype int", call, np.array([999, 500]))


@functools.cache
def drawn(name, **options):
    """Module and parameters of a network whose shared part has other attributes."""
    shared = SHARED | options
    spec = shared if name == "video_dit" else SPECS[name] | {"shared": shared}
    module = models.build(spec)
    shapes = shapes_of(module, *INPUTS[name])
    rng = np.random.default_rng(len(name))
    return module, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)


@STUDENTS
def test_student_from_teacher(name):
    # what does not change the function may differ
    teacher, weights = drawn("video_dit", recipe="bf16", remat=False)
    student, params = drawn(name, attention_implementation="xla")
    started = models.student_from_teacher(student, params, teacher, weights)
    assert jax.tree.structure(started) == jax.tree.structure(params)
    for part, leaves in started.items():
        same = weights if part == "shared" else params[part]
        equal(leaves, same)
    assert trees.content_hash(started["shared"]) != trees.content_hash(params["shared"])


@STUDENTS
def test_student_of_another_teacher(name, refused):
    student, params = drawn(name)
    for options, message in (
        # the same width: every shape agrees
        (dict(heads=3, head_dim=8), "value.* heads: 2, 3; head_dim: 12, 8[.]"),
        (dict(time_scale=1.0), "time_scale: 1000.0, 1.0"),
        (dict(epsilon=1e-5), "epsilon: 1e-06, 1e-05"),
        (dict(depth=5), "depth: 4, 5"),
        (dict(patch_size=(2, 2, 1)), r"patch_size: \(1, 2, 2\), \(2, 2, 1\)"),
    ):
        other = drawn("video_dit", **options)
        message = f"networks of student and .*{message}"
        refused(message, models.student_from_teacher, student, params, *other)


def test_student_refuses_other_parameters(refused):
    student, params = drawn("split_dit")
    teacher, weights = drawn("video_dit")
    begin = models.student_from_teacher
    start = functools.partial(begin, student, params, teacher)
    other = shapes_of(teacher, jnp.zeros((2, 2, 4, 4, 5)), 0.5, TEXT)
    message = r"patch_embedding/kernel: \(12, 24\), \(20, 24\).*as many channels"
    refused(message, start, other)
    less = {name: leaf for name, leaf in weights.items() if name != "final"}
    refused(r"final/projection/bias: \(12,\), None", start, less)
    refused(r"blocks/.*; and [0-9]+ more[.]", start, {"params": weights})
    rest = {name: leaf for name, leaf in params.items() if name != "shared"}
    given, taught = (student, params), (teacher, weights)
    refused("params holds .'interval', 'joint'.; a stud", begin, student, rest, *taught)
    refused("student is of type VideoDiT", begin, *taught, *taught, error=TypeError)
    refused("teacher is of type SplitDiT; give", begin, *given, *given, error=TypeError)


@pytest.mark.parametrize("method", ["backbone", "head"])
def test_fused_attention_lowers_for_cuda(method, traceable_cudnn):
    # jax 0.10 takes even lengths alone in the gradient of fused attention
    text = jnp.pad(TEXT, ((0, 0), (0, 1), (0, 0)))
    shared = SHARED | {"head_dim": 16, "recipe": "bf16"}
    fused = shared | {"attention_implementation": "cudnn"}
    apply_fn = models.functional(models.build({**SPLIT, "shared": fused}))
    plain = models.build({**SPLIT, "shared": shared})
    params = shapes_of(plain, video(), 0.5, text)
    backbone = jitted(plain, "backbone")
    features = jax.eval_shape(backbone, params, video(), 0.5, text)

    def loss(params, x, s, r, features):
        if method == "backbone":
            out = apply_fn(params, x, s, text, method=method)["hidden"]
        else:
            out = apply_fn(params, x, s, r, features, method=method)
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    step = jax.jit(jax.value_and_grad(loss))
    checks = dict(platforms=["cuda"], disabled_checks=traceable_cudnn)
    export = jax.export.export(step, **checks)
    exported = export(params, video(), jnp.ones(2), jnp.zeros(2), features)
    module = exported.mlir_module()
    assert "__cudnn$fmhaSoftmax" in module and "fmhaSoftmaxBackward" in module
