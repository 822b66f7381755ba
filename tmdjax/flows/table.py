"""The coefficient table: every sampler is one row a step of the same update.

    x' = (1 - t') x0_hat + k e_hat + C g + c S z,
    x0_hat = x - t v,  e_hat = x + (1 - t) v,  z ~ N(0, I).

A preset fills the columns k, S, C from a grid on the host in float64; the ODE is
the row k = t', S = 0. Papers differ in these columns and in nothing else.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.registry import Registry
from tmdjax.core.types import Grid
from tmdjax.flows.grids import custom_grid

FINAL_RULES = ("sample", "mean", "x0_hat")

Preset = Callable[..., dict[str, Any]]
"""``preset(t, t_next, **options)`` -> columns 'k', optionally 'S' and 'C', and
optionally the default 'final' rule; columns are [steps] float64."""

PRESETS: Registry[Preset] = Registry("sampler preset")


@struct.dataclass
class CoefficientTable:
    """Rows of the update above; columns are [steps] float64 on the host.

    A pytree: grids of one length share one compilation. Slices keep the global
    step number, so the noise of a step does not depend on where a rollout began.

    Attributes:
        t: time at the start of a step.
        t_next: time at its end.
        h: step size t - t_next > 0.
        k: weight of the noise estimate.
        S: standard deviation of the added noise.
        C: weight of the gradient g.
        c: scale of the noise actually drawn (1 but for trees).
        log_prob_std: standard deviation under which log-probs are computed.
        mask: True where a step is stochastic and has a log-prob.
        step: global step number, int.
        log_snr_step: how far the step goes along log((1 - t) / t), half the log of the
            signal-to-noise ratio, for multistep solvers; > 0, infinite from t = 1 and
            to t' = 0.
        final: rule for the last state: 'sample', 'mean' or 'x0_hat'.
        stochastic: False if no row adds noise.
    """

    t: Any
    t_next: Any
    h: Any
    k: Any
    S: Any
    C: Any
    c: Any
    log_prob_std: Any
    mask: Any
    step: Any
    log_snr_step: Any
    final: str = struct.field(pytree_node=False, default="sample")
    stochastic: bool = struct.field(pytree_node=False, default=False)

    def __len__(self) -> int:
        return len(self.t)

    def columns(self) -> dict[str, Any]:
        """The per-step columns by name."""
        names = ("t", "t_next", "h", "k", "S", "C", "c", "log_prob_std", "mask", "step")
        return {name: getattr(self, name) for name in (*names, "log_snr_step")}

    @property
    def velocity_weight(self) -> Any:
        """B of the mean A x + B v + C g, [steps]: -(1 - t') t + k (1 - t)."""
        return -(1 - self.t_next) * self.t + self.k * (1 - self.t)

    def rows(self, index: Any, dtype: Any) -> dict[str, Any]:
        """Columns of the given rows, floats in a dtype: [*index] each."""
        return {
            name: jnp.asarray(column)[index]
            if name in ("mask", "step")
            else jnp.asarray(column, dtype)[index]
            for name, column in self.columns().items()
        }

    def __getitem__(self, rows: slice) -> "CoefficientTable":
        """A run of consecutive steps; the final rule stays with the last step."""
        start, stop, stride = rows.indices(len(self))
        if stride != 1 or stop <= start:
            raise ValueError(
                f"rows {start}:{stop}:{stride} of a table of {len(self)} steps; give a "
                f"non-empty run of consecutive steps."
            )
        columns = {name: column[rows] for name, column in self.columns().items()}
        noise = columns["S"]
        traced = isinstance(noise, jax.core.Tracer)  # then nothing can be ruled out
        return CoefficientTable(
            **columns,
            final=self.final if stop == len(self) else "sample",
            stochastic=self.stochastic and (traced or bool(np.any(noise > 0))),
        )


def make_table(
    preset: str,
    grid: Grid,
    *,
    final: str | None = None,
    c: Any = 1.0,
    window: Any = None,
    split_log_prob: str = "proposal",
    **options: Any,
) -> CoefficientTable:
    """Builds the table of a named preset on a grid.

    Args:
        preset: name in PRESETS, e.g. 'ode'.
        grid: N + 1 strictly decreasing times ending at 0.
        final: what the last step returns: 'sample' (the noisy state), 'mean', or
            'x0_hat' (the data estimate; its transition then has no log-prob).
            None takes the preset's own rule.
        c: scale of the noise drawn, scalar or [N], >= 0.
        window: bool [N], False turns a step into an ODE step (k = t', no noise, no
            gradient g); None keeps every step. See flows/windows.py.
        split_log_prob: the standard deviation of log-probs where c is not 1: that of
            the 'proposal' (c S, the distribution drawn from) or of the 'policy' (S:
            the score gradient is then c times too large; BranchGRPO's code does so).
        **options: the preset's own strengths.

    Returns:
        A table of N rows.

    Warns:
        UserWarning: a step but the last removes more noise than there is.

    Raises:
        ValueError: unknown preset, rule or scoring, a grid that is not one, a window
            of another length, a negative scale.
    """
    grid = custom_grid(grid)
    check_choice("split_log_prob", split_log_prob, ("proposal", "policy"))
    t, t_next = grid[:-1], grid[1:]
    steps = len(t)
    columns = PRESETS[preset](t, t_next, **options)
    if window is not None:
        columns |= _inside(window, t_next, columns)
    preset_final: str = columns.pop("final", "sample")
    rule = preset_final if final is None else final
    check_choice("final", rule, FINAL_RULES)
    noise = np.broadcast_to(np.asarray(columns.get("S", 0.0), np.float64), steps)
    scale = np.broadcast_to(np.asarray(c, np.float64), steps)
    check_range("c (the scale of the noise)", float(scale.min()), 0)
    mask = scale * noise > 0
    k = np.asarray(columns["k"], np.float64)
    below = [int(i) for i in np.flatnonzero((k[:-1] < 0) & mask[:-1])]
    if below:
        warnings.warn(
            f"steps {below} remove more noise than there is (k < 0): the step is too "
            f"long for its noise, and samples stay noisy. Use a finer grid there, a "
            f"smaller strength, or 'flow_cps'.",
            stacklevel=2,
        )
    if rule != "sample":
        mask = mask & (np.arange(steps) < steps - 1)
    return CoefficientTable(
        t=t,
        t_next=t_next,
        h=t - t_next,
        k=k,
        S=noise,
        C=np.broadcast_to(np.asarray(columns.get("C", 0.0), np.float64), steps),
        c=scale,
        log_prob_std=scale * noise if split_log_prob == "proposal" else noise,
        mask=mask,
        step=np.arange(steps, dtype=np.int32),
        log_snr_step=_log_snr_step(t, t_next),
        final=rule,
        stochastic=bool(np.any(scale * noise > 0)),
    )


def _log_snr_step(t: np.ndarray, t_next: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log1p(-t_next) - np.log(t_next) - np.log1p(-t) + np.log(t)


def _inside(
    window: Any, t_next: np.ndarray, columns: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The columns with ODE rows outside the window."""
    window = np.asarray(window)
    if window.dtype != bool or window.shape != t_next.shape:
        raise ValueError(
            f"window has dtype {window.dtype} and shape {window.shape}; give one bool "
            f"a step, {t_next.shape}."
        )
    return {
        "k": np.where(window, columns["k"], t_next),
        "S": np.where(window, columns.get("S", 0.0), 0.0),
        "C": np.where(window, columns.get("C", 0.0), 0.0),
    }


@PRESETS.register("ode")
def _ode(t: np.ndarray, t_next: np.ndarray) -> dict[str, Any]:
    """The probability-flow ODE by Euler steps: x' = x - h v."""
    return {"k": t_next}
