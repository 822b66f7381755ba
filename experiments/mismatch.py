"""How far training's log-probs are from the rollout's, before anything is learnt.

The supervised policy writes under the rollout's recipe; the same tokens are read under
that of training. Once as it is, and once under the stress of the config, where it has
one.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import language_tasks as tasks
from experiments.language_iteration import settings_of, start_of
from tmdjax import generation, models, rl
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name

WHEN = ("plain", "stress")
MEASURED = {
    "mismatch_kl": "KL(rollout || training) in nats a token (k3)",
    "mismatch_max": "largest |d| of a token",
    "mismatch_mean": "mean |d|",
    "mismatch_growth": "mean |d| in the last third of a response over that in the "
    "first",
    "mismatch_clipped": "share of tokens whose exp(d) is beyond the clip range or not "
    "a number, in [0, 1]",
    "mismatch_length": "correlation of |sum of d| with the length of a response",
    "mismatch_effective": "effective share of tokens under the weights exp(d), in "
    "[0, 1]",
}
"""Of d, the log-prob of training less that of the rollout, under equal weights."""
MISMATCH = {
    f"{name}_{when}": f"{meaning}; before reinforcement learning, {how}"
    for name, meaning in MEASURED.items()
    for when, how in zip(WHEN, ("without stress", "under stress"))
}
PUBLISHED = {
    "publish_ratio": "seconds to give the engine new weights over those to round its "
    "kernels alone"
}
CALIBRATED = {
    "clip_low": "lower clip range after the last calibration",
    "clip_high": "upper clip range after the last calibration",
}
"""Of arms that calibrate it."""


def conditions(given: dict[str, Any]) -> tuple[str, ...]:
    """Those of WHEN that a config has."""
    stressed = "stress" in given and given["stress"]["channels"] > 0
    return WHEN if stressed else WHEN[:1]


def measured(given: dict[str, Any]) -> set[str]:
    """Names of the metrics of an arm."""
    names = {f"{name}_{when}" for name in MEASURED for when in conditions(given)}
    return names | PUBLISHED.keys()


def calibrated(clip_range: Any) -> dict[str, float]:
    """The numbers of CALIBRATED, of the state's (low, high); none where it is None."""
    return {} if clip_range is None else dict(zip(CALIBRATED, map(float, clip_range)))


def of_arm(arm: str) -> dict[str, str]:
    """What the figure shows of an arm: a metric by its condition."""
    return {when: metric_name(arm, f"mismatch_mean_{when}") for when in WHEN}


def stage(
    given: dict[str, Any],
    what: Mapping[str, Any],
    parents: tuple[str, ...],
    sizes: Sequence[str],
) -> Stage:
    """The stage 'mismatch' of an arm; arms of equal precision share its result.

    Args:
        given: the config of the arm.
        what: the groups of it that reinforcement learning depends on.
        parents: the stage of supervised training, if there is one.
        sizes: names of the settings of 'rl' that writing takes.
    """
    clip_range = settings_of(given)[1].clip_range
    kept = {name: group for name, group in what.items() if name != "rl"}
    rows = {name: given["rl"][name] for name in (*sizes, "microbatch")}
    more = {"mismatch": given["mismatch"], "rl": rows, "clip_range": clip_range}
    return Stage(
        name="mismatch",
        run=functools.partial(measure, given, clip_range),
        config=kept | more,
        parents=parents,
        files=tasks.files_of(given),
    )


def measure(
    given: dict[str, Any], clip_range: Any, context: StageContext
) -> StageResult:
    """The stage 'mismatch' of an arm.

    Args:
        given: the config of the arm, with the group 'mismatch': 'problems' and
            'samples'.
        clip_range: of its objective.
        context: of the stage.
    """
    task, sizes, rows = tasks.build(given["task"]), given["mismatch"], given["rl"]
    acting, training = tasks.language(given, "rollout"), tasks.language(given)
    rng, batch = np.random.default_rng(1), rows["microbatch"]
    prompts = tasks.prompts_of(task, acting, "holdout", sizes["problems"], rng)
    network = tasks.log_probs_of(training.config, temperature=rows["temperature"])

    @jax.jit
    def read(params: Any, texts: rl.TokenBatch) -> Any:
        found = network(params, texts.tokens, texts.positions, texts.segments)[0]
        return texts.responses(found)

    prepare = jax.jit(lambda p: models.prepare_weights(p, config=acting.config))
    start = {"plain": start_of({**given, "stress": None}, context)}
    if "stress" in conditions(given):
        start["stress"] = start_of(given, context)
    engine, found = None, {}
    for number, (when, params) in enumerate(start.items()):
        if engine is None:
            engine = generation.Engine(
                generation.cached_decoder(acting.config),
                prepare(params),
                acting.engine(rows),
                context.key,
                decode=acting.decode,
            )
        else:
            engine.update_weights(prepare(params), number)
        most = rows["max_new_tokens"]
        records = tasks.write(engine, prompts, sizes["samples"], most)
        for record in records:
            record.reward = 0.0  # a batch has rewards; here nobody reads them
        parts = [
            rl.batch_records(
                records[i : i + batch],
                length=rows["length"],
                response_length=most,
                sequences=batch,
                pad=acting.pad,
            )
            for i in range(0, len(records), batch)
        ]
        ours = np.concatenate([read(params, texts) for texts in parts])
        theirs, mask = (
            np.concatenate([getattr(texts, name) for texts in parts])
            for name in ("log_prob", "mask")
        )
        numbers = summarise(ours, theirs, mask, clip_range)
        found |= {f"{name}_{when}": value for name, value in numbers.items()}
    kernels = jax.jit(lambda p: _kernels(p["blocks"], acting.config.recipe.prepare))
    params = start["plain"]
    ratio = _seconds(prepare, params) / _seconds(kernels, params)
    return StageResult({}, found, timings={"publish_ratio": ratio})


def summarise(
    train: np.ndarray, rollout: np.ndarray, mask: np.ndarray, clip_range: Any
) -> dict[str, float]:
    """The numbers of MEASURED.

    Args:
        train: log-probs [response, token] by training.
        rollout: those that the rollout recorded.
        mask: bool, the tokens of each response.
        clip_range: a number or (low, high).
    """
    found = {k: float(v) for k, v in rl.mismatch(train, rollout, mask).items()}
    early, late = found.pop("mismatch_early"), found.pop("mismatch_late")
    d = np.where(mask, np.float64(train) - rollout, 0)
    weight, length = np.exp(d[mask]), mask.sum(1)[mask.any(1)]
    low, high = rl.beyond_clip(d[mask], clip_range)
    distance = np.abs(d.sum(1))[mask.any(1)]
    spread = distance.std() * length.std()
    covariance = np.mean(distance * length) - distance.mean() * length.mean()
    return found | {
        "mismatch_growth": late / early if early else 1.0,
        "mismatch_clipped": float(np.mean(low | high | np.isnan(d[mask]))),
        "mismatch_length": float(covariance / spread) if spread else 0.0,
        "mismatch_effective": float(
            weight.sum() ** 2 / len(weight) / (weight @ weight)
        ),
    }


def _kernels(blocks: Any, prepare: Callable[[Any], Any]) -> Sequence[Any]:
    """What ``prepare`` makes of every kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    return [prepare(leaf) for path, leaf in leaves if path[-1].key == "kernel"]


def _seconds(function: Callable[[Any], Any], params: Any, times: int = 7) -> float:
    """The median of some calls, the compiling one left out."""
    jax.block_until_ready(function(params))
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(function(params))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)
