"""PolicyFlow beside Gaussian PPO and FPO: an arm each.

Everything they share stands in experiments/control.py.
"""

from experiments.control import (
    PAIRING,
    arms,
    describe,
    measures,
    report,
    stages,
    summary_rows,
)

__all__ = [
    "PAIRING",
    "arms",
    "describe",
    "measures",
    "report",
    "stages",
    "summary_rows",
]
