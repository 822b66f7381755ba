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
# # A neural solver, called again and again
#
# A network that predicts the next state of an equation is called on its own output, many
# times. What it neglects in one step, small waves above all, comes back as an error of all of
# them. PDE-Refiner ([2308.05732](https://arxiv.org/abs/2308.05732)) predicts a step and then
# repairs ever smaller parts of it, by removing noise that it was given on purpose. It takes
# about two minutes on a CPU.

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

from tmdjax import metrics, models, train
from tmdjax.core import prng
from tmdjax.data import pde
from tmdjax.systems.pde_refiner import PDERefiner
from tmdjax.train import neural_solvers
from tmdjax.train.neural_solvers import OneStep

print("tmdjax", tmdjax.__version__, "on", jax.devices()[0].platform)

# %% [markdown]
# ## Chaos in one dimension
#
# $u_t + u\, u_x + u_{xx} + u_{xxxx} = 0$ on a periodic domain of length 44: long waves grow,
# short ones are damped, and the product hands energy from the first to the second. Two
# solutions that begin almost alike part after a while, so that every solver loses the truth
# at some time; the question is when. The data are made here, in float64.

# %%
POINTS, LENGTH, STRIDE = 64, 44.0, 4
SET = {"points": POINTS, "length": LENGTH, "dt": 0.2, "viscosity": 1.0, "warm_up": 360}
shown = pde.ks_trajectories(jax.random.key(0), 128, frames=140, **SET)
test = pde.ks_trajectories(jax.random.key(1), 16, frames=481, **SET)
truth = pde.every(test.states, STRIDE)  # [step, trajectory, x, 1], a step is 0.8
STEPS, STEP = len(truth) - 1, 0.2 * STRIDE
print(f"{shown.states.shape[0]} trajectories to learn from, {STEPS} steps to predict")


def draw(panels):
    """Fields [step, x] side by side, time upwards."""
    _, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 4))
    for axis, (title, field) in zip(axes, panels.items()):
        extent = (0, LENGTH, 0, STEP * len(field))
        axis.imshow(field, cmap="RdBu", vmin=-3, vmax=3, origin="lower",
                    extent=extent, aspect="auto")  # fmt: skip
        axis.set(title=title, xlabel="x")
    axes[0].set_ylabel("time")
    plt.show()


draw({f"truth {i}": truth[:, i, :, 0] for i in range(3)})

# %% [markdown]
# ## Two ways to train one network
#
# Both methods train the same dilated convolutions on pairs of states. `OneStep` regresses the
# next state. `PDERefiner` is called four times a step: first as the regression, then with
# noise of variance about `0.0001 ** (1/3)`, `0.0001 ** (2/3)` and `0.0001` on its own
# prediction, of which it says what noise it is.

# %%
network = models.DilatedResNet(width=16, layers=7, out_channels=1)
apply_fn = models.functional(network)
METHODS = {"squared error": OneStep(), "refiner": PDERefiner(3, min_variance=1e-4)}
UPDATES, BATCH = 2500, 32


def fit(method):
    """Averaged parameters after UPDATES."""
    channels = 2 if isinstance(method, PDERefiner) else 1  # a noised answer beside u
    params = models.init_params(
        network, jax.random.key(2), jnp.zeros((1, POINTS, channels)), jnp.ones(1)
    )
    optimizer = train.make_optimizer(
        train.OptimizerConfig(
            name="adam", learning_rate=2e-3, schedule="cosine", total_steps=UPDATES
        )
    )

    def loss(params, batch, keys):
        return method.loss(params, apply_fn, batch, keys), {}

    step = train.make_train_step(loss, optimizer, ema_decay=0.995)
    losses = {}
    fitted = train.fit(
        train.create_state(params, optimizer, ema=True),
        jax.jit(step, donate_argnums=0),
        pde.windows(shown, BATCH, seed=0, frames=2, stride=STRIDE),
        key=jax.random.key(3),
        num_steps=UPDATES,
        log_every=UPDATES // 4,
        on_metrics=lambda step, found: losses.update({step: round(found["loss"], 4)}),
    )
    print(losses)
    return fitted.state.eval_params


trained = {name: fit(method) for name, method in METHODS.items()}

# %% [markdown]
# The refiner's loss is larger because most of its levels ask what noise was added, of which
# the smallest is nearly hidden in what the network gets wrong anyway.
#
# ## Rollouts
#
# Each solver begins at the first true state and then sees its own states alone: one compiled
# program for all steps. `failed` says which rollouts left the finite numbers.

# %%
KEYS = prng.sample_keys(jax.random.key(4), truth.shape[1])


def stepper(name, params):
    """The step of a method, (history, keys) -> next state."""
    return lambda history, keys: METHODS[name].step(params, apply_fn, history, keys)


rolled, correlation = {}, {}
for name, params in trained.items():
    roll = jax.jit(
        lambda params, history, name=name: neural_solvers.rollout(
            stepper(name, params), history, KEYS, STEPS, bound=100.0
        )
    )
    found = roll(params, jnp.asarray(truth[0])[:, None])
    rolled[name] = np.asarray(found.outputs)
    correlation[name] = metrics.pearson_correlation(rolled[name], truth[1:])
    horizon = metrics.high_correlation_time(
        correlation[name].mean(1), 0.8, STEP, interpolate=True
    )
    print(
        f"{name}: correlation above 0.8 for {horizon.time:.1f} units of time"
        f"{' or longer' * bool(horizon.censored)}, {int(found.failed.sum())} failed"
    )

panels = {"truth": truth[1:, 0, :, 0]}
draw(panels | {name: states[:, 0, :, 0] for name, states in rolled.items()})
for name, r in correlation.items():
    plt.plot(STEP * np.arange(1, STEPS + 1), r.mean(1), label=name)
plt.axhline(0.8, color="grey", linewidth=0.5)
plt.gca().set(xlabel="time", ylabel="correlation with the truth, mean")
plt.legend()
plt.show()

# %% [markdown]
# ## Small waves
#
# The same networks, one step from every true state: their relative error at each wavenumber,
# and the power of their rollouts there. Waves beyond the 21st are not in the data.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
waves = slice(1, 22)


def power(states):
    """Mean square at each number of waves, of the later half."""
    return metrics.power_spectrum(states[len(states) // 2 :]).mean((0, 1))[waves, 0]


numbers = np.arange(1, 22)
right.semilogy(numbers, power(truth), "k", label="truth")
flat = truth[:-1].reshape(-1, 1, POINTS, 1)
for name, params in trained.items():
    keys = prng.sample_keys(jax.random.key(5), len(flat))
    once = jax.jit(
        lambda params, history, name=name: stepper(name, params)(history, keys)
    )
    after = np.asarray(once(params, jnp.asarray(flat))).reshape(truth[1:].shape)
    error = metrics.error_by_wavenumber(after, truth[1:])
    left.semilogy(numbers, error[waves], label=name)
    right.semilogy(numbers, power(rolled[name]), label=name)
left.set(xlabel="waves in the domain", ylabel="relative error of a step")
right.set(xlabel="waves in the domain", ylabel="mean square of rollouts")
right.legend()
plt.show()

# %% [markdown]
# ## How long can it be trusted?
#
# The refiner draws noise, so eight rollouts from one state differ. While they agree with each
# other they are probably right: the time at which they part predicts, for every trajectory,
# the time at which a rollout loses the truth, which nobody knows without a solver.

# %%
ensemble = jax.jit(
    lambda params, history: (
        neural_solvers.ensemble_rollout(
            stepper("refiner", params), history, KEYS, STEPS, members=8, bound=100.0
        ).outputs
    )
)(trained["refiner"], jnp.asarray(truth[0])[:, None])
agreed = neural_solvers.reliable_time(ensemble, 0.8, STEP).time
true = metrics.high_correlation_time(
    correlation["refiner"], 0.8, STEP, interpolate=True
)
r = float(metrics.pearson_correlation(agreed, true.time, 0))
plt.figure(figsize=(4, 4))
plt.scatter(agreed, true.time)
plt.plot([0, STEP * STEPS], [0, STEP * STEPS], color="grey", linewidth=0.5)
plt.gca().set(
    xlabel="the ensemble agrees, time",
    ylabel="the rollout is right, time",
    title=f"16 trajectories, correlation {r:.2f}",
)
plt.show()
assert all(time > 0 for time in agreed) and np.isfinite(rolled["refiner"]).all()

# %% [markdown]
# Trained for so short a while, either of the two may win. From here:
# [Long rollouts](../docs/pde_refiner.md) has a coarse classical solver and one that a network
# corrects beside them, and the experiment that compares all of them over seeds,
# `python -m experiments.run --config=configs/pde_refiner.py:cpu`.
