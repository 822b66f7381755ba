"""Networks of other codebases under this one's time and sign."""

import functools
from typing import Any

from tmdjax.core.checks import check_range
from tmdjax.core.types import ApplyFn, Data, Params, Time


def rectified_flow(apply_fn: ApplyFn, eps: float = 1e-3) -> ApplyFn:
    """A rectified-flow network (0 is noise, u = data - noise) as a velocity here.

    Its time input is 999 (tau (1 - eps) + eps) with tau = 1 - t, that is
    999 (1 - (1 - eps) t): never 0, where such networks were not trained. The remap
    is the network's alone; solvers and grids step in the t of this project.

    Args:
        apply_fn: ``(params, x, time, *inputs) -> u``, time [batch] in [999 eps, 999].
        eps: in [0, 1).

    Returns:
        ``(params, x, t, *inputs) -> v``, v = -u.

    References:
        arXiv 2209.03003 and the code of arXiv 2312.16414.
    """
    check_range("eps", eps, 0, 1, open_high=True)
    return functools.partial(_rectified_flow, apply_fn, eps)


def _rectified_flow(
    apply_fn: ApplyFn, eps: float, params: Params, x: Data, t: Time, *inputs: Any
) -> Any:
    return -apply_fn(params, x, 999 * (1 - (1 - eps) * t), *inputs)
