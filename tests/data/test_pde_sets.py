"""Sets of trajectories: drawn, stored, cut into windows, and read from others."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.data import pde


def some(rows=3, frames=9, seed=0, **changes):
    rng = np.random.default_rng(seed)
    states = np.float32(rng.normal(size=(rows, frames, 4, 1)))
    given = {"states": states, "dt": np.full(rows, 0.2), "dx": np.linspace(1, 2, rows)}
    given |= {"parameters": {"viscosity": np.arange(1.0, rows + 1)}, "equation": "ks"}
    return pde.Trajectories(**given | {"meta": {"seed": seed}} | changes)


def equal(a, b):
    assert_array_equal(a.states, b.states)
    assert a.columns().keys() == b.columns().keys()
    for name, column in a.columns().items():
        assert_array_equal(column, b.columns()[name])


KS = {"points": 32, "length": (20.0, 24.0), "viscosity": (0.8, 1.2), "warm_up": 300}


def test_a_trajectory_is_a_function_of_its_number():
    key, made = jax.random.key(0), pde.ks_trajectories
    whole = made(key, 3, frames=4, chunk=1, **KS)
    equal(made(key, 2, frames=4, chunk=1, start=1, **KS), whole.rows(slice(1, 3)))
    assert whole.states.shape == (3, 4, 32, 1) and whole.states.dtype == np.float32
    assert 0.9 < whole.states.std() < 1.6  # of the attractor, not of the sines (1.1)
    assert_allclose(whole.states.mean((1, 2, 3)), 0, atol=1e-6)
    length = whole.dx * 32
    assert np.all((length > 20) & (length < 24)) and len({*length}) == 3
    assert np.all((whole.dt > 0.18) & (whole.dt < 0.22))
    assert np.all(np.abs(whole.parameters["viscosity"] - 1) < 0.2)
    # the stored frames are each other's solutions
    row = 2
    alone = pde.kuramoto_sivashinsky(
        32, length[row], whole.parameters["viscosity"][row]
    )
    again = pde.solve(alone, whole.states[row, :1, :, 0], whole.dt[row], 4)
    assert_allclose(again[:, 0], whole.states[row, :, :, 0], atol=1e-5)
    assert not jax.config.jax_enable_x64


def test_flows_are_solved_on_a_fine_grid_and_kept_on_a_coarse_one():
    options = {"frames": 2, "warm_up": 0, "viscosity": 0.02, "substeps": 10}
    made = pde.kolmogorov_trajectories(
        jax.random.key(1), 1, points=16, solver_points=32, **options
    )
    assert made.states.shape == (1, 2, 16, 16, 1)
    fine = pde.kolmogorov_trajectories(jax.random.key(1), 1, points=32, **options)
    modes = np.fft.fft2(fine.states[0, 1, :, :, 0]) / 4
    kept = np.r_[0:8, 24:32]
    cut = modes[np.ix_(kept, kept)]
    cut[8, :] = cut[:, 8] = 0
    assert_allclose(made.states[0, 1, :, :, 0], np.fft.ifft2(cut).real, atol=1e-5)
    speed = pde.velocity_of(fine.states[0, 0, :, :, 0])
    assert 0.5 < np.sqrt(np.square(speed).sum(-1).mean()) < 2


def test_long_solver_steps_are_warned_of():
    with pytest.warns(UserWarning, match=r"solver steps of 0\.22 .* 0\.2: 1e-6, 7e-5"):
        pde.ks_trajectories(jax.random.key(0), 1, frames=4, substeps=1, **KS)


def test_no_solver_step_is_refused(refused):
    for made in (pde.ks_trajectories, pde.burgers_trajectories):
        words = "substeps=0 must be at least 1"
        refused(words, made, jax.random.key(0), 1, substeps=0, points=32)


def test_what_is_stored_is_read(tmp_path, refused):
    made = some()
    path = pde.write_trajectories(tmp_path, made)
    found = pde.read_trajectories(tmp_path)
    equal(made, found)
    assert (found.equation, found.meta) == (made.equation, made.meta)
    manifest = json.loads(path.read_text())
    assert manifest["trajectories"] == 3 and manifest["ranges"]["dx"] == [1, 2]
    pde.write_trajectories(tmp_path, some(rows=5, seed=1))
    equal(pde.read_trajectories(tmp_path), some(rows=5, seed=1))
    assert len(list(tmp_path.iterdir())) == 2
    whole = json.loads(path.read_text())
    for change, words in (
        ({"kind": "tmdjax.demonstrations"}, "no manifest of trajectories"),
        ({"trajectories": 6}, "holds 5 trajectories, its manifest says 6"),
        ({"shape": [9, 8, 1]}, r"manifest says \[9, 8, 1\]"),
        ({"parameters": []}, "records of .* are of dt, dx, states, viscosity"),
    ):
        path.write_text(json.dumps(whole | change))
        refused(words, pde.read_trajectories, tmp_path)


def test_windows_are_successive_frames_of_one_trajectory(refused):
    made = some()
    batches = pde.windows(made, 5, frames=3, stride=2, seed=1)
    seen = set()
    for _ in range(3):  # 3 trajectories of 5 starts each
        batch = next(batches)
        for states, step in zip(batch["states"], batch["viscosity"]):
            row = int(step) - 1
            (start,) = np.flatnonzero((made.states[row] == states[0]).all((1, 2)))
            assert_array_equal(states, made.states[row, start : start + 5 : 2])
            seen.add((row, int(start)))
        assert_allclose(batch["dx"], made.dx[batch["viscosity"].astype(int) - 1])
        assert batch["dt"].dtype == np.float32
        assert_array_equal(batch["trajectory"], batch["viscosity"].astype(int) - 1)
    assert len(seen) == 15
    state = batches.get_state()
    other = pde.windows(made, 5, frames=3, stride=1, seed=1)
    refused("belongs to another pipeline", other.set_state, state)
    words = "no targets: .*spans 13 frames, and a trajectory has 9"
    refused(words, pde.windows, made, 5, frames=4, stride=4)
    truth = pde.every(made.states, 4)
    assert_array_equal(truth, np.moveaxis(made.states[:, [0, 4, 8]], 1, 0))
    first = np.moveaxis(made.states[:, [0, 3]], 1, 0)
    assert_array_equal(pde.every(made.states, 3, 1), first)
    refused("no targets: 3 steps of stride=4", pde.every, made.states, 4, 3)


def test_bad_trajectories_are_refused(refused):
    made = some()
    refused(
        "states are float64", some, states=made.states.astype(float), error=TypeError
    )
    refused("states have shape", some, states=made.states[0])
    refused("dx has shape", some, dx=np.ones(2))
    refused("dt=0.0 is outside", some, dt=np.zeros(3))
    refused("give one number a trajectory", some, dt=np.ones((3, 1)))
    refused(
        "states has 1 non-finite",
        some,
        states=np.where(made.states == made.states.max(), np.nan, made.states),
    )
    refused(
        "viscosity=0.0 is outside",
        pde.ks_trajectories,
        jax.random.key(0),
        1,
        viscosity=0.0,
    )
    refused(
        r"dt=0.1 is outside \[0.2",
        pde.ks_trajectories,
        jax.random.key(0),
        1,
        dt=(0.2, 0.1),
    )


def test_apebench_files_are_read(tmp_path, refused):
    fields = np.random.default_rng(0).normal(size=(2, 5, 2, 6, 6)).astype(np.float32)
    file = tmp_path / "2d_phy_burgers_train.npy"
    np.save(file, fields)
    found = pde.read_apebench(file)
    assert found.states.shape == (2, 5, 6, 6, 2) and found.equation == "2d_phy_burgers"
    assert_array_equal(found.states[1, 2, 3, 4], fields[1, 2, :, 3, 4])
    assert_allclose(found.dx, 1 / 6)
    info = {"name": "2d_phy_burgers", "info": {"domain_extent": 3.0, "dt": 0.5}}
    (tmp_path / "2d_phy_burgers.json").write_text(json.dumps(info))
    found = pde.read_apebench(file)
    assert_allclose(found.dx, 0.5)
    assert_allclose(found.dt, 0.5)
    (tmp_path / "2d_phy_burgers.json").write_text("{}")
    refused("has no 'info'", pde.read_apebench, file)
    for content, words in (
        (np.ones((2, 3)), "has shape"),
        (np.ones(3, int), "no array of floats"),
    ):
        np.save(file, content)
        refused(words, pde.read_apebench, file)
    np.save(file, np.array([{}]), allow_pickle=True)
    refused("no .npy file of numbers", pde.read_apebench, file)
    refused(
        "does not exist", pde.read_apebench, tmp_path / "a.npy", error=FileNotFoundError
    )


def test_pdearena_files_are_read(tmp_path, refused):
    h5py = pytest.importorskip("h5py")
    rng, path = np.random.default_rng(0), tmp_path / "ks.h5"
    field = rng.normal(size=(3, 7, 8))
    small = {
        "dt": np.full(3, 0.2),
        "dx": np.full(3, 0.25),
        "v": np.array([0.5, 1, 1.5]),
    }
    entries = {"pde_7-8": field, "x": np.zeros((3, 8)), "t": np.zeros((3, 7)), **small}

    def written(entries, split="train"):
        with h5py.File(path, "w") as file:
            for name, array in entries.items():
                file.create_dataset(f"{split}/{name}", data=array)
        return path

    found = pde.read_pdearena(written(entries))
    assert_array_equal(found.states[..., 0], field.astype(np.float32))
    assert_array_equal(found.parameters["viscosity"], small["v"])
    assert found.equation == "kuramoto_sivashinsky"
    refused(
        "split of .*'valid' is not one of 'train'", pde.read_pdearena, path, "valid"
    )
    refused("'w' is not understood", pde.read_pdearena, written(entries | {"w": field}))
    equal(pde.read_pdearena(path, ignore=("w",)), found)
    refused(
        "dx is missing",
        pde.read_pdearena,
        written({k: v for k, v in entries.items() if k != "dx"}),
    )
    refused(
        "but one resolution",
        pde.read_pdearena,
        written(entries | {"pde_7-4": field[..., ::2]}),
    )
    smoke = {n: rng.normal(size=(2, 3, 4, 4)) for n in ("u", "vx", "vy")}
    smoke |= {n: np.full(2, 0.25) for n in ("dt", "dx", "dy", "buo_y")}
    found = pde.read_pdearena(written(smoke, "test"), "test")
    assert_array_equal(found.states[..., 2], smoke["vy"].astype(np.float32))
    assert found.parameters.keys() == {"buoyancy"}
    refused("dx and dy differ", pde.read_pdearena, written(smoke | {"dy": np.ones(2)}))
    refused(
        "vx has shape", pde.read_pdearena, written(smoke | {"vx": smoke["vx"][:, :2]})
    )
