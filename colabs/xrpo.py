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
# # Rollouts where they teach
#
# Group-relative RL writes as many responses to every prompt, and learns nothing from those
# that all agree. XRPO ([2510.06672](https://arxiv.org/abs/2510.06672)) writes in rounds: after
# the first, responses go where one more tells most of a prompt's mean reward; and a right answer
# that was unlikely gets a larger advantage. `rl.allocate` and `rl.sharpen` are these two rules,
# for a training loop of your own. It takes half a minute on a CPU.

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
import optax

from tmdjax import rl

print("tmdjax", tmdjax.__version__, "on", jax.devices()[0].platform)

# %% [markdown]
# ## Where one more response tells most
#
# The mean of n rewards with standard deviation s is known to half of Student's interval,
# $h(n) = t\, s / \sqrt{n}$. One more response makes it smaller by $h(n) - h(n + 1)$: the priority of
# a prompt is this, and a bonus for prompts with few responses. Here are four prompts after four
# responses each, and where eight more go.

# %%
rewards = np.array([[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
count, std = np.full(4, 4), rewards.std(1, ddof=1)
print("half widths", rl.half_width(count, std).round(2))
for exploration in (0.0, 0.05, 1.0):
    further = rl.allocate(count, std, budget=8, most=32, exploration=exploration)
    print(f"exploration {exploration}: {further}")

# %% [markdown]
# ## Is it worth it?
#
# Prompts with known chances: are means of the mixed ones known better than by eight responses to
# each? A round of four each, and two rounds for the rest. The rule has a weakness: a mixed prompt
# whose first four rewards happen to be equal has s = 0, counts as certain, and is starved.
# `rl.posterior_std` takes s from a posterior that is never 0.

# %%
MIXTURES = {
    "three of seven mixed": np.repeat([0.2, 0.5, 0.8, 0, 0, 1, 1], 4),
    "half mixed, at 1/2": np.repeat([0.5, 0.5, 0, 1], 4),
}


def squared_error(chance, rule, prior=False, repeats=300):
    """Of means of mixed prompts: one number a repeat, by the same rewards for all rules."""
    rng, found = np.random.default_rng(0), []
    for _ in range(repeats):
        drawn = rng.random((len(chance), 32)) < chance[:, None]
        n = np.full(len(chance), 4)
        for rounds_left in (2, 1):
            seen = np.arange(32) < n[:, None]
            std = np.std(drawn, axis=1, ddof=1, where=seen)
            if prior:
                std = rl.posterior_std((drawn & seen).sum(1), n)
            spend = (8 * len(chance) - n.sum()) // rounds_left
            n = n + rl.allocate(n, std, spend, most=32, rule=rule)
        assert n.sum() == 8 * len(chance)
        mean = np.mean(drawn, axis=1, where=np.arange(32) < n[:, None])
        mixed = (0 < chance) & (chance < 1)
        found.append(np.square(mean - chance)[mixed].mean())
    return np.array(found)


RULES = {"sample's deviation": {}, "posterior's": {"prior": True}}
figure, axis = plt.subplots(figsize=(6, 3))
for i, (name, chance) in enumerate(MIXTURES.items()):
    even = squared_error(chance, "uniform")
    for j, (label, options) in enumerate(RULES.items()):
        change = (squared_error(chance, "greedy", **options) - even) / even.mean()
        error = change.std() / np.sqrt(len(change))
        print(f"{name}, {label}: {change.mean():+.1%} (standard error {error:.1%})")
        axis.bar(i + 0.3 * j, change.mean(), 0.28, yerr=error, color=f"C{j}",
                 label=label if i == 0 else None)  # fmt: skip
axis.axhline(0, color="grey", linewidth=0.5)
axis.set_xticks([0.15, 1.15], list(MIXTURES))
axis.set_ylabel("squared error against equal counts")
axis.legend()
plt.show()

# %% [markdown]
# ## Sharpening by hand
#
# Six answers to one prompt, three of them right. s is the mean log-prob of an answer's tokens;
# $\eta = \exp(s - \bar s)$ is below 1 for answers that are less likely than the group's. A right one
# has $A + \min(\max(2.5 (1 - \eta), 0), A / 2)$; wrong ones keep their advantage.

# %%
right = np.array([True, True, True, False, False, False])
s = np.array([-0.2, -0.5, -1.4, -0.3, -0.6, -0.6], np.float32)
one = np.zeros(6, int)  # all of group 0
advantage = rl.group_advantages(right.astype(np.float32), one, num_groups=1)
sharpened = rl.sharpen(advantage, s, one, right, num_groups=1)
eta = np.exp(s - s.mean())
for row in zip(right, s, eta, advantage, sharpened):
    print("right {:d}  s {:+.1f}  eta {:.2f}  A {:+.2f} -> {:+.2f}".format(*row))
expected = advantage + right * np.minimum(np.maximum(2.5 * (1 - eta), 0), advantage / 2)
np.testing.assert_allclose(sharpened, expected, rtol=1e-5)

# %% [markdown]
# ## In a loop of your own
#
# A task with many right answers and prompts of every difficulty: *name two digits that are at
# least d apart*. d = 0 is always right, d = 9 twice in a hundred, d = 10 never. The policy is a table:
# logits of the first digit by prompt, and of the second by prompt and first digit.

# %%
APART = np.repeat(np.arange(11), 3)  # d of 33 prompts
PROMPTS, BUDGET = len(APART), 8 * len(APART)
first, second = np.divmod(np.arange(100), 10)  # an answer is a number of two digits
RIGHT = np.abs(first - second) >= APART[:, None]  # [prompt, answer]
START = {"first": jnp.zeros((PROMPTS, 10)), "second": jnp.zeros((PROMPTS, 10, 10))}
OPTIMIZER = optax.adam(0.05)


def token_log_probs(params, prompt, answer):
    """Of the two digits of each answer, [response, 2]."""
    a, b = answer // 10, answer % 10
    one = jax.nn.log_softmax(params["first"])[prompt, a]
    two = jax.nn.log_softmax(params["second"])[prompt, a, b]
    return jnp.stack([one, two], axis=1)


@jax.jit
def chances(params):
    """Of all answers, [prompt, answer]."""
    one = jax.nn.log_softmax(params["first"])[:, :, None]
    both = one + jax.nn.log_softmax(params["second"])
    return jnp.exp(both.reshape(PROMPTS, 100))


def write(table, prompt, rng):
    """An answer to each prompt of a list."""
    below = table[prompt].cumsum(1) < rng.random(len(prompt))[:, None]
    return np.minimum(below.sum(1), 99)


def collect(table, rng, rule):
    """BUDGET answers in three rounds: prompts, answers, rewards."""
    prompt = np.repeat(np.arange(PROMPTS), 4)
    answer = write(table, prompt, rng)
    for rounds_left in (2, 1):
        reward = RIGHT[prompt, answer]
        count = np.bincount(prompt, minlength=PROMPTS)
        solved = np.bincount(prompt, reward, minlength=PROMPTS)
        std = rl.posterior_std(solved, count)
        spend = (BUDGET - len(prompt)) // rounds_left
        further = rl.allocate(count, std, spend, most=32, rule=rule)
        more = np.repeat(np.arange(PROMPTS), further)
        prompt = np.concatenate([prompt, more])
        answer = np.concatenate([answer, write(table, more, rng)])
    return prompt, answer, RIGHT[prompt, answer]


@jax.jit
def credit(params, prompt, answer, right):
    """Log-probs of the policy that wrote, and advantages, plain and sharpened."""
    behaviour = token_log_probs(params, prompt, answer)
    plain = rl.group_advantages(right, prompt, num_groups=PROMPTS)
    sharp = rl.sharpen(plain, behaviour.mean(1), prompt, right, num_groups=PROMPTS)
    return behaviour, plain, sharp


@jax.jit
def update(params, state, prompt, answer, behaviour, advantage):
    def loss(params):
        log_prob = token_log_probs(params, prompt, answer)
        return rl.clipped_surrogate(
            log_prob, behaviour, advantage[:, None], clip_range=0.2
        ).mean()

    change, state = OPTIMIZER.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, change), state


def train(seed, rule, sharpened, iterations=80):
    """Chance of a right answer and how many right ones are used, by iteration."""
    rng, params, state = np.random.default_rng(seed), START, OPTIMIZER.init(START)
    rows = []
    for _ in range(iterations):
        table = np.asarray(chances(params), np.float64)
        good = table * RIGHT
        share = good / np.maximum(good.sum(1, keepdims=True), 1e-12)
        used = np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum(1))
        solvable = APART < 10
        rows.append((good.sum(1)[solvable].mean(), used[solvable].mean()))
        prompt, answer, right = collect(table, rng, rule)
        assert len(prompt) == BUDGET
        behaviour, plain, sharp = credit(params, prompt, answer, right)
        advantage = sharp if sharpened else plain
        params, state = update(params, state, prompt, answer, behaviour, advantage)
    return np.array(rows)


# %% [markdown]
# Equal numbers of responses in all three: eight to each prompt (the group-relative baseline), the
# same number where they tell most, and the latter with sharpening. Four seeds each; a line is
# their mean.

# %%
ARMS = {
    "equal counts": ("uniform", False),
    "allocation": ("greedy", False),
    "allocation, sharpened": ("greedy", True),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for name, arm in ARMS.items():
    runs = np.stack([train(seed, *arm) for seed in range(4)])
    for axis, curve in zip(axes, runs.mean(0).T):
        axis.plot(curve, label=name)
    ends = runs[:, -1]
    told = [f"{m:.3f} (+- {e:.3f})" for m, e in zip(ends.mean(0), ends.std(0) / 2)]
    print(f"{name}: chance of a right answer {told[0]}, right answers used {told[1]}")
    assert (runs[:, -1, 0] > runs[:, 0, 0]).all()
for axis, label in zip(axes, ("chance of a right answer", "right answers used")):
    axis.set(xlabel="iteration", ylabel=label)
axes[0].legend()
plt.show()

# %% [markdown]
# Here allocation gains nothing over equal counts, and sharpening keeps more right answers in use
# at a slightly smaller chance of a right one. A table's prompts share nothing; whether the rules
# pay for a language model is what the experiment is for.
#
# What is left out here: worked examples before prompts that nobody solved, which need a policy
# that reads. `xrpo.preset("xrpo")` has all three parts for a language model, as the objective and
# the planner of `runtime.make_iteration`. From here: [XRPO](../docs/xrpo.md) says what the paper
# leaves open and what was chosen, and names the experiment that sets it beside GRPO, GSPO and
# DAPO, `python -m experiments.run --config=configs/xrpo.py:smoke`.
