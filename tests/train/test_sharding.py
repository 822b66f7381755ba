"""Eight devices do what one does; one process, for what starts them is dear."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from tmdjax import train

EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax
from tmdjax import flows, models, train
from tmdjax.core.trees import flatten

module = models.build({"name": "mlp", "hidden": 128, "depth": 2})
apply_fn = models.functional(module)
x = jax.random.normal(jax.random.key(0), (16, 4))
params = models.init_params(module, jax.random.key(1), x, jnp.ones(16), None)
optimizer = optax.sgd(0.05)
def loss(params, batch, keys):
    return flows.flow_matching_loss(params, apply_fn, batch, keys)

def run(mesh, microbatches):
    step = train.make_train_step(loss, optimizer, ema_decay=0.9, microbatches=microbatches)
    state = train.create_state(jax.tree.map(jnp.array, params), optimizer, ema=True)
    step, state, place = train.jit_train_step(step, state, mesh)
    losses = []
    for i in range(5):
        batch = np.asarray(jax.random.normal(jax.random.key(i), (16, 4)))
        state, metrics = step(state, place(batch), jax.random.key(7))
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)

one, losses = run(train.make_mesh(devices=jax.devices()[:1]), 1)
for data, fsdp, micro in ((8, 1, 1), (2, 4, 1), (4, 2, 2)):
    state, other = run(train.make_mesh(data, fsdp), micro)
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, one.params
    )
    cut = [p for p in jax.tree.leaves(state.params) if not p.sharding.is_fully_replicated]
    assert bool(cut) == (fsdp > 1), (fsdp, len(cut))
    for p in cut:
        assert p.addressable_shards[0].data.size * fsdp == p.size
print("steps are the same")

mesh = train.make_mesh(devices=jax.devices()[:4])
_, _, place = train.jit_train_step(lambda s, b, k: (s, {}), {"w": np.ones(2)}, mesh)
try:
    place(np.ones((6, 2)))
except ValueError as error:
    print(error)

module = models.VideoDiT(heads=2, head_dim=8, depth=2, mlp_width=24, text_width=6, frequency_dim=8)
rng = np.random.default_rng(0)
inputs = [rng.normal(size=s).astype(np.float32) for s in ((4, 2, 4, 4, 2), (4, 5, 6))]
inputs.insert(1, np.linspace(0, 1, 4, dtype=np.float32))
params = models.init_params(module, jax.random.key(0), *inputs)
params = jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype(np.float32), params)
def run(mesh):
    placed = jax.device_put(params, train.fsdp_shardings(params, mesh, 1, train.VIDEO_DIT_RULES))
    video = jax.jit(models.functional(module))(placed, *jax.device_put(inputs, train.batch_sharding(mesh)))
    return np.asarray(video), flatten(placed)
want, _ = run(train.make_mesh(devices=jax.devices()[:1]))
assert np.abs(want).max() > 0.1
video, placed = run(train.make_mesh(2, 2, 2))
np.testing.assert_allclose(video, want, atol=1e-5)
for path, cut in {
    "attention/query/kernel": (1, 2, 2), "cross_attention/value/kernel": (1, 2, 2),
    "attention/out/kernel": (1, 2, 2), "mlp_in/kernel": (1, 2, 2), "mlp_out/kernel": (1, 2, 2),
    "attention/key_norm/scale": (1, 2), "attention/key/bias": (1, 2), "mlp_in/bias": (1, 2),
}.items():
    leaf = placed["blocks/" + path]
    shard = leaf.addressable_shards[0].data.shape
    assert tuple(a // b for a, b in zip(leaf.shape, shard)) == cut, path
    axes = dict(zip(leaf.sharding.spec[1:], range(2)))
    if path.endswith("kernel"):  # cut by the outputs on the way in, by the inputs on the way out
        assert axes["tensor"] == (0 if "out/" in path else 1), path
print("video is the same")

# parameters cut over fsdp are gathered, not the states of all 24 videos
module = models.VideoDiT(heads=2, head_dim=64, depth=2, mlp_width=256, text_width=6, frequency_dim=8)
apply_fn, sizes = models.functional(module), ((24, 2, 4, 4, 2), (24, 5, 6))
batch = dict(zip(("x_data", "cond"), (jax.ShapeDtypeStruct(s, jnp.float32) for s in sizes)))
key = jax.eval_shape(lambda: jax.random.key(0))
state = jax.eval_shape(
    lambda key: train.create_state(
        models.init_params(module, key, *(np.ones((1, *s[1:])) for s in (sizes[0], (1,), sizes[1]))), optimizer
    ), key
)
step = train.make_train_step(
    lambda p, b, k: flows.flow_matching_loss(p, apply_fn, b["x_data"], k, b["cond"]), optimizer
)
compiled, _, _ = train.sharding.jit_on_mesh(step, state, train.make_mesh(1, 8, 1), rules=train.VIDEO_DIT_RULES)
program = compiled.lower(state, batch, key).compile().as_text()
assert "[3,8,128]" in program and "[24,8," not in program
print("each device holds its videos")

tree = {"w": np.arange(2**15, dtype=np.float32).reshape(256, 128), "b": np.ones(3)}
placed = jax.device_put(tree, train.fsdp_shardings(tree, train.make_mesh(2, 4)))
assert not placed["w"].sharding.is_fully_replicated
train.Checkpoints(FOLDER).save(1, placed)
"""

TRAJECTORIES = """
from tmdjax.core import prng

keys = prng.sample_keys(jax.random.key(1), 8)
x = prng.normal(keys, (3,))
table = flows.make_table("flow_grpo", flows.uniform_grid(5))
sample = jax.jit(lambda k, x: flows.rollout(k, lambda x, t, c: x ** 3 / 4, x, table))
one = sample(keys, x)
assert len(one.states.sharding.device_set) == 1
eight = sample(*jax.device_put((keys, x), train.batch_sharding(train.make_mesh())))
assert len(eight.states.sharding.device_set) == 8
np.testing.assert_allclose(one.states, eight.states, atol=1e-6)
print("trajectories are the same")
"""

CONTROL = """
from tmdjax import envs
from tmdjax.systems.ppo import GaussianPolicy
from tmdjax.train.on_policy import ControlSettings, jit_iterations, make_trainer

trainer = make_trainer(
    envs.Vector(envs.MultiGoal(), 16),
    GaussianPolicy(hidden=(16,)),
    ControlSettings(unroll=4, epochs=2, minibatches=2, critic_hidden=(16,), normalise="running"),
)
key = jax.random.key(0)
start, mesh = jax.jit(trainer.init), train.make_mesh()
one, found = jit_iterations(trainer, 3)(start(key), key)
many, others = jit_iterations(trainer, 3, mesh=mesh)(start(key), key)
assert len(many.vector.observation.sharding.device_set) == 8
assert not many.vector.observation.sharding.is_fully_replicated
for x, y in zip(jax.tree.leaves((one.learner.params, found)),
                jax.tree.leaves((many.learner.params, others)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
print("control is the same")
"""


def test_eight_devices_equal_one(run_python, tmp_path):
    """Training steps, a video transformer, and a checkpoint that one device reads.

    And invariant 15 of stochastic samplers, and the on-policy iteration.
    """
    script = "".join([EIGHT_DEVICES, TRAJECTORIES, CONTROL])
    said = run_python(f"FOLDER = {str(tmp_path)!r}\n{script}", devices=8)
    assert "trajectories are the same" in said and "control is the same" in said
    assert "steps are the same" in said and "video is the same" in said
    assert "each device holds its videos" in said
    assert "batch of 6 does not divide over 4 devices" in said
    like = {"w": jnp.zeros((256, 128)), "b": jnp.zeros(3)}
    checkpoints = train.Checkpoints(tmp_path)
    for found in (checkpoints.restore(), checkpoints.restore(like=like)):
        assert_array_equal(found.tree["w"].ravel(), np.arange(2**15))


def test_mesh_must_fit_and_small_leaves_are_replicated(refused):
    one = jax.devices()[:1]
    refused("needs 3 devices, there are 1", train.make_mesh, data=3, devices=one)
    mesh = train.make_mesh(devices=one)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    shardings = train.fsdp_shardings({"w": np.ones((300, 300)), "b": np.ones(3)}, mesh)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))
