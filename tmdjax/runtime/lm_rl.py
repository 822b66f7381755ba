"""The synchronous iteration of RL on a language model: write, score, update.

    collect         prompts -> responses -> rewards, by the engine
    update_batches  records -> minibatches of fixed shape, weighed as a whole
    make_update     one compiled update of a minibatch, cut into microbatches

Randomness follows from the key of the run and the number of the iteration alone, and
the engine is empty between iterations: a run that is killed goes on from its state.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from tmdjax import rl
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Params
from tmdjax.generation import Engine
from tmdjax.rl import TokenBatch, TokenRecord
from tmdjax.train.state import TrainState, create_state, make_train_step

PROXIMAL = ("behaviour", "recompute")
MIN_LENGTH = 32
MAXIMA = ("ratio_error_max", "behaviour_log_ratio_max")
"""Metrics of an update that are largest values."""

LogProbs = Callable[[Params, Array, Array, Array], tuple[Array, Array]]
"""``(params, tokens, positions, segments) -> (log-probs, entropies)``, [row, position]
each and aligned with the token they belong to."""


class Prompt(NamedTuple):
    """A prompt as ids, and the problem behind it, for the scorer."""

    tokens: Sequence[int]
    problem: Any


Draw = Callable[[int, int], Sequence[Prompt]]
"""``(iteration, attempt) -> prompts``: the same ones whenever asked again."""

Score = Callable[[Any, Sequence[int]], float]
"""``(problem, response ids) -> reward``."""


@runtime_checkable
class Objective(Protocol):
    """What the update optimises.

    Attributes:
        clip_range: of ratios, for the check of the first one and the metrics.
        aggregation: mode of :func:`tmdjax.rl.aggregate`.
        length: its constant length, or None.
        needs: of 'proximal' (log-probs that are not the behaviour's) and 'reference'.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """See the class."""
        ...

    @property
    def clip_range(self) -> Any:
        """See the class."""
        ...

    @property
    def aggregation(self) -> str:
        """See the class."""
        ...

    @property
    def length(self) -> int | None:
        """See the class."""
        ...

    def log_ratio(self, log_prob: Array, batch: "UpdateBatch") -> Array:
        """What the clip range is about, [sequence, token]; 0 where masked out."""
        ...

    def advantages(self, rewards: Array, group: Array, num_groups: int) -> Array:
        """[sequence], from the rewards of all responses of an iteration."""
        ...

    def loss(
        self, log_prob: Array, batch: "UpdateBatch"
    ) -> tuple[Array, dict[str, Array]]:
        """Of every token, and metrics of every token, [sequence, token]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and rules of an iteration.

    Attributes:
        prompts: groups an iteration.
        samples: responses to each, at least 2.
        max_new_tokens: of a response.
        epochs: passes over the responses.
        minibatches: updates a pass; they divide prompts x samples.
        microbatch: responses in memory at a time; divides those of a minibatch.
        pack_rows: rows a microbatch is packed into, or None for one row a response;
            where texts do not fit, that minibatch is not packed.
        proximal: the policy ratios are clipped around: 'behaviour', the log-probs that
            the engine recorded, or 'recompute' them with the weights before the update
            (where engine and training differ in precision, or in weights).
        dynamic_sampling: groups whose rewards are all equal are replaced by others.
        max_attempts: batches of prompts that may be drawn for that.
        overlong_buffer: tokens before max_new_tokens where
            :func:`tmdjax.rl.overlong_penalty` begins, or None for no penalty.
        overlong_factor: of the penalty.
        mask_truncated: responses that were cut off are not trained on; they still count
            in their group and in every denominator.
        check_ratio: stop where the first ratio of an iteration is not 1 (only with
            'behaviour').
    """

    prompts: int
    samples: int
    max_new_tokens: int
    epochs: int = 1
    minibatches: int = 1
    microbatch: int = 8
    pack_rows: int | None = None
    proximal: str = "behaviour"
    dynamic_sampling: bool = False
    max_attempts: int = 10
    overlong_buffer: int | None = None
    overlong_factor: float = 1.0
    mask_truncated: bool = False
    check_ratio: bool = True

    def __post_init__(self) -> None:
        for name in (
            "prompts",
            "max_new_tokens",
            "epochs",
            "minibatches",
            "microbatch",
            "max_attempts",
        ):
            check_count(name, getattr(self, name))
        check_count("samples", self.samples, 2)
        check_choice("proximal", self.proximal, PROXIMAL)
        check_range("overlong_factor", self.overlong_factor, 0)
        if self.overlong_buffer is not None:
            check_range("overlong_buffer", self.overlong_buffer, 1, self.max_new_tokens)
        if self.pack_rows is not None:
            check_count("pack_rows", self.pack_rows)
        total = self.prompts * self.samples
        if total % self.minibatches:
            raise ValueError(
                f"prompts={self.prompts} x samples={self.samples} = {total} responses "
                f"do not divide into minibatches={self.minibatches}; choose a divisor."
            )
        if total // self.minibatches % self.microbatch:
            raise ValueError(
                f"{total // self.minibatches} responses a minibatch do not divide into "
                f"microbatches of microbatch={self.microbatch}; choose a divisor."
            )


class Rollout(NamedTuple):
    """What was written and scored.

    Attributes:
        records: prompts x samples of them, group after group.
        problems: of the groups.
        metrics: numbers about all that was written, also what was left out.
    """

    records: list[TokenRecord]
    problems: list[Any]
    metrics: dict[str, float]


def collect(
    engine: Engine, draw: Draw, score: Score, settings: Settings, iteration: int
) -> Rollout:
    """Responses of an iteration, with rewards.

    Args:
        engine: idle.
        draw: the prompts.
        score: of a response; called on the host.
        settings: see there.
        iteration: from 0; with the engine's key it decides every response.

    Raises:
        ValueError: the draw gives another number of prompts than asked.
        RuntimeError: dynamic sampling found too few groups in ``max_attempts`` batches.
    """
    groups: list[tuple[Any, list[TokenRecord]]] = []
    written: list[TokenRecord] = []
    accuracy: list[float] = []
    attempts = settings.max_attempts if settings.dynamic_sampling else 1
    for attempt in range(attempts):
        prompts = draw(iteration, attempt)
        if len(prompts) != settings.prompts:
            raise ValueError(
                f"the draw gave {len(prompts)} prompts; settings.prompts="
                f"{settings.prompts}."
            )
        first = (iteration * attempts + attempt) * settings.prompts
        for g, prompt in enumerate(prompts):
            start = (first + g) * settings.samples
            engine.submit(
                range(start, start + settings.samples),
                prompt.tokens,
                group=g,
                max_new_tokens=settings.max_new_tokens,
            )
        found = engine.run()
        written += found
        for g, prompt in enumerate(prompts):
            members = found[g * settings.samples : (g + 1) * settings.samples]
            scores = [float(score(prompt.problem, r.tokens)) for r in members]
            for record, value in zip(members, scores):
                record.reward = value + _penalty(record, settings)
            accuracy.append(float(np.mean(scores)))
            rewards = [r.reward for r in members if r.reward is not None]
            if not settings.dynamic_sampling or rl.is_informative(rewards):
                groups.append((prompt.problem, members))
        if len(groups) >= settings.prompts:
            break
    else:
        histogram, _ = np.histogram(accuracy, bins=5, range=(0, 1))
        raise RuntimeError(
            f"after max_attempts={attempts} batches of {settings.prompts} prompts only "
            f"{len(groups)} groups have rewards that differ. Mean rewards of all "
            f"groups in fifths of [0, 1]: {histogram.tolist()}. Choose easier or "
            f"harder problems, more samples a prompt, or dynamic_sampling=False."
        )
    groups = groups[: settings.prompts]
    for g, (_, members) in enumerate(groups):
        for record in members:
            record.group = g
    metrics = _metrics(written, accuracy, settings, engine.version)
    metrics["groups_left_out"] = float(len(accuracy) - len(groups))
    records = [record for _, members in groups for record in members]
    return Rollout(records, [problem for problem, _ in groups], metrics)


def _penalty(record: TokenRecord, settings: Settings) -> float:
    if settings.overlong_buffer is None:
        return 0.0
    return rl.overlong_penalty(
        len(record),
        longest=settings.max_new_tokens,
        buffer=settings.overlong_buffer,
        factor=settings.overlong_factor,
    )


def _metrics(
    records: Sequence[TokenRecord],
    accuracy: Sequence[float],
    settings: Settings,
    version: int,
) -> dict[str, float]:
    staleness = version - np.concatenate([record.versions for record in records])
    lengths = np.array([len(record) for record in records])
    middle, high = np.quantile(lengths, [0.5, 0.95])
    rewards = np.array([r.reward for r in records]).reshape(-1, settings.samples)
    tied = [not rl.is_informative(row.tolist()) for row in rewards]
    return {
        "score": float(np.mean(accuracy)),
        "reward": float(rewards.mean()),
        "tied_group_fraction": float(np.mean(tied)),
        "truncated_fraction": float(np.mean([r.status == "length" for r in records])),
        "length_median": float(middle),
        "length_95": float(high),
        "length_max": float(lengths.max()),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
    }


@struct.dataclass
class UpdateBatch:
    """Responses of one microbatch.

    Attributes:
        texts: see :class:`tmdjax.rl.TokenBatch`.
        advantage: float32 [sequence].
        weight: float32 [sequence, token], of each token in the loss of the minibatch,
            see :func:`tmdjax.rl.aggregation_weights`.
        proximal: float32 [sequence, token], log-probs to clip around.
        reference: float32 [sequence, token], log-probs of the policy to stay near, or
            None.
        share: float32 scalar, 1 / tokens of the minibatch.
    """

    texts: TokenBatch
    advantage: Any
    weight: Any
    proximal: Any
    reference: Any
    share: Any


def update_batches(
    records: Sequence[TokenRecord],
    objective: Objective,
    settings: Settings,
    order: np.random.Generator,
    *,
    length: int,
    pad: int = 0,
    proximal: Callable[[TokenBatch], Array] | None = None,
    reference: Callable[[TokenBatch], Array] | None = None,
) -> Iterator[UpdateBatch]:
    """Minibatches for :func:`make_update`, [microbatch, ...] each.

    Texts are padded to the smallest power of two that holds the longest, so that
    programs are few.

    Args:
        records: of an iteration, with rewards.
        objective: gives advantages and the aggregation.
        settings: see there.
        order: shuffles responses, anew in every epoch.
        length: the longest a text may be.
        pad: id of padding.
        proximal: log-probs [microbatch, sequence, token] of stacked microbatches,
            for settings.proximal='recompute'.
        reference: the same of a reference policy, or None.
    """
    count, size = len(records), settings.microbatch
    rewards = np.array([record.reward for record in records], np.float32)
    group = np.array([record.group for record in records])
    advantage = np.asarray(
        objective.advantages(jnp.asarray(rewards), jnp.asarray(group), settings.prompts)
    )
    longest = max(len(record.prompt) + len(record) for record in records)
    shape = {
        "length": min(_power_of_two(longest), length),
        "response_length": min(
            _power_of_two(max(map(len, records))), settings.max_new_tokens
        ),
        "pad": pad,
    }
    if settings.pack_rows is not None:
        shape |= {"length": length}

    def parts(which: np.ndarray, **rows: int) -> list[TokenBatch]:
        return [
            rl.batch_records([records[i] for i in which[j : j + size]], **shape, **rows)
            for j in range(0, len(which), size)
        ]

    def stacked(which: np.ndarray) -> TokenBatch:
        found = None
        if settings.pack_rows is not None:
            with contextlib.suppress(rl.DoesNotFitError):
                found = parts(which, rows=settings.pack_rows)
        return jax.tree.map(lambda *x: np.stack(x), *(found or parts(which)))

    everything = stacked(np.arange(count))
    target = everything.log_prob
    if settings.proximal == "recompute":
        assert proximal is not None
        target = np.asarray(proximal(everything))
    target = target.reshape(count, -1)
    anchor = None
    if reference is not None:
        anchor = np.asarray(reference(everything)).reshape(count, -1)
    for _ in range(settings.epochs):
        for which in np.split(order.permutation(count), settings.minibatches):
            texts = stacked(which)
            mask = texts.mask.reshape(len(which), -1)
            keep = None
            if settings.mask_truncated:
                cut = np.array([records[i].status == "length" for i in which])
                keep = np.broadcast_to(~cut[:, None], mask.shape)
            weight = rl.aggregation_weights(
                mask, objective.aggregation, length=objective.length, keep=keep
            )
            count_parts = len(which) // size
            yield UpdateBatch(
                texts=texts,
                advantage=advantage[which].reshape(count_parts, size),
                weight=np.asarray(weight).reshape(texts.mask.shape),
                proximal=target[which].reshape(texts.mask.shape),
                reference=None
                if anchor is None
                else anchor[which].reshape(texts.mask.shape),
                share=np.full(count_parts, 1 / max(1, mask.sum()), np.float32),
            )


def _power_of_two(n: int) -> int:
    return max(MIN_LENGTH, 1 << (n - 1).bit_length())


def make_update(
    log_probs: LogProbs, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, UpdateBatch, Any], tuple[TrainState, dict[str, Array]]]:
    """One update by a minibatch, its microbatches scanned; state donated.

    Args:
        log_probs: of texts under parameters.
        objective: the loss.
        optimizer: optax transformation.

    Returns:
        ``(state, batch, key) -> (state, metrics)``, jitted. Metrics are means over the
        tokens of the minibatch, but those of MAXIMA.
    """

    def loss_fn(params: Params, part: UpdateBatch, keys: Any) -> Any:
        del keys
        batch: UpdateBatch = jax.tree.map(lambda x: x[0], part)
        texts = batch.texts
        found = log_probs(params, texts.tokens, texts.positions, texts.segments)
        log_prob, entropy = (texts.responses(x) for x in found)
        log_prob = jnp.where(texts.mask, log_prob, 0)
        loss, metrics = objective.loss(log_prob, batch)
        low, high = rl.check_clip_range(objective.clip_range)
        ratio = objective.log_ratio(log_prob, batch)
        error = jnp.expm1(jnp.clip(ratio, -20, 20))
        away = batch.proximal - texts.log_prob
        metrics = {
            "entropy": entropy,
            "clip_fraction_low": error < -low,
            "clip_fraction_high": error > high,
            "behaviour_log_ratio": jnp.abs(away),
            "behaviour_ratio": jnp.exp(jnp.clip(away, -20, 20)),
            "behaviour_ratio_square": jnp.exp(2 * jnp.clip(away, -20, 20)),
            # k3 of KL(behaviour || proximal), the tokens being the behaviour's
            "behaviour_kl": jnp.expm1(jnp.clip(away, -20, 20)) - away,
            **metrics,
        }
        means = {
            name: jnp.sum(jnp.where(texts.mask, x, 0)) * batch.share
            for name, x in jax.lax.stop_gradient(metrics).items()
        }
        worst = jnp.max(jnp.where(texts.mask, jnp.abs(error), 0))
        total = jnp.sum(jnp.where(batch.weight > 0, loss, 0) * batch.weight)
        furthest = jnp.max(jnp.where(texts.mask, jnp.abs(away), 0))
        each = {
            "ratio_error_max": jax.lax.stop_gradient(worst),
            "behaviour_log_ratio_max": furthest,
            **means,
        }
        return total[None], {name: x[None] for name, x in each.items()}

    def update(state: TrainState, batch: UpdateBatch, key: Any) -> Any:
        parts = batch.share.shape[0]

        def whole(params: Params, part: UpdateBatch, keys: Any) -> Any:
            loss, metrics = loss_fn(params, part, keys)  # the step means over parts
            scaled = {k: v * (1 if k in MAXIMA else parts) for k, v in metrics.items()}
            return loss * parts, scaled

        step = make_train_step(
            whole,
            optimizer,
            microbatches=parts,
            reductions=dict.fromkeys(MAXIMA, jnp.max),
        )
        return step(state, batch, key)

    return jax.jit(update, donate_argnums=0)


@struct.dataclass
class LMState:
    """Everything an iteration changes.

    Attributes:
        iteration: how many were done, int32.
        learner: parameters and optimiser state.
    """

    iteration: Any
    learner: TrainState

    @property
    def skipped(self) -> Any:
        """Updates that were not finite and were skipped."""
        return self.learner.skipped

    @property
    def skipped_in_a_row(self) -> Any:
        """Of these, how many since the last good one."""
        return self.learner.skipped_in_a_row

    @classmethod
    def start(
        cls, params: Params, optimizer: optax.GradientTransformation
    ) -> "LMState":
        """Before the first iteration."""
        return cls(jnp.zeros((), jnp.int32), create_state(params, optimizer))


def make_iteration(
    engine: Engine,
    log_probs: LogProbs,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    draw: Draw,
    score: Score,
    *,
    length: int,
    pad: int = 0,
    generation_params: Callable[[Params], Params] = lambda params: params,
    reference: Params | None = None,
) -> Callable[[LMState, Any], tuple[LMState, dict[str, Any]]]:
    """Builds ``iterate(state, key) -> (state, metrics)``; the key is that of the run.

    Args:
        engine: writes; it must hold texts of ``length``. Between iterations its
            parameters may be gone (updates reuse their memory): give it others first.
        log_probs: of texts under parameters, at the engine's temperature.
        objective: see :class:`Objective`.
        optimizer: optax transformation.
        settings: see there.
        draw: prompts.
        score: rewards.
        length: longest text.
        pad: id of padding.
        generation_params: what the engine is given for parameters, such as
            :func:`tmdjax.models.fuse_projections`.
        reference: parameters of the policy that an objective with a KL term stays
            near.

    Raises:
        ValueError: the engine draws from a truncated distribution, under which the
            log-probs of training would be others; length is above the engine's; or the
            objective needs what it is not given.
    """
    if not engine.config.sampling.is_exact:
        raise ValueError(
            f"the engine draws with {engine.config.sampling}; training needs every "
            f"token to keep a probability: temperature above 0, no top_k, top_p=1."
        )
    if length > engine.config.length:
        raise ValueError(
            f"length={length} is above the {engine.config.length} of the engine's "
            f"slots; lower it, or build an engine of longer ones."
        )
    if "proximal" in objective.needs and settings.proximal != "recompute":
        raise ValueError(
            "the objective corrects for the policy that wrote, but with "
            "proximal='behaviour' there is nothing to correct; use "
            "proximal='recompute', or correction='none'."
        )
    if "reference" in objective.needs and reference is None:
        raise ValueError(
            "the objective needs a reference policy for its KL term; give reference=, "
            "or kl_coefficient=0."
        )
    update = make_update(log_probs, objective, optimizer)

    @jax.jit
    def recomputed(params: Params, texts: TokenBatch) -> Array:
        def one(part: TokenBatch) -> Array:
            found = log_probs(params, part.tokens, part.positions, part.segments)[0]
            return jnp.where(part.mask, part.responses(found), 0)

        return jax.lax.map(one, texts)

    def iterate(state: LMState, key: Any) -> tuple[LMState, dict[str, Any]]:
        iteration, learner = int(state.iteration), state.learner
        engine.abort()
        engine.update_weights(generation_params(learner.params), engine.version + 1)
        rollout = collect(engine, draw, score, settings, iteration)
        key = jax.random.fold_in(key, iteration)
        seed = np.asarray(jax.random.key_data(key)).tolist()
        batches = update_batches(
            rollout.records,
            objective,
            settings,
            np.random.default_rng(seed),
            length=length,
            pad=pad,
            proximal=lambda texts: recomputed(learner.params, texts),
            reference=None
            if reference is None
            else lambda texts: recomputed(reference, texts),
        )
        found = []
        for batch in batches:
            learner, metrics = update(learner, batch, key)
            if not found and settings.check_ratio and settings.proximal == "behaviour":
                rl.check_first_ratio(metrics["ratio_error_max"], objective.clip_range)
            found.append(metrics)
        host = jax.device_get(found)
        means = {k: float(np.mean([m[k] for m in host])) for k in host[0]}
        # (sum w)^2 / (n sum w^2) of the weights proximal / behaviour
        square = means.pop("behaviour_ratio_square")
        means["effective_sample_fraction"] = means.pop("behaviour_ratio") ** 2 / square
        means["first_ratio_error"] = float(host[0]["ratio_error_max"])
        state = LMState(state.iteration + 1, learner)
        return state, rollout.metrics | means

    return iterate
