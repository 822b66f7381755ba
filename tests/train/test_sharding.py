import jax
import numpy as np
import pytest

from tmdjax import train

EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax
from tmdjax import flows, models, train

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
    for i in range(20):
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
print("same")
"""


def test_eight_devices_equal_one(run_python):
    assert run_python(EIGHT_DEVICES, devices=8).strip().endswith("same")


def test_batch_that_does_not_divide(run_python):
    code = """
import jax, numpy as np
from tmdjax import train
mesh = train.make_mesh()
_, _, place = train.jit_train_step(lambda s, b, k: (s, {}), {"w": np.ones(2)}, mesh)
try:
    place(np.ones((6, 2)))
except ValueError as error:
    print(error)
"""
    assert "batch of 6 does not divide over 4 devices" in run_python(code, devices=4)


def test_mesh_must_fit():
    with pytest.raises(ValueError, match="needs 3 devices, there are 1"):
        train.make_mesh(data=3, devices=jax.devices()[:1])
    mesh = train.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_small_leaves_are_replicated():
    mesh = train.make_mesh(devices=jax.devices()[:1])
    shardings = train.fsdp_shardings({"w": np.ones((300, 300)), "b": np.ones(3)}, mesh)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))
