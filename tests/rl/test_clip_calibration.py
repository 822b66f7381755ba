"""Calibrated clipping: as many tokens are clipped as exact arithmetic would clip."""

import numpy as np
import pytest

from tmdjax import rl

RNG = np.random.default_rng(0)
EXACT = RNG.normal(0, 0.15, (20, 100))
NOISY = EXACT + RNG.normal(0, 0.15, EXACT.shape)
ADVANTAGE = np.repeat(RNG.normal(size=(20, 1)), 100, axis=1)
LIVE = RNG.random(EXACT.shape) < 0.7
RANGE = (0.2, 0.28)


def calibrated(log_ratio=NOISY, shadow=EXACT, advantage=ADVANTAGE, given=RANGE, **more):
    return rl.calibrate_clip_range(
        log_ratio, shadow, advantage, given, **{"mask": LIVE, **more}
    )


def shares(log_ratio, clip_range):
    """In a loop over tokens."""
    beyond, counts = [0, 0], [0, 0]
    for r, a, live in zip(np.exp(log_ratio).flat, ADVANTAGE.flat, LIVE.flat):
        side = int(a > 0)
        counts[side] += live
        low, high = clip_range
        beyond[side] += live and (r > 1 + high if a > 0 else r < 1 - low)
    return beyond[0] / counts[0], beyond[1] / counts[1]


def test_shares_are_those_of_tokens_without_gradient():
    found = rl.clipped_shares(NOISY, ADVANTAGE, RANGE, mask=LIVE)
    assert found == pytest.approx(shares(NOISY, RANGE), abs=1e-12)
    assert min(found) > 0 and rl.clipped_shares(NOISY, 0 * ADVANTAGE, 0.2) == (0, 0)


def test_as_many_are_clipped_as_exact_arithmetic_would_clip():
    exact, before = shares(EXACT, RANGE), shares(NOISY, RANGE)
    assert before[0] > 1.5 * exact[0] and before[1] > 1.5 * exact[1]
    found = calibrated()
    assert shares(NOISY, found) == pytest.approx(exact, abs=1e-12)
    assert found[0] > RANGE[0] and found[1] > RANGE[1]
    # less spread than exact ratios have: the range becomes narrower
    narrow = calibrated(0.5 * EXACT)
    assert shares(0.5 * EXACT, narrow) == pytest.approx(exact, abs=1e-12)
    assert narrow[0] < RANGE[0] and narrow[1] < RANGE[1]


def test_without_rounding_nothing_changes():
    for given in (RANGE, 0.2, (1.0, np.inf), (3e-4, 4e-4)):
        pair = given if isinstance(given, tuple) else (given, given)
        assert calibrated(EXACT, given=given) == pair
    # nor by noise that puts nothing across a bound
    crossing = (np.expm1(NOISY) < -0.2) != (np.expm1(EXACT) < -0.2)
    crossing |= (np.expm1(NOISY) > 0.28) != (np.expm1(EXACT) > 0.28)
    assert calibrated(mask=LIVE & ~crossing) == RANGE


def test_more_noise_never_narrows_and_more_clipping_never_widens():
    bounds = [calibrated(EXACT * s) for s in (0.7, 1.0, 1.3, 1.6, 1.9)]
    assert np.all(np.diff(bounds, axis=0) > 0)
    bounds = [calibrated(shadow=EXACT * s) for s in (0.7, 1.0, 1.3, 1.6, 1.9)]
    assert np.all(np.diff(bounds, axis=0) < 0)
    # the order of tokens says nothing
    order = RNG.permutation(EXACT.size)
    turned = (x.ravel()[order] for x in (NOISY, EXACT, ADVANTAGE))
    assert calibrated(*turned, mask=LIVE.ravel()[order]) == calibrated()


def test_bounds_stay_within_limits():
    wild = 40 * NOISY
    assert calibrated(wild) == pytest.approx((0.6, 0.84))
    low, _ = calibrated(wild, most=10.0)  # a ratio is never negative
    assert 0.99 < low <= 1
    assert calibrated(1e-6 * NOISY) == pytest.approx((0.2 / 3, 0.28 / 3))
    assert calibrated(1e-6 * NOISY, most=1.5) == pytest.approx((0.2 / 1.5, 0.28 / 1.5))
    some = (0 * EXACT - 5.0, 0 * EXACT - 5.0)  # every token is clipped, in both
    assert calibrated(*some)[0] == pytest.approx(0.2)


def test_a_side_that_nobody_is_on_keeps_its_bound():
    """That of the last calibration; and what is not finite says nothing."""
    last = {"current": (0.3, 0.4)}
    low, high = calibrated(advantage=abs(ADVANTAGE), **last)
    assert low == 0.3 and high not in (0.28, 0.4)
    low, high = calibrated(advantage=-abs(ADVANTAGE), **last)
    assert high == 0.4 and low not in (0.2, 0.3)
    assert calibrated(advantage=0 * ADVANTAGE, **last) == (0.3, 0.4)
    assert calibrated(mask=0 * LIVE) == RANGE
    assert calibrated(**last) == calibrated()  # what is known goes before
    broken = np.where(LIVE, NOISY, np.nan)
    assert calibrated(broken, mask=None) == calibrated()
    assert calibrated(shadow=np.where(LIVE, EXACT, -np.inf), mask=None) == calibrated()


def test_bad_inputs(refused):
    refused(r"shadow_log_ratio has shape \(100,\)", calibrated, shadow=EXACT[0])
    refused(r"advantage has shape \(20,\)", calibrated, advantage=ADVANTAGE[:, 0])
    refused(r"mask has shape \(20,\)", calibrated, mask=LIVE[:, 0])
    refused("clip_range low=0.0", calibrated, given=(0.0, 0.2))
    refused("clip_range low=1.5", calibrated, current=(1.5, 0.2))
    refused("most=1.0 is outside", calibrated, most=1.0)
