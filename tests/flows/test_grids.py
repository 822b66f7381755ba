import json
import pathlib

import numpy as np
import pytest

from tmdjax import flows

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "schedulers.json"
PEER = json.loads(GOLDENS.read_text())


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


def test_grids_of_schedulers_that_count_in_training_steps(refused):
    grid = flows.discrete_shifted_grid(28, 3.0)
    # SD3 on 28 steps: its scheduler's timesteps end at 8.9286 of 1000
    assert len(grid) == 29 and grid[0] == 1 and grid[-1] == 0
    np.testing.assert_allclose(grid[-2], 9 / 1008, rtol=1e-12)
    # equidistant before the last shift
    before = grid[:-1] / (3 - 2 * grid[:-1])
    np.testing.assert_allclose(np.diff(before, 2), 0, atol=1e-12)
    plain = flows.discrete_shifted_grid(4, 1.0, training_steps=10)
    np.testing.assert_allclose(plain, [1.0, 0.7, 0.4, 0.1, 0.0], rtol=1e-12)
    assert flows.resolution_shift(256) == np.exp(0.5)
    np.testing.assert_allclose(flows.resolution_shift(4096), np.exp(1.15), rtol=1e-12)
    refused("steps=1 must be at least 2", flows.discrete_shifted_grid, 1, 3.0)
    refused("shift=0.0 is outside", flows.discrete_shifted_grid, 4, 0.0)
    refused("tokens=0", flows.resolution_shift, 0)


def test_numbers_that_leave_no_grid_are_refused(refused):
    """They were knots of NaN, or steps of no length."""
    for message, call, *given in (
        ("shift=inf is outside", flows.shifted_grid, 4, np.inf),
        ("knot 0 is 1.0 and knot 1 is 1.0", flows.shifted_grid, 4, 1e30),
        ("knot 0 is 1.0 and knot 1", flows.discrete_shifted_grid, 4, 1e30),
        ("mu of 1000000000 tokens=.* is outside", flows.resolution_shift, 10**9),
    ):
        refused(message, call, *given)
    refused("sigma_max=inf is outside", flows.edm_grid, 4, sigma_max=np.inf)
    refused("rho=inf is outside", flows.edm_grid, 4, rho=np.inf)
    refused("must strictly decrease", flows.edm_grid, 4, rho=1e18)
    refused("steps=3.0 is of type", flows.uniform_grid, 3.0, error=TypeError)


def flux(steps, tokens):
    return flows.shifted_grid(steps, flows.resolution_shift(tokens))


def qwen_image(steps, tokens):
    shift = flows.resolution_shift(tokens, high=(8192, 0.9))
    return flows.stretched_grid(flows.shifted_grid(steps, shift), 0.02)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("sd3_28", flows.discrete_shifted_grid(28, 3.0)),
        ("sd3_10", flows.discrete_shifted_grid(10, 3.0)),
        ("flux_dev_512", flux(28, 1024)),
        ("flux_dev_1024", flux(50, 4096)),
        ("flux_schnell", flows.uniform_grid(4)),
        ("qwen_image", qwen_image(20, 6032)),
    ],
)
def test_published_grids_are_those_of_the_scheduler(name, grid):
    """FlowMatchEulerDiscreteScheduler of diffusers, as each pipeline sets it."""
    np.testing.assert_allclose(grid, PEER["grids"][name], atol=3e-7)


def test_grids_of_wans_solvers():
    wan = flows.shift_time(0.999 * flows.uniform_grid(20), 3.0)
    want = PEER["solvers"]["dpmpp_2m 20 plain"]["grid"]
    np.testing.assert_allclose(flows.custom_grid(wan), want, atol=3e-7)


def test_stretching_is_refused_where_it_says_nothing(refused):
    grid = flows.stretched_grid(flows.uniform_grid(4), 0.1)
    np.testing.assert_allclose(grid, [1.0, 0.7, 0.4, 0.1, 0.0], rtol=1e-12)
    refused("terminal=1", flows.stretched_grid, grid, 1)
    refused("terminal=0", flows.stretched_grid, grid, 0)
    for one in (np.array([1.0, 0.0]), np.array([0.9, 0.5, 0.0])):
        refused("begins at 1", flows.stretched_grid, one, 0.1)
    refused("tokens of high=256", flows.resolution_shift, 64, high=(256, 1.0))
