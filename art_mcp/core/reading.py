"""Whether the call that a template writes is read as one, tried on a small one. No conversation of a run comes here."""

from __future__ import annotations

from functools import partial

from art_mcp.core.bridging import PROBE, QUESTION, call
from art_mcp.core.dialect import TemplateDialect
from art_mcp.core.parse import parse_calls
from art_mcp.core.template import ChatTemplate
from art_mcp.errors import TemplateError
from art_mcp.ports import Tokenizer
from art_mcp.types import ToolCall

ANOTHER = "calls in this model's form are not read yet: choose a model that writes <tool_call> JSON as Hermes and Qwen do"
LENIENT = "calls in this model's form are read leniently alone: add --lenient (in Python ModelSpec(lenient=True))"


class UnreadableError(TemplateError):
    """A call that the template writes and that is not read back: what is there (`text`), and what to do (`remedy`)."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(text, remedy)
        self.text, self.remedy = text, remedy

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


def check_readable(template: ChatTemplate, tokenizer: Tokenizer, *, lenient: bool = False) -> None:
    """Raises UnreadableError where a call in the template's own form is not read: whatever such a model called would be taken
    for an answer, or for a mistake."""
    reply = call(PROBE.name, word="heron")
    try:
        written = template.written([QUESTION], reply, tools=[PROBE])
        stop = template.ending(reply).stop
    except TemplateError as error:
        raise UnreadableError(f"the template writes no call that could be read: {error}", ANOTHER) from error
    text = tokenizer.decode(tokenizer.encode(written)).removesuffix(stop)
    if not reads(text, template, tokenizer, lenient=lenient):
        remedy = LENIENT if reads(text, template, tokenizer, lenient=True) else ANOTHER
        raise UnreadableError(f"a call as chat template {template.name!r} writes it is not read back: {text!r}", remedy)


def reads(text: str, template: ChatTemplate, tokenizer: Tokenizer, *, lenient: bool) -> bool:
    dialect = TemplateDialect(tokenizer, template, stop_token_ids=(), parse=partial(parse_calls, lenient=lenient))
    _, calls = dialect.read_text(text, [PROBE])
    return [(one.name, one.arguments) for one in calls if isinstance(one, ToolCall)] == [(PROBE.name, {"word": "heron"})]
