"""What will be in which shard, and when two captures are the same: configuration, fingerprint, plan.

The plan is fixed before the first row is run: the examples of a split, in their order, cut into equal slices, one slice
a shard. It follows from the configuration and the examples alone, so that every run of the same command, on any
machine, knows the same shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from kdcache import hashing, models, storage
from kdcache.bounds import MOST_SAMPLES, MOST_SEED, check_sampling, check_whole
from kdcache.cache import manifest, sparsify
from kdcache.cache.format import FORMAT_VERSION, PRECISIONS, SPLITS, differing_fields, fingerprint, split_of
from kdcache.cache.layout import shard_name
from kdcache.errors import KDError, UsageError
from kdcache.examples import load as examples
from kdcache.examples import near_duplicates as splits
from kdcache.examples.templates import TEMPLATE_VERSION, with_reasoning
from kdcache.examples.types import BadRow, Columns, Example
from kdcache.hashing import request_seed, stable_hash
from kdcache.judge import kinds
from kdcache.models import embedded, identity
from kdcache.prompts.tokenize import COMPLETION_POLICY_VERSION, Prompts, TokenizedRow
from kdcache.storage import Location, folders, seal
from kdcache.storage.folders import CACHE
from kdcache.teachers import EngineOptions, Request, Sampling, resolve_dtype, runs_on_gpu

MODES = ("score", "sample", "both")

#: Without --max-model-len, on a CPU: vLLM must prefill a prompt in one piece there, and tries its memory at start-up.
CPU_MAX_MODEL_LEN = 2048

DTYPES = ("auto", "float32", "bfloat16", "float16", "float", "half")  # the last two are vLLM's names

#: Options that would make the cache say something else than it claims, or that have a name here.
REFUSED_OPTIONS = {
    "model": "use --teacher",
    "tokenizer": "the teacher's own is used",
    "logprobs_mode": "a cache holds log-probabilities of the raw softmax",
    "skip_tokenizer_init": "the tokenizer is needed",
    "enable_prefix_caching": "vLLM cannot score a prompt whose start it took from its cache",
}

#: Engine options that change speed and memory, not numbers: recorded, not part of the fingerprint.
SPEED_OPTIONS = frozenset(
    [
        "gpu_memory_utilization",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "swap_space",
        "cpu_offload_gb",
        "kv_cache_memory_bytes",
        "disable_log_stats",
        "download_dir",
        "max_logprobs",
        "enable_chunked_prefill",
        "distributed_executor_backend",
    ]
)


#: What is hashed into a fingerprint of an example, a row that cannot be used, the sampling options, and the facts of a chat
#: template. These names are part of every cache that exists: a field that is renamed keeps its old name here, and a new
#: field is hashed only where it is not at its default.
FINGERPRINTED_EXAMPLE = (
    *("source", "row_id", "messages", "completion", "answer", "tools", "group_id", "reference", "task", "language"),
    *("verifier", "prompt", "content"),
)
FINGERPRINTED_BAD_ROW = ("source", "row_id", "reason")
FINGERPRINTED_SAMPLING = ("temperature", "top_p", "max_tokens")
FINGERPRINTED_TEMPLATE = (
    *("chat_template", "writes_answers", "begins_with_bos", "generation_prompt", "before_answer", "opens_thought"),
    *("trims", "after_answer", "end_of_turn", "end_is_named", "stop_ids"),
)


@dataclass(frozen=True)
class CaptureConfig:
    """Everything that ``kd cache-teacher`` was asked for."""

    out: Location
    teacher: str = "embedded"
    revision: str | None = None
    examples: str = "builtin"
    data_path: str | None = None
    prompt_format: str = "chat"
    columns: Columns = field(default_factory=Columns)
    limit: int | None = None
    shuffle: bool = False
    mode: str = "score"
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    sparsify: str = "threshold:0.02"
    capture_k: int | None = None
    precision: str = "q8"
    seed: int = 0
    rows_per_shard: int = 512
    split_ratios: tuple[float, float, float] = (0.9, 0.05, 0.05)
    near_duplicates: str = "drop"
    engine: str = "vllm"
    dtype: str = "auto"
    max_model_len: int | None = None
    bos: str = "auto"
    reasoning: bool = False
    verify: bool = True
    unsafe_exec: bool = False
    overwrite: bool = False
    strict: bool = False
    plan_slice: tuple[int, int] | None = None  # (index from 0, count): this process's share of the shards
    engine_extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    split: str
    number: int
    examples: list[Example | BadRow]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


@dataclass(frozen=True)
class Sample:
    """A request and the columns of its row that are known before the teacher answers."""

    request: Request
    row_id: str
    fields: dict[str, Any]
    differs: str | None = None  # from what the chat template writes, and why

    @property
    def sample_id(self) -> str:
        return self.fields["sample_id"]


class Plan:
    """A configuration resolved against its teacher and examples. Nothing is written and no weights are loaded."""

    def __init__(self, config: CaptureConfig):
        self.config = config
        _check(config)
        self.model = identity.model_folder(config.teacher, config.revision)
        model_config = _model_config(self.model)
        self.sparsifier = sparsify.parse(config.sparsify, config.capture_k)
        self.vocab_size = model_config["vocab_size"]
        if self.sparsifier.capture_k > self.vocab_size:
            raise UsageError(
                f"{self.sparsifier.capture_k} candidates a position were asked for, but {config.teacher} has a vocabulary of "
                f"{self.vocab_size}; lower --sparsify or --capture-k"
            )
        self.dtype = resolve_dtype(config.dtype, model_config["dtype"], config.engine)
        self.max_model_len = _max_model_len(config, model_config["max_position_embeddings"])
        self.date = self._date()
        self.prompts = Prompts(self.model, models.tokenizer(self.model), self.date, config.bos)
        if self.prompts.end_of_turn >= self.vocab_size:
            raise KDError(f"{config.teacher}: its end of turn, {self._no_token(self.prompts.end_of_turn)}")
        self.examples = self._load()
        if all(isinstance(example, BadRow) for example in self.examples):
            raise KDError(f"--examples {config.examples}: no row can be taken. {self.examples[0].reason}")  # type: ignore[union-attr]
        self.fields = self._fingerprint_fields()
        self.fingerprint = fingerprint(self.fields)
        self.near_duplicates = 0  # rows dropped because they repeat one of a later split
        self.shards = self._cut()

    def _no_token(self, token: int) -> str:
        return f"token {token}, is beyond the model's vocabulary of {self.vocab_size}: its tokenizer has more tokens than that"

    def introduction(self) -> list[str]:
        """What the teacher will be asked, in two lines: what the template does, and the first row."""
        return [
            f"template: {self.prompts.facts.describe(self.prompts.tokenizer)}",
            f"asks first: {self.first_asked()}",
        ]

    def notes(self) -> list[str]:
        """What the user should know before the teacher runs, each a sentence or two."""
        found = []
        if self.near_duplicates:
            found.append(f"{self.near_duplicates} rows nearly repeat a row of another split, and are dropped")
        if self.prompts.lacks_bos:
            found.append(f"warning: {self.config.teacher} {self.prompts.without_bos}")
        reasons = [(row, reason) for row in self.examples if isinstance(row, Example) and (reason := _not_judged(row))]
        if reasons:
            row, reason = reasons[0]
            found.append(
                f"warning: the verifiers of {len(reasons)} of {len(self.examples)} rows are not understood, so that their "
                f"answers will not be judged; the first: {row.source}:{row.row_id}: {reason}"
            )
        return found

    def _load(self) -> list[Example | BadRow]:
        """The examples in the data set's order or, shuffled, in that of a hash of the seed and their ids; then cut."""
        config = self.config
        limit = None if config.shuffle else config.limit
        found = examples.load(config.examples, config.columns, limit, config.data_path, config.prompt_format)
        if config.shuffle:
            found.sort(key=lambda example: stable_hash(config.seed, example.source, example.row_id))
        return found[: config.limit]

    def _date(self) -> date:
        """The day that chat templates are told: the plan's, so that a capture resumed later renders the same prompts.

        Where plan.json was damaged and set aside, the shards say it too.
        """
        out = self.config.out
        for said in (lambda: manifest.read_plan(out), lambda: next(manifest.shards_metadata(out))):
            with contextlib.suppress(KDError, OSError, StopIteration, ValueError, KeyError, TypeError):
                return date.fromisoformat(said()["date"])
        return date.today()

    @property
    def samples_per_example(self) -> int:
        given = self.config.mode in ("score", "both")
        return given + (self.config.samples if self.config.mode in ("sample", "both") else 0)

    @property
    def examples_per_shard(self) -> int:
        return max(1, self.config.rows_per_shard // self.samples_per_example)

    def _cut(self) -> list[Shard]:
        by_split: dict[str, list[Example | BadRow]] = {split: [] for split in SPLITS}
        seen: set[tuple[str, str]] = set()
        for example in self.examples:
            if (example.source, example.row_id) in seen:
                raise KDError(
                    f"--examples {self.config.examples}: two rows have the id {example.row_id!r}; ids must be unique"
                )
            seen.add((example.source, example.row_id))
            by_split[self._split(example)].append(example)
        if self.config.near_duplicates == "drop":
            by_split, self.near_duplicates = splits.drop_near_duplicates(by_split)
        per = self.examples_per_shard
        return [
            Shard(split, number, rows[start : start + per])
            for split, rows in by_split.items()
            for number, start in enumerate(range(0, len(rows), per))
        ]

    def _split(self, example: Example | BadRow) -> str:
        group = f"bad row {example.row_id}" if isinstance(example, BadRow) else _group_id(example)
        return split_of(group, self.config.split_ratios, self.config.seed)

    def _fingerprint_fields(self) -> dict[str, Any]:
        config = self.config
        sampled = config.mode != "score"
        extra = config.engine_extra | ({"trust_remote_code": True} if models.code_is_trusted() else {})
        return {
            # Fields that came later are there only where they are not the default: old fingerprints stay as they are.
            **({"bos": config.bos} if config.bos != "auto" else {}),
            "format_version": FORMAT_VERSION,
            "teacher": _teacher_name(config.teacher),
            "weights": identity.weights(self.model),
            "tokenizer": identity.tokenizer(self.model),
            "template_date": str(self.date) if self.prompts.tells_the_date else None,
            "engine": config.engine,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "engine_options": {k: v for k, v in sorted(extra.items()) if k not in SPEED_OPTIONS},
            "mode": config.mode,
            "seed": config.seed,
            "samples": config.samples if sampled else None,
            "sampling": _named(config.sampling, FINGERPRINTED_SAMPLING) if sampled else None,
            "sparsify": str(self.sparsifier),
            "capture_k": self.sparsifier.capture_k,
            "precision": config.precision,
            "completion_policy": COMPLETION_POLICY_VERSION,
            "template_facts": _named(self.prompts.facts, FINGERPRINTED_TEMPLATE)
            | {"stop_ids": list(self.prompts.facts.stop_ids)},
            "prompt_template": f"{config.prompt_format} {TEMPLATE_VERSION}",
            "reasoning": TEMPLATE_VERSION if config.reasoning else None,
            "examples": hashing.of_json_list(map(_fingerprinted, self.examples)),
            "split_ratios": list(config.split_ratios),
            "near_duplicates": splits.parameters(config.near_duplicates),
            "rows_per_shard": config.rows_per_shard,
        }

    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            model=self.model,
            capture_k=self.sparsifier.capture_k,
            max_model_len=self.max_model_len,
            dtype=self.dtype,
            seed=self.config.seed,
            sampling=self.config.sampling,
            stop_token_ids=self.prompts.facts.stop_ids,
            extra=self.config.engine_extra,
        )

    def mine(self) -> list[Shard]:
        """The shards that are this process's to write: all, or every N-th from the I-th on."""
        first, step = self.config.plan_slice or (0, 1)
        return self.shards[first::step]

    def todo(self) -> list[Shard]:
        """Those of them that are not there yet: resuming is a set difference."""
        return self.mine() if self.config.overwrite else self.missing(self.mine())

    def missing(self, shards: list[Shard]) -> list[Shard]:
        there = storage.files(self.config.out / "data")
        return [shard for shard in shards if shard.name.removeprefix("data/") not in there]

    def as_json(self) -> dict[str, Any]:
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "fields": self.fields,
            "date": str(self.date),
            "teacher_revision": identity.revision(self.model),
            "end_of_turn": self.prompts.end_of_turn,
            "stop_ids": list(self.prompts.facts.stop_ids),
            "chat_template": self.prompts.tokenizer.chat_template,
            "vocab_size": self.vocab_size,
            "tokenizer": identity.tokenizer_identity(self.prompts.tokenizer),
            "near_duplicates_dropped": self.near_duplicates,
            "shards": self._shards_as_json(),
        }
        return seal.with_checksum(content)

    def _shards_as_json(self) -> list[dict[str, Any]]:
        return [{"name": shard.name, "examples": len(shard.examples)} for shard in self.shards]

    def check_folder(self, overwrite: bool | None = None) -> None:
        """Refuse a folder that is something else, or (unless it is to be overwritten) a cache with another fingerprint."""
        out, plan = self.config.out, self.config.out / "plan.json"
        ways_out = "Use another --out, or --overwrite to delete what is there."
        folders.check_place(out, "--out")
        # Before plan.json is looked for: whoever else makes this cache makes that first.
        if isinstance(out, Path):
            has_files = not folders.is_empty(out)
        else:
            has_files = out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir())
        if plan.is_file():
            if self.config.overwrite if overwrite is None else overwrite:
                config = self.config
                reads = [self.model, config.examples, *([config.data_path] if config.data_path else [])]
                folders.check_deletable(out, CACHE, reads)
                return
            if overwrite is None and self.finds_stale_claim():
                return
            old = manifest.read_plan(out)
            if old["fingerprint"] != self.fingerprint:
                differing = "\n  ".join(differing_fields(old["fields"], self.fields))
                raise KDError(
                    f"{out} holds a cache made differently (old -> new):\n  {differing}\n"
                    f"A cache does not grow and is never mixed. {ways_out}"
                )
            if old["shards"] != self._shards_as_json():
                raise KDError(
                    f"{out}/plan.json cuts the same examples into other shards than this version of kdcache does. {ways_out}"
                )
        elif manifest.plan_was_set_aside(out):
            foreign = {m.get("fingerprint") for m in manifest.shards_metadata(out)} - {self.fingerprint}
            if foreign:
                raise KDError(
                    f"{out} holds shards of a cache made differently (fingerprint {foreign.pop()}, this command's is "
                    f"{self.fingerprint}): its plan.json was damaged and set aside; run the command that made it. {ways_out}"
                )
        elif has_files:
            raise KDError(f"--out {out} is not empty and is no cache (it has no plan.json). Use another --out.")

    def asked(self, example: Example, given: bool) -> TokenizedRow:
        """What the teacher is asked about an example: its prompt alone, or (``given``) with the answer given to it."""
        if self.config.reasoning:
            example = with_reasoning(example)
        if example.prompt is not None:
            return self.prompts.ask_text(example.prompt, (example.completion or "") if given else None)
        answer = example.given or {"role": "assistant", "content": ""}
        return self.prompts.ask(example.messages, answer if given else None, example.tools)

    def first_asked(self, most: int = 400) -> str | None:
        """The first example as the teacher will see it: its prompt and, after an arrow, the answer given to it; shortened."""
        example = next((e for e in self.examples if not isinstance(e, BadRow)), None)
        if example is None:
            return None
        try:
            asked = self.asked(example, given=self.config.mode != "sample")
        except ValueError as error:
            return str(error)
        decode = self.prompts.tokenizer.decode
        shown = repr(decode(asked.prompt_ids))
        if asked.completion_ids:
            shown += f" -> {decode(asked.completion_ids)!r}"
        return shown if len(shown) <= most else f"{shown[: most // 2]} ... {shown[-most // 2 :]}"

    def finds_stale_claim(self) -> bool:
        """Whether the folder is another plan's that never wrote a shard: of a start that failed, and may be corrected.

        Slices share a folder, and a store has no lock: there another process may be about to write the first.
        """
        out = self.config.out
        if self.config.plan_slice is not None or not isinstance(out, Path) or not folders.holds(out, CACHE):
            return False
        return (
            f'"{self.fingerprint}"' not in (out / CACHE.marker).read_text(encoding="utf-8", errors="replace")
            and not folders.has_results(out, CACHE)
            and folders.foreign(out, CACHE) is None
        )

    def samples_of(self, shard: Shard, example: Example | BadRow) -> Iterator[Sample | BadRow]:
        """The samples that one example asks for, or why it cannot be taken."""
        if isinstance(example, BadRow):
            yield example
            return
        config = self.config

        def bad(reason: str) -> BadRow:
            return BadRow(example.source, example.row_id, reason)

        wants_given = config.mode == "score" or (config.mode == "both" and example.given is not None)
        try:
            prompt = self.asked(example, given=False) if config.mode != "score" else None
            given = self.asked(example, given=True) if wants_given else None
        except ValueError as error:
            yield bad(str(error))
            return
        fields = {
            "group_id": _group_id(example),
            "source": example.source,
            "split": shard.split,
            "task": example.task,
            "language": example.language,
            "reference": example.reference,
            "verifier": example.verifier,
        }

        def sample(asked: TokenizedRow, suffix: str, **more: Any) -> Sample:
            sample_id = f"{example.source}:{example.row_id}:{suffix}"
            index = more.get("sample_index")
            seed = None if index is None else request_seed(config.seed, sample_id, index)
            request = Request((shard.name, sample_id), asked.prompt_ids, asked.completion_ids, seed)
            of_prompt = {"prompt_id": f"{stable_hash(asked.prompt):016x}", "prompt": asked.prompt}
            return Sample(
                request,
                example.row_id,
                fields | of_prompt | {"sample_id": sample_id, "seed": seed} | more,
                asked.differs,
            )

        def too_long(tokens: int, what: str) -> str | None:
            if tokens + 1 <= self.max_model_len:
                return None
            return f"{what} {tokens} tokens and one more do not fit max_model_len {self.max_model_len}"

        prompt_ids = (prompt or given).prompt_ids  # type: ignore[union-attr]
        if not prompt_ids:
            yield bad("the prompt is empty")
            return
        if max(prompt_ids) >= self.vocab_size:
            yield bad(f"prompt: {self._no_token(max(prompt_ids))}")
            return
        if prompt is not None and (reason := too_long(len(prompt.prompt_ids), "prompt:")):
            yield bad(reason)
            return
        if given is not None:
            if not given.completion_ids:
                yield bad("no completion to score" if example.given is None else "the completion is empty")
            elif reason := too_long(len(given.prompt_ids) + len(given.completion_ids), "prompt and completion:"):
                yield bad(reason)
            elif max(given.completion_ids) >= self.vocab_size:
                yield bad(f"completion: {self._no_token(max(given.completion_ids))}")
            else:
                yield sample(given, "g", origin="given", completion=given.completion)
        if prompt is not None:
            for index in range(config.samples):
                yield sample(prompt, f"s{index}", origin="sampled", sample_index=index)


def _named(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _fingerprinted(row: Example | BadRow) -> dict[str, Any]:
    """What a fingerprint depends on in an example, or in a row that cannot be used."""
    return _named(row, FINGERPRINTED_BAD_ROW if isinstance(row, BadRow) else FINGERPRINTED_EXAMPLE)


def _teacher_name(teacher: str) -> str:
    """A Hub id as it is, a folder by its last name: moving a model does not change what it says."""
    if teacher == "embedded":
        return embedded.NAME
    return Path(teacher).resolve().name if Path(teacher).is_dir() else teacher


def _group_id(example: Example) -> str:
    """The problem a row belongs to: what the data set says, else a hash of the prompt's messages."""
    return example.group_id or f"{stable_hash(example.messages):016x}"


def _not_judged(example: Example) -> str | None:
    """Why an answer to this example could not be judged although the row says how; None where all is well."""
    try:
        kinds.parse(example.verifier)
    except KDError as error:
        return str(error)
    return None


def _model_config(model: str) -> dict[str, Any]:
    identity.read_json(model, "config.json")
    config = models.config(model).get_text_config()
    found = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
    }
    for name in ("vocab_size", "max_position_embeddings"):
        value = found[name]
        if not (isinstance(value, int) and value > 0) and (value is not None or name == "vocab_size"):
            raise KDError(f"{model}/config.json is damaged: {name} is {value!r}, expected a whole number above 0")
    return found


def _max_model_len(config: CaptureConfig, longest: int | None) -> int:
    asked = config.max_model_len
    if asked is not None:
        if longest is not None and asked > longest:
            raise UsageError(f"--max-model-len {asked}: the model's positions end at {longest}")
        return asked
    if runs_on_gpu(config.engine):
        return longest or 4096
    return min(longest or CPU_MAX_MODEL_LEN, CPU_MAX_MODEL_LEN)


def _check(config: CaptureConfig) -> None:
    ratios = config.split_ratios
    if len(ratios) != 3 or min(ratios) < 0 or not np.isclose(sum(ratios), 1.0):
        raise UsageError(
            f"--split-ratios {','.join(map(str, ratios))}: expected three shares (train,validation,test) that sum to 1"
        )
    if config.mode not in MODES:
        raise UsageError(f"--mode {config.mode}: expected one of {', '.join(MODES)}")
    if config.reasoning and config.prompt_format != "chat":
        raise UsageError("--reasoning asks in a chat message; it does not go with --prompt-format alpaca")
    if config.near_duplicates not in splits.NEAR_DUPLICATES:
        raise UsageError(
            f"--near-duplicates {config.near_duplicates}: expected one of {', '.join(splits.NEAR_DUPLICATES)}"
        )
    if config.precision not in PRECISIONS:
        raise UsageError(f"--precision {config.precision}: expected one of {', '.join(PRECISIONS)}")
    for name, reason in REFUSED_OPTIONS.items():
        if name in config.engine_extra:
            raise UsageError(f"--{name.replace('_', '-')} cannot be passed to the engine: {reason}")
    if config.plan_slice is not None:
        index, count = config.plan_slice
        if not 0 <= index < count:
            raise UsageError(f"--plan-slice {index}/{count}: expected I/N with I from 0 to N - 1, as in 0/4 .. 3/4")
        if config.overwrite:
            raise UsageError(
                "--overwrite would have each slice delete what the others wrote; delete the folder first, or use another --out"
            )
    for flag, value in (
        ("--teacher", config.teacher),
        ("--revision", config.revision),
        ("--examples", config.examples),
    ):
        if value == "":
            raise UsageError(f"{flag}: expected a name, found an empty text")
    check_whole("--samples", config.samples, 1, MOST_SAMPLES)
    check_whole("--rows-per-shard", config.rows_per_shard, 1)
    check_whole("--max-tokens", config.sampling.max_tokens, 1)
    check_whole("--limit", config.limit, 1)
    check_whole("--capture-k", config.capture_k, 1)
    check_whole("--max-model-len", config.max_model_len, 2)
    check_whole("--seed", config.seed, 0, MOST_SEED)
    check_sampling(config.sampling.temperature, config.sampling.top_p)
    if config.dtype not in DTYPES:
        raise UsageError(f"--dtype {config.dtype}: expected one of {', '.join(DTYPES)}")
