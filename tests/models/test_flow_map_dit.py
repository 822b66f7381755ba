"""Split and two-time video DiTs (TMD sheet, section 6: 2, 7, 8, 9)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tmdjax import models
from tmdjax.core import trees
from tmdjax.models.flow_map_dit import GATE_SCALE, Fusion

SHARED = {
    "name": "video_dit",
    "patch_size": (1, 2, 2),
    "heads": 2,
    "head_dim": 12,
    "depth": 4,
    "mlp_width": 20,
    "text_width": 8,
    "frequency_dim": 16,
}
SPLIT = {"name": "split_dit", "shared": SHARED, "head_blocks": 1}


def video(seed=0, batch=2):
    return jax.random.normal(jax.random.key(seed), (batch, 2, 4, 4, 3))


TEXT = jax.random.normal(jax.random.key(9), (2, 3, 8))


def made(spec, perturb=0.1, **options):
    """A network all of whose parameters of the pretraining are random."""
    module = models.build({**spec, **options})
    t = jnp.full(2, 0.5)
    inputs = (
        (video(), t, TEXT) if spec["name"] == "split_dit" else (video(), t, t, TEXT)
    )
    params = models.init_params(module, jax.random.key(1), *inputs)
    keys = jax.random.key(2)
    params["shared"] = jax.tree.map(
        lambda leaf: leaf + perturb * jax.random.normal(keys, leaf.shape),
        params["shared"],
    )
    return module, models.functional(module), params


def answer(apply_fn, params, y, s, r, x=None, t=0.5):
    features = apply_fn(params, video() if x is None else x, t, TEXT, method="backbone")
    return apply_fn(params, y, s, r, features, method="head")


@pytest.mark.parametrize("fusion", ["gated", "concat"])
def test_a_pretrained_network_goes_in_and_comes_out_whole(fusion):
    module, _, params = made(SPLIT, fusion=fusion)
    alone = models.init_params(module.shared, jax.random.key(0), video(), 0.5, TEXT)
    assert jax.tree.structure(alone) == jax.tree.structure(params["shared"])
    assert models.spec_of(module)["shared"] == models.spec_of(module.shared)
    again = models.build(models.spec_of(module))
    assert models.spec_of(again) == models.spec_of(module)


def test_7_student_is_the_teacher_at_equal_times():
    module, apply_fn, params = made(SPLIT)
    t = jnp.full(2, 0.999)
    teacher = models.functional(module.shared)(params["shared"], video(), t, TEXT)
    found = answer(apply_fn, params, video(5), t, jnp.zeros(2), t=t)
    np.testing.assert_allclose(found, teacher, atol=1e-6)
    assert np.abs(teacher).max() > 0.1


def test_8_gate_of_zero_hides_the_state():
    _, apply_fn, params = made(SPLIT)
    one, other = (answer(apply_fn, params, video(i), 0.7, 0.2) for i in (5, 6))
    np.testing.assert_array_equal(one, other)

    def moved(gate):
        joint = {**params["joint"], "gate": gate}
        return answer(apply_fn, {**params, "joint": joint}, video(5), 0.7, 0.2)

    slope = jax.jvp(moved, (jnp.zeros(()),), (jnp.ones(()),))[1]
    assert np.abs(slope).max() > 1e-3
    assert np.abs(moved(0.5) - one).max() > 1e-3


def test_8_initial_gate_is_the_effective_one():
    """The parameter is a tenth of it; at 0 the feature goes on, at 1 the state."""
    m, other, q = (jax.random.normal(jax.random.key(i), (2, 5, 8)) for i in range(3))
    modulation = jax.random.normal(jax.random.key(3), (2, 6, 8))

    def fused(gate, m=m):
        module = Fusion("gated", mlp_width=12, initial_gate=gate, recipe="fp32")
        out, variables = module.init_with_output(jax.random.key(4), m, q, modulation)
        return out, variables["params"]["gate"]

    (at_zero, zero), (at_one, one), (between, parameter) = map(fused, (0.0, 1.0, 0.3))
    assert GATE_SCALE == 10 and zero == 0
    np.testing.assert_allclose([one, parameter], [0.1, 0.03], rtol=1e-6)
    np.testing.assert_array_equal(at_zero, m)
    np.testing.assert_allclose(at_one, fused(1.0, other)[0], atol=1e-5)
    np.testing.assert_allclose(between, 0.7 * m + 0.3 * at_one, atol=1e-5)
    params = made(SPLIT, initial_gate=0.3)[2]
    np.testing.assert_allclose(params["joint"]["gate"], 0.03, rtol=1e-6)


def test_8_concatenation_starts_near_the_feature():
    _, gated, gated_params = made(SPLIT)
    _, apply_fn, params = made(SPLIT, fusion="concat")
    params = {**params, "shared": gated_params["shared"]}
    near = answer(apply_fn, params, video(5), 0.7, 0.2)
    exact = answer(gated, gated_params, video(5), 0.7, 0.2)
    gap = np.abs(near - exact).mean() / np.abs(exact).mean()
    assert 0 < gap < 0.2


def reaches(fn, params, first_layer_zero):
    """How far the answer depends on r after five steps towards a target that does."""
    if first_layer_zero:
        zeros = jax.tree.map(jnp.zeros_like, params["interval"])
        params = {**params, "interval": zeros}
    r = jnp.array([0.0, 0.6])
    target = jnp.stack([jnp.ones((2, 4, 4, 3)), -jnp.ones((2, 4, 4, 3))])
    np.testing.assert_array_equal(
        fn(params, jnp.zeros(2)), fn(params, jnp.full(2, 0.6))
    )
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(interval, state):
        def loss(i):
            return jnp.mean((fn({**params, "interval": i}, r) - target) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(interval), state)
        return optax.apply_updates(interval, updates), state

    interval = params["interval"]
    state = optimizer.init(interval)
    for _ in range(5):
        interval, state = step(interval, state)
    params = {**params, "interval": interval}
    return np.abs(fn(params, jnp.zeros(2)) - fn(params, jnp.full(2, 0.6))).max()


@pytest.mark.parametrize("name", ["split_dit", "two_time_dit"])
def test_8_interval_embedding_learns_and_a_zero_first_layer_never_would(name):
    spec = SPLIT if name == "split_dit" else {"name": name, "shared": SHARED}
    _, apply_fn, params = made(spec)
    same = jnp.broadcast_to(video(3)[:1], video().shape)
    text = jnp.broadcast_to(TEXT[:1], TEXT.shape)

    def fn(params, r):
        if name == "two_time_dit":
            return apply_fn(params, same, 0.7, r, text)
        features = apply_fn(params, same, 0.5, text, method="backbone")
        return apply_fn(params, same, 0.7, r, features, method="head")

    assert reaches(fn, params, first_layer_zero=False) > 1e-3
    assert reaches(fn, params, first_layer_zero=True) < 1e-6


def test_9_gradient_reaches_backbone_head_and_every_block():
    _, apply_fn, params = made(SPLIT, initial_gate=0.3)
    grads = jax.grad(
        lambda p: jnp.sum(answer(apply_fn, p, video(5), 0.7, 0.2) ** 2)
    )(params)  # fmt: skip
    for name, leaf in trees.flatten(grads["shared"]["blocks"]).items():
        # a constant added to every key changes no softmax
        if not name.endswith("key/bias"):
            layers = np.abs(leaf).reshape(4, -1).max(1)
            assert (layers > 0).all(), name
    assert np.abs(grads["joint"]["gate"]) > 0


def test_two_times_equal_are_the_network_itself():
    module, apply_fn, params = made({"name": "two_time_dit", "shared": SHARED})
    alone = models.functional(module.shared)(params["shared"], video(), 0.4, TEXT)
    np.testing.assert_allclose(
        apply_fn(params, video(), 0.4, 0.4, TEXT), alone, atol=1e-6
    )


def test_features_are_videos_and_the_velocity_is_the_same():
    module = models.build(SHARED)
    apply_fn = models.functional(module)
    params = made(SPLIT)[2]["shared"]
    velocity, features = apply_fn(
        params, video(), 0.4, TEXT, method="velocity_and_features", taps=(3, 1)
    )
    np.testing.assert_allclose(
        velocity, apply_fn(params, video(), 0.4, TEXT), atol=1e-6
    )
    assert [f.shape for f in features] == [(2, 2, 4, 4, 6)] * 2
    h, c = apply_fn(params, video(), 0.4, TEXT, method="embed")
    h, _ = apply_fn(params, h, c, method="blocks", stop=2)
    # the first patch's features stand in its 2 x 2 pixels
    np.testing.assert_allclose(features[1][0, 0, :2, :2].ravel(), h[0, 0], atol=1e-5)


def test_discriminator():
    features = [jax.random.normal(jax.random.key(i), (3, 2, 8, 8, 4)) for i in (0, 1)]
    module = models.VideoDiscriminator(width=4)
    params = models.init_params(module, jax.random.key(0), features)
    logits = models.functional(module)(params, features)
    assert logits.shape == (3, 2) and np.isfinite(logits).all()
    moved = models.functional(module)(params, [features[0], 2 * features[0]])
    np.testing.assert_allclose(moved[:, 0], logits[:, 0], rtol=1e-5)  # a head a feature


def test_discriminator_features_that_are_just_large_enough():
    from tmdjax.models.discriminator import smallest_size

    least = smallest_size()
    module = models.VideoDiscriminator(width=4)

    def logits(size):
        return jax.eval_shape(
            lambda: module.init_with_output(
                jax.random.key(0), [jnp.zeros((1, *size, 2))]
            )[0]
        )

    assert logits(least).shape == (1, 1)
    for axis in range(3):
        if least[axis] > 1:
            small = [n - (i == axis) for i, n in enumerate(least)]
            with pytest.raises(ValueError, match="too small for four strided"):
                logits(small)


def test_default_taps(as_shipped):
    assert models.default_taps(30) == (15, 22, 29)
    assert models.default_taps(40) == (19, 29, 39)
    assert [models.default_taps(d) for d in (1, 2, 3)] == [(0,), (1,), (1, 2)]
    for depth in range(2, 13):
        taps = models.default_taps(depth)
        assert taps[0] > 0 and taps[-1] == depth - 1
        assert list(taps) == sorted(set(taps))
        assert len(taps) == min(3, depth - 1)
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        models.default_taps(0)


def test_groups_of_the_discriminator():
    """At most 32, a quarter of 32 channels or fewer, and always a divisor."""
    from tmdjax.models.discriminator import _groups

    found = {n: _groups(n) for n in (1, 4, 8, 11, 18, 32, 37, 44, 48, 64, 100, 256)}
    assert found == {
        1: 1, 4: 1, 8: 2, 11: 1, 18: 3, 32: 8, 37: 1, 44: 22, 48: 24, 64: 32,
        100: 25, 256: 32,
    }  # fmt: skip
    assert not any(n % _groups(n) for n in range(1, 300))


def test_discriminator_of_any_width():
    features = [jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 4))]
    module = models.VideoDiscriminator(width=11)
    params = models.init_params(module, jax.random.key(0), features)
    logits = models.functional(module)(params, features)
    assert logits.shape == (2, 1) and np.isfinite(logits).all()


@pytest.mark.parametrize(
    "spec, message",
    [
        ({**SPLIT, "head_blocks": 4}, "must lie in 1..L-1 = 1..3"),
        ({**SPLIT, "head_blocks": 0}, "head_blocks=0 must be at least 1"),
        ({**SPLIT, "fusion": "gate"}, "Did you mean 'gated'"),
        ({"name": "video_discriminator", "width": 0}, "width=0"),
    ],
)
def test_bad_specs(spec, message, as_shipped):
    with pytest.raises(ValueError, match=message):
        models.build(spec)


def test_bad_calls(as_shipped):
    with pytest.raises(ValueError, match="needs features"):
        models.VideoDiscriminator().init(jax.random.key(0), [])
    module = models.build({**SHARED, "patch_size": (1, 4, 5)})
    with pytest.raises(ValueError, match="cannot spread its features"):
        jax.eval_shape(
            lambda: module.init(
                jax.random.key(0), jnp.zeros((1, 1, 4, 5, 3)), 0.5, TEXT[:1],
                taps=(1,), method="velocity_and_features",
            )
        )  # fmt: skip


TWO_TIME = {"name": "two_time_dit", "shared": SHARED}


@functools.cache
def jump(name):
    """``(s, r) -> answer`` of a network of either kind."""
    _, apply_fn, params = made(SPLIT if name == "split_dit" else TWO_TIME)
    if name == "two_time_dit":
        return lambda s, r: apply_fn(params, video(), s, r, TEXT)
    features = apply_fn(params, video(), 0.5, TEXT, method="backbone")
    return lambda s, r: apply_fn(params, video(), s, r, features, method="head")


@pytest.mark.parametrize("name", ["split_dit", "two_time_dit"])
def test_times_of_a_jump(name, as_shipped):
    late = "s" if name == "split_dit" else "t"
    fn = jump(name)
    whole, zeros = np.array([999, 500]), jnp.zeros(2)
    for call in (fn, jax.jit(fn)):
        with pytest.raises(ValueError, match=f"{late} has dtype int"):
            call(whole, zeros)
        with pytest.raises(ValueError, match="r has dtype int"):
            call(jnp.ones(2), np.array([1, 0]))
    with pytest.raises(ValueError, match=rf"{late} has 2 .*outside \[0, 1\].* 999"):
        fn(jnp.array([999.0, 500.0]), zeros)
    with pytest.raises(ValueError, match=r"r has 1 .*outside \[0, 1\]"):
        fn(jnp.ones(2), -0.5)
    with pytest.raises(ValueError, match=r"1 row\(s\) have r > s"):
        fn(jnp.array([0.5, 0.7]), 0.6)
    with pytest.raises(ValueError, match=r"1 row\(s\) have r > s"):
        jax.jit(lambda: fn(0.2, 0.6))()  # numbers are known under jit
    with pytest.raises(ValueError, match="one time a sample"):
        fn(jnp.ones(3), 0.6)
    # equal in float32, though not in float64
    at = jnp.full(2, 0.7)
    np.testing.assert_array_equal(fn(at, 0.7), fn(0.7, at))


@pytest.mark.parametrize("jit", [False, True])
def test_times_of_a_backbone(jit, as_shipped):
    _, apply_fn, params = made(SPLIT)
    for method in ("backbone", None):

        def fn(t, method=method):
            return apply_fn(params, video(), t, TEXT, method=method)

        with pytest.raises(ValueError, match="t has dtype int"):
            (jax.jit(fn) if jit else fn)(np.array([999, 500]))


@functools.cache
def drawn(name, **options):
    """Module and parameters of a network whose shared part has other attributes."""
    shared = SHARED | options
    module = models.build(
        {
            "split_dit": {**SPLIT, "shared": shared},
            "two_time_dit": {**TWO_TIME, "shared": shared},
            "video_dit": shared,
        }[name]
    )
    times = (0.5, 0.5) if name == "two_time_dit" else (0.5,)
    params = models.init_params(module, jax.random.key(3), video(), *times, TEXT)
    return module, params


@pytest.mark.parametrize("name", ["split_dit", "two_time_dit"])
def test_student_from_teacher(name):
    # what does not change the function may differ
    teacher, weights = drawn("video_dit", recipe="bf16", remat=False)
    student, params = drawn(name, attention_implementation="xla")
    started = models.student_from_teacher(student, params, teacher, weights)
    assert jax.tree.structure(started) == jax.tree.structure(params)
    for part, leaves in started.items():
        same = weights if part == "shared" else params[part]
        jax.tree.map(np.testing.assert_array_equal, leaves, same)
    assert trees.content_hash(started["shared"]) != trees.content_hash(params["shared"])


@pytest.mark.parametrize("name", ["split_dit", "two_time_dit"])
@pytest.mark.parametrize(
    "options, message",
    [
        # the same width: every shape agrees
        (dict(heads=3, head_dim=8), "value.* heads: 2, 3; head_dim: 12, 8[.]"),
        (dict(time_scale=1.0), "time_scale: 1000.0, 1.0"),
        (dict(epsilon=1e-5), "epsilon: 1e-06, 1e-05"),
        (dict(depth=5), "depth: 4, 5"),
        (dict(patch_size=(2, 2, 1)), r"patch_size: \(1, 2, 2\), \(2, 2, 1\)"),
    ],
)
def test_student_of_another_teacher(name, options, message, as_shipped):
    student, params = drawn(name)
    teacher, weights = drawn("video_dit", **options)
    with pytest.raises(ValueError, match=f"networks of student and .*{message}"):
        models.student_from_teacher(student, params, teacher, weights)


def test_student_refuses_other_parameters(as_shipped):
    student, params = drawn("split_dit")
    teacher, weights = drawn("video_dit")
    start = functools.partial(models.student_from_teacher, student, params, teacher)
    other = models.init_params(
        teacher, jax.random.key(0), jnp.zeros((2, 2, 4, 4, 5)), 0.5, TEXT
    )
    with pytest.raises(
        ValueError,
        match=r"patch_embedding/kernel: \(12, 24\), \(20, 24\).*as many channels",
    ):
        start(other)
    less = {name: leaf for name, leaf in weights.items() if name != "final"}
    with pytest.raises(ValueError, match=r"final/projection/bias: \(12,\), None"):
        start(less)
    with pytest.raises(ValueError, match=r"blocks/.*; [0-9]+ more[.]"):
        start({"params": weights})
    with pytest.raises(ValueError, match="params holds .'interval', 'joint'.; a stud"):
        rest = {name: leaf for name, leaf in params.items() if name != "shared"}
        models.student_from_teacher(student, rest, teacher, weights)
    with pytest.raises(TypeError, match="student is of type VideoDiT; give a Split"):
        models.student_from_teacher(teacher, weights, teacher, weights)
    with pytest.raises(TypeError, match="teacher is of type SplitDiT; give a VideoDiT"):
        models.student_from_teacher(student, params, student, params)


@pytest.mark.parametrize("method", ["backbone", "head"])
def test_fused_attention_lowers_for_cuda(method, traceable_cudnn):
    # jax 0.10 takes even lengths alone in the gradient of fused attention
    text = jnp.pad(TEXT, ((0, 0), (0, 1), (0, 0)))
    shared = SHARED | {"head_dim": 16, "recipe": "bf16"}
    fused = shared | {"attention_implementation": "cudnn"}
    apply_fn = models.functional(models.build({**SPLIT, "shared": fused}))
    plain = models.build({**SPLIT, "shared": shared})
    params = jax.eval_shape(
        lambda: models.init_params(plain, jax.random.key(0), video(), 0.5, text)
    )
    features = jax.eval_shape(
        lambda p: models.functional(plain)(p, video(), 0.5, text, method="backbone"),
        params,
    )

    def loss(params, x, s, r, features):
        if method == "backbone":
            out = apply_fn(params, x, s, text, method=method)["hidden"]
        else:
            out = apply_fn(params, x, s, r, features, method=method)
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    exported = jax.export.export(
        jax.jit(jax.value_and_grad(loss)),
        platforms=["cuda"],
        disabled_checks=traceable_cudnn,
    )(params, video(), jnp.ones(2), jnp.zeros(2), features)
    module = exported.mlir_module()
    assert "__cudnn$fmhaSoftmax" in module and "fmhaSoftmaxBackward" in module
