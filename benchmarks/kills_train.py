"""Does `kd train` survive kills and full disks: does the same command always resume, and end with the same student?

    python benchmarks/kills_train.py --cache data/cache --student data/student --kills 200 --disks 20

A run is killed (SIGKILL) up to eight times, each time at a random moment or at a random file operation in its folder. Some
kills cut off the file that was being written. Then the same command runs to its end. Each student and each log must equal
those of an undisturbed run, bit for bit. Full disks are small tmpfs, mounted in a namespace of this process alone.
With `--moments`, one save is killed once at each of its file operations, and the output says at which checkpoint training
would resume.

All attempts are forks of this process, which has already imported what they need.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # a fork has only the thread that forked
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft  # noqa: F401
import safetensors.torch
import torch
import torch.utils.tensorboard
from safetensors.numpy import load_file

import cli
from benchmarks.shared import hardware, say
from kdcache import machine
from trainer.distill import plan as run
from trainer.distill import trainer as distill
from trainer.distill.config import TrainConfig
from trainer.run import checkpoints, record
from trainer.student.load import load_student

TIMES = ("seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
SETTINGS = ("--max-steps", "4", "--eval-steps", "1", "--per-device-train-batch-size", "4", "--learning-rate", "1e-2")
METHODS = {"full": (), "LoRA": ("--lora-r", "4", "--lora-dropout", "0.2")}
KILLS_PER_RUN = 8


# --- one attempt ------------------------------------------------------------------------------------------------------


class Operations:
    """Counts a process's file operations below a folder, and kills it before operation number ``last``, if given.

    With ``torn``, the file that torch or safetensors has just written is cut off first, as a kill during the write leaves it.
    """

    def __init__(self, folder: Path, last: int | None = None, torn: random.Random | None = None):
        self.folder, self.last, self.torn = str(folder), last, torn
        self.names: list[str] = []

    def arm(self) -> Operations:
        sys.addaudithook(self._audit)
        fsync, save, serialize = os.fsync, torch.save, safetensors.torch.serialize_file

        def saved(value: Any, file: Any, *args: Any, **options: Any) -> None:
            self.count("torch.save", file)
            save(value, file, *args, **options)
            self.count("torch.save, written", file)

        def serialized(tensors: Any, file: Any, *args: Any, **options: Any) -> None:
            self.count("safetensors", file)
            serialize(tensors, file, *args, **options)
            self.count("safetensors, written", file)

        def synced(descriptor: int) -> None:
            self.count("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        os.fsync, torch.save, safetensors.torch.serialize_file = synced, saved, serialized  # type: ignore[assignment]
        return self

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.count("open", arguments[0])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"):
            self.count(event, arguments[0])

    def count(self, what: str, path: Any) -> None:
        if not str(path).startswith(self.folder):
            return
        self.names.append(f"{what} {str(path)[len(self.folder) :]}")
        if len(self.names) == self.last:
            if self.torn is not None and what.endswith("written"):
                os.truncate(path, self.torn.randrange(os.path.getsize(path)))
            os.kill(os.getpid(), signal.SIGKILL)


def fork(work: Callable[[], Any], log: Path) -> int:
    """Start ``work`` in a fork of this process, with its output in ``log``; return the process id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = int(work() or 0)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float | None = None) -> int:
    """Return a process's exit code, which is negative for a signal. A process that still runs after ``seconds`` is killed."""
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)  # has no effect on a process that has ended
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Course:
    """A command, its undisturbed result, and how many file operations and seconds that took."""

    def __init__(self, name: str, cache: Path, student: Path, scratch: Path):
        self.name, self.scratch, self.log = name, scratch, scratch / f"{name}.log"
        self.words = ["train", "--from-cache", str(cache), "--student", str(student), *SETTINGS, *METHODS[name]]
        undisturbed, counted = scratch / f"{name}-whole", scratch / f"{name}.operations"
        begun = time.monotonic()
        code = wait(fork(lambda: self.command(undisturbed, Operations(undisturbed), counted), self.log))
        if code:
            raise SystemExit(f"an undisturbed run failed:\n{self.log.read_text()}")
        self.seconds, self.operations = time.monotonic() - begun, int(counted.read_text())
        self.expected = result(undisturbed)

    def command(self, out: Path, operations: Operations | None = None, counted: Path | None = None) -> int:
        """Run the command in this process; return its exit code, and write the number of operations to ``counted``."""
        if operations is not None:
            operations.arm()
        sys.argv = ["kd", *self.words, "--output-dir", str(out)]
        try:
            cli.main()
        except SystemExit as ended:
            if counted is not None and operations is not None:
                counted.write_text(str(len(operations.names)))
            return int(ended.code or 0)
        return 0

    def killed(self, out: Path, chance: random.Random) -> int:
        """Run one attempt that is killed at a random time or at a random file operation; return its exit code."""
        if chance.random() < 0.5:
            return wait(fork(lambda: self.command(out), self.log), chance.uniform(0, self.seconds))
        operations = Operations(out, chance.randint(1, self.operations), chance if chance.random() < 0.7 else None)
        return wait(fork(lambda: self.command(out, operations), self.log))

    def finished(self, out: Path) -> str | None:
        """Run the same command to its end. Return None, or how its result differs, or how it failed."""
        if not is_finished(out):
            code = wait(fork(lambda: self.command(out), self.log))
            if code:
                return f"exit code {code}: {self.log.read_text()[-2000:]}"
        # A kill at the very end may leave a lock's file; the lock itself ended with its process.
        left = [path.name for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"]
        return differing(self.expected, result(out)) or (f"leftovers: {left}" if left else None)


def is_finished(out: Path) -> bool:
    path = out / record.RUN_FILE
    return path.is_file() and json.loads(path.read_text())["finished"]


def result(out: Path) -> dict[str, Any]:
    """Return what must be equal: every weight, and everything that was logged but times."""
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    history = [{name: value for name, value in entry.items() if name not in TIMES} for entry in logged]
    weights = {path.name: load_file(path) for path in (*out.glob("*.safetensors"), *out.glob("adapter/*.safetensors"))}
    return {"history": history, "weights": weights}


def differing(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    """Return how a result differs from the expected one, or None."""
    if expected["history"] != actual["history"]:
        return f"another history: {actual['history']} instead of {expected['history']}"
    for file, tensors in expected["weights"].items():
        if actual["weights"].get(file, {}).keys() != tensors.keys():
            return f"{file} holds other tensors"
        if any(actual["weights"][file][name].tobytes() != tensors[name].tobytes() for name in tensors):
            return f"{file} holds other weights"
    return None


# --- kills ------------------------------------------------------------------------------------------------------------


def campaign(course: Course, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill and resume runs until ``kills`` attempts were killed; return the counts and the failures."""
    counts: dict[str, Any] = {"kills": 0, "runs": 0, "resumed_at_a_checkpoint": 0, "failures": []}
    while counts["kills"] < kills:
        out = course.scratch / f"{course.name}-{counts['runs']}"
        counts["runs"] += 1
        for _ in range(min(KILLS_PER_RUN, kills - counts["kills"])):
            if is_finished(out):  # a kill after the last write
                break
            code = course.killed(out, chance)
            if code != -signal.SIGKILL:
                if code:
                    counts["failures"].append(
                        f"run {counts['runs']}: exit code {code}: {course.log.read_text()[-2000:]}"
                    )
                break  # it ended before the kill
            counts["kills"] += 1
        failure = course.finished(out)
        counts["resumed_at_a_checkpoint"] += "resume from" in course.log.read_text()
        if failure:
            counts["failures"].append(f"run {counts['runs']}: {failure}")
        shutil.rmtree(out, ignore_errors=True)
        say(f"{course.name}: {counts['kills']} kills, {counts['runs']} runs, {len(counts['failures'])} failures")
    return counts


def moments(method: str, cache: Path, student: Path, scratch: Path, chance: random.Random) -> list[dict[str, Any]]:
    """Kill once at each file operation of one save, that of checkpoint-3.

    Return for each kill the checkpoint that training would resume from, and the files that are left. Training runs up to
    that save once, and is forked there for each kill.
    """
    out, before, log = scratch / "moments", scratch / "moments-before", scratch / "moments.log"
    counted, results = scratch / "operations.json", scratch / "moments.json"
    save = distill.DistillTrainer._save_checkpoint

    def saved(trainer: Any, operations: Operations) -> None:
        operations.arm()
        save(trainer, trainer.model, None)
        counted.write_text(json.dumps(operations.names))

    def save_and_kill(trainer: Any, last: int | None) -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(
            before, out, copy_function=os.link
        )  # links do: files are deleted or left as they are, never changed
        code = wait(fork(lambda: saved(trainer, Operations(out, last, chance)), log))
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(log.read_text())
        resumes_at = checkpoints.resume_point(out).checkpoint
        checkpoints.sweep(out)
        names = {path.name for path in out.iterdir()} - {".lock"}  # the lock is held all the time
        left = sorted(name for name in names if name.startswith((".", "checkpoint")))
        return {"killed": code != 0, "continues_at": resumes_at and resumes_at.name, "left": left}

    def forked(trainer: Any, model: Any, trial: Any) -> None:
        if trainer.state.global_step < 3:
            save(trainer, model, trial)
            return
        shutil.copytree(out, before)
        outcomes = [{"before": None} | save_and_kill(trainer, None)]
        for number, name in enumerate(json.loads(counted.read_text()), 1):
            outcomes.append({"before": name} | save_and_kill(trainer, number))
        results.write_text(json.dumps(outcomes))
        os._exit(0)

    def attempt() -> int:
        distill.DistillTrainer._save_checkpoint = forked  # type: ignore[method-assign]
        arguments = {"max_steps": 3, "eval_steps": 1, "per_device_train_batch_size": 4, "report_to": "none"}
        arguments |= {"save_total_limit": 1, "eval_strategy": "no"}  # no checkpoint is kept for being the best
        config = TrainConfig((cache,), str(student), out, arguments=arguments, lora_r=4 if method == "LoRA" else None)
        distill.train(run.prepare(config), lambda *_: None)
        return 1

    if wait(fork(attempt, log)):
        raise SystemExit(log.read_text())
    return json.loads(results.read_text())


# --- full disks -------------------------------------------------------------------------------------------------------


def own_namespace() -> str:
    """Give this process mounts of its own, as root or in a user namespace; return which of the two."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    new_mounts, new_users, how = 0x20000, 0x10000000, "root"
    if user:
        how = "user namespace"
    if libc.unshare(new_mounts | (new_users if user else 0)):
        raise SystemExit(f"no namespace for mounts: {os.strerror(ctypes.get_errno())}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    return how


def stored(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def full_disks(course: Course, disks: int, chance: random.Random) -> dict[str, Any]:
    """Run on disks that are too small. Then each disk is made larger, and the same command has to finish."""
    counts: dict[str, Any] = {"disks": 0, "full": 0, "before_writing": 0, "while_writing": 0, "failures": []}
    undisturbed = course.scratch / f"{course.name}-whole"
    run_bytes, checkpoint_bytes = stored(undisturbed), stored(undisturbed / "checkpoint-4")
    while counts["full"] < disks:
        counts["disks"] += 1
        mount = course.scratch / "disk"
        mount.mkdir(exist_ok=True)
        size = chance.randint(1 << 16, int(run_bytes * 1.4)) & -4096
        if chance.random() < 0.5:  # just less than a number of checkpoints need, which is noticed only while writing
            size = chance.randint(1, 3) * checkpoint_bytes - chance.randint(1 << 12, 3 << 20) & -4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "disk", str(mount)], check=True)
        try:
            for attempt in range(2):  # the second attempt meets the same full disk
                code = wait(fork(partial(course.command, mount / "run"), course.log))
                text = course.log.read_text()
                if code == 0:
                    break
                if code != 1 or "Traceback" in text or "full" not in text.splitlines()[-1]:
                    counts["failures"].append(f"{size} bytes: exit code {code}: {text[-3000:]}")
                if attempt == 0:
                    counts["full"] += 1
                    kind = "before_writing" if "needs at least" in text else "while_writing"
                    counts[kind] += 1
            subprocess.run(["mount", "-o", f"remount,size={4 * run_bytes}", str(mount)], check=True)
            failure = course.finished(mount / "run")
            if failure:
                counts["failures"].append(f"{size} bytes, then more: {failure}")
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=True)
        say(f"{course.name}: {counts['full']} full disks, {len(counts['failures'])} failures")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200, help="in all; half of them for full training, half for LoRA")
    parser.add_argument(
        "--disks", type=int, default=20, help="full disks in all; half of them for full training, half for LoRA"
    )
    parser.add_argument("--moments", action="store_true", help="only kill once at each file operation of one save")
    parser.add_argument("--method", choices=METHODS, default="full", help="of --moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="folder for the figures")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    load_student(str(options.student), "float32")  # files that all forks need are read once
    gc.freeze()
    chance, begun = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        scratch = Path(name).resolve()
        cache, student = options.cache.resolve(), options.student.resolve()
        if options.moments:
            print(json.dumps(moments(options.method, cache, student, scratch, chance), indent=2))
            return
        results: dict[str, Any] = {"kills": options.kills, "disks": options.disks, "seed": options.seed}
        if options.disks:
            results["tmpfs_as"] = own_namespace()
        for method in METHODS:
            course = Course(method, cache, student, scratch)
            results[method] = {"operations": course.operations, "seconds": round(course.seconds, 2)}
            results[method] |= campaign(course, options.kills // 2, chance)
            if options.disks:
                results[method]["disk"] = full_disks(course, options.disks // 2, chance)
    results |= {
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "made_with": record.made_with(),
        "cpu": machine.cpu(),
    }
    gc.unfreeze()
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"kills-train-{hardware()}-{time.strftime('%Y-%m-%d')}.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    failures = [
        f
        for method in METHODS
        for f in (*results[method]["failures"], *results[method].get("disk", {}).get("failures", []))
    ]
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
