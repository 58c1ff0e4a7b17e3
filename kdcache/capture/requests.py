"""Turn examples into requests for the teacher, and the teacher's answers into rows of the cache.

A sample has two stages, each with its own type: a ``Question`` is what is known before the teacher answers, and a
``CacheRow`` is the question with its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kdcache.cache import sparsify
from kdcache.cache.format import CacheRow
from kdcache.capture.config import CaptureConfig
from kdcache.capture.plan import Plan, Shard
from kdcache.examples.templates import with_reasoning
from kdcache.examples.types import BadRow, Example
from kdcache.hashing import request_seed, stable_hash
from kdcache.prompts.tokenize import Prompts, TokenizedRow
from kdcache.teachers import Answer, Refusal, Request


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, and the columns of its row that are known before the teacher answers."""

    request: Request
    row_id: str  # of the example
    differs: str | None  # why the ids are not those that the chat template writes; None: they are

    sample_id: str
    prompt_id: str
    group_id: str
    source: str
    split: str
    task: str | None
    language: str | None
    prompt: str
    completion: str | None  # the given answer; None: the teacher writes one
    reference: str | None
    verifier: str | None
    sample_index: int | None  # of an answer that the teacher writes
    seed: int | None

    @property
    def origin(self) -> str:
        return "given" if self.request.completion_ids is not None else "sampled"


# --- example to questions ---------------------------------------------------------------------------------------------


def questions_of(plan: Plan, prompts: Prompts, shard: Shard, example: Example | BadRow) -> Iterator[Question | BadRow]:
    """Yield the questions of one example, or a ``BadRow`` with the reason why it, or its given answer, is left out."""
    if isinstance(example, BadRow):
        yield example
        return
    config = plan.config
    samples = config.mode in ("sample", "both")
    scores = config.mode == "score" or (config.mode == "both" and example.given is not None)
    try:
        prompt = ask_about(config, prompts, example, with_answer=False) if samples else None
        given = ask_about(config, prompts, example, with_answer=True) if scores else None
    except ValueError as error:
        yield _bad(example, str(error))
        return
    if reason := _prompt_problem(plan, prompt, given):
        yield _bad(example, reason)
        return
    if given is not None:
        reason = _answer_problem(plan, given, example)
        yield _bad(example, reason) if reason else _question(plan, shard, example, given, None)
    if prompt is not None:
        for index in range(config.samples):
            yield _question(plan, shard, example, prompt, index)


def ask_about(config: CaptureConfig, prompts: Prompts, example: Example, with_answer: bool) -> TokenizedRow:
    """Return the ids of an example's prompt, and with ``with_answer`` those of the answer given to it.

    Raises ValueError, in words for the user, where the chat template cannot write them.
    """
    if config.reasoning:
        example = with_reasoning(example)
    if example.prompt is not None:
        return prompts.ask_text(example.prompt, (example.completion or "") if with_answer else None)
    answer = example.given or {"role": "assistant", "content": ""}
    return prompts.ask(example.messages, answer if with_answer else None, example.tools)


def group_of(example: Example) -> str:
    """Return the problem that a row belongs to: the data set's own id, or a hash of the prompt's messages."""
    return example.group_id or f"{stable_hash(example.messages):016x}"


def beyond_vocabulary(token: int, vocab_size: int) -> str:
    """Say that a token is beyond the teacher's head, which has ``vocab_size`` rows."""
    return f"token {token}, is beyond the model's vocabulary of {vocab_size}: its tokenizer has more tokens than that"


def _question(plan: Plan, shard: Shard, example: Example, text: TokenizedRow, index: int | None) -> Question:
    """Return the question that scores the given answer (``index`` None), or that samples answer number ``index``."""
    sample_id = f"{example.source}:{example.row_id}:{'g' if index is None else f's{index}'}"
    seed = None if index is None else request_seed(plan.config.seed, sample_id, index)
    return Question(
        request=Request((shard.name, sample_id), text.prompt_ids, text.completion_ids, seed),
        row_id=example.row_id,
        differs=text.differs,
        sample_id=sample_id,
        prompt_id=f"{stable_hash(text.prompt):016x}",
        group_id=group_of(example),
        source=example.source,
        split=shard.split,
        task=example.task,
        language=example.language,
        prompt=text.prompt,
        completion=text.completion,
        reference=example.reference,
        verifier=example.verifier,
        sample_index=index,
        seed=seed,
    )


def _bad(example: Example, reason: str) -> BadRow:
    return BadRow(example.source, example.row_id, reason)


def _prompt_problem(plan: Plan, prompt: TokenizedRow | None, given: TokenizedRow | None) -> str | None:
    """Return why an example's prompt cannot be asked; None if it can."""
    either = prompt or given
    assert either is not None
    if not either.prompt_ids:
        return "the prompt is empty"
    if max(either.prompt_ids) >= plan.vocab_size:
        return f"prompt: {beyond_vocabulary(max(either.prompt_ids), plan.vocab_size)}"
    return _too_long(plan, len(prompt.prompt_ids), "prompt:") if prompt is not None else None


def _answer_problem(plan: Plan, given: TokenizedRow, example: Example) -> str | None:
    """Return why a given answer cannot be scored; None if it can."""
    if not given.completion_ids:
        return "no completion to score" if example.given is None else "the completion is empty"
    if reason := _too_long(plan, len(given.prompt_ids) + len(given.completion_ids), "prompt and completion:"):
        return reason
    if max(given.completion_ids) >= plan.vocab_size:
        return f"completion: {beyond_vocabulary(max(given.completion_ids), plan.vocab_size)}"
    return None


def _too_long(plan: Plan, tokens: int, what: str) -> str | None:
    if tokens + 1 <= plan.max_model_len:
        return None
    return f"{what} {tokens} tokens and one more do not fit max_model_len {plan.max_model_len}"


# --- answer to row ----------------------------------------------------------------------------------------------------


def answered(plan: Plan, prompts: Prompts, question: Question, answer: Answer | Refusal) -> CacheRow | BadRow:
    """Return the row of a question and the teacher's answer, sparsified; or why the answer cannot be kept."""
    if reason := _unusable(answer):
        return BadRow(question.source, question.row_id, reason)
    assert isinstance(answer, Answer)
    sampled = question.origin == "sampled"
    return CacheRow(
        sample_id=question.sample_id,
        prompt_id=question.prompt_id,
        group_id=question.group_id,
        source=question.source,
        split=question.split,
        task=question.task,
        language=question.language,
        prompt=question.prompt,
        completion=prompts.decode(answer.completion_ids) if sampled else question.completion,
        reference=question.reference,
        prompt_ids=question.request.prompt_ids,
        completion_ids=answer.completion_ids,
        token_logprobs=answer.token_logprobs,
        token_ranks=answer.token_ranks,
        candidates=plan.sparsifier(answer.ids, answer.logprobs, plan.config.seed, question.sample_id),
        entropies=sparsify.entropies(answer.logprobs),
        origin=question.origin,
        sample_index=question.sample_index,
        seed=question.seed,
        finish_reason=answer.finish_reason if sampled else None,
        verifier=question.verifier,
    )


def _unusable(answer: Answer | Refusal) -> str | None:
    """Return why an answer cannot be kept; None if it can."""
    if isinstance(answer, Refusal):
        return answer.reason
    if not len(answer.completion_ids):
        return "the teacher answered nothing"
    # A candidate may have -inf (probability 0), but neither the best one nor the completion's own tokens may.
    finite = np.isfinite(answer.token_logprobs).all() and np.isfinite(answer.logprobs[:, 0]).all()
    if not finite or np.isnan(answer.logprobs).any():
        return "the teacher's log-probabilities are not finite numbers"
    return None
