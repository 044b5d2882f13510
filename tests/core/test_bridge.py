"""Turn by turn, a conversation is what its template renders whole; where it is not, the refusal shows the conversation."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from conversations import QWEN, QWEN_SPECIALS, TOOLS, WITH_TOOLS, Conversation, draw, load, reference

from art_mcp.core.bridging import Bridging, check_bridgeable, write
from art_mcp.core.template import ChatTemplate, Unbridgeable
from art_mcp.errors import TemplateError

NAMED = ("glm4moe", "llama3_1", "llama3_2", "qwen2_5", "qwen3_instruct_2507")
NO_CALLS = "the template leaves out 'add'"
NEMOTRONS = [f"nemotron_3_{size}{kind}" for size in ("5_lightning", "nano", "super", "ultra") for kind in ("", "_training")]
REFUSED = {
    "lfm2": NO_CALLS,
    "lfm2_training": NO_CALLS,
}
needs_trl = pytest.mark.skipif(not WITH_TOOLS, reason="trl is not installed: its wheel brings the templates")


def path_of(name: str) -> Path:
    return next(path for path in WITH_TOOLS if path.stem == name)


def turn_by_turn(template: ChatTemplate, conversation: Conversation) -> str:
    """What the spans of a rollout add up to, up to the last stop: opening, then what is written and bridged."""
    messages, tools = list(conversation.opening), conversation.tools
    text = "".join(template.opening_text(messages, tools))
    for reply, following in conversation.turns:
        written, stop = write(template, messages, reply, following=following, tools=tools)
        text += written + (template.bridge_text(reply, following, ended_with=stop) if following else "")
        messages += [reply, *following]
    return text


def agrees(path: Path, conversation: Conversation) -> bool:
    """Whether both ways end in the same text: what the template puts after the last stop aside."""
    template = load(path)
    ending = template.ending(conversation.messages[-1])
    got = turn_by_turn(template, conversation)
    if not ending.closed:
        got = got.removesuffix(ending.stop)
    if "strftime_now" in path.read_text():  # transformers writes today's date, we the one that we were given
        return got + ending.after == template.render(conversation.messages, tools=conversation.tools)
    return got + ending.after == reference(path, conversation.messages, conversation.tools)


def test_qwen_bridges_everything() -> None:
    everything = dict.fromkeys(("text_with_calls", "parallel_calls", "errors", "follow_ups", "without_thoughts"), True)
    assert check_bridgeable(load(QWEN), tools=TOOLS) == Bridging(**everything, refusals=())


def test_qwen_turn_by_turn_is_qwen_rendered_whole() -> None:
    for seed in range(300):
        assert agrees(QWEN, draw(seed, tags=True)), seed


@needs_trl
def test_the_templates_that_must_bridge_do() -> None:
    for name in NAMED:
        bridging = check_bridgeable(load(path_of(name)), tools=TOOLS)
        assert bridging.errors
        assert bridging.follow_ups


@needs_trl
@pytest.mark.parametrize("path", [path for path in WITH_TOOLS if path.stem not in REFUSED], ids=lambda path: path.stem)
def test_a_template_is_exact_in_all_that_its_check_promised(path: Path) -> None:
    features = check_bridgeable(load(path), tools=TOOLS)
    for seed in range(10):
        assert agrees(path, draw(seed, features=features)), seed


@needs_trl
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_template_and_shows_the_shortest_conversation_and_the_place(name: str) -> None:
    with pytest.raises(Unbridgeable) as refusal:
        check_bridgeable(load(path_of(name)), tools=TOOLS)
    message = str(refusal.value)
    assert f"chat template {name!r}" in message
    assert REFUSED[name] in message
    assert len(refusal.value.conversation) <= 3
    for said in refusal.value.conversation:
        assert json.dumps(said) in message
    again = pickle.loads(pickle.dumps(refusal.value))
    assert (str(again), again.expected, again.got) == (message, refusal.value.expected, refusal.value.got)


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", *NEMOTRONS])
def test_a_template_that_is_exact_only_where_every_turn_thinks_is_taken_and_says_so(name: str) -> None:
    bridging = check_bridgeable(load(path_of(name)), tools=TOOLS)
    assert bridging.text_with_calls
    assert bridging.parallel_calls
    assert bridging.errors
    assert not bridging.without_thoughts
    assert "reasoning_content" not in str(bridging.refusals[-1])


@needs_trl
@pytest.mark.parametrize(
    ("name", "feature", "shown"),
    [
        ("llama3_1", "parallel_calls", "line 71: This model only supports single tool-calls at once!"),
        ("llama3_1", "text_with_calls", "leaves out 'Let me look.'"),
        ("gptoss", "errors", "Message has tool role, but there was no previous assistant message with a tool call!"),
        ("gptoss", "follow_ups", "turn by turn:   'return|>"),
        ("gptoss", "parallel_calls", "leaves out 'egret'"),
        ("gemma4", "errors", '"content": "This is no call."'),
        ("qwen3", "without_thoughts", "rendered whole: 'ool_call>"),
        ("qwen3", "follow_ups", "turn by turn:   '<think>\\nA bird, surely."),
        ("nemotron_3_nano", "without_thoughts", "rendered whole: '</think>A wading bird.<|im_end|>"),
        ("qwen3_5_think", "follow_ups", "turn by turn:   '<think>\\n\\n</think>"),
    ],
)
def test_a_feature_that_is_not_exact_is_reported_with_its_conversation(name: str, feature: str, shown: str) -> None:
    bridging = check_bridgeable(load(path_of(name)), tools=TOOLS)
    assert not getattr(bridging, feature)
    assert any(shown in str(refusal) for refusal in bridging.refusals)


def altered(old: str, new: str) -> ChatTemplate:
    source = QWEN.read_text()
    assert old in source
    return ChatTemplate(source.replace(old, new), name="altered", specials=QWEN_SPECIALS)


@pytest.mark.parametrize(
    ("old", "new", "roles"),
    [
        ("start|>assistant\\n'", "start|>assistant\\n<think>'", "user assistant"),
        ("{%- for message in messages %}", "{{- messages | length }}{%- for message in messages %}", "user assistant"),
        ("{{- message.content }}", "{{- message.content if loop.last else '(old)' }}", "user assistant tool assistant"),
        ("<tool_response>\\n'", "<tool_response>\\n' ~ loop.index", "system user assistant tool"),
        ("{%- if tools %}", "{{- 'long' if messages | length > 4 }}{%- if tools %}", "system user assistant tool assistant"),
        ("{{- tool_call.arguments | tojson }}", "{{- '{}' }}", "user assistant"),
        ('{%- elif message.role == "tool" %}', '{%- elif message.role == "result" %}', "user assistant tool"),
    ],
)
def test_a_template_that_looks_beyond_the_turn_is_refused_with_the_shortest_conversation(
    old: str, new: str, roles: str
) -> None:
    with pytest.raises(Unbridgeable) as refusal:
        check_bridgeable(altered(old, new))
    assert " ".join(str(message["role"]) for message in refusal.value.conversation) == roles
    assert refusal.value.template == "altered"


@needs_trl
@pytest.mark.parametrize("name", NEMOTRONS)
def test_a_template_that_opens_thoughts_bridges_once_they_are_switched_off(name: str) -> None:
    template = load(path_of(name))
    switched = ChatTemplate(
        path_of(name).read_text(), name=name, specials=template.specials, variables={"enable_thinking": False}
    )
    assert not check_bridgeable(switched, tools=TOOLS).refusals


RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "5"}
CALL = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_qwens_bridge_holds_the_rest_of_the_turn_all_results_in_one_message_and_the_next_prompt() -> None:
    bridge = load(QWEN).bridge_text(CALLS, [RESULT, {**RESULT, "content": "é\n"}], ended_with="<|im_end|>")
    assert bridge == (
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\né\n\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_what_the_policy_writes_ends_with_its_stop() -> None:
    written = load(QWEN).written([{"role": "user", "content": "2 + 3?"}], CALLS, tools=TOOLS)
    assert written == '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    answer = {"role": "assistant", "content": "Write <|im_end|> or <|im_start|>."}
    assert load(QWEN).written([{"role": "user", "content": "?"}], answer) == "Write <|im_end|> or <|im_start|>.<|im_end|>"


def test_a_turn_that_ended_with_another_stop_token_is_closed_as_the_template_does() -> None:
    for other in ("<|endoftext|>", ""):
        bridge = load(QWEN).bridge_text(CALLS, [RESULT], ended_with=other)
        assert bridge.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n5")


def test_a_turn_ends_with_the_first_of_its_stop_strings() -> None:
    template = altered("'<|im_end|>' + '\\n'", "'<|im_end|><|endoftext|>' + '\\n'")
    answer, user = {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hi"}
    assert template.written([user], answer, stop_strings=("<|endoftext|>", "<|im_end|>")) == "Ho<|im_end|>"


def test_what_depends_on_whether_a_turn_has_text_is_bridged() -> None:
    template = altered("{{- '<|im_end|>\\n' }}", "{{- '<|im_end|>\\n' ~ ('(said)' if message.content) }}")
    assert not check_bridgeable(template).refusals


def test_a_template_that_takes_one_call_and_no_error_without_a_call_still_tells_what_came_back() -> None:
    strict = altered(
        '{%- elif message.role == "tool" %}',
        '{%- elif message.role == "tool" %}{% if not messages[1].tool_calls or messages[1].tool_calls | length > 1 %}'
        "{{- raise_exception('one call, please') }}{% endif %}",
    )
    both = {**CALLS, "tool_calls": [CALL, CALL]}
    assert strict.bridge_text(both, [RESULT, RESULT], ended_with="<|im_end|>").count("<tool_response>\n5\n") == 2
    malformed = {"role": "assistant", "content": "add(2"}
    assert strict.bridge_text(malformed, [RESULT], ended_with="<|im_end|>") == (
        "\n<|im_start|>user\n5<|im_end|>\n<|im_start|>assistant\n"
    )


@needs_trl
def test_a_turn_that_the_template_rewrites_later_is_bridged_as_it_was_sampled() -> None:
    template = load(path_of("qwen3_5_think"))
    bridge = template.bridge_text(
        {"role": "assistant", "content": "Ho"}, [{"role": "user", "content": "Hi"}], ended_with="<|im_end|>"
    )
    assert bridge == "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_stop_strings_tell_where_a_turn_ends_when_no_special_tokens_are_known() -> None:
    bare, known = ChatTemplate(QWEN.read_text(), name="bare"), load(QWEN)
    stops = ("<|im_end|>", "<|endoftext|>")
    for seed in range(20):
        for reply, following in draw(seed, tags=True).turns:
            before = [{"role": "user", "content": "?"}]
            assert bare.written(before, reply, stop_strings=stops) == known.written(before, reply)
            if following:
                ended_with = "<|im_end|>"
                expected = known.bridge_text(reply, following, ended_with=ended_with)
                assert bare.bridge_text(reply, following, ended_with=ended_with) == expected
    with pytest.raises(TemplateError, match="chat template 'bare': no known special token ends a turn"):
        bare.written([{"role": "user", "content": "?"}], CALLS)


@needs_trl
def test_glm_hands_over_by_beginning_the_next_message_and_nothing_is_doubled() -> None:
    template, user = load(path_of("glm4moe")), {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Ho"}
    for stops in ((), ("<|endoftext|>", "<|user|>", "<|observation|>")):
        assert template.written([user], CALLS, stop_strings=stops).endswith("</tool_call><|observation|>")
        assert template.written([user], answer, stop_strings=stops) == "\n<think></think>\nHo<|user|>"
    assert template.bridge_text(answer, [user], ended_with="<|user|>") == "\nHi<|assistant|>"
    assert template.bridge_text(answer, [user], ended_with="<|endoftext|>") == "<|user|>\nHi<|assistant|>"
    assert template.bridge_text(CALLS, [RESULT], ended_with="<|observation|>").startswith("\n<tool_response>\n5")


@needs_trl
@pytest.mark.parametrize("path", WITH_TOOLS, ids=lambda path: path.stem)
def test_no_turn_of_a_policy_is_without_a_bridge_that_tells_it_what_came_back(path: Path) -> None:
    template = load(path)
    for seed in range(6):
        for reply, following in draw(seed, tags=True).turns:
            if following:
                told = [{**message, "content": f"result {at}"} for at, message in enumerate(following)]
                bridge = template.bridge_text(reply, told, ended_with=template.ending(CALLS).stop)
                assert all(message["content"] in bridge for message in told)


def test_a_bridge_costs_the_same_however_long_the_reply_is() -> None:
    long = {"role": "assistant", "content": "x" * 100_000, "tool_calls": [CALL]}
    short = {"role": "assistant", "content": "x", "tool_calls": [CALL]}
    template = load(QWEN)
    assert template.bridge_text(long, [RESULT], ended_with="") == template.bridge_text(short, [RESULT], ended_with="")
