"""Runs on a virtual clock, by lengths of responses and costs of work alone.

A device generates or trains. Where a schedule has the two take turns, all devices do
the one and then the other; else a part of them trains while the others generate.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.work_rates import Rates
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.runtime import (
    Controller,
    Generator,
    Prompt,
    Schedule,
    Scorer,
    SimulatedEngine,
    Trainer,
    Trajectory,
    TrajectoryStore,
)
from tmdjax.runtime.events import Event, staleness, total, utilisation
from tmdjax.runtime.executors import Simulated
from tmdjax.systems import april, areal

MEASURES = {
    "hours": "simulated hours until the last update was done",
    "rollout": "tokens trained on, a simulated second in which generators may write "
    "(all of them where generation and training overlap)",
    "generated": "tokens written, a simulated second, whether trained on or not",
    "first_batch": "simulated hours until the first batch is full",
    "generate_busy": "share of their time in which generators work, in [0, 1]",
    "train_busy": "share of their time in which trainers work, in [0, 1]",
    "off_policy": "share of the tokens trained on that earlier weights wrote, in "
    "[0, 1]",
    "lag_max": "most updates that the weights are ahead of a token trained on",
    "length_ratio": "mean length of the responses trained on, over that of all that "
    "were asked for",
    "discarded": "share of the tokens written whose response was discarded, in [0, 1]",
}


def schedule_of(
    name: str, *, eta: float = 0, factor: int = 1, recycle: bool = True, **sizes: Any
) -> Schedule:
    """A schedule by the system that it is of.

    Args:
        name: 'areal', whose eta = 0 is the synchronous loop, or 'april'.
        eta: most updates that the weights are ahead of a token, of 'areal'.
        factor: groups that a round of 'april' begins with, over those of an update.
        recycle: False has 'april' discard what a round leaves unfinished.
        **sizes: batch, samples, max_new_tokens, updates, slots.

    Raises:
        ValueError: an unknown name, or a number out of range.
        TypeError: an unknown size.
    """
    check_choice("schedule.name", name, ("areal", "april"))
    if name == "areal":
        return areal.schedule(eta=eta, **sizes)
    batch = sizes.pop("batch")
    return april.schedule(
        batch,
        factor * batch,
        recycle=recycle,
        allow_repeats=True,  # prompts without content are all alike
        **sizes,
    )


def takes_turns(schedule: Schedule) -> bool:
    """Whether nothing is written while an update is under way."""
    return schedule.most_ahead == schedule.batch or schedule.when_full != "continue"


def lognormal_lengths(
    mean: float, sigma: float, longest: int, seed: int
) -> Callable[[int], int]:
    """The length of the response to a request, by its number.

    Under one seed a request draws the same normal number whatever mean and sigma are.

    Args:
        mean: of the distribution before it is cut, in tokens, >= 1.
        sigma: standard deviation of log lengths, >= 0; 0 makes all of them equal.
        longest: where longer ones are cut, in tokens, >= mean.
        seed: of the lengths.

    Raises:
        ValueError: a number out of range.
    """
    check_range("sigma", sigma, 0)
    check_range("mean", mean, 1, longest)
    middle = math.log(mean) - sigma**2 / 2

    def length_of(number: int) -> int:
        normal = np.random.default_rng([seed, number]).standard_normal()
        return int(np.clip(round(math.exp(middle + sigma * normal)), 1, longest))

    return length_of


class Simulation(NamedTuple):
    """What a simulated run leaves.

    Attributes:
        events: of all workers.
        account: what became of every request.
        workers: names of all workers.
        schedule: of the run.
        length_of: tokens of a response by its request.
    """

    events: list[Event]
    account: list[Trajectory]
    workers: list[str]
    schedule: Schedule
    length_of: Callable[[int], int]


def simulate(
    schedule: Schedule,
    rates: Rates,
    length_of: Callable[[int], int],
    *,
    devices: int,
    train: int,
    chunk: int,
    prompt: int,
    interruptible: bool = True,
) -> Simulation:
    """Runs a schedule to its last update.

    Args:
        schedule: of the run; its slots are those of a device.
        rates: of a device.
        length_of: tokens of the response to a request, by its number.
        devices: of both roles together, >= 2.
        train: how many of them train where generation and training overlap, in
            [1, devices - 1].
        chunk: steps of decoding between two looks at what has ended, >= 1.
        prompt: tokens of a prompt, >= 1.
        interruptible: whether a generator takes new weights in the middle of texts.

    Raises:
        ValueError: a number out of range, or a run that gets stuck.
    """
    generators, trainers = roles(schedule, devices, train)
    engines = [f"generate/{i}" for i in range(generators)]
    tokens = (0,) * check_count("prompt", prompt)
    store = TrajectoryStore(None)
    control = Controller(
        schedule, store, lambda number: Prompt(tokens, None), engines, ["reward/0"]
    )

    def generator() -> Generator:
        engine = SimulatedEngine(length_of, slots=schedule.slots, steps=chunk)
        return Generator(engine, interruptible=interruptible)

    workers: dict[str, Callable[[], Any]] = {
        "control": lambda: control,
        **dict.fromkeys(engines, generator),
        "reward/0": lambda: Scorer(lambda record, problem: (0.0, 0.0)),
        "train": lambda: Trainer(dict, lambda batch: {}),
    }
    events: list[Event] = []
    Simulated(rates.costs(schedule.slots, trainers)).run(workers, events.append)
    with store:
        return Simulation(events, store.select(), [*workers], schedule, length_of)


def roles(schedule: Schedule, devices: int, train: int) -> tuple[int, int]:
    """How many devices generate, and how many train.

    Raises:
        ValueError: a role without a device.
    """
    if not 1 <= train < devices:
        raise ValueError(
            f"devices.train={train} of devices.count={devices}: at least one device "
            f"must train, and one generate, where the two overlap."
        )
    return (devices, devices) if takes_turns(schedule) else (devices - train, train)


def measured(run: Simulation) -> dict[str, float]:
    """The :data:`MEASURES` of a run.

    Where the roles take turns, a device trains once it has ended the chunk of decoding
    in which a batch became full. On the clock of the run trainers do not wait for that,
    as if they were other devices: hours count it.
    """
    learn = [event for event in run.events if event.what == "learn"]
    seconds, rollout, first = learn[-1].end, learn[-1].end, learn[0].begin
    if takes_turns(run.schedule):
        late = [_overlap(run.events, event) for event in learn]
        seconds, first = seconds + sum(late), first + late[0]
        rollout = seconds - sum(event.end - event.begin for event in learn)
    trained = [known.length for known in run.account if known.state == "consumed"]
    asked = [run.length_of(known.number) for known in run.account]
    usage, lags = utilisation(run.events, run.workers), staleness(run.events)
    in_time = (event for event in run.events if event.end <= learn[-1].end)
    gone = sum(known.length for known in run.account if known.state == "discarded")
    return {
        "hours": seconds / 3600,
        "rollout": sum(trained) / rollout,
        "generated": total(in_time, "decode", "drawn") / seconds,
        "first_batch": first / 3600,
        "generate_busy": usage["generate"].share,
        "train_busy": usage["train"].share,
        "off_policy": 1 - lags.get(0, 0) / sum(lags.values()),
        "lag_max": float(max(lags)),
        "length_ratio": float(np.mean(trained) / np.mean(asked)),
        "discarded": gone / sum(known.length for known in run.account),
    }


def _overlap(events: Iterable[Event], learn: Event) -> float:
    """Seconds from the begin of an update to the end of decoding that is under way."""
    ends = (
        event.end
        for event in events
        if event.what == "decode" and event.begin <= learn.begin < event.end
    )
    return max(ends, default=learn.begin) - learn.begin


def shares_of_lags(run: Simulation) -> np.ndarray:
    """Shares of the tokens trained on, by how many updates old they were; [lag]."""
    lags = staleness(run.events)
    counts = np.array([lags.get(lag, 0) for lag in range(max(lags) + 1)], float)
    return counts / counts.sum()


def shares_of_waits(run: Simulation) -> Mapping[str, dict[str, float]]:
    """By role and reason, the share of its time in which it waits for that reason."""
    usage = utilisation(run.events, run.workers)
    return {
        role: {reason: spent / own.seconds for reason, spent in own.waits.items()}
        for role, own in ((role, usage[role]) for role in ("generate", "train"))
    }
