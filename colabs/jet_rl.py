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
# # One precision for rollouts and training
#
# Rollouts in 8 bits are fast, but they are another policy than the one that 16 bits train. Jet-RL
# ([2601.14243](https://arxiv.org/abs/2601.14243)) computes both in the same 8-bit products. Here:
# what 8 bits keep, how far two arithmetics are apart on the same tokens, what that does to clipping,
# and a training loop of one's own in four arms. It takes about a minute on a CPU, which computes
# 8-bit products in float32: the same numbers, no speed.

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
import optax

from tmdjax import models, quant, rl
from tmdjax.systems import jet_rl

print("tmdjax", tmdjax.__version__, "on", jax.devices()[0].platform)

# %% [markdown]
# ## What 8 bits keep
#
# A float8 number has three bits behind its point: a relative error of up to 1/16. What shares a
# scale with something large loses more only where it becomes very small beside it.

# %%
x = np.float32(np.random.default_rng(0).normal(size=(4, 256)))
x[0, 3] = 1e5
for granularity in ("tensor", "row", "1x128"):
    q = quant.quantise(jnp.asarray(x), granularity)
    error = np.abs(q.dequantise() - x) / np.abs(x)
    print(f"{granularity:7} {q.scale.size:2} scales, median relative error by row",
          np.median(error, 1).round(3))  # fmt: skip

# %% [markdown]
# ## Two arithmetics, the same tokens
#
# A small decoder reads texts twice: token by token with a cache, as a rollout does, and at once, as
# training does; each under the recipe of its side. The head is float32. `outlier_channels` rewrites
# the weights so that large terms cancel: no function changes, but rounding is felt more.

# %%
SIZES = dict(vocab_size=32, hidden_size=128, intermediate_size=256, num_layers=2,
             num_heads=4, num_kv_heads=4, head_dim=32, head_recipe="fp32",
             remat=False)  # fmt: skip
PLAIN = models.DecoderConfig(**SIZES)
TEXTS = jax.random.randint(jax.random.key(0), (16, 24), 0, 32)
params = models.init_params(models.Decoder(PLAIN), jax.random.key(1), TEXTS)
params = jax.tree.map(lambda w: 3 * w if w.ndim > 1 else w, params)
stressed = jet_rl.outlier_channels(params, PLAIN)


@functools.cache
def at_once(recipe):
    network = models.Decoder(models.with_recipe(PLAIN, recipe))
    return jax.jit(models.functional(network))


@functools.cache
def by_token(recipe):
    config = models.with_recipe(PLAIN, recipe)

    @jax.jit
    def run(params):
        weights = models.prepare_weights(params, config)

        def step(cache, at):
            where = jnp.full(len(TEXTS), at)
            logits, cache = models.decode(config, weights, cache, TEXTS[:, at], where)
            return cache, logits

        cache = models.init_cache(config, *TEXTS.shape)
        return jax.lax.scan(step, cache, jnp.arange(TEXTS.shape[1]))[1].swapaxes(0, 1)

    return run


def of_texts(logits):
    """Log-probs of the tokens that follow, [text, position]."""
    return models.token_log_probs(logits, TEXTS)[:, 1:]


exact = at_once("fp32")
print("outliers change logits by",
      f"{jnp.abs(exact(params, TEXTS) - exact(stressed, TEXTS)).max():.0e}")  # fmt: skip
PAIRS = {
    "bf16, bf16": ("bf16_out_fp32", "bf16_out_fp32"),
    "fp8, bf16": ("fp8_block_out_fp32", "bf16_out_fp32"),
    "fp8, fp8": ("fp8_block_out_fp32", "fp8_block_out_fp32"),
}
mask = jnp.ones((len(TEXTS), TEXTS.shape[1] - 1), bool)
kl = {}
for name, weights in (("plain", params), ("outliers", stressed)):
    for pair, (rollout, train) in PAIRS.items():
        found = rl.mismatch(of_texts(at_once(train)(weights, TEXTS)),
                            of_texts(by_token(rollout)(weights)), mask)  # fmt: skip
        kl[name, pair] = float(found["mismatch_kl"])
        print(f"{name:9} {pair:11} KL {found['mismatch_kl']:.1e} nats a token, "
              f"largest difference {found['mismatch_max']:.1e}")  # fmt: skip
    assert kl[name, "fp8, fp8"] < kl[name, "fp8, bf16"] / 10

# %% [markdown]
# ## What rounding does to clipping
#
# The loss gives no gradient to a token of negative advantage once its ratio is below 0.8. Rounding
# spreads ratios, so that more of them are there than exact arithmetic would put there.
# `rl.calibrate_clip_range` moves the bounds until as many are clipped as that would clip.

# %%
rng = np.random.default_rng(0)
shadow = rng.normal(0, 0.08, 20000)  # log-ratios in exact arithmetic
ratios = shadow + rng.normal(0, 0.06, shadow.shape)
advantage = rng.choice([-1.0, 1.0], shadow.shape)
bounds = rl.calibrate_clip_range(ratios, shadow, advantage, 0.2)
for name, given, clip in (("exact, 0.2", shadow, 0.2), ("rounded, 0.2", ratios, 0.2),
                          ("rounded, calibrated", ratios, bounds)):  # fmt: skip
    below, above = rl.clipped_shares(given, advantage, clip)
    print(f"{name:20} {below:.2%} of negative and {above:.2%} of positive advantage")
plt.figure(figsize=(6, 2.5))
bins = np.linspace(0.6, 1.5, 80)
for name, given in (("exact", shadow), ("rounded", ratios)):
    plt.hist(np.exp(given), bins, histtype="step", log=True, label=name)
for bound in (1 - bounds[0], 1 + bounds[1]):
    plt.axvline(bound, color="C1", linestyle=":")
plt.xlabel("ratio")
plt.legend()
plt.show()

# %% [markdown]
# ## In a loop of your own
#
# A policy of three products, and 64 prompts with one right answer of 32 each. Each of 60 steps draws
# eight answers a prompt under the rollout's recipe and makes two updates under that of training.

# %%
PROMPTS, ANSWERS, GROUP, STEPS = 64, 32, 8, 60
FEATURES = jax.random.normal(jax.random.key(2), (PROMPTS, 128))
TARGET = jax.random.randint(jax.random.key(3), (PROMPTS,), 0, ANSWERS)
WIDTHS = (128, 256, 256, ANSWERS)
START = [
    jax.random.normal(jax.random.key(i), (WIDTHS[i], WIDTHS[i + 1])) / WIDTHS[i] ** 0.5
    for i in range(3)
]
OPTIMIZER = optax.adam(3e-4)
ROW = jnp.repeat(jnp.arange(PROMPTS), GROUP)


def log_probs(params, recipe):
    """Of all answers to each prompt."""
    h = FEATURES
    for w in params[:-1]:
        h = jax.nn.silu(quant.linear(h, w, recipe))
    logits = quant.linear(h, params[-1], recipe)
    return jax.nn.log_softmax(3 * logits.astype(jnp.float32))


def train(arm, key):
    """Rewards and mismatch, one number a step."""
    recipes, objective = jet_rl.precision(arm), jet_rl.preset(arm)

    def step(state, key):
        params, moments = state
        acting = log_probs(params, recipes.rollout)[ROW]
        answer = jax.random.categorical(key, acting)
        pick = lambda x: jnp.take_along_axis(x, answer[:, None], 1)  # noqa: E731
        behaviour = pick(acting)
        proximal = pick(log_probs(params, recipes.train)[ROW])
        reward = (answer == TARGET[ROW]).astype(jnp.float32)
        advantage = rl.group_advantages(reward, ROW, num_groups=PROMPTS)
        weight = 1.0
        if objective.correction == "truncate":
            weight = rl.truncated_weights(
                proximal, behaviour, high=objective.max_weight
            )

        def loss(params):
            ours = pick(log_probs(params, recipes.train)[ROW])
            each = rl.clipped_surrogate(ours, proximal, advantage,
                                        clip_range=objective.clip_range)  # fmt: skip
            return jnp.mean(each * weight)

        for _ in range(2):
            updates, moments = OPTIMIZER.update(jax.grad(loss)(params), moments)
            params = optax.apply_updates(params, updates)
        told = rl.mismatch(proximal, behaviour, jnp.ones_like(behaviour, bool))
        return (params, moments), (reward.mean(), told["mismatch_mean"])

    start = START, OPTIMIZER.init(START)
    return jax.jit(lambda keys: jax.lax.scan(step, start, keys)[1])(key)


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
apart = {}
for arm in ("bf16", "fp8_rollout", "truncated", "unified"):
    reward, distance = train(arm, jax.random.split(jax.random.key(5), STEPS))
    apart[arm] = float(distance.mean())
    left.plot(reward, label=arm)
    right.semilogy(np.maximum(distance, 1e-9), label=arm)
    assert reward[-5:].mean() > reward[:5].mean() + 0.2
    print(f"{arm:12} reward {reward[-5:].mean():.2f} at the end, mean difference of "
          f"log-probs {apart[arm]:.1e}")  # fmt: skip
left.set(xlabel="step", ylabel="mean reward")
right.set(xlabel="step", ylabel="mean |d log-prob|")
right.legend()
plt.show()
assert apart["unified"] < apart["fp8_rollout"] / 10

# %% [markdown]
# On a problem as small as this all arms learn; where mismatch grows with length and model, the paper
# sees the second one fail. From here: [Jet-RL](../docs/jet_rl.md) has the arms on a language model,
# `python -m experiments.run --config=configs/jet_rl.py:cpu`.
