"""What each test file costs: CPU seconds (children included) and compilations.

Loaded by ``tests/conftest.py``; the ten dearest files are shown after every run, and
``TMDJAX_PRICE=path`` writes all of them as JSON.
"""

import json
import os
import resource
from collections import defaultdict

import jax
import pytest

CLEAR_AFTER = (
    4000  # programs: every one holds memory maps, of which a process has 65,530
)

_PRICE = "price"
_compiled = 0  # in this process
_traced = 0.0


def _count(event: str, duration_secs: float, **_) -> None:
    global _compiled, _traced
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled += 1
    elif event.startswith("/jax/core/compile/"):
        _traced += duration_secs


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

    def pytest_terminal_summary(self, terminalreporter):
        rows = sorted(self.files.items(), key=lambda row: -row[1][0])
        if not rows:
            return
        if path := os.environ.get("TMDJAX_PRICE"):
            with open(path, "w") as file:
                json.dump(dict(rows), file, indent=0)
        cpu, compiled, tests = (sum(r[i] for _, r in rows) for i in range(3))
        terminalreporter.section("price: CPU seconds, compilations, tests")
        for name, (seconds, programs, count) in rows[:10]:
            terminalreporter.line(f"{seconds:8.1f} {programs:6d} {count:5d}  {name}")
        terminalreporter.line(f"{cpu:8.1f} {compiled:6d} {tests:5d}  all files")
