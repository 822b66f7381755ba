"""GRPO of a language model on tasks with exact rewards: an arm a task and method.

Stages: supervised training on gold responses until a part of them is right ('sft', once
for all arms of a task); reinforcement learning; accuracy on problems never seen, before
and after.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import language_tasks as tasks
from experiments import supervised_language
from experiments.arms import arms, build_method, of_arm
from experiments.curves import ends
from experiments.figures import side_by_side
from tmdjax import generation, models, quant, runtime, train
from tmdjax.core import trees
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.models import lora

Config = Any
LOOK = ("slots", "length", "chunk", "max_new_tokens", "temperature")
"""Sizes of rl that judging uses too."""
WHEN = ("before", "after")
JUDGED = {
    f"{what}_{when}": f"{meaning} {when} reinforcement learning, in [0, 1]"
    for what, meaning in (
        ("accuracy", "share of right responses to held-out problems"),
        ("solved", "share of held-out problems with any right response"),
    )
    for when in WHEN
}
KEPT = ("score", "entropy", "length_median")
"""Columns of the log that the result of 'rl' keeps."""
CURVES = {
    "score": "mean score of rollouts",
    "accuracy": "accuracy in supervised training",
    "loss": "loss",
}
MEANINGS = JUDGED | {
    "length_before": "tokens of a response before reinforcement learning",
    "length_after": "tokens of a response after reinforcement learning",
    "score_first": "mean score of the first tenth of the iterations, in [0, 1]",
    "score_last": "mean score of the last tenth of the iterations, in [0, 1]",
    "truncated_fraction": "share of rollouts cut at their longest, at the end",
    "first_ratio_error": "how far the ratio of a first minibatch is from 1, at most",
}


def resolved(config: Config, arm: str) -> dict[str, Any]:
    """The config of an arm, with what its 'rl' may leave out."""
    given = to_plain(of_arm(config, arm))
    return given | {"rl": {"temperature": 1.0, "lora_rank": 0} | given["rl"]}


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    given = resolved(config, arm)
    first = Stage(
        name="sft",
        run=functools.partial(supervised_language.train_to_gate, given),
        config={k: given[k] for k in ("task", "model", "sft")}
        | {k: given["rl"][k] for k in LOOK}
        | {"recipe": given["precision"]["train"]},
        seeded=False,
        files=tasks.files_of(given),
    )
    before = [first] if given["model"]["name"] == "decoder" else []
    parents = tuple(stage.name for stage in before)
    return [
        *before,
        Stage(
            name="rl",
            run=functools.partial(reinforce, given),
            config={
                k: given[k] for k in ("task", "model", "rl", "method", "precision")
            },
            parents=parents,
            files=tasks.files_of(given),
        ),
        Stage(
            name="judge",
            run=functools.partial(judge, given),
            config={"judge": given["judge"]},
            parents=(*parents, "rl"),
        ),
    ]


def start_of(given: dict[str, Any], context: StageContext) -> Any:
    """Parameters before reinforcement learning: supervised ones, or the weights."""
    if "sft" in context.inputs:
        return jax.tree.map(jnp.asarray, context.inputs["sft"].outputs["params"])
    return tasks.language(given).parameters(context.key)


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
    return runtime.LanguageSettings(**sizes), objective, optimizer


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


def iteration(
    given: dict[str, Any],
    params: Any,
    key: Any,
    should_stop: Callable[[], bool] = lambda: False,
) -> Any:
    """The function of an iteration, its engine built."""
    task, sizes = tasks.build(given["task"]), given["rl"]
    language = tasks.language(given)
    settings, objective, optimizer = settings_of(given)
    acting = tasks.language(given, "rollout").config
    model, slots = generation.cached_decoder(acting), language.engine(sizes)
    print(f"[rl] {generation.describe(model, params, slots)}")
    engine = generation.Engine(model, params, slots, key, decode=language.decode)
    seed = np.asarray(jax.random.key_data(key)).tolist()
    start = trainable(given, params, key)
    network = tasks.log_probs_of(language.config, temperature=sizes["temperature"])
    reference = None
    if "reference" in objective.needs:  # a copy: updates reuse the memory of the start
        reference = jax.tree.map(jnp.array, start)

    def draw(number: int, attempt: int) -> Any:
        rng = np.random.default_rng([*seed, number, attempt])
        return tasks.prompts_of(task, language, "train", settings.prompts, rng)

    iterate = runtime.make_iteration(
        engine,
        lambda params, *texts: network(merged(given, params), *texts),
        objective,
        optimizer,
        settings,
        draw,
        tasks.scorer(task, language),
        length=sizes["length"],
        pad=language.pad,
        should_stop=should_stop,
        generation_params=lambda params: models.prepare_weights(
            merged(given, params), config=acting
        ),
        reference=reference,
        precision=quant.Precision(**given["precision"]),
    )
    return iterate, iterate.init(start)


def reinforce(given: dict[str, Any], context: StageContext) -> StageResult:
    """Reinforcement learning from the supervised policy."""
    params = start_of(given, context)
    iterate, state = iteration(given, params, context.key, context.should_stop)

    state = context.fit(
        state,
        iterate,
        train.NoData(),
        num_steps=given["rl"]["iterations"],
        log_every=1,
    )
    rows = context.rows()
    curves = {name: np.array([row[name] for row in rows]) for name in KEPT}
    first, last = ends(curves["score"], parts=10)
    return StageResult(
        {"params": merged(given, state.learner.params), **curves},
        {
            "score_first": first,
            "score_last": last,
            "first_ratio_error": max(row["first_ratio_error"] for row in rows),
            "skipped_updates": float(state.skipped),
            "truncated_fraction": rows[-1]["truncated_fraction"],
        },
        model=models.spec_of(models.Decoder(tasks.language(given).config)),
    )


def judge(given: dict[str, Any], context: StageContext) -> StageResult:
    """Accuracy on held-out problems, before and after, with equal randomness."""
    task, settings = tasks.build(given["task"]), given["judge"]
    look = tasks.Judge(
        task,
        tasks.language(given, "rollout"),
        given["rl"],
        "holdout",
        settings["problems"],
        settings["samples"],
        context.key,
    )
    found = {}
    after = context.inputs["rl"].outputs["params"]
    for when, params in (("before", start_of(given, context)), ("after", after)):
        seen = look(params)
        found |= {f"{name}_{when}": value for name, value in seen.items()}
    return StageResult({}, found)


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    course = {"score_first", "score_last", "first_ratio_error"}
    return course.union(JUDGED)


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of arms."""
    return [
        {"arm": arm}
        | {n.replace("_", " "): found.get(metric_name(arm, n)) for n in JUDGED}
        for arm in arms(config)
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Held-out problems before reinforcement learning and after, an arm a row."""
    labels = {
        "accuracy": "share of right responses",
        "solved": "share of problems with any right response",
    }
    figures = []
    for what, label in labels.items():
        rows = {
            arm: {when: metric_name(arm, f"{what}_{when}") for when in WHEN}
            for arm in arms(config)
        }
        path = folder / f"{what}.png"
        figures += side_by_side(found, rows, path, "Held-out problems", label)
    return figures


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every arm, so that what cannot work is refused."""
    rows: dict[str, Any] = {}
    for arm in arms(config):
        given = resolved(config, arm)
        sizes = given["rl"]
        settings, _, _ = settings_of(given)
        rows[f"{arm}: supervised until accuracy"] = given["sft"]["gate"]
        if (missing := tasks.missing(given)) is not None:
            rows[f"{arm}: parameters"] = f"unknown, {missing} is not there"
            continue
        task, language = tasks.build(given["task"]), tasks.language(given)
        looked = {
            "train": max(tasks.at_most(task, 64), settings.prompts),
            "holdout": given["judge"]["problems"],
        }
        if given["model"]["name"] == "decoder":
            looked["evaluation"] = given["sft"]["problems"]
        longest = max(
            len(tasks.encode(language, problem))
            for problem in tasks.first_problems(task, looked)
        )
        if longest + settings.max_new_tokens > sizes["length"]:
            raise ValueError(
                f"arms.{arm}: prompts of {longest} tokens and rl.max_new_tokens="
                f"{settings.max_new_tokens} need rl.length of at least "
                f"{longest + settings.max_new_tokens}, not {sizes['length']}."
            )
        shapes = jax.eval_shape(language.parameters, jax.random.key(0))
        rows[f"{arm}: parameters"] = trees.count(shapes)
        language.engine(sizes)
        acting = tasks.language(given, "rollout").config
        cache = models.cache_bytes(acting, sizes["slots"], sizes["length"])
        rows[f"{arm}: cache, bytes"] = cache
        responses = settings.prompts * settings.samples
        rows[f"{arm}: responses"] = sizes["iterations"] * responses
    return rows
