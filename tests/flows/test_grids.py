import numpy as np

from tmdjax import flows


def test_uniform_ends_exactly():
    grid = flows.uniform_grid(7)
    assert grid[0] == 1 and grid[-1] == 0 and grid.dtype == np.float64
    np.testing.assert_allclose(np.diff(grid), -1 / 7, rtol=1e-12)


def test_shift():
    np.testing.assert_array_equal(flows.shifted_grid(9, 1.0), flows.uniform_grid(9))
    # published SD3 values of shift 3 on four uniform steps
    grid = flows.shifted_grid(4, 3.0)
    np.testing.assert_allclose(grid, [1, 0.9, 0.75, 0.5, 0], atol=1e-12)


def test_bad_grids(refused):
    custom = flows.custom_grid
    refused("knot 1 is 0.5 and knot 2 is 0.6", custom, [1.0, 0.5, 0.6, 0.0])
    refused("must end at 0.*0.5", custom, [1.0, 0.5])
    refused("at least two knots", custom, [1.0])
    refused(r"outside \[0, 1\]", custom, [1.5, 0.0])
    refused(r"outside \[0, 1\]", custom, [1.0, float("nan"), 0.0])
    refused("strictly decrease", custom, [0.0, 1.0])
    refused("steps=0", flows.uniform_grid, 0)
    refused("steps=0", flows.edm_grid, 0)
    refused("shift=-1", flows.shifted_grid, 4, -1.0)
    refused("sigma_max=0.001", flows.edm_grid, 4, sigma_max=0.001)


def test_edm_grid_has_the_noise_levels_of_the_paper():
    grid = flows.edm_grid(18)
    assert len(grid) == 19 and grid[0] == 1 and grid[-1] == 0
    sigma = grid[1:-1] / (1 - grid[1:-1])
    i = np.arange(1, 18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma, expected, rtol=1e-9)
    np.testing.assert_array_equal(flows.edm_grid(1), [1, 0])
    flows.custom_grid(flows.edm_grid(2))
