"""The adaptive reference solver: SciPy's Dormand-Prince pair, on the host."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_output, check_range
from tmdjax.core.functions import as_pytree
from tmdjax.core.types import Cond, Data, Velocity
from tmdjax.flows.rollout import check_times


class AdaptiveSolution(NamedTuple):
    """What an adaptive solver reached.

    Attributes:
        x: [batch, *event] at t = 0.
        nfe: velocity evaluations, the same for every sample.
    """

    x: Data
    nfe: int


@jax.jit
def _evaluate(velocity: Any, x: Data, t: Any, cond: Cond) -> Data:
    return check_output(velocity(x, jnp.broadcast_to(t, x.shape[:1]), cond), x)


def rk45(
    velocity: Velocity,
    x: Data,
    cond: Cond = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> AdaptiveSolution:
    """Integrates from t = 1 to t = 0 with error control over the whole batch.

    The batch is one ODE, as in score-based generative modelling: its step sizes fit
    all samples together, and every evaluation counts once. The host steers, so this
    is a reference and no fast path.

    Args:
        velocity: ``(x, t, cond) -> v``.
        x: noise, [batch, *event] float32.
        cond: handed to the velocity.
        rtol: relative tolerance, > 0.
        atol: absolute tolerance, > 0.

    Returns:
        Final states and the number of evaluations.

    Raises:
        ValueError: a tolerance out of range, a velocity of another shape or one that
            is not finite.
        RuntimeError: the solver gave up.

    References:
        Song et al., arXiv 2011.13456, sec. 4.3; ``scipy.integrate.solve_ivp``.
    """
    from scipy import integrate

    check_range("rtol", rtol, 0, open_low=True)
    check_range("atol", atol, 0, open_low=True)
    check_times(velocity, (1.0, 0.0), "heun")  # it asks at both ends
    compiled, dtype = as_pytree(velocity), x.dtype

    def derivative(t: float, state: np.ndarray) -> np.ndarray:
        now = jnp.asarray(state.reshape(x.shape), dtype)
        v = np.asarray(
            _evaluate(compiled, now, jnp.asarray(t, dtype), cond), np.float64
        )
        if not np.isfinite(v).all():  # SciPy would shrink its step for ever
            raise ValueError(f"the velocity at t={t:.6g} is not finite.")
        return v.ravel()

    start = np.asarray(x, np.float64).ravel()
    found = integrate.solve_ivp(
        derivative,
        (1.0, 0.0),
        start,
        method="RK45",
        t_eval=[0.0],
        rtol=rtol,
        atol=atol,
    )
    if not found.success:
        raise RuntimeError(f"RK45 gave up: {found.message}")
    return AdaptiveSolution(
        jnp.asarray(found.y[:, -1].reshape(x.shape), dtype), int(found.nfev)
    )
