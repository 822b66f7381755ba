"""Runs that are killed, or have no room on the disk, end as one that was left alone.

    python -m tests.harness.kill_campaign [--systems boss tmd] [--seconds 600] [--seed 0]

Every system's smoke (one arm, a checkpoint at every log) is run once undisturbed. Then,
system after system until the time is up, it is run anew and stopped up to four times: by
SIGKILL at a random moment, or before, after, in the middle of, or within milliseconds of
a random write (a file's bytes, its name, a folder, a removal); or by a disk that is full,
which is a small tmpfs where one may be mounted and a limit on the size of a file
(RLIMIT_FSIZE) elsewhere. Then it is left alone and must end in the same metrics and logs,
to the digit, timings apart. Meanwhile another process loads models and restores
checkpoints of that run in a loop; it must find nothing, or something whole. A full disk
must end in a message that says what to do. Counts are printed; the exit status is 1 if
anything of that did not hold. ``make nightly`` runs it.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from experiments import run
from experiments.run import find_experiment
from tmdjax import harness, train
from tmdjax.core import compilation_cache
from tmdjax.core.failures import explain
from tmdjax.harness.logs import TIME_PREFIX, read_rows
from tmdjax.train import CheckpointError

CASES = {
    "april": ("april_4n_decoupled", []),
    "areal": ("sync", []),  # with eta above 0, a kill changes who writes what when
    "boss": (None, []),
    "branchgrpo": ("branch_depth", ["rl.iterations=30"]),
    "flow_equivariant": ("full", []),
    "flow_grpo": ("flow_grpo", ["rl.iterations=30"]),
    "flow_matching": (None, []),
    "fp8_training": ("dit_fp8_block", []),
    "grpo": (None, []),
    "jet_rl": ("calibrated", []),
    "pde_refiner": ("refiner", []),
    "policyflow": ("policyflow", ["train.envs=16"]),
    "reinflow": ("maze_reinflow4", []),
    "scheduling": (None, []),
    "tmd": ("tmd", ["distill.cycles=20", "distill.adversarial_weight=0.03"]),
    "xrpo": (None, []),
}
"""By system: the arm that runs (None for all), and changed settings of its smoke."""

MODES = ("before", "after", "middle", "soon")
OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")
LIMIT = 300.0
"""Seconds after which a run counts as hanging."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """How a run is stopped; by nothing if all are None.

    Attributes:
        moment: seconds after its start, by SIGKILL.
        write: (number of an operation on a file, one of ``MODES``), by SIGKILL.
        file_bytes: no file may become larger.
    """

    moment: float | None = None
    write: tuple[int, str] | None = None
    file_bytes: int | None = None


# ------------------------------------------------- in the process that is stopped


def count_writes(below: pathlib.Path, fault: tuple[int, str] | None) -> list[int]:
    """Counts what is done to files below a folder, and kills the process at one."""
    done, lock = [0], threading.Lock()

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def is_below(operation: str, given: tuple, options: dict) -> bool:
        if options.get("dir_fd") is not None:
            return True  # shutil.rmtree
        path = f"/proc/self/fd/{given[0]}" if operation == "fsync" else given[0]
        return os.path.realpath(path).startswith(str(below))

    def counted(operation: str, function: object) -> object:
        @functools.wraps(function)
        def call(*given: object, **options: object) -> object:
            if not is_below(operation, given, options):
                return function(*given, **options)
            with lock:
                done[0] += 1
                mode = fault[1] if fault and fault[0] == done[0] else ""
            if mode == "before":
                kill()
            if mode == "middle":  # the bytes did not all reach the disk
                if operation == "fsync":
                    os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
                kill()
            if mode == "soon":  # inside what is written without Python, such as arrays
                timer = threading.Timer(random.uniform(0, 0.02), kill)
                timer.daemon = True
                timer.start()
            result = function(*given, **options)
            if mode == "after":
                kill()
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))
    return done


def attempt(system: str, workdir: pathlib.Path, fault: Fault) -> int:
    """Runs a system's smoke in this process; returns its exit status."""
    done = count_writes(workdir.parent, fault.write)
    arm, changes = CASES[system]
    config = harness.load_config(f"configs/{system}.py:smoke", changes)
    with config.unlocked():
        config.claims = {}
        if arm:
            config.arms = {arm: config.arms[arm]}
    compilation_cache.enable()
    train.fit = functools.partial(train.fit, checkpoint_seconds=(0.0, 0.0))
    if fault.file_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, hard))
    options = run.Options(command="test", tier="smoke", workdir=workdir)
    experiment = find_experiment(config, f"configs/{system}.py:smoke")
    code = run.run(experiment, config, options).code
    print(f"operations={done[0]}", flush=True)
    return code


def read_in_a_loop(root: pathlib.Path) -> int:
    """Loads and restores all that a run has, again and again; returns at SIGTERM."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    reads = found = 0
    while not stopped:
        time.sleep(0.05)
        workdirs = list(root.glob("run*"))
        folders = [*root.glob("stages/*/checkpoints"), *root.glob("stages/*/result")]
        for folder in folders:
            reads += 1
            found += train.Checkpoints(folder).restore() is not None
        for path in root.glob("stages/*/metrics.jsonl"):
            reads += 1
            found += bool(read_rows(path))
        for workdir in workdirs:
            for path in (workdir / "models").glob("*-seed*"):
                arm, _, seed = path.name.rpartition("-seed")
                reads += 1
                with contextlib.suppress(FileNotFoundError, CheckpointError):
                    harness.load(workdir, arm, int(seed))
                    found += 1
    print(f"reads={reads} whole={found}", flush=True)
    return 0


# ------------------------------------------------- in the process that looks on


class Child:
    """A function in a forked process, whose output is kept.

    No array may have been made before: a fork of running XLA threads would hang.
    """

    def __init__(self, function, *arguments):
        self.output, self._pipe = b"", None
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(read)
                os.dup2(write, 1)
                os.dup2(write, 2)
                os.environ["JAX_PLATFORMS"] = "cpu"
                code = function(*arguments)
            except BaseException as error:
                traceback.print_exc()
                print(explain(error)[0])  # which is what a user sees
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        os.close(write)
        self._pipe = read

    def wait(self, seconds: float) -> bool:
        """Reads what it says for so long; whether it ended."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self._pipe], [], [], left)[0]:
                data = os.read(self._pipe, 65536)
                if not data:
                    return True
                self.output += data
        return False

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Its exit status (-signal if killed) and its output; sends a signal first."""
        if number is not None:
            os.kill(self.pid, number)
        if not self.wait(LIMIT):
            os.kill(self.pid, signal.SIGKILL)
            self.output += b"\nhung"
        os.close(self._pipe)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.output.decode(errors="replace")


def result_of(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Metrics and rows of the log, timings apart."""
    metrics = json.loads((workdir / "summary.json").read_text())["metrics"]
    rows = [metrics, *read_rows(workdir / "metrics.jsonl")]
    return [
        {k: repr(v) for k, v in row.items() if not k.startswith(TIME_PREFIX)}
        for row in rows
    ]


def mounted(folder: pathlib.Path, size: int | str, again: bool = False) -> bool:
    """Mounts a tmpfs of so many bytes, or gives it that size; whether it was allowed."""
    option = f"{'remount,' if again else ''}size={size}"
    command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


class Campaign:
    """Rounds over systems, their counts and what went wrong."""

    def __init__(self, systems, folder: pathlib.Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.counts = {name: collections.Counter() for name in systems}
        self.failures: list[str] = []
        self.whole: dict[str, tuple[list, float, int, int]] = {}

    def leave_alone(self, system: str) -> None:
        """The undisturbed run: its result, seconds, operations, largest folder."""
        root = self.folder / f"{system}-whole"
        began = time.monotonic()
        code, text = Child(attempt, system, root / "run", Fault()).end()
        seconds = time.monotonic() - began
        if code:
            sys.exit(f"{system} fails undisturbed:\n{text}")
        operations = int(text.rpartition("operations=")[2])
        size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
        self.whole[system] = (result_of(root / "run"), seconds, operations, size)
        print(
            f"{system}: {seconds:.1f} s, {operations} operations, {size} bytes",
            flush=True,
        )

    def fault(self, system: str) -> Fault:
        """A random one."""
        _, seconds, operations, _ = self.whole[system]
        kind = self.draw.choices(("moment", "write", "limit"), (3, 6, 1))[0]
        if kind == "moment":
            return Fault(moment=self.draw.uniform(0, seconds))
        if kind == "write":
            number = 1 + int(operations * self.draw.random() ** 2)
            return Fault(write=(number, self.draw.choice(MODES)))
        return Fault(file_bytes=int(10 ** self.draw.uniform(1, 5)))

    def round(self, system: str, number: int) -> None:
        """One run, stopped several times and read meanwhile, against the whole one."""
        result, _, _, size = self.whole[system]
        counts, root = self.counts[system], self.folder / f"{system}-{number}"
        root.mkdir()
        small = self.draw.random() < 0.3
        small = small and mounted(root, int(size * self.draw.uniform(0.1, 0.9)))
        reader = Child(read_in_a_loop, root)
        story = []
        try:
            if small:
                code, text = Child(attempt, system, root / "run", Fault()).end()
                story.append(f"tmpfs: {code}")
                self.full(system, "tmpfs", code, text, story)
                assert mounted(root, "1g", again=True)
            for fault in [self.fault(system) for _ in range(self.draw.randint(1, 4))]:
                child = Child(attempt, system, root / "run", fault)
                if fault.moment is not None:
                    ended = child.wait(fault.moment)
                    code, text = child.end(None if ended else signal.SIGKILL)
                else:
                    code, text = child.end()
                story.append(f"{fault}: {code}")
                if fault.file_bytes is not None:
                    self.full(system, "limit", code, text, story)
                elif code == -signal.SIGKILL:
                    what = "moment" if fault.write is None else fault.write[1]
                    counts[f"killed {what}"] += 1
                elif code == 0:
                    break  # it was faster
                else:
                    self.fail(system, "a run that was not stopped", text, story)
            code, text = Child(attempt, system, root / "run", Fault()).end()
            counts["runs finished"] += 1
            if code:
                self.fail(system, "the last run", text, story)
            elif result_of(root / "run") != result:
                self.fail(system, "other numbers", text, story)
            else:
                counts["equal"] += 1
            odd = [p for p in root.rglob("*") if p.name.startswith(("new_", "old_"))]
            if odd:
                self.fail(system, f"left behind: {odd}", "", story)
        finally:
            code, text = reader.end(signal.SIGTERM)
            if code:
                self.fail(system, "the reader", text, story)
            else:
                for word in text.splitlines()[-1].split():
                    name, _, value = word.partition("=")
                    counts[name] += int(value)
            if small:
                subprocess.run(["umount", "--lazy", str(root)], check=True)
        shutil.rmtree(root, ignore_errors=True)

    def full(self, system, kind, code, text, story) -> None:
        """A full disk: the run ended well, or says that space must be freed."""
        if code == 0:
            self.counts[system][f"{kind}: enough"] += 1
        elif code > 0 and "Free space" in text:
            self.counts[system][f"{kind}: full"] += 1
        else:
            self.fail(system, f"a full disk ({kind})", text, story)

    def fail(self, system, what, text, story) -> None:
        """Notes and prints what did not hold."""
        self.counts[system]["FAILED"] += 1
        lines = "\n  ".join([*story, *text.strip().splitlines()[-40:]])
        self.failures.append(f"{system}: {what}")
        print(f"\nFAILED {system}: {what}\n  {lines}", flush=True)


def main() -> int:
    """Runs the campaign; returns the exit status."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--systems", nargs="+", default=list(CASES), choices=CASES)
    flags.add_argument("--seconds", type=float, default=1800.0)
    flags.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    given = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(given.systems, pathlib.Path(folder).resolve(), given.seed)
        print(f"seed {given.seed}", flush=True)
        for system in given.systems:
            campaign.leave_alone(system)
        end, number = time.monotonic() + given.seconds, 0
        while time.monotonic() < end:
            campaign.round(given.systems[number % len(given.systems)], number)
            number += 1
    for system, counts in campaign.counts.items():
        found = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
        print(f"{system}: {found}")
    total = sum(campaign.counts.values(), collections.Counter())
    print("all:", ", ".join(f"{name} {n}" for name, n in sorted(total.items())))
    return 1 if campaign.failures else 0


if __name__ == "__main__":
    sys.exit(main())
