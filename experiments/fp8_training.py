"""Supervised training in 8 bits beside bfloat16: a DiT on images, a decoder on text.

An arm is a network under a recipe. Those of one network and seed have their initial
parameters, batches and noise in common. After training each is judged in its own
precision, by its loss on held-out data; what training took off that loss is its gain,
and 8 bits are not worse than 16 if they keep 95 % of the gain. Samples of a DiT are
compared with held-out images, answers of a decoder with the right ones.
"""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flow_matching, image_quality
from experiments import language_tasks as tasks
from experiments.arms import arms, of_arm, tuples
from experiments.figures import side_by_side
from experiments.supervised import Supervised
from experiments.supervised_language import loss_of
from tmdjax import flows, models, train
from tmdjax.core import prng, trees
from tmdjax.harness import Report, Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain

Config = Any
IMAGES = "images"
"""The task of a DiT; any other is one of :data:`experiments.language_tasks.TASKS`."""
GAINED = {
    "loss_before": "held-out loss before training: squared error of the velocity a "
    "pixel, or nats a response token",
    "loss_after": "held-out loss after training",
    "gain": "held-out loss before training less after it",
}
MEANINGS = {
    **image_quality.MEASURES,
    **GAINED,
    "log_frechet_gain": "logarithm of the Frechet distance of samples of the untrained "
    "network, over that of the trained one",
    "accuracy": "share of held-out problems that greedy decoding answers as the gold "
    "response does, in [0, 1]",
}


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    own = of_arm(config, arm)
    plain = to_plain(own)
    if own.task.name == IMAGES:
        before = flow_matching.stages(own, arm)
        judge, parents = judge_images, ("train", "evaluate")
    else:
        before = [
            Stage(
                name="train",
                run=functools.partial(train_decoder, own),
                config={k: plain[k] for k in ("task", "texts", "model", "optimizer")}
                | {"train": plain["train"], "recipe": plain["precision"]["train"]},
            )
        ]
        judge, parents = judge_texts, ("train",)
    return [
        *before,
        Stage(
            name="judge",
            run=functools.partial(judge, own),
            config={k: plain[k] for k in ("task", "texts", "evaluate")}
            | {"recipe": plain["precision"]["rollout"]},
            parents=parents,
        ),
    ]


def training(config: Config) -> Supervised:
    """Of a decoder: gold responses, over those of a batch."""
    language = tasks.language(to_plain(config))
    rule = train.OptimizerConfig(
        **tuples(to_plain(config.optimizer)), total_steps=config.train.steps
    )
    return Supervised(
        init=language.parameters,
        loss=loss_of(language),
        optimizer=train.make_optimizer(rule),
        ema_decay=config.train.ema_decay,
    )


def texts_of(config: Config, split: str, count: int) -> dict[str, np.ndarray]:
    """Problems of a split with gold responses, see :func:`tasks.pairs`."""
    given = to_plain(config)
    task, language = tasks.build(given["task"]), tasks.language(given)
    rng = np.random.default_rng(0)
    return tasks.pairs(task, language, count, config.texts.length, rng, split=split)


def train_decoder(config: Config, context: StageContext) -> StageResult:
    """Trains a decoder; the result holds its averaged parameters and the first ones."""
    found = training(config)
    initial = jax.device_get(found.init(context.key))
    pairs = texts_of(config, "train", config.texts.pairs)
    state = found.fit(context, pairs, config.train)
    decoder = models.Decoder(tasks.language(to_plain(config)).config)
    return StageResult(
        {"params": state.eval_params, "initial": initial},
        {"parameters": trees.count(initial), "skipped_updates": state.skipped},
        model=models.spec_of(decoder),
    )


def gained(context: StageContext, loss: Callable[[Any], Any]) -> dict[str, float]:
    """Held-out losses of the stage 'train'; ``loss`` maps parameters to a number."""
    trained = context.inputs["train"].outputs
    before, after = (float(loss(trained[name])) for name in ("initial", "params"))
    return {"loss_before": before, "loss_after": after, "gain": before - after}


def judge_images(config: Config, context: StageContext) -> StageResult:
    """Held-out loss under the recipe of rollouts, and what samples gained."""
    spec = flow_matching.model_spec(config, "rollout")
    apply_fn = models.functional(models.build(spec))
    test = image_quality.load_data(config).test

    @jax.jit
    def once(params: Any, image: Any, label: Any, key: Any) -> Any:
        keys = prng.sample_keys(key, len(label))
        return jnp.mean(
            flows.flow_matching_loss(params, apply_fn, image, keys, label)[0]
        )

    def loss(params: Any) -> float:
        draws = jax.random.split(context.key, config.evaluate.draws)
        given = test["image"], test["label"]
        return float(np.mean([once(params, *given, key) for key in draws]))

    seen = context.inputs["evaluate"].metrics
    trained = seen[f"{best_of(config)}.frechet"]
    ratio = float(seen["untrained.frechet"]) / float(trained)
    found = gained(context, loss) | {"log_frechet_gain": math.log(ratio)}
    return StageResult({}, found)


def judge_texts(config: Config, context: StageContext) -> StageResult:
    """Held-out loss under the recipe of rollouts, and the share of right answers.

    Greedy decoding writes a response to the end exactly where each of its tokens is the
    most likely one after those before it, so that one forward pass tells.
    """
    language = tasks.language(to_plain(config), "rollout")
    apply_fn = models.functional(models.Decoder(language.config))
    held_out = texts_of(config, "holdout", config.evaluate.texts)

    @jax.jit
    def told(params: Any, tokens: Any, mask: Any) -> tuple[Any, Any]:
        logits = apply_fn(params, tokens)[:, :-1]
        wanted, asked = tokens[:, 1:], mask[:, 1:]
        log_prob = jnp.take_along_axis(
            jax.nn.log_softmax(logits), wanted[..., None], axis=-1
        )[..., 0]
        right = jnp.all((jnp.argmax(logits, -1) == wanted) | ~asked, axis=1)
        return -jnp.sum(jnp.where(asked, log_prob, 0)) / asked.sum(), jnp.mean(right)

    given = held_out["tokens"], held_out["mask"]
    found = gained(context, lambda params: told(params, *given)[0])
    trained = context.inputs["train"].outputs["params"]
    return StageResult({}, found | {"accuracy": float(told(trained, *given)[1])})


def best_of(config: Config) -> str:
    """The set of samples of the most Euler steps, see :mod:`flow_matching`."""
    return f"euler{config.sample.euler_nfe[-1]}"


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    own = of_arm(config, arm)
    if own.task.name != IMAGES:
        return {*GAINED, "accuracy"}
    return {*GAINED, "log_frechet_gain"} | flow_matching.measures(own, arm)


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of arms."""
    columns = {
        "loss before": "loss_before",
        "loss after": "loss_after",
        "Frechet distance": f"{best_of(config)}.frechet",
        "accuracy": "accuracy",
    }
    return [
        {"arm": arm}
        | {title: found.get(metric_name(arm, name)) for title, name in columns.items()}
        for arm in arms(config)
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """What training took off the held-out loss, an arm a row."""
    rows = {arm: {"gain": metric_name(arm, "gain")} for arm in arms(config)}
    title, label = "Supervised training", "held-out loss before less after"
    return side_by_side(found, rows, folder / "gain.png", title, label)


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """Samples of a DiT."""
    own = of_arm(config, arm)
    if own.task.name != IMAGES:
        return Report()
    return flow_matching.report(own, arm, results, folder)


def describe(config: Config) -> dict[str, Any]:
    """Sizes; traces an update of every arm, so that what cannot work is refused."""
    rows: dict[str, Any] = {}
    for arm in arms(config):
        own = of_arm(config, arm)
        if own.task.name == IMAGES:
            sizes = flow_matching.describe(own)
        else:
            few = texts_of(own, "train", min(64, own.texts.pairs))
            size = own.train.batch_size
            batch = {
                name: jax.ShapeDtypeStruct((size, *column.shape[1:]), column.dtype)
                for name, column in few.items()
            }
            step, shapes, _ = training(own).update(batch)
            state, _ = jax.eval_shape(step, *shapes)
            sizes = {
                "parameters": trees.count(state.params),
                "updates": own.train.steps,
            }
        rows |= {f"{arm}: {name}": value for name, value in sizes.items()}
    return rows
