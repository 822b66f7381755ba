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

from tmdjax.train.on_policy.rollout import Rollout as Rollout
from tmdjax.train.on_policy.settings import ControlMethod as ControlMethod
from tmdjax.train.on_policy.settings import ControlSettings as ControlSettings
from tmdjax.train.on_policy.settings import ControlSetup as ControlSetup
from tmdjax.train.on_policy.settings import Diagnosed as Diagnosed
from tmdjax.train.on_policy.settings import Normaliser as Normaliser
from tmdjax.train.on_policy.settings import PartlyFrozen as PartlyFrozen
from tmdjax.train.on_policy.settings import Samples as Samples
from tmdjax.train.on_policy.settings import make_setup as make_setup
from tmdjax.train.on_policy.state import OnPolicyState as OnPolicyState
from tmdjax.train.on_policy.trainer import Trainer as Trainer
from tmdjax.train.on_policy.trainer import check as check
from tmdjax.train.on_policy.trainer import jit_iterations as jit_iterations
from tmdjax.train.on_policy.trainer import make_trainer as make_trainer
from tmdjax.train.on_policy.update import adapted_learning_rate as adapted_learning_rate
