import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from tmdjax import envs
from tmdjax.envs.point_maze import PointMazeState

MAZE = envs.PointMaze()
STEP = jax.jit(MAZE.step)


def state_at(position, velocity=(0.0, 0.0), goal=(0.0, 0.0)):
    places = (jnp.array(p, jnp.float32) for p in (position, velocity, goal))
    return PointMazeState(*places, steps=jnp.int32(0))


def push(state, *force, times=1):
    """The state after steps at one force."""
    for _ in range(times):
        state = STEP(state, jnp.array(force), None).state
    return state


START = (-2.5, 2.5)  # the start cell has open cells to its right and below


def test_15_free_flight_in_closed_form():
    """v' = v + (100 a - v) dt / (m + dt c) is linear: v_n in one formula."""
    state, force = state_at(START), 0.02
    r = 1 - 0.01 / 4.19879
    p = START[0]
    for n in range(1, 40):
        state = push(state, force, 0.0)
        v = 100 * force * (1 - r**n)
        p += 0.01 * v
        np.testing.assert_allclose(state.velocity[0], v, rtol=2e-5)
    np.testing.assert_allclose(state.position, [p, START[1]], rtol=1e-5)


def test_15_speed_is_clipped_before_the_push_and_actions_are():
    for force in (1.0, 50.0):
        state = push(state_at(START, (9.0, 0.0)), force, 0.0)
        speed = 5 + 0.01 * 95 / 4.19879
        np.testing.assert_allclose(state.velocity[0], speed, rtol=1e-6)


def test_15_a_straight_run_ends_at_the_wall():
    # The first wall is to the left of the start cell.
    for direction, expected in (((-1.0, 0.0), (-2.9, 2.5)), ((0.0, 1.0), (-2.5, 2.9))):
        state = push(state_at(START), *direction, times=100)
        np.testing.assert_allclose(state.position, expected, atol=1e-5)
        np.testing.assert_allclose(state.velocity, 0, atol=1e-6)


def test_15_the_disc_overlaps_no_wall():
    """100,000 random steps, at full force mostly; distance of disc and wall cells."""
    walls = MAZE.cells("1")

    def walk(key):
        start, noise = jax.random.split(key)
        state, _ = MAZE.reset(start)

        def body(state, key):
            force = 2 * jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
            state = STEP(state, force, None).state
            return state, state.position

        return jax.lax.scan(body, state, jax.random.split(noise, 1000))[1]

    paths = jax.jit(jax.vmap(walk))(jax.random.split(jax.random.key(0), 100))
    gap = np.abs(np.asarray(paths)[..., None, :] - walls) - 0.5
    distance = np.linalg.norm(np.maximum(gap, 0), axis=-1)
    assert distance.min() >= 0.1 - 1e-4
    assert np.ptp(np.asarray(paths), axis=(0, 1)).min() > 1  # and it does move


def test_15_every_goal_can_be_reached():
    """By scipy: start and goals lie in one piece of what is no wall."""
    maze = np.array([[*row] for row in MAZE.maze])
    piece, _ = ndimage.label(maze != "1")
    assert (maze == "g").sum() == 3
    assert set(piece[maze == "g"]) == set(piece[maze == "r"])


def test_starts_goals_rewards_and_success():
    state, seen = jax.vmap(MAZE.reset)(jax.random.split(jax.random.key(1), 512))
    assert seen.shape == (512, 6)
    np.testing.assert_array_less(np.abs(state.position - np.array(START)), 0.2501)
    away = np.abs(np.asarray(state.goal)[:, None] - MAZE.cells("g")).max(-1)
    assert away.min(1).max() <= 0.2501 and set(away.argmin(1)) == {0, 1, 2}
    near, far = (state_at((2.5, 1.5), goal=(2.5, y)) for y in (1.2, 2.0))
    step = STEP(near, jnp.zeros(2), None)
    np.testing.assert_allclose(step.reward, np.exp(-0.3), rtol=1e-5)
    assert not step.truncated
    assert MAZE.success(near) and not MAZE.success(far)
    cut = STEP(near.replace(steps=jnp.int32(599)), jnp.zeros(2), None)
    assert cut.truncated and not cut.terminated


def test_bad_mazes(refused):
    for message, *maze in (
        ("has no 'g'", "111", "1r1", "111"),
        ("differ in length", "1111", "1rg1", "111"),
        ("open at its border", "1111", "1rg0", "1111"),
    ):
        refused(message, envs.PointMaze, maze=tuple(maze))
