"""One interface to run workers on a virtual clock, in threads or in Ray's actors."""

from tmdjax.runtime.executors.costs import Costs as Costs
from tmdjax.runtime.executors.costs import calibrate as calibrate
from tmdjax.runtime.executors.costs import load_costs as load_costs
from tmdjax.runtime.executors.deaths import WorkerDiedError as WorkerDiedError
from tmdjax.runtime.executors.messages import Executor as Executor
from tmdjax.runtime.executors.messages import Message as Message
from tmdjax.runtime.executors.messages import Send as Send
from tmdjax.runtime.executors.messages import Step as Step
from tmdjax.runtime.executors.messages import Worker as Worker
from tmdjax.runtime.executors.ray_actors import RayActors as RayActors
from tmdjax.runtime.executors.sim import Simulated as Simulated
from tmdjax.runtime.executors.threads import Threads as Threads
