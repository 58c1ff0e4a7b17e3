"""The words put around a row: the one place that has them. Changing any changes TEMPLATE_VERSION, and so the fingerprint.

``chat`` puts the instruction (and what it is about) into a user message for the teacher's chat template. ``alpaca`` is
the plain text of Stanford Alpaca (Taori et al. 2023), as MiniLLM renders Dolly, tokenised without a chat template.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcache.examples.types import Example

TEMPLATE_VERSION = 1
PROMPT_FORMATS = ("chat", "alpaca")

#: By language: with an input, and without.
ALPACA = {
    "en": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "es": (
        "A continuación hay una instrucción que describe una tarea, junto con una entrada que aporta más contexto. "
        "Escribe una respuesta que cumpla adecuadamente lo que se pide.\n\n"
        "### Instrucción:\n{instruction}\n\n### Entrada:\n{input}\n\n### Respuesta:\n",
        "A continuación hay una instrucción que describe una tarea. "
        "Escribe una respuesta que cumpla adecuadamente lo que se pide.\n\n"
        "### Instrucción:\n{instruction}\n\n### Respuesta:\n",
    ),
}

BUG_FIX = "This {language} program has a bug. Answer with the whole corrected program and nothing else."
BUG_FIX_DESCRIBED = (
    "This {language} program has a bug. It should solve the problem below. "
    "Answer with the whole corrected program and nothing else.\n\nProblem:\n{description}"
)
DOCSTRING = "Write the docstring of this Python function: its text alone, without quotes and without the code."

#: By language. What follows the user's message under --reasoning; judge/answers.py reads the answer back.
REASONING = {
    "en": "Think first, between <think> and </think>. Then give the answer alone, between <answer> and </answer>.",
    "es": "Piensa primero, entre <think> y </think>. Después da solo la respuesta, entre <answer> y </answer>.",
}


def chat(instruction: str, input: str = "", fence: str | None = None) -> str:
    """A user message: the instruction and, if any, its input below it; code stands between fences."""
    if not input:
        return instruction
    return f"{instruction}\n\n```{fence}\n{input.rstrip()}\n```" if fence else f"{instruction}\n\n{input}"


def alpaca(instruction: str, input: str = "", language: str | None = "en") -> str:
    """The whole prompt as plain text; other languages than Spanish have the English frame."""
    with_input, without = ALPACA.get(language or "en", ALPACA["en"])
    return (with_input if input else without).format(instruction=instruction, input=input)


def with_reasoning(example: Example) -> Example:
    """The example with its last user message asking for the reasoning before the answer."""
    *before, last = example.messages
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise ValueError("--reasoning needs a user's message of text at the end of the prompt")
    asked = REASONING.get(example.language or "en", REASONING["en"])
    return replace(example, messages=(*before, last | {"content": f"{last['content']}\n\n{asked}"}))
