"""The smallest mesh on which a plan fits the memory of a device."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from tmdjax.core.checks import check_count, check_range
from tmdjax.train.planning.devices import Device, get_device
from tmdjax.train.planning.plan import Plan, Traced, mesh_name
from tmdjax.train.sharding import Rules, abstract_mesh

MARGIN = 0.1
"""The part of a device's memory that plans leave free."""


def smallest_mesh(
    fn: Callable[..., Any],
    *args: Any,
    device: Device | str,
    donate_argnums: int | Sequence[int] = (),
    rules: Rules = (),
    batch_argnums: Sequence[int] = (1,),
    margin: float = MARGIN,
    max_devices: int = 1024,
) -> Plan:
    """The plan on the smallest mesh whose devices have room.

    Numbers of devices are powers of two, and all of them cut parameters ('fsdp') but
    for the 'tensor' (1 without rules, at most 8) that a batch needs which does not
    divide over so many.

    Args:
        fn: see :func:`tmdjax.train.plan`.
        args: as there; so are donate_argnums, rules and batch_argnums.
        device: whose memory is to suffice.
        donate_argnums: as there.
        rules: as there.
        batch_argnums: as there.
        margin: part of the memory left free.
        max_devices: the search ends there.

    Raises:
        ValueError: no mesh of so many devices suffices.
    """
    traced = Traced(fn, args, donate_argnums, rules, batch_argnums, device)
    device = get_device(device)
    return _search(traced, device, _room(device, margin), max_devices)


def check_fits(plan: Plan, device: Device | str, margin: float = MARGIN) -> None:
    """Raises ValueError unless each device has room for the plan.

    Args:
        plan: from :func:`plan`.
        device: a :class:`tmdjax.train.Device` or its name.
        margin: part of the memory left free.
    """
    device = get_device(device)
    room = _room(device, margin)
    if plan.total <= room:
        return
    remedy = "Cut its arguments over more devices."
    if plan.traced is not None:
        try:
            found = _search(plan.traced, device, room, 1024, plan)
        except ValueError as error:
            remedy = str(error)
        else:
            remedy = (
                f"The smallest mesh that fits is {mesh_name(found.mesh)} "
                f"({found.devices} devices, {found.total / 1e9:.4g} GB each)."
            )
    raise ValueError(
        f"the step needs {plan.total / 1e9:.4g} GB a device on the mesh "
        f"{mesh_name(plan.mesh)}, but {device.name} has {room / 1e9:.4g} GB "
        f"({device.memory / 1e9:.4g} GB less a margin of {margin:.0%}). {remedy}"
    )


def _room(device: Device, margin: float) -> float:
    check_range("margin", margin, 0, 1, open_high=True)
    return device.memory * (1 - margin)


def _search(
    traced: Traced,
    device: Device,
    room: float,
    max_devices: int,
    known: Plan | None = None,
) -> Plan:
    """Does not compile for meshes that the arguments, or a share of known, overfill."""
    check_count("max_devices", max_devices)
    least, limit = (math.inf, ""), ""
    for count in [2**k for k in range(max_devices.bit_length())]:
        for tensor in (1, 2, 4, 8) if traced.rules else (1,):
            if tensor > count:
                break
            mesh = abstract_mesh(1, count // tensor, tensor)
            try:
                cuts = traced.cuts(mesh)
            except ValueError as error:  # the batch does not divide
                limit = f" Of larger meshes: {error}"
                continue
            need = traced.held(cuts)
            if known is not None:
                need = max(need, known.total * known.devices / count)
            if need <= room:
                known = traced.plan(cuts)
                if known.total <= room:
                    return known
                need = known.total
            least = min(least, (need, mesh_name(mesh.shape)))
            break  # more devices before products are cut further
    raise ValueError(
        f"no mesh of up to {max_devices} x {device.name} holds the step: it needs "
        f"at least {least[0] / 1e9:.4g} GB a device on {least[1]}, and there "
        f"are {room / 1e9:.4g} GB. Use microbatches, remat or a smaller batch.{limit}"
    )
