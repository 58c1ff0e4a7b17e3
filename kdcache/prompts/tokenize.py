"""Chat messages to token ids, exactly as the chat template writes them. Phase two never tokenises again.

For a row with an answer the template renders two texts: the prompt alone, with the generation prompt, and the whole
conversation. The answer is what the whole conversation has after the prompt, up to the end-of-turn mark::

    prompt          <|im_start|>user\\nName a river.<|im_end|>\\n<|im_start|>assistant\\n
    conversation    <|im_start|>user\\nName a river.<|im_end|>\\n<|im_start|>assistant\\nThe Nile.<|im_end|>\\n
                                                                                   ^^^^^^^^^ the answer, then its end

If the conversation does not begin with the prompt, the conversation is followed, and the row says so (``differs``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from kdcache.errors import UsageError, first_line
from kdcache.prompts import kept, template
from kdcache.prompts.messages import REASONING_KEYS, Message

#: 2: an answer is what the chat template writes; the end-of-turn is the mark that it writes after an answer.
COMPLETION_POLICY_VERSION = 2

#: Why an answer is not scored after the prompt that a model gets, or not in the tokens of the template's own rendering.
NO_GENERATION_PROMPT = "the template writes something else before an answer than its generation prompt"
NO_ANSWERS = "the template writes no answers; they follow its prompt as they are"
THOUGHTS_DROPPED = "the template leaves the answer's thoughts out; they are scored after the thought it opens"
TOKENS_MERGE = "the first token of the answer would join the last of the prompt; they are tokenised apart"


@dataclass(frozen=True)
class TokenizedRow:
    """The prompt of a row and the answer given to it, as text and as token ids."""

    prompt: str
    prompt_ids: list[int]
    completion: str | None = None
    completion_ids: list[int] | None = None  # they end in the end-of-turn; None if the row has no answer
    differs: str | None = None  # why the ids are not those of the template's whole rendering


#: What stands before a prompt. ``auto``: what the tokenizer adds to plain text, and what a chat template holds.
#: ``add``: one BOS, where there is none yet. ``never``: no BOS before plain text; a chat template keeps its own.
BOS = ("auto", "add", "never")


class Prompts:
    """A tokenizer with its chat template, used in the one way in which caches are made."""

    def __init__(self, model: str, tokenizer: Any, today: date | None = None, bos: str = "auto"):
        self.tokenizer = tokenizer
        if bos not in BOS:
            raise UsageError(f"--bos {bos}: expected one of {', '.join(BOS)}")
        named = template.named_bos(model)
        self.bos, self.bos_id = bos, named if named is not None else tokenizer.bos_token_id
        if bos == "add" and self.bos_id is None:
            raise UsageError(f"--bos add: neither config.json nor the tokenizer of {model} names a BOS token")
        self._adds_bos = tokenizer("a", verbose=False)["input_ids"][:1] == [self.bos_id]
        #: The model's configuration names a BOS, and nothing puts it before a prompt.
        self.lacks_bos = bos == "auto" and named is not None and tokenizer.chat_template is None and not self._adds_bos
        self._today = today or date.today()
        self.tells_the_date = any(w in str(tokenizer.chat_template) for w in ("strftime_now", "date_string"))
        self.facts = template.probe(tokenizer, self.render_template, self.prompt_ids, model)
        self.end_of_turn = self.facts.end_of_turn
        self._ends = {*self.facts.stop_ids, *([pad] if (pad := tokenizer.pad_token_id) is not None else [])}

    @property
    def without_bos(self) -> str:
        """What to tell the user where ``lacks_bos``."""
        return (
            f"names a BOS token ({self.tokenizer.convert_ids_to_tokens(self.bos_id)}, id {self.bos_id}), but its tokenizer adds "
            "none and there is no chat template, so prompts begin without it. A model that was trained with BOS answers "
            "rubbish then. Say --bos add if it was, or --bos never if it was not"
        )

    # --- a row

    def ask(
        self, messages: Sequence[Message], answer: Message | None = None, tools: Sequence[dict[str, Any]] = ()
    ) -> TokenizedRow:
        """Return the ids of a prompt and of the answer given to it; ValueError, for people, if they cannot be found."""
        prompt = self.render(messages, tools)
        kept.check_prompt(messages, tools, prompt)
        if answer is None:
            return TokenizedRow(prompt, self.prompt_ids(prompt))
        if not any(str(answer.get(key) or "").strip() for key in ("content", "tool_calls", REASONING_KEYS[0])):
            return TokenizedRow(prompt, self.prompt_ids(prompt), "", [])
        if not self.facts.writes_answers:
            return self._append(prompt, kept.plain_text([answer]), NO_ANSWERS if self.facts.chat_template else None)
        conversation = self.render_template([*messages, answer], tools, generation_prompt=False)
        if conversation.startswith(prompt):
            text, differs = conversation[len(prompt) :], None
        elif self.facts.opens_thought and (traced := kept.answer_inside_thought(answer)) is not None:
            text, differs = traced + self.facts.after_answer, THOUGHTS_DROPPED
        else:
            # The prompt ends where these three part: the prompt, the conversation, and one with another answer.
            probe = [*messages, {"role": "assistant", "content": template.MARK}]
            before_mark = self.render_template(probe, tools, generation_prompt=False).partition(template.MARK)[0]
            prompt = prompt[: template.shared_length(prompt, conversation, before_mark)]
            text, differs = conversation[len(prompt) :], NO_GENERATION_PROMPT
        if not kept.has_answer(answer, text):
            raise ValueError(
                "the chat template leaves out a part of the answer (its text, its tool calls or reasoning)"
            )
        ends_as_usual = text.endswith(self.facts.after_answer)
        text = text.removesuffix(self.facts.after_answer) if ends_as_usual else text.rstrip()
        return self._append(prompt, text, differs)

    def ask_text(self, prompt: str, completion: str | None) -> TokenizedRow:
        """Return the ids of a prompt in plain text and of its answer: no chat template, and the tokenizer's own BOS."""
        if completion is None:
            return TokenizedRow(prompt, self.prompt_ids(prompt, is_plain=True))
        return self._append(prompt, completion, None, is_plain=True)

    def _append(self, prompt: str, completion: str, differs: str | None, is_plain: bool = False) -> TokenizedRow:
        """Return the ids of ``completion`` after ``prompt``, with one end-of-turn; none if the completion is empty."""
        encode = partial(self.prompt_ids, is_plain=is_plain)
        prompt_ids = encode(prompt)
        if not completion.strip():
            return TokenizedRow(prompt, prompt_ids, completion, [])
        joint = encode(prompt + completion)
        if joint[: len(prompt_ids)] == prompt_ids:
            ids = joint[len(prompt_ids) :]
        else:
            ids = self.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
            differs = differs or TOKENS_MERGE
        end = self.end_of_turn
        while ids and ids[-1] in self.facts.stop_ids:  # another mark, as some templates write after a tool call
            end = ids.pop()
        return TokenizedRow(prompt, prompt_ids, self.decode(ids), [*ids, end] if ids else [], differs)

    # --- text and ids

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """Return the prompt as text: the chat template with the generation prompt; without a template, the contents."""
        if self.tokenizer.chat_template is None:
            if tools:
                raise ValueError("tools need a chat template to describe them, and the tokenizer has none")
            return kept.plain_text(messages)
        return self.render_template(messages, tools, generation_prompt=True)

    def prompt_ids(self, text: str, is_plain: bool = False) -> list[int]:
        """Return the ids of a prompt. Plain text, which no chat template has rendered, gets special tokens in front."""
        is_plain = is_plain or self.tokenizer.chat_template is None
        ids = self.tokenizer(text, add_special_tokens=is_plain, verbose=False)["input_ids"]
        if self.bos == "add" and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids[1:] if self.bos == "never" and is_plain and self._adds_bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return a completion as text, without the ids that ended it; other special tokens, such as <think>, stay."""
        return completion_text(self.tokenizer, ids, self._ends)

    def render_template(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], generation_prompt: bool
    ) -> str:
        """Return what the chat template writes; ValueError if it refuses these messages."""
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                strftime_now=self._today.strftime,
                **options,
            )
        except Exception as error:  # a template's author may raise anything through jinja
            raise ValueError(f"the chat template refused these messages: {first_line(error)}") from None


def completion_text(tokenizer: Any, ids: Sequence[int], ends: set[int]) -> str:
    """Return ids as text, without those at the end that are in ``ends`` (end-of-turn marks and padding)."""
    remaining = list(ids)
    while remaining and remaining[-1] in ends:
        remaining.pop()
    return tokenizer.decode(remaining, skip_special_tokens=False, clean_up_tokenization_spaces=False)
