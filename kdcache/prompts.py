"""Chat messages -> exact token ids, as format section "what a completion is" says. Phase two never tokenises again.

Prompt and completion are tokenised apart, never cut out of a joint rendering; a completion ends in one end-of-turn id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdcache.errors import KDError

COMPLETION_POLICY_VERSION = 1


class Prompts:
    """A tokenizer and its chat template, asked in the one way that the cache is made of."""

    def __init__(self, model: str, tokenizer: Any, today: date | None = None):
        self.tokenizer = tokenizer
        self._today = today or date.today()
        self.tells_the_date = any(w in str(tokenizer.chat_template) for w in ("strftime_now", "date_string"))
        self.end_of_turn = _end_of_turn(model, tokenizer)

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

    def prompt_ids(self, rendered: str) -> list[int]:
        special = self.tokenizer.chat_template is None
        return self.tokenizer(rendered, add_special_tokens=special, verbose=False)["input_ids"]

    def completion_ids(self, completion: str) -> list[int]:
        """The completion by itself, without special tokens, then exactly one end-of-turn id."""
        ids = self.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        while ids and ids[-1] == self.end_of_turn:
            ids.pop()
        return [*ids, self.end_of_turn] if ids else []

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _end_of_turn(model: str, tokenizer: Any) -> int:
    """The id of generation_config.eos_token_id that the chat template emits, else the tokenizer's eos."""
    stops: set[int] = set()
    config = Path(model) / "generation_config.json"
    if config.is_file():
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        stops = set(eos if isinstance(eos, list) else [eos] if eos is not None else [])
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
