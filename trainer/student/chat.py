"""Talk to a student: its answer as it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from kdcache import machine
from kdcache.bounds import check_sampling
from kdcache.errors import KDError, first_line
from kdcache.models import identity
from kdcache.prompts.tokenize import Prompts
from trainer.distill.plan import RUN_FILE
from trainer.student.load import load_student, stop_ids


class _Streamer(TextIteratorStreamer):
    """An answer's text as it comes, without the prompt and without the id that ends it; tags that are special tokens stay."""

    def __init__(self, tokenizer: Any, stops: list[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._stops = torch.tensor(stops)

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        kept = value[~torch.isin(value, self._stops.to(value.device))]
        if len(kept):
            super().put(kept)


class Conversation:
    """Keeps the turns; ``answer`` yields pieces of text."""

    def __init__(
        self, student: str, system: str | None, temperature: float, max_new_tokens: int, bos: str | None = None
    ):
        """``bos``: as in kdcache.prompts.tokenize.BOS; None: as the student's training was told, where it was."""
        check_sampling(temperature, None)
        self.model, self.tokenizer = load_student(student, "float32" if machine.torch_device() == "cpu" else "auto")
        self.model.to(machine.torch_device()).eval()
        folder = identity.model_folder(student)
        bos = bos or identity.read_json(folder, RUN_FILE).get("bos") or "auto"
        self.prompts = Prompts(folder, self.tokenizer, bos=bos)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []

    def answer(self, text: str) -> Iterator[str]:
        self.messages.append({"role": "user", "content": text})
        ids = torch.tensor([self.prompts.prompt_ids(self.prompts.render(self.messages))], device=self.model.device)
        stops = stop_ids(self.model, self.tokenizer, self.prompts.facts.stop_ids)
        streamer = _Streamer(self.tokenizer, stops)
        greedy = self.temperature == 0
        arguments = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": not greedy,
            "temperature": None if greedy else self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": 1.0,
            "eos_token_id": stops,
            "pad_token_id": self.prompts.end_of_turn,
            "streamer": streamer,
        }
        failed: list[Exception] = []

        def generate() -> None:
            try:
                self.model.generate(ids, **arguments)
            except Exception as error:
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        thread.join()
        if failed:
            raise KDError(f"the student could not answer: {first_line(failed[0])}")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
