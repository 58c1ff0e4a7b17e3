"""Does any command miss a flipped bit of a cache? Each ends with an error sentence, the same numbers, or wrong ones.

    python benchmarks/flips.py data/topk data/threshold --flips 300

Each bit is flipped in a copy of the cache, the file's modification time is restored, the commands run, and the bit is flipped
back. Every file gets at least ``LEAST`` flips, and the others are spread by size. This process runs ``kd cache verify``, SQL
over every column of samples, vocab and rewards, what ``kd train`` selects and all its batches, and what ``kd evaluate`` and
``kd grpo`` read. The result is a Markdown table. The exit code is 1 if a number changed without an error, if the wrong file
was blamed, or if anything but a KDError was raised.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kdcache.cache import integrity, manifest, query
from kdcache.cache.format import SPLITS
from kdcache.cache.reader import Cache
from kdcache.errors import KDError
from trainer.data.select import select
from trainer.data.stream import in_order
from trainer.evaluate import setup as evaluate
from trainer.evaluate.config import EvaluateConfig
from trainer.grpo import plan as grpo

LEAST = 20

#: Files that only people read: no number comes from them.
WORDS = ("README.md",)


@dataclass(frozen=True)
class Flip:
    file: str
    byte: int
    bit: int

    def apply(self, cache: Path) -> None:
        """Flip the bit in place, or flip it back; the file's times stay as they are."""
        path = cache / self.file
        status = path.stat()
        with open(path, "r+b") as file:
            file.seek(self.byte)
            value = file.read(1)[0]
            file.seek(self.byte)
            file.write(bytes([value ^ 1 << self.bit]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@dataclass
class Outcome:
    flip: Flip
    blamed: list[str]  # files that verify names
    answers: dict[str, str]  # command -> same, sentence, OTHER NUMBERS, TRACEBACK

    @property
    def bad(self) -> str | None:
        """What went wrong, in words; None if nothing did."""
        wrong = [f"{name}: {answer}" for name, answer in self.answers.items() if answer.isupper()]
        if self.flip.file not in WORDS and self.blamed != [self.flip.file]:
            wrong.append(f"verify blames {self.blamed or 'nothing'}")
        return "; ".join(wrong) or None


def plan_flips(cache: Path, count: int, seed: int = 0, least: int = LEAST) -> list[Flip]:
    """Return ``least`` flips in every file, and the remaining ones at random by size."""
    chance = random.Random(seed)
    sizes = {str(p.relative_to(cache)): p.stat().st_size for p in sorted(cache.rglob("*")) if p.is_file()}
    names = [name for name, size in sizes.items() if size for _ in range(least)]
    names += chance.choices(list(sizes), list(sizes.values()), k=max(count - len(names), 0))
    return [Flip(name, chance.randrange(sizes[name]), chance.randrange(8)) for name in names]


# --- what the commands read -------------------------------------------------------------------------------------------


def sql(cache: Path) -> str:
    """Return hashes of every value of three views."""
    connection = query.connect(cache)
    try:
        views = ("samples", "vocab", "rewards")
        return str(
            [query.stream(connection, f"SELECT count(*), sum(hash(v)) FROM {v} AS v")[1].__next__() for v in views]
        )
    finally:
        connection.close()


def train(cache: Path) -> str:
    """Return a hash of all batches of all splits, bit for bit."""
    digest = hashlib.sha256()
    opened = Cache(cache)
    for split in SPLITS:
        for batch in in_order(select([opened], split), opened.plan["vocab_size"], 8):
            for name, value in sorted(batch.items()):
                digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def evaluation(cache: Path) -> str:
    """Return a hash of what is read of the test split besides its batches, and of the prompts that kd grpo chooses."""
    config = EvaluateConfig(models=(), from_cache=(cache,), out=cache / "unused")
    opened = Cache(cache)
    read = [
        evaluate.prompts_of(config),
        sorted(evaluate.groups_of(config, [opened]).items()),  # threads return rows in any order
        sorted(tuple(row.values()) for row in query.select(cache, "sample_id, entropies", None, "test").to_pylist()),
        evaluate.decoding_of(config, opened),
        grpo._choose(cache, opened.plan, None),
    ]
    return hashlib.sha256(repr(read).encode()).hexdigest()


COMMANDS: dict[str, Callable[[Path], str]] = {"sql": sql, "train": train, "evaluate": evaluation}


# --- the campaign -----------------------------------------------------------------------------------------------------


def look(cache: Path, flip: Flip, sound: dict[str, str]) -> Outcome:
    """Flip a bit, run all commands, and flip it back."""
    flip.apply(cache)
    before = (cache / "manifest.json").read_bytes()
    answers, blamed = {}, []
    try:
        for name, command in COMMANDS.items():
            try:
                answers[name] = "same" if command(cache) == sound[name] else "OTHER NUMBERS"
            except KDError:
                answers[name] = "sentence"
            except Exception as error:
                answers[name] = f"TRACEBACK ({type(error).__name__.upper()})"
        try:
            blamed = sorted(integrity.verify(cache).problems)
            answers["verify"] = "found" if blamed else "nothing"
        except KDError:
            answers["verify"], blamed = "sentence", [flip.file]
        except Exception as error:
            answers["verify"] = f"TRACEBACK ({type(error).__name__.upper()})"
    finally:
        if flip.file not in (*WORDS, "rejected.jsonl") or blamed:  # else verify has rewritten the file
            flip.apply(cache)
        elif flip.file in WORDS:
            manifest.rebuild(cache)
    assert flip.file == "manifest.json" or (cache / "manifest.json").stat().st_size == len(before)
    return Outcome(flip, blamed, answers)


def campaign(cache: Path, flips: Sequence[Flip], say: Callable[[str], None] = lambda _: None) -> list[Outcome]:
    """Try all flips on a copy of ``cache``."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(cache, Path(scratch) / "copy"))
        assert integrity.verify(copy).sound
        sound = {name: command(copy) for name, command in COMMANDS.items()}
        outcomes = []
        for number, flip in enumerate(flips):
            outcomes.append(look(copy, flip, sound))
            if outcomes[-1].bad:
                say(f"{flip}: {outcomes[-1].bad}")
            if number % 20 == 19:
                say(f"{number + 1}/{len(flips)}")
        assert {name: command(copy) for name, command in COMMANDS.items()} == sound
        return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table with one line per kind of file."""
    lines = [
        "| file | flips | verify found it | blamed that file alone | sql: sentence, same | train: sentence, same | evaluate: sentence, same | other numbers | tracebacks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault("data/*.parquet" if "/" in outcome.flip.file else outcome.flip.file, []).append(outcome)
    for kind, members in sorted(kinds.items()):
        count = {name: Counter(o.answers[name].split(" (")[0] for o in members) for name in (*COMMANDS, "verify")}
        answers = " | ".join(f"{count[name]['sentence']}, {count[name]['same']}" for name in COMMANDS)
        others, tracebacks = (sum(c[what] for c in count.values()) for what in ("OTHER NUMBERS", "TRACEBACK"))
        right = sum(o.blamed == [o.flip.file] for o in members)
        lines.append(
            f"| {kind} | {len(members)} | {sum(bool(o.blamed) for o in members)} | {right} | {answers} | {others} | {tracebacks} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path, nargs="+")
    parser.add_argument("--flips", type=int, default=300, help="in each cache")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: list[Outcome] = []
    for cache in options.caches:
        flips = plan_flips(cache, options.flips, options.seed)
        outcomes += campaign(cache, flips, lambda text: print(text, file=sys.stderr, flush=True))
    print(table(outcomes))
    sys.exit(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    main()
