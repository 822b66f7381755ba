"""All updates by one batch of responses, whoever collected it and whenever.

    packing      records -> minibatches of fixed shape, weighed as a whole
    update       one compiled update of a minibatch, cut into microbatches
    calibration  a clip range that follows what exact arithmetic would clip
    publishing   trained parameters -> what the engine reads of them, once an update
    alarms       once a process: rollouts of another policy, 8-bit weights that rest,
                 vanish or are padded

The synchronous iteration (:mod:`tmdjax.runtime.lm_rl`) learns from what the weights of
its state wrote, an asynchronous run (:mod:`tmdjax.runtime.asynchronous`) from older
responses too: versions of tokens say which.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from tmdjax import rl
from tmdjax.core.types import Array, Params
from tmdjax.generation import Engine
from tmdjax.quant import Precision, quantised_values, share_moved
from tmdjax.rl import TokenBatch, TokenRecord
from tmdjax.runtime.alarms import Alarms
from tmdjax.runtime.calibration import ClipCalibration, check_calibration
from tmdjax.runtime.packing import (
    TokenObjective,
    UpdateBatch,
    check_log_linear,
    update_batches,
)
from tmdjax.runtime.publishing import Publisher
from tmdjax.runtime.settings import LanguageSettings
from tmdjax.runtime.update import LogProbs, check_something_trains, make_update
from tmdjax.train.state import LearnerCounts, TrainState, create_state

_RATIO_CAUSES = (
    "the model computes in 16 bits, where decoding and training round differently "
    "(LanguageSettings(proximal='recompute'), or 'auto'; or recipe='fp32' of the "
    "model's configuration); log_probs at another temperature than the engine's "
    "Sampling; other parameters in the engine than generation_params gives"
)


@struct.dataclass
class LMState(LearnerCounts):
    """Everything that collecting and learning change.

    Attributes:
        iteration: how many batches were learned from, int32: the version of the
            weights.
        learner: parameters and optimiser state.
        pending: responses that the next iteration goes on with, uint8 [bytes], see
            :func:`tmdjax.rl.pack_records`; none for the most part.
        memory: of a :class:`tmdjax.runtime.Planner`, uint8 [bytes]; empty without one.
        clip_range: (low, high), float32 [2], where it is calibrated; None where the
            objective's own is all there is.
    """

    iteration: Any
    learner: TrainState
    pending: Any
    memory: Any
    clip_range: Any = None

    @classmethod
    def start(
        cls,
        params: Params,
        optimizer: optax.GradientTransformation,
        clip_range: Any = None,
    ) -> "LMState":
        """The state before the first iteration."""
        number, learner = jnp.zeros((), jnp.int32), create_state(params, optimizer)
        empty = np.zeros(0, np.uint8)
        return cls(number, learner, rl.pack_records([]), empty, clip_range)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """Made by :func:`make_learner`.

    Attributes:
        objective: what updates optimise.
        settings: sizes and rules; ``proximal`` is decided.
        length: tokens of the longest text that updates read.
        init: ``params -> state`` before the first batch.
        learn: ``(state, records, key) -> (state, metrics)``: all updates by a batch of
            responses with rewards, whose groups are numbered from 0. The key is that of
            the run; the version is folded in. The parameters and moments of the state
            are donated; ``pending`` and ``memory`` stay as they are.
        publish: ``state -> params`` that engines read. They may share memory with the
            state, see :func:`tmdjax.runtime.publishing.apart`.
        programs: the compiled functions behind it, by name.
    """

    objective: TokenObjective
    settings: LanguageSettings
    length: int
    init: Callable[[Params], LMState]
    learn: Callable[
        [LMState, Sequence[TokenRecord], Any], tuple[LMState, dict[str, Any]]
    ]
    publish: Callable[[LMState], Params]
    programs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_engine(engine: Engine, length: int) -> None:
    """Refuses an engine whose responses could not be trained on.

    Args:
        engine: that writes them.
        length: tokens of the longest text that updates read.

    Raises:
        ValueError: it draws from a truncated distribution, under which the log-probs of
            training would be others, or its slots hold fewer tokens than that.
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


def make_learner(
    log_probs: LogProbs,
    objective: TokenObjective,
    optimizer: optax.GradientTransformation,
    settings: LanguageSettings,
    *,
    length: int,
    pad: int = 0,
    generation_params: Callable[[Params], Params] = lambda params: params,
    reference: Params | None = None,
    shadow: LogProbs | None = None,
    precision: Precision | None = None,
    exact: bool = True,
) -> Learner:
    """Builds what learns from responses.

    Args:
        log_probs: of texts under parameters, at the temperature of the engine.
        objective: what updates optimise.
        optimizer: optax transformation.
        settings: sizes and rules.
        length: tokens of the longest text that updates read.
        pad: id of padding.
        generation_params: what engines are given for parameters, such as
            :func:`tmdjax.models.fuse_projections` or
            :func:`tmdjax.models.prepare_weights`; called once an update.
        reference: parameters of the policy that an objective with a KL term stays
            near.
        shadow: log-probs in exact arithmetic, such as those of the model under 'bf16'
            where it is trained under 'fp8_block': an objective that calibrates its clip
            range goes by them.
        precision: the recipes that the engine's model and ``log_probs`` were built
            under, by which ``proximal='auto'`` is decided and of which a failing check
            of the ratio speaks; None takes those of the engine's model for both.
        exact: whether the engine's model computes as training does, up to the order of
            sums (``engine.model.exact``); ``proximal='auto'`` is decided by it too.

    Returns:
        The learner. Responses with tokens of older weights than its state's may train.
        What holds under equal weights alone is looked at where weights are equal.

        With ``proximal='behaviour'`` the first ratio is checked, and told as
        'first_ratio_error', where the first minibatch has no token of older weights;
        else it says how far the policy has moved, and is left out; so with 'loglinear'.
        The ratio to recomputed log-probs begins at 1 whoever wrote.

        Metrics of :func:`tmdjax.rl.mismatch` are of the responses that the state's
        weights wrote from the first token to the last, of all minibatches where
        ``proximal='recompute'``, else of the first one, before any update. They are
        left out where older weights had a part in every response.

        Where the engine's weights are quantised, 'quantised_moved' is the share of
        their 8-bit values that the updates change. Bounds of the settings are compared
        with these, and :class:`tmdjax.runtime.alarms.Alarms` warns.

    Raises:
        ValueError: the objective needs what it is not given, or does not go with the
            settings. ``learn`` refuses tokens of a later version than its state's.
    """
    differs = "" if precision is None else precision.disagreement()
    corrects = "proximal" in objective.needs
    if settings.proximal == "auto":
        recompute = corrects or differs or not exact
        proximal = "recompute" if recompute else "behaviour"
        settings = dataclasses.replace(settings, proximal=proximal)
    check_log_linear(objective, settings)
    if corrects and settings.proximal == "behaviour":
        raise ValueError(
            "the objective corrects for the policy that wrote, but with "
            "proximal='behaviour' there is nothing to correct; use "
            "proximal='recompute', or correction='none'."
        )
    if settings.train_prompt == "question" and not corrects:
        raise ValueError(
            "train_prompt='question' trains on responses that were written behind "
            "worked examples as if they had not been there; the objective must correct "
            "for that (correction='truncate'), or use train_prompt='sampled'."
        )
    if "reference" in objective.needs and reference is None:
        raise ValueError(
            "the objective needs a reference policy for its KL term; give reference=, "
            "or kl_coefficient=0."
        )
    recomputes = settings.proximal == "recompute"
    update = make_update(log_probs, objective, optimizer, recomputed=recomputes)
    publish, moved = Publisher(generation_params), jax.jit(share_moved)
    alarms = Alarms(settings, precision)
    recomputed = _of_responses(log_probs)
    calibration = None
    if "shadow" in objective.needs:
        check_calibration(objective, settings.epochs * settings.minibatches)
        if shadow is None:
            raise ValueError(
                "the objective calibrates its clip range by log-probs in exact "
                "arithmetic; give shadow=, or calibrate_every=0."
            )
        calibration = ClipCalibration(objective, recomputed, _of_responses(shadow))

    def learn(
        state: LMState, records: Sequence[TokenRecord], key: Any
    ) -> tuple[LMState, dict[str, Any]]:
        version, trained = int(state.iteration), state.learner
        is_current = _versions(records, version) <= {version}
        published = publish(trained.params)  # what the rollout read
        before = quantised_values(published)
        key = jax.random.fold_in(key, version)
        seed = np.asarray(jax.random.key_data(key)).tolist()
        batches = update_batches(
            records,
            objective,
            settings,
            np.random.default_rng(seed),
            length=length,
            pad=pad,
            version=version,
            proximal=lambda texts: recomputed(trained.params, texts),
            reference=None
            if reference is None
            else lambda texts: recomputed(reference, texts),
            calibrated=state.clip_range,
        )
        shadows, seen = [], []
        if calibration is not None:
            batches, shadows = calibration.begin(version, trained.params, batches)
        found, starts_at_1 = [], True  # the ratio to recomputed log-probs does
        for number, batch in enumerate(batches):
            if calibration is not None and shadows and number:
                seen.append(calibration.see(trained.params, batch, shadows[number]))
            trained, metrics = update(trained, batch, key)
            if not number and not recomputes:
                starts_at_1 = _is_as_written(batch)
                if settings.check_ratio and starts_at_1:
                    error = metrics["ratio_error_max"]
                    rl.check_first_ratio(
                        error, objective.clip_range, precision, _RATIO_CAUSES
                    )
            found.append(metrics)
        host = jax.device_get(found)
        check_something_trains(host)
        compared = [
            {k: m.pop(k) for k in [*m] if k.startswith("mismatch_")} for m in host
        ][: None if recomputes else 1]
        means = {k: float(np.mean([m[k] for m in host])) for k in host[0]}
        if is_current or any(m["mismatch_tokens"] for m in compared):
            means |= _mismatch(compared)
        # (sum w)^2 / (n sum w^2) of the weights proximal / behaviour, of n that train
        square = means.pop("behaviour_ratio_square")
        square *= means.get("trained_fraction", 1.0)
        fraction = means.pop("behaviour_ratio") ** 2 / square if square else 1.0
        means["effective_sample_fraction"] = fraction
        if starts_at_1:
            means["first_ratio_error"] = float(host[0]["ratio_error_max"])
        if before:
            after = quantised_values(publish(trained.params))
            means["quantised_moved"] = float(moved(before, after))
        alarms.look(means, published)
        clip_range = state.clip_range
        if calibration is not None:
            means |= dict(zip(("clip_low", "clip_high"), map(float, clip_range)))
            if seen:
                clip_range, told = calibration.finish(seen, clip_range)
                means |= told
        changed = {"learner": trained, "clip_range": clip_range}
        state = dataclasses.replace(state, iteration=state.iteration + 1, **changed)
        return state, means

    return Learner(
        objective=objective,
        settings=settings,
        length=length,
        init=lambda params: LMState.start(
            params, optimizer, None if calibration is None else calibration.start()
        ),
        learn=learn,
        publish=lambda state: publish(state.learner.params),
        programs={"update": update, "recompute": recomputed},
    )


def _versions(records: Sequence[TokenRecord], version: int) -> set[int]:
    """Versions of all tokens; refuses those of later weights than a version."""
    found: set[int] = set()
    for record in records:
        own = set(record.versions)
        if any(v > version for v in own):
            raise ValueError(
                f"response {record.number} has tokens of weights of version "
                f"{max(own)}, but the state is of version {version}: publish weights "
                f"before they write, and restore rollouts and training to one "
                f"checkpoint."
            )
        found |= own
    return found


def _is_as_written(batch: UpdateBatch) -> bool:
    """Whether the weights before the update wrote all of a minibatch, as it is read."""
    return bool(np.all(batch.as_written | ~batch.texts.mask.any(-1)))


def _mismatch(compared: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of :func:`tmdjax.rl.mismatch`, of what each update found."""
    terms = {k: float(np.mean([m[k] for m in compared])) for k in compared[0]}
    terms["mismatch_max"] = float(np.max([m["mismatch_max"] for m in compared]))
    return rl.mismatch_of(terms)


def _of_responses(log_probs: LogProbs) -> Callable[[Any, TokenBatch], Array]:
    """Log-probs of responses in stacked microbatches, [microbatch, sequence, token]."""

    @jax.jit
    def recomputed(params: Params, texts: TokenBatch) -> Array:
        def one(part: TokenBatch) -> Array:
            found = log_probs(params, part.tokens, part.positions, part.segments)[0]
            return jnp.where(part.mask, part.responses(found), 0)

        return jax.lax.map(one, texts)

    return recomputed
