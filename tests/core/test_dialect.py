"""Tokens in, tokens out: what a policy writes in its template's form is read, and rendered back, as just what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
from conversations import QWEN, QWEN_SPECIALS, TEXTS, TOOLS, WITH_TOOLS, draw, load, reference
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from art_mcp.core.dialect import TemplateDialect
from art_mcp.core.parse import parse_calls
from art_mcp.core.template import ChatTemplate
from art_mcp.types import Malformed, ToolCall

OPEN_TOOLS = tuple(replace(tool, parameters={"type": "object", "additionalProperties": True}) for tool in TOOLS)
USER = {"role": "user", "content": "Why?"}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": "5"}


class Bytes:
    """A byte-level BPE tokenizer as a ports.Tokenizer, which counts what it is asked to encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encoded: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.encoded.append(text)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def id(self, token: str) -> int:
        return self.tokenizer.token_to_id(token)


@cache
def trained(*specials: AddedToken | str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=list(specials), show_progress=False)
    tokenizer.train_from_iterator([load(QWEN).prompt([USER], TOOLS), *TEXTS] * 3, trainer)
    return tokenizer


def path_of(name: str) -> Path:
    return next(path for path in WITH_TOOLS if path.stem == name)


def qwen(*, prompted: str = "", lenient: bool = False) -> tuple[TemplateDialect, Bytes]:
    """Qwen2.5's dialect, whose generation prompt ends with what is `prompted`."""
    tokenizer = Bytes(trained(*QWEN_SPECIALS))
    stops = [tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")]
    source = QWEN.read_text().replace("start|>assistant\\n'", f"start|>assistant\\n{prompted}'")
    template = ChatTemplate(source, specials=QWEN_SPECIALS)
    assert template.prompt([USER]).endswith("assistant\n" + prompted.replace("\\n", "\n"))
    return TemplateDialect(tokenizer, template, stop_token_ids=stops, parse=partial(parse_calls, lenient=lenient)), tokenizer


def test_the_spans_of_a_rollout_decode_to_the_rendering_of_what_was_read_from_them() -> None:
    dialect, tokenizer = qwen()
    for seed in range(150):
        conversation = draw(seed)
        messages, tools = list(conversation.opening), OPEN_TOOLS
        shared, rest = dialect.opening(messages, tools)
        tokens = shared + rest
        for reply, following in conversation.turns:
            sampled = dialect.written(messages, reply, tools)
            assert sampled[-1] == tokenizer.id("<|im_end|>")
            message, _ = dialect.read(sampled, tools)
            tokens += sampled + (dialect.bridge(message, following, sampled[-1]) if following else [])
            messages += [message, *following]
        assert tokenizer.decode(tokens) + "\n" == reference(QWEN, messages, tools), seed


def test_every_call_is_read_with_its_arguments_and_an_id_of_its_own() -> None:
    dialect, _ = qwen()
    seen = 0
    for seed in range(60):
        for reply, _following in draw(seed).turns:
            message, calls = dialect.read(dialect.written([USER], reply, OPEN_TOOLS), OPEN_TOOLS)
            made = reply.get("tool_calls", [])
            assert [(call.name, call.arguments) for call in calls if isinstance(call, ToolCall)] == [
                (each["function"]["name"], each["function"]["arguments"]) for each in made
            ]
            assert message.get("tool_calls", []) == made
            assert message["content"] == reply["content"]
            assert len({call.id for call in calls if isinstance(call, ToolCall)}) == len(made)
            seen += len(made)
    assert seen > 50


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Just text.\n",
        "<tool_call>\n{broken\n</tool_call>",
        "Well:\n<tool_call>\n{broken\n</tool_call>\n<tool_call>\n\n</tool_call>",
        "Well: <tool_call>\n{broken\n</tool_call>\n\n and that was it\n",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{broken\n</tool_call>\n<tool_call>\n{"name": "add", "arguments": {"a": "é </tool_call>"}}\n</tool_call>',
        'One.\n\n<tool_call>\n{"name": "add", "arguments": {"a": [1, {"b": null}]}}\n</tool_call>',
        "no end </tool_call> <tool_response>",
    ],
)
@pytest.mark.parametrize("stop", ["<|im_end|>", ""])
def test_what_was_sampled_is_rendered_back_as_it_was_also_where_calls_are_malformed(text: str, stop: str) -> None:
    dialect, tokenizer = qwen()
    message, _ = dialect.read(tokenizer.encode(text + stop), OPEN_TOOLS)
    rendered = reference(QWEN, [USER, dict(message)], OPEN_TOOLS)
    assert rendered == load(QWEN).prompt([USER], OPEN_TOOLS) + text + "<|im_end|>\n"


def test_a_malformed_call_after_a_good_one_is_not_lost() -> None:
    dialect, tokenizer = qwen()
    text = 'So\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>\n<tool_call>\n{broken\n</tool_call><|im_end|>'
    message, calls = dialect.read(tokenizer.encode(text), OPEN_TOOLS)
    assert [type(call) for call in calls] == [ToolCall, Malformed]
    assert message["content"] == "So\n<tool_call>\n{broken\n</tool_call>"
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add"]


def test_a_bridge_tokenizes_nothing_but_what_is_new() -> None:
    dialect, tokenizer = qwen()
    reply, _ = dialect.read(tokenizer.encode('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'), OPEN_TOOLS)
    tokenizer.encoded.clear()
    tokens = dialect.bridge(reply, [RESULT], tokenizer.id("<|im_end|>"))
    assert tokenizer.encoded == [tokenizer.decode(tokens)]
    assert tokenizer.encoded == ["\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"]
    closed = dialect.bridge(reply, [RESULT], tokenizer.id("<|endoftext|>"))
    assert tokenizer.decode(closed) == "<|im_end|>" + tokenizer.encoded[0]


def test_openings_are_the_tokens_of_the_prompt_and_share_their_first_part() -> None:
    dialect, tokenizer = qwen()
    parts = [dialect.opening([{"role": "user", "content": text}], TOOLS) for text in TEXTS]
    for text, (shared, rest) in zip(TEXTS, parts, strict=True):
        assert shared + rest == tokenizer.encode(load(QWEN).prompt([{"role": "user", "content": text}], TOOLS))
        assert shared == parts[0][0]
        assert len(shared) > 200
    tokenizer.encoded.clear()
    dialect.opening([USER], TOOLS)
    assert tokenizer.encoded == ["user\nWhy?<|im_end|>\n<|im_start|>assistant\n"]


def test_an_opening_is_not_cut_where_the_tokenizer_would_join_its_parts() -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    greedy = Bytes(trained(AddedToken("<|im_start|>", special=True, rstrip=True), "<|im_end|>"))
    template = ChatTemplate(source, specials=("<|im_start|>", "<|im_end|>"))
    dialect = TemplateDialect(greedy, template, stop_token_ids=[greedy.id("<|im_end|>")])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\n Why?"}]
    assert template.opening_text(messages, ())[0].endswith("<|im_start|>")
    assert dialect.opening(messages, ()) == ([], greedy.encode(template.prompt(messages)))


@pytest.mark.skipif(not WITH_TOOLS, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize(
    ("name", "sampled"),
    [
        ("qwen3", "<think>\nHm?\n</think>\n\nA heron."),
        ("qwen3_5_think", "Hm?\n</think>\n\nA heron."),
        ("qwen3_8", "Hm?\n</think>\n\nA heron."),
        ("glm4moe", "\n<think>Hm?</think>\nA heron."),
    ],
)
def test_thoughts_are_kept_apart_where_the_template_keeps_them_apart(name: str, sampled: str) -> None:
    template, tokenizer = load(path_of(name)), Bytes(trained("<|im_end|>", "<|user|>", "<think>", "</think>"))
    dialect = TemplateDialect(tokenizer, template, stop_token_ids=[tokenizer.id("<|im_end|>"), tokenizer.id("<|user|>")])
    message, _ = dialect.read(tokenizer.encode(sampled), ())
    assert message == {"role": "assistant", "content": "A heron.", "reasoning_content": "Hm?"}
    assert template.render([USER, message]).startswith(template.prompt([USER]) + sampled)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    ("prompted", "sampled", "thought", "said"),
    [
        ("", "<think>Hm?</think> A heron.", "Hm?", " A heron."),
        ("", "<think>\nHm?\n</think>\nA heron.", "Hm?", "A heron."),
        ("", "\n<think>\n\nHm?\nSo.\n\n</think>\n\n\nA heron.\n", "Hm?\nSo.", "A heron.\n"),
        ("", "<think>Hm? <tool_call>", "Hm? <tool_call>", ""),
        ("", "<think>\n\n</think>\n\nA heron.", "", "A heron."),
        ("<think>\\n", "Hm?</think>A heron.", "Hm?", "A heron."),
        ("<think>\\n", "<think>\nHm?\n</think>\n\nA </think> heron.", "Hm?", "A </think> heron."),
        ("<think>\\n", "Hm? A heron", "Hm? A heron", ""),
        ("<think>\\n", "", "", ""),
        ("<think>\\n\\n</think>\\n\\n", "A heron.", "", "A heron."),
        ("", "A <think>Hm?</think> heron.", "", "A <think>Hm?</think> heron."),
        ("", "Hm?\n</think>\n\nA heron.", "", "Hm?\n</think>\n\nA heron."),
    ],
)
def test_a_thought_stands_apart_in_whatever_form_it_was_written(
    prompted: str, sampled: str, thought: str, said: str, lenient: bool
) -> None:
    dialect, tokenizer = qwen(prompted=prompted, lenient=lenient)
    message, calls = dialect.read(tokenizer.encode(f"{sampled}<|im_end|>"), OPEN_TOOLS)
    assert message == {"role": "assistant", "content": said} | ({"reasoning_content": thought} if thought else {})
    assert calls == ()


@pytest.mark.parametrize("arguments", ['{"a":1}', '{"a": 1}'])
def test_a_thought_before_a_call_stands_apart_however_the_call_is_spaced(arguments: str) -> None:
    dialect, tokenizer = qwen()
    text = f'<think>\nI call it.\n</think>\n\nWell:\n<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
    message, calls = dialect.read(tokenizer.encode(text), OPEN_TOOLS)
    assert (message["reasoning_content"], message["content"]) == ("I call it.", "Well:")
    assert len(message["tool_calls"]) == len(calls) == 1


@pytest.mark.skipif(not WITH_TOOLS, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_training", "qwen3_5_think", "glm4moe"])
def test_a_turn_that_is_read_is_written_with_its_thought_whether_the_template_knows_of_thoughts_or_not(name: str) -> None:
    template, tokenizer = load(path_of(name)), Bytes(trained("<|im_end|>", "<|user|>", "<think>", "</think>"))
    dialect = TemplateDialect(tokenizer, template, stop_token_ids=[tokenizer.id("<|im_end|>"), tokenizer.id("<|user|>")])
    prompted = "" if template.prompt([USER]).endswith("<think>\n") else "<think>\n"
    message, _ = dialect.read(tokenizer.encode(f"{prompted}Hm?\n</think>\n\nA heron."), ())
    written = dialect.written([USER], message, ())
    assert "Hm?" in tokenizer.decode(written)
    assert dialect.read(written, ())[0] == message


ADD = '{"name": "add", "arguments": {"a": 1}}'
FENCED = f"\n```json\n{ADD}\n```\n"
WEIGHED = (
    f"I could write <tool_call>{ADD}</tool_call>, but",
    "Calls stand in <tool_call> tags,",
    f"So:\n{ADD}\nor so:{FENCED}no",
)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("weighed", WEIGHED)
@pytest.mark.parametrize(("prompted", "opening"), [("", "<think>\n"), ("", "\n<think>"), ("<think>\\n", ""), ("<think>", "\n")])
def test_a_call_that_is_only_thought_of_is_not_made_and_not_malformed(
    prompted: str, opening: str, weighed: str, lenient: bool
) -> None:
    dialect, tokenizer = qwen(prompted=prompted, lenient=lenient)
    thought = f"{opening}{weighed} not unasked.\n"
    message, calls = dialect.read(tokenizer.encode(f"{thought}</think>\n\nShall I?<|im_end|>"), OPEN_TOOLS)
    assert calls == ()
    assert "tool_calls" not in message
    _, calls = dialect.read(tokenizer.encode(f"{thought}and so on, till the limit"), OPEN_TOOLS)
    assert calls == ()
    message, calls = dialect.read(
        tokenizer.encode(f"{thought}</think>\n\n<tool_call>\n{ADD}\n</tool_call><|im_end|>"), OPEN_TOOLS
    )
    assert [call.arguments for call in calls if isinstance(call, ToolCall)] == [{"a": 1}]
    assert len(message["tool_calls"]) == len(calls) == 1
    _, calls = dialect.read(tokenizer.encode(f"{thought}</think>\n\n<tool_call>\n{{broken\n</tool_call><|im_end|>"), OPEN_TOOLS)
    assert [type(call) for call in calls] == [Malformed]


@pytest.mark.parametrize(
    ("prompted", "text"), [("", "Well, <think> so"), ("<think>\\n\\n</think>\\n\\n", "So:"), ("", "</think>")]
)
def test_calls_are_read_from_all_of_a_turn_that_does_not_begin_with_a_thought(prompted: str, text: str) -> None:
    dialect, tokenizer = qwen(prompted=prompted)
    _, calls = dialect.read(tokenizer.encode(f"{text}\n<tool_call>\n{ADD}\n</tool_call><|im_end|>"), OPEN_TOOLS)
    assert [type(call) for call in calls] == [ToolCall]
