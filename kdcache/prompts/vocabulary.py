"""The tokens of a tokenizer as a table, and token ids as configurations hold them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def ids_in(*values: Any) -> list[int]:
    """Return the token ids in configuration values (an id, a list of them, or None), each once and sorted."""
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
    return sorted({part for part in flat if isinstance(part, int) and not isinstance(part, bool)})


def vocab_table(tokenizer: Any, head_rows: int) -> pa.Table:
    """Return token_id, token (as the tokenizer shows it) and bytes (its text), one row per row of the head."""
    size = min(len(tokenizer), head_rows)
    tokens: list[str | None] = list(tokenizer.convert_ids_to_tokens(list(range(size))))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    byte_level = _byte_level_alphabet()
    is_byte_level = sum(all(c in byte_level for c in t) for t in tokens if t) > 0.9 * size
    data: list[bytes | None] = []
    for token_id, token in enumerate(tokens):
        if token is None:
            data.append(None)
        elif token_id in special:
            data.append(token.encode())
        elif is_byte_level and all(c in byte_level for c in token):
            data.append(bytes(byte_level[c] for c in token))
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # SentencePiece's single bytes
            data.append(bytes([int(token[3:5], 16)]))
        else:
            data.append(token.replace("▁", " ").encode())
    padding = [None] * (head_rows - size)
    return pa.table(
        {
            "token_id": pa.array(range(head_rows), type=pa.int32()),
            "token": pa.array(tokens + padding, type=pa.string()),
            "bytes": pa.array(data + padding, type=pa.binary()),
        }
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level BPE writes for it (Radford et al. 2019, GPT-2's encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in printable]
    return alphabet | {chr(256 + i): b for i, b in enumerate(others)}
