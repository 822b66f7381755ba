import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

from tmdjax import train
from tmdjax.core import prng


class Counter:
    """Batches that are a function of their position; the position is the state."""

    def __init__(self, broken=()):
        self.position, self.broken = 0, set(broken)

    def __next__(self):
        rng = np.random.default_rng(self.position)
        x = rng.normal(size=(8, 3)).astype(np.float32)
        if self.position in self.broken or "all" in self.broken:
            x[2] = np.nan
        self.position += 1
        return {"x": x}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def loss(params, batch, keys):
    target = batch["x"].sum(1) + 0.1 * prng.normal(keys, ())
    return jnp.square(batch["x"] @ params["w"] - target), {}


OPTIMIZER = optax.adam(0.05)
STEP = jax.jit(train.make_train_step(loss, OPTIMIZER, ema_decay=0.9), donate_argnums=0)


def fit(folder=None, data=None, num_steps=60, **options):
    rows = []
    result = train.fit(
        train.create_state({"w": jnp.zeros(3)}, OPTIMIZER, ema=True),
        STEP,
        data or Counter(),
        key=jax.random.key(0),
        num_steps=num_steps,
        checkpoints=None if folder is None else train.Checkpoints(folder),
        log_every=10,
        on_metrics=lambda step, metrics: rows.append((step, metrics)),
        **options,
    )
    return result, rows


def test_windows():
    result, rows = fit(num_steps=25)
    assert result.finished and [step for step, _ in rows] == [10, 20, 25]
    assert_array_equal(result.state.params["w"], fit(num_steps=25)[0].state.params["w"])


def test_a_window_may_be_one_step():
    _, rows = fit(num_steps=11)
    assert [step for step, _ in rows] == [10, 11] and np.isfinite(rows[1][1]["loss"])


def test_paused_and_resumed_equals_uninterrupted(tmp_path):
    whole, rows = fit()
    stops = iter([False, True])
    first, early = fit(tmp_path, should_stop=lambda: next(stops))
    assert not first.finished and int(first.state.step) == 20
    resumed_from = []
    second, late = fit(tmp_path, on_resume=resumed_from.append)
    assert resumed_from == [20] and second.finished
    assert early + late == rows
    jax.tree.map(assert_array_equal, second.state, whole.state)
    third, nothing = fit(tmp_path)  # a finished run does no step
    assert third.finished and not nothing
    jax.tree.map(assert_array_equal, third.state, whole.state)


def test_checkpoints_by_time(tmp_path):
    fit(tmp_path, checkpoint_seconds=(0.0, 0.0))
    assert train.Checkpoints(tmp_path).steps() == [50, 60]


def test_skipped_updates_are_counted_and_kept_out_of_the_means():
    result, rows = fit(data=Counter(broken={3, 7, 15}))
    assert int(result.state.skipped) == 3
    assert [m["skipped"] for _, m in rows[:3]] == [2, 1, 0]
    assert all(np.isfinite(m["loss"]) for _, m in rows)
    _, rows = fit(data=Counter(broken=range(10)))
    assert np.isnan(rows[0][1]["loss"]) and rows[0][1]["skipped"] == 10


def test_persistent_nan_stops_with_the_last_good_checkpoint(tmp_path):
    def diagnose(state, batch, key):
        keys = prng.sample_keys(key, 8)
        return train.nonfinite_report(loss, state.params, batch, keys)

    data = Counter(broken=range(20, 60))
    with pytest.raises(
        train.NonFiniteError,
        match=r"20 consecutive.*batch/x.*loss: \[2\].*Last good checkpoint: step 30",
    ):
        fit(tmp_path, data, checkpoint_seconds=(0.0, 0.0), diagnose=diagnose)
    restored = train.Checkpoints(tmp_path).restore()
    assert np.isfinite(restored.tree["params"]["w"]).all()


def test_diagnosis_sees_the_noise_of_the_failed_step():
    def noisy(params, batch, keys):  # fails by its noise alone
        return params["w"].sum() + jnp.log(prng.uniform(keys) - 0.3), {}

    seen = []
    optimizer = optax.sgd(0.0)
    step = jax.jit(train.make_train_step(noisy, optimizer))

    def diagnose(state, batch, key):
        seen.append(
            train.nonfinite_report(noisy, state.params, batch, prng.sample_keys(key, 8))
        )
        # the keys of the step that failed, as the state documents them
        keys = prng.sample_keys(jax.random.fold_in(jax.random.key(0), 4), 8)
        seen.append([int(i) for i in jnp.flatnonzero(prng.uniform(keys) < 0.3)])
        return seen[0]

    with pytest.raises(train.NonFiniteError):
        train.fit(
            train.create_state({"w": jnp.zeros(3)}, optimizer),
            step,
            Counter(),
            key=jax.random.key(0),
            num_steps=5,
            log_every=5,
            max_skipped=1,
            diagnose=diagnose,
        )
    assert seen[1] and f"non-finite loss: {seen[1][:5]}" in seen[0]


def test_a_plain_step_and_state_will_do():
    def step(count, batch, key):
        return count + 1, {"count": count}

    rows = []
    result = train.fit(
        jnp.int32(0),
        step,
        Counter(),
        key=jax.random.key(0),
        num_steps=4,
        log_every=2,
        on_metrics=lambda step, metrics: rows.append(metrics),
    )
    assert int(result.state) == 4 and rows == [{"count": 0.5}, {"count": 2.5}]
    with pytest.raises(ValueError, match="log_every=0"):
        train.fit(jnp.int32(0), step, Counter(), key=None, num_steps=4, log_every=0)


def test_best_checkpoint_is_kept(tmp_path):
    train.fit(
        train.create_state({"w": jnp.zeros(3)}, OPTIMIZER, ema=True),
        STEP,
        Counter(),
        key=jax.random.key(0),
        num_steps=40,
        checkpoints=train.Checkpoints(tmp_path, keep_last=1, best="max"),
        log_every=10,
        checkpoint_seconds=(0.0, 0.0),
        score="loss",  # highest at the start
    )
    assert train.Checkpoints(tmp_path).steps() == [10, 40]


def test_no_compilation_after_the_first_window(count_compiles):
    fit(num_steps=20)
    with count_compiles() as compiled:
        fit(num_steps=40)
    assert len(compiled) <= 2  # creating the state, never the step
