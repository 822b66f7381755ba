"""The smallest mesh on which a plan fits the memory of a device."""

from collections.abc import Callable, Sequence
from typing import Any

from tmdjax.core.checks import check_count, check_range
from tmdjax.train.devices import Device, get_device
from tmdjax.train.planner import AnyMesh, Plan, Traced, mesh_name
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

    Numbers of devices are powers of two; among meshes of one number the first that
    fits counts, in the order of least 'tensor' (1 without rules, at most 8), then of
    least 'fsdp'.

    Args:
        fn: see :func:`tmdjax.train.plan`.
        args: see :func:`tmdjax.train.plan`.
        device: whose memory is to suffice.
        donate_argnums: see :func:`tmdjax.train.plan`.
        rules: see :func:`tmdjax.train.plan`.
        batch_argnums: see :func:`tmdjax.train.plan`.
        margin: part of the memory left free.
        max_devices: the search ends there.

    Raises:
        ValueError: no mesh of so many devices suffices.
    """
    traced = Traced(fn, args, donate_argnums, rules, batch_argnums, device)
    return _search(
        traced.plan, get_device(device), margin, max_devices, tensor=bool(rules)
    )


def check_fits(plan: Plan, device: Device | str, margin: float = MARGIN) -> None:
    """Raises ValueError unless each device has room for the plan.

    Args:
        plan: from :func:`tmdjax.train.plan`.
        device: a :class:`tmdjax.train.Device` or its name.
        margin: part of the memory left free.
    """
    check_range("margin", margin, 0, 1, open_high=True)
    device = get_device(device)
    room = device.memory * (1 - margin)
    if plan.total <= room:
        return
    remedy = "Cut its arguments over more devices."
    if plan.on is not None:
        try:
            found = _search(plan.on, device, margin, 1024, tensor=True)
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


def _search(
    on: Callable[[AnyMesh], Plan],
    device: Device,
    margin: float,
    max_devices: int,
    *,
    tensor: bool,
) -> Plan:
    check_range("margin", margin, 0, 1, open_high=True)
    check_count("max_devices", max_devices)
    room = device.memory * (1 - margin)
    least: Plan | None = None
    refused: ValueError | None = None
    count = 1
    while count <= max_devices:
        for cut in (1, 2, 4, 8) if tensor else (1,):
            if cut > count:
                break
            try:
                smallest = on(abstract_mesh(1, count // cut, cut))
            except ValueError as error:  # the batch does not divide
                refused = error
                continue
            if least is None or smallest.total < least.total:
                least = smallest
            if smallest.total > room:
                continue
            fsdp = 1  # as much 'data' as fits: fewer collectives
            while fsdp < count // cut:
                found = on(abstract_mesh(count // cut // fsdp, fsdp, cut))
                if found.total <= room:
                    return found
                fsdp *= 2
            return smallest
        count *= 2
    if least is None:
        assert refused is not None
        raise refused
    limit = f" Of larger meshes: {refused}" if refused else ""
    raise ValueError(
        f"no mesh of up to {max_devices} x {device.name} holds the step: it needs "
        f"{least.total / 1e9:.4g} GB a device on {mesh_name(least.mesh)}, and there "
        f"are {room / 1e9:.4g} GB. Use microbatches, remat or a smaller batch.{limit}"
    )
