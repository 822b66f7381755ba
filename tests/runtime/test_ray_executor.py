"""Workers in actors of Ray: one trace, one result, and processes that are killed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated_runs import costs, flat, lognormal

from tmdjax.runtime import Prompt, TrajectoryStore
from tmdjax.runtime.control import Controller
from tmdjax.runtime.executors import (
    Message,
    RayActors,
    Send,
    Simulated,
    Step,
    Threads,
    ray_actors,
)
from tmdjax.runtime.roles import Generator, Scorer, Trainer
from tmdjax.runtime.schedule import Schedule
from tmdjax.runtime.simulated_engine import SimulatedEngine

ASYNC = Schedule(batch=2, samples=2, max_new_tokens=400, updates=6, slots=4, eta=2)
LENGTHS = lognormal(0.65, 2)
SIZE = 200  # of a matrix of weights, so large that it goes by reference


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Ray on this machine, without a dashboard, tokens or files of others."""
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    before = dict(os.environ)
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_register_timeout_seconds": "300",
        "PYTHONPATH": os.pathsep.join(sys.path),  # for modules of tests
    }
    folder = tmp_path_factory.mktemp("ray")
    short = f"/tmp/ray_test_{os.getpid()}"  # names of sockets have at most 107 letters
    os.symlink(folder, short)
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=200_000_000,
        _temp_dir=short,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)
    os.unlink(short)
    os.environ.clear()
    os.environ.update(before)


def workers_of(schedule, store, folder, version=0):
    """Workers, the batches that they train on, and what control saw of weights.

    Each writes the number of its process, and of its threads, into a folder.
    """
    folder.mkdir(exist_ok=True)
    batches, seen = [], []
    names = ["generate/0", "generate/1"]

    def control():
        decide = Controller(
            schedule, store, lambda n: Prompt([1, 2, 3], n), names, ["reward/0"]
        )

        def work(message):
            if message is not None and message.kind == "weights":
                seen.append(type(message.body[0]))
            step = decide(message)
            for send in () if step is None else step.sends:
                if send.kind == "batch":
                    batches.append(send.body)
            return step

        return work

    size, lengths = SIZE, LENGTHS

    def generator():
        class Engine(SimulatedEngine):
            def update_weights(self, params, version, *, recompute=True):
                assert isinstance(params["w"], jax.Array)
                assert params["w"].shape == (size, size)
                assert (np.asarray(params["w"]) == version).all()
                super().update_weights(params, version, recompute=recompute)

        return Generator(Engine(lengths, slots=4, steps=4, version=version))

    def trainer():
        learned = [version]

        def publish():
            return {"w": jnp.full((size, size), learned[0], jnp.float32)}

        def learn(batch):
            learned[0] += 1
            return {"groups": float(len(batch.groups))}

        return Trainer(publish, learn, version)

    makers = {
        "generate/0": generator,
        "generate/1": generator,
        "reward/0": lambda: Scorer(lambda record, problem: (len(record) % 3, 1.0)),
        "train": trainer,
    }

    def noted(name, make):
        path = folder / name.replace("/", "_")

        def made():
            path.write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
            return make()

        return made

    workers = {name: noted(name, make) for name, make in makers.items()}
    return {"control": control, **workers}, batches, seen


@pytest.mark.slow
def test_a_trace_of_threads_trains_on_the_same_in_actors(started, tmp_path):
    events, trained, weights = [], [], []
    for executor in (Threads(), RayActors()):
        store, log = TrajectoryStore(None), []
        workers, batches, seen = workers_of(ASYNC, store, tmp_path / "pids")
        executor.run(workers, log.append, order=events)
        events = events or log
        trained.append(batches)
        weights.append(set(seen))
    assert len(trained[0]) == ASYNC.updates and trained[0] == trained[1]
    assert weights == [{dict}, {ray_actors._Stored}]
    told = [path.read_text().split() for path in (tmp_path / "pids").iterdir()]
    pids = {int(pid) for pid, _ in told}
    assert len(pids) == 4 and os.getpid() not in pids
    assert {threads for _, threads in told} == {"1"}
    assert all(e.begin <= e.end for e in log)


class Killer:
    """Kills the process of a worker when so many events have come."""

    def __init__(self, folder, kills):
        self.folder, self.kills, self.events = folder, dict(kills), []

    def __call__(self, event):
        self.events.append(event)
        for name, after in list(self.kills.items()):
            path = self.folder / name.replace("/", "_")
            if len(self.events) >= after and path.exists():
                os.kill(int(path.read_text().split()[0]), signal.SIGKILL)
                del self.kills[name]

    def count(self, what):
        return sum(event.what == what for event in self.events)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_processes_that_are_killed_lose_nothing_and_nothing_trains_twice(
    started, tmp_path, seed
):
    """The trainer once, then a generator and the scorer; relative to its checkpoint."""
    rng = np.random.default_rng(seed)
    account, copy = tmp_path / "account", tmp_path / "copy"
    pids = [tmp_path / "first", tmp_path / "second"]
    first = Killer(pids[0], {"train": int(rng.integers(10, 50))})
    with TrajectoryStore(account) as store:
        workers, begun, _ = workers_of(ASYNC, store, pids[0])
        with pytest.raises(RuntimeError, match=r"train died .*Restore the trainer"):
            RayActors().run(workers, first)
    version = first.count("learn")  # a checkpoint of each, as it was reported
    assert not first.kills and version < ASYNC.updates
    kept = begun[:version]
    with TrajectoryStore(account) as store:
        store.restore(version)
    shutil.copytree(account, copy)
    writer = f"generate/{rng.integers(2)}"
    kills = {writer: int(rng.integers(8, 40)), "reward/0": int(rng.integers(8, 40))}
    second = Killer(pids[1], kills)
    with TrajectoryStore(account) as store:
        workers, batches, _ = workers_of(ASYNC, store, pids[1], version)
        RayActors().run(workers, second)
        rows = store.select()
    assert not second.kills and second.count("died") == second.count("restart") == 2
    numbers = [
        [r.number for g in b.groups for r in g.records] for b in [*kept, *batches]
    ]
    assert [b.version for b in [*kept, *batches]] == list(range(ASYNC.updates))
    consumed = {t.number: t.version for t in rows if t.state == "consumed"}
    assert consumed == {n: v for v, each in enumerate(numbers) for n in each}
    assert len(set(flat(numbers))) == len(flat(numbers))
    assert {t.group for t in rows} == set(range(len(rows) // 2))
    reasons = [t.reason for t in rows if t.state == "discarded" and t.reason != "stale"]
    assert len(reasons) <= 1 and all("reward/0 died" in reason for reason in reasons)
    for batch in [*kept, *batches]:
        for record in (r for g in batch.groups for r in g.records):
            assert len(record) == LENGTHS(record.number)
            assert batch.version - min(record.versions) <= ASYNC.eta
    with TrajectoryStore(copy) as store:  # and the log says all of it
        workers, again, _ = workers_of(ASYNC, store, tmp_path / "replay", version)
        Simulated(costs()).run(workers, [].append, order=second.events)
    assert again == batches


def caller(*calls):
    def control():
        left = list(calls)

        def work(message):
            if message is None and left:
                return Step(what="call", sends=[Send("player/0", "call", left.pop(0))])
            if message is not None:
                return Step(what="heard", last=True)

        return work

    return control


@pytest.mark.slow
def test_faults_end_a_run_and_say_who(started, refused):
    def player():
        def work(message):
            if message is None:
                return None
            if message.body == "sleep":
                time.sleep(600)
            raise ZeroDivisionError("of mine")

        return work

    def run(body, executor, make=player):
        executor.run({"control": caller(body), "player/0": make}, [].append)

    with pytest.raises(ZeroDivisionError, match="of mine") as found:
        run("divide", RayActors())
    assert "in step 0 of player/0, at 'call'" in found.value.__notes__
    assert any("Traceback" in note or "ray::" in note for note in found.value.__notes__)
    begin = time.monotonic()
    refused(
        "player/0 has been in one step for more than longest_step=45 s",
        *(run, "sleep", RayActors(longest_step=45)),
        error=RuntimeError,
    )
    assert time.monotonic() - begin < 90
    refused(
        r"player/0 has no process after longest_start=1 s. It asks for "
        r"\{'num_cpus': 99\}; the cluster has .*'CPU': 8",
        *(run, "", RayActors(longest_start=1, options={"player": {"num_cpus": 99}})),
        error=RuntimeError,
    )
    refused(
        "there are options of 'playr', but .*Did you mean 'player'",
        *(run, "", RayActors(options={"playr": {}})),
    )
    lock = threading.Lock()
    refused(
        "what makes player/0 cannot be sent to a process: ",
        *(run, "", RayActors(), lambda: lock),
        error=TypeError,
    )


TRAINED_TWICE = """
import sys

from checks import same
from test_asynchronous import BIGRAMS, bigrams, clock, learner_of_bigrams
from test_quantised_rollouts import KEY, PARAMS, draw, low

from tmdjax import runtime, train

address, folder = sys.argv[1:]


def trained(executor, **options):
    learner, rows = learner_of_bigrams(), []
    state, finished = runtime.fit_asynchronously(
        *(learner.init(PARAMS), learner, bigrams, draw, low, BIGRAMS),
        key=KEY,
        executor=executor,
        on_metrics=lambda step, row: rows.append((step, row)),
        **options,
    )
    assert finished and [step for step, _ in rows] == list(range(1, BIGRAMS.updates + 1))
    return state, rows


actors = runtime.executors.RayActors(address=address)
saved = train.Checkpoints(folder + "/checkpoints")
there, rows = trained(actors, folder=folder, checkpoints=saved)
here, expected = trained(clock())
same(there, here)
assert rows == expected
"""


@pytest.mark.slow
def test_a_language_model_trains_in_actors_as_under_the_virtual_clock(
    started, tmp_path
):
    """In a process of its own: checks that tests put into functions do not travel."""
    address = started.get_runtime_context().gcs_address
    command = [sys.executable, "-c", TRAINED_TWICE, address, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_options_and_the_environment_of_an_actor(refused):
    given = {
        "generate": {"num_gpus": 1},
        "reward": {"num_gpus": 0.25},
        "train": {"runtime_env": {"env_vars": {"JAX_PLATFORMS": "tpu"}, "pip": ["x"]}},
        "generate/1": {"num_cpus": 2},
    }
    executor = RayActors(options=given)

    def variables(name):
        options = executor.options_of(name)
        assert {k: v for k, v in options.items() if k != "runtime_env"} == {
            k: v
            for k, v in given.get(name, given.get(name.split("/")[0], {})).items()
            if k != "runtime_env"
        }
        found = options["runtime_env"]["env_vars"]
        assert found["OMP_NUM_THREADS"] == "1"
        return found["JAX_PLATFORMS"], found["XLA_PYTHON_CLIENT_PREALLOCATE"]

    assert variables("generate/0") == ("cuda,cpu", "true")
    assert variables("generate/1") == ("cpu", "false")
    assert variables("reward/0") == ("cuda,cpu", "false")
    assert variables("train") == ("tpu", "false")
    assert executor.options_of("train")["runtime_env"]["pip"] == ["x"]
    assert (
        "env_vars" in given["train"]["runtime_env"]
    )  # what was given is left as it is
    refused(
        "options of 'train' have 'max_restarts'.* num_cpus",
        *(RayActors,),
        options={"train": {"max_restarts": 3}},
    )
    refused("longest_start=0 is outside", RayActors, longest_start=0)
    refused("restarts=-1 must be", RayActors, restarts=-1)


def test_without_ray_the_remedy_is_named(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(
        r"a run in Ray's actors needs ray: .* pip install 'tmdjax\[ray\]'",
        *(RayActors().run, {"control": lambda: None}, [].append),
        error=ImportError,
    )


def test_a_worker_that_is_made_anew_leaves_no_process_behind():
    """Nor does one whose death is replayed: its process lives, and holds its GPUs."""
    killed = []

    class Method:
        remote = staticmethod(lambda *_: None)

    class Actor:
        begin = make = step = Method

    options = types.SimpleNamespace(options=lambda: types.SimpleNamespace(remote=Actor))
    ray = types.SimpleNamespace(
        remote=lambda _: options,
        get=lambda *_, timeout: None,
        kill=killed.append,
        exceptions=None,
    )
    actors = ray_actors._Actors(ray, 1.0)
    for count, name in enumerate(("train", "generate/0", "generate/0", "generate/0")):
        actors.start(name, {}, b"")
        assert len(killed) == max(0, count - 1)
    actors.end()
    assert len(set(killed)) == len(killed) == 4


def test_small_items_travel_as_they_are():
    body = ({"w": jnp.zeros(3)}, 7)
    assert ray_actors._each(ray_actors._put, body) is not body
    assert ray_actors._each(ray_actors._put, body)[0] is body[0]
    message = Message("train", 0, "x", [1])
    assert ray_actors._each(ray_actors._put, message) is message  # a tuple of a kind
