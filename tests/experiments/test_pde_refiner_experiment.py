"""What PDE-Refiner's experiment measures of rollouts, where the answer is known."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments import pde_refiner
from tmdjax.data import pde
from tmdjax.harness import load_config


@pytest.fixture
def config():
    return load_config("configs/pde_refiner.py:smoke")


def test_an_error_is_of_the_waves_that_are_wrong(config):
    """Of 32 waves in a domain of 32, those from the 11th on have wavenumber 2 or more."""
    points, length = config.data.points, config.data.length[0]
    assert np.ceil(config.evaluate.wavenumber * length / (2 * np.pi)) == 11
    x = 2 * np.pi * np.arange(points) / points
    test = pde.Trajectories(
        states=np.zeros((1, 2, points, 1), np.float32),
        dt=np.full(1, 0.2),
        dx=np.full(1, length / points),
        parameters={},
    )
    right = 2 * np.sin(3 * x) + 0.5 * np.cos(20 * x)
    for waves, low, high in ((10, 0.1 / 2, 0), (11, 0, 0.1 / 0.5)):
        after = right + 0.1 * np.cos(waves * x + 1)
        pair = [np.tile(v[:, None], (4, 3, 1, 1)) for v in (after, right)]
        spectrum, found = pde_refiner._errors(config, pair[0], pair[1], test)
        assert_allclose(found["error_low"], low, atol=1e-12)
        assert_allclose(found["error_high"], high, atol=1e-12)
        assert_allclose(found["one_step_mse"], 0.1**2 / 2)
        assert len(spectrum) == points // 2 + 1


def test_times_are_of_the_mean_or_of_each_where_steps_differ():
    r = np.array([[1, 1], [1, 0.6], [0.6, 0.2], [0.2, 0.2]])  # [step, trajectory]
    # the mean curve is 1, 0.8, 0.4, 0.2: it crosses 0.7 at step 2.25
    equal, apart = np.array([0.5, 0.5]), np.array([1.0, 3.0])
    assert_allclose(pde_refiner._time(r, equal, 0.7), (2.25 * 0.5, 2 * 0.5, 0))
    # the curves alone cross it at 2.75 and 1.75
    assert_allclose(pde_refiner._time(r, apart, 0.7)[0], (2.75 + 3 * 1.75) / 2)
    assert pde_refiner._time(r, equal, 0.1)[2] == 1  # never


def test_data_that_cannot_be_made_or_used_are_refused(refused):
    for change, words in (
        ("data.points=63", "data.points=63 must be even"),
        ("data.length=(33.0,32.0)", r"data.length=\(33.0, 32.0\) must rise"),
        ("evaluate.wavenumber=7", "beyond 6.28, the highest of data.points=64"),
        ("data.stride=70", "no targets: a window of 2 states at data.stride=70"),
        ("train.batch_size=100000", "larger than the [0-9]+ windows"),
    ):
        config = load_config("configs/pde_refiner.py:smoke", [change])
        refused(words, pde_refiner.describe, config)
