"""Seconds of a step, as data: measured in one run, used to simulate others."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping

import numpy as np

from tmdjax.core.checks import brief
from tmdjax.core.files import json_of, write_atomically
from tmdjax.core.registry import suggestion
from tmdjax.runtime.events import Event


@dataclasses.dataclass(frozen=True)
class Costs:
    """A step takes the sum of its amounts, each times its rate.

    Such as a chunk of decoding, whose time has a part that every step takes, however
    many slots are idle, and a part that every token takes:
    ``Costs({"decode": {"slot_steps": 1e-4, "drawn": 2e-5, "prefilled": 1e-6}})``.

    Attributes:
        rates: seconds an amount, by what is done and by the name of the amount. A step
            without amounts, such as one of the controller, is free; an amount without a
            rate costs nothing.
        source: where the rates are from, such as the device they were measured on.
    """

    rates: Mapping[str, Mapping[str, float]]
    source: str = ""

    def __post_init__(self) -> None:
        for what, rates in self.rates.items():
            for name, rate in rates.items():
                if not (isinstance(rate, int | float) and 0 <= rate < math.inf):
                    raise ValueError(
                        f"the rate of {name!r} in {what!r} is {brief(rate)}; give "
                        f"seconds, finite and >= 0."
                    )

    def seconds(self, what: str, amounts: Mapping[str, float]) -> float:
        """Seconds of a step.

        Raises:
            ValueError: no rates for what is done, or one for an amount that it lacks.
        """
        if not amounts:
            return 0.0
        if what not in self.rates:
            raise ValueError(
                f"there are no costs of {what!r}, only of {', '.join(self.rates)}; add "
                f"it, with {{}} if it is to be free.{suggestion(what, self.rates)}"
            )
        for name in self.rates[what]:
            if name not in amounts:
                raise ValueError(
                    f"the costs of {what!r} have a rate for {name!r}, but its amounts "
                    f"are {', '.join(amounts)}.{suggestion(name, amounts)}"
                )
        return sum(rate * amounts[name] for name, rate in self.rates[what].items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes them as JSON."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1).encode())


def load_costs(path: str | os.PathLike[str]) -> Costs:
    """What :meth:`Costs.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or rates out of range.
    """
    found = json_of(path)
    try:
        rates = {what: dict(rates) for what, rates in found["rates"].items()}
        source = found["source"]
        whole = set(found) == {"rates", "source"} and isinstance(source, str)
    except (AttributeError, KeyError, TypeError, ValueError):
        rates, source, whole = {}, "", False
    if not whole:
        raise ValueError(
            f"{os.fspath(path)} holds no costs: it must be an object of 'rates' (by "
            f"what is done, then by amount) and 'source', as Costs.save writes it."
        )
    return Costs(rates, source)


def calibrate(events: Iterable[Event], source: str) -> Costs:
    """The rates that explain best how long the steps of a run took.

    Least squares over the steps of each kind, no rate below 0. First steps compile:
    leave them out.

    Args:
        events: of a run on the clock of a machine.
        source: of the rates, such as :func:`tmdjax.harness.environment.device_name`.

    Raises:
        ValueError: no step has amounts.
    """
    from scipy.optimize import nnls  # takes a while to import

    kinds: dict[str, list[Event]] = {}
    for event in events:
        if event.amounts:
            kinds.setdefault(event.what, []).append(event)
    if not kinds:
        raise ValueError(
            "no step has amounts, so there is nothing to calibrate by; give the events "
            "of a run whose workers say what they did."
        )
    found = {}
    for what, steps in kinds.items():
        names = sorted({name for event in steps for name in event.amounts})
        amounts = np.array([[e.amounts.get(name, 0) for name in names] for e in steps])
        seconds = np.array([e.end - e.begin for e in steps])
        unit = np.maximum(np.abs(amounts).max(axis=0), 1e-300)
        rates, _ = nnls(amounts / unit, seconds)
        found[what] = {
            name: float(rate) for name, rate in zip(names, rates / unit) if rate
        }
    return Costs(found, source)
