import jax
import numpy as np
import pytest
from scipy import signal, stats

from tmdjax.metrics import (
    bootstrap_interval,
    conv3d_layers,
    frechet_label,
    position_entropy,
    random_conv3d,
    sliced_wasserstein,
    video_features,
)


def scipy_layer(videos, layer, stride):
    """Convolution of one video by scipy, then stride, bias and rectifier."""
    kernel, bias = np.float64(layer["kernel"]), np.float64(layer["bias"])
    channels = np.moveaxis(np.float64(videos), -1, 0)
    outputs = [
        bias[out]
        + sum(
            signal.correlate(channel, kernel[..., i, out], "same")
            for i, channel in enumerate(channels)
        )
        for out in range(kernel.shape[-1])
    ]
    # With an even length and stride 2, 'SAME' pads at the end alone: middles start
    # at place 1, else at 0.
    sizes = zip(videos.shape, stride)
    steps = (slice(int(s == 2 and n % 2 == 0), None, s) for n, s in sizes)
    x = np.stack(outputs, -1)[tuple(steps)]
    return np.where(x > 0, x, 0.2 * x)


def test_layers_are_scipys_convolutions():
    params = random_conv3d(3)
    biases = np.concatenate([layer["bias"] for layer in params.values()])
    assert -0.5 <= biases.min() < -0.4 and 0.4 < biases.max() <= 0.5
    video = np.random.default_rng(0).uniform(-1, 1, (1, 6, 8, 7, 3)).astype(np.float32)
    outputs = conv3d_layers(params, jax.numpy.asarray(video))
    x = video[0]
    for i, stride in enumerate([(1, 2, 2), (2, 2, 2), (2, 2, 2)]):
        x = scipy_layer(x, params[f"layer_{i}"], stride)
        assert outputs[i].shape == (1, *x.shape)
        np.testing.assert_allclose(outputs[i][0], x, atol=1e-5)
    means = np.concatenate([x.mean((1, 2, 3)) for x in outputs], 1)
    np.testing.assert_allclose(video_features(video, params), means, atol=1e-6)


def test_features_do_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    videos = rng.uniform(-1, 1, (20, 6, 12, 12, 3)).astype(np.float32)
    whole = video_features(videos)
    assert whole.shape == (20, 112) and whole.dtype == np.float32
    np.testing.assert_allclose(video_features(videos, batch_size=8), whole, atol=1e-6)
    other = video_features(videos, random_conv3d(1))
    assert np.abs(other - whole).max() > 0.1
    labels = {frechet_label("conv3d", random_conv3d(0)) for _ in range(2)}
    assert len(labels) == 1


def test_bad_input(refused):
    shape = r"shape \(2, 6, 12, 12\); give \[n, frame"
    refused(shape, video_features, np.zeros((2, 6, 12, 12)))
    refused("videos has 1 non-finite", video_features, np.full((1,) * 5, np.nan))
    grey, groups = jax.numpy.zeros((1, 2, 4, 4, 1)), np.zeros(3, int)
    refused(r"height, width, 3\]", conv3d_layers, random_conv3d(), grey)
    refused(r"positions have shape \(3,\)", position_entropy, np.zeros(3), groups)
    batch = "leading axis must be the batch, 2"
    refused(batch, position_entropy, np.zeros((3, 2)), groups[:2])
    cell = r"cell=0 is outside \(0, inf"
    refused(cell, position_entropy, np.zeros((3, 2)), groups, cell=0)
    refused(r"shapes \[\]; give one set", bootstrap_interval, np.mean)
    refused(r"shapes \[\(0,\)\]", bootstrap_interval, np.mean, [])
    few = "resamples=1 must be at least 2"
    refused(few, bootstrap_interval, np.mean, [1.0], resamples=1)
    refused(r"level=1 is outside", bootstrap_interval, np.mean, [1.0], level=1)
    refused("the statistic.*non-finite", bootstrap_interval, np.mean, [np.nan, 1.0])


def test_entropy_of_known_histograms():
    four = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(3, axis=0)
    one = np.tile([2.5, 7.0], (12, 1))
    assert position_entropy(four, np.zeros(12, int)) == pytest.approx(np.log(4))
    assert position_entropy(one, np.zeros(12, int)) == 0
    both, groups = np.concatenate([four, one]), np.repeat([5, 9], 12)
    assert position_entropy(both, groups) == pytest.approx(np.log(4) / 2)
    # Positions that are apart given the group, not over all groups.
    assert position_entropy(four, np.repeat([0, 1, 2, 3], 3)) == 0
    skewed = np.array([[0.0]] * 3 + [[1.0]])
    expected = stats.entropy([0.75, 0.25])
    assert position_entropy(skewed, np.zeros(4, int)) == pytest.approx(expected)


def test_entropy_bins_and_rows_without_a_position():
    # Middles of whole and half pixels, with noise below a quarter of a pixel.
    places = np.array([[0.5], [1.5], [2.5], [0.5], [1.5], [2.5]])
    noise = np.array([0.2, -0.2, 0.1, -0.2, 0.2, -0.1])[:, None]
    groups, third = np.zeros(6, int), pytest.approx(np.log(3))
    for shift in (0.0, 0.5):
        assert position_entropy(places + shift + noise, groups) == third
    assert position_entropy(places, groups, cell=10) == 0
    lost = np.where(np.arange(6)[:, None] < 3, places, np.nan)
    assert position_entropy(lost, groups) == third
    # A group in which nothing was found has no variety.
    mean = position_entropy(lost, groups + (np.arange(6) >= 3))
    assert mean == pytest.approx(np.log(3) / 2)


def test_bootstrap_of_a_mean_is_scipys():
    x = np.random.default_rng(4).exponential(size=300)
    ours = bootstrap_interval(np.mean, x, level=0.9, resamples=4000)
    theirs = stats.bootstrap(
        (x,), np.mean, confidence_level=0.9, method="percentile", n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose(ours[1:], theirs, atol=0.006)
    assert ours[0] == x.mean()


def test_bootstrap_of_a_distance_holds_its_value_and_its_spread():
    """Means of two sets: the distance of far sets has the spread of a difference."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(0, 1, (300, 1)), rng.normal(3, 2, (500, 1))

    def distance(a, b):
        return abs(a.mean() - b.mean())

    value, low, high = bootstrap_interval(distance, x, y, resamples=2000)
    assert low < value < high
    expected = 2 * 1.96 * np.sqrt(x.var() / 300 + y.var() / 500)
    assert high - low == pytest.approx(expected, rel=0.06)
    # Sets of one law: redrawn distances are larger, and the value stays inside.
    same = rng.normal(size=(2, 200, 3))
    value, low, high = bootstrap_interval(sliced_wasserstein, *same, resamples=50)
    assert low < value < high


def test_bootstrap_is_a_function_of_its_seed():
    x = np.arange(10.0)
    first = bootstrap_interval(np.mean, x, resamples=20, seed=1)
    assert first == bootstrap_interval(np.mean, x, resamples=20, seed=1)
    assert first != bootstrap_interval(np.mean, x, resamples=20, seed=2)
    assert bootstrap_interval(np.mean, np.ones(9)) == (1.0, 1.0, 1.0)
