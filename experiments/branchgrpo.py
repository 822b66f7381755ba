"""BranchGRPO, pruned and mixed, beside DanceGRPO and MixGRPO: an arm each.

Everything they share stands in experiments/alignment.py.
"""

from experiments.alignment import (
    arms,
    describe,
    measures,
    report,
    stages,
    summary_rows,
)

__all__ = ["arms", "describe", "measures", "report", "stages", "summary_rows"]
