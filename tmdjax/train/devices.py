"""What accelerators can do at most, by their vendors' figures."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

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
        for name in ("memory", "bandwidth"):
            check_range(name, getattr(self, name), 0, open_low=True)
        if "float32" not in self.peak:
            raise ValueError(
                f"peak of {self.name!r} names {sorted(self.peak)}; 'float32' must be "
                f"there, which stands for dtypes that are not."
            )
        for dtype, value in self.peak.items():
            check_range(f"peak[{dtype!r}]", value, 0, open_low=True)
        # The caller's dict may change.
        object.__setattr__(self, "peak", MappingProxyType(dict(self.peak)))

    def seconds(self, flops: Mapping[str, float], moved: float) -> float:
        """The roofline: no device of this kind is faster.

        Args:
            flops: by the dtype of the operands.
            moved: bytes read and written.

        References:
            Williams, Waterman, Patterson, 'Roofline' (2009).
        """
        compute = sum(
            count / self.peak.get(dtype, self.peak["float32"])
            for dtype, count in flops.items()
        )
        return max(compute, moved / self.bandwidth)


def _nvidia(half: float, eight_bit: float | None, single: float) -> dict[str, float]:
    peak = {"bfloat16": half, "float16": half, "float32": single}
    if eight_bit is not None:
        peak |= {"float8_e4m3fn": eight_bit, "float8_e5m2": eight_bit}
        peak |= {"int8": eight_bit}
    return peak


def _tpu(half: float, int8: float) -> dict[str, float]:
    # A float32 product of full precision is six passes of bfloat16.
    return {"bfloat16": half, "int8": int8, "float32": half / 6}


DEVICES: Registry[Device] = Registry("device")
"""Dense figures of the vendors: data sheets of A100, H100 SXM and H200 (float32 without
TF32, as our fp32 recipe runs), Cloud TPU's pages of v5e, v5p and v6e. A large bfloat16
product reaches about 72 % of an H100's."""

for _device in (
    Device(
        name="a100",
        memory=80e9,
        bandwidth=2.039e12,
        peak=_nvidia(312e12, None, 19.5e12),
        fused_attention=True,
    ),
    Device(
        name="h100",
        memory=80e9,
        bandwidth=3.35e12,
        peak=_nvidia(989.4e12, 1978.9e12, 66.9e12),
        fused_attention=True,
    ),
    Device(
        name="h200",
        memory=141e9,
        bandwidth=4.8e12,
        peak=_nvidia(989.4e12, 1978.9e12, 66.9e12),
        fused_attention=True,
    ),
    Device(name="v5e", memory=16e9, bandwidth=0.819e12, peak=_tpu(197e12, 394e12)),
    Device(name="v5p", memory=95e9, bandwidth=2.765e12, peak=_tpu(459e12, 918e12)),
    Device(name="v6e", memory=32e9, bandwidth=1.64e12, peak=_tpu(918e12, 1836e12)),
):
    DEVICES.register(_device.name)(_device)


def get_device(device: Device | str) -> Device:
    """A device by name, or the one given.

    Raises:
        ValueError: no device of that name.
    """
    return DEVICES[device] if isinstance(device, str) else device
