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
# # Fine-tune a cloned flow policy
#
# A policy that draws actions by a flow can be cloned from demonstrations, and keeps what
# they disagree about. It is no better than they are. ReinFlow
# ([2505.22094](https://arxiv.org/abs/2505.22094)) makes it better: a small network adds
# noise to the few steps of the flow, so that the walk has a likelihood, and PPO does the
# rest; afterwards the noise is thrown away. It takes about two minutes on a CPU.

# %%
try:
    import matplotlib, sklearn, tmdjax
except ImportError:
    import pathlib

    # a checkout of tmdjax if the notebook lies in one, else the package
    SOURCE = ".." if pathlib.Path("../pyproject.toml").exists() else "tmdjax"
    # %pip install --quiet "{SOURCE}[demo]"
    import tmdjax

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from tmdjax import data, envs, rl, train
from tmdjax.core import prng
from tmdjax.systems.reinflow import ReinFlow
from tmdjax.train import on_policy

print("tmdjax", tmdjax.__version__, "on", jax.devices()[0].platform)

# %% [markdown]
# ## Six goals, and demonstrations that dawdle
#
# A point mass in a square is paid for being near any of six goals. Whoever demonstrates
# picks one of the nearer goals and goes there, slowly and with a trembling hand. The policy
# does not see which goal was picked.

# %%
WORLD = envs.MultiGoal()
GOALS = jnp.asarray(WORLD.goal_positions, jnp.float32)
CHUNK, BOUND = 4, WORLD.action_bound


def demonstrate(key):
    """One episode: observations [step, 4], actions [step, 2], rewards [step]."""
    start, pick, tremble = jax.random.split(key, 3)
    state, seen = WORLD.reset(start)
    likely = -0.5 * WORLD.distance(state.position)
    goal = GOALS[jax.random.categorical(pick, likely)]

    def step(carry, key):
        state, seen = carry
        action = 0.5 * (goal - seen[:2]) - 1.2 * seen[2:]
        action = jnp.clip(action + jax.random.normal(key, (2,)), -BOUND, BOUND)
        after = WORLD.step(state, action, key)
        return (after.state, after.observation), (seen, action, after.reward)

    keys = jax.random.split(tremble, WORLD.horizon)
    return jax.lax.scan(step, (state, seen), keys)[1]


EPISODES = 200
seen, action, reward = jax.jit(jax.vmap(demonstrate))(
    jax.random.split(jax.random.key(0), EPISODES)
)
last = np.arange(EPISODES * WORLD.horizon) % WORLD.horizon == WORLD.horizon - 1
shown = data.Demonstrations(
    observation=np.asarray(seen).reshape(-1, 4),
    action=np.asarray(action).reshape(-1, 2),
    reward=np.asarray(reward).reshape(-1),
    terminated=np.zeros(len(last), bool),
    truncated=last,  # a time limit
)
print(f"{len(last):,} steps, {shown.returns.mean():.2f} reward an episode")

# %% [markdown]
# ## Cloning
#
# The policy draws four actions at once, by four steps of its flow from noise. Cloning is
# flow matching of these chunks.

# %%
method = ReinFlow(
    hidden=(64, 64, 64),
    noise_hidden=(32, 32),
    steps=4,
    bound=BOUND,
    decay_iterations=100,  # the bound of the noise falls over the training below
)
chunks = data.action_chunks(shown, CHUNK)
bounds = data.observation_bounds(shown)
statistics = rl.RunningStatistics(
    np.float32(len(last)), bounds.middle, bounds.half_width**2
)
chunks["observation"] = np.asarray(statistics.normalise(chunks["observation"]))
params = method.init(jax.random.key(1), chunks["observation"][:1], 2 * CHUNK)


def cloning_loss(params, batch, keys):
    return method.cloning_loss(params, batch["observation"], batch["action"], keys), {}


STEPS = 3000
optimizer = train.make_optimizer(
    train.OptimizerConfig(learning_rate=1e-3, schedule="cosine", total_steps=STEPS)
)
step = train.make_train_step(cloning_loss, optimizer, ema_decay=0.995)
losses = {}
fitted = train.fit(
    train.create_state(params, optimizer, ema=True),
    jax.jit(step, donate_argnums=0),
    data.in_memory(chunks, batch_size=256),
    key=jax.random.key(2),
    num_steps=STEPS,
    log_every=500,
    on_metrics=lambda step, metrics: losses.update({step: round(metrics["loss"], 3)}),
)
clone = fitted.state.eval_params["network"]
print(losses)

# %% [markdown]
# ## What it does
#
# The deployed policy is the flow without added noise: it is random because its start is.

# %%
ACTED = envs.Chunked(WORLD, CHUNK)
AGENTS = 300


@jax.jit
def walk(policy, key):
    """Places [chunk, agent, 2] and rewards [chunk, agent] of one episode."""
    begin, key = jax.random.split(key)
    start = jax.vmap(WORLD.reset)(jax.random.split(begin, AGENTS))

    def step(carry, key):
        state, seen = carry
        keys = prng.sample_keys(key, AGENTS)
        action = method.evaluate(policy, statistics.normalise(seen), keys)
        after = jax.vmap(ACTED.step)(state, action, keys)
        return (after.state, after.observation), (after.state.position, after.reward)

    return jax.lax.scan(step, start, jax.random.split(key, ACTED.horizon))[1]


def show(policy, title):
    place, reward = walk(policy, jax.random.key(5))
    inside = (np.abs(place) < WORLD.wall).all((0, 2))
    reached = envs.goal_counts(WORLD, place[-1], inside).sum() / AGENTS
    total = float(reward.sum(0).mean())
    print(f"{title}: {total:.2f} reward an episode, {reached:.0%} end at a goal")
    plt.figure(figsize=(4, 4))
    plt.plot(place[..., 0], place[..., 1], color="C0", alpha=0.1)
    plt.scatter(*WORLD.goal_positions.T, color="C3", zorder=3)
    plt.title(title)
    plt.show()
    return total


before = show({**params, "network": clone}, "clone")

# %% [markdown]
# ## Fine-tuning
#
# A hundred iterations of PPO on the chain of the noisy steps. Before the first update of each
# iteration the ratios must be 1: `check` stops the run where they are not, or where most
# log-probs were clipped.

# %%
trainer = on_policy.make_trainer(
    envs.Vector(ACTED, count=128),
    method,
    on_policy.ControlSettings(
        unroll=26,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        critic_warmup=3,
        value_clip=None,
        scale_rewards=True,
        normalise="fixed",
        critic_hidden=(64, 64),
    ),
)
key = jax.random.key(3)
state = trainer.init(key, policy=method.pretrained(clone), statistics=statistics)
run = on_policy.jit_iterations(trainer, iterations=100)
state, metrics = run(state, key)
on_policy.check(metrics, trainer.settings)
print("first ratios are 1 to", f"{float(metrics['first_ratio_error'].max()):.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
left.plot(metrics["reward_mean"])
left.set(xlabel="iteration", ylabel="reward a chunk, with noise")
right.plot(metrics["std"])
right.set(xlabel="iteration", ylabel="standard deviation of a step")
plt.show()

# %%
after = show(state.learner.params["policy"], "fine-tuned")
assert after > before

# %% [markdown]
# `method.steps` may be 1: then an action costs one call of the network. From here:
# [Control](../docs/control.md) has DPPO, demonstrations in files, and the experiment that
# compares them, `python -m experiments.run --config=configs/reinflow.py:cpu`.
