"""Traces of a few steps."""

import jax
import jax.numpy as jnp
import pytest

from tmdjax.harness.profile import SKIPPED, ProfiledStep


@pytest.fixture
def traced(monkeypatch):
    """What starts and stops, without a profiler."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(step, count, calls):
    state = jnp.zeros(())
    for i in range(count):
        state, metrics = step(state, None, None)
        calls.append(i)
    return state, metrics


def plain(state, batch, key):
    return state + 1, {"loss": state}


def test_some_steps_after_the_first_are_traced(tmp_path, traced):
    folder = tmp_path / "profile"
    with ProfiledStep(plain, folder, 2) as step:
        state, _ = run(step, 6, traced)
    assert SKIPPED == 2 and int(state) == 6
    assert traced == [0, 1, str(folder), 2, "stop", 3, 4, 5]


def test_a_run_that_ends_early_closes_its_trace(tmp_path, traced):
    with ProfiledStep(plain, tmp_path, 5) as step:
        run(step, 4, traced)
    assert traced == [0, 1, str(tmp_path), 2, 3, "stop"]
    traced.clear()
    with pytest.raises(ZeroDivisionError), ProfiledStep(plain, tmp_path, 5) as step:
        run(step, 3, traced)
        raise ZeroDivisionError
    assert traced[-1] == "stop"


def test_without_steps_nothing_is_traced(tmp_path, traced):
    with ProfiledStep(plain, tmp_path, 0) as step:
        run(step, 9, traced)
    assert traced == [*range(9)]


def test_a_trace_is_written(tmp_path):
    with ProfiledStep(jax.jit(plain), tmp_path, 1) as step:
        run(step, 4, [])
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
