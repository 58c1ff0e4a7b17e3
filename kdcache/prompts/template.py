"""What a chat template does around an answer: found once per teacher, by rendering probes and looking at them.

The facts are printed, kept in plan.json and hashed into the fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KDError
from kdcache.models import identity
from kdcache.prompts.messages import Message
from kdcache.prompts.thoughts import opens_thought
from kdcache.prompts.vocabulary import ids_in

#: The answer in a probe: a text that no template writes by itself.
MARK = "kdcache-probe"

#: Renders messages and tools, with or without the generation prompt; ValueError if the template refuses them.
Render = Callable[[Sequence[Message], Sequence[dict[str, Any]], bool], str]


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template writes around an answer; without a template, what takes its place.

    For ChatML: generation_prompt "<|im_start|>assistant\\n", before_answer "", after_answer "<|im_end|>\\n".
    """

    chat_template: bool
    writes_answers: bool  # False also for a template that writes prompts alone
    begins_with_bos: bool
    generation_prompt: str  # what opens an assistant's turn; "" if the template writes nothing
    before_answer: str  # between that and the answer's own text, such as an empty thought
    opens_thought: bool  # the generation prompt leaves <think> open
    trims: bool  # blanks at the ends of an answer are removed
    after_answer: str  # the end-of-turn mark, and what follows it
    end_of_turn: int  # the id that ends an answer
    end_is_named: bool  # generation_config.json or the tokenizer names it
    stop_ids: tuple[int, ...]  # every id that ends an answer: end_of_turn, and those that these two name

    def describe(self, tokenizer: Any) -> str:
        """Return one line for people: what opens an answer, and what ends it."""
        name = tokenizer.convert_ids_to_tokens
        parts = ["no chat template, the contents as plain text"]
        if self.chat_template:
            parts = [
                f"{self.generation_prompt!r} opens an answer" if self.generation_prompt else "nothing opens an answer"
            ]
        if self.before_answer:
            parts.append(f"{self.before_answer!r} stands before it")
        if self.opens_thought:
            parts.append("it begins inside a thought")
        if self.trims:
            parts.append("blanks at its ends are removed")
        parts.append(f"{name(self.end_of_turn)} ends it")
        others = ", ".join(name(stop) for stop in self.stop_ids[1:])
        if not self.end_is_named and others:
            parts.append(f"which generation_config and tokenizer do not name (they name {others}): answers stop at any")
        elif others:
            parts.append(f"{others} would too")
        if self.begins_with_bos:
            parts.append("the prompt begins with BOS")
        return ", ".join(parts)


def probe(tokenizer: Any, render: Render, prompt_ids: Callable[[str], list[int]], model: str) -> TemplateFacts:
    """Return the facts of a model's chat template; KDError if nothing names a token that ends an answer.

    ``prompt_ids`` gives the ids of a rendered prompt.
    """
    stops = _stop_ids(model, tokenizer)
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}
    generation_prompt, prompt, before, mark, after, trims = "", "?", "", "", "", False
    if tokenizer.chat_template is not None:
        try:
            prompt = render([user], (), True)
            before, mark, after = render([user, answer], (), False).rpartition(MARK)
            after = after if mark else ""
            spaced = render([user, answer | {"content": f" {MARK} "}], (), False)
        except ValueError as error:
            raise KDError(f"{model}: a question and an answer cannot be written: {error}") from None
        trims = f" {MARK} " not in spaced
        # The generation prompt is what its rendering has beyond the one without it; as ids, so that no token is cut.
        with_prompt, without_prompt = (
            tokenizer(text.rpartition("?")[2], add_special_tokens=False)["input_ids"]
            for text in (prompt, render([user], (), False))
        )
        generation_prompt = tokenizer.decode(with_prompt[shared_length(with_prompt, without_prompt) :])
    end = _end_of_turn(tokenizer, after, stops)
    if end is None:
        raise KDError(f"{model}: neither its chat template nor its tokenizer names a token that ends an answer")
    bos = tokenizer.bos_token_id
    return TemplateFacts(
        chat_template=tokenizer.chat_template is not None,
        writes_answers=bool(mark),
        begins_with_bos=bos is not None and prompt_ids(prompt)[:1] == [bos],
        generation_prompt=generation_prompt,
        before_answer=before[len(prompt) :] if before and before.startswith(prompt) else "",
        opens_thought=opens_thought(generation_prompt),
        trims=trims,
        after_answer=after,
        end_of_turn=end,
        end_is_named=end in stops,
        stop_ids=tuple(dict.fromkeys([end, *stops])),
    )


def shared_length(*sequences: Sequence[Any]) -> int:
    """Return how many items the sequences have in common from the beginning."""
    differing = (i for i, items in enumerate(zip(*sequences)) if len(set(items)) > 1)
    return next(differing, min(map(len, sequences)))


def _end_of_turn(tokenizer: Any, after: str, stops: Sequence[int]) -> int | None:
    """Return the first id behind an answer that is a stop id or a special token, else the first stop id."""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {token for token, text in tokenizer.added_tokens_decoder.items() if str(text).strip()}
    return next((token for token in ids if token in stops or token in special), next(iter(stops), None))


def _stop_ids(model: str, tokenizer: Any) -> list[int]:
    """Return the ids that generation_config.json and the tokenizer name as ends."""
    config = identity.read_json(model, "generation_config.json")
    return ids_in(config.get("eos_token_id"), tokenizer.eos_token_id)


def named_bos(model: str) -> int | None:
    """Return the BOS id that config.json itself names: transformers' defaults say nothing about the model."""
    config = identity.read_json(model, "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if ids := ids_in(part.get("bos_token_id")):
            return ids[0]
    return None
