"""The synchronous iteration of RL on a language model: write, score, update.

    scheduling   batches of prompts, until enough groups can be trained on
    rounds       prompts -> responses, by the engine, at once or as a planner decides
    scoring      responses -> rewards, in threads
    packing      records -> minibatches of fixed shape, weighed as a whole
    update       one compiled update of a minibatch, cut into microbatches
    calibration  a clip range that follows what exact arithmetic would clip
    publishing   trained parameters -> what the engine reads of them, once an update
    alarms       once a process: rollouts of another policy, 8-bit weights that rest,
                 vanish or are padded

Randomness follows from the key of the run and the number of the iteration alone, and
the engine is empty between iterations: a run that is killed goes on from its state. One
that is asked to stop while it collects keeps what was written so far in its state.
"""

import dataclasses
from collections.abc import Callable
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
from tmdjax.rl import TokenBatch
from tmdjax.runtime.alarms import Alarms
from tmdjax.runtime.calibration import ClipCalibration, check_calibration
from tmdjax.runtime.packing import TokenObjective, update_batches
from tmdjax.runtime.publishing import Publisher
from tmdjax.runtime.rounds import OneRound, Planner, Rollout
from tmdjax.runtime.scheduling import collect
from tmdjax.runtime.settings import Draw, LanguageSettings, Score
from tmdjax.runtime.update import LogProbs, make_update
from tmdjax.train.iteration import Interrupted, Iteration
from tmdjax.train.state import LearnerCounts, TrainState, create_state

_RATIO_CAUSES = (
    "the model computes in 16 bits, where decoding and training round differently "
    "(LanguageSettings(proximal='recompute'), or 'auto'; or recipe='fp32' of the "
    "model's configuration); log_probs at another temperature than the engine's "
    "Sampling; other parameters in the engine than generation_params gives"
)


@struct.dataclass
class LMState(LearnerCounts):
    """Everything an iteration changes.

    Attributes:
        iteration: how many were done, int32.
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


def make_iteration(
    engine: Engine,
    log_probs: LogProbs,
    objective: TokenObjective,
    optimizer: optax.GradientTransformation,
    settings: LanguageSettings,
    draw: Draw,
    score: Score,
    *,
    length: int,
    pad: int = 0,
    generation_params: Callable[[Params], Params] = lambda params: params,
    reference: Params | None = None,
    shadow: LogProbs | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    precision: Precision | None = None,
    planner: Planner | None = None,
) -> Iteration[LMState, Rollout]:
    """Builds the iteration: the engine writes, the scorer judges, updates follow.

    Its batch is None: ``draw`` gives the prompts. ``init(params)`` makes its state.

    Args:
        engine: writes; it must hold texts of ``length``. Between iterations its
            parameters may be gone (updates reuse their memory): give it others first.
        log_probs: of texts under parameters, at the engine's temperature.
        objective: what the update optimises.
        optimizer: optax transformation.
        settings: sizes and rules.
        draw: prompts.
        score: rewards.
        length: longest text of an update. The worked examples of a planner leave room
            for that, unless ``train_prompt='question'`` has the update read none.
        pad: id of padding.
        generation_params: what the engine is given for parameters, such as
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
        should_stop: asked between two chunks of the engine; True raises
            :class:`tmdjax.train.iteration.Interrupted`, whose state goes on.
        planner: how responses are spread over prompts, in rounds; None takes the
            objective where it is a :class:`tmdjax.runtime.Planner` too, and asks for
            as many to each prompt where it is not.

    Returns:
        The iteration. The version of the weights that each token carries is the number
        of the iteration; ``learn`` refuses a rollout of another version than its
        state's. Metrics of training beside the rollout under equal weights are those of
        :func:`tmdjax.rl.mismatch`: of all responses where ``proximal='recompute'``,
        else of the first minibatch, before any update. Where the engine's weights are
        quantised, 'quantised_moved' is the share of their 8-bit values that the
        iteration's updates change. Bounds of the settings are compared with these, and
        :class:`tmdjax.runtime.alarms.Alarms` warns.

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
    differs = "" if precision is None else precision.disagreement()
    corrects = "proximal" in objective.needs
    if settings.proximal == "auto":
        recompute = corrects or differs or not engine.model.exact
        proximal = "recompute" if recompute else "behaviour"
        settings = dataclasses.replace(settings, proximal=proximal)
    if corrects and settings.proximal != "recompute":
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
    if planner is None:
        planner = objective if isinstance(objective, Planner) else OneRound()
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

    def collected(state: LMState, batch: None, key: Any) -> Rollout:
        del batch, key  # the engine has its own
        engine.abort()
        number = int(state.iteration)
        engine.update_weights(publish(state.learner.params), number)
        rollout = collect(
            engine,
            draw,
            score,
            settings,
            number,
            pending=rl.unpack_records(state.pending),
            should_stop=should_stop,
            planner=planner,
            memory=state.memory,
            length=length if settings.train_prompt == "sampled" else None,
        )
        if not rollout.records:
            pending = rl.pack_records(rollout.pending)
            raise Interrupted(dataclasses.replace(state, pending=pending))
        return rollout

    def learn(
        state: LMState, rollout: Rollout, key: Any
    ) -> tuple[LMState, dict[str, Any]]:
        iteration, learner = int(state.iteration), state.learner
        _check_versions(rollout, iteration)
        published = publish(learner.params)  # what the rollout read
        before = quantised_values(published)
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
            calibrated=state.clip_range,
        )
        shadows, seen = [], []
        if calibration is not None:
            batches, shadows = calibration.begin(iteration, learner.params, batches)
        found = []
        for number, batch in enumerate(batches):
            if calibration is not None and shadows and number:
                seen.append(calibration.see(learner.params, batch, shadows[number]))
            learner, metrics = update(learner, batch, key)
            if not found and settings.check_ratio and settings.proximal == "behaviour":
                error = metrics["ratio_error_max"]
                rl.check_first_ratio(
                    error, objective.clip_range, precision, _RATIO_CAUSES
                )
            found.append(metrics)
        host = jax.device_get(found)
        compared = [
            {k: m.pop(k) for k in [*m] if k.startswith("mismatch_")} for m in host
        ]
        means = {k: float(np.mean([m[k] for m in host])) for k in host[0]}
        means |= _mismatch(compared if recomputes else compared[:1])
        # (sum w)^2 / (n sum w^2) of the weights proximal / behaviour
        square = means.pop("behaviour_ratio_square")
        means["effective_sample_fraction"] = means.pop("behaviour_ratio") ** 2 / square
        means["first_ratio_error"] = float(host[0]["ratio_error_max"])
        if before:
            after = quantised_values(publish(learner.params))
            means["quantised_moved"] = float(moved(before, after))
        alarms.look(means, published)
        pending = rl.pack_records(rollout.pending)
        memory = planner.remember(state.memory, rollout, iteration)
        clip_range = state.clip_range
        if calibration is not None:
            means |= dict(zip(("clip_low", "clip_high"), map(float, clip_range)))
            if seen:
                clip_range, told = calibration.finish(seen, clip_range)
                means |= told
        state = LMState(state.iteration + 1, learner, pending, memory, clip_range)
        return state, rollout.metrics | means

    return Iteration(
        init=lambda params: LMState.start(
            params, optimizer, None if calibration is None else calibration.start()
        ),
        collect=collected,
        learn=learn,
        programs={"update": update, "recompute": recomputed},
    )


def _mismatch(compared: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of :func:`tmdjax.rl.mismatch`, of what each update found."""
    terms = {k: float(np.mean([m[k] for m in compared])) for k in compared[0]}
    terms["mismatch_max"] = float(np.max([m["mismatch_max"] for m in compared]))
    return rl.mismatch_of(terms)


def _check_versions(rollout: Rollout, iteration: int) -> None:
    """Refuses responses that other weights wrote than those they are to train."""
    versions = {v for record in rollout.records for v in record.versions}
    if versions - {iteration}:
        raise ValueError(
            f"the rollout has tokens of weights of version {sorted(versions)}, but the "
            f"state is that of iteration {iteration}: what is published and what is "
            f"trained are two versions. Learn from what was collected with this state, "
            f"and leave the engine's weights alone meanwhile."
        )


def _of_responses(log_probs: LogProbs) -> Callable[[Any, TokenBatch], Array]:
    """Log-probs of responses in stacked microbatches, [microbatch, sequence, token]."""

    @jax.jit
    def recomputed(params: Params, texts: TokenBatch) -> Array:
        def one(part: TokenBatch) -> Array:
            found = log_probs(params, part.tokens, part.positions, part.segments)[0]
            return jnp.where(part.mask, part.responses(found), 0)

        return jax.lax.map(one, texts)

    return recomputed
