"""Messages -> exact ids; the vocabulary says what each id stands for."""

import pytest
from transformers import AutoTokenizer

from kdcache.prompts.tokenize import Prompts
from kdcache.prompts.vocabulary import vocab_table


@pytest.fixture(scope="module")
def prompts(smollm):
    return Prompts(smollm, AutoTokenizer.from_pretrained(smollm))


def completion_ids(prompts, text):
    return prompts.ask([{"role": "user", "content": "Hi"}], {"role": "assistant", "content": text}).completion_ids


def test_a_completion_ends_in_exactly_one_end_of_turn(prompts):
    ids = completion_ids(prompts, "Hello there.")
    assert ids[-1] == prompts.end_of_turn == 2 and ids.count(2) == 1
    assert completion_ids(prompts, "Hello there.<|im_end|>") == ids
    assert prompts.decode(ids) == "Hello there."


def test_an_empty_completion_has_no_ids(prompts):
    assert completion_ids(prompts, "") == []


def test_the_prompt_is_the_template_with_the_generation_prompt_and_no_second_bos(prompts):
    text = prompts.render([{"role": "user", "content": "Hi"}])
    ids = prompts.prompt_ids(text)
    assert text.endswith("<|im_start|>assistant\n") and "SmolLM" in text
    assert prompts.tokenizer.decode(ids) == text and ids[:2] == [1, *prompts.tokenizer("system")["input_ids"]]


def test_earlier_turns_are_prompt(prompts):
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert "assistant\nb<|im_end|>" in prompts.render(turns)


def test_the_bytes_of_the_vocabulary_spell_the_text(prompts):
    table = vocab_table(prompts.tokenizer, 49160)
    data = table["bytes"].to_pylist()
    text = "¡Año nuevo! 三 🙂\n\tdef f(): pass"
    assert b"".join(data[i] for i in completion_ids(prompts, text)[:-1]) == text.encode()
    assert table.num_rows == 49160 and data[-1] is None and data[2] == b"<|im_end|>"
