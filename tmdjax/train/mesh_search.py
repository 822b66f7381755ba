"""The smallest mesh on which a plan fits the memory of a device."""

from collections.abc import Callable, Sequence
from typing import Any

from tmdjax.core.checks import check_count, check_range
from tmdjax.train.devices import Device, get_device
from tmdjax.train.planner import Plan, Traced, mesh_name
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
    divide over so many. A mesh is not compiled for whose devices hold too much by its
    arguments alone, or by their share of what a smaller one holds.

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
    return _search(traced, get_device(device), margin, max_devices)


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
    if plan.traced is not None:
        try:
            found = _search(plan.traced, device, margin, 1024, plan)
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
    traced: Traced,
    device: Device,
    margin: float,
    max_devices: int,
    known: Plan | None = None,
) -> Plan:
    check_range("margin", margin, 0, 1, open_high=True)
    check_count("max_devices", max_devices)
    room = device.memory * (1 - margin)
    refused: ValueError | None = None
    least: tuple[float, str] | None = None
    count = 1
    while count <= max_devices:
        for cut in (1, 2, 4, 8) if traced.rules else (1,):
            if cut > count:
                break
            mesh = abstract_mesh(1, count // cut, cut)
            try:
                need = traced.held(mesh)
            except ValueError as error:  # the batch does not divide
                refused = error
                continue
            if known is not None:
                need = max(need, known.total * known.devices / count)
            if need <= room:
                known = traced.plan(mesh)
                need = known.total
                if need <= room:
                    return known
            if least is None or need < least[0]:
                least = need, mesh_name(mesh.shape)
            break  # more devices before products are cut further
        count *= 2
    if least is None:
        assert refused is not None
        raise refused
    limit = f" Of larger meshes: {refused}" if refused else ""
    raise ValueError(
        f"no mesh of up to {max_devices} x {device.name} holds the step: it needs "
        f"at least {least[0] / 1e9:.4g} GB a device on {least[1]}, and there "
        f"are {room / 1e9:.4g} GB. Use microbatches, remat or a smaller batch.{limit}"
    )
