import numpy as np
import pytest

from tmdjax import flows


def test_uniform_ends_exactly():
    grid = flows.uniform_grid(7)
    assert grid[0] == 1 and grid[-1] == 0 and grid.dtype == np.float64
    np.testing.assert_allclose(np.diff(grid), -1 / 7, rtol=1e-12)


def test_shift():
    np.testing.assert_array_equal(flows.shifted_grid(9, 1.0), flows.uniform_grid(9))
    grid = flows.shifted_grid(4, 3.0)
    # published SD3 values of shift 3 on four uniform steps
    np.testing.assert_allclose(grid, [1, 0.9, 0.75, 0.5, 0], atol=1e-12)
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(
        flows.shift_time(flows.shift_time(t, 3.0), 1 / 3.0), t, atol=1e-12
    )


@pytest.mark.parametrize(
    "times, message",
    [
        ([1.0, 0.5, 0.6, 0.0], "knot 1 is 0.5 and knot 2 is 0.6"),
        ([1.0, 0.5], "must end at 0.*0.5"),
        ([1.0], "at least two knots"),
        ([1.5, 0.0], r"outside \[0, 1\]"),
        ([1.0, float("nan"), 0.0], r"outside \[0, 1\]"),
        ([0.0, 1.0], "strictly decrease"),
    ],
)
def test_bad_grids(times, message):
    with pytest.raises(ValueError, match=message):
        flows.custom_grid(times)


def test_bad_steps_and_shift():
    with pytest.raises(ValueError, match="steps=0"):
        flows.uniform_grid(0)
    with pytest.raises(ValueError, match="shift=-1"):
        flows.shifted_grid(4, -1.0)


def test_edm_grid_has_the_noise_levels_of_the_paper():
    grid = flows.edm_grid(18)
    assert len(grid) == 19 and grid[0] == 1 and grid[-1] == 0
    sigma = grid[1:-1] / (1 - grid[1:-1])
    i = np.arange(1, 18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma, expected, rtol=1e-9)
    np.testing.assert_array_equal(flows.edm_grid(1), [1, 0])
    flows.custom_grid(flows.edm_grid(2))
    with pytest.raises(ValueError, match="steps=0"):
        flows.edm_grid(0)
    with pytest.raises(ValueError, match="sigma_max=0.001"):
        flows.edm_grid(4, sigma_max=0.001)
