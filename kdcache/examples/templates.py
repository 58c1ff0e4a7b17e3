"""All the words that are put around a row. Whoever changes one changes TEMPLATE_VERSION, and so the fingerprint.

``chat`` writes the instruction and its context into a user message for the teacher's chat template. ``alpaca`` writes
the plain text of Stanford Alpaca (Taori et al. 2023), as MiniLLM renders Dolly; it is tokenised without a chat
template.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcache.examples.types import Example

TEMPLATE_VERSION = 1
PROMPT_FORMATS = ("chat", "alpaca")

#: By language: the frame with an input, and the one without.
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

#: By language: what follows the user's message with --reasoning. judge/answers.py finds the answer in what comes back.
REASONING = {
    "en": "Think first, between <think> and </think>. Then give the answer alone, between <answer> and </answer>.",
    "es": "Piensa primero, entre <think> y </think>. Después da solo la respuesta, entre <answer> y </answer>.",
}


def chat(instruction: str, context: str = "", fence: str | None = None) -> str:
    """Return a user message: the instruction, and below it its context, between fences of a language if it is code."""
    if not context:
        return instruction
    return f"{instruction}\n\n```{fence}\n{context.rstrip()}\n```" if fence else f"{instruction}\n\n{context}"


def alpaca(instruction: str, context: str = "", language: str | None = "en") -> str:
    """Return the whole prompt as plain text. A language without a frame of its own gets the English one."""
    with_context, without_context = ALPACA.get(language or "en", ALPACA["en"])
    return (with_context if context else without_context).format(instruction=instruction, input=context)


def with_reasoning(example: Example) -> Example:
    """Return the example with its last user message asking for the reasoning before the answer."""
    *before, last = example.messages
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise ValueError("--reasoning needs a user's message of text at the end of the prompt")
    request = REASONING.get(example.language or "en", REASONING["en"])
    return replace(example, messages=(*before, last | {"content": f"{last['content']}\n\n{request}"}))
