"""Turns of a policy to parse: well-formed ones by number of calls, long ones, broken ones. The same at every import."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from art_mcp.core.parse import render_turn
from art_mcp.types import Tool, ToolCall

Draw: TypeAlias = Callable[[random.Random], dict[str, Any]]

BYTES = 1000
PER_COUNT = 15
CITIES = ("Zürich", "São Paulo", "東京", "Reykjavík", "New York", "Łódź", "Αθήνα", "Ho Chi Minh City", "القاهرة")
PEOPLE = ("ana.lópez@example.org", "wei@example.com", "o'brien@example.net", "j.m.smith@example.com", "ops@example.org")
PROSE = (
    "I need the current figures first.",
    "Let me look that up.\n\nThere are two things to check, and the second depends on the first.",
    "Der Nutzer möchte den Preis in Euro wissen; dafür brauche ich den Kurs von heute.",
    "まず予定を確認します。",
    "The file was changed after line 40, so I read it again (a < b still holds).",
    "",
)
ANSWERS = (
    "It will be 21 °C and sunny in Zürich tomorrow, so the picnic can take place as planned.",
    "The invoice was paid on 3 March.\n\n- amount: 1,250.00 EUR\n- reference: `INV-2031`\n- account: ops",
    'Use `{"name": "add"}` as the body; "arguments" may be left out where there are none.',
    "Die Zahlen stimmen nicht überein: im ersten Bericht stehen 312, im zweiten 321. Bitte prüfen Sie die Quelle.",
    "合計は 4,180 円です。税込みでは 4,598 円になります。",
)


def tool(name: str, description: str, properties: Mapping[str, Any], *required: str) -> Tool:
    return Tool(name, description, {"type": "object", "properties": dict(properties), "required": list(required)})


TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
LINE = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
TOOLS = (
    tool("add", "Adds two numbers.", {"a": NUMBER, "b": NUMBER}, "a", "b"),
    tool("get_weather", "The forecast for a city.", {"city": TEXT, "unit": TEXT, "days": WHOLE}, "city"),
    tool("convert_currency", "Converts an amount.", {"amount": NUMBER, "from": TEXT, "to": TEXT}, "amount", "from", "to"),
    tool("read_file", "Reads a file, or some lines of it.", {"path": TEXT, "first_line": LINE, "last_line": LINE}, "path"),
    tool(
        "send_email",
        "Sends a message.",
        {"to": {"type": "array", "items": TEXT}, "subject": TEXT, "body": TEXT, "urgent": {"type": "boolean"}},
        *("to", "subject", "body"),
    ),
    tool(
        "search_flights",
        "Finds connections.",
        {
            "origin": TEXT,
            "destination": TEXT,
            "date": TEXT,
            "passengers": WHOLE,
            "cabin": {"type": "string", "enum": ["economy", "premium", "business"]},
        },
        *("origin", "destination", "date"),
    ),
    tool(
        "create_event",
        "Puts an event into the calendar.",
        {
            "title": TEXT,
            "start": TEXT,
            "attendees": {"type": "array", "items": TEXT},
            "reminders": {
                "type": "array",
                "items": {"type": "object", "properties": {"minutes": WHOLE, "by": TEXT}, "required": ["minutes"]},
            },
        },
        *("title", "start"),
    ),
    tool(
        "update_record",
        "Changes fields of a record.",
        {"table": TEXT, "id": WHOLE, "fields": {"type": "object", "additionalProperties": True}},
        *("table", "id", "fields"),
    ),
)


def numbers(rng: random.Random) -> dict[str, Any]:
    return {"a": rng.choice((rng.randrange(-99, 999), round(rng.uniform(0, 50), 3))), "b": rng.randrange(10**6)}


def weather(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {"city": rng.choice(CITIES)}
    return given | ({"unit": "celsius", "days": rng.randrange(1, 8)} if rng.random() < 0.5 else {})


def currency(rng: random.Random) -> dict[str, Any]:
    return {"amount": round(rng.uniform(1, 9999), 2), "from": rng.choice(("EUR", "CHF")), "to": rng.choice(("USD", "JPY"))}


def file(rng: random.Random) -> dict[str, Any]:
    path = rng.choice(("src/app/main.py", "docs/Übersicht.md", "C:\\data\\2031\\q1.csv", "tests/test_<all>.py"))
    return {"path": path} | ({"first_line": rng.randrange(1, 90), "last_line": None} if rng.random() < 0.5 else {})


def email(rng: random.Random) -> dict[str, Any]:
    body = rng.choice(
        ("Hi,\n\nsee the numbers below:\n\t1) 42\n\t2) 43\n\nBest", 'She said "yes" — and no more.', "Grüße aus Köln 🌧")
    )
    given = {"to": rng.sample(PEOPLE, rng.randrange(1, 3)), "subject": "Q1: figures & open questions", "body": body}
    return given | ({"urgent": True} if rng.random() < 0.3 else {})


def flights(rng: random.Random) -> dict[str, Any]:
    origin, destination = rng.sample(CITIES, 2)
    given: dict[str, Any] = {"origin": origin, "destination": destination, "date": f"2031-{rng.randrange(1, 13):02}-15"}
    return given | ({"passengers": rng.randrange(1, 5), "cabin": "business"} if rng.random() < 0.5 else {})


def event(rng: random.Random) -> dict[str, Any]:
    reminders = [{"minutes": rng.randrange(5, 61, 5), "by": "email"} for _ in range(rng.randrange(1, 3))]
    given: dict[str, Any] = {"title": rng.choice(("Review", "Déjeuner d'équipe", "会議")), "start": "2031-03-01T09:30:00+01:00"}
    return given | {"attendees": rng.sample(PEOPLE, 2), "reminders": reminders}


def record(rng: random.Random) -> dict[str, Any]:
    fields = {
        "status": "paid",
        "tags": ["2031", "é"],
        "address": {"zip": "8001", "lines": ["Bahnhofstr. 1"]},
        "ratio": rng.random(),
    }
    return {"table": "customers", "id": rng.randrange(10**6), "fields": fields}


DRAWS: tuple[Draw, ...] = (numbers, weather, currency, file, email, flights, event, record)


def draw_call(rng: random.Random) -> ToolCall:
    index = rng.randrange(len(TOOLS))
    return ToolCall(TOOLS[index].name, DRAWS[index](rng))


def draw_turn(rng: random.Random, calls: int) -> str:
    """A turn in the template's own form, or, one in five, as models also write it: compact, or with text after the calls."""
    if not calls:
        return "\n\n".join(rng.sample(ANSWERS, rng.randrange(1, len(ANSWERS))))
    content, made = rng.choice(PROSE), [draw_call(rng) for _ in range(calls)]
    if rng.random() < 0.8:
        return render_turn(content, made)
    written = [json.dumps({"name": call.name, "arguments": call.arguments}, separators=(",", ":")) for call in made]
    return content + "".join(f"<tool_call>{body}</tool_call>" for body in written) + "\nI wait for the result."


def draw_turns(calls: int) -> list[str]:
    """Different turns with so many calls, each of at most BYTES bytes."""
    rng = random.Random(f"turns with {calls} calls")
    turns: dict[str, None] = {}
    while len(turns) < PER_COUNT:
        text = draw_turn(rng, calls)
        if len(text.encode()) <= BYTES:
            turns[text] = None
    return list(turns)


WELL_FORMED = {f"calls_{calls}": draw_turns(calls) for calls in (0, 1, 2, 5)}


def call_text(name: str, **arguments: Any) -> str:
    return render_turn("", [ToolCall(name, arguments)])


def long_turns(size: int) -> dict[str, str]:
    """About `size` characters: as prose before two calls, as one string in a call, and as call after call."""
    rng = random.Random(size)
    prose = "\n\n".join(rng.choice(ANSWERS) for _ in range(size // 70))[:size]
    many = "\n".join(render_turn("", [draw_call(rng)]) for _ in range(size // 170))
    return {
        "prose": render_turn(prose, [draw_call(rng), draw_call(rng)]),
        "string": call_text("send_email", to=["ops@example.org"], subject="log", body=prose),
        "calls": many,
    }


LONG = {f"{kind}_{size // 1000}kB": text for size in (10_000, 100_000) for kind, text in long_turns(size).items()}

GOOD = call_text("get_weather", city="Zürich")


def between_good(body: str) -> str:
    """Three calls, the middle one with this body."""
    return f"{GOOD}\n<tool_call>\n{body}\n</tool_call>\n{GOOD}"


BROKEN = {
    "a trailing comma": between_good('{"name": "get_weather", "arguments": {"city": "Köln",}}'),
    "single quotes": between_good("{'name': 'get_weather', 'arguments': {'city': 'Köln'}}"),
    "a quote not escaped": between_good('{"name": "read_file", "arguments": {"path": "a "b" c"}}'),
    "True for true": between_good('{"name": "send_email", "arguments": {"to": [], "subject": "", "body": "", "urgent": True}}'),
    "a bracket too many": between_good('{"name": "get_weather", "arguments": {"city": "Köln"}}}'),
    "two values in one call": between_good('{"name": "get_weather", "arguments": {"city": "Köln"}}\n{"name": "x"}'),
    "an empty call": between_good(""),
    "no name": between_good('{"arguments": {"city": "Köln"}}'),
    "a tag inside a string": between_good(json.dumps({"name": "read_file", "arguments": {"path": "</tool_call>.txt"}})),
    "no closing tag, another call follows": f"{GOOD.removesuffix('</tool_call>')}{GOOD}\n{GOOD}",
    "cut off in the third call": f"{GOOD}\n{GOOD}\n{GOOD[: len(GOOD) // 2]}",
    "an unknown tool": between_good('{"name": "get_wether", "arguments": {"city": "Köln"}}'),
    "a wrong type": between_good('{"name": "get_weather", "arguments": {"city": 8001}}'),
    "arguments left out": between_good('{"name": "get_weather"}'),
    "arguments as a string": between_good(
        json.dumps({"name": "get_weather", "arguments": '{"city": "Köln"}'}, ensure_ascii=False)
    ),
}
"""Turns in which three calls were begun, by what is wrong with them."""
