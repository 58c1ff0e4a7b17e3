"""Every shape of chat template: what the teacher is asked is the template's own rendering, token for token."""

import json

import pytest
from transformers import AutoTokenizer

from kdcache.prompts import tokenize as prompts_module
from kdcache.prompts.thoughts import whole_turn
from kdcache.prompts.tokenize import Prompts

#: Written for these tests, in the shapes that model families use.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|/turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NO_GENERATION_PROMPT = CHATML.partition("{% if add_generation_prompt")[0]
TEMPLATES = {
    **{
        "chatml": CHATML,
        "llama3": LLAMA3,
        "mistral": MISTRAL,
        "gemma": GEMMA,
        "qwen tools": QWEN_TOOLS,
        "qwen3": QWEN3,
    },
    **{"deepseek r1": DEEPSEEK_R1, "phi3": PHI3, "zephyr": ZEPHYR, "vicuna": VICUNA},
    "no generation prompt": NO_GENERATION_PROMPT,
}
MARKS = ("<|head|>", "<|/head|>", "<|eot|>", "<|turn|>", "<|/turn|>", "<|end|>", "<|User|>", "<|Assistant|>")
CONVERSATION = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Nile."},
    {"role": "user", "content": "Another?"},
]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima", "day": None}}}


def asks(smollm: str, template: str | None, *special: str) -> Prompts:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS, *special]})
    tokenizer.chat_template = template
    return Prompts(smollm, tokenizer)


def assistant(content: str, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("answer", ["The Amazon.", " The Amazon.\n", "¡El Paraná! 🙂", "```\ncode\n```"])
@pytest.mark.parametrize("shape", TEMPLATES)
def test_prompt_and_completion_are_the_whole_rendering_token_for_token(smollm, shape, answer):
    prompts = asks(smollm, TEMPLATES[shape])
    row = prompts.ask(CONVERSATION, assistant(answer))
    whole = prompts.render_template([*CONVERSATION, assistant(answer)], (), False)
    ids = prompts.tokenizer(whole, add_special_tokens=False)["input_ids"]
    ours = [*row.prompt_ids, *row.completion_ids]
    if row.differs == prompts_module.TOKENS_MERGE:  # the row says why not; the text is the template's all the same
        assert whole.startswith(prompts.tokenizer.decode(ours))
    else:
        assert ids[: len(ours)] == ours and prompts.tokenizer.decode(ids[len(ours) :]).strip() in ("", "<|endoftext|>")


@pytest.mark.parametrize(
    "shape, end",
    [
        *(("chatml", "<|im_end|>"), ("llama3", "<|eot|>"), ("mistral", "<|im_end|>"), ("gemma", "<|/turn|>")),
        *(("phi3", "<|end|>"), ("zephyr", "<|im_end|>"), ("deepseek r1", "<|im_end|>")),
    ],
)
def test_the_mark_that_the_template_writes_after_an_answer_ends_it(smollm, shape, end):
    prompts = asks(smollm, TEMPLATES[shape])
    ids = prompts.ask(CONVERSATION, assistant("The Amazon.")).completion_ids
    assert prompts.tokenizer.convert_ids_to_tokens(ids[-1]) == end and ids.count(ids[-1]) == 1


def test_where_generation_config_and_tokenizer_name_another_end_answers_stop_at_either_and_it_is_said(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.eos_token = "<|endoftext|>"
    prompts = Prompts("no folder", tokenizer)  # no generation_config.json
    assert [tokenizer.convert_ids_to_tokens(i) for i in prompts.facts.stop_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert "<|im_end|> ends it, which generation_config and tokenizer do not name" in prompts.facts.describe(tokenizer)


@pytest.mark.parametrize(
    "shape, fact, value",
    [
        ("chatml", "generation_prompt", "<|im_start|>assistant\n"),
        ("phi3", "generation_prompt", "<|assistant|>\n"),
        ("no generation prompt", "generation_prompt", ""),
        ("mistral", "before_answer", " "),
        ("qwen3", "before_answer", "<think>\n\n</think>\n\n"),
        ("deepseek r1", "opens_thought", True),
        ("qwen3", "opens_thought", False),
        ("llama3", "trims", True),
        ("chatml", "trims", False),
        ("llama3", "begins_with_bos", True),
        ("vicuna", "begins_with_bos", False),
    ],
)
def test_probes_find_what_a_template_does_around_an_answer(smollm, shape, fact, value):
    assert getattr(asks(smollm, TEMPLATES[shape]).facts, fact) == value


def test_a_template_without_a_generation_prompt_gives_the_turns_header_to_the_completion(smollm):
    row = asks(smollm, NO_GENERATION_PROMPT).ask(CONVERSATION, assistant("The Amazon."))
    assert row.completion == "<|im_start|>assistant\nThe Amazon." and row.prompt.endswith("Another?<|im_end|>\n")


def test_thoughts_inside_the_turn_are_part_of_the_completion(smollm):
    row = asks(smollm, QWEN3).ask(CONVERSATION, assistant("The Amazon.", reasoning_content="South America."))
    assert row.completion == "<think>\nSouth America.\n</think>\n\nThe Amazon." and row.differs is None


@pytest.mark.parametrize(
    "answer",
    [assistant("<think>\nHm.\n</think>\n\nThe Amazon."), assistant("The Amazon.", reasoning_content="Hm.")],
    ids=["in the content", "beside it"],
)
def test_a_trace_follows_the_thought_that_the_template_opens_and_no_second_one(smollm, answer):
    row = asks(smollm, DEEPSEEK_R1).ask(CONVERSATION, answer)
    assert row.prompt.endswith("<|Assistant|><think>\n") and row.completion == "Hm.\n</think>\n\nThe Amazon."
    assert row.differs == prompts_module.THOUGHTS_DROPPED


def test_an_answer_without_thoughts_is_asked_for_as_the_template_writes_it_and_the_row_says_so(smollm):
    row = asks(smollm, DEEPSEEK_R1).ask(CONVERSATION, assistant("The Amazon."))
    assert row.prompt.endswith("<|Assistant|>") and row.completion == "The Amazon."
    assert row.differs == prompts_module.NO_GENERATION_PROMPT


def test_a_completion_that_begins_in_an_opened_thought_is_judged_with_it():
    assert whole_turn("<|Assistant|><think>\n", "still thinking") == "<think>\nstill thinking"
    assert whole_turn("<|im_start|>assistant\n", "42") == "42"


def test_tags_that_are_special_tokens_stay_in_a_completion(smollm):
    prompts = asks(smollm, CHATML, "<think>", "</think>", "<answer>", "</answer>")
    text = "<think>Hm.</think><answer>4</answer>"
    ids = prompts.ask(CONVERSATION, assistant(text)).completion_ids
    assert prompts.decode([*ids, prompts.tokenizer.pad_token_id]) == text


def test_tool_calls_and_tools_reach_the_template(smollm):
    row = asks(smollm, QWEN_TOOLS).ask(CONVERSATION[:1], assistant("", tool_calls=[CALL]), [WEATHER])
    assert '"name": "weather"' in row.prompt
    assert json.loads(row.completion.split("\n")[1])["arguments"] == {"city": "Lima", "day": None}


@pytest.mark.parametrize(
    "messages, answer, tools, reason",
    [
        (CONVERSATION, assistant("", tool_calls=[CALL]), [], "leaves out a part of the answer"),
        (CONVERSATION, assistant("x", reasoning_content="Hm."), [], "leaves out a part of the answer"),
        (CONVERSATION, assistant("x"), [WEATHER], "leaves out the row's tools"),
        ([assistant("", tool_calls=[CALL]), *CONVERSATION], None, [], "tool calls of message 1"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(smollm, messages, answer, tools, reason):
    with pytest.raises(ValueError, match=reason):
        asks(smollm, CHATML).ask(messages, answer, tools)


def test_a_template_that_drops_the_system_message_is_refused(smollm):
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(ValueError, match="leaves out message 1"):
        asks(smollm, template).ask([{"role": "system", "content": "Be brief."}, *CONVERSATION])


def test_a_refusal_of_the_template_is_said_in_its_own_words(smollm):
    with pytest.raises(ValueError, match="System role not supported"):
        asks(smollm, GEMMA).ask([{"role": "system", "content": "Be brief."}, *CONVERSATION])


def test_without_a_template_tool_calls_are_refused(smollm):
    with pytest.raises(ValueError, match="tool_calls need a chat template that writes them"):
        asks(smollm, None).ask(CONVERSATION, assistant("", tool_calls=[CALL]))


def test_answers_to_a_template_that_writes_prompts_alone_follow_it_as_they_are(smollm):
    row = asks(smollm, "Q: {{ messages[0].content }} A: ").ask(CONVERSATION[:1], assistant("The Amazon."))
    assert (row.prompt, row.completion) == ("Q: Name a river. A: ", "The Amazon.")
    assert row.completion_ids[-1] == 2 and row.differs in (prompts_module.NO_ANSWERS, prompts_module.TOKENS_MERGE)


def test_an_empty_answer_has_no_ids_whatever_a_template_puts_around_it(smollm):
    assert asks(smollm, QWEN3).ask(CONVERSATION, assistant(" \n")).completion_ids == []
