"""Talk to a student, and see each answer while it is generated."""

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
from kdcache.storage import folders
from trainer.student.load import load_student, stop_ids


class _Streamer(TextIteratorStreamer):
    """Yields an answer's text piece by piece, without the prompt and without the ids that end an answer.

    Other special tokens stay, because tags around a line of thought may be special tokens.
    """

    def __init__(self, tokenizer: Any, stops: list[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._stops = torch.tensor(stops)

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        ids = value[~torch.isin(value, self._stops.to(value.device))]
        if len(ids):
            super().put(ids)


class Conversation:
    """A conversation with a student, which remembers all turns.

    Args:
        student: a folder, a Hub id or ``embedded``.
        system: the system prompt; None for none.
        temperature: 0 is greedy.
        bos: as in kdcache.prompts.tokenize.BOS. None: as in the student's training, if it was trained by kd.
    """

    def __init__(
        self, student: str, system: str | None, temperature: float, max_new_tokens: int, bos: str | None = None
    ):
        check_sampling(temperature, None)
        self.model, self.tokenizer = load_student(student, "float32" if machine.torch_device() == "cpu" else "auto")
        self.model.to(machine.torch_device()).eval()
        folder = identity.model_folder(student)
        bos = bos or identity.read_json(folder, folders.RUN.marker).get("bos") or "auto"
        self.prompts = Prompts(folder, self.tokenizer, bos=bos)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to the user's next turn in pieces of text. KDError if the student fails."""
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
        errors: list[Exception] = []  # of the thread

        def generate() -> None:
            try:
                self.model.generate(ids, **arguments)
            except Exception as error:
                errors.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        thread.join()
        if errors:
            raise KDError(f"the student could not answer: {first_line(errors[0])}")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
