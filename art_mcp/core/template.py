"""A chat template: what it renders, how it opens a conversation, what a policy's turn looks like in it, and what lies between
two turns. Text only: tokens are `dialect`'s, and whether a template bridges exactly is asked in `bridging`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jinja2

from art_mcp.core.sandbox import compile_template, plain, plain_message
from art_mcp.core.turns import Ending, Shape, common_prefix, common_suffix, find_any, shape_of, stand_in_shapes
from art_mcp.errors import TemplateError, describe
from art_mcp.types import Message, Tool

Tools: TypeAlias = Sequence[Tool | Mapping[str, Any]]

RAISED = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What running a template can raise, where it meets a conversation that it was not written for."""

USER: Message = {"role": "user", "content": "Go."}


class Unbridgeable(TemplateError):
    """A conversation that the template writes differently when it is rendered whole than turn by turn.

    `template` is its name, `conversation` the messages, `expected` the whole rendering, `got` what the turns add up to. Where
    the template raises, or leaves out what was said, `reason` says so; `expected` is then what is missing.
    """

    def __init__(
        self, template: str, conversation: Sequence[Message], *, expected: str = "", got: str = "", reason: str = ""
    ) -> None:
        super().__init__(template)
        self.template, self.conversation, self.reason = template, tuple(conversation), reason
        self.expected, self.got = expected, got

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(Unbridgeable, expected=self.expected, got=self.got, reason=self.reason)
        return make, (self.template, self.conversation)

    def __str__(self) -> str:
        roles = " → ".join(str(message["role"]) for message in self.conversation)
        lines = [f"  {json.dumps(plain(message), ensure_ascii=False)}" for message in self.conversation]
        why = [f"  {self.reason}"] if self.reason else self._difference()
        return "\n".join([f"chat template {self.template!r} is not exact turn by turn: {roles}", *lines, *why])

    def _difference(self) -> list[str]:
        at = len(common_prefix([self.expected, self.got]))
        return [
            f"  they part at character {at}, after {self.expected[max(0, at - 40) : at]!r}:",
            f"  rendered whole: {self.expected[at : at + 60]!r}",
            f"  turn by turn:   {self.got[at : at + 60]!r}",
        ]


class ChatTemplate:
    """A Hugging Face chat template.

    `specials` are the spellings of the tokenizer's special tokens: without them no shared opening is found, and the end of a
    turn must be told by stop strings. `variables` is whatever else the template reads: other special tokens by their name
    (`pad_token`), switches such as `enable_thinking`. `now` is the date that a template writes, if it writes one.
    Raises TemplateError when the source is no valid template.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "",
        bos_token: str = "",
        eos_token: str = "",
        variables: Mapping[str, Any] | None = None,
        specials: Sequence[str] = (),
        now: datetime | None = None,
    ) -> None:
        self.name = name or "unnamed"
        self.specials = tuple(special for special in specials if special.strip())
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._variables = {**{key: token for key, token in tokens.items() if token}, **plain(variables or {})}
        try:
            self._template = compile_template(source, now)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"chat template {self.name!r}, line {error.lineno}: {describe(error)}") from error
        # per template and per shape, so that a turn costs one short rendering; bounded, because names and ids vary
        self._ending = lru_cache(maxsize=64)(self._find_ending)
        self._body = lru_cache(maxsize=256)(self._find_body)
        self._shared = lru_cache(maxsize=64)(self._find_shared)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """What transformers' `apply_chat_template(…, tokenize=False)` gives. Raises TemplateError with the template's line."""
        try:
            return self._template.render(
                messages=[plain_message(message) for message in messages],
                tools=None if tools is None else schemas(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **(self._variables | plain(variables)),
            )
        except RAISED as error:
            raise TemplateError(f"chat template {self.name!r}, line {line_of(error)}: {describe(error)}") from error

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """What the policy reads before it writes its next turn."""
        return self.render(messages, tools=tools or None, add_generation_prompt=True)

    def opening_text(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[str, str]:
        """The first prompt in two parts: what is the same whatever the user says, cut after a special token, and the rest."""
        whole = self.prompt(messages, tools)
        first = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            return "", whole
        shared = self._shared(json.dumps(plain(messages[:first])), json.dumps(schemas(tools)))
        return (shared, whole[len(shared) :]) if whole.startswith(shared) else ("", whole)

    def bridge_text(self, reply: Message, following: Sequence[Message], *, ended_with: str) -> str:
        """What stands between the policy's turn `reply`, which ended with `ended_with`, and its next turn.

        The difference of two renderings of a short conversation, in which `reply` stands by its shape: whether it has text,
        and the names and ids of its calls. Where the policy ended with another token than the template's own, the
        template's own is written too. A shape that the template refuses (two calls at once, an error without a call) gives
        way to the nearest one that it takes, so that no turn of a policy ends a run; `check_bridgeable` says beforehand
        which shapes are exact. Raises TemplateError where even a plain exchange cannot be bridged.
        """
        refusals: list[TemplateError] = []
        for shape, messages in stand_in_shapes(reply, following):
            try:
                return self._bridge(shape, messages, ended_with=ended_with)
            except TemplateError as error:
                refusals.append(error)
        raise refusals[0]

    def written(self, before: Sequence[Message], reply: Message, *, tools: Tools = (), stop_strings: Sequence[str] = ()) -> str:
        """What the policy would have written for `reply` after `before` in the template's own form, its stop included.

        `stop_strings` are the spellings of the policy's stop tokens (default: what `specials` tell of the template).
        Raises Unbridgeable where the rendering of `reply` does not continue the prompt.
        """
        prompt, whole = self.prompt(before, tools), self.render([*before, reply], tools=tools or None)
        if not whole.startswith(prompt):
            raise Unbridgeable(self.name, [*before, reply], expected=whole, got=prompt)
        ending = self.ending(reply, stop_strings)
        return ending.body(whole[len(prompt) :]) + ending.stop

    def ending(self, reply: Message, stop_strings: Sequence[str] = ()) -> Ending:
        """How a turn of this shape ends. Raises TemplateError where no special token tells."""
        return self._ending(shape_of(reply).outline, tuple(stop_strings))

    def _bridge(self, shape: Shape, following: Sequence[Message], *, ended_with: str) -> str:
        body, unanswered = self._body(shape, () if self.specials else (ended_with,))
        conversation = [USER, shape.stand_in(), *following]
        whole = self.prompt(conversation)
        if whole == unanswered:
            raise Unbridgeable(self.name, conversation, got=whole, reason="the template leaves out the last message")
        rest = whole[len(body) :] if whole.startswith(body) else self._after(shape, following)
        return rest[len(ended_with) :] if ended_with and rest.startswith(ended_with) else rest

    def _after(self, shape: Shape, following: Sequence[Message]) -> str:
        """What comes after a turn that the template rewrites once something follows it: the end that all such turns share."""
        wholes = [self.prompt([USER, turn, *following]) for turn in shape.stand_ins()]
        rest, stop = common_suffix(wholes), self._ending(shape.outline, ()).stop
        if stop not in rest:
            raise Unbridgeable(self.name, [USER, shape.stand_in(), *following], expected=wholes[0], got=stop)
        return rest[rest.index(stop) :]

    def _find_body(self, shape: Shape, stop_strings: tuple[str, ...]) -> tuple[str, str]:
        """A rendering that ends with a turn of this shape, without what closes it; and the prompt right after it."""
        conversation = [USER, shape.stand_in()]
        body = self._ending(shape.outline, stop_strings).body(self.render(conversation))
        return body, self.prompt(conversation)

    def _find_ending(self, shape: Shape, stop_strings: tuple[str, ...]) -> Ending:
        tail = common_suffix([self.render([USER, reply]) for reply in shape.stand_ins()])
        found = find_any(stop_strings or self.specials, tail)
        # a call's closing tag may be a special token too: it ends a turn only where turns of plain text are closed
        if found and (stop_strings or not shape.calls or self._ending(Shape(has_text=True), ()).closed):
            stop = found[0 if stop_strings else -1]
            return Ending(stop[0], tail[stop.end() :], closed=True)
        return Ending(self._handover(shape, stop_strings or self.specials), "", closed=False)

    def _handover(self, shape: Shape, stops: Sequence[str]) -> str:
        """What the policy writes to end a turn that the template leaves open: the token with which the next message begins."""
        turn = [USER, shape.stand_in()]
        rest = self.prompt([*turn, *shape.following()]).removeprefix(self.render(turn))
        found = find_any(stops, rest)
        if not found or found[0].start() > 0:
            raise TemplateError(
                f"chat template {self.name!r}: no known special token ends a turn; what follows it begins with {rest[:40]!r}"
            )
        return found[0][0]

    def _find_shared(self, head: str, tools: str) -> str:
        opening, offered = json.loads(head), json.loads(tools)
        prompts = [self.prompt([*opening, {"role": "user", "content": word}], offered) for word in ("Apple", "Berry")]
        shared = common_prefix(prompts)
        found = find_any(self.specials, shared)
        return shared[: found[-1].end()] if found else ""


def schemas(tools: Tools) -> list[Any]:
    """The tools in the form that templates expect."""
    return [plain(tool.schema() if isinstance(tool, Tool) else tool) for tool in tools]


def line_of(error: BaseException) -> int:
    """The line of the template at which `error` was raised; 0 where it is not known."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<template>" else line
        trace = trace.tb_next
    return line
