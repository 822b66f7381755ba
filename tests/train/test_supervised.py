from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import Numbered, same
from numpy.testing import assert_array_equal

from tmdjax import train
from tmdjax.core import prng


def counted(broken=()):
    """Eight rows a batch; of those whose numbers are given one row is no number."""

    def draw(number):
        x = np.random.default_rng(number).normal(size=(8, 3)).astype(np.float32)
        if number in broken:
            x[2] = np.nan
        return {"x": x}

    return Numbered(draw)


def loss(params, batch, keys):
    target = batch["x"].sum(1) + 0.1 * prng.normal(keys, ())
    return jnp.square(batch["x"] @ params["w"] - target), {}


KEY = jax.random.key(0)
OPTIMIZER = optax.adam(0.05)
STEP = jax.jit(train.make_train_step(loss, OPTIMIZER, ema_decay=0.9), donate_argnums=0)


def fit(folder=None, data=None, num_steps=60, best=None, keep_last=2, **options):
    rows = []
    place = folder and train.Checkpoints(folder, best=best, keep_last=keep_last)
    state = train.create_state({"w": jnp.zeros(3)}, OPTIMIZER, ema=True)
    given = {"key": KEY, "num_steps": num_steps, "checkpoints": place, "log_every": 10}
    given["on_metrics"] = lambda step, metrics: rows.append((step, metrics))
    result = train.fit(state, STEP, data or counted(), **given, **options)
    return result, rows


def test_a_window_may_be_one_step():
    result, rows = fit(num_steps=21)
    assert result.finished and [step for step, _ in rows] == [10, 20, 21]
    assert np.isfinite(rows[2][1]["loss"])


def test_paused_and_resumed_equals_uninterrupted(tmp_path):
    whole, rows = fit()
    stops = iter([False, True])
    first, early = fit(tmp_path, should_stop=lambda: next(stops))
    assert not first.finished and int(first.state.step) == 20
    resumed_from = []
    second, late = fit(tmp_path, on_resume=resumed_from.append)
    assert resumed_from == [20] and second.finished
    assert early + late == rows
    same(second.state, whole.state)
    third, nothing = fit(tmp_path)  # a finished run does no step
    assert third.finished and not nothing
    same(third.state, whole.state)


def test_skipped_updates_are_counted_and_kept_out_of_the_means():
    result, rows = fit(data=counted(broken={3, 7, 15}))
    assert int(result.state.skipped) == 3
    assert [m["skipped"] for _, m in rows[:3]] == [2, 1, 0]
    assert all(np.isfinite(m["loss"]) for _, m in rows)
    _, rows = fit(data=counted(broken=range(10)))
    assert np.isnan(rows[0][1]["loss"]) and rows[0][1]["skipped"] == 10


class Counting(NamedTuple):
    number: int
    skipped: int


def test_what_a_step_that_skips_still_measured_is_kept():
    """An iteration of RL: its rewards count where no update of it was good."""

    def step(state, batch, key):
        number, broken = state.number + 1, state.number in (1, 3)
        loss = np.nan if broken or number == 6 else number
        state = Counting(number, state.skipped + 3 * broken)
        return state, {"reward": number, "loss": loss}

    rows = []
    options = {"key": KEY, "num_steps": 6, "log_every": 2}
    note = lambda step, row: rows.append(row)  # noqa: E731
    train.fit(Counting(0, 0), step, train.NoData(), on_metrics=note, **options)
    assert [row["reward"] for row in rows] == [1.5, 3.5, 5.5]
    assert [row["skipped"] for row in rows] == [3, 3, 0]
    # what is no number where nothing was skipped is shown
    assert_array_equal([row["loss"] for row in rows], [1, 3, np.nan])


def test_persistent_nan_stops_with_the_last_good_checkpoint(tmp_path):
    def diagnose(state, batch, key):
        keys = prng.sample_keys(key, 8)
        return train.nonfinite_report(loss, state.params, batch, keys)

    data = counted(broken=range(20, 60))
    options = {"checkpoint_seconds": (0.0, 0.0), "diagnose": diagnose}
    message = r"20 consecutive.*batch/x.*loss: \[2\].*Last good checkpoint: step 30"
    with pytest.raises(train.NonFiniteError, match=message):
        fit(tmp_path, data, **options)
    assert np.isfinite(train.Checkpoints(tmp_path).restore().tree["params"]["w"]).all()


def test_diagnosis_sees_the_noise_of_the_failed_step():
    def noisy(params, batch, keys):  # fails by its noise alone
        return params["w"].sum() + jnp.log(prng.uniform(keys) - 0.3), {}

    seen = []
    optimizer = optax.sgd(0.0)
    step = jax.jit(train.make_train_step(noisy, optimizer))

    def diagnose(state, batch, key):
        keys = prng.sample_keys(key, 8)
        seen.append(train.nonfinite_report(noisy, state.params, batch, keys))
        # the keys of the step that failed, as the state documents them
        keys = prng.sample_keys(jax.random.fold_in(KEY, 4), 8)
        seen.append([int(i) for i in jnp.flatnonzero(prng.uniform(keys) < 0.3)])
        return seen[0]

    state = train.create_state({"w": jnp.zeros(3)}, optimizer)
    options = {"key": KEY, "num_steps": 5, "log_every": 5, "max_skipped": 1}
    with pytest.raises(train.NonFiniteError):
        train.fit(state, step, counted(), diagnose=diagnose, **options)
    assert seen[1] and f"non-finite loss: {seen[1][:5]}" in seen[0]


def test_fewer_steps_than_the_checkpoint_has_are_said(tmp_path, refused):
    fit(tmp_path, num_steps=20)
    assert fit(tmp_path, num_steps=20)[0].finished
    refused(
        "num_steps=10, but the checkpoint in .* of step 20", fit, tmp_path, num_steps=10
    )
    result, _ = fit(tmp_path, num_steps=21)  # the remedy
    assert int(result.state.step) == 21


def test_data_that_cannot_be_saved_are_refused_before_the_first_step(tmp_path, refused):
    class Drawn(Numbered):
        def __next__(self):
            raise AssertionError("trained")

        def get_state(self):
            return {"rows": np.arange(3)}

    def endless():
        raise AssertionError("trained")
        yield

    for data, words in (
        (endless(), "generator, which lacks get_state, set_state"),
        (Drawn(None), "get_state.. of Drawn is not JSON-able"),
    ):
        refused(words, fit, tmp_path, data, num_steps=10, error=TypeError)
    rows = ({"x": np.ones((8, 3), np.float32)} for _ in range(10))
    assert fit(None, rows, num_steps=10)[0].finished  # the remedy


def test_a_plain_step_and_state_will_do(refused):
    step, rows = lambda count, batch, key: (count + 1, {"count": count}), []
    given = (jnp.int32(0), step, counted())
    note = lambda step, metrics: rows.append(metrics)  # noqa: E731
    result = train.fit(*given, key=KEY, num_steps=4, log_every=2, on_metrics=note)
    assert int(result.state) == 4 and rows == [{"count": 0.5}, {"count": 2.5}]
    refused("log_every=0", train.fit, *given, key=KEY, num_steps=4, log_every=0)


def test_best_checkpoint_is_kept(tmp_path):
    options = {"best": "max", "score": "loss"}  # highest at the start
    seconds = {"checkpoint_seconds": (0.0, 0.0)}
    fit(tmp_path, num_steps=40, keep_last=1, **options, **seconds)
    assert train.Checkpoints(tmp_path).steps() == [10, 40]


def test_no_compilation_after_the_first_window(count_compiles):
    fit(num_steps=20)
    with count_compiles() as compiled:
        fit(num_steps=40)
    assert len(compiled) <= 2  # creating the state, never the step
