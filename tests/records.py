"""Units of runs and claims about them, for tests of records and of what shows them."""

import re

import pytest

from tmdjax.harness.claims import Claim


def unit(arm, seed, metrics, **changes):
    """What a run notes of one arm under one seed."""
    same = {"wall_s": 1.0, "peak_memory_gb": None, "device": "cpu, 2 cores"}
    same |= {"commit": "abc", "versions": {}, "labels": {}}
    return {"arm": arm, "seed": seed, "metrics": metrics, **same, **changes}


def claim(**changes):
    fields = {"id": "B1", "statement": "Bellman grids beat uniform ones"}
    fields |= {"published": "1.5x", "statistic": "difference", "direction": "greater"}
    fields |= {"threshold": 0.0, "ours": "boss/score", "baseline": "uniform/score"}
    return Claim(**(fields | changes))


def refuses(words, call, *arguments, **options):
    """An error of one line that says these words as they stand."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
