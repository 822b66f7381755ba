"""Rotary frequencies scaled to texts longer than a decoder was first trained on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tmdjax.core.checks import check_choice, check_count, check_range

_LENGTH = "original_max_position_embeddings"
# Of each kind: the keys it needs in config.json, and those it may have.
KINDS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _LENGTH), ()),
    "yarn": (
        ("factor", _LENGTH),
        (
            *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
            "truncate",
        ),
    ),
    "longrope": (("short_factor", "long_factor", _LENGTH, "attention_factor"), ()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies θ^(-2i / head_dim) are slowed down, under HF's names.

    Attributes:
        rope_type: 'linear' divides all by ``factor``; 'llama3' the slow ones, whose
            wavelength is above original length / low_freq_factor, and blends up to
            original length / high_freq_factor; 'yarn' blends between the frequencies
            that turn beta_fast and beta_slow times within the original length, and
            scales cosines and sines; 'longrope' divides each by a factor of its own.
        factor: of the slowest frequencies, above 0.
        original_max_position_embeddings: positions of the first training.
        low_freq_factor: of 'llama3', above 0.
        high_freq_factor: of 'llama3', above ``low_freq_factor``.
        attention_factor: scale of cosines and sines under 'yarn' and 'longrope'; None
            is 0.1 ln(factor) + 1 under 'yarn', and 1 under 'longrope'.
        beta_fast: of 'yarn', turns.
        beta_slow: of 'yarn', turns.
        mscale: of 'yarn', with ``mscale_all_dim``: attention_factor is the ratio of
            0.1 mscale ln(factor) + 1 to the same of mscale_all_dim.
        mscale_all_dim: of 'yarn'.
        truncate: of 'yarn', whether the ends of the blend are whole numbers.
        short_factor: of 'longrope', one divisor a frequency, [head_dim / 2].
        long_factor: equal to ``short_factor``: no rotation here depends on the length.

    Raises:
        TypeError: a length that is no integer.
        ValueError: an unknown type, a number that is missing or out of range, factors
            that depend on the length of a text.

    References:
        arXiv 2306.15595 (linear), 2407.21783 (llama3), 2309.00071 (yarn), 2402.13753
        (longrope); ``modeling_rope_utils`` of transformers.
    """

    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: Any = None
    long_factor: Any = None

    def __post_init__(self):
        check_choice("rope_type", self.rope_type, KINDS)
        needed, optional = KINDS[self.rope_type]
        for name, value in self._given().items():
            if name not in ("rope_type", *needed, *optional):
                raise ValueError(
                    f"{name}={value!r} is no setting of rope_type={self.rope_type!r}; "
                    f"it has {', '.join((*needed, *optional))}."
                )
            if name in ("short_factor", "long_factor"):
                object.__setattr__(self, name, tuple(map(float, value)))
                for one in getattr(self, name):
                    check_range(name, one, 0, math.inf, open_low=True, open_high=True)
            elif name == _LENGTH:
                check_count(name, value)
            elif name not in ("rope_type", "truncate"):
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"{name}={value!r} is no number.")
                check_range(name, value, 0, math.inf, open_low=True, open_high=True)
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"rope_type={self.rope_type!r} lacks {', '.join(missing)}; take the "
                f"configuration that came with the weights."
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not low < high:
            raise ValueError(
                f"high_freq_factor={high} must be above {low}, the low one."
            )
        if self.short_factor != self.long_factor:
            raise ValueError(
                "short_factor and long_factor differ: the rotation would depend on the "
                "length of a text; the decoder has one for all lengths."
            )

    def _given(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_hf(self) -> dict[str, Any]:
        """The settings as config.json has them, lists for tuples."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._given().items()
        }

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.factor
        if self.rope_type != "yarn" or factor is None or factor <= 1:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            own, every = self.mscale, self.mscale_all_dim
            return (0.1 * own * math.log(factor) + 1) / (
                0.1 * every * math.log(factor) + 1
            )
        return 0.1 * math.log(factor) + 1

    def scaled(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """The frequencies, slowed down.

        Args:
            frequencies: θ^(-2i / head_dim) as float64 [head_dim / 2].
            theta: θ.

        Raises:
            ValueError: another number of factors than frequencies.
        """
        if self.rope_type == "longrope":
            if len(self.short_factor) != len(frequencies):
                raise ValueError(
                    f"short_factor has {len(self.short_factor)} numbers; give one a "
                    f"frequency, head_dim / 2 = {len(frequencies)}."
                )
            return frequencies / np.asarray(self.short_factor)
        slow = frequencies / self.factor
        if self.rope_type == "linear":
            return slow
        length = self.original_max_position_embeddings
        assert length is not None  # checked above
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            assert low is not None and high is not None  # checked above
            turns = length * frequencies / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
        else:
            width = 2 * len(frequencies)

            def index(turns: float) -> float:
                """Where a frequency turns that often within the original length."""
                return (
                    width
                    * math.log(length / (turns * 2 * math.pi))
                    / (2 * math.log(theta))
                )

            first, last = index(self.beta_fast or 32), index(self.beta_slow or 1)
            if self.truncate is not False:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, width - 1)
            last += 0.001 * (first == last)
            ramp = (np.arange(len(frequencies)) - first) / (last - first)
            kept = 1 - np.clip(ramp, 0, 1)
        return slow * (1 - kept) + frequencies * kept


def rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from a config.json, of transformers 5 or older.

    Raises:
        ValueError: two that disagree; a type that is not known, a key that its type
            has not, a number that is missing or out of range.
    """
    bases = {"rope_theta": config.get("rope_theta")}
    scalings = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ValueError(f"{key}={rope!r} is no mapping.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        bases[key] = rope.get("rope_theta")
        aside = ("rope_theta", "rope_type", "type", "finetuned")
        given = {k: v for k, v in rope.items() if k not in aside and v is not None}
        if given.get("partial_rotary_factor") == 1:
            del given["partial_rotary_factor"]
        if not isinstance(kind, str):
            raise ValueError(f"{key} has rope_type={kind!r}, which is no text.")
        if kind not in KINDS and (kind != "default" or given):
            raise ValueError(
                f"{key} has rope_type={kind!r}"
                f"{f' and {sorted(given)}' if given else ''}; the decoder has the "
                f"'default' rotation, and {', '.join(KINDS)}."
            )
        scalings[key] = None
        if kind in KINDS:
            needed, optional = KINDS[kind]
            odd = sorted(given.keys() - {*needed, *optional})
            if odd:
                raise ValueError(f"{key} has rope_type={kind!r} and {odd}, not known.")
            if _LENGTH in needed:  # as transformers has it
                given.setdefault(_LENGTH, config.get("max_position_embeddings"))
            try:
                scalings[key] = RopeScaling(rope_type=kind, **given)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{key}: {error}") from None
    given = {key: base for key, base in bases.items() if base is not None}
    for key, base in given.items():
        inside = "rope_theta" if key == "rope_theta" else f"{key}: rope_theta"
        if isinstance(base, bool) or not isinstance(base, int | float):
            raise ValueError(f"{inside}={base!r} is no number.")
        check_range(inside, base, 0, math.inf, open_low=True, open_high=True)
    for found in (given, scalings):
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise ValueError(f"{' and '.join(found)} disagree: {values}; keep one.")
    scaling = next(iter(scalings.values()), None)
    return float(next(iter(given.values()), 10000.0)), scaling
