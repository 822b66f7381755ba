"""Solvers of equations: exact solutions, symmetries, order, other integrators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.integrate import solve_ivp

from tmdjax.data import pde
from tmdjax.data.pde import etdrk4

POINTS, ROWS = 64, 8
LENGTH = np.array([32, 32, 32, 32, 25, 5, 32, 36.0])
VISCOSITY = np.array([1, 1, 1, 1, 0.7, 1, 1, 1.3])
DT = np.array([2, 2, 2, 2, 3, 2, 1, 2.0])
X = np.arange(POINTS) / POINTS  # in domains
SPEED, SHIFT, WAVES = 0.7, 8, 3
START = np.cos(2 * np.pi * X) + 0.3 * np.sin(4 * np.pi * X + 1)


def solved(equation, initial, dt, substeps):
    """The fields at time dt; all calls share one program."""
    return pde.solve(equation, initial, dt, 2, substeps=substeps)[1]


@pytest.fixture(scope="module")
def ks():
    """Eight cases as one batch, at several numbers of steps."""
    equation = pde.kuramoto_sivashinsky(POINTS, LENGTH, VISCOSITY)
    initial = np.stack([START] * ROWS)
    initial[1] += SPEED
    initial[2] = np.roll(START, SHIFT)
    initial[3] = -np.roll(START[::-1], 1)
    initial[4] = 1e-8 * np.sin(2 * np.pi * WAVES * X)
    initial[5] += 0.4
    steps = (40, 80, 160, 200, 1600)
    return initial, {n: solved(equation, initial, DT, n) for n in steps}


def test_equal_problems_have_equal_solutions_13(ks):
    u = ks[1][200]
    q = 2 * np.pi * np.fft.rfftfreq(POINTS, 1 / POINTS) / 32
    moved = np.fft.irfft(np.fft.rfft(u[0]) * np.exp(-1j * q * SPEED * 2)) + SPEED
    assert_allclose(u[1], moved, atol=1e-7)
    assert_allclose(u[2], np.roll(u[0], SHIFT), atol=1e-12)
    assert_allclose(u[3], -np.roll(u[0][::-1], 1), atol=1e-12)
    # a number of its own in every trajectory: as if it were solved alone
    for row in (4, 6, 7):
        alone = pde.kuramoto_sivashinsky(POINTS, LENGTH[row], VISCOSITY[row])
        again = solved(alone, np.stack([ks[0][row]] * ROWS), DT[row], 200)
        assert_allclose(again[0], u[row], rtol=1e-12, atol=1e-20)


def test_linear_growth_and_decay_13(ks):
    initial, solutions = ks
    q = 2 * np.pi * WAVES / 25
    factor = np.exp((q**2 - 0.7 * q**4) * 3)
    assert_allclose(solutions[200][4], initial[4] * factor, rtol=1e-6, atol=1e-20)
    calm = solutions[1600][5]  # shorter than 2 pi: every wave decays
    assert calm.std() < 0.2 * initial[5].std()
    for u in solutions.values():
        assert_allclose(u.mean(1), initial.mean(1), atol=1e-13)


def test_order_is_four_13(ks):
    u = ks[1]
    error = [np.abs(u[n][0] - u[1600][0]).max() for n in (40, 80, 160)]
    assert 13 < error[0] / error[1] < 17 and 13 < error[1] / error[2] < 17


def test_another_integrator_agrees_13(ks):
    q = 2 * np.pi * np.fft.rfftfreq(POINTS, 1 / POINTS) / 32
    kept = np.arange(33) < POINTS / 3

    def rate(t, u):
        v = np.fft.rfft(u)
        return np.fft.irfft((q**2 - q**4) * v - 0.5j * q * np.fft.rfft(u * u) * kept)

    options = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-10}
    found = solve_ivp(rate, (0, 1), START, **options).y[:, -1]
    assert_allclose(ks[1][200][6], found, atol=1e-9)


def test_burgers_is_the_heat_equation_in_disguise():
    """Cole and Hopf: u = -2 nu (log phi)_x, where phi solves the heat equation."""
    nu, time, x = 0.4, 1.5, 2 * np.pi * X
    phi = np.fft.rfft(np.exp(np.cos(x) / (2 * nu)))  # of u = sin x
    k = np.arange(33)
    phi = phi * np.exp(-nu * k**2 * time)
    exact = -2 * nu * np.fft.irfft(1j * k * phi) / np.fft.irfft(phi)
    found = solved(pde.burgers(POINTS, viscosity=nu), np.sin([x] * ROWS), time, 400)
    assert_allclose(found[0], exact, atol=1e-8)


SIDE = 16
GRID = 2 * np.pi * np.arange(SIDE) / SIDE


@pytest.fixture(scope="module")
def flow():
    """A mode alone, the laminar flow, and a random one; and what became of them."""
    numbers = {
        "viscosity": np.array([0.1, 0.5, 0.05]),
        "drag": np.array([0.0, 0.1, 0.1]),
        "force": np.array([0.0, 1.0, 1.0]),
    }
    equation = pde.kolmogorov_flow(SIDE, **numbers)
    mode = np.cos(2 * GRID)[:, None] * np.sin(3 * GRID)
    laminar = -4 / (0.5 * 16 + 0.1) * np.cos(4 * GRID) * np.ones((SIDE, 1))
    modes = np.fft.rfft2(np.random.default_rng(0).standard_normal((SIDE, SIDE)))
    kept = np.hypot(np.fft.fftfreq(SIDE, 1 / SIDE)[:, None], np.arange(9)) < 4
    kept[0, 0] = False
    initial = np.stack([mode, laminar, np.fft.irfft2(modes * kept)])
    return initial, pde.solve(equation, initial, 0.5, 2, substeps=100)[1]


def test_a_mode_alone_decays_and_the_laminar_flow_stays_14(flow):
    initial, found = flow
    assert_allclose(found[0], initial[0] * np.exp(-0.1 * 13 * 0.5), atol=1e-12)
    assert_allclose(found[1], initial[1], atol=1e-12)


def test_the_flow_agrees_with_another_form_and_integrator_14(flow):
    """Conservative form on all complex modes, by an integrator with adaptive steps."""
    k = np.fft.fftfreq(SIDE, 1 / SIDE)
    kx, ky = k[:, None] + 0 * k, k + 0 * k[:, None]
    square, kept = kx**2 + ky**2, (np.abs(kx) < SIDE / 3) & (np.abs(ky) < SIDE / 3)
    push = np.fft.fft2(-4 * np.cos(4 * GRID) * np.ones((SIDE, 1)))

    def rate(t, flat):
        w = np.fft.fft2(flat.reshape(SIDE, SIDE))
        psi = np.divide(w * kept, square, where=square > 0, out=np.zeros_like(w))
        field = np.fft.ifft2(w * kept)
        flux_x = np.fft.fft2(np.fft.ifft2(1j * ky * psi) * field)
        flux_y = np.fft.fft2(np.fft.ifft2(-1j * kx * psi) * field)
        moved = -1j * (kx * flux_x + ky * flux_y) * kept
        change = moved + push - (0.05 * square + 0.1) * w
        return np.fft.ifft2(change).real.ravel()

    initial, found = flow
    options = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-10}
    other = solve_ivp(rate, (0, 0.5), initial[2].ravel(), **options).y[:, -1]
    assert_allclose(found[2].ravel(), other, atol=1e-8)


def test_velocity_has_the_vorticity_and_no_divergence_14(flow):
    k = 1j * np.fft.fftfreq(SIDE, 1 / SIDE)
    velocity = np.fft.fft2(pde.velocity_of(flow[1]), axes=(1, 2))
    u, v = velocity[..., 0], velocity[..., 1]
    divergence = np.fft.ifft2(k[:, None] * u + k * v)
    assert np.abs(divergence).max() < 1e-12
    assert_allclose(np.fft.ifft2(k[:, None] * v - k * u), flow[1], atol=1e-9)
    assert_allclose(u[:, 0, 0], 0, atol=1e-9)


def test_a_step_inside_a_program_is_the_solver_in_float32(ks):
    equation = pde.kuramoto_sivashinsky(POINTS, LENGTH, VISCOSITY)
    rows = np.array([6, 4, 0])

    @jax.jit
    def run(step, u, rows):
        return step(u), step.rows(rows)(u[rows, ::2])

    u = jnp.float32(ks[0])[..., None]
    found, coarse = run(pde.stepper(equation, DT, 40), u, rows)
    assert found.dtype == coarse.dtype == jnp.float32
    assert_allclose(found[..., 0], ks[1][40], atol=2e-5)
    # some rows, on half of the points: modes go to the solver's grid and come back
    modes = np.fft.rfft(ks[1][40][rows])[:, : POINTS // 4]
    there = np.fft.irfft(modes, POINTS // 2) / 2
    assert_allclose(coarse[..., 0], there, atol=2e-5)


@pytest.mark.parametrize("sides", [(8,), (8, 8)])
def test_modes_of_a_finer_grid_are_of_the_same_field(sides):
    def on(points):
        x = 2 * np.pi * np.arange(points) / points
        u = 0.5 + np.cos(3 * x) + np.sin(2 * x + 1)
        return u if len(sides) == 1 else u[:, None] * (np.sin(3 * x) - 2)

    axes = tuple(range(1, 1 + len(sides)))

    @jax.jit
    def run(field):
        v, found, before = jnp.fft.rfftn(field, axes=axes), [], 8
        for points in (12, 9, 8):
            v = etdrk4._resampled(v, before, points)
            found.append(jnp.fft.irfftn(v, (points,) * len(sides), axes=axes))
            before = points
        return found

    for found in run(np.float32(on(8))[None]):
        assert_allclose(found[0], on(len(found[0])), atol=1e-5)


def test_what_cannot_be_solved_is_refused(refused):
    equation = pde.kuramoto_sivashinsky(POINTS, 32.0)
    u = np.stack([START] * ROWS)
    refused(r"shape \(64,\).*\[batch, 64\]", pde.solve, equation, START, 1.0, 2)
    refused(
        "initial has 64 non-finite",
        pde.solve,
        equation,
        u[:1] + np.eye(1, 64) * np.nan,
        1,
        2,
    )
    refused("dt=0.0 is outside", pde.solve, equation, u, 0, 2)
    refused("frames=0 must be at least 1", pde.solve, equation, u, 1, 0)
    refused(
        "points=128 must be even and at most 64",
        pde.solve,
        equation,
        u,
        1,
        2,
        points=128,
    )
    refused("set up for 3 trajectories", pde.solve, equation, u, np.ones(3), 2)
    three = np.zeros((3, 5)), np.ones(8)
    refused(r"dt has shape \(8,\).*the batch, 3", pde.etdrk4_coefficients, *three)
    step = pde.stepper(pde.burgers(8, viscosity=np.ones(3)), 0.1)
    for shape in ((3, 8), (3, 8, 2), (3, 8, 8, 1)):
        words = rf"shape \({', '.join(map(str, shape))}\).* takes \[batch, x, 1\]"
        refused(words, step, np.ones(shape, np.float32))
    plane = pde.stepper(pde.kolmogorov_flow(12), 0.1)
    refused("as many points along each", plane, np.ones((1, 12, 8, 1), np.float32))
    words = "batch of 2, .* those of 3 fields; .* rows"
    refused(words, step, np.ones((2, 8, 1), np.float32))
    refused("points=31 must be even", pde.burgers, 31)
    refused("viscosity=0.0 is outside", pde.burgers, 32, viscosity=0)
    refused(r"length has shape \(2,\).*\(3\)", pde.burgers, 32, np.ones(2), np.ones(3))
    refused("force_mode=8 is outside", pde.kolmogorov_flow, 16, force_mode=8)
    with pytest.warns(UserWarning, match=r"points=32 .* is cut below 1\.5; use more"):
        pde.kuramoto_sivashinsky(32, 64.0)
    broken = pde.burgers(POINTS, viscosity=1e-3)
    words = r"trajectory 0 of burgers is not finite from frame 1 on; .*substeps=1,"
    refused(
        words,
        pde.solve,
        broken,
        1e200 * u,
        10.0,
        2,
        substeps=1,
        error=FloatingPointError,
    )
