"""Workers in processes of their own, on one machine or many: actors of Ray.

The process that starts a run keeps the controller, which has the account, and the post:
a thread of it waits for each actor, as for a worker of
:class:`tmdjax.runtime.executors.Threads`. So order, numbers, replay and the log are
those of threads. What is large (the weights) does not pass through it: it is put into
Ray's object store once by the worker that sends it, and goes on as a reference.
"""

import dataclasses
import functools
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import brief, check_range
from tmdjax.core.optional import import_optional
from tmdjax.core.registry import suggestion
from tmdjax.runtime.events import CONTROL, Event, role_of
from tmdjax.runtime.executors.deaths import WorkerDiedError
from tmdjax.runtime.executors.messages import Log, Message, Step, Worker
from tmdjax.runtime.executors.threads import Threads

LARGE = 100_000
"""Bytes of arrays in an item of a message, from which on it goes by reference: what Ray
copies along with a call below this size, it puts into its object store above."""

UNDERSTOOD = (
    *("num_cpus", "num_gpus", "memory", "resources", "accelerator_type"),
    *("label_selector", "scheduling_strategy", "runtime_env"),
)
"""Options of an actor that may be given. Names, restarts and concurrency are ours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayActors:
    """An :class:`tmdjax.runtime.executors.Executor` with a process for each worker.

    All workers but 'control' are actors; each is made in its process by its maker,
    which travels there pickled (by cloudpickle: functions within functions and lambdas
    too), so what holds devices or files is opened in it. tmdjax must be installed on
    every machine; the working directory of this process is importable on its own.

    An actor whose process dies is made anew as the controller says
    (:mod:`tmdjax.runtime.executors.deaths`), on whichever machine has room. Times are
    those of this machine's clock: a step begins when its message is sent, and ends when
    what it answered is here, the way there and back included.

    The environment of an actor is set before it imports JAX: OMP_NUM_THREADS=1, and by
    its GPUs JAX_PLATFORMS ('cpu' without any, else 'cuda,cpu') and
    XLA_PYTHON_CLIENT_PREALLOCATE ('true' for one that has whole GPUs to itself). What
    ``runtime_env={"env_vars": ...}`` of its options says goes before these.

    Attributes:
        address: of a Ray cluster: 'auto' for that of ``ray start`` on this machine, or
            'host:port'; 'local' starts Ray here, which then serves until this process
            ends. Where this process is connected already (``ray.init``), that
            connection is used.
        init: further arguments of ``ray.init``.
        options: of actors, by name of the worker ('generate/0') or, where that is
            absent, by role ('generate'): 'num_cpus', 'num_gpus', 'resources' and
            others of :data:`UNDERSTOOD`, as ``ray.remote`` takes them. Without any, an
            actor is placed where a CPU is free, and has no GPU.
        longest_step: seconds that a step may take, and the making of a worker, > 0.
        grace: seconds that workers have, once a run is over, to end the step that they
            are in, >= 0; then their processes are ended.
        restarts: how often each worker may die, >= 0; the next time ends the run.
        longest_start: seconds until an actor has a place and a process, > 0.
    """

    address: str = "local"
    init: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    longest_step: float = 3600.0
    grace: float = 60.0
    restarts: int = 3
    longest_start: float = 300.0

    def __post_init__(self) -> None:
        check_range("longest_start", self.longest_start, 0, open_low=True)
        self._threads  # noqa: B018  # refuses the other numbers
        for name, options in self.options.items():
            for option in options:
                if option not in UNDERSTOOD:
                    raise ValueError(
                        f"options of {name!r} have {option!r}; give of "
                        f"{', '.join(UNDERSTOOD)}.{suggestion(option, UNDERSTOOD)}"
                    )

    @property
    def _threads(self) -> Threads:
        return Threads(self.longest_step, self.grace, self.restarts)

    def run(
        self,
        workers: Mapping[str, Callable[[], Worker]],
        log: Log,
        *,
        order: Iterable[Event] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> float:
        """Runs to the end, see :meth:`tmdjax.runtime.executors.Executor.run`.

        Raises:
            ImportError: Ray is not installed.
            ValueError: options of a worker that there is not.
            TypeError: a maker cannot be pickled.
            RuntimeError: an actor found no place in time.
        """
        ray = import_optional("ray", "a run in Ray's actors", "ray")
        options = {name: self.options_of(name) for name in workers if name != CONTROL}
        known = {*options, *map(role_of, options)}
        for name in self.options:
            if name not in known:
                raise ValueError(
                    f"there are options of {name!r}, but the workers in actors are "
                    f"{', '.join(options)}.{suggestion(name, known)}"
                )
        pickled = {name: _pickled(ray, name, workers[name]) for name in options}
        if not ray.is_initialized():
            self._connect(ray)
        actors = _Actors(ray, self.longest_start)
        makers = {
            name: functools.partial(actors.start, name, options[name], pickled[name])
            if name in options
            else workers[name]
            for name in workers
        }
        try:
            return self._threads.run(makers, log, order=order, should_stop=should_stop)
        finally:
            actors.end()

    def _connect(self, ray: Any) -> None:
        """Connects this process, and leaves it the handler of SIGTERM that it has."""
        local = {"include_dashboard": False} if self.address == "local" else {}
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(self.address, **local | dict(self.init))
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)

    def options_of(self, name: str) -> dict[str, Any]:
        """All options of the actor of a worker, its environment included."""
        role = role_of(name)
        options = dict(self.options.get(name, self.options.get(role, {})))
        gpus = options.get("num_gpus", 0)
        variables = {
            "OMP_NUM_THREADS": "1",
            "JAX_PLATFORMS": "cuda,cpu" if gpus else "cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "true" if gpus >= 1 else "false",
        }
        environment = dict(options.get("runtime_env", {}))
        environment["env_vars"] = variables | environment.get("env_vars", {})
        return options | {"runtime_env": environment}


def _pickled(ray: Any, name: str, make: Callable[[], Worker]) -> bytes:
    try:
        return ray.cloudpickle.dumps(make)
    except Exception as error:
        raise TypeError(
            f"what makes {name} cannot be sent to a process: {error}. Open files, "
            f"devices and connections inside of it, where the worker runs."
        ) from error


class _Actors:
    """The actors of a run, from the side of the process that started it."""

    def __init__(self, ray: Any, longest_start: float):
        self._ray, self._longest_start = ray, longest_start
        self._changes = threading.Lock()
        self._alive: dict[str, Any] = {}  # by name of the worker
        self._over = False

    def start(self, name: str, options: Mapping[str, Any], pickled: bytes) -> Worker:
        """A worker in a new actor; the one of that name before it is ended.

        Raises:
            RuntimeError: there is no place for it.
            WorkerDiedError: its process died at once.
        """
        with self._changes:
            if name in self._alive:  # it said that it died, or does so in a replay
                self._ray.kill(self._alive.pop(name))
        actor = self._ray.remote(_Host).options(**options).remote()
        with self._changes:
            self._alive[name] = actor
            if self._over:
                self._ray.kill(actor)
        try:
            self._reply(name, actor.begin.remote(), self._longest_start)
        except self._ray.exceptions.GetTimeoutError as error:
            asked = {k: v for k, v in options.items() if k != "runtime_env"}
            raise RuntimeError(
                f"{name} has no process after longest_start={self._longest_start:g} s. "
                f"It asks for {asked or 'a CPU'}; the cluster has "
                f"{brief(self._ray.cluster_resources())}, of which "
                f"{brief(self._ray.available_resources())} are free. Start more nodes, "
                f"ask for less with options=, or raise longest_start."
            ) from error
        self._reply(name, actor.make.remote(pickled))
        return lambda message: self._reply(name, actor.step.remote(message))

    def end(self) -> None:
        """Ends all processes."""
        with self._changes:
            self._over = True
            for actor in self._alive.values():
                self._ray.kill(actor)

    def _reply(self, name: str, reply: Any, most: float | None = None):
        """What an actor answers, once it has."""
        faults = self._ray.exceptions
        try:
            return self._ray.get(reply, timeout=most)
        except faults.RayTaskError as error:  # the worker raised it
            cause = error.cause
            if isinstance(cause, faults.ObjectLostError):
                raise RuntimeError(
                    f"what {name} was sent is lost with the process that sent it "
                    f"({_line(cause)}). If that was the trainer, go on from its last "
                    f"checkpoint, and restore the account of trajectories to it."
                ) from None
            cause.add_note(str(error))
            raise cause from None
        except (
            faults.RayActorError,
            faults.WorkerCrashedError,
            faults.NodeDiedError,
            faults.OutOfMemoryError,
            faults.ObjectLostError,
        ) as error:
            with self._changes:
                if self._over:
                    raise RuntimeError(f"the run of {name} is over.") from None
                self._ray.kill(self._alive.pop(name))  # it may only be out of reach
            raise WorkerDiedError(_line(error)) from None


def _line(error: BaseException, most: int = 300) -> str:
    """An error of Ray in one line, without its numbers of actors."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if not line.startswith(_OF_RAY)]
    text = f"{type(error).__name__}: {' '.join(told)}"
    return text if len(text) <= most else f"{text[:most]} ..."


_OF_RAY = ("class_name:", "actor_id:", "namespace:")


class _Host:
    """The actor: the process that a worker is made and called in."""

    _worker: Worker

    def begin(self) -> None:
        """Answers once the process is there."""

    def make(self, pickled: bytes) -> None:
        """Makes the worker."""
        import ray

        self._worker = ray.cloudpickle.loads(pickled)()

    def step(self, message: Message | None) -> Step | None:
        """Calls the worker."""
        if message is not None:
            message = message._replace(body=_each(_fetched, message.body))
        step = self._worker(message)
        if not isinstance(step, Step):
            return step
        sends = [send._replace(body=_each(_put, send.body)) for send in step.sends]
        return dataclasses.replace(step, sends=sends)


class _Stored:
    """An item of a message, in the object store."""

    def __init__(self, reference: Any):
        self.reference = reference


class _OfJax:
    """A JAX array on its way, as one of NumPy, which readers of a machine share."""

    def __init__(self, array: jax.Array):
        self.array = np.asarray(array)


def _each(change: Callable[[Any], Any], body: Any) -> Any:
    """The body of a message with its items changed, where it is a tuple of several."""
    return tuple(map(change, body)) if type(body) is tuple else body


def _put(item: Any) -> Any:
    """A reference to an item with large arrays, any other as it is."""
    if sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(item)) < LARGE:
        return item
    import ray

    def sent(leaf: Any) -> Any:
        return _OfJax(leaf) if isinstance(leaf, jax.Array) else leaf

    return _Stored(ray.put(jax.tree.map(sent, item)))


def _fetched(item: Any) -> Any:
    """The item itself, where it is a reference to one."""
    if not isinstance(item, _Stored):
        return item
    import ray

    def received(leaf: Any) -> Any:
        return jnp.asarray(leaf.array) if isinstance(leaf, _OfJax) else leaf

    return jax.tree.map(received, ray.get(item.reference))
