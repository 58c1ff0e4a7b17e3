"""A GRPOTrainer that takes prompts, verifiers and reasoning traces from the cache instead of text prompts and a reward model.

Prompts are the cache's own token ids. Some answers of a group may be guided: they begin with the first part of a verified
answer (a trace), on which nothing is trained. A group of four, half of it guided:

    position  answer                                       mask of what is trained
    0         [trace, first half][generated ........]      000000 1111111111
    1         [trace, first half][generated ......]        000000 11111111
    2         [generated ...............]                  111111111111111
    3         [generated ...........]                      11111111111

The guided share falls to none as the running mean of unguided answers that are right rises to one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdcache.judge.sandbox import Sandbox
from kdcache.prompts.thoughts import whole_turn
from kdcache.prompts.tokenize import completion_text
from trainer.grpo import rewards
from trainer.grpo.plan import GrpoRun
from trainer.run.trainer import RunTrainer

if TYPE_CHECKING:
    from trl import GRPOTrainer as Base
else:
    Base = object  # importing TRL imports vLLM where it is installed: ``trainer_class`` decides when that may be

GUIDED_SHARE = 0.5  # of a group, at first
GUIDED_PART = 0.5  # of a trace
SUCCESS_MEMORY = 0.9  # weight of earlier steps in the running mean of unguided answers that are right


def trainer_class(use_vllm: bool) -> Any:
    """Return TRL's trainer on the cache. TRL imports vLLM wherever it is installed; here only if vLLM will generate."""
    from trl import import_utils

    is_vllm_available = import_utils.is_vllm_available
    if not use_vllm:
        import_utils.is_vllm_available = lambda *_, **__: False
    try:
        from trl import GRPOTrainer
    finally:
        import_utils.is_vllm_available = is_vllm_available
    return type("CachedGRPO", (RunTrainer, FromCache, GRPOTrainer), {})


class FromCache(Base):
    """What is changed in GRPOTrainer: prompts are the cache's ids, rewards its verifiers', and answers may be guided."""

    def __init__(self, run: GrpoRun, sandbox: Sandbox | None, stops: Sequence[int], **kwargs: Any):
        self.prompts_by_text = {prompt.text: prompt for prompt in run.prompts}
        self.run_config, self.sandbox, self.stops = run.config, sandbox, set(stops)
        self.success = 0.0  # running mean of unguided answers that are right
        self._guided: list[list[int]] = []  # the prefix of each answer of the last generation
        self._judged: list[rewards.Judged] = []
        functions: list[Any] = [self.correctness, self.form]
        super().__init__(reward_funcs=functions, **kwargs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.prompts_by_text[text].ids) for text in prompts], None, {}

    def _is_training(self) -> bool:
        return self.model is not None and self.model.training

    # --- guided answers

    def guided_share(self) -> float:
        """Return the guided share of a group's answers: none once half of the unguided ones are right."""
        return 0.0 if self.run_config.guide is None else GUIDED_SHARE * max(0.0, 1.0 - 2.0 * self.success)

    def _prefixes(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what each answer to be generated begins with: the first part of a trace, or nothing.

        ``texts`` are the prompts of the answers. Equal prompts that follow each other are a group.
        """
        share, prefixes, position = self.guided_share(), list[list[int]](), 0
        answers: Any = self.num_generations
        for number, text in enumerate(texts):
            position = position + 1 if number and texts[number - 1] == text else 0
            traces = self.prompts_by_text[text].traces
            guided = traces and position % answers < round(share * answers)
            trace = traces[(self.state.global_step + position) % len(traces)] if guided else []
            prefixes.append(trace[: int(len(trace) * GUIDED_PART)])
        return prefixes

    def _generate(self, prompts: list[str]) -> Any:
        training = self._is_training()
        self._guided = self._prefixes(prompts) if training else [[] for _ in prompts]
        generated = list(super()._generate(prompts))  # prompt ids, completion ids, mask of what is trained, ...
        if any(self._guided):  # 0 for a prefix: no loss, no gradient
            generated[2] = [[0] * len(p) + [1] * (len(ids) - len(p)) for p, ids in zip(self._guided, generated[1])]
        return tuple(generated)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        begun = [[*ids, *prefix] for ids, prefix in zip(prompt_ids, self._guided)]
        completions, logprobs = super()._generate_single_turn(begun, *args, **kwargs)
        return [[*prefix, *ids] for prefix, ids in zip(self._guided, completions)], logprobs

    # --- rewards, each logged under its name

    def correctness(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """Return 1 for each answer that is right. TRL calls this before ``form``, so that it judges for both."""
        rows = [self.prompts_by_text[text] for text in prompts]
        # TRL's texts lack tags that are special tokens, such as <think>, so that ids are decoded here.
        texts = [completion_text(self.processing_class, ids, self.stops) for ids in completion_ids]
        self._judged = rewards.judge(
            [whole_turn(prompt, text) for prompt, text in zip(prompts, texts)],
            [(row.judges, row.reasoned) for row in rows],
            [self._finished(ids) for ids in completion_ids],
            self.sandbox,
        )
        if self._is_training():
            self._remember([j.correctness for j, prefix in zip(self._judged, self._guided) if not prefix])
        return [judged.correctness for judged in self._judged]

    def form(self, **_: Any) -> list[float]:
        """Return 1 for each answer in the form that its prompt asks for."""
        return [judged.form for judged in self._judged]

    def _finished(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[-1] in self.stops

    def _remember(self, unguided: Sequence[float]) -> None:
        """Update and log the running mean of all ranks' unguided answers that are right. Resuming reads it from the log."""
        sums = torch.tensor([sum(unguided), float(len(unguided))], device=self.accelerator.device)
        right, count = self.accelerator.reduce(sums, "sum").tolist()
        if count:
            self.success = SUCCESS_MEMORY * self.success + (1 - SUCCESS_MEMORY) * right / count
        self._metrics["train"]["success"].append(self.success)
