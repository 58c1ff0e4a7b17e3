"""Runs one untrusted program in bubblewrap, at a bounded cost. Invariant: without a working sandbox nothing is run.

    python -c 'from kdcache.judge.sandbox import Sandbox; print(Sandbox().run("python", "print(input())", "hello"))'

A program sees /usr read-only, a Python interpreter, and a small /tmp of its own; no network, no home, no environment, no
process of the machine's. It is never root: root becomes nobody before it enters. What holds it:

* time: CPU seconds per process (an rlimit), wall seconds for all of it;
* memory: address space per process (an rlimit), and the memory of all its processes (resident and swapped) and /tmp
  together, looked at every few milliseconds because forks multiply the first. Nothing is left that would hide from that
  look in size: shared memory without a file and large socket buffers are refused;
* processes with their threads: an rlimit of its own user namespace, and the same look;
* output, files: bytes. Whatever exceeds a limit ends its whole pid namespace.

A seccomp filter closes what namespaces leave open: sockets that are not Unix (vsock knows no network namespace), key
rings, memory that no limit sees (memfd, System V, shared anonymous mappings), and calls that no program here needs. A hole in the kernel is a way
out all the same: who must not risk that runs all of this in a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from kdcache.errors import KDError

WATCH_SECONDS = 0.02
#: Address space beyond the memory limit: libraries, thread stacks and arenas that are reserved and never touched.
SPARE_ADDRESS_MB = 256
MAX_FILES = 10_000  # in /tmp; each costs the kernel a kilobyte
CPP_STACK_MB = 256  # deep recursion is how contests are solved
STDERR_BYTES, STDERR_KEPT_BYTES = 64 << 20, 65_536
KEPT_OUTCOMES, KEPT_CHARACTERS, KEPT_BINARIES = 4096, 16_384, 64

_worker = threading.local()  # its ``stop`` ends the program that this thread runs
_NEVER = threading.Event()

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Limits:
    wall_seconds: float = 10.0
    cpu_seconds: int = 10  # a process
    memory_mb: int = 512  # all processes and /tmp
    processes: int = 16  # and threads
    output_bytes: int = 1 << 20  # stdout
    file_bytes: int = 64 << 20  # a file, and all of /tmp
    stack_mb: int = 8  # of the first thread, and what each other reserves


DEFAULT_LIMITS = Limits()
#: g++ -O2 with <bits/stdc++.h> takes seconds on a busy machine; what it makes comes back through stdout.
COMPILER_LIMITS = Limits(wall_seconds=60.0, cpu_seconds=30, memory_mb=1024, output_bytes=64 << 20)


@dataclass(frozen=True)
class Outcome:
    status: str  # ok, error (the exit code is not 0), timeout, memory (or processes, or files), output, compile
    stdout: str
    stderr: str
    exit_code: int | None  # 128 + n if signal n ended it; None if a limit did
    seconds: float


class Sandbox:
    """Runs programs and remembers what came of them. ``unsafe``: rlimits without bubblewrap; the caller warns of it."""

    def __init__(self, unsafe: bool = False):
        self.unsafe = unsafe
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[str, Any] = OrderedDict()
        self._binaries: OrderedDict[str, bytes] = OrderedDict()
        self._proc: list[str] | None = None  # bwrap's options for /proc, known when a program was seen to run

    def check(self) -> None:
        """KDError unless programs can be run here; the first time it runs one."""
        with self._lock:
            if self._proc is None:
                self._proc = [] if self.unsafe else _probe()

    def run(
        self,
        language: str,
        program: str,
        stdin: str = "",
        limits: Limits = DEFAULT_LIMITS,
        files: Mapping[str, str] | None = None,
    ) -> Outcome:
        """What ``program`` (python or cpp) does with ``stdin``; the paths of ``files`` (name -> text) are its arguments.

        C++ is compiled once for all its inputs. KDError if the sandbox failed, which is never the program's doing.
        """
        key = _key(language, program, stdin, limits, files)
        outcome: Outcome | None = self._kept(self._outcomes, key)
        if outcome is not None:
            return outcome
        self.check()
        given = {f"/code/{name}": _encode(text) for name, text in (files or {}).items()}
        arguments = list(given)
        if language == "python":
            given["/code/main.py"] = _encode(program)
            outcome = self._run([_python(self.unsafe), "-I", "/code/main.py", *arguments], given, stdin, limits)
        elif language == "cpp":
            binary = self._compiled(program)
            if isinstance(binary, Outcome):
                outcome = binary
            else:
                limits = replace(limits, stack_mb=CPP_STACK_MB)
                outcome = self._run(["/code/main", *arguments], given | {"/code/main": binary}, stdin, limits)
        else:
            raise KDError(f"the sandbox runs python and cpp, not {language!r}")
        if len(outcome.stdout) + len(outcome.stderr) <= KEPT_CHARACTERS:
            self._keep(self._outcomes, key, outcome, KEPT_OUTCOMES)
        return outcome

    def _compiled(self, program: str) -> bytes | Outcome:
        """The program's executable, or how compiling it failed."""
        if shutil.which("g++") is None:
            raise KDError("C++ programs need g++, which is not installed: apt install g++")
        key = _key(program)
        binary: bytes | None = self._kept(self._binaries, key)
        if binary is None:
            script = """
for standard in 17 20; do
    g++ -O2 -std=c++$standard -DONLINE_JUDGE -w "$1" -o "$TMPDIR/main" >&2 && exec base64 -w0 "$TMPDIR/main"
done
exit 1"""
            command = ["/bin/sh", "-c", script, "sh", "/code/main.cpp"]
            outcome = self._run(command, {"/code/main.cpp": _encode(program)}, "", COMPILER_LIMITS)
            if outcome.status != "ok":
                return replace(outcome, status="compile", stdout="")
            binary = b64decode(outcome.stdout)
            self._keep(self._binaries, key, binary, KEPT_BINARIES)
        return binary

    def run_joined(self, script: str, jobs: Sequence[tuple[str, Mapping[str, str]]], limits: Limits) -> list[Outcome]:
        """Run a Python script once per job, side by side, each in a sandbox of its own: until the first has ended.

        The last job's output is joined to the first one's input by a pipe, and the other way round. Arguments: the job's name,
        the descriptors it reads from and writes to, and the paths of its files. KDError as for ``run``; but where the first
        job has ended before another had started, that one's outcome is empty.
        """
        key = _key(script, jobs, limits)
        outcomes: list[Outcome] | None = self._kept(self._outcomes, key)
        if outcomes is not None:
            return outcomes
        self.check()
        with contextlib.ExitStack() as stack:
            ends = [os.pipe(), os.pipe()]
            descriptors = [descriptor for pipe in ends for descriptor in pipe]
            boxes = []
            try:
                for number, (name, texts) in enumerate(jobs):
                    files = {f"/code/{file}": _encode(text) for file, text in texts.items()}
                    reading, writing = ends[number][0], ends[1 - number][1]
                    command = [_python(self.unsafe), "-I", "/code/main.py", name, str(reading), str(writing), *files]
                    files["/code/main.py"] = _encode(script)
                    boxes.append(self._start(stack, command, files, "", limits, (reading, writing)))
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            _attend(boxes)
            outcomes = [box.outcome() for box in boxes]
        if sum(len(outcome.stdout) + len(outcome.stderr) for outcome in outcomes) <= KEPT_CHARACTERS:
            self._keep(self._outcomes, key, outcomes, KEPT_OUTCOMES)
        return outcomes

    def _run(self, command: list[str], files: dict[str, bytes], stdin: str, limits: Limits) -> Outcome:
        with contextlib.ExitStack() as stack:
            box = self._start(stack, command, files, stdin, limits)
            _attend([box])
            return box.outcome()

    def _start(
        self,
        stack: contextlib.ExitStack,
        command: list[str],
        files: dict[str, bytes],
        stdin: str,
        limits: Limits,
        kept: Sequence[int] = (),
    ) -> _Box:
        path = "/code/stdin" if stdin else "/dev/null"
        if stdin:  # a file, which a program may also open by the name /dev/stdin
            files = files | {path: _encode(stdin)}
        if not self.unsafe:
            return _start(stack, _wrapper(self._proc or [], limits), command, files, path, limits, kept)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name, content in files.items():
            file = Path(folder, Path(name).name)
            file.write_bytes(content)
            file.chmod(0o755)
        command, path = [
            [word.replace("/code/", f"{folder}/") if word.startswith("/code/") else word for word in command],
            path.replace("/code/", f"{folder}/"),
        ]
        return _start(stack, ["env", "-C", folder, f"TMPDIR={folder}"], command, None, path, limits, kept)

    def _kept(self, kept: OrderedDict[str, Any], key: str) -> Any:
        with self._lock:
            if key in kept:
                kept.move_to_end(key)
            return kept.get(key)

    def _keep(self, kept: OrderedDict[str, Any], key: str, value: Any, most: int) -> None:
        with self._lock:
            kept[key] = value
            if len(kept) > most:
                kept.popitem(last=False)


class Stopped(Exception):
    """A program was ended because nobody waits for it any more: that is no verdict on it."""


class Workers(ThreadPoolExecutor):
    """Threads that run programs, and end them at once when Ctrl-C or an error ends what stands in ``stopped_by_errors``."""

    def __init__(self, count: int | None = None):
        self._stop = threading.Event()
        super().__init__(count, initializer=self._begin)

    def _begin(self) -> None:
        _worker.stop = self._stop

    @contextlib.contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._stop.set()
            self.shutdown(wait=False, cancel_futures=True)
            raise


def side_by_side(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[R]:
    """``function``, which runs programs, of each item in order; ``workers`` (default: the CPUs) at a time."""
    with Workers(workers or os.cpu_count() or 1) as pool, pool.stopped_by_errors():
        results = []
        for result in pool.map(function, items):
            results.append(result)
            if progress:
                progress(1)
        return results


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a lone surrogate is no character


# --- the walls --------------------------------------------------------------------------------------------------------

_NOBODY = 65534
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}


def _probe() -> list[str]:
    """The options for /proc with which a program runs here, or KDError."""
    otherwise = ", or --unsafe-exec to run untrusted code unprotected"
    if shutil.which("bwrap") is None:
        raise KDError(
            "running untrusted code needs bubblewrap, which is not installed: apt install bubblewrap" + otherwise
        )
    if not Path(f"/proc/self/task/{threading.get_native_id()}/children").exists():
        raise KDError("the sandbox watches over programs through /proc/PID/task/TID/children, which is not here")
    refusals = []
    for proc in (["--proc", "/proc"], []):  # a container that masks parts of /proc lets nobody mount another
        try:
            command = ["/bin/sh", "-c", "/bin/echo ready; true"]  # which forks: a limit that counts others shows here
            outcome = _execute(_wrapper(proc, DEFAULT_LIMITS), command, {}, "/dev/null", DEFAULT_LIMITS)
            if (outcome.status, outcome.stdout) == ("ok", "ready\n"):
                return proc
            refusals.append(outcome.stderr.strip() or outcome.status)
        except KDError as error:
            refusals.append(str(error))
    raise KDError(
        f"bubblewrap cannot make a sandbox here ({refusals[0]}); it needs bubblewrap 0.8 or newer and user namespaces"
        f" that an ordinary user may make{otherwise}"
    )


@functools.cache
def _python(unsafe: bool = False) -> str:
    """The interpreter that runs this, or the system's where nobody cannot reach it."""
    path = os.path.join(os.path.realpath(sys.base_prefix), "bin", f"python3.{sys.version_info.minor}")
    if unsafe or os.geteuid() != 0 or all(os.stat(folder).st_mode & 0o001 for folder in Path(path).parents):
        return path
    if os.path.exists("/usr/bin/python3"):
        return "/usr/bin/python3"
    raise KDError(f"as root the sandbox runs programs as nobody, who cannot reach {path}: apt install python3")


def _wrapper(proc: list[str], limits: Limits) -> list[str]:
    """bwrap and its options, but for the program's files, the filter, and the lock on what is not /tmp."""
    words = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    words += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        words += ["--setenv", name, value]
    words += ["--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            words += ["--symlink", os.readlink(folder), folder]
        else:
            words += ["--ro-bind-try", folder, folder]
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):  # g++ is an alternative
        words += ["--ro-bind-try", path, path]
    prefix = os.path.dirname(os.path.dirname(_python()))
    if not f"{prefix}/".startswith("/usr/"):
        words += ["--ro-bind", prefix, prefix]
    for device in ("null", "full", "random", "urandom"):  # zero, mapped, is memory that no limit sees
        words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        words += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    words += ["--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "/tmp", "/dev/shm", *proc]
    words += ["--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # The rlimit of processes does not hold for root, to whom /dev/null's mode, /proc/sys and keys would belong, too.
    nobody = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    return [*(nobody if os.geteuid() == 0 else []), "bwrap", *words]


#: System calls refused, by machine: AUDIT_ARCH, socket, mmap, and ptrace, process_vm_readv, process_vm_writev, mount, umount2,
#: unshare, setns, add_key, request_key, keyctl, shmget, msgget, perf_event_open, memfd_create, bpf, userfaultfd, setsockopt (its
#: buffers are memory that no limit sees).
_MACHINES = {
    "x86_64": (0xC000003E, 41, 9, (101, 310, 311, 165, 166, 272, 308, 248, 249, 250, 29, 68, 298, 319, 321, 323, 54)),
    "aarch64": (
        0xC00000B7,
        198,
        222,
        (117, 270, 271, 40, 39, 97, 268, 217, 218, 219, 194, 186, 241, 279, 280, 282, 208),
    ),
}
#: io_uring_setup, io_uring_enter, io_uring_register, pidfd_getfd, memfd_secret: one number on all machines.
_REFUSED = (425, 426, 427, 438, 447)
#: MAP_SHARED | MAP_ANONYMOUS: its pages stay when MADV_DONTNEED has taken them out of every count of a process.
_SHARED_ANONYMOUS = 0x21


@functools.cache
def _filter() -> bytes:
    """The seccomp program: EPERM for what is refused, for shared memory without a file, and for sockets but AF_UNIX."""
    if platform.machine() not in _MACHINES:
        raise KDError(
            f"the sandbox has no filter of system calls for {platform.machine()}, only {', '.join(_MACHINES)}"
        )
    architecture, socket, mmap, refused = _MACHINES[platform.machine()]
    load, equal, at_least, mask, end = 0x20, 0x15, 0x35, 0x54, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # x32, the other numbering of x86_64
    for number in (*refused, *_REFUSED):
        code += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    code += [(equal, 0, 5, mmap), (load, 0, 0, 40), (mask, 0, 0, _SHARED_ANONYMOUS)]  # its fourth argument
    code += [(equal, 0, 1, _SHARED_ANONYMOUS), (end, 0, 0, refuse), (end, 0, 0, allow)]
    code += [(equal, 0, 3, socket), (load, 0, 0, 16), (equal, 1, 0, 1), (end, 0, 0, refuse), (end, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


# --- one program ------------------------------------------------------------------------------------------------------


@dataclass
class _Box:
    """A program that runs behind its walls. ``code`` is its own exit code, None if it was ended."""

    process: subprocess.Popen[bytes]
    begun: socket.socket  # a byte in it says that walls and limits stand
    out: int
    err: int
    limits: Limits
    started: float
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    exceeded: str | None = None
    code: int | None = None
    seconds: float = 0.0
    errors: int = 0  # bytes of stderr

    def read(self, descriptor: int) -> bool:
        """Take what the program has written; whether it is at its end."""
        chunk = os.read(descriptor, 65_536)
        if descriptor == self.out:
            space = self.limits.output_bytes - len(self.stdout)
            self.stdout += chunk[:space]
            self.exceeded = "output" if len(chunk) > space else self.exceeded
        else:  # which nobody compares with anything: its end may say how a program failed
            self.errors += len(chunk)
            self.stderr = (self.stderr + chunk)[-STDERR_KEPT_BYTES:]
            self.exceeded = "output" if self.errors > STDERR_BYTES else self.exceeded
        return not chunk

    def outcome(self) -> Outcome:
        errors = self.stderr.decode("utf-8", "replace")
        self.begun.setblocking(False)
        try:
            begun = self.begun.recv(1)
        except OSError:
            begun = b""
        was_cut_short = self.code is None and not self.exceeded and not errors  # of run_joined: the first job was over
        if not begun and not was_cut_short:
            raise KDError(f"the sandbox did not start: {errors.strip() or self.exceeded or 'it says nothing'}")
        code = self.code if self.code is None or self.code >= 0 else 128 - self.code
        exceeded = self.exceeded
        if code == 128 + signal.SIGXCPU or (
            code == 128 + signal.SIGKILL and self.seconds > self.limits.cpu_seconds + 1
        ):
            exceeded = exceeded or "timeout"
        status = exceeded or ("error" if code else "ok")
        if status == "error" and ("\nMemoryError" in errors or "std::bad_alloc" in errors):
            status = "memory"
        stdout = self.stdout.decode("utf-8", "replace")
        return Outcome(status, stdout, errors, None if exceeded else code, self.seconds)


def _execute(
    wrapper: list[str], command: list[str], files: Mapping[str, bytes] | None, stdin: str, limits: Limits
) -> Outcome:
    """Run a command behind its wrapper and its limits to its end."""
    with contextlib.ExitStack() as stack:
        box = _start(stack, wrapper, command, files, stdin, limits)
        _attend([box])
        return box.outcome()


def _start(
    stack: contextlib.ExitStack,
    wrapper: list[str],
    command: list[str],
    files: Mapping[str, bytes] | None,
    stdin: str,
    limits: Limits,
    kept: Sequence[int] = (),
) -> _Box:
    """Start a command. ``files`` is None where there is no bubblewrap; ``stdin`` is a path; ``kept`` descriptors are its own."""
    address = (limits.memory_mb + SPARE_ADDRESS_MB) << 20
    rlimits = [f"--as={address}", f"--stack={limits.stack_mb << 20}:", f"--fsize={limits.file_bytes}"]
    rlimits += [f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}", "--core=0", "--nofile=64", "--memlock=0"]
    if files is not None:  # elsewhere it would count what else the user runs
        rlimits.append(f"--nproc={limits.processes + 2}")  # two are bubblewrap's
    # A byte says that walls and limits stand; the program comes after it. It goes to a socket, which, unlike a pipe,
    # nobody opens a second time through /proc to take the byte away.
    command = ["prlimit", *rlimits, "--", "/bin/sh", "-c", 'printf . >&0 && exec "$@" <"$0"', stdin, *command]
    begun, told = socket.socketpair()
    stack.enter_context(begun)
    out, out_end = _pipe(stack)
    err, err_end = _pipe(stack)
    descriptors = list(kept)
    if files is not None:
        for name, content in files.items():
            descriptors.append(_memory_file(stack, content))
            wrapper = [*wrapper, "--perms", "0555", "--file", str(descriptors[-1]), name]
        descriptors.append(_memory_file(stack, _filter()))
        wrapper = [*wrapper, "--remount-ro", "/", "--seccomp", str(descriptors[-1]), "--"]
    started = time.monotonic()
    with told:
        try:
            process = subprocess.Popen(
                [*wrapper, *command],
                stdin=told.fileno(),
                stdout=out_end,
                stderr=err_end,
                env=_ENVIRONMENT,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for the caller to handle
            )
        except OSError as error:
            raise KDError(f"the sandbox could not be started: {error}") from None
        finally:
            os.close(out_end)
            os.close(err_end)
    stack.callback(_kill, process)
    return _Box(process, begun, out, err, limits, started)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose writing end the program may also open by its name, /dev/stdout, being nobody."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    os.fchmod(writing, 0o622)
    return reading, writing


def _memory_file(stack: contextlib.ExitStack, content: bytes) -> int:
    descriptor = os.memfd_create("sandbox")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _attend(boxes: Sequence[_Box]) -> None:
    """Read what programs write until the first has ended, or one exceeds a limit; then none runs any more."""
    first = boxes[0]
    deadline = time.monotonic() + first.limits.wall_seconds
    look = time.monotonic() + WATCH_SECONDS
    end = os.pidfd_open(first.process.pid)
    with selectors.DefaultSelector() as selector, open(end, "rb", buffering=0):
        selector.register(end, selectors.EVENT_READ, first)
        for box in boxes:
            selector.register(box.out, selectors.EVENT_READ, box)
            selector.register(box.err, selectors.EVENT_READ, box)
        waiting = {first.out, first.err, end}
        while waiting and not any(box.exceeded for box in boxes):
            for key, _ in selector.select(WATCH_SECONDS):
                if key.fd == end:  # what it left running goes with it, and lets go of the pipes
                    for box in boxes:
                        box.code = box.process.poll()
                        _kill(box.process)
                    deadline = time.monotonic() + 5.0
                if key.fd == end or key.data.read(key.fd):
                    selector.unregister(key.fd)
                    waiting.discard(key.fd)
            now = time.monotonic()
            if getattr(_worker, "stop", _NEVER).is_set():
                raise Stopped
            if now > deadline:
                boxes[-1].exceeded = boxes[-1].exceeded or "timeout"
            elif now > look and end in waiting:
                for box in boxes:
                    box.exceeded = box.exceeded or _exceeds(box.process.pid, box.limits)
                look = time.monotonic() + WATCH_SECONDS
    for box in boxes:
        _kill(box.process)
        box.seconds = time.monotonic() - box.started


def _children(process: int) -> tuple[int, list[int]]:
    """How many threads a process has, and its children."""
    tasks = os.listdir(f"/proc/{process}/task")
    return len(tasks), [
        int(child) for task in tasks for child in Path(f"/proc/{process}/task/{task}/children").read_text().split()
    ]


_HELD = re.compile(rb"^(VmRSS|VmSwap):\s+(\d+) kB$", re.MULTILINE)


def _exceeds(process: int, limits: Limits) -> str | None:
    """The status "memory" if a process and those below it are too many, or hold too much memory or too many files."""
    count, used, files = 0, 0, 0
    todo = [process]
    while todo and count <= limits.processes + 2:
        one = todo.pop()
        with contextlib.suppress(OSError):  # it has just ended
            for _, kilobytes in _HELD.findall(Path(f"/proc/{one}/status").read_bytes()):
                used += int(kilobytes) << 10
            threads, children = _children(one)
            count += threads
            todo += children
            if one == process and children:
                tmp = f"/proc/{children[0]}/root/tmp"  # as bubblewrap's init sees it, once it has left the machine's
                if os.stat(tmp).st_dev != os.stat("/tmp").st_dev:
                    state = os.statvfs(tmp)
                    used += (state.f_blocks - state.f_bfree) * state.f_frsize
                    files = state.f_files - state.f_ffree
    exceeded = count > limits.processes + 2 or used > limits.memory_mb << 20 or files > MAX_FILES
    return "memory" if exceeded else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End bubblewrap's init, and the kernel ends all of its pid namespace; then bubblewrap."""
    if process.returncode is None:
        with contextlib.suppress(OSError):
            for child in _children(process.pid)[1]:
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
