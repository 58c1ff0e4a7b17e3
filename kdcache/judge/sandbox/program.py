"""One program that runs behind the walls: how it is started, read, watched and ended.

Start-up. Whether the sandbox failed or the program did must never be confused: the first is an error of ours, the
second a verdict. So a shell inside the walls reports with one byte that everything stands, just before it becomes the
program::

    this process                     inside the sandbox
    ------------                     ------------------
    socketpair: ours, theirs
    Popen(stdin=theirs)  ----------> bwrap          builds the walls, loads the seccomp filter
    close theirs                     prlimit        sets the limits of each process
                                     /bin/sh        printf . >&0    writes "." into theirs, which is its stdin
    ours holds "."  <--------------------'
                                     exec PROGRAM <STDIN            theirs is closed, stdin is now a file
    read stdout, stderr  <---------- PROGRAM
    the program has ended
    ours.recv() == b"."              started: the outcome is the program's
    ours.recv() == b""               never started: KDError with what bwrap, prlimit or the shell wrote on stderr

The byte goes through a socket because a pipe could be opened again through /proc/PID/fd, and the byte taken out of it.
A socket cannot, and the program itself never holds its end.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kdcache.errors import KDError
from kdcache.judge.sandbox import pool, processes, seccomp, walls
from kdcache.judge.sandbox.limits import Limits, Outcome

WATCH_SECONDS = 0.02
END_SECONDS = 5.0  # that the pipes of a program may stay open after it has ended
EXIT_SECONDS = 0.25  # that bubblewrap gets to pass on how a program ended, when its partner has noticed the end first
#: Address space beyond the memory limit: libraries, thread stacks and arenas that are reserved and never touched.
SPARE_ADDRESS_MB = 256
STDERR_BYTES, STDERR_KEPT_BYTES = 64 << 20, 65_536


@dataclass
class RunningProgram:
    """A program behind its walls, and what it has written so far."""

    process: subprocess.Popen[bytes]
    started_socket: socket.socket  # holds one byte as soon as walls and limits stand
    out: int  # descriptors of our ends of its stdout and stderr
    err: int
    limits: Limits
    start_seconds: float  # on the monotonic clock
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)  # the last STDERR_KEPT_BYTES of it
    stderr_bytes: int = 0  # all that was written
    exceeded: str | None = None  # the limit that ended it: an Outcome's status
    code: int | None = None  # its own exit code; None if it was ended
    is_cut_short: bool = False  # it was ended because its partner had ended, maybe before it had started
    seconds: float = 0.0

    def read(self, descriptor: int) -> bool:
        """Read what the program has written to one of its pipes; return whether the pipe is at its end."""
        chunk = os.read(descriptor, 65_536)
        if descriptor == self.out:
            space = self.limits.output_bytes - len(self.stdout)
            self.stdout += chunk[:space]
            self.exceeded = "output" if len(chunk) > space else self.exceeded
        else:  # stderr is compared with nothing, but its end may say how a program failed
            self.stderr_bytes += len(chunk)
            self.stderr = (self.stderr + chunk)[-STDERR_KEPT_BYTES:]
            self.exceeded = "output" if self.stderr_bytes > STDERR_BYTES else self.exceeded
        return not chunk

    def outcome(self) -> Outcome:
        """Return how the program ended; KDError if the sandbox did not start it."""
        errors = self.stderr.decode("utf-8", "replace")
        self.started_socket.setblocking(False)
        try:
            has_started = self.started_socket.recv(1) != b""
        except OSError:
            has_started = False
        if not has_started and not self.is_cut_short:
            raise KDError(f"the sandbox did not start: {errors.strip() or self.exceeded or 'it says nothing'}")
        code = self.code if self.code is None or self.code >= 0 else 128 - self.code
        exceeded = self.exceeded
        used_all_cpu_time = code == 128 + signal.SIGKILL and self.seconds > self.limits.cpu_seconds + 1
        if code == 128 + signal.SIGXCPU or used_all_cpu_time:
            exceeded = exceeded or "timeout"
        status = exceeded or ("error" if code else "ok")
        if status == "error" and ("\nMemoryError" in errors or "std::bad_alloc" in errors):
            status = "memory"
        stdout = self.stdout.decode("utf-8", "replace")
        return Outcome(status, stdout, errors, None if exceeded else code, self.seconds)


def execute(
    wrapper: list[str], command: list[str], files: Mapping[str, bytes] | None, stdin: str, limits: Limits
) -> Outcome:
    """Run a command behind its wrapper and its limits to its end. Arguments and errors are those of ``start``."""
    with contextlib.ExitStack() as stack:
        program = start(stack, wrapper, command, files, stdin, limits)
        attend([program])
        return program.outcome()


def start(
    stack: contextlib.ExitStack,
    wrapper: list[str],
    command: list[str],
    files: Mapping[str, bytes] | None,
    stdin: str,
    limits: Limits,
    inherited: Sequence[int] = (),
) -> RunningProgram:
    """Start a command behind its wrapper, and let ``stack`` end it.

    ``files`` (path -> content) are put into the sandbox; None where there is no bubblewrap. ``stdin`` is the path,
    inside, of what the program reads. ``inherited`` are descriptors that the program gets. KDError if nothing can be
    started.
    """
    address_bytes = (limits.memory_mb + SPARE_ADDRESS_MB) << 20
    rlimits = [f"--as={address_bytes}", f"--stack={limits.stack_mb << 20}:", f"--fsize={limits.file_bytes}"]
    rlimits += [f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}", "--core=0", "--nofile=64", "--memlock=0"]
    if files is not None:  # without a user namespace this would count everything else that the user runs
        rlimits.append(f"--nproc={limits.processes + processes.BUBBLEWRAP_PROCESSES}")
    command = ["prlimit", *rlimits, "--", "/bin/sh", "-c", 'printf . >&0 && exec "$@" <"$0"', stdin, *command]
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    out, out_end = _pipe(stack)
    err, err_end = _pipe(stack)
    descriptors = list(inherited)
    if files is not None:
        for name, content in files.items():
            descriptors.append(_memory_file(stack, content))
            wrapper = [*wrapper, "--perms", "0555", "--file", str(descriptors[-1]), name]
        descriptors.append(_memory_file(stack, seccomp.filter_program()))
        wrapper = [*wrapper, "--remount-ro", "/", "--seccomp", str(descriptors[-1]), "--"]
    start_seconds = time.monotonic()
    with theirs:
        try:
            process = subprocess.Popen(
                [*wrapper, *command],
                stdin=theirs.fileno(),
                stdout=out_end,
                stderr=err_end,
                env=walls.ENVIRONMENT,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for the caller to handle
            )
        except OSError as error:
            raise KDError(f"the sandbox could not be started: {error}") from None
        finally:
            os.close(out_end)
            os.close(err_end)
    stack.callback(processes.kill, process)
    return RunningProgram(process, ours, out, err, limits, start_seconds)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Return a pipe's reading and writing end. The program, being nobody, may also open the latter as /dev/stdout."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    os.fchmod(writing, 0o622)
    return reading, writing


def _memory_file(stack: contextlib.ExitStack, content: bytes) -> int:
    """Return the descriptor of a file in memory, to be read from its beginning."""
    descriptor = os.memfd_create("sandbox")
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def exit_code_of(process: subprocess.Popen[bytes]) -> int | None:
    """Return how a process ended by itself; None if it is still running."""
    try:
        return process.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def attend(programs: Sequence[RunningProgram]) -> None:
    """Read what programs write until the first has ended, or one exceeds a limit; then end all of them.

    The wall time is the first program's, and exceeding it is the last program's fault: of two that talk to each other,
    that is the one that answers. Stopped if this thread's pool was stopped.

    The first program goes through two phases::

        running --(its pidfd is readable)--> ended --(both of its pipes are at their end)--> return
           |  every WATCH_SECONDS: time, memory      |  END_SECONDS for the rest of the output
           +----(a limit is exceeded)----------------+--------------------------------------> return
    """
    first = programs[0]
    deadline = time.monotonic() + first.limits.wall_seconds
    next_look = time.monotonic() + WATCH_SECONDS
    end = os.pidfd_open(first.process.pid)
    with selectors.DefaultSelector() as selector, open(end, "rb", buffering=0):
        selector.register(end, selectors.EVENT_READ, first)
        for program in programs:
            selector.register(program.out, selectors.EVENT_READ, program)
            selector.register(program.err, selectors.EVENT_READ, program)
        awaited = {first.out, first.err, end}
        while awaited and not any(program.exceeded for program in programs):
            for key, _ in selector.select(WATCH_SECONDS):
                if key.fd == end:  # processes that the program left running must let go of its pipes
                    for program in programs:
                        program.code = exit_code_of(program.process)
                        program.is_cut_short = program.code is None
                        processes.kill(program.process)
                    deadline = time.monotonic() + END_SECONDS
                if key.fd == end or key.data.read(key.fd):
                    selector.unregister(key.fd)
                    awaited.discard(key.fd)
            seconds = time.monotonic()
            if pool.is_stopped():
                raise pool.Stopped
            if seconds > deadline:
                programs[-1].exceeded = programs[-1].exceeded or "timeout"
            elif seconds > next_look and end in awaited:
                for program in programs:
                    limit = program.exceeded or processes.exceeded_limit(program.process.pid, program.limits)
                    program.exceeded = limit
                next_look = time.monotonic() + WATCH_SECONDS
    for program in programs:
        processes.kill(program.process)
        program.seconds = time.monotonic() - program.start_seconds
