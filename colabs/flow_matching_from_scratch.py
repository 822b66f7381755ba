# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Flow matching from scratch
#
# A flow model turns noise into data by following a velocity. Here we write the whole of it
# in a few lines of JAX, then do the same with tmdjax's functions, and look at what a
# budget of network evaluations (NFE) buys. It takes about a minute on a CPU.

# %%
try:
    import matplotlib, sklearn, tmdjax
except ImportError:
    import pathlib

    # a checkout of tmdjax if the notebook lies in one, else the package
    SOURCE = ".." if pathlib.Path("../pyproject.toml").exists() else "tmdjax"
    # %pip install --quiet "{SOURCE}[demo]"
    import tmdjax

import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

print("tmdjax", tmdjax.__version__, "on", jax.devices()[0].platform)

# %% [markdown]
# ## The path
#
# Time runs from noise (t = 1) to data (t = 0). Between a sample of data and one of noise
# we go straight:
#
# $$x_t = (1 - t)\, x_\text{data} + t\, x_\text{noise}, \qquad v = x_\text{noise} -
# x_\text{data}.$$
#
# A network that is regressed onto the velocity of random pairs learns their average at
# each place and time, and that average is a flow which carries noise to data.

# %%
from tmdjax import data

moons = data.load("two_moons", train_count=4096, test_count=2048)
points = moons.train["point"]
noise = np.random.default_rng(0).standard_normal(points.shape).astype(np.float32)

figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharex=True, sharey=True)
for axis, t in zip(axes, (1.0, 0.6, 0.3, 0.0)):
    x = (1 - t) * points + t * noise
    axis.scatter(*x[:1000].T, s=2)
    axis.set_title(f"t = {t}")
plt.show()

# %% [markdown]
# ## A network and its loss, by hand


# %%
def init(key, width=64):
    keys = jax.random.split(key, 3)
    sizes = [(7, width), (width, width), (width, 2)]
    return [
        {"w": jax.random.normal(k, s) / np.sqrt(s[0]), "b": jnp.zeros(s[1])}
        for k, s in zip(keys, sizes)
    ]


def apply_fn(params, x, t, cond=None):
    """Velocity [batch, 2] at points [batch, 2] and times [batch]."""
    angles = 2 * jnp.pi * t[:, None] * jnp.array([0.5, 1.0])
    h = jnp.concatenate([x, t[:, None], jnp.sin(angles), jnp.cos(angles)], -1)
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["w"] + layer["b"])
    return h @ params[-1]["w"] + params[-1]["b"]


def loss_by_hand(params, x_data, key):
    """Mean squared error to the velocity of random pairs, per example."""
    key_t, key_noise = jax.random.split(key)
    t = jax.random.uniform(key_t, (len(x_data),))
    x_noise = jax.random.normal(key_noise, x_data.shape)
    x_t = (1 - t[:, None]) * x_data + t[:, None] * x_noise
    error = apply_fn(params, x_t, t) - (x_noise - x_data)
    return jnp.mean(error**2, -1)


# %% [markdown]
# ## The same, from the library
#
# `flows.flow_matching_loss` is that loss: one number an example, one key a sample.
# `train.make_train_step` makes one pure update of any such loss, and skips updates that are
# not finite. The loop is yours; `train.fit` is one that checkpoints and resumes.

# %%
from tmdjax import flows, train
from tmdjax.core import prng


def loss_fn(params, batch, keys):
    return flows.flow_matching_loss(params, apply_fn, batch["point"], keys)


params = init(jax.random.key(0))
keys = prng.sample_keys(jax.random.key(1), 4096)
by_hand = loss_by_hand(params, points, jax.random.key(2)).mean()
ours = loss_fn(params, {"point": points}, keys)[0].mean()
print(
    f"loss of the untrained network: {by_hand:.3f} by hand, {ours:.3f} from the library"
)
assert abs(by_hand - ours) < 0.2

optimizer = train.make_optimizer(train.OptimizerConfig(learning_rate=3e-3))
step = jax.jit(
    train.make_train_step(loss_fn, optimizer, ema_decay=0.99), donate_argnums=0
)
state = train.create_state(params, optimizer, ema=True)
losses = []
result = train.fit(
    state,
    step,
    data.in_memory(moons.train, batch_size=512),
    key=jax.random.key(3),
    num_steps=2000,
    log_every=100,
    on_metrics=lambda step, metrics: losses.append(metrics["loss"]),
)
params = result.state.eval_params
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; what is left is the spread of pairs")

# %% [markdown]
# ## Sampling
#
# A sampler follows the velocity from t = 1 down to 0. By hand it is a loop of Euler steps;
# `flows.endpoints` is that loop, compiled as one program.

# %%
start = prng.normal(prng.sample_keys(jax.random.key(4), 2048), (2,))
grid = flows.uniform_grid(50)
x = start
for t, t_next in itertools.pairwise(grid):
    x = x - (t - t_next) * apply_fn(params, x, jnp.full(len(x), t, jnp.float32))


def velocity(x, t, cond=None):
    return apply_fn(params, x, t, cond)


samples = flows.endpoints(velocity, start, grid, None)
print("largest difference:", float(jnp.abs(samples - x).max()))
assert jnp.abs(samples - x).max() < 1e-4

# %%
from tmdjax import metrics

test = moons.test["point"]
figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharex=True, sharey=True)
for axis, nfe in zip(axes, (2, 4, 8, 50)):
    drawn = flows.endpoints(velocity, start, flows.uniform_grid(nfe), None)
    distance = metrics.sliced_wasserstein(drawn, test)
    axis.scatter(*np.asarray(drawn).T, s=2)
    axis.set_title(f"{nfe} steps, distance {distance:.3f}")
plt.show()

# %% [markdown]
# ## Straighter paths
#
# Random pairs cross, so the velocity bends, and few steps cut corners. Pairing each sample
# with noise that is near it (optimal transport inside the batch) makes paths straighter.

# %%


def coupled_loss(params, batch, keys):
    return flows.flow_matching_loss(
        params, apply_fn, batch["point"], keys, coupling=flows.optimal_coupling
    )


coupled_step = jax.jit(
    train.make_train_step(coupled_loss, optimizer, ema_decay=0.99), donate_argnums=0
)
coupled = train.fit(
    train.create_state(init(jax.random.key(0)), optimizer, ema=True),
    coupled_step,
    data.in_memory(moons.train, batch_size=128),
    key=jax.random.key(3),
    num_steps=2000,
).state.eval_params


def coupled_velocity(x, t, cond=None):
    return apply_fn(coupled, x, t, cond)


rows = {}
for nfe in (1, 2, 4, 8, 50):
    walked = [
        flows.endpoints(v, start, flows.uniform_grid(nfe), None)
        for v in (velocity, coupled_velocity)
    ]
    rows[nfe] = [metrics.sliced_wasserstein(w, test) for w in walked]
print("NFE   independent   coupled   (distance to held-out points)")
for nfe, (independent, near) in rows.items():
    print(f"{nfe:3d} {independent:13.3f} {near:9.3f}")
assert rows[2][1] < rows[2][0]

# %% [markdown]
# Next: a network of your own, its step sizes chosen by dynamic programming, and a sampler
# with log-probs, in `your_own_model.ipynb`.
