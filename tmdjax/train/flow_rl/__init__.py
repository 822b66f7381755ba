"""RL on flow models: what plugs into it, and its iteration."""

from tmdjax.train.flow_rl.contracts import Credit as Credit
from tmdjax.train.flow_rl.contracts import FlowMethod as FlowMethod
from tmdjax.train.flow_rl.contracts import FlowObjective as FlowObjective
from tmdjax.train.flow_rl.contracts import HostReward as HostReward
from tmdjax.train.flow_rl.contracts import Policy as Policy
from tmdjax.train.flow_rl.contracts import Rollout as Rollout
from tmdjax.train.flow_rl.contracts import Samples as Samples
from tmdjax.train.flow_rl.contracts import Setup as Setup
from tmdjax.train.flow_rl.contracts import make_setup as make_setup
from tmdjax.train.flow_rl.contracts import samples_of as samples_of
from tmdjax.train.flow_rl.contracts import stored_bytes as stored_bytes
from tmdjax.train.flow_rl.iteration import make_iteration as make_iteration
