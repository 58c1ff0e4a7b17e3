"""What tests share: the plan of a small capture, the real `kd` in a process of its own, and the history of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.capture.config import CaptureConfig
from kdcache.capture.plan import Plan
from kdcache.capture.resolve import resolve
from kdcache.teachers import Sampling

ROOT = Path(__file__).resolve().parent.parent


#: A `kd` that is killed after the optimizer step KILL_AFTER, if the environment has that.
INTERRUPTED = """
import os
import cli
if "KILL_AFTER" in os.environ:
    from trainer.distill import trainer as distill

    class Steps(distill._Steps):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == int(os.environ["KILL_AFTER"]):
                os.kill(os.getpid(), 9)

    distill._Steps = Steps
cli.main()
"""


def history(folder: Path, *names: str) -> list[tuple[Any, ...]]:
    """Return what a training run logged: the named values of every entry that has all of them."""
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [tuple(entry[n] for n in names) for entry in log if all(n in entry for n in names)]


def capture_plan(teacher: str, examples: Path, out: Path, **changes: Any) -> Plan:
    """Return the plan of a small capture by transformers, with ``changes`` to its configuration."""
    settings: dict[str, Any] = {
        "teacher": teacher,
        "examples": str(examples),
        "out": out,
        "engine": "transformers",
        "dtype": "float32",
        "mode": "both",
        "sampling": Sampling(temperature=0.8, max_tokens=12),
        "sparsify": "topk:8",
        "rows_per_shard": 16,
        "split_ratios": (0.6, 0.2, 0.2),
    }
    return resolve(CaptureConfig(**(settings | changes)))


Kd = Callable[..., subprocess.CompletedProcess]


def run_kd(folder: Path, *arguments: object, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess:
    """Run the real `kd` in ``folder``, in a process of its own, and assert its exit code, unless ``code`` is None."""
    command = [sys.executable, "-m", "kdcache", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "110"} | options.pop("env", {})
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=900, **options
    )
    if code is not None:
        assert process.returncode == code, f"kd {' '.join(map(str, arguments))}\n{process.stdout}\n{process.stderr}"
    assert "Traceback" not in process.stderr, process.stderr
    return process
