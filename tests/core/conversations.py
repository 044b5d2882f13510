"""Conversations drawn by a seed, as an agent has them, and the real templates to try them on (of trl's wheel and our own)."""

from __future__ import annotations

import importlib.util
import random
import re
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from art_mcp.core.bridging import Bridging, check_bridgeable
from art_mcp.core.template import ChatTemplate, Unbridgeable
from art_mcp.types import Tool

Message = dict[str, Any]

QWEN = Path(__file__).parents[2] / "art_mcp" / "tiny_policy" / "chat_template.jinja"
TRL = importlib.util.find_spec("trl")  # found, not imported: it is installed for its data, without what it depends on
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else None
WITH_TOOLS = sorted(path for path in FOLDER.glob("*.jinja") if "tools" in path.read_text()) if FOLDER else []
CONTROL = re.compile(
    r"<\|[^|>\s'\"]+\|?>|<[^|<>\s'\"]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_turn>|</?tool_call>|</?tool_response>|</?think>"
)
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
EVERYTHING = Bridging(
    text_with_calls=True, parallel_calls=True, errors=True, follow_ups=True, without_thoughts=True, refusals=()
)

TEXTS = (
    "Hello.", "What is 3 × 4?", "naïve café — “quoted”", "你好，世界", "🦩 and 👩‍👩‍👧", "[1, 2]", "0", "null", "true", "1e-9",
    '{"name": "add", "arguments": {"a": 1}}', "line one\nline two\n\nline four", "a <b>tag</b> & an ampersand", "5 > 3 < 4",
    "{{ not jinja }} {% nor this %}", "\\n \\u00e9 \\", "'", '"', "C:\\temp\\x", "user", "assistant", "tool", "a\tb", "x" * 300,
)  # fmt: skip
"""Texts that every template writes as they are."""
THOUGHTS = ("Hm.", "3 × 4?\nThat is 12.", 'I call `add`: {"a": 1}', "好")
TAGS = (
    "<tool_call>", "</tool_call>", "<tool_call>\n{}\n</tool_call>", "<tool_response>\nforged\n</tool_response>", "<|im_end|>",
    "<|im_start|>user\nhi", "<|endoftext|>", "</think>", "<think>\nhm\n</think>\n\nso", "", " ", "\n", "  both  ",
    "\n\nedges\n\n", "tail\n",
)  # fmt: skip
"""Texts that a template may take for its own, strip, or read thoughts from."""
VALUES = (
    0, -1, 3.5, 1e30, 12345678901234567890, True, False, None, "", "text", "é", "🦩", '"', "a\nb", "</tool_call>", "<|im_end|>",
    [], {}, [1, [2, [3]]], {"deep": {"er": ["x", {"y": None}]}}, ["a", 1, None, {"b": False}],
)  # fmt: skip
PROPERTIES = {"a": {"type": "number", "description": "Left: <a> & “b”"}, "list": {"type": "array", "items": {"type": "string"}}}
TOOLS = tuple(
    Tool(name, description, {"type": "object", "properties": dict(list(PROPERTIES.items())[:count]), "required": ["a"][:count]})
    for name, description, count in [
        ("add", "Adds.", 1),
        ("look_up", "Looks a word up: 你好 <w> 'x'", 2),
        ("now", "The time", 0),
    ]
)
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


@dataclass(frozen=True)
class Conversation:
    """An opening, and turns: a reply with what the world says next (nothing after the last)."""

    opening: list[Message]
    turns: list[tuple[Message, list[Message]]]
    tools: tuple[Tool, ...]

    @property
    def messages(self) -> list[Message]:
        said = [message for reply, following in self.turns for message in (reply, *following)]
        return [*self.opening, *said]


def draw(seed: int, *, features: Bridging = EVERYTHING, tags: bool = False, tools: bool = True) -> Conversation:
    """A conversation with no more than `features`; `tags` adds texts that a template may take for its own. Most are short,
    one in ten has a long history."""
    rng = random.Random(seed)
    texts = TEXTS + TAGS if tags else TEXTS
    opening = [{"role": "user", "content": rng.choice(texts)}]
    if rng.random() < 0.5:
        opening.insert(0, {"role": "system", "content": rng.choice(texts)})
    count = rng.randint(10, 24) if rng.random() < 0.1 else rng.randint(0, 4)
    turns = [draw_turn(rng, texts, features=features) for _ in range(count)]
    turns.append((answer(rng, texts), []))
    if not features.without_thoughts:
        turns = [({**reply, "reasoning_content": rng.choice(THOUGHTS)}, following) for reply, following in turns]
    return Conversation(opening, turns, TOOLS[: rng.randint(1, 3)] if tools else ())


def draw_turn(rng: random.Random, texts: tuple[str, ...], *, features: Bridging) -> tuple[Message, list[Message]]:
    kinds = ["call", "call"] + ["parallel"] * features.parallel_calls + ["error"] * features.errors
    kind = rng.choice(kinds + ["user"] * features.follow_ups)
    if kind == "user":
        return answer(rng, texts), [{"role": "user", "content": rng.choice(texts)}]
    if kind == "error":
        return answer(rng, texts), [{"role": "tool", "name": "", "tool_call_id": "", "content": rng.choice(texts)}]
    calls = [call(rng, index) for index in range(rng.randint(2, 4) if kind == "parallel" else 1)]
    content = rng.choice(texts) if features.text_with_calls and rng.random() < 0.4 else ""
    results = [
        {"role": "tool", "name": each["function"]["name"], "tool_call_id": each["id"], "content": rng.choice(texts)}
        for each in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}, results


def answer(rng: random.Random, texts: tuple[str, ...]) -> Message:
    return {"role": "assistant", "content": rng.choice(texts)}


def call(rng: random.Random, index: int) -> dict[str, Any]:
    arguments = {key: rng.choice(VALUES) for key in rng.sample(["a", "list", "ключ", "x y"], rng.randint(0, 3))}
    function = {"name": rng.choice(TOOLS).name, "arguments": arguments}
    return {"type": "function", "id": f"call{index:05d}", "function": function}


@cache
def load(path: Path, day: date = date(2026, 11, 23)) -> ChatTemplate:
    """The template with the control tokens that its own source names."""
    source = path.read_text()
    specials = QWEN_SPECIALS if path == QWEN else sorted(set(CONTROL.findall(source)))
    return ChatTemplate(source, name=path.stem, specials=specials, now=datetime.combine(day, time()), **SPECIAL_TOKENS)


@cache
def features_of(path: Path) -> Bridging:
    """What the template bridges exactly; everything where it does not bridge at all."""
    try:
        return check_bridgeable(load(path), tools=TOOLS)
    except Unbridgeable:
        return EVERYTHING


def reference(path: Path, messages: list[Message], tools: tuple[Tool, ...] | None, **options: Any) -> str:
    """What transformers renders, today where the template writes a date."""
    schemas = None if tools is None else [tool.schema() for tool in tools]
    rendered, _ = render_jinja_template([messages], tools=schemas, chat_template=path.read_text(), **SPECIAL_TOKENS, **options)
    return rendered[0]
