"""Chat messages -> exact token ids, as format section "what a completion is" says. Phase two never tokenises again.

Prompt and completion are tokenised apart, never cut out of a joint rendering; a completion ends in one end-of-turn id.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import pyarrow as pa

from kdcache import hashes
from kdcache.errors import KDError, UsageError, first_line

COMPLETION_POLICY_VERSION = 1

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
        self.end_of_turn = _end_of_turn(model, tokenizer)
        self.stop_ids = ids_in(self.end_of_turn, tokenizer.eos_token_id)  # besides those of generation_config

    @property
    def without_bos(self) -> str:
        """What to tell the user where ``lacks_bos``."""
        return (
            f"names a BOS token ({self.tokenizer.convert_ids_to_tokens(self.bos_id)}, id {self.bos_id}), but its tokenizer adds "
            "none and there is no chat template, so prompts begin without it. A model that was trained with BOS answers "
            "rubbish then. Say --bos add if it was, or --bos never if it was not"
        )

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt as text: the chat template with the generation prompt; without a template, the contents."""
        if self.tokenizer.chat_template is None:
            return "\n\n".join(str(m.get("content") or "") for m in messages)
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, strftime_now=self._today.strftime
            )
        except Exception as error:  # jinja raises what a template's author chose
            raise ValueError(f"the chat template refused these messages: {error}") from None

    def prompt_ids(self, text: str, is_plain: bool = False) -> list[int]:
        """The ids of a prompt. One that no chat template rendered is plain, and gets the tokenizer's special tokens."""
        is_plain = is_plain or self.tokenizer.chat_template is None
        ids = self.tokenizer(text, add_special_tokens=is_plain, verbose=False)["input_ids"]
        if self.bos == "add" and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids[1:] if self.bos == "never" and is_plain and self._adds_bos else ids

    def completion_ids(self, completion: str) -> list[int]:
        """The completion by itself, without special tokens, then exactly one end-of-turn id."""
        ids = self.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        while ids and ids[-1] == self.end_of_turn:
            ids.pop()
        return [*ids, self.end_of_turn] if ids else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model folder; KDError in a sentence if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise KDError(f"{model}: its tokenizer could not be loaded: {first_line(error)}") from None


def _end_of_turn(model: str, tokenizer: Any) -> int:
    """The id of generation_config.eos_token_id that the chat template emits, else the tokenizer's eos."""
    stops = set(ids_in(hashes.read_json(model, "generation_config.json").get("eos_token_id")))
    if stops and tokenizer.chat_template is not None:
        mark = "kdcache-probe"
        try:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:
            text = ""
        after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
        for token in after:
            if token in stops:
                return token
    if tokenizer.eos_token_id is None:
        raise KDError(f"{model}: the tokenizer names no end-of-sequence token, so no completion could end")
    return tokenizer.eos_token_id


def _named_bos(model: str) -> int | None:
    """The BOS id that config.json itself names: transformers' classes have defaults, which say nothing of the model."""
    config = hashes.read_json(model, "config.json")
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
