"""What PDE-Refiner's experiment measures of rollouts, where the answer is known."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments import pde_measures, pde_refiner, pde_solvers
from experiments.arms import of_arm
from tmdjax.data import pde
from tmdjax.harness import ConfigError, load_config


@pytest.fixture
def config():
    return load_config("configs/pde_refiner.py:smoke")


def test_an_error_is_of_the_waves_that_are_wrong(config):
    """Of 32 waves in a domain of 32, those from the 11th on have wavenumber 2 or more."""
    points, length = config.data.points, config.data.length[0]
    assert np.ceil(config.evaluate.wavenumber * length / (2 * np.pi)) == 11
    x = 2 * np.pi * np.arange(points) / points
    test = pde.Trajectories(
        states=np.zeros((1, 2, points, 1), np.float32),
        dt=np.full(1, 0.2),
        dx=np.full(1, length / points),
        parameters={},
    )
    right = 2 * np.sin(3 * x) + 0.5 * np.cos(20 * x)
    for waves, low, high in ((10, 0.1 / 2, 0), (11, 0, 0.1 / 0.5)):
        after = right + 0.1 * np.cos(waves * x + 1)
        pair = [np.tile(v[:, None], (4, 3, 1, 1)) for v in (after, right)]
        spectrum, found = pde_measures.errors_of(config, pair[0], pair[1], test)
        assert_allclose(found["error_low"], low, atol=1e-12)
        assert_allclose(found["error_high"], high, atol=1e-12)
        assert_allclose(found["one_step_mse"], 0.1**2 / 2)
        assert len(spectrum) == points // 2 + 1


def test_times_are_of_the_mean_or_of_each_where_steps_differ():
    r = np.array([[1, 1], [1, 0.6], [0.6, 0.2], [0.2, 0.2]])  # [step, trajectory]
    # the mean curve is 1, 0.8, 0.4, 0.2: it crosses 0.7 at step 2.25
    equal, apart = np.array([0.5, 0.5]), np.array([1.0, 3.0])
    assert_allclose(pde_measures.time_of(r, equal, 0.7), (2.25 * 0.5, 2 * 0.5, 0))
    # the curves alone cross it at 2.75 and 1.75
    assert_allclose(pde_measures.time_of(r, apart, 0.7)[0], (2.75 + 3 * 1.75) / 2)
    assert pde_measures.time_of(r, equal, 0.1)[2] == 1  # never


def test_errors_and_spectra_are_of_rollouts_that_did_not_fail(config):
    """Times 4, 8 and 16 are steps 8, 16 and 32 of one of 0.5, and half of one of 1."""
    x = 2 * np.pi * np.arange(64) / 64
    right = np.tile(3 * np.cos(4 * x)[:, None], (32, 3, 1, 1))
    growing = np.arange(1, 33)[:, None, None, None] / 10
    states = right + growing * np.cos(6 * x)[:, None]
    whole = np.array([True, True, False])
    states[5:, ~whole] = np.nan
    given = config, states, right, whole
    found = pde_measures._by_time(*given, np.array([0.5, 1.0, 1.0]))
    for horizon, steps in ((4, (8, 4)), (8, (16, 8)), (16, (32, 16))):
        error = np.sqrt(np.mean(np.square(steps))) / 10 / 3
        assert_allclose(found[pde_measures.at_time(horizon, "error")], error)
    found = pde_measures._by_waves(*given)
    assert found.keys() == {
        f"waves{n}.{of}"
        for n in config.evaluate.waves
        for of in ("power", "true_power")
    }
    assert_allclose(found["waves4.true_power"], 9 / 2)
    assert_allclose(found["waves4.power"], 9 / 2)
    grown = np.square(np.arange(17, 33) / 10).mean() / 2
    assert_allclose(found["waves6.power"], grown)
    assert_allclose(found["waves6.true_power"], 0, atol=1e-12)
    none = pde_measures._by_waves(config, states, right, ~whole & False)
    assert np.isnan(none["waves4.power"]) and none["waves4.true_power"] > 4


def test_steady_trajectories_are_counted():
    x = 2 * np.pi * np.arange(64) / 64
    moving = np.stack([np.cos(3 * (x - 0.01 * i)) for i in range(3)])  # 3 % a frame
    states = np.float32(np.stack([moving, moving, moving[[0, 1, 1]]]))[..., None]
    dt = np.array([0.2, 2.0, 0.2])
    made = pde.Trajectories(states=states, dt=dt, dx=np.ones(3), parameters={})
    assert pde_solvers.at_rest(made) == pytest.approx(2 / 3)


def test_a_coarse_solver_is_set_up_for_the_rows_of_a_set(config):
    own = of_arm(config, "coarse_28")
    columns = {"dt": np.full(3, 0.2), "viscosity": np.ones(3)}
    columns["dx"] = np.array([30, 32, 34]) / 64
    solver = pde_solvers.method_of(own, columns).solver
    assert (solver.points, solver.substeps) == (28, 1)
    assert solver.weights.whole.shape == (3, 15)
    q = 2 * np.pi * np.arange(15) / 34
    there = np.exp((q**2 - q**4) * 0.2 * config.data.stride)
    assert_allclose(solver.weights.whole[2], there)
    columns["dx"] = np.full(3, 0.5)
    alike = pde_solvers.method_of(own, columns).solver
    assert alike.weights.whole.shape == (1, 15)
    middle = pde_solvers.method_of(own).solver  # the config's own length is 32
    assert_allclose(middle.weights.whole, alike.weights.whole)
    assert pde_measures.measures(own).isdisjoint({"reliability", "seconds_per_time"})


def test_a_coarse_solver_is_measured_and_not_trained(config):
    names = [stage.name for stage in pde_refiner.stages(config, "coarse_28")]
    assert names == ["trajectories", "evaluate"]
    assert pde_refiner.describe(config)["coarse_28/parameters"] == 0
    assert pde_refiner.updates(config).keys() == {"mse", "refiner", "hybrid"}


def test_the_paper_tier_is_trained_as_published():
    """configs/kuramotosivashinsky1d.yaml of PDEArena; an epoch has 140 starts of each."""
    config = load_config("configs/pde_refiner.py:paper")
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adam", 1e-4)
    assert optimizer.clip_norm is None and optimizer.schedule == "cosine"
    train = config.train
    assert (train.batch_size, train.ema_decay) == (128, 0.995)
    assert train.steps == 400 * 2048 * 140 // 128
    clipped = load_config("configs/pde_refiner.py:paper", ["optimizer.clip_norm=2"])
    assert clipped.optimizer.clip_norm == 2
    network, method = config.model, pde_solvers.method_of(of_arm(config, "refiner"))
    assert (network.width, [*network.multipliers]) == (64, [1, 2, 4, 16])
    assert (method.refinements, method.min_variance) == (3, 4e-7)
    assert config.data.stride == 4
    assert pde_solvers.condition_names(config) == ("dt", "dx")


def test_an_arm_is_trained_on_the_data_it_names(config, monkeypatch):
    given = []

    def made(key, count, **settings):
        given.append((count, settings["viscosity"]))
        x = np.sin(np.arange(8.0))[:, None]
        states = np.float32(np.tile(x, (count, 2, 1, 1)))
        return pde.Trajectories(states=states, dt=np.ones(count), dx=np.ones(count))

    monkeypatch.setattr(pde_solvers.pde, "ks_trajectories", made)
    changes = {"viscosity": (0.9, 0.9), "train_count": 5, "test_count": 4}
    with config.unlocked():
        config.arms.mse.data = changes
    for arm, counts, viscosity in (("mse", [5, 4, 4], 0.9), ("refiner", [32, 8, 8], 1)):
        stage = pde_refiner.stages(config, arm)[0]
        given.clear()
        stage.run(None)
        assert given == [(count, (viscosity, viscosity)) for count in counts]
        assert tuple(stage.config["viscosity"]) == (viscosity, viscosity)


def test_data_that_cannot_be_made_or_used_are_refused(refused):
    for change, words in (
        ("data.points=63", "data.points=63 must be even"),
        ("data.length=(33.0,32.0)", r"data.length=\(33.0, 32.0\) must rise"),
        ("evaluate.wavenumber=7", "beyond 6.28, the highest of data.points=64"),
        ("data.stride=70", "no targets: a window of 2 states at data.stride=70"),
        ("train.batch_size=100000", "larger than the [0-9]+ windows"),
        ("evaluate.horizons=[4,17]", "horizons=.* reach beyond 16, the end of"),
        ("data.stride=3", "horizons=.* reach beyond 15.6, the end of .* 26 steps"),
        ("evaluate.waves=[4,33]", "waves=.* are more than the 32 waves that"),
        ("coarse.points=27", "points=27 must be even"),
        ("arms.coarse_28.coarse.points=66", "at most data.points=64"),
    ):
        config = load_config("configs/pde_refiner.py:smoke", [change])
        refused(words, pde_refiner.describe, config)
    config = load_config("configs/pde_refiner.py:smoke")
    with config.unlocked():
        config.arms.coarse_28.method.substeps = 2
    words = "method.substeps of 'coarse': .* of the group 'coarse'"
    refused(words, pde_refiner.describe, config, error=ConfigError)
