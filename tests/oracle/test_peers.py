"""Ours against peer libraries: `make nightly`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import data, flows, metrics

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("default"),  # peers may warn
]

MIXTURE = flows.gaussian_mixture([0.4, 0.6], [[-1.0, 0.5], [1.2, -0.3]], [0.5, 0.8])


def solved(diffrax, solver, x, **options):
    """Where diffrax ends on the way from t = 1 to t = 0."""
    term = diffrax.ODETerm(lambda t, y, args: MIXTURE.velocity(y, jnp.full(8, t)))
    span = {"t0": 1.0, "t1": 0.0, "y0": x}
    return diffrax.diffeqsolve(term, solver, **span, **options).ys[0]


def ours(grid, x, method):
    return flows.endpoints(MIXTURE.velocity, x, grid, method=method)


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
def test_fixed_step_solvers_equal_diffrax(x64, method):
    diffrax = pytest.importorskip("diffrax", reason="needs tmdjax[oracle]")
    x = jax.random.normal(jax.random.key(0), (8, 2), jnp.float64)
    grid = flows.shifted_grid(12, 2.0)
    steps = diffrax.StepTo(ts=jnp.asarray(grid))
    solver = getattr(diffrax, method.title())()
    theirs = solved(diffrax, solver, x, dt0=None, stepsize_controller=steps)
    np.testing.assert_allclose(ours(grid, x, method), theirs, rtol=1e-10, atol=1e-12)


def test_rk4_agrees_with_an_adaptive_solution_of_diffrax(x64):
    diffrax = pytest.importorskip("diffrax", reason="needs tmdjax[oracle]")
    x = jax.random.normal(jax.random.key(0), (8, 2), jnp.float64)
    options = {"dt0": -0.01, "max_steps": 100_000}
    options["stepsize_controller"] = diffrax.PIDController(rtol=1e-11, atol=1e-11)
    theirs = solved(diffrax, diffrax.Dopri8(), x, **options)
    found = ours(flows.uniform_grid(200), x, "rk4")
    np.testing.assert_allclose(found, theirs, rtol=1e-7, atol=1e-8)


def test_sliced_wasserstein_against_ott():
    sliced = pytest.importorskip("ott.tools.sliced", reason="needs tmdjax[oracle]")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    y = (0.5 + 1.5 * rng.normal(size=(200, 5))).astype(np.float32)
    cost, _ = sliced.sliced_wasserstein(
        jnp.asarray(x), jnp.asarray(y), n_proj=20_000, rng=jax.random.key(0)
    )
    ours = metrics.sliced_wasserstein(x, y, projections=20_000)
    assert abs(ours / float(jnp.sqrt(cost)) - 1) < 0.01


def test_frechet_distance_against_bures_of_ott():
    costs = pytest.importorskip("ott.geometry.costs", reason="needs tmdjax[oracle]")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4))
    y = 1 + rng.normal(size=(400, 4)) @ rng.normal(size=(4, 4))

    def packed(points):
        covariance = np.cov(points, rowvar=False)
        return jnp.concatenate([points.mean(0), covariance.ravel()])

    theirs = costs.Bures(4)(packed(x), packed(y))
    np.testing.assert_allclose(metrics.frechet_distance(x, y), theirs, rtol=1e-2)


def test_transport_plan_against_ott(x64):
    pytest.importorskip("ott", reason="needs tmdjax[oracle]")
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (24, 3), jnp.float64) for key in keys)
    cost = flows.transport_cost(2 * x + 1, y)
    ours = flows.transport_plan(cost, regularisation=0.1, iterations=3000)
    problem = linear_problem.LinearProblem(
        geometry.Geometry(cost, epsilon=0.1 * cost.mean())
    )
    theirs = sinkhorn.Sinkhorn(threshold=1e-12, max_iterations=20_000)(problem)
    np.testing.assert_allclose(ours, theirs.matrix, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["ks", "burgers", "kolmogorov"])
def test_equations_equal_those_of_exponax(x64, name):
    exponax = pytest.importorskip("exponax", reason="needs tmdjax[oracle]")
    steppers, side = exponax.stepper, 256
    x = np.arange(side) / side * 2 * np.pi
    if name == "ks":
        ours = data.pde.kuramoto_sivashinsky(side, 64.0)
        theirs = steppers.KuramotoSivashinskyConservative(1, 64.0, side, 0.05, order=4)
        start, steps = np.cos(x) + 0.5 * np.sin(2 * x + 1), 200
    elif name == "burgers":
        ours = data.pde.burgers(side, viscosity=0.1)
        theirs = steppers.Burgers(
            1, 2 * np.pi, side, 0.01, diffusivity=0.1, conservative=True, order=4
        )
        start, steps = np.sin(x), 100
    else:
        side = 48
        x = np.arange(side) / side * 2 * np.pi
        # its velocity is that of the vorticity with the other sign
        ours = data.pde.kolmogorov_flow(side, viscosity=0.02, force=-1.0)
        theirs = steppers.KolmogorovFlowVorticity(
            2, 2 * np.pi, side, 0.02, diffusivity=0.02, order=4
        )
        start, steps = np.cos(2 * x)[:, None] * np.sin(3 * x) + np.cos(x), 50
    u, step = jnp.asarray(start)[None], jax.jit(lambda u: theirs(u))
    for _ in range(steps):
        u = step(u)
    sign = -1 if name == "kolmogorov" else 1
    options = {"substeps": steps}
    found = data.pde.solve(ours, sign * start[None], steps * theirs.dt, 2, **options)
    np.testing.assert_allclose(sign * found[1], u, atol=1e-9)


def test_chaos_is_solved_as_well_as_is_told():
    """The table of the sheet: largest error of steps 0.2 and 0.05 at times 2 to 30."""
    x = np.arange(256) / 256 * 2 * np.pi
    equation = data.pde.kuramoto_sivashinsky(256, 64.0)
    start = (np.cos(x) + 0.5 * np.sin(2 * x + 1))[None]
    fine = data.pde.solve(equation, start, 2.0, 16, substeps=2000)[:, 0]
    for substeps, bounds in ((10, (1e-6, 7e-5, 3e-3)), (40, (6e-9, 1e-6, 4e-5))):
        found = data.pde.solve(equation, start, 2.0, 16, substeps=substeps)[:, 0]
        error = np.abs(found - fine).max(-1)[[1, 5, 15]]
        assert np.all(error < 10 * np.array(bounds)), (substeps, error)


def test_radau_agrees_with_our_solver():
    from scipy.integrate import solve_ivp

    side, length = 64, 32.0
    x = np.arange(side) / side * 2 * np.pi
    q, kept = 2 * np.pi / length * np.arange(33), np.arange(33) < side / 3
    start = np.cos(x) + 0.3 * np.sin(2 * x + 1)

    def rate(t, u):
        v = np.fft.rfft(u)
        return np.fft.irfft((q**2 - q**4) * v - 0.5j * q * np.fft.rfft(u * u) * kept)

    options = {"method": "Radau", "rtol": 1e-9, "atol": 1e-9}
    theirs = solve_ivp(rate, (0, 10), start, **options).y[:, -1]
    equation = data.pde.kuramoto_sivashinsky(side, length)
    for substeps, bound in ((1000, 1e-7), (200, 2e-5)):
        found = data.pde.solve(equation, start[None], 10.0, 2, substeps=substeps)
        error = np.abs(found[1, 0] - theirs).max()
        assert error < bound, (substeps, error)
