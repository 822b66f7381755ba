"""Locks itself in and runs one program of a policy; a script, which nobody imports.

:func:`tmdjax.rewards.code_runs.run` starts it in an interpreter of its own, with the
task in its standard input: eight bytes, the length of what follows; a marshalled dict
with 'program', 'calls', 'seconds', 'memory' (bytes) and 'folder', where a file system
may be mounted; then what the program may read. It imports nothing of the package.

It is three processes: one that leaves the namespaces of the machine, the first one
inside, whose end is the end of all others there, and one that runs the program.
"""

import builtins
import marshal
import os
import resource
import signal
import sys
import time
from typing import Any, NoReturn

OUT_OF_MEMORY = 86
NOT_STARTED = 87
"""Exit statuses: of a program that needs more memory, of one that never began."""

# Linux: unshare(2), mount(2), umount2(2), prctl(2), capset(2)
_NEW_MOUNTS, _NEW_IPC, _NEW_USER = 0x20000, 0x8000000, 0x10000000
_NEW_PIDS, _NEW_NETWORK = 0x20000000, 0x40000000
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_PROGRAMS, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18
_DETACH = 2
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38
_CAPABILITIES_VERSION = 0x20080522

_NOBODY = 65534
_ALLOWED = frozenset(
    "array.__new__ builtins.id builtins.input builtins.input/result code.__new__ "
    "compile exec function.__new__ import marshal.load marshal.loads "
    "object.__delattr__ object.__getattr__ object.__setattr__ pickle.find_class "
    "sys._getframe sys._getframemodulename sys.unraisablehook".split()
)
"""Audit events of what a program may do; it may read the standard library besides."""
_WITHOUT_EVENTS = frozenset(
    "_ctypes _interpreters _multiprocessing _posixshmem _posixsubprocess _socket "
    "_testcapi _xxsubinterpreters mmap".split()
)
"""Modules through which more can be done than audit events tell of."""
_INSTALLED = ("site-packages", "dist-packages")
"""Folders that stand in that of the standard library, and are none of it."""


def main() -> NoReturn:
    """Reads the task, locks this process in, runs the program, and exits.

    The exit status is 0, 1 where the program raised, one of the two above, or 128 + n
    after signal n.
    """
    status = NOT_STARTED
    try:
        with open(0, "rb", buffering=0, closefd=False) as given:
            task = marshal.loads(given.read(int.from_bytes(given.read(8), "big")))
        library = os.path.dirname(os.__file__)
        held = _lock_in(task["folder"], library)
        _limit(task["seconds"], task["memory"])
        status = 1
        if task["program"] is None:
            print(held)
        else:
            sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)
            _forbid(library)
            _run(task["program"], task["calls"])
        sys.stdout.flush()
        status = 0
    except MemoryError:
        status = OUT_OF_MEMORY
    except SystemExit as end:
        status = _status_of(end)
    except BaseException as error:
        if status == NOT_STARTED:
            os.write(1, repr(error).encode("utf-8", "replace"))
    finally:  # no trace is written, and nothing else runs
        os._exit(status)


def _lock_in(folder: str, library: str) -> dict[str, bool]:
    """Goes on in the innermost process; says what the kernel, not the hook, holds."""
    os.umask(0o022)
    held = {"network": False, "files": False}
    linux = _Linux() if sys.platform == "linux" else None
    if linux:
        linux.end_with_parent()
        held["network"] = linux.leave_namespaces()
    _become_child()
    if linux and held["network"]:
        held["files"] = linux.leave_files(folder, library)
    if os.getuid() == 0 and _all_may_read(library):
        _become_nobody()
    held["processes"] = os.getuid() != 0  # their number is not limited for root
    if linux:
        linux.drop_capabilities()
        linux.end_with_parent()  # changing the user has undone it
    _become_child()
    if linux:
        linux.end_with_parent()
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]
    return held


class _Linux:
    """System calls that Python has no functions for."""

    def __init__(self):
        import ctypes

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)

    def end_with_parent(self) -> None:
        self._prctl(_DEATH_SIGNAL, signal.SIGKILL)

    def leave_namespaces(self) -> bool:
        """The children of this process see no network and no other process."""
        user, group = os.getuid(), os.getgid()
        flags = _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK
        if user:
            flags |= _NEW_USER
        if self._libc.unshare(flags):
            return False
        if user:
            try:
                self._map_user(user, group)
            except OSError:  # then nothing can be mounted, and files are as they were
                pass
        return True

    def _map_user(self, user: int, group: int) -> None:
        # not 0 inside: no capability comes back by exec
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"1000 {user} 1"),
            ("gid_map", f"1000 {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)

    def leave_files(self, folder: str, library: str) -> bool:
        """Files are an empty root from now on, and the library in it, to read."""
        try:
            self._mount(None, "/", None, _RECURSIVE | _PRIVATE)
            source = os.open(library, os.O_PATH)
            flags = _NO_SETUID | _NO_DEVICES
            size = "size=64k,nr_inodes=64,mode=755"
            self._mount("tmpfs", folder, "tmpfs", flags, size)
            place = folder + library
            os.makedirs(place)
            self._mount(f"/proc/self/fd/{source}", place, None, _BIND)
            kept = _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS  # who mounts must keep them
            flags = os.statvfs(place).f_flag & kept
            self._mount(None, place, None, _REMOUNT | _BIND | _READ_ONLY | flags)
            for packages in (os.path.join(place, name) for name in _INSTALLED):
                if os.path.isdir(packages):  # an empty folder hides it
                    self._mount("tmpfs", packages, "tmpfs", flags | _READ_ONLY)
            os.close(source)
            os.chdir(folder)
            # the old root is stacked on the new one, and taken away
            self._checked(self._libc.pivot_root(b".", b"."))
            self._checked(self._libc.umount2(b".", _DETACH))
            os.chdir("/")
        except OSError:
            return False
        return True

    def drop_capabilities(self) -> None:
        header = (self._ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
        self._checked(self._libc.capset(header, (self._ctypes.c_uint32 * 6)()))
        self._prctl(_NO_NEW_PRIVILEGES, 1)

    def _prctl(self, option: int, value: int) -> None:
        rest = (self._ctypes.c_ulong(x) for x in (value, 0, 0, 0))
        self._checked(self._libc.prctl(option, *rest))

    def _mount(
        self,
        source: str | None,
        target: str,
        kind: str | None,
        flags: int,
        data: str | None = None,
    ) -> None:
        texts = [x and os.fsencode(x) for x in (source, target, kind, data)]
        long = self._ctypes.c_ulong(flags)
        self._checked(self._libc.mount(*texts[:3], long, texts[3]))

    def _checked(self, result: int) -> None:
        if result:
            code = self._ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _become_child() -> None:
    """Forks; the parent waits, and exits with the child's status."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)


def _become_nobody() -> None:
    try:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    except PermissionError:  # a root without capabilities, as containers have
        pass


def _all_may_read(library: str) -> bool:
    """Says whether any user can import from the folder."""
    folders, folder = [library], os.path.dirname(library)
    while folder != folders[-1]:
        folders.append(folder)
        folder = os.path.dirname(folder)
    return bool(os.stat(os.__file__).st_mode & 4) and all(
        os.stat(folder).st_mode & 1 for folder in folders
    )


def _limit(seconds: float, memory: int) -> None:
    """Limits of the kernel, and a signal when the CPU seconds are over."""
    for name, value in (
        ("AS", memory),
        ("CORE", 0),
        ("CPU", int(seconds) + 1),  # whole seconds, for who ignores the signal
        ("FSIZE", 0),
        ("NOFILE", 16),
        ("NPROC", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _forbid(library: str) -> None:
    """An audit hook that knows what is allowed, and raises at all else."""
    # Names of its own: the program can reach globals and builtins, and change them. And
    # exact types, as methods of a subclass of str may say anything.
    kind, text, number = type, str, int
    allowed, without_events = _ALLOWED, _WITHOUT_EVENTS
    separator, inside = os.sep, library + os.sep
    hidden = (os.sep, f".{os.sep}", *(name + os.sep for name in _INSTALLED))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def readable(path: Any, flags: int = 0) -> bool:
        if kind(path) is not text or flags & writing:
            return False
        path += separator
        rest = path.removeprefix(inside).lower()
        return (
            path.startswith(inside) and ".." not in rest and not rest.startswith(hidden)
        )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        subject = arguments[0] if arguments else None
        if event == "import" and (
            kind(subject) is not text or subject.rpartition(".")[2] in without_events
        ):
            raise ImportError(f"{subject} is not there for a policy's program")
        if event in allowed:
            return
        if event == "open" and (
            kind(subject) is number  # it is open already
            or readable(subject, arguments[2])
        ):
            return
        if event == "os.listdir" and readable(subject):
            return
        raise PermissionError(f"{event} is not allowed for a policy's program")

    del time.sleep  # has no event in Python 3.11, and helps nobody
    sys.addaudithook(hook)


def _run(program: str, calls: list[str] | None) -> None:
    """Runs the program as the main module; or as a module, and then the calls.

    Each call leaves one line: '=' and the representation of its value, or '!memory' or
    '!error'. What the program prints is then no answer.
    """
    module = type(sys)("__main__" if calls is None else "program")
    sys.modules[module.__name__] = module
    scope = vars(module)
    scope["__builtins__"] = builtins
    answers = None
    if calls is not None:
        answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        os.dup2(2, 1)  # the null device
    exec(compile(program, "<program>", "exec", dont_inherit=True), scope)
    for call in calls or ():
        try:
            line = "=" + repr(eval(call, scope)).replace("\n", " ")
        except MemoryError:
            line = "!memory"
        except BaseException:
            line = "!error"
        print(line, file=answers, flush=True)


def _status_of(end: SystemExit) -> int:
    """Of a program that exits: 0 only by exit(0) or exit(), its output flushed."""
    try:
        sys.stdout.flush()
    except BaseException:
        return 1
    return int(end.code not in (None, 0))


if __name__ == "__main__":
    main()
