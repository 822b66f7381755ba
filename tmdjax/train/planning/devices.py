"""What accelerators can do at most, by their vendors' figures."""

import dataclasses
from collections.abc import Mapping

from tmdjax.core.checks import check_range
from tmdjax.core.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator.

    Attributes:
        name: as people call it.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        peak: dense FLOP/s by the dtype of a product's operands; one that is missing
            counts as 'float32'.
        fused_attention: whether ``models.attention`` runs there without making scores
            (16-bit, head_dim <= 128).
    """

    name: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]
    fused_attention: bool = False

    def __post_init__(self) -> None:
        if "float32" not in self.peak:
            raise ValueError(
                f"peak of {self.name!r} names {sorted(self.peak)}; 'float32' must be "
                f"there, which stands for dtypes that are not."
            )
        figures = {"memory": self.memory, "bandwidth": self.bandwidth}
        figures |= {f"peak[{dtype!r}]": value for dtype, value in self.peak.items()}
        for name, value in figures.items():
            check_range(name, value, 0, open_low=True)


_A100 = {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12}
_HOPPER = {
    "float32": 66.9e12,
    **dict.fromkeys(("bfloat16", "float16"), 989.4e12),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "int8"), 1978.9e12),
}


def _tpu(half: float, int8: float) -> dict[str, float]:
    # A float32 product of full precision is six passes of bfloat16.
    return {"bfloat16": half, "int8": int8, "float32": half / 6}


DEVICES: Registry[Device] = Registry("device")
"""Dense figures of the vendors: data sheets of A100, H100 SXM and H200 (float32 without
TF32, as our fp32 recipe runs), Cloud TPU's pages of v5e, v5p and v6e. A large bfloat16
product reaches about 72 % of an H100's."""

for _name, _memory, _bandwidth, _peak, _fused in (
    ("a100", 80e9, 2.039e12, _A100, True),
    ("h100", 80e9, 3.35e12, _HOPPER, True),
    ("h200", 141e9, 4.8e12, _HOPPER, True),
    ("v5e", 16e9, 0.819e12, _tpu(197e12, 394e12), False),
    ("v5p", 95e9, 2.765e12, _tpu(459e12, 918e12), False),
    ("v6e", 32e9, 1.64e12, _tpu(918e12, 1836e12), False),
):
    DEVICES.register(_name)(
        Device(
            name=_name,
            memory=_memory,
            bandwidth=_bandwidth,
            peak=_peak,
            fused_attention=_fused,
        )
    )


def get_device(device: Device | str) -> Device:
    """A device by name, or the one given.

    Raises:
        ValueError: no device of that name.
    """
    return DEVICES[device] if isinstance(device, str) else device
