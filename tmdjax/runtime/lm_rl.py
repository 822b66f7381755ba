"""The synchronous iteration of RL on a language model: write, score, update.

    scheduling   batches of prompts, until enough groups can be trained on
    rounds       prompts -> responses, by the engine, at once or as a planner decides
    scoring      responses -> rewards, in threads
    learner      responses with rewards -> updates, and the weights that write next

Randomness follows from the key of the run and the number of the iteration alone, and
the engine is empty between iterations: a run that is killed goes on from its state. One
that is asked to stop while it collects keeps what was written so far in its state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from tmdjax import rl
from tmdjax.core.types import Params
from tmdjax.generation import Engine
from tmdjax.quant import Precision
from tmdjax.runtime.learner import LMState, check_engine, make_learner
from tmdjax.runtime.packing import TokenObjective
from tmdjax.runtime.rounds import OneRound, Planner, Rollout
from tmdjax.runtime.scheduling import collect
from tmdjax.runtime.settings import Draw, LanguageSettings, Score
from tmdjax.runtime.update import LogProbs
from tmdjax.train.iteration import Interrupted, Iteration


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
    check_engine(engine, length)
    learner = make_learner(
        log_probs,
        objective,
        optimizer,
        settings,
        length=length,
        pad=pad,
        generation_params=generation_params,
        reference=reference,
        shadow=shadow,
        precision=precision,
        exact=engine.model.exact,
    )
    if planner is None:
        planner = objective if isinstance(objective, Planner) else OneRound()

    def collected(state: LMState, batch: None, key: Any) -> Rollout:
        del batch, key  # the engine has its own
        engine.abort()
        number = int(state.iteration)
        engine.update_weights(learner.publish(state), number)
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
        iteration = int(state.iteration)
        _check_versions(rollout, iteration)
        memory = planner.remember(state.memory, rollout, iteration)
        state, metrics = learner.learn(state, rollout.records, key)
        pending = rl.pack_records(rollout.pending)
        state = dataclasses.replace(state, pending=pending, memory=memory)
        return state, rollout.metrics | metrics

    return Iteration(
        init=learner.init, collect=collected, learn=learn, programs=learner.programs
    )


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
