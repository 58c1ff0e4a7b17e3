"""trl.GRPOTrainer with the cache's prompts, verifiers and reasoning in the place of text, reward models and nothing.

Prompts are the cache's own token ids. Some answers of a group may be guided: they begin with the first part of a verified one,
on which nothing is trained; the share of them falls as answers without a guide come right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback

from kdcache.judge.sandbox import Sandbox
from kdcache.prompts.thoughts import whole_turn
from kdcache.prompts.tokenize import completion_text
from trainer.grpo import rewards
from trainer.grpo.train import GrpoRun
from trainer.run import parallel

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object  # TRL imports vLLM where it is installed: ``grpo.trainer_class`` says when it may

GUIDED_SHARE, GUIDED_PART = 0.5, 0.5  # of a group at first; of a trace
SUCCESS_MEMORY = 0.9  # of the running mean of unguided answers that are right


class FromCache(Base):
    """What stands before GRPOTrainer in a class of both: its prompts are the cache's ids, its rewards verifiers', and its answers may be guided."""

    def __init__(self, run: GrpoRun, sandbox: Sandbox | None, stops: Sequence[int], **kwargs: Any):
        self.prompts_by_text = {prompt.text: prompt for prompt in run.prompts}
        self.run_config, self.sandbox, self.stops = run.config, sandbox, set(stops)
        self.success = 0.0  # running mean of unguided answers that are right
        self._guided: list[list[int]] = []  # the prefix of each answer of the last generation
        self._judged: list[rewards.Judged] = []
        functions: list[Any] = [self.correctness, self.form, *([self.likeness] if run.config.teacher_weight else [])]
        super().__init__(reward_funcs=functions, **kwargs)
        self.remove_callback(PrinterCallback)

    def create_accelerator_and_postprocess(self) -> None:
        parallel.prepare(self.args)
        super().create_accelerator_and_postprocess()
        parallel.check(self.args, self.accelerator)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, parallel.without_tied(self.model, state_dict))

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.prompts_by_text[text].ids) for text in prompts], None, {}

    def _is_training(self) -> bool:
        return self.model is not None and self.model.training

    # --- guiding

    def guided_share(self) -> float:
        """Of a group's answers: falls to none as half of the unguided ones come right."""
        return 0.0 if self.run_config.guide is None else GUIDED_SHARE * max(0.0, 1.0 - 2.0 * self.success)

    def _prefixes(self, texts: Sequence[str]) -> list[list[int]]:
        """For each answer to be generated, the first part of a verified one, or nothing; a group is a run of equal prompts."""
        share, found, position = self.guided_share(), list[list[int]](), 0
        answers: Any = self.num_generations
        for number, text in enumerate(texts):
            position = position + 1 if number and texts[number - 1] == text else 0
            traces = self.prompts_by_text[text].traces
            guided = traces and position % answers < round(share * answers)
            trace = traces[(self.state.global_step + position) % len(traces)] if guided else []
            found.append(trace[: int(len(trace) * GUIDED_PART)])
        return found

    def _generate(self, prompts: list[str]) -> Any:
        training = self._is_training()
        self._guided = self._prefixes(prompts) if training else [[] for _ in prompts]
        found = list(super()._generate(prompts))
        if any(self._guided):  # 0 for what was given: no loss, no gradient
            found[2] = [[0] * len(p) + [1] * (len(ids) - len(p)) for p, ids in zip(self._guided, found[1])]
        return tuple(found)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        begun = [[*ids, *prefix] for ids, prefix in zip(prompt_ids, self._guided)]
        completions, logprobs = super()._generate_single_turn(begun, *args, **kwargs)
        return [[*prefix, *ids] for prefix, ids in zip(self._guided, completions)], logprobs

    # --- rewards, each logged by its name

    def correctness(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """1 for an answer that is right. Judges the batch; ``form`` is asked after it."""
        asked = [self.prompts_by_text[text] for text in prompts]
        # Decoded here: TRL leaves out tags that are special tokens, such as <think>.
        texts = [completion_text(self.processing_class, ids, self.stops) for ids in completion_ids]
        self._judged = rewards.judge(
            [whole_turn(prompt, text) for prompt, text in zip(prompts, texts)],
            [(prompt.judges, prompt.reasoned) for prompt in asked],
            [self._finished(ids) for ids in completion_ids],
            self.sandbox,
        )
        if self._is_training():
            self._remember([j.correctness for j, prefix in zip(self._judged, self._guided) if not prefix])
        return [judged.correctness for judged in self._judged]

    def _finished(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] in self.stops

    def _remember(self, alone: Sequence[float]) -> None:
        """The share of all ranks' unguided answers that are right; it is logged, and by that found again on resuming."""
        found = torch.tensor([sum(alone), float(len(alone))], device=self.accelerator.device)
        right, count = self.accelerator.reduce(found, "sum").tolist()
        if count:
            self.success = SUCCESS_MEMORY * self.success + (1 - SUCCESS_MEMORY) * right / count
        self._metrics["train"]["success"].append(self.success)

    def form(self, **_: Any) -> list[float]:
        return [judged.format for judged in self._judged]

    def likeness(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """What the cached teacher thinks of each answer, as far as the cache knows; asked for by --teacher-weight."""
        return [
            rewards.likeness(ids, self.prompts_by_text[text].cached) if self._finished(ids) else 0.0
            for text, ids in zip(prompts, completion_ids)
        ]
