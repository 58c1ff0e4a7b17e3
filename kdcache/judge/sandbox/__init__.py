"""Runs untrusted programs in bubblewrap, at a bounded cost. Invariant: without a working sandbox nothing is run.

    python -c 'from kdcache.judge.sandbox import Sandbox; print(Sandbox().run("python", "print(input())", "hello"))'

What a program sees is in ``walls``; which system calls it may not make, in ``seccomp``. What it may use is limited:

* time: CPU seconds per process (an rlimit), and wall seconds for the whole run;
* memory: address space per process (an rlimit), and the memory (resident and swapped) of all its processes and of /tmp
  together. The latter is measured every few milliseconds, because forks multiply the former. Memory that this would
  not see is refused: shared memory without a file, and large socket buffers;
* processes and threads: an rlimit inside its own user namespace, and the same measurement;
* output and files: bytes. Whatever exceeds a limit ends the program's whole pid namespace.

A hole in the kernel is still a way out: whoever must not risk that runs all of this in a virtual machine.

To read on: ``limits``, ``walls``, ``seccomp``, ``program`` (one run), ``processes`` (what it uses), ``pool`` (threads).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcache.errors import KDError
from kdcache.judge.sandbox import program as programs
from kdcache.judge.sandbox import walls
from kdcache.judge.sandbox.limits import COMPILER_LIMITS, DEFAULT_LIMITS, Limits, Outcome
from kdcache.judge.sandbox.program import RunningProgram

CPP_STACK_MB = 256  # solutions to contest problems recurse deeply
#: How many outcomes and executables are remembered, and how long the output of a remembered one may be.
KEPT_OUTCOMES, KEPT_CHARACTERS, KEPT_BINARIES = 4096, 16_384, 64

COMPILE_SCRIPT = """
for standard in 17 20; do
    g++ -O2 -std=c++$standard -DONLINE_JUDGE -w "$1" -o "$TMPDIR/main" >&2 && exec base64 -w0 "$TMPDIR/main"
done
exit 1"""


class Sandbox:
    """Runs programs and remembers their outcomes. ``unsafe``: rlimits without bubblewrap; the caller warns the user."""

    def __init__(self, unsafe: bool = False):
        self.unsafe = unsafe
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[str, Any] = OrderedDict()
        self._binaries: OrderedDict[str, bytes] = OrderedDict()
        self._proc: list[str] | None = None  # bwrap's options for /proc; None until a program has run

    def check(self) -> None:
        """Raise KDError unless programs can be run here. The first call runs one."""
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
        """Return what ``program`` (python or cpp) does with ``stdin``. Its arguments are the paths of ``files``.

        ``files`` are texts by name. C++ is compiled once for all inputs. KDError if the sandbox failed, which is never
        the program's doing.
        """
        key = _key(language, program, stdin, limits, files)
        outcome: Outcome | None = self._recall(self._outcomes, key)
        if outcome is not None:
            return outcome
        self.check()
        contents = {f"/code/{name}": _encode(text) for name, text in (files or {}).items()}
        arguments = list(contents)
        if language == "python":
            contents["/code/main.py"] = _encode(program)
            command = [walls.interpreter(self.unsafe), "-I", "/code/main.py", *arguments]
            outcome = self._run(command, contents, stdin, limits)
        elif language == "cpp":
            binary = self._compile(program)
            if isinstance(binary, Outcome):
                outcome = binary
            else:
                limits = replace(limits, stack_mb=CPP_STACK_MB)
                outcome = self._run(["/code/main", *arguments], contents | {"/code/main": binary}, stdin, limits)
        else:
            raise KDError(f"the sandbox runs python and cpp, not {language!r}")
        if len(outcome.stdout) + len(outcome.stderr) <= KEPT_CHARACTERS:
            self._remember(self._outcomes, key, outcome, KEPT_OUTCOMES)
        return outcome

    def _compile(self, program: str) -> bytes | Outcome:
        """Return the program's executable, or how compiling it failed."""
        if shutil.which("g++") is None:
            raise KDError("C++ programs need g++, which is not installed: apt install g++")
        key = _key(program)
        binary: bytes | None = self._recall(self._binaries, key)
        if binary is None:
            command = ["/bin/sh", "-c", COMPILE_SCRIPT, "sh", "/code/main.cpp"]
            outcome = self._run(command, {"/code/main.cpp": _encode(program)}, "", COMPILER_LIMITS)
            if outcome.status != "ok":
                return replace(outcome, status="compile", stdout="")
            binary = b64decode(outcome.stdout)
            self._remember(self._binaries, key, binary, KEPT_BINARIES)
        return binary

    def run_joined(self, script: str, jobs: Sequence[tuple[str, Mapping[str, str]]], limits: Limits) -> list[Outcome]:
        """Run a Python script twice at the same time, each in a sandbox of its own, until the first has ended.

        ``jobs`` are two names with their files. Two pipes join the jobs: each reads what the other writes. The script's
        arguments are the job's name, the descriptors it reads from and writes to, and the paths of its files. KDError
        as for ``run``; only if the first job ended before the second had started, the second one's outcome is empty.
        """
        key = _key(script, jobs, limits)
        outcomes: list[Outcome] | None = self._recall(self._outcomes, key)
        if outcomes is not None:
            return outcomes
        self.check()
        with contextlib.ExitStack() as stack:
            pipes = [os.pipe(), os.pipe()]
            running = []
            try:
                for number, (name, texts) in enumerate(jobs):
                    files = {f"/code/{file}": _encode(text) for file, text in texts.items()}
                    ends = pipes[number][0], pipes[1 - number][1]
                    command = [walls.interpreter(self.unsafe), "-I", "/code/main.py", name, *map(str, ends), *files]
                    files["/code/main.py"] = _encode(script)
                    running.append(self._start(stack, command, files, "", limits, ends))
            finally:
                for descriptor in (descriptor for pipe in pipes for descriptor in pipe):
                    os.close(descriptor)
            programs.attend(running)
            outcomes = [program.outcome() for program in running]
        if sum(len(outcome.stdout) + len(outcome.stderr) for outcome in outcomes) <= KEPT_CHARACTERS:
            self._remember(self._outcomes, key, outcomes, KEPT_OUTCOMES)
        return outcomes

    def _run(self, command: list[str], files: dict[str, bytes], stdin: str, limits: Limits) -> Outcome:
        with contextlib.ExitStack() as stack:
            program = self._start(stack, command, files, stdin, limits)
            programs.attend([program])
            return program.outcome()

    def _start(
        self,
        stack: contextlib.ExitStack,
        command: list[str],
        files: dict[str, bytes],
        stdin: str,
        limits: Limits,
        inherited: Sequence[int] = (),
    ) -> RunningProgram:
        path = "/code/stdin" if stdin else "/dev/null"
        if stdin:  # a file rather than a pipe, so that a program may also open /dev/stdin by its name
            files = files | {path: _encode(stdin)}
        if not self.unsafe:
            wrapper = walls.bubblewrap(self._proc or [], limits)
            return programs.start(stack, wrapper, command, files, path, limits, inherited)
        # Without bubblewrap a temporary folder takes the place of /code.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name, content in files.items():
            file = Path(folder, Path(name).name)
            file.write_bytes(content)
            file.chmod(0o755)
        command = [word.replace("/code/", f"{folder}/") if word.startswith("/code/") else word for word in command]
        path = path.replace("/code/", f"{folder}/")
        return programs.start(stack, ["env", "-C", folder, f"TMPDIR={folder}"], command, None, path, limits, inherited)

    def _recall(self, memory: OrderedDict[str, Any], key: str) -> Any:
        with self._lock:
            if key in memory:
                memory.move_to_end(key)
            return memory.get(key)

    def _remember(self, memory: OrderedDict[str, Any], key: str, value: Any, most: int) -> None:
        """Remember a value, and evict the one that was used longest ago if there are more than ``most``."""
        with self._lock:
            memory[key] = value
            if len(memory) > most:
                memory.popitem(last=False)


def _probe() -> list[str]:
    """Return the options for /proc with which a program runs here, or raise KDError."""
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
            # The shell forks for echo, so that a limit on processes which also counts those outside shows here.
            command = ["/bin/sh", "-c", "/bin/echo ready; true"]
            wrapper = walls.bubblewrap(proc, DEFAULT_LIMITS)
            outcome = programs.execute(wrapper, command, {}, "/dev/null", DEFAULT_LIMITS)
            if (outcome.status, outcome.stdout) == ("ok", "ready\n"):
                return proc
            refusals.append(outcome.stderr.strip() or outcome.status)
        except KDError as error:
            refusals.append(str(error))
    raise KDError(
        f"bubblewrap cannot make a sandbox here ({refusals[0]}); it needs bubblewrap 0.8 or newer and user namespaces"
        f" that an ordinary user may make{otherwise}"
    )


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a lone surrogate is no character
