"""Whether a plan fits the memory of a device, and the smallest mesh where it does."""

import math

from tmdjax.core.checks import check_range
from tmdjax.train.planning.devices import Device, get_device
from tmdjax.train.planning.plan import StepPlan, mesh_name
from tmdjax.train.sharding import abstract_mesh

MARGIN = 0.1
"""The part of a device's memory that plans leave free."""

MOST_DEVICES = 1024
"""The search for a mesh ends there."""


def check_fits(plan: StepPlan, device: Device | str, margin: float = MARGIN) -> None:
    """Raises ValueError unless each device has room for the plan.

    Args:
        plan: from :func:`plan`.
        device: a :class:`tmdjax.train.Device` or its name.
        margin: part of the memory left free.
    """
    device = get_device(device)
    check_range("margin", margin, 0, 1, open_high=True)
    room = device.memory * (1 - margin)
    if plan.total <= room:
        return
    try:
        found = _smallest(plan, device, room)
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


def _smallest(known: StepPlan, device: Device, room: float) -> StepPlan:
    """The plan on the smallest mesh whose devices have room.

    Numbers of devices are powers of two, and all of them cut parameters ('fsdp') but
    for the 'tensor' (1 without rules, at most 8) that a batch needs which does not
    divide over so many. Meshes that the arguments, or a share of the known plan,
    overfill are not compiled for.
    """
    traced = known.traced
    least, limit = (math.inf, ""), ""
    for count in [2**k for k in range(MOST_DEVICES.bit_length())]:
        for tensor in (1, 2, 4, 8) if traced.rules else (1,):
            if tensor > count:
                break
            mesh = abstract_mesh(1, count // tensor, tensor)
            try:
                cuts = traced.cuts(mesh)
            except ValueError as error:  # the batch does not divide
                limit = f" Of larger meshes: {error}"
                continue
            need = max(traced.held(cuts), known.total * known.devices / count)
            if need <= room:
                known = traced.plan(cuts)
                if known.total <= room:
                    return known
                need = known.total
            least = min(least, (need, mesh_name(mesh.shape)))
            break  # more devices before products are cut further
    raise ValueError(
        f"no mesh of up to {MOST_DEVICES} x {device.name} holds the step: it needs "
        f"at least {least[0] / 1e9:.4g} GB a device on {least[1]}, and there "
        f"are {room / 1e9:.4g} GB. Use microbatches, remat or a smaller batch.{limit}"
    )
