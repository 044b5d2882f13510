"""Strict JSON out of a model's text: one value, or what to fix and where. What a value means is not decided here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from json import JSONDecodeError
from typing import Any, cast

MAX_DEPTH = 32
"""Levels of lists and objects, arguments included; more is refused here, before a validator or a server overflows its stack."""

TOO_DEEP = f"the JSON is nested too deep; at most {MAX_DEPTH} levels are allowed"
SPACE = " \t\n\r"

HINTS = (
    (re.compile(r"'|[‘’“”`]"), 'use double quotes (") around names and strings'),
    (re.compile(r"(?:True|False|None)\b"), "write true, false and null in lower case"),
    (re.compile(r"//|/\*|#"), "JSON has no comments; remove this one"),
    (re.compile(r"[+.]\d|(?<=0)\d"), "write numbers plainly, such as 12 or 0.5"),
)
BY_MESSAGE = {
    "Expecting property name enclosed in double quotes": 'put names in double quotes (")',
    "Expecting ':' delimiter": "write a colon after the name",
    "Expecting ',' delimiter": 'a comma or a closing bracket is missing, or a " inside a string is not written \\"',
    "Illegal trailing comma before end of object": "remove the comma before the closing bracket",
    "Illegal trailing comma before end of array": "remove the comma before the closing bracket",
    "Invalid \\escape": "write a backslash inside a string as \\\\",
    "Invalid \\uXXXX escape": "write four hexadecimal digits after \\u",
}


class NotJson(ValueError):
    """The text is no strict JSON; the message tells the model what to fix."""


class Unfinished(NotJson):
    """The text is the beginning of JSON, and nothing in it is wrong so far."""


def read_value(text: str) -> tuple[Any, int]:
    """The JSON value at the start of `text` and the index behind it; text may follow. Raises NotJson.

    Refused beyond what Python's decoder refuses: NaN, infinities, numbers that overflow a float.
    """
    return decode(text, DECODER)


def read_whole(text: str) -> Any:
    """The JSON value that `text` is. Raises NotJson, also for repeated names, half surrogate pairs and too much depth."""
    value, end = read_value(text)
    if end != len(text) and text[end:].strip(SPACE):
        raise NotJson("text follows the JSON; write nothing after its last bracket")
    check_value(value, text)
    return value


def count_colons(value: Any, levels: int) -> int:
    """How many colons the JSON of a list or an object has, names with colons in them aside: one for each name, and those in
    strings. Raises NotJson where it has more levels, or a number that is not finite."""
    if not levels:
        raise NotJson(TOO_DEEP)
    named = type_of(value) is dict
    colons = len(value) if named else 0
    for member in value.values() if named else value:
        kind = type_of(member)
        if kind is str:
            if ":" in member:
                colons += member.count(":")
        elif kind is dict or kind is list:
            colons += count_colons(member, levels - 1)
        elif kind is float and not math.isfinite(member):
            raise NotJson("a number is too large")
    return colons


type_of: Callable[[object], object] = type
"""`type`, without what a type checker makes of a comparison with it: here values stay Any."""


def check_value(value: Any, text: str) -> None:
    """Refuses what the plain decoder lets pass in `text`, which is `value`: repeated names, half surrogates, depth."""
    names_once = text.count(":") == count_names(value)  # where every name has its colon, none was written twice
    if names_once and text.isascii() and "\\" not in text and "[" not in text:
        return
    if depth(value) > MAX_DEPTH:
        raise NotJson(TOO_DEEP)
    if not names_once:
        decode(text, NAMES_ONCE)
    refuse_surrogates(value)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuses in a call's arguments, however they were read, what `read_whole` refuses in the call: half surrogates, depth."""
    if depth(arguments) >= MAX_DEPTH:  # the call around them is a level too
        raise NotJson(TOO_DEEP)
    refuse_surrogates(arguments)


def quote(value: object, limit: int = 60) -> str:
    """`value` as JSON for a message: one line, at most about `limit` characters, always encodable."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def decode(text: str, decoder: json.JSONDecoder) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text)
    except JSONDecodeError as error:
        finished = error.doc[error.pos :].strip(SPACE)
        raise (NotJson if finished else Unfinished)(diagnose(error)) from error
    except NotJson:
        raise
    except ValueError as error:  # Python's own limit on the digits of an int
        raise NotJson("a number has too many digits") from error
    except RecursionError as error:
        raise NotJson(TOO_DEEP) from error


def diagnose(error: JSONDecodeError) -> str:
    """Where the JSON breaks (line and column count from its first bracket) and what to write instead."""
    return f"invalid JSON at line {error.lineno}, column {error.colno}: {remedy(error)}"


def remedy(error: JSONDecodeError) -> str:
    text, at = error.doc, error.pos
    if error.msg.startswith("Unterminated string"):
        return 'the string that starts here has no closing "'
    if error.msg.startswith("Invalid control character"):
        return "write a line break inside a string as \\n" if text[at] in "\r\n" else "write control characters as \\u escapes"
    if not text[at:].strip(SPACE):
        return f"the JSON is not finished; {unclosed(text)}"
    if text[at] in "}]" and text[:at].rstrip(SPACE).endswith(","):
        return "remove the comma before the closing bracket"
    hints = (hint for pattern, hint in HINTS if pattern.match(text, at))
    return next(hints, BY_MESSAGE.get(error.msg, "a value is missing or is not JSON"))


def unclosed(text: str) -> str:
    """What would close the brackets that are open at the end of `text`."""
    open_brackets: list[str] = []
    for token in TOKEN.findall(text):
        if token in ("{", "["):
            open_brackets.append("}" if token == "{" else "]")
        elif token in ("}", "]") and open_brackets:
            open_brackets.pop()
    closing = "".join(reversed(open_brackets))
    return f"end it with {closing}" if 0 < len(closing) <= 8 else "close every bracket"


TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]')


def count_names(value: Any) -> int:
    """How many names the value and the objects directly in it have."""
    if type(value) is not dict:
        return 0
    members = cast("dict[str, Any]", value)
    count = len(members)
    for member in members.values():
        if type(member) is dict:
            count += len(cast("dict[str, Any]", member))
    return count


def depth(value: object) -> int:
    """Levels of lists and objects, counted without recursion."""
    levels, layer = 0, [value]
    while layer := [node for node in layer if type(node) in (list, dict)]:
        levels += 1
        layer = [child for node in layer for child in members_of(node)]
    return levels


def members_of(node: object) -> Sequence[object]:
    if isinstance(node, dict):
        return list(cast("dict[str, object]", node).values())
    return cast("list[object]", node)


def refuse_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise NotJson(f"{half} is half a character; write the character itself") from error
    except RecursionError as error:
        raise NotJson(TOO_DEEP) from error


def refuse_constant(name: str) -> float:
    raise NotJson(f"invalid JSON: {name} is not a JSON value; write a number or null")


def read_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise NotJson(f"the number {digits[:20]} is too large")
    return value


def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise NotJson(f"{quote(name)} is written twice in one object; write it once")
        members[name] = value
    return members


DECODER = json.JSONDecoder(parse_float=read_float, parse_constant=refuse_constant)
NAMES_ONCE = json.JSONDecoder(parse_float=read_float, parse_constant=refuse_constant, object_pairs_hook=read_object)
