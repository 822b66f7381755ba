"""Runs of the workers by lengths and costs alone, and what must hold of each."""

import dataclasses
import time

import numpy as np

from tmdjax.runtime import Prompt, TrajectoryStore
from tmdjax.runtime.control import Controller
from tmdjax.runtime.executors import Costs, Simulated
from tmdjax.runtime.roles import Generator, Scorer, Trainer
from tmdjax.runtime.simulated_engine import SimulatedEngine

SLOTS = 8


def costs(step=1.0, token=0.02, learn=0.05, judge=0.0):
    """A decoding step takes a part of its own and one for each text under way."""
    return Costs(
        {
            "decode": {"slot_steps": step / SLOTS, "drawn": token, "prefilled": 1e-3},
            "weights": {"prefilled": 1e-3},
            "learn": {"tokens": learn},
            "judge": {"responses": judge},
        }
    )


def lognormal(sigma, seed=0):
    """The length of a request follows from its number alone."""

    def length_of(number):
        rng = np.random.default_rng([seed, number])
        return int(np.clip(np.exp(rng.normal(3.0, sigma)), 1, 400))

    return length_of


MIDDLE = lognormal(0.65)


def flat(lists):
    return [x for each in lists for x in each]


@dataclasses.dataclass
class Run:
    batches: list  # (version, groups) as they came to the trainer
    events: list
    seconds: float
    store: TrajectoryStore
    engines: list

    @property
    def numbers(self):
        return [[r.number for g in b.groups for r in g.records] for b in self.batches]

    @property
    def records(self):
        return [r for b in self.batches for g in b.groups for r in g.records]

    @property
    def tokens(self):
        return sum(len(r) for r in self.records)

    @property
    def worst_lag(self):
        return max(
            b.version - v
            for b in self.batches
            for g in b.groups
            for r in g.records
            for v in r.versions
        )


def run(
    schedule,
    *,
    lengths=MIDDLE,
    generators=2,
    executor=None,
    store=None,
    version=0,
    interruptible=True,
    judge=lambda record, problem: (float(len(record) % 3), 1.0),
    log=None,
    jitter=None,
    steps=4,
    learned=lambda batch: None,
    learn_cost=0.05,
    slots=SLOTS,
    engines=SimulatedEngine,
    around=lambda name, make: make,
    **options,
):
    found = Run([], [], 0.0, store or TrajectoryStore(None), [])
    names = [f"generate/{i}" for i in range(generators)]
    judges = ["reward/0", "reward/1"]

    def learn(batch):
        learned(batch)
        found.batches.append(batch)
        return {"tokens": float(sum(len(r) for g in batch.groups for r in g.records))}

    def engine():
        found.engines.append(
            engines(lengths, slots=slots, steps=steps, version=version)
        )
        return Generator(found.engines[-1], interruptible=interruptible)

    def late(make):
        def made():
            worker = make()

            def slow(message):
                time.sleep(jitter.uniform(0, 2e-3))
                return worker(message)

            return slow

        return make if jitter is None else made

    orders = {k: options.pop(k) for k in ("order", "should_stop") if k in options}
    control = Controller(
        schedule,
        found.store,
        options.pop("prompt_of", lambda n: Prompt([1, 2, 3], n)),
        names,
        judges,
        **options,
    )
    workers = {
        "control": lambda: control,
        **dict.fromkeys(names, engine),
        **dict.fromkeys(judges, lambda: Scorer(judge)),
        "train": lambda: Trainer(lambda: None, learn, version),
    }
    executor = executor or Simulated(costs(learn=learn_cost))
    found.seconds = executor.run(
        {name: around(name, late(make)) for name, make in workers.items()},
        log or found.events.append,
        **orders,
    )
    return found


def conserved(found, schedule):
    """What is in the account, in the batches and in the engines is the same."""
    counts = found.store.counts()
    rows = found.store.select()
    assert sum(counts.values()) == len(rows)
    consumed = [t for t in rows if t.state == "consumed"]
    assert sorted(t.number for t in consumed) == sorted(flat(found.numbers))
    assert len(set(flat(found.numbers))) == len(consumed)
    groups = {t.group for t in rows}
    assert groups == set(range(len(groups)))  # every prompt once, in order
    for batch in found.batches:
        assert len(batch.groups) == schedule.batch
        for group in batch.groups:
            assert len(group.records) == schedule.samples
            assert all(r.finished and r.reward is not None for r in group.records)
            for r in group.records:
                r.check(scored=True)
    drawn = sum(engine.counts["drawn"] for engine in found.engines)
    assert drawn == sum(t.length for t in rows)
