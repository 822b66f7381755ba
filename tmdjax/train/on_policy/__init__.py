"""On-policy RL in one compiled program: rollout, returns, epochs of minibatches.

    rollout     scan over time: method.act, environments, automatic reset
    returns     values of all observations, advantages over time
    update      scan over epochs, in each a scan over minibatches: method.loss + value
    statistics  of observations, after the update: within an iteration nothing moves

What differs between methods is how they act and what they are trained on; a
:class:`ControlMethod` says both. Everything is a pure function of the state: `jax.vmap`
of ``Trainer.iterate`` over states made from several keys, or with several coefficients,
trains them side by side.
"""

from tmdjax.train.on_policy.rollout import Rollout
from tmdjax.train.on_policy.settings import (
    ControlMethod,
    ControlSettings,
    ControlSetup,
    Diagnosed,
    Normaliser,
    Samples,
    make_setup,
)
from tmdjax.train.on_policy.state import OnPolicyState
from tmdjax.train.on_policy.trainer import (
    Trainer,
    check,
    jit_iterations,
    make_trainer,
)
from tmdjax.train.on_policy.update import adapted_learning_rate

__all__ = [
    "ControlMethod",
    "ControlSettings",
    "ControlSetup",
    "Diagnosed",
    "Normaliser",
    "OnPolicyState",
    "Rollout",
    "Samples",
    "Trainer",
    "adapted_learning_rate",
    "check",
    "jit_iterations",
    "make_setup",
    "make_trainer",
]
