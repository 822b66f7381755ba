"""One iteration of RL, in the two parts between which methods cut.

Flow models (:mod:`tmdjax.train.flow_rl`), control (:mod:`tmdjax.train.on_policy`) and
language models (:mod:`tmdjax.runtime.lm_rl`) all collect what the policy does and then
learn from it. A method that looks at a rollout before it is learned from, scores it
anew, or drops or adds a part of it calls the parts itself.

A rollout belongs to the state it was collected with: it is learned from once, before
the next one is collected. What learns from older rollouts, such as asynchronous RL,
must bring the policy that acted along, and does not stand on this composition.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

State = TypeVar("State")
Rollout = TypeVar("Rollout")

Metrics = dict[str, Any]
"""Scalars by name."""


class Interrupted(Exception):
    """An iteration was stopped while it collected; nothing of it is lost.

    Attributes:
        state: before the iteration, and what it has collected: called with this state
            the iteration goes on from there.
    """

    def __init__(self, state: Any):
        super().__init__("stopped while collecting; go on from the state of this error")
        self.state = state


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Iteration(Generic[State, Rollout]):
    """The parts of an iteration and their composition.

    An iteration is called like any train step, ``(state, batch, key) -> (state,
    metrics)``, so :func:`tmdjax.train.fit` takes it as one.

    Attributes:
        init: makes the state before the first iteration.
        collect: ``(state, batch, key) -> rollout``: acts with the parameters of the
            state and scores what came of it; the state is not changed. The batch is
            None where the iteration draws its own problems.
        learn: ``(state, rollout, key) -> (state, metrics)``: all updates of the
            iteration. The state is donated where the parts are compiled.
        programs: the compiled functions behind the parts, by name, to be lowered or
            counted.

    The key is that of the run in both parts; the number of the iteration, which stands
    in the state, is folded into it.
    """

    init: Callable[..., State]
    collect: Callable[[State, Any, Any], Rollout]
    learn: Callable[[State, Rollout, Any], tuple[State, Metrics]]
    programs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def iterate(self, state: State, batch: Any, key: Any) -> tuple[State, Metrics]:
        """Collects, then learns from it."""
        return self.learn(state, self.collect(state, batch, key), key)

    def __call__(self, state: State, batch: Any, key: Any) -> tuple[State, Metrics]:
        """:meth:`iterate`, as a train step is called."""
        return self.iterate(state, batch, key)
