"""Which parser reads the call that a template writes, tried on a small one. No conversation of a run comes here."""

from __future__ import annotations

from functools import partial

from art_mcp.core.bridging import PROBE, QUESTION, call
from art_mcp.core.dialect import Parse, TemplateDialect
from art_mcp.core.function_tags import parse_functions
from art_mcp.core.parse import parse_calls
from art_mcp.core.template import ChatTemplate
from art_mcp.errors import TemplateError
from art_mcp.ports import Tokenizer
from art_mcp.types import Message, ToolCall

PARSERS = (parse_calls, parse_functions)
"""Of Hermes and Qwen to 3, of Qwen3-Coder and Qwen from 3.5."""
ANOTHER = (
    "calls in this model's form are not read yet: choose a model that writes <tool_call> with JSON in it, as Hermes and Qwen3 "
    "do, or with <function=…>, as Qwen3-Coder and Qwen3.5 do"
)
LENIENT = "calls in this model's form are read leniently alone: add --lenient (in Python ModelSpec(lenient=True))"


class UnreadableError(TemplateError):
    """A call that the template writes and that is not read back: what is there (`text`), and what to do (`remedy`)."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text, remedy)
        self.text, self.remedy = text, remedy

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


def find_parser(template: ChatTemplate, tokenizer: Tokenizer, *, lenient: bool = False) -> Parse:
    """What reads calls in the template's own form. Raises UnreadableError where nothing does: whatever such a model called
    would be taken for an answer, or for a mistake."""
    text = tokenizer.decode(tokenizer.encode(write_call(template)))
    for parse in PARSERS:
        if reads(text, template, tokenizer, partial(parse, lenient=lenient)):
            return partial(parse, lenient=lenient)
    able = any(reads(text, template, tokenizer, partial(parse, lenient=True)) for parse in PARSERS)
    told = f"a call as chat template {template.name!r} writes it is not read back: {text!r}"
    raise UnreadableError(told, LENIENT if able else ANOTHER)


def write_call(template: ChatTemplate) -> str:
    """What a policy would have written to call PROBE, without what stops it; after a thought, where the template is exact only
    so. Raises UnreadableError where the template has no place for calls."""
    plain = call(PROBE.name, word="heron")
    thoughtful: Message = {**plain, "reasoning_content": "A bird, surely."}
    refusals: list[TemplateError] = []
    for reply in (plain, thoughtful):
        try:
            return template.written([QUESTION], reply, tools=[PROBE]).removesuffix(template.ending(reply).stop)
        except TemplateError as error:
            refusals.append(error)
    raise UnreadableError(f"the template writes no call that could be read: {refusals[0]}", ANOTHER) from refusals[0]


def reads(text: str, template: ChatTemplate, tokenizer: Tokenizer, parse: Parse) -> bool:
    dialect = TemplateDialect(tokenizer, template, stop_token_ids=(), parse=parse)
    _, calls = dialect.read_text(text, [PROBE])
    return [(one.name, one.arguments) for one in calls if isinstance(one, ToolCall)] == [(PROBE.name, {"word": "heron"})]
