"""What it costs to run generation apart from training: a trajectory, weights, memory.

    python -m benchmarks.runtime [--json out.json]
    python -m benchmarks.runtime --soak_minutes=30 --json soak.json

overhead    a run over a plain loop that writes the same texts with the same engine,
            judges them and hands them to a trainer in the same batches, but has no
            messages, no account and no log. Neither has a network: what differs is what
            a trajectory costs on its way (asked for, handed out, written down, judged,
            trained on; every step an event). 'disk' has account and log in a folder.
publishing  weights that a trainer makes a copy of and a generator takes, one update
            after the other, over plain copies of the same arrays.

Both are timed from the end of the first update to that of the last, without what is
made and compiled before. 'ray' is there where Ray is installed.

soak        a run under threads with account and log in a folder, for so many minutes;
            of arrays that no checkpoint needs the account is relieved, as runs do. A
            line through the resident memory, without the first fifth, says how much
            there is at the end over then.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contest import Row, Seconds, conclude, in_turn, options, timed
from tmdjax import runtime
from tmdjax.core.checks import check_count
from tmdjax.rl import TokenRecord
from tmdjax.runtime.events import Event, EventLog
from tmdjax.runtime.executors import Costs, Executor, RayActors, Simulated, Threads

_GOALS = {"threads": 2e-3, "ray": 10e-3}  # seconds a trajectory
_GROWTH = 0.02
_PROMPT = (1,) * 16
_RELIEVED_EVERY = 8  # updates of the soak
_FREE: dict[str, dict[str, float]] = {
    what: {} for what in ("decode", "weights", "judge", "learn")
}


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "sim": lambda: Simulated(Costs(_FREE)),
    "threads": Threads,
    "ray": RayActors,
}


class Batches:
    """What was trained on, and when.

    Attributes:
        requests: of each batch, in order.
    """

    def __init__(self) -> None:
        self.requests: list[list[int]] = []
        self._times: list[float] = []

    def add(self, requests: Sequence[int]) -> None:
        """An update by these requests is done."""
        self.requests.append(list(requests))
        self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the end of the first update to that of the last."""
        return self._times[-1] - self._times[0]


def schedule(given: Any, **changes: Any) -> runtime.Schedule:
    """Everything that is written trains, in the order it was asked for."""
    numbers = {
        "batch": given.batch,
        "samples": given.samples,
        "max_new_tokens": 2 * given.tokens,
        "updates": given.updates,
        "slots": given.batch * given.samples,
    }
    return runtime.Schedule(**numbers | changes)


def engine(given: Any) -> runtime.SimulatedEngine:
    """Texts of 1 to twice the mean number of tokens, by their number."""
    longest = 2 * given.tokens - 1
    slots = given.batch * given.samples
    return runtime.SimulatedEngine(
        lambda number: 1 + 7919 * number % longest, slots=slots, steps=32
    )


def judge(record: TokenRecord, problem: Any = None) -> tuple[float, float]:
    """Score and reward."""
    del problem
    return float(len(record)), float(len(record) % 2)


def loop(given: Any) -> Batches:
    """The rival."""
    writer, trained, samples = engine(given), Batches(), given.samples
    count = given.batch * samples
    for version in range(given.updates):
        writer.update_weights({}, version)
        for number in range(version * count, (version + 1) * count):
            record = TokenRecord(
                number=number,
                group=number // samples,
                prompt=_PROMPT,
                status="aborted",
                segments=0,
            )
            writer.resume(record, max_new_tokens=2 * given.tokens)
        batch = []
        while writer.active or writer.queued:
            for record in writer.advance():
                record.score, record.reward = judge(record)
                batch.append(record.number)
        trained.add(sorted(batch))
    return trained


def workers(
    given: Any,
    rules: runtime.Schedule,
    folder: pathlib.Path | None,
    *,
    make_publish: Callable[[], Callable[[], Any]] = lambda: dict,
    make_engine: Callable[[], runtime.SimulatedEngine] | None = None,
    after: Callable[[runtime.TrajectoryStore, Any], None] = lambda store, step: None,
) -> dict[str, Callable[[], Any]]:
    """A controller, a generator, a scorer and a trainer.

    Args:
        given: sizes.
        rules: of the run.
        folder: of the account; None keeps it in memory.
        make_publish: makes, where the trainer runs, what gives weights to generators.
        make_engine: of the generator; None takes :func:`engine`.
        after: called with the account and each step of the controller.
    """

    def control() -> Callable[[Any], Any]:
        store = runtime.TrajectoryStore(folder)
        decide = runtime.Controller(
            rules,
            store,
            lambda group: runtime.Prompt(_PROMPT, None),
            ["generate/0"],
            ["reward/0"],
        )

        def work(message: Any) -> Any:
            step = decide(message)
            if step is not None:
                after(store, step)
                if step.last:
                    store.close()
            return step

        return work

    make_engine = make_engine or functools.partial(engine, given)
    return {
        "control": control,
        "generate/0": lambda: runtime.Generator(make_engine()),
        "reward/0": lambda: runtime.Scorer(judge),
        "train": lambda: runtime.Trainer(make_publish(), lambda batch: {}),
    }


def run(
    executor: Executor,
    made: dict[str, Callable[[], Any]],
    learned: Callable[[Sequence[int]], Any],
    folder: pathlib.Path | None = None,
    **options: Any,
) -> None:
    """Runs workers, with a log in a folder, or else in memory.

    Args:
        executor: runs them.
        made: the workers.
        learned: called with the requests of each update when it has ended.
        folder: of the log, or None.
        **options: of the executor.
    """
    events: list[Event] = []
    with contextlib.ExitStack() as files:
        log = events.append
        if folder is not None:
            log = files.enter_context(EventLog(folder / "events.jsonl"))

        def note(event: Event) -> None:
            log(event)
            if event.what == "learn":
                learned(event.requests)

        executor.run(made, note, **options)


def overhead(given: Any) -> list[Row]:
    """Rows of every executor, account in memory and on disk."""
    expected = loop(given).requests

    def contender(executor: Executor, disk: bool) -> Seconds:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder) if disk else None
            made, trained = workers(given, schedule(given), place), Batches()
            run(executor, made, trained.add, place)
        if trained.requests != expected:
            raise ValueError(f"{executor} trained on other texts than the plain loop.")
        return {"run": trained.seconds}

    contenders: dict[str, Callable[[], Seconds]] = {
        "loop": lambda: {"run": loop(given).seconds}
    }
    goals = {}
    for name in given.executors:
        for disk in (False, True):
            title = f"{name}, {'disk' if disk else 'memory'}"
            contenders[title] = functools.partial(contender, EXECUTORS[name](), disk)
            goals[title] = _GOALS.get(name)
    found = in_turn(contenders, given.repeats)
    count, rows = (given.updates - 1) * given.batch * given.samples, []
    base = [each["run"] for each in found.pop("loop")]
    for title, times in found.items():
        extra = [(each["run"] - plain) / count for each, plain in zip(times, base)]
        rows.append(
            {
                "what": f"a trajectory, {title}: more than in a plain loop",
                "unit": "s",
                "ours": statistics.median(extra),
                "quartiles": np.quantile(extra, [0.25, 0.75]).tolist(),
                "goal": goals[title],
            }
        )
    return rows


class _Taking(runtime.SimulatedEngine):
    """It holds the weights that it is given, on its device."""

    def update_weights(
        self, params: Any, version: int, *, recompute: bool = True
    ) -> None:
        self._params = jax.block_until_ready(jax.device_put(params))
        super().update_weights({}, version, recompute=recompute)


def publishing(given: Any) -> list[Row]:
    """Rows of every executor that has a clock: bytes a second."""
    size = int(given.megabytes * 1e6 / 4 / 16)
    total = 16 * 4 * size * (given.updates - 1)
    rules = schedule(given, batch=1, samples=1, max_new_tokens=1, slots=1)

    def make_publish() -> Callable[[], Any]:
        params = {f"layer_{i}": jnp.full(size, i, jnp.float32) for i in range(16)}
        return lambda: jax.tree.map(jnp.copy, params)

    def copies() -> Seconds:
        copy = make_publish()
        seconds, _ = timed(
            lambda: [jax.block_until_ready(copy()) for _ in range(given.updates - 1)]
        )
        return {"rate": total / seconds}

    def contender(executor: Executor) -> Seconds:
        made = workers(
            given,
            rules,
            None,
            make_publish=make_publish,
            make_engine=lambda: _Taking(lambda number: 1, slots=1, steps=1),
        )
        trained = Batches()
        run(executor, made, trained.add)
        return {"rate": total / trained.seconds}

    contenders: dict[str, Callable[[], Seconds]] = {"copies": copies}
    for name in given.executors:
        if name != "sim":
            contenders[name] = functools.partial(contender, EXECUTORS[name]())
    found = in_turn(contenders, given.repeats)
    base, rows = [each["rate"] for each in found.pop("copies")], []
    for name, times in found.items():
        ratios = [each["rate"] / plain for each, plain in zip(times, base)]
        rows.append(
            {
                "what": f"weights of {given.megabytes:g} MB, {name}, over plain copies",
                "unit": "GB/s",
                "ours": statistics.median(each["rate"] for each in times) / 1e9,
                "rival": statistics.median(base) / 1e9,
                "ratio": statistics.median(ratios),
                "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
                "better": "greater",
            }
        )
    return rows


def resident() -> int:
    """Bytes of memory that this process has.

    Raises:
        FileNotFoundError: the system has no /proc, as Linux does.
    """
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def growth(seconds: Sequence[float], memory: Sequence[float]) -> float:
    """By what part a line through memory rises, without the first fifth of the time.

    Args:
        seconds: of each measurement, from the first to the last.
        memory: bytes.

    Raises:
        ValueError: fewer than two measurements after the first fifth.
    """
    x, y = np.asarray(seconds, float), np.asarray(memory, float)
    late = x >= x[0] + 0.2 * (x[-1] - x[0])
    if late.sum() < 2:
        raise ValueError(
            f"{len(x)} measurements are too few for a line; soak for longer."
        )
    slope, start = np.polyfit(x[late] - x[late][0], y[late], 1)
    return float(slope * (x[-1] - x[late][0]) / start)


def soak(given: Any) -> tuple[list[Row], dict[str, Any]]:
    """Row and facts of a long run under threads, eta = 1."""
    length = 60 * given.soak_minutes
    every = min(1.0, length / 100)
    seconds, memory = [], []
    counts: collections.Counter[str] = collections.Counter()
    start = time.monotonic()

    def should_stop() -> bool:
        now = time.monotonic() - start
        if not seconds or now >= min(seconds[-1] + every, length):
            seconds.append(now)
            memory.append(resident())
        return now >= length

    def relieve(store: runtime.TrajectoryStore, step: Any) -> None:
        if step.what == "weights" and step.version % _RELIEVED_EVERY == 0:
            store.forget(step.version)

    def learned(requests: Sequence[int]) -> None:
        counts.update(updates=1, trajectories=len(requests))

    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        rules = schedule(given, updates=10**9, eta=1)
        made = workers(given, rules, place, after=relieve)
        run(Threads(), made, learned, place, should_stop=should_stop)
        disk = {p.name: p.stat().st_size / 1e6 for p in sorted(place.iterdir())}
    row = {
        "what": f"memory, {given.soak_minutes:g} minutes: growth after the first fifth",
        "unit": "",
        "ours": growth(seconds, memory),
        "goal": _GROWTH,
    }
    facts = {
        **counts,
        "seconds": seconds[-1],
        "memory_mb": [m / 1e6 for m in (memory[0], max(memory), memory[-1])],
        "disk_mb": disk,
    }
    return [row], facts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = options(__doc__, repeats=5)
    flags.add_argument("--updates", type=int, default=16, help="2 or more")
    flags.add_argument("--batch", type=int, default=16, help="prompts an update")
    flags.add_argument("--samples", type=int, default=4, help="responses to a prompt")
    flags.add_argument("--tokens", type=int, default=256, help="of a response, mean")
    has_ray = importlib.util.find_spec("ray") is not None
    flags.add_argument(
        "--executors",
        nargs="+",
        choices=EXECUTORS,
        default=["sim", "threads", *(["ray"] if has_ray else [])],
        help="ray only where it is installed",
    )
    flags.add_argument("--megabytes", type=float, default=100, help="of the weights")
    flags.add_argument(
        "--soak_minutes",
        type=float,
        help="only the soak; its log takes about a gigabyte in 30 minutes",
    )
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; writes it as JSON."""
    given = parser().parse_args(arguments)
    check_count("updates", given.updates, 2)
    load, facts = os.getloadavg()[0], {}
    if given.soak_minutes:
        rows, facts["soak"] = soak(given)
    else:
        rows = overhead(given) + publishing(given)
    sizes = {k: getattr(given, k) for k in ("updates", "batch", "samples", "tokens")}
    conclude("runtime", rows, load, given.json, **sizes, **facts)


if __name__ == "__main__":
    main()
