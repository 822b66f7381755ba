"""Stochastic presets of the coefficient table: how much noise each step adds.

Euler-Maruyama of the SDE that keeps the ODE's marginals for any sigma(t) >= 0,

    dx = [v - (sigma^2 / 2) s] dt + sigma dW,   s = -e_hat / t,  dt < 0,

is the row k = t' - h sigma^2 / (2 t), S = sigma sqrt(h). It is of first order only:
:func:`noise_excess` says by how much a step leaves more noise than t'.
"""

from typing import Any

import numpy as np

from tmdjax.core.checks import check_range
from tmdjax.flows.table import PRESETS, CoefficientTable


def _euler_maruyama(
    t: np.ndarray, t_next: np.ndarray, sigma: np.ndarray
) -> dict[str, Any]:
    h = t - t_next
    k = t_next - h * sigma**2 / (2 * t)
    return {"k": k, "S": sigma * np.sqrt(h)}


@PRESETS.register("flow_grpo")
def _flow_grpo(
    t: np.ndarray, t_next: np.ndarray, *, strength: float = 0.7
) -> dict[str, Any]:
    """Noise sigma = strength sqrt(t / (1 - t)); in a step from t = 1, 1 - t' for 1 - t.

    So the first step has S = strength whatever the grid, and the gain of the velocity,
    kappa = 1 + sigma^2 (1 - t) / (2 t), is 1 + strength^2 / 2 at every later step.
    sigma^2 h does not vanish near t = 1: this is a policy that explores, not a
    convergent discretisation.

    References:
        Flow-GRPO, arXiv 2505.05470.
    """
    check_range("strength", strength, 0, open_high=True)
    if strength and 1 - 1e-3 < t[0] < 1:
        raise ValueError(
            f"the grid starts at {t[0]}, where sigma = strength sqrt(t / (1 - t)) is "
            f"nearly singular; start at exactly 1 (its noise is then that of the next "
            f"knot) or at most at 0.999."
        )
    remaining = np.where(t == 1, 1 - t_next, 1 - t)
    return _euler_maruyama(t, t_next, strength * np.sqrt(t / remaining))


@PRESETS.register("dance_grpo")
def _dance_grpo(
    t: np.ndarray, t_next: np.ndarray, *, strength: float = 0.3
) -> dict[str, Any]:
    """Noise sigma = strength in all steps; the last state is x0_hat, without noise.

    References:
        DanceGRPO, arXiv 2505.07818 (0.3 for images, 0.25 for video).
    """
    check_range("strength", strength, 0, open_high=True)
    sigma = np.full(t.shape, strength, np.float64)
    return {**_euler_maruyama(t, t_next, sigma), "final": "x0_hat"}


@PRESETS.register("flow_cps")
def _flow_cps(
    t: np.ndarray, t_next: np.ndarray, *, strength: float = 0.7
) -> dict[str, Any]:
    """S = t' sin(strength pi / 2), k = sqrt(t'^2 - S^2): the noise level is exact.

    A heuristic: states carry just the noise that the network expects, but a fixed
    fraction of it is drawn anew at every step, so samples are too narrow even for
    infinitely many steps (it is no discretisation of the SDE above).

    References:
        Coefficients-preserving sampling, the 'cps' switch of the Flow-GRPO code.
    """
    check_range("strength", strength, 0, 1)
    noise = t_next * np.sin(strength * np.pi / 2)
    return {"k": np.sqrt(t_next**2 - noise**2), "S": noise}


@PRESETS.register("renoise")
def _renoise(t: np.ndarray, t_next: np.ndarray) -> dict[str, Any]:
    """S = t', k = 0: all noise of the next state is drawn anew, around x0_hat.

    References:
        Multistep sampling of consistency models, arXiv 2303.01469, algorithm 1.
    """
    return {"k": np.zeros_like(t_next), "S": t_next}


def noise_excess(table: CoefficientTable) -> np.ndarray:
    """sqrt(k^2 + S^2) / t' of each step but one that ends at 0: 1 is exact.

    What a step with an exact prediction leaves of noise, over what the network
    expects at t'. Far above 1, rollouts look noisy although ODE samples do not.

    Returns:
        Float64 [steps]; NaN where t' = 0.
    """
    power = np.hypot(table.k, table.c * table.S)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(table.t_next > 0, power / table.t_next, np.nan)
