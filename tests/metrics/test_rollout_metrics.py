"""Correlation times, spectra, growth and image quality, against closed forms and peers."""

import numpy as np
import pytest

from tmdjax import metrics

RNG = np.random.default_rng(0)
FIELD = RNG.standard_normal((5, 3, 16, 2)).astype(np.float32)
OTHER = RNG.standard_normal(FIELD.shape).astype(np.float32)


def test_correlation_is_numpys_and_knows_no_scale_11():
    r = metrics.pearson_correlation(FIELD, OTHER)
    want = [
        [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x, y)]
        for x, y in zip(FIELD, OTHER)
    ]
    np.testing.assert_allclose(r, want, atol=1e-7)
    np.testing.assert_allclose(metrics.pearson_correlation(FIELD, FIELD), 1)
    np.testing.assert_allclose(metrics.pearson_correlation(FIELD, -FIELD), -1)
    scaled = metrics.pearson_correlation(3.5 * FIELD + 7, OTHER)
    np.testing.assert_allclose(scaled, r, atol=1e-6)
    whole = metrics.pearson_correlation(FIELD, OTHER, leading=0)
    np.testing.assert_allclose(whole, np.corrcoef(FIELD.ravel(), OTHER.ravel())[0, 1])


def test_constant_and_broken_frames_correlate_with_nothing_11():
    field = FIELD.copy()
    field[0, 0] = 0.1
    field[0, 1] = 1e6
    field[1, 2, 3] = np.nan
    field[2, 1, 0] = np.inf
    r = metrics.pearson_correlation(field, field)
    expected = np.ones(r.shape)
    expected[[0, 0, 1, 2], [0, 1, 2, 1]] = 0
    np.testing.assert_allclose(r, expected)


def test_pairs_of_an_ensemble_are_averaged_17():
    ensemble = np.stack([FIELD, OTHER, FIELD + OTHER, FIELD - 2 * OTHER])
    pairs = [
        metrics.pearson_correlation(ensemble[i], ensemble[j])
        for i in range(4)
        for j in range(i)
    ]
    found = metrics.ensemble_correlation(ensemble)
    np.testing.assert_allclose(found, np.mean(pairs, 0), atol=1e-9)
    same = np.stack([FIELD] * 3)
    np.testing.assert_allclose(metrics.ensemble_correlation(same), 1)
    same[1, 2, 1, 0] = np.nan  # one of three: of three pairs one is left
    assert metrics.ensemble_correlation(same)[2, 1] == pytest.approx(1 / 3)


def test_time_of_high_correlation_is_the_first_crossing_11():
    r = np.array([0.95, 0.9, 0.7, 0.85, 0.6, 0.9])
    first = metrics.high_correlation_time(r, 0.8, 0.5)
    assert first == (1.0, False, 2.0)  # four steps are above, two before the crossing
    between = metrics.high_correlation_time(r, 0.8, 0.5, interpolate=True)
    assert between.time == pytest.approx(0.5 * (2 + 0.5))
    same = metrics.high_correlation_time(np.ones(6), 0.8, 0.5)
    assert same == (3.0, True, 3.0)
    assert metrics.high_correlation_time(np.ones(6), interpolate=True).time == 6
    start = metrics.high_correlation_time([0.6, 1.0], interpolate=True)
    assert start.time == pytest.approx(0.5) and start.count == 1


def test_each_rollout_has_its_own_time_and_step():
    r = np.array([[0.9, 0.9, 0.1, 0.9], [0.9, 0.7, 0.1, np.nan], [0.9, 0.9, 0.1, 0.9]])
    dt = np.array([1.0, 2.0, 3.0, 4.0])
    found = metrics.high_correlation_time(r, 0.8, dt, interpolate=True)
    np.testing.assert_allclose(found.time, [3, 2 * 1.5, 3 * 0.2 / 0.9, 4])
    assert found.censored.tolist() == [True, False, False, False]
    assert found.count.tolist() == [3, 4, 0, 8]


def test_a_table_counts_rollouts_that_broke():
    error = np.arange(6.0)[:, None] + [0, 1, 100, 5]
    error[4:, 2] = np.nan
    table = metrics.horizon_errors(error, [(0, 2), (2, 6), (2, 7)])
    assert table["failed"] == 1 / 4 and "mean_3_7" not in table
    # the third held for the first four steps
    assert table["failed_1_2"] == 0 and table["failed_3_6"] == 1 / 4
    np.testing.assert_allclose(table["mean_1_2"], 0.5 + 106 / 4)
    np.testing.assert_allclose(table["median_1_2"], 0.5 + 3)
    np.testing.assert_allclose(table["mean_3_6"], 3.5 + 2)
    np.testing.assert_allclose(table["median_3_6"], 3.5 + 1)
    np.testing.assert_allclose(table["mean_1_6"], 2.5 + 2)
    assert table["mean_early"] == table["mean_1_2"] and table["failed_late"] == 1 / 4
    np.testing.assert_allclose(table["mean_late"], 4.5 + 2)
    np.testing.assert_allclose(table["growth"], (4.5 + 2) / (0.5 + 2))
    broken = metrics.horizon_errors(error[:, 2:3], [])
    assert broken["failed"] == 1 and np.isnan(broken["growth"])


def test_growth_is_late_over_early():
    error = np.array([[1.0, 2.0], [3.0, 2.0], [9.0, 5.0], [4.0, np.nan], [4.0, 1.0]])
    np.testing.assert_allclose(metrics.growth(error, 2), [4 / 2, np.nan])
    np.testing.assert_allclose(metrics.growth(error[:, 0], 1, 3), 17 / 3)


def test_spectrum_of_waves_and_its_sum():
    x = np.arange(32) / 32 * 2 * np.pi
    waves = 2 + 3 * np.sin(4 * x) + 0.5 * np.cos(16 * x)
    power = metrics.power_spectrum(waves[None, :, None])[0, :, 0]
    expected = np.zeros(17)
    expected[[0, 4, 16]] = [4, 4.5, 0.25]
    np.testing.assert_allclose(power, expected, atol=1e-12)
    plane = np.sin(3 * x)[:, None] * np.cos(4 * x)  # |k| = 5 in every one of its modes
    power = metrics.power_spectrum(plane[..., None], dims=2)[:, 0]
    assert power[5] == pytest.approx(0.25) and power.sum() == pytest.approx(0.25)
    noise = RNG.standard_normal((4, 8, 6, 3))
    total = metrics.power_spectrum(noise, dims=2).sum(-2)
    np.testing.assert_allclose(total, np.square(noise).mean((1, 2)))
    box = metrics.power_spectrum(noise[..., None], dims=3).sum((-2, -1))
    np.testing.assert_allclose(box, np.square(noise).mean((1, 2, 3)))


def test_error_is_told_apart_by_wavenumber():
    x = np.arange(32) / 32 * 2 * np.pi
    shift = RNG.uniform(0, 6, (5, 1, 1))
    low, high = np.sin(2 * x[:, None] + shift), 0.01 * np.sin(9 * x[:, None] + shift)
    error = metrics.error_by_wavenumber(0.9 * low + 1.5 * high, low + high)
    np.testing.assert_allclose(error[[2, 9]], [0.1, 0.5])
    blind = metrics.error_by_wavenumber(low, low + high)
    np.testing.assert_allclose(blind[[2, 9]], [0, 1], atol=1e-9)


def images():
    rng = np.random.default_rng(0)
    a = rng.random((3, 14, 19, 2))
    return a, np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)


# skimage 0.26: structural_similarity(x, y, data_range=..., channel_axis=-1, sigma=1.5,
# gaussian_weights=True, use_sample_covariance=False) of each of these images
SKIMAGE = {
    1.0: [0.8310053866844285, 0.8016945639208193, 0.8472948187822743],
    2.0: [0.8334464721275567, 0.8048565709779301, 0.8497288857932905],
}


def test_structural_similarity_is_skimages():
    a, b = images()
    for data_range, want in SKIMAGE.items():
        found = metrics.ssim(a, b, data_range=data_range)
        np.testing.assert_allclose(found, want, atol=1e-12)
    np.testing.assert_allclose(metrics.ssim(a[None], a[None]), np.ones((1, 3)))
    whole = (255 * a).astype(np.uint8)
    swapped = metrics.ssim(whole, whole[::-1], data_range=255)
    again = metrics.ssim(whole / 255, whole[::-1] / 255)
    np.testing.assert_allclose(swapped, again)


def test_signal_to_noise_in_decibels():
    a, _ = images()
    np.testing.assert_allclose(metrics.psnr(a, a + 0.1), 20)
    np.testing.assert_allclose(metrics.psnr(100 * a, 100 * a + 10, data_range=100), 20)
    assert np.all(np.isinf(metrics.psnr(a, a)))
    whole = np.array([[[250]], [[3]]], np.uint8)  # differences do not wrap around
    assert metrics.psnr(whole, whole[::-1], data_range=255) < 1


def test_what_cannot_be_compared_is_refused(refused):
    a = np.zeros((2, 3, 12, 12, 1))
    refused("must agree", metrics.pearson_correlation, a, a[1:])
    refused("none to correlate over", metrics.pearson_correlation, a, a, 5)
    refused("a pair needs 2", metrics.ensemble_correlation, a[:1])
    time = metrics.high_correlation_time
    refused("threshold=1 is outside", time, np.ones(3), 1)
    refused("at least one step", time, np.ones((0, 2)))
    refused("one time step, or one a rollout", time, np.ones(3), 0.8, np.ones(3))
    refused("one time step, or one a rollout", time, np.ones((3, 2)), 0.8, np.ones(3))
    refused("must be positive", time, np.ones((3, 2)), 0.8, np.array([1, -1]))
    refused("early=4 steps", metrics.growth, np.ones(3), 4)
    refused("late=0 must be at least 1", metrics.growth, np.ones(3), 1, 0)
    refused("dims=4", metrics.power_spectrum, a, 4)
    refused(r"\(3,\)", metrics.power_spectrum, np.ones(3), 3)
    refused("smaller than the window", metrics.ssim, a[..., :10, :], a[..., :10, :])
    refused("data_range=0", metrics.psnr, a, a, data_range=0)
    refused("height, width, channel", metrics.psnr, a[0, 0, 0], a[0, 0, 0])
