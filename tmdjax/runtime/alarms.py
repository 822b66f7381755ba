"""What RL on a language model warns of, once each in a process, and how to mend it."""

import logging
import math
from collections.abc import Mapping

from tmdjax.core.types import Params
from tmdjax.quant import Precision, share_floored, share_padded
from tmdjax.runtime.settings import LanguageSettings

MOST_FLOORED = 0.5
"""Of the groups of 8-bit weights, above which a warning is given."""

_LOGGER = logging.getLogger(__name__)


class Alarms:
    """Looks at the metrics of each iteration; bounds are those of the settings.

    It warns of log-probs that are not finite, of rollouts that are another policy than
    the one that is trained, of importance weights that leave few effective tokens, and
    of 8-bit weights that stay as they are while the weights behind them are trained,
    that are too small for their scales, or whose groups of 128 have to be padded.
    What was said is not part of the state of a run: one that is resumed says it again,
    and counts iterations in a row anew.
    """

    def __init__(self, settings: LanguageSettings, precision: Precision | None = None):
        """For one run.

        Args:
            settings: the bounds.
            precision: recipes of rollout and training, of which a warning speaks.
        """
        self._settings = settings
        self._why = "" if precision is None else precision.disagreement()
        self._said: set[str] = set()
        self._unchanged = 0

    def look(
        self, metrics: Mapping[str, float], published: Params | None = None
    ) -> None:
        """Warns through the logger ``tmdjax.runtime.alarms``.

        Args:
            metrics: of an iteration: 'effective_sample_fraction'; 'mismatch_kl' where
                weights of now wrote any response; 'quantised_moved' where rollouts are
                quantised.
            published: what the engine was given, quantised or not.
        """
        self._look_at_groups(published)
        settings, why = self._settings, f": {self._why}" if self._why else ""
        kl = metrics.get("mismatch_kl", 0.0)
        fraction = metrics["effective_sample_fraction"]
        if not (math.isfinite(kl) and math.isfinite(fraction)):
            self._warn(
                f"log-probs that are not finite: mismatch_kl={kl:.3g} and "
                f"effective_sample_fraction={fraction:.3g}. Rollouts or training gave "
                f"a NaN or an infinity; updates whose gradient has one are skipped. "
                f"models.first_non_finite names the parameter or layer of a decoder. "
                f"Lower the learning rate, or compute in more bits (precision.rollout "
                f"and precision.train)."
            )
        elif kl > settings.max_mismatch_kl:
            self._warn(
                f"mismatch_kl={kl:.3g} is above max_mismatch_kl="
                f"{settings.max_mismatch_kl:g}: under the same weights rollouts and "
                f"training are two policies{why}. Give both one recipe that does not "
                f"depend on the batch (precision.rollout = precision.train), or "
                f"correct for it (correction='truncate' of the objective)."
            )
        least = settings.min_effective_sample_fraction
        if fraction < least:
            self._warn(
                f"effective_sample_fraction={fraction:.3g} is below "
                f"min_effective_sample_fraction={least:g}: a few tokens carry the "
                f"weights of all. Bring rollouts and training together (one recipe for "
                f"both, train_prompt='sampled'), or bound the weights (max_weight of "
                f"the objective)."
            )
        self._unchanged = (
            self._unchanged + 1 if metrics.get("quantised_moved") == 0 else 0
        )
        if self._unchanged >= settings.frozen_after:
            self._warn(
                f"published policy frozen: quantised_moved=0 in each of the last "
                f"{self._unchanged} iterations (frozen_after={settings.frozen_after}): "
                f"updates are none or below a step of 8 bits, and rollouts stay "
                f"the same. Raise the learning rate, or keep rollouts in more bits "
                f"(precision.rollout='bf16')."
            )

    def _look_at_groups(self, published: Params | None) -> None:
        padded, floored = share_padded(published), share_floored(published)
        if padded:
            self._warn(
                f"quantised_padded={padded:.1%}: so much of the 8-bit weights is "
                f"padding once their groups are whole. A kernel multiplies it too; "
                f"emulation does not. It is none where all widths are multiples of 128."
            )
        if floored > MOST_FLOORED:
            self._warn(
                f"quantised_floored={floored:.1%}: so many groups of 8-bit weights "
                f"have no number above 1e-4, below which scales do not follow: they "
                f"keep few bits or none. Look whether weights are what they should be "
                f"(a checkpoint in other units, a weight decay too strong), or keep "
                f"rollouts in more bits (precision.rollout='bf16')."
            )

    def _warn(self, message: str) -> None:
        kind = message.partition("=")[0]
        if kind not in self._said:
            self._said.add(kind)
            _LOGGER.warning("%s", message)
