"""Group-relative policy optimisation of a language model, and its relatives.

One objective with the switches that tell them apart,
:class:`tmdjax.runtime.GroupRelativeObjective`; :data:`PRESETS` has the published
settings. The iteration is that of :mod:`tmdjax.runtime.lm_rl`.

References:
    GRPO: arXiv 2402.03300. Dr. GRPO: 2503.20783. RLOO: 2402.14740. DAPO: 2503.14476.
    GSPO: 2507.18071. CISPO: 2506.13585. SAPO: 2511.20347. Decoupled: 2505.24298.
"""

from typing import Any

from tmdjax.core.checks import check_choice, check_fields
from tmdjax.runtime import GroupRelativeObjective

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"scale": "none", "aggregation": "seq-mean-token-sum-norm"},
    "rloo": {
        "baseline": "leave_one_out",
        "scale": "none",
        "aggregation": "seq-mean-token-sum",
    },
    "dapo": {"clip_range": (0.2, 0.28), "aggregation": "token-mean"},
    "gspo": {"surrogate": "sequence", "clip_range": (3e-4, 4e-4)},
    "cispo": {
        "surrogate": "cispo",
        "clip_range": (1.0, 2.0),
        "aggregation": "token-mean",
    },
    "sapo": {"surrogate": "sapo"},
    "decoupled": {
        "correction": "reject",
        "max_weight": 5.0,
        "aggregation": "token-mean",
    },
}
"""Settings by method. 'grpo' has no KL term (its paper: ``kl_coefficient=0.04`` and
'k3'); DAPO also samples dynamically (a setting of the iteration); 'decoupled' divides
by the tokens of the minibatch, those it rejects included, as AReaL does, and needs
``proximal='recompute'``, which 'auto' takes."""


def preset(name: str, **changes: Any) -> GroupRelativeObjective:
    """The objective of a published method.

    Args:
        name: one of :data:`PRESETS`.
        **changes: fields of :class:`GroupRelativeObjective`.

    Raises:
        ValueError: an unknown name, or options out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, PRESETS)
    check_fields(GroupRelativeObjective, changes)
    return GroupRelativeObjective(**PRESETS[name] | changes)
