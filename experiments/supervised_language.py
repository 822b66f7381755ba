"""Gold responses of text tasks: their loss, and a stage before RL that learns them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from experiments import language_tasks as tasks
from tmdjax import models, quant, train
from tmdjax.core import trees
from tmdjax.core.checks import check_choice
from tmdjax.data import in_memory
from tmdjax.harness import StageContext, StageResult
from tmdjax.train.state import LearnerCounts


@struct.dataclass
class Gated(LearnerCounts):
    """Supervised training that stops learning once it is good enough.

    Attributes:
        learner: parameters and optimiser state.
        passed: bool scalar.
        accuracy: of the last look.
    """

    learner: Any
    passed: Any
    accuracy: Any


def loss_of(language: tasks.Language) -> Callable[..., Any]:
    """``(params, batch, keys) -> (loss [batch], {})`` of what ``tasks.pairs`` makes.

    Its mean is the cross-entropy a response token, in nats, over all of the batch. No
    randomness is used.
    """
    log_probs = tasks.log_probs_of(language.config)

    def loss_fn(params: Any, batch: Any, keys: Any) -> Any:
        tokens, mask = batch["tokens"], batch["mask"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        found, _ = log_probs(params, tokens, positions, (tokens != language.pad) + 0)
        # a mean over all response tokens of the batch, whatever their number
        share = mask.shape[0] / jnp.maximum(mask.sum(), 1)
        return -jnp.sum(jnp.where(mask, found, 0), 1) * share, {}

    return loss_fn


def of_all_arms(given: dict[str, Any]) -> dict[str, Any]:
    """The config of an arm, under ``sft.recipe`` on both sides where there is one.

    Arms of unlike precision then start from one policy.

    Raises:
        ValueError: an unknown recipe.
    """
    recipe = given["sft"].get("recipe")
    if recipe is None:
        return given
    check_choice("sft.recipe", recipe, quant.RECIPES)
    return given | {
        "precision": given["precision"] | {"rollout": recipe, "train": recipe}
    }


def train_to_gate(given: dict[str, Any], context: StageContext) -> StageResult:
    """Learns gold responses until the sampled accuracy passes the gate."""
    task, settings = tasks.build(given["task"]), given["sft"]
    language = tasks.language(given)
    optimizer = train.make_optimizer(
        train.OptimizerConfig(learning_rate=settings["learning_rate"])
    )

    loss = loss_of(language)
    update = jax.jit(train.make_train_step(loss, optimizer), donate_argnums=0)
    look = tasks.Judge(
        task,
        language,
        given["rl"],
        "evaluation",
        settings["problems"],
        1,
        context.key,
    )
    rng = np.random.default_rng(0)
    data = tasks.pairs(
        task,
        language,
        settings["pairs"],
        settings["length"],
        rng,
        settings.get("examples", 0),
    )

    def step(state: Gated, batch: Any, key: Any) -> tuple[Gated, dict[str, Any]]:
        if bool(state.passed):
            zero = {"loss": jnp.zeros(()), "grad_norm": jnp.zeros(())}
            return state, zero | {"accuracy": state.accuracy}
        learner, metrics = update(state.learner, batch, key)
        accuracy, passed = state.accuracy, state.passed
        count = int(learner.step)
        if count % settings["look_every"] == 0:
            seen = look(learner.params)
            accuracy = jnp.float32(seen["accuracy"])
            passed = accuracy >= settings["gate"]
        return Gated(learner, passed, accuracy), metrics | {"accuracy": accuracy}

    initial = train.create_state(language.parameters(context.key), optimizer)
    state = context.fit(
        Gated(initial, jnp.zeros((), bool), jnp.zeros(())),
        step,
        in_memory(data, settings["batch"]),
        num_steps=settings["steps"],
        log_every=settings["look_every"],
    )
    return StageResult(
        {"params": state.learner.params},
        {
            "sft_accuracy": float(state.accuracy),
            "sft_steps": float(state.learner.step),
            "parameters": float(trees.count(state.learner.params)),
        },
        model=models.spec_of(models.Decoder(language.config)),
    )
