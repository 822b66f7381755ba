import numpy as np
import pytest
from scipy import stats

from tmdjax.metrics import paired_interval, t_interval
from tmdjax.metrics.intervals import finite_interval

VALUES = [1.3, 0.2, -0.7, 2.9, 1.1]


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_t_interval_is_scipys(level):
    mean, error = np.mean(VALUES), stats.sem(VALUES)
    theirs = stats.t.interval(level, len(VALUES) - 1, loc=mean, scale=error)
    np.testing.assert_allclose(t_interval(VALUES, level), (mean, *theirs), rtol=1e-12)


def test_two_seeds_use_the_cauchy_quantile():
    # One degree of freedom: t is Cauchy, t_{0.975} = tan(0.475 pi); sd/sqrt(2) = 0.5.
    half = 0.5 * np.tan(0.475 * np.pi)
    expected = (0.5, 0.5 - half, 0.5 + half)
    np.testing.assert_allclose(t_interval([0.0, 1.0]), expected, rtol=1e-12)


def test_one_seed_has_no_interval():
    assert t_interval([2.5]) == (2.5, None, None)
    assert paired_interval([3.0], [2.0], "difference") == (1.0, None, None)
    ratio = paired_interval([3.0], [2.0], "ratio")
    assert ratio == (pytest.approx(1.5), None, None)


def test_a_seed_that_diverged_leaves_a_mean_alone():
    assert finite_interval(VALUES) == t_interval(VALUES)
    assert finite_interval([1.0, np.inf]) == (np.inf, None, None)
    for values in ([1.0, np.nan], [np.inf, -np.inf]):
        value, *bounds = finite_interval(values)
        assert np.isnan(value) and bounds == [None, None]


def test_difference_is_scipys_paired_t_test():
    rng = np.random.default_rng(1)
    ours, baseline = rng.normal(size=6) + 0.3, rng.normal(size=6)
    expected = stats.ttest_rel(ours, baseline).confidence_interval(0.95)
    value, low, high = paired_interval(ours, baseline, "difference")
    np.testing.assert_allclose((low, high), expected, rtol=1e-10)
    assert value == pytest.approx(np.mean(ours) - np.mean(baseline))


def test_ratio_is_scale_free_and_inverts_with_the_arms():
    ours, baseline = np.abs(VALUES), np.array([1.0, 0.4, 0.9, 1.7, 1.2])
    value, low, high = interval = paired_interval(ours, baseline, "ratio")
    assert value == pytest.approx(stats.gmean(ours / baseline), rel=1e-12)
    swapped = paired_interval(baseline, ours, "ratio")
    np.testing.assert_allclose(swapped, (1 / value, 1 / high, 1 / low), rtol=1e-12)
    # Each seed may carry its own unit.
    unit = np.array([1e-3, 7.0, 1e4, 2.0, 0.5])
    scaled = paired_interval(ours * unit, baseline * unit, "ratio")
    np.testing.assert_allclose(scaled, interval, rtol=1e-9)


def test_bad_inputs_are_named(refused):
    refused(r"values has shape \(0,\).*at least one", t_interval, [])
    refused(r"values has 1 non-finite.*index \(1,\)", t_interval, [1.0, float("nan")])
    refused(r"level=1.0 is outside \(0, 1\)", t_interval, [1.0, 2.0], level=1.0)
    two, pair = [1.0, 2.0], paired_interval
    seeds = r"ours has 2 seed.*baseline has 3"
    refused(seeds, pair, two, [1.0, 2.0, 3.0], "difference")
    refused("baseline holds 0; a ratio needs positive", pair, two, [1.0, 0.0], "ratio")
    refused("Did you mean 'ratio'", pair, two, two, "ratios")
    refused("baseline has 1 non-finite", pair, two, [np.inf, 1.0], "difference")
