"""A rendering is transformers', character for character; an opening falls in two safe parts; errors say where."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import jinja2
import pytest
from conversations import QWEN, TOOLS, WITH_TOOLS, Conversation, draw, features_of, load, reference
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from art_mcp.core.template import ChatTemplate
from art_mcp.errors import TemplateError

RAISED = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


def renders_alike(path: Path, conversation: Conversation, *, prompt: bool) -> bool:
    """Whether transformers renders the conversation, as we do; if it refuses, so must we."""
    today = date.today()
    try:
        expected = reference(path, conversation.messages, conversation.tools, add_generation_prompt=prompt)
    except RAISED:
        with pytest.raises(TemplateError, match=rf"chat template '{path.stem}', line [1-9]"):
            load(path).render(conversation.messages, tools=conversation.tools, add_generation_prompt=prompt)
        return False
    if date.today() != today:  # midnight fell between two readings of the clock
        return renders_alike(path, conversation, prompt=prompt)
    got = load(path, today).render(conversation.messages, tools=conversation.tools, add_generation_prompt=prompt)
    assert got == expected
    return True


def test_qwen_renders_as_transformers_does() -> None:
    assert all(renders_alike(QWEN, draw(seed, tags=True), prompt=seed % 3 == 0) for seed in range(500))
    assert all(renders_alike(QWEN, draw(seed, tools=False), prompt=False) for seed in range(100))


@pytest.mark.skipif(not WITH_TOOLS, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize("path", WITH_TOOLS, ids=lambda path: path.stem)
def test_every_template_with_tools_renders_and_refuses_as_transformers_does(path: Path) -> None:
    usual = [renders_alike(path, draw(seed, features=features_of(path)), prompt=seed % 3 == 0) for seed in range(20)]
    assert all(usual)
    for seed in range(6):
        renders_alike(path, draw(seed, tags=True), prompt=seed % 3 == 0)


def test_a_message_is_read_as_apply_chat_template_reads_it() -> None:
    source = (
        "{% for m in messages %}{{ m | tojson }}{{ m.content is defined }}{{ m.thinking }}{{ m.n }}{% endfor %}"
        "{{ pad_token }}{{ eos_token is defined }}{{ tools is none }}"
    )
    words = Tokenizer(WordLevel({"x": 0}, unk_token="x"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", chat_template=source)
    messages = [
        {"role": "assistant", "content": None, "tool_calls": None, "reasoning": "hm"},
        {
            "role": "assistant",
            "content": "é<",
            "reasoning_content": "a",
            "thinking": "b",
            "n": {"deep": [None, 1.5, (1, True)]},
        },
        {"role": "user", "content": object()},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    got = ChatTemplate(source, variables={"pad_token": "<pad>"}).render(messages)
    assert got == expected


def test_filters_tags_and_loop_controls_are_those_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "every.jinja"
    path.write_text(
        "{% generation %}\n  in\n{% endgeneration %}\n"
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "   {{ m | tojson(indent=2, sort_keys=true) }}{% endfor %}\n"
        "{{ {'a': '<é>'} | tojson(ensure_ascii=True, separators=(',', ':')) }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}"
        "{% set n = namespace(self=1, found=false) %}{% set n.found = true %}{{ n.found }}{{ n.self }}"
        "{{ documents }}{{ extra }}"
    )
    messages = draw(3).messages
    assert load(path).render(messages, extra="é") == reference(path, messages, None, extra="é")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ namespace(**{'__class__': 1}) }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y') }}",
        "{{ 'x' | tojson(indent='a', separators=3) }}",
    ],
)
def test_what_a_template_may_not_do_or_cannot_is_a_template_error_with_its_line(source: str) -> None:
    with pytest.raises(TemplateError, match=r"chat template 'odd', line 2: \w"):
        ChatTemplate("\n" + source, name="odd").render([{"role": "user", "content": "hi"}])


def test_a_broken_template_is_refused_at_once_with_its_line() -> None:
    with pytest.raises(TemplateError, match="chat template 'broken', line 2: "):
        ChatTemplate("\n{% if %}", name="broken")


def test_the_date_is_the_one_that_was_handed_in() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=datetime(2024, 2, 29))
    assert template.render([{"role": "user", "content": "hi"}]) == "29 Feb 2024"


def test_an_opening_is_cut_after_the_last_special_token_before_the_question() -> None:
    template = load(QWEN)
    messages = [{"role": "system", "content": "Be <|im_end|> brief."}, {"role": "user", "content": "Why?"}]
    shared, rest = template.opening_text(messages, TOOLS)
    assert rest == "user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert shared.endswith("</tool_call><|im_end|>\n<|im_start|>")
    assert shared + rest == template.render(messages, tools=TOOLS, add_generation_prompt=True)


def test_openings_with_one_system_message_and_one_set_of_tools_share_their_first_part() -> None:
    template = load(QWEN)
    for seed in range(100):
        conversation = draw(seed, tags=True)
        opening, tools = conversation.opening, conversation.tools
        shared, rest = template.opening_text(opening, tools)
        assert shared + rest == template.prompt(opening, tools)
        other, _ = template.opening_text([*opening[:-1], {"role": "user", "content": f"{seed}"}], tools)
        assert shared == other
        assert shared.count("\n") >= len(tools)
    assert template.opening_text(draw(1).opening, TOOLS[:1])[0] != template.opening_text(draw(1).opening, TOOLS[:2])[0]


def test_an_opening_whose_first_part_depends_on_the_question_is_not_cut() -> None:
    source = "{{ 'Be brief.' if messages[-1].content | length < 9 }}<|user|>{{ messages[-1].content }}"
    template = ChatTemplate(source, specials=("<|user|>",))
    assert template.opening_text([{"role": "user", "content": "Why?"}]) == ("Be brief.<|user|>", "Why?")
    assert template.opening_text([{"role": "user", "content": "Why not, though?"}]) == ("", "<|user|>Why not, though?")


def test_without_special_tokens_nothing_is_shared() -> None:
    template = ChatTemplate(QWEN.read_text())
    messages = [{"role": "user", "content": "Why?"}]
    assert template.opening_text(messages, TOOLS) == ("", template.prompt(messages, TOOLS))


@pytest.mark.skipif(not WITH_TOOLS, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize("path", WITH_TOOLS, ids=lambda path: path.stem)
def test_the_two_parts_of_an_opening_are_the_prompt_in_every_template(path: Path) -> None:
    for seed in range(4):
        conversation = draw(seed, tags=seed % 2 == 0)
        shared, rest = load(path).opening_text(conversation.opening, conversation.tools)
        assert shared + rest == load(path).prompt(conversation.opening, conversation.tools)
        assert shared
