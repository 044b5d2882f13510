"""A chat endpoint's answer as a turn: whatever JSON it is, it is read, or refused as the endpoint's fault."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_mcp.core.chat import answers_to, read_answer
from art_mcp.errors import EngineError
from art_mcp.types import Reply, Tool, ToolCall, ToolResult, Usage

ADD = Tool("add", "", {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]})
NOW = Tool("now", "", {"type": "object", "properties": {}})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FUNCTION = st.fixed_dictionaries({}, optional={"name": JSON | st.just("add"), "arguments": JSON | st.just('{"a": 1}')})
CALL = st.fixed_dictionaries({}, optional={"id": JSON, "type": JSON, "function": FUNCTION | JSON})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": JSON,
        "content": JSON,
        "refusal": JSON,
        "reasoning": JSON,
        "reasoning_content": JSON,
        "tool_calls": st.lists(CALL | JSON, max_size=3) | JSON,
    },
)
CHOICE = st.fixed_dictionaries({}, optional={"finish_reason": JSON, "message": MESSAGE | JSON})
USAGE = st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens", "prompt_tokens_details", "cost"]), JSON)
ANSWER = st.fixed_dictionaries({}, optional={"choices": st.lists(CHOICE | JSON, max_size=2) | JSON, "usage": USAGE | JSON})


@given(ANSWER | JSON)
def test_any_json_is_a_turn_or_an_engine_error(answer):
    try:
        reply = read_answer(answer, (ADD, NOW))
    except EngineError:
        return
    assert isinstance(reply, Reply)
    assert isinstance(reply.message["content"], str)
    assert len(reply.calls) == len(reply.sent.get("tool_calls", []))
    told = answers_to(reply.sent, [ToolResult("x")] * len(reply.calls)) if reply.calls else []
    assert all(one["tool_call_id"] and None not in one.values() for one in told)
    made = [call for call in reply.calls if isinstance(call, ToolCall)]
    assert [call["id"] for call in reply.message.get("tool_calls", ())] == [call.id for call in made]


def answer(message, usage=None):
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


@pytest.mark.parametrize("arguments", ["", " ", None, "{}", {}])
def test_no_arguments_are_an_empty_object(arguments):
    call = {"id": "x", "function": {"name": "now", "arguments": arguments}}
    assert read_answer(answer({"tool_calls": [call]}), (NOW,)).calls == (ToolCall("now", {}, "x"),)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "a"}, "a"),
        ({"content": None}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": None, "refusal": "I won't."}, "I won't."),
    ],
)
def test_what_was_said_is_text(message, text):
    assert read_answer(answer(message), ()).message == {"role": "assistant", "content": text}


def test_a_tool_call_in_the_text_is_text():
    said = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    reply = read_answer(answer({"content": said}), (NOW,))
    assert (reply.calls, reply.message["content"]) == ((), said)


def test_usage_is_read_where_it_is_there():
    counted = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    assert read_answer(answer({"content": "a"}, counted), ()).usage == Usage(3, 2, 1)
    assert read_answer(answer({"content": "a"}, {**counted, "cost": 0.5}), ()).usage == Usage(3, 2, 1, 0.5)
    assert read_answer(answer({"content": "a"}), ()).usage is None


@pytest.mark.parametrize("name", [{}, {"name": None}, {"name": ""}, {"name": 5}])
def test_a_call_without_a_name_is_answered_without_one(name):
    reply = read_answer(answer({"tool_calls": [{"id": "x", "function": {**name, "arguments": "{}"}}]}), (NOW,))
    assert answers_to(reply.sent, [ToolResult("no")]) == [{"role": "tool", "tool_call_id": "x", "content": "no"}]
