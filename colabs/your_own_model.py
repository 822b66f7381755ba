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
# # Bring your own model
#
# tmdjax has no base class. A network is a function `apply_fn(params, x, t, cond)`; here it
# comes from a `flax.nnx` module. We train it on handwritten digits, let BOSS choose its
# step sizes, and sample it with log-probs, which is where reinforcement learning starts.
# It takes a few minutes on a CPU.

# %%
try:
    import matplotlib, sklearn, tmdjax
except ImportError:
    import pathlib

    # a checkout of tmdjax if the notebook lies in one, else the package
    SOURCE = ".." if pathlib.Path("../pyproject.toml").exists() else "tmdjax"
    # %pip install --quiet "{SOURCE}[demo]"
    import tmdjax

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from tmdjax import data, flows, models, train
from tmdjax.core import prng
from tmdjax.systems import boss

print("tmdjax", tmdjax.__version__, "on", jax.devices()[0].platform)

# %% [markdown]
# ## A module that knows nothing of tmdjax


# %%
class Denoiser(nnx.Module):
    """A residual MLP on flattened 8 x 8 digits, conditioned on time and class."""

    def __init__(self, width, depth, rngs):
        self.enter = nnx.Linear(64, width, rngs=rngs)
        self.time = nnx.Linear(32, width, rngs=rngs)
        self.label = nnx.Embed(11, width, rngs=rngs)  # the last one: no class
        self.blocks = nnx.List(
            [nnx.Linear(width, width, rngs=rngs) for _ in range(depth)]
        )
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(depth)])
        self.leave = nnx.Linear(width, 64, rngs=rngs)

    def __call__(self, x, t, label):
        angles = t[:, None] * 2.0 ** jnp.arange(-2, 14, dtype=jnp.float32)
        features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        c = nnx.silu(self.time(features) + self.label(label))
        h = self.enter(x.reshape(len(x), -1))
        for norm, block in zip(self.norms, self.blocks):
            h = h + nnx.silu(block(norm(h) + c))
        return self.leave(h).reshape(x.shape)


apply_fn, params = models.from_nnx(Denoiser(256, 4, nnx.Rngs(0)))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## Training
#
# One class in ten is dropped (class 10 says "none"), so that the network can be guided
# later.

# %%
digits = data.load("digits")
NONE = digits.num_classes


def loss_fn(params, batch, keys):
    return flows.flow_matching_loss(
        params,
        apply_fn,
        batch["image"],
        keys,
        batch["label"],
        null_cond=NONE,
        drop_rate=0.1,
    )


STEPS = 3000
optimizer = train.make_optimizer(
    train.OptimizerConfig(learning_rate=2e-3, schedule="cosine", total_steps=STEPS)
)
step = jax.jit(
    train.make_train_step(loss_fn, optimizer, ema_decay=0.999), donate_argnums=0
)
losses = {}
result = train.fit(
    train.create_state(params, optimizer, ema=True),
    step,
    data.in_memory(digits.train, batch_size=128),
    key=jax.random.key(0),
    num_steps=STEPS,
    log_every=250,
    on_metrics=lambda step, metrics: losses.update({step: metrics["loss"]}),
)
print({step: round(loss, 3) for step, loss in losses.items()})
assert losses[STEPS] < losses[250]

# %% [markdown]
# ## Sampling, with guidance
#
# Guidance wraps the velocity. Solvers know nothing of it.

# %%
velocity = flows.classifier_free_guidance(
    functools.partial(apply_fn, result.state.eval_params), 2.0, NONE
)
labels = jnp.tile(jnp.arange(10), 2)
noise = prng.normal(prng.sample_keys(jax.random.key(1), 20), (8, 8, 1))


def show(images, title):
    rows = np.asarray(images).reshape(2, 10, 8, 8)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    plt.figure(figsize=(8, 1.8))
    plt.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    plt.title(title)
    plt.axis("off")
    plt.show()


fine = flows.endpoints(velocity, noise, flows.uniform_grid(100), labels)
show(fine, "100 steps")

# %% [markdown]
# ## Step sizes by dynamic programming
#
# BOSS measures, along fine trajectories, what each long step would miss, and finds the best
# grid of K steps by Bellman's recursion. No training is needed, only the velocity.

# %%
found = boss.search(
    velocity,
    jax.random.key(2),
    shape=(8, 8, 1),
    cond=jnp.arange(100) % 10,
    budgets=(4, 8),
)


def miss(grid):
    """Mean squared distance to where 100 steps end, from the same noise."""
    return float(jnp.mean((flows.endpoints(velocity, noise, grid, labels) - fine) ** 2))


for budget in (4, 8):
    best = found.schedules[budget].times
    print(
        f"{budget} steps: uniform grid misses by {miss(flows.uniform_grid(budget)):.4f},"
    )
    print(f"         the searched one by {miss(best):.4f}: {np.round(best, 2)}")
show(
    flows.endpoints(velocity, noise, found.schedules[8].times, labels), "8 steps, BOSS"
)

# %% [markdown]
# ## A sampler with log-probs
#
# The same network, walked with noise, is a stochastic policy: each step is a Gaussian whose
# density comes back. Policy gradients (Flow-GRPO and its relatives) are built on that.

# %%
table = flows.make_table(
    "flow_grpo", flows.uniform_grid(10), window=flows.window(10, 0, 5)
)
keys = prng.sample_keys(jax.random.key(3), 20)
walk = flows.rollout(keys, velocity, noise, table, labels)
print("states", walk.states.shape, "log-probs", walk.log_prob.shape)
print("stochastic steps:", int(np.asarray(table.mask).sum()))
assert np.isfinite(walk.log_prob).all()
show(walk.states[-1], "10 steps, 5 of them with noise")

# %% [markdown]
# From here: [RL on flow models](../docs/flow_rl.md) shows the objective and the iteration,
# `python -m experiments.run --list` what is ready to run.
