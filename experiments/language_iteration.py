"""The iteration of RL on a language model that an arm of a config describes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import language_tasks as tasks
from experiments.arms import build_method
from tmdjax import generation, models, quant, runtime, train
from tmdjax.harness import StageContext
from tmdjax.models import lora
from tmdjax.runtime.settings import Draw, Score
from tmdjax.systems import jet_rl, xrpo

SHADOWS = {"bfloat16": "bf16", "float32": "bf16_out_fp32"}
"""The recipe by whose log-probs a clip range is calibrated, by the dtype of results."""


def start_of(given: dict[str, Any], context: StageContext) -> Any:
    """Parameters before reinforcement learning: supervised ones, or the weights.

    Where the config has 'stress' they are
    :func:`tmdjax.systems.jet_rl.outlier_channels` of these, with its 'channels' (0 for
    none) and 'factor'.
    """
    language, stress = tasks.language(given), given.get("stress")
    if "sft" in context.inputs:
        params = jax.tree.map(jnp.asarray, context.inputs["sft"].outputs["params"])
    else:
        params = language.parameters(context.key)
    if stress and stress["channels"]:
        return jet_rl.outlier_channels(params, language.config, **stress)
    return params


def settings_of(given: dict[str, Any]) -> tuple[runtime.LanguageSettings, Any, Any]:
    """Settings of the iteration, the objective and the optimiser of an arm."""
    sizes = dict(given["rl"])
    for name in ("iterations", "slots", "chunk", "length"):
        del sizes[name]
    rate = sizes.pop("learning_rate")
    del sizes["temperature"]
    rank = sizes.pop("lora_rank")
    for name in ("pack_rows", "overlong_buffer"):  # 0: none
        sizes[name] = sizes.get(name) or None
    objective = build_method(given["method"], runtime.TokenObjective)
    warmup = sizes.pop("warmup", 0)
    optimizer = train.make_optimizer(
        train.OptimizerConfig(learning_rate=rate, warmup_steps=warmup)
    )
    if rank:
        optimizer = optax.multi_transform(
            {"adapters": optimizer, "base": optax.set_to_zero()},
            {"adapters": "adapters", "base": "base"},
        )
    settings = runtime.LanguageSettings(**sizes)
    runtime.check_calibration(objective, settings.epochs * settings.minibatches)
    if isinstance(objective, xrpo.XRPO):
        objective.check_samples(settings.samples)
    return settings, objective, optimizer


def trainable(given: dict[str, Any], params: Any, key: Any) -> Any:
    """What is trained: the parameters, or adapters beside them as a base that stays."""
    rank = given["rl"]["lora_rank"]
    if not rank:
        return params
    return {"base": params, "adapters": lora.init(key, params, rank, ["kernel"])}


def merged(given: dict[str, Any], params: Any) -> Any:
    """Parameters of the network, of what is trained."""
    rank = given["rl"]["lora_rank"]
    if not rank:
        return params
    return lora.merge(jax.lax.stop_gradient(params["base"]), params["adapters"], rank)


def judge_of(
    given: dict[str, Any], split: str, sizes: Mapping[str, int], key: Any
) -> tasks.Judge:
    """What looks at a policy on 'problems' of a split, 'samples' times each."""
    return tasks.Judge(
        tasks.build(given["task"]),
        tasks.language(given, "rollout"),
        given["rl"],
        split,
        sizes["problems"],
        sizes["samples"],
        key,
    )


def training_draw(task: Any, language: tasks.Language, prompts: int, key: Any) -> Draw:
    """Draws distinct problems of the training split, others under another key.

    Args:
        task: gives problems.
        language: of the model.
        prompts: problems a draw.
        key: of the stage.
    """
    seed = np.asarray(jax.random.key_data(key)).tolist()

    def draw(number: int, attempt: int) -> Any:
        rng = np.random.default_rng([*seed, number, attempt])
        return tasks.prompts_of(task, language, "train", prompts, rng)

    return draw


class Parts(NamedTuple):
    """What writes, judges and learns in an arm, whoever has them take turns.

    Attributes:
        make_engine: the engine of a generator by its number; all have one key.
        learning: log-probs, objective, optimiser and settings.
        options: further arguments of :func:`tmdjax.runtime.make_iteration`, which are
            those of :func:`tmdjax.runtime.make_learner` too.
        draw: of prompts.
        score: of responses.
        start: what is trained, before the first update.
        exact: whether the engine's log-probs are those of training.
    """

    make_engine: Callable[[int], generation.Engine]
    learning: tuple[Any, Any, Any, runtime.LanguageSettings]
    options: dict[str, Any]
    draw: Draw
    score: Score
    start: Any
    exact: bool


def parts_of(given: dict[str, Any], params: Any, key: Any, rules: Any = None) -> Parts:
    """The parts of an arm.

    Args:
        given: the config of the arm.
        params: of the policy before reinforcement learning.
        key: of the stage.
        rules: settings, objective and optimiser; None takes :func:`settings_of`.
    """
    task, sizes = tasks.build(given["task"]), given["rl"]
    language = tasks.language(given)
    settings, objective, optimizer = rules or settings_of(given)
    acting = tasks.language(given, "rollout").config
    model, slots = generation.cached_decoder(acting), language.engine(sizes)
    print(f"[rl] {generation.describe(model, params, slots)}")
    start = trainable(given, params, key)

    def log_probs(config: models.DecoderConfig) -> runtime.LogProbs:
        network = tasks.log_probs_of(config, temperature=sizes["temperature"])
        return lambda params, *texts: network(merged(given, params), *texts)

    reference, shadow = None, None
    if "shadow" in objective.needs:
        recipe = SHADOWS[jnp.dtype(language.config.recipe.dtype).name]
        shadow = log_probs(models.with_recipe(language.config, recipe))
    if "reference" in objective.needs:  # a copy: updates reuse the memory of the start
        reference = jax.tree.map(jnp.array, start)

    return Parts(
        make_engine=lambda number: generation.Engine(
            model, params, slots, key, decode=language.decode
        ),
        learning=(log_probs(language.config), objective, optimizer, settings),
        options={
            "length": sizes["length"],
            "pad": language.pad,
            "generation_params": lambda params: models.prepare_weights(
                merged(given, params), config=acting
            ),
            "reference": reference,
            "shadow": shadow,
            "precision": quant.Precision(**given["precision"]),
        },
        draw=training_draw(task, language, settings.prompts, key),
        score=tasks.scorer(task, language),
        start=start,
        exact=model.exact,
    )


def iteration(
    given: dict[str, Any],
    params: Any,
    key: Any,
    should_stop: Callable[[], bool] = lambda: False,
) -> Any:
    """The function of an iteration, its engine built, and the state before the first.

    Args:
        given: the config of the arm.
        params: of the policy before reinforcement learning.
        key: of the stage.
        should_stop: asked while responses are written.
    """
    parts = parts_of(given, params, key)
    iterate = runtime.make_iteration(
        parts.make_engine(0),
        *parts.learning,
        parts.draw,
        parts.score,
        should_stop=should_stop,
        **parts.options,
    )
    return iterate, iterate.init(parts.start)
