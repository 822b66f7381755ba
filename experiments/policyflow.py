"""PolicyFlow beside Gaussian PPO and FPO: an arm each.

Everything they share stands in experiments/control.py.
"""

from experiments.control import (
    PAIRING,
    REPORT_ARMS,
    arms,
    describe,
    measures,
    report,
    stages,
    summary_rows,
)

__all__ = [
    "PAIRING",
    "REPORT_ARMS",
    "arms",
    "describe",
    "measures",
    "report",
    "stages",
    "summary_rows",
]
