"""Messages as tables hold them: everything they say reaches the template, or the row is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.examples.load import load
from kdcache.examples.types import BadRow, Columns, Example

QUESTION = {"role": "user", "content": "Is it raining in Lima?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
PARSED = CALL | {"function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read(path, *rows, parquet=False) -> list:
    if parquet:
        pq.write_table(pa.Table.from_pylist(list(rows)), path / "rows.parquet")
        return load(str(path / "rows.parquet"), Columns())
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(str(path / "rows.jsonl"), Columns())


def example(path, **row) -> Example:
    [result] = read(path, row)
    assert isinstance(result, Example), result
    return result


@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "JSON as text"])
def test_a_last_turn_that_is_a_tool_call_is_the_answer_and_tools_come_along(tmp_path, as_text):
    messages, tools = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}], [TOOL]
    if as_text:
        messages, tools = json.dumps(messages), [json.dumps(tool) for tool in tools]
    result = example(tmp_path, messages=messages, tools=tools)
    assert result.messages == (QUESTION,) and result.completion is None and result.tools == (TOOL,)
    assert result.answer == {"role": "assistant", "content": "", "tool_calls": [PARSED]}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_answer_stays_with_it(tmp_path, key):
    result = example(tmp_path, messages=[QUESTION, {"role": "assistant", "content": "No.", key: "It is a desert."}])
    assert result.completion == "No." and result.answer["reasoning_content"] == "It is a desert."


@pytest.mark.parametrize("theirs", ["gpt", "model", "Assistant", "bot"])
def test_roles_of_other_formats_get_their_usual_names(tmp_path, theirs):
    result = example(tmp_path, messages=[{"role": "human", "content": "?"}, {"role": theirs, "content": "No."}])
    assert result.messages == ({"role": "user", "content": "?"},) and result.completion == "No."


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "river."}]
    assert example(tmp_path, messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "Name a river."


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"role": "user", "content": [{"type": "image", "url": "x.png"}]}, "a part that is no text (image)"),
        ({"role": "judge", "content": "x"}, "message 1 has the role 'judge'"),
        ({"role": "user", "content": 5}, "content is int"),
        ({"role": "user", "content": "x", "tool_calls": [{"type": "function"}]}, "not a list of calls with names"),
        ({"role": "assistant", "content": "x", "reasoning": ["x"]}, "its reasoning is list"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(tmp_path, message, reason):
    [result] = read(tmp_path, {"messages": [message, QUESTION]})
    assert isinstance(result, BadRow) and reason in result.reason


def test_nulls_that_arrow_puts_into_call_arguments_are_left_out_and_those_of_json_stay(tmp_path):
    def row(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    rows = [row({"a": 1}), row({"b": 2})]
    from_arrow = [e.answer["tool_calls"][0]["function"]["arguments"] for e in read(tmp_path, *rows, parquet=True)]
    assert from_arrow == [{"a": 1}, {"b": 2}]
    [from_json] = read(tmp_path, row({"a": None}))
    assert from_json.answer["tool_calls"][0]["function"]["arguments"] == {"a": None}
