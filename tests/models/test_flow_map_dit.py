"""Split and two-time video DiTs (TMD sheet, section 6: 2, 7, 8, 9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tmdjax import models
from tmdjax.core import trees

pytestmark = pytest.mark.usefixtures("quick_compiles")

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


def test_default_taps():
    assert models.default_taps(30) == (15, 22, 29)
    assert models.default_taps(2) == (1,)


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
