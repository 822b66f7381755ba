"""What each test file costs: CPU seconds (children included) and compilations.

Loaded by ``tests/conftest.py``; the ten dearest files are shown after every run, and
``TMDJAX_PRICE=path`` writes all of them as JSON, beside the files that the path already
names. ``TMDJAX_PRICE=tests/prices.json make test`` renews what workers are ordered by.
"""

import gc
import json
import os
import pathlib
import resource
from collections import defaultdict

import jax
import pytest

# programs: each holds memory, and some of the 65,530 maps a process may have
CLEAR_AFTER = 2500

PRICES = pathlib.Path(__file__).with_name("prices.json")
BYTES_A_SECOND = 800  # of a file that has no price yet: a large one may be dear

_PRICE = "price"
_compiled = 0  # in this process


def _count(event: str, duration_secs: float, **_) -> None:
    global _compiled
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled += 1


def _cpu_seconds() -> float:
    used = [
        resource.getrusage(who)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Price:
    """Adds what a phase of a test cost to its report; sums up where reports arrive."""

    def __init__(self):
        jax.monitoring.register_event_duration_secs_listener(_count)
        self.marked = (_cpu_seconds(), 0)
        self.cleared = 0
        self.files = defaultdict(lambda: [0.0, 0, 0])

    def pytest_collection_modifyitems(self, config, items):
        """Workers take the dearest files first: a dear one at the end has no company."""
        if not hasattr(config, "workerinput"):
            return
        known = json.loads(PRICES.read_text())

        def dearest_first(item):
            name = item.nodeid.partition("::")[0]
            size = item.path.stat().st_size
            return -known.get(name, [size / BYTES_A_SECOND])[0], name

        items.sort(key=dearest_first)

    def pytest_collection_finish(self):
        self.marked = (_cpu_seconds(), _compiled)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self):
        outcome = yield
        now = (_cpu_seconds(), _compiled)
        spent = [new - old for new, old in zip(now, self.marked)]
        self.marked = now
        outcome.get_result().user_properties.append((_PRICE, spent))

    def pytest_runtest_logreport(self, report):
        # reports of later phases repeat the properties of the earlier ones
        spent = [value for name, value in report.user_properties if name == _PRICE]
        if spent:
            row = self.files[report.nodeid.partition("::")[0]]
            row[0] += spent[-1][0]
            row[1] += spent[-1][1]
            row[2] += report.when == "call"

    def pytest_runtest_teardown(self, item, nextitem):
        """Forgets programs between files, once there are very many."""
        last = nextitem is None or nextitem.path != item.path
        if last and _compiled - self.cleared > CLEAR_AFTER:
            self.cleared = _compiled
            jax.clear_caches()
            gc.collect()  # which is rare: see conftest.py

    def pytest_terminal_summary(self, terminalreporter):
        rows = sorted(self.files.items(), key=lambda row: -row[1][0])
        if not rows:
            return
        if path := os.environ.get("TMDJAX_PRICE"):
            _write(pathlib.Path(path), dict(rows))
        cpu, compiled, tests = (sum(r[i] for _, r in rows) for i in range(3))
        terminalreporter.section("price: CPU seconds, compilations, tests")
        for name, (seconds, programs, count) in rows[:10]:
            terminalreporter.line(f"{seconds:8.1f} {programs:6d} {count:5d}  {name}")
        terminalreporter.line(f"{cpu:8.1f} {compiled:6d} {tests:5d}  all files")


def _write(path, rows):
    """A line a file; those of an earlier run stay while their file is there."""
    before = json.loads(path.read_text()) if path.exists() else {}
    rows = {name: row for name, row in before.items() if os.path.exists(name)} | rows
    lines = [
        f"{json.dumps(name)}: [{cpu:.1f}, {compiled}, {count}]"
        for name, (cpu, compiled, count) in sorted(rows.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
