"""Chat messages -> exact token ids, just as the chat template writes them. Phase two never tokenises again.

The template is asked twice for a row that has an answer: for the prompt alone, with its generation prompt, and for the whole
conversation. The answer's ids are what the whole conversation has after the prompt, up to the end-of-turn mark that the
template writes. Where the two renderings do not begin alike, the whole one is followed, and the row says so.

What a template does is found once, with probes (``TemplateFacts``): it is printed, kept in plan.json and hashed into the
fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import pyarrow as pa

from kdcache.errors import KDError, UsageError, first_line
from kdcache.models import identity
from kdcache.prompts.messages import REASONING_KEYS, Message, tool_name

#: 2: an answer is what the chat template writes; the end-of-turn is the mark that it writes after an answer.
COMPLETION_POLICY_VERSION = 2

THINK = "<think>"
_MARK = "kdcache-probe"

#: Why a given answer is not scored after the very prompt that a model is asked with, or not in the template's own tokens.
NO_GENERATION_PROMPT = "the template writes something else before an answer than its generation prompt"
NO_ANSWERS = "the template writes no answers; they follow its prompt as they are"
THOUGHTS_DROPPED = "the template leaves the answer's thoughts out; they are scored after the thought it opens"
TOKENS_MERGE = "the first token of the answer would join the last of the prompt; they are tokenised apart"


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template does around an answer, as probes show it; without a template, what stands for it."""

    chat_template: bool
    writes_answers: bool  # False also for a template that writes prompts alone
    begins_with_bos: bool
    generation_prompt: str  # what opens an assistant's turn; "" if the template needs nothing
    before_answer: str  # between that and the answer's own text, as in an empty thought
    opens_thought: bool  # the generation prompt leaves <think> open
    trims: bool  # blanks at the ends of an answer are removed
    after_answer: str  # behind it: the end-of-turn mark, and what follows that
    end_of_turn: int  # the id that ends an answer
    end_is_named: bool  # by generation_config.json or the tokenizer
    stop_ids: tuple[int, ...]  # every id that ends an answer: also those that these name

    def describe(self, tokenizer: Any) -> str:
        """One line for people: what opens an answer, and what ends it."""
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


@dataclass(frozen=True)
class Asked:
    """What the teacher is asked about one row. ``completion_ids`` end in the end-of-turn; None where nothing is given."""

    prompt: str
    prompt_ids: list[int]
    completion: str | None = None
    completion_ids: list[int] | None = None
    differs: str | None = None  # why the ids are not those of the template's whole rendering


#: What stands before a prompt. ``auto``: what the tokenizer adds to plain text, and what a chat template holds.
#: ``add``: one BOS, where there is none yet. ``never``: no BOS before plain text; a chat template keeps its own.
BOS = ("auto", "add", "never")


class Prompts:
    """A tokenizer and its chat template, asked in the one way that the cache is made of."""

    def __init__(self, model: str, tokenizer: Any, today: date | None = None, bos: str = "auto"):
        self.tokenizer = tokenizer
        if bos not in BOS:
            raise UsageError(f"--bos {bos}: expected one of {', '.join(BOS)}")
        named = _named_bos(model)
        self.bos, self.bos_id = bos, named if named is not None else tokenizer.bos_token_id
        if bos == "add" and self.bos_id is None:
            raise UsageError(f"--bos add: neither config.json nor the tokenizer of {model} names a BOS token")
        self._adds_bos = tokenizer("a", verbose=False)["input_ids"][:1] == [self.bos_id]
        #: The model was given a BOS by whoever configured it, and nothing puts it before a prompt.
        self.lacks_bos = bos == "auto" and named is not None and tokenizer.chat_template is None and not self._adds_bos
        self._today = today or date.today()
        self.tells_the_date = any(w in str(tokenizer.chat_template) for w in ("strftime_now", "date_string"))
        self.facts = _probe(self, _stop_ids(model, tokenizer), model)
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
    ) -> Asked:
        """The ids of a prompt and of the answer given to it. ValueError, in words, if they cannot be had."""
        prompt = self.render(messages, tools)
        _check_kept(messages, tools, prompt)
        if answer is None:
            return Asked(prompt, self.prompt_ids(prompt))
        if not any(str(answer.get(key) or "").strip() for key in ("content", "tool_calls", REASONING_KEYS[0])):
            return Asked(prompt, self.prompt_ids(prompt), "", [])
        if not self.facts.writes_answers:
            return self._after(prompt, _plain([answer]), NO_ANSWERS if self.facts.chat_template else None)
        whole = self._rendered([*messages, answer], tools, generation_prompt=False)
        if whole.startswith(prompt):
            text, differs = whole[len(prompt) :], None
        elif self.facts.opens_thought and (traced := _traced(answer)) is not None:
            text, differs = traced + self.facts.after_answer, THOUGHTS_DROPPED
        else:
            marked = self._rendered([*messages, {"role": "assistant", "content": _MARK}], tools, False)
            prompt = prompt[: _shared(prompt, whole, marked.partition(_MARK)[0])]
            text, differs = whole[len(prompt) :], NO_GENERATION_PROMPT
        if not _has_answer(answer, text):
            raise ValueError(
                "the chat template leaves out a part of the answer (its text, its tool calls or reasoning)"
            )
        ends_as_usual = text.endswith(self.facts.after_answer)
        text = text.removesuffix(self.facts.after_answer) if ends_as_usual else text.rstrip()
        return self._after(prompt, text, differs)

    def ask_text(self, prompt: str, completion: str | None) -> Asked:
        """The same for a prompt of plain text, for which the chat template is not asked; the tokenizer's own BOS holds."""
        if completion is None:
            return Asked(prompt, self.prompt_ids(prompt, is_plain=True))
        return self._after(prompt, completion, None, is_plain=True)

    def _after(self, prompt: str, completion: str, differs: str | None, is_plain: bool = False) -> Asked:
        """The ids of ``completion`` as they follow ``prompt``, with one end-of-turn; none if the completion is empty."""
        encode = partial(self.prompt_ids, is_plain=is_plain)
        prompt_ids = encode(prompt)
        if not completion.strip():
            return Asked(prompt, prompt_ids, completion, [])
        joint = encode(prompt + completion)
        if joint[: len(prompt_ids)] == prompt_ids:
            ids = joint[len(prompt_ids) :]
        else:
            ids = self.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
            differs = differs or TOKENS_MERGE
        end = self.end_of_turn
        while ids and ids[-1] in self.facts.stop_ids:  # a mark of its own, as some templates write after a tool call
            end = ids.pop()
        return Asked(prompt, prompt_ids, self.decode(ids), [*ids, end] if ids else [], differs)

    # --- text and ids

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The prompt as text: the chat template with the generation prompt; without a template, the contents."""
        if self.tokenizer.chat_template is None:
            if tools:
                raise ValueError("tools need a chat template to describe them, and the tokenizer has none")
            return _plain(messages)
        return self._rendered(messages, tools, generation_prompt=True)

    def prompt_ids(self, text: str, is_plain: bool = False) -> list[int]:
        """The ids of a prompt. One that no chat template rendered is plain, and gets the tokenizer's special tokens."""
        is_plain = is_plain or self.tokenizer.chat_template is None
        ids = self.tokenizer(text, add_special_tokens=is_plain, verbose=False)["input_ids"]
        if self.bos == "add" and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids[1:] if self.bos == "never" and is_plain and self._adds_bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """A completion as text, without the ids that ended it; other special tokens, such as <think>, stay."""
        return completion_text(self.tokenizer, ids, self._ends)

    def _rendered(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                strftime_now=self._today.strftime,
                **options,
            )
        except Exception as error:  # jinja raises what a template's author chose
            raise ValueError(f"the chat template refused these messages: {first_line(error)}") from None


def completion_text(tokenizer: Any, ids: Sequence[int], ends: set[int]) -> str:
    """Ids as text, without those of ``ends`` (end-of-turn marks and padding) that stand last."""
    kept = list(ids)
    while kept and kept[-1] in ends:
        kept.pop()
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def opens_thought(prompt: str) -> bool:
    """Whether a prompt's end leaves a thought open, so that an answer begins inside it."""
    return prompt.rstrip().endswith(THINK)


def whole_turn(prompt: str, completion: str) -> str:
    """An assistant's turn as text: the thought that the prompt's end has opened, if it has, and the completion."""
    return f"{THINK}\n{completion}" if opens_thought(prompt) else completion


def _shared(*sequences: Sequence[Any]) -> int:
    """How many items the sequences have in common from the beginning."""
    differing = (i for i, items in enumerate(zip(*sequences)) if len(set(items)) > 1)
    return next(differing, min(map(len, sequences)))


# --- what must not get lost -------------------------------------------------------------------------------------------


def _plain(messages: Sequence[Message]) -> str:
    """The contents alone, for a tokenizer without a chat template."""
    for message in messages:
        for key in ("tool_calls", *REASONING_KEYS):
            if message.get(key):
                raise ValueError(f"{key} need a chat template that writes them, and the tokenizer has none")
    return "\n\n".join(str(m.get("content") or "") for m in messages)


def _check_kept(messages: Sequence[Message], tools: Sequence[dict[str, Any]], prompt: str) -> None:
    """ValueError if a template leaves out what a prompt must say: instructions, questions, tools and calls of them.

    Earlier reasoning may go: templates drop it on purpose.
    """
    for number, message in enumerate(messages, 1):
        content = str(message.get("content") or "").strip()
        if message["role"] in ("system", "developer", "user") and not _within(content, prompt):
            raise ValueError(f"the chat template leaves out message {number} (role {message['role']})")
        if not all(_within(tool_name(call) or "", prompt) for call in message.get("tool_calls") or ()):
            raise ValueError(f"the chat template leaves out the tool calls of message {number}")
    if not all(_within(tool_name(tool) or "", prompt) for tool in tools):
        raise ValueError("the chat template leaves out the row's tools")


def _has_answer(answer: Message, text: str) -> bool:
    """Whether a rendering holds an answer's text (its thoughts aside), tool calls and reasoning."""
    content = str(answer.get("content") or "").rpartition("</think>")[2].strip()
    calls = [tool_name(call) or "" for call in answer.get("tool_calls") or ()]
    return all(_within(part, text) for part in (content, str(answer.get(REASONING_KEYS[0]) or "").strip(), *calls))


def _within(part: str, text: str) -> bool:
    """Whether a template wrote ``part``, as it is or as JSON."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _traced(answer: Message) -> str | None:
    """Reasoning and answer as they go on after a ``<think>`` that the prompt has opened; None for an answer without reasoning."""
    content, reasoning = str(answer.get("content") or ""), answer.get(REASONING_KEYS[0])
    if reasoning:
        return f"{reasoning.strip()}\n</think>\n\n{content.lstrip()}"
    if content.lstrip().startswith(THINK):
        return content.lstrip().removeprefix(THINK).removeprefix("\n")
    return content if "</think>" in content else None


# --- probes -----------------------------------------------------------------------------------------------------------


def _stop_ids(model: str, tokenizer: Any) -> list[int]:
    """The ids that generation_config.json and the tokenizer name as ends."""
    config = identity.read_json(model, "generation_config.json")
    return ids_in(config.get("eos_token_id"), tokenizer.eos_token_id)


def _probe(prompts: Prompts, stops: Sequence[int], model: str) -> TemplateFacts:
    """Ask the template about a question and an answer, and look at what it writes around the answer."""
    tokenizer = prompts.tokenizer
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}
    render, generation_prompt, before, mark, after, trims = prompts._rendered, "", "", "", "", False
    if tokenizer.chat_template is not None:
        try:
            prompt = render([user], (), True)
            before, mark, after = render([user, answer], (), False).rpartition(_MARK)
            after = after if mark else ""
            spaced = render([user, answer | {"content": f" {_MARK} "}], (), False)
        except ValueError as error:
            raise KDError(f"{model}: a question and an answer cannot be written: {error}") from None
        trims = f" {_MARK} " not in spaced
        asked, left = (
            tokenizer(text.rpartition("?")[2], add_special_tokens=False)["input_ids"]
            for text in (prompt, render([user], (), False))
        )
        generation_prompt = tokenizer.decode(asked[_shared(asked, left) :])
    first_after = tokenizer(after, add_special_tokens=False)["input_ids"]
    added = {token for token, text in tokenizer.added_tokens_decoder.items() if str(text).strip()}
    end = next((token for token in first_after if token in stops or token in added), next(iter(stops), None))
    if end is None:
        raise KDError(f"{model}: neither its chat template nor its tokenizer names a token that ends an answer")
    bos = tokenizer.bos_token_id
    ids = prompts.prompt_ids(prompt if tokenizer.chat_template is not None else "?")
    return TemplateFacts(
        chat_template=tokenizer.chat_template is not None,
        writes_answers=bool(mark),
        begins_with_bos=bos is not None and ids[:1] == [bos],
        generation_prompt=generation_prompt,
        before_answer=before[len(prompt) :] if before and before.startswith(prompt) else "",
        opens_thought=opens_thought(generation_prompt),
        trims=trims,
        after_answer=after,
        end_of_turn=end,
        end_is_named=end in stops,
        stop_ids=tuple(dict.fromkeys([end, *stops])),
    )


def _named_bos(model: str) -> int | None:
    """The BOS id that config.json itself names: transformers' classes have defaults, which say nothing of the model."""
    config = identity.read_json(model, "config.json")
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if ids := ids_in(part.get("bos_token_id")):
            return ids[0]
    return None


def ids_in(*values: Any) -> list[int]:
    """The token ids in what configurations hold (an id, a list of them, or nothing), each once and in order."""
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
    return sorted({part for part in flat if isinstance(part, int) and not isinstance(part, bool)})


def vocab_table(tokenizer: Any, head_rows: int) -> pa.Table:
    """token_id, token (as the tokenizer shows it), bytes (what it stands for); one row a row of the teacher's head."""
    known = min(len(tokenizer), head_rows)
    tokens: list[str | None] = list(tokenizer.convert_ids_to_tokens(list(range(known))))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    byte_level = _byte_level_alphabet()
    is_byte_level = sum(all(c in byte_level for c in t) for t in tokens if t) > 0.9 * known
    data: list[bytes | None] = []
    for token_id, token in enumerate(tokens):
        if token is None:
            data.append(None)
        elif token_id in special:
            data.append(token.encode())
        elif is_byte_level and all(c in byte_level for c in token):
            data.append(bytes(byte_level[c] for c in token))
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            data.append(bytes([int(token[3:5], 16)]))
        else:
            data.append(token.replace("▁", " ").encode())
    padding = [None] * (head_rows - known)
    return pa.table(
        {
            "token_id": pa.array(range(head_rows), type=pa.int32()),
            "token": pa.array(tokens + padding, type=pa.string()),
            "bytes": pa.array(data + padding, type=pa.binary()),
        }
    )


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes (Radford et al. 2019, GPT-2's encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in printable]
    return alphabet | {chr(256 + i): b for i, b in enumerate(others)}
