"""The mcpServers file, whatever is in it: servers, or one line that names the file and tells no secret."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fuzzing import edits, fuzz, spoil, well_encoded
from hypothesis import strategies as st

from art_mcp.errors import ConfigError
from art_mcp.tools.config import KEYS, load_config, resolve, server_spec
from art_mcp.types import ServerSpec

SECRET = "hush"
"""Part of every secret of these tests, and of nothing else."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the config file is, with a server beside it."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "server.py").touch()
    (place / "inner").mkdir()
    (place / "config.json").touch()
    return place.resolve()


def put(path: Path, content: bytes) -> None:
    """Writes over what the file holds: some file systems wait for the disk where a file was emptied first."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def complaint(error: ConfigError, path: Path) -> str:
    text = str(error)
    assert well_encoded(text)
    assert str(path) in text
    return text


WHOLE = [
    {"a": {"command": "python", "args": ["server.py", "--port=1"], "env": {"KEY": "${KEY}"}, "cwd": "inner"}},
    {"a": {"type": "sse", "url": "http://localhost:1/sse", "headers": {"A": "Bearer ${KEY:-x}"}}, "b": {"command": "./x"}},
]
TEXTS = [json.dumps({"mcpServers": servers, "other": [1, None]}, indent=indent) for servers in WHOLE for indent in (None, 2)]
TOKENS = re.compile(r'("(?:[^"\\\n]|\\.)*"|[{}\[\]:,"]|\s+)')
PIECES = [*'{}[]:,"', "\\", "\n", "\x00", "\ud800", "\ufeff", '"\\ud800"', '"\\u0000"', "null", "NaN", "-Infinity", "1e999"]
PIECES += ["9" * 5000, "true", "0", '""', "[]", "{}", '"mcpServers"', '"command"', '"url"', '"type"', '"comand"', '"x": 1,']
PIECES += ["//", "'", "[" * 10_000, '{"a":' * 10_000, '"' + "x" * 300 + '"', '"${"', '"${KEY}"', '"a\\nb": 1,', '"\\u2028"']
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])


TAILS = st.sampled_from([b"", b"", b"\xff", b"\xed\xa0\x80", b"\x00", b" \n"])
FILES = st.builds(
    lambda text, changes, encoding, tail: (
        spoil(text, changes, TOKENS).encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass") + tail
    ),
    st.sampled_from(TEXTS) | st.text(max_size=30),
    edits(PIECES),
    ENCODINGS,
    TAILS,
)


@fuzz(0.4, content=FILES)
def test_any_file_holds_servers_or_is_told_in_one_line(folder: Path, content: bytes):
    path = folder / "config.json"
    put(path, content)
    try:
        servers = load_config(path)
    except ConfigError as error:
        complaint(error, path)
        return
    assert list(servers) == list(json.loads(path.read_bytes())["mcpServers"])
    assert [spec.name for spec in servers.values()] == list(servers)


STDIO = [{"command": "python", "args": ["server.py"], "cwd": "inner"}, {"type": "stdio", "command": "x", "env": {"K": SECRET}}]
STDIO += [{"command": "npx", "args": ["-y", f"--key={SECRET}", "${KEY}"], "env": {"A": "${KEY}", "B": f"${{NO:-{SECRET}}}"}}]
REMOTE = [{"type": kind, "url": f"http://{SECRET}@x/sse?k={SECRET}", "headers": {"A": SECRET}} for kind in ("sse", "http")]
VALUES = [None, 0, 1, 4711, -0.5, True, False, "", [], {}, SECRET, [SECRET], [SECRET, 4711], {"A": SECRET}, {"A": [SECRET]}]
VALUES += [{"": ""}, {"PIN\n\ud800": 4711}, {"PIN": 4711, "A": None}, [[SECRET]], ["x" * 300, "..", "/", "server.py", "\x00"]]
VALUES += ["${KEY}", {"A": "${UNSET}"}, ["${UNSET}", "${", "$KEY", "${KEY:-}", f"${{UNSET:-{SECRET}}}"], "${UNSET}", "stdio"]
VALUES += ["sse", "http", "streamable-http", "HTTP", "inner", ".", "..", "/nowhere", "python3", "\ud800", "\x00"]
FIELDS = st.sampled_from([*KEYS, "args", "env", "url", "disabled", "x-note", "arg", "comand", "header", "urls"])
NOTHING = object()
CHANGES = st.lists(st.tuples(FIELDS, st.sampled_from([*VALUES, NOTHING])), max_size=2)


def altered(entry: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    """The entry with the changes that put no secret where none belongs."""
    kept = {key: value for key, value in changes if key not in ("type", "command", "cwd") or SECRET not in str(value)}
    return {key: value for key, value in {**entry, **kept}.items() if value is not NOTHING}


ENTRIES = st.builds(altered, st.sampled_from([*STDIO, *REMOTE]), CHANGES) | st.sampled_from([4711, None, SECRET, [SECRET]])
NAMES = st.sampled_from(["a", "b", "", "two\nlines", "\ud800", "\u2028"])
ENVIRON = {"KEY": f"{SECRET}-1"}


def is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def are_texts(value: object, kind: type) -> bool:
    inside = value.values() if isinstance(value, dict) else value
    return value is None or (isinstance(value, kind) and all(isinstance(one, str) for one in inside))


def wanted(name: str, entry: Any, folder: Path) -> ServerSpec | None:
    """What an entry stands for; None where it is wrong."""
    if not isinstance(entry, dict) or entry.keys() & {"arg", "comand", "header", "urls"}:
        return None
    kind, command, url = (entry.get(key) for key in ("type", "command", "url"))
    if not (is_text(kind) and is_text(command) and is_text(url)) or bool(command) == bool(url):
        return None
    if url:
        transport = {"sse": "sse", "http": "streamable-http", "streamable-http": "streamable-http"}.get(kind or "")
        headers = entry.get("headers")
        good = transport and are_texts(headers, dict)
        return ServerSpec(name, transport, url=url, headers=headers or {}) if good else None
    args, env, cwd = (entry.get(key) for key in ("args", "env", "cwd"))
    if kind not in (None, "", "stdio") or not (are_texts(args, list) and are_texts(env, dict) and is_text(cwd)):
        return None
    place = Path(cwd) if (cwd or "").startswith("${") else folder / (cwd or "")
    command = sys.executable if command in ("python", "python3") else found(command, folder, place)
    return ServerSpec(name, "stdio", command, tuple(found(arg, folder, place) for arg in args or ()), env or {}, place)


def found(text: str, folder: Path, cwd: Path) -> str:
    beside = text and cwd != folder and os.path.exists(folder / text) and not os.path.exists(cwd / text)
    return str(folder / text) if beside else text


@fuzz(0.4, servers=st.dictionaries(NAMES, ENTRIES, max_size=2))
def test_every_entry_means_what_it_says_or_is_told_with_its_file(folder: Path, servers: dict[str, Any]):
    path = folder / "config.json"
    put(path, json.dumps({"mcpServers": servers}).encode())
    specs = {name: wanted(name, entry, folder) for name, entry in servers.items()}
    bad = [name for name, spec in specs.items() if spec is None]
    if not servers or bad:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        text = complaint(caught.value, path)
        assert (f"server {bad[0]!r}" if bad else "names no servers") in text
        assert SECRET not in text
        assert "4711" not in text
        return
    loaded = load_config(path)
    assert list(loaded.items()) == list(specs.items())
    assert SECRET not in repr(loaded)


PARTS = st.sampled_from([*"}${-_1é \n", "${", ":-", "KEY", "NO", "${KEY}", "${NO}", "${NO:-", "${KEY:-x}"])


def filled(text: str) -> str:
    """The text with its references replaced, character for character. Raises LookupError for a variable that is not set."""
    done, at = "", 0
    while at < len(text):
        end = text.find("}", at)
        name, dash, default = text[at + 2 : end].partition(":-") if text.startswith("${", at) and end > 0 else ("", "", "")
        if name.isascii() and name.isidentifier():
            done, at = done + (ENVIRON[name] if name in ENVIRON or not dash else default), end + 1
        else:
            done, at = done + text[at], at + 1
    return done


@fuzz(0.2, texts=st.lists(st.lists(PARTS, max_size=8).map("".join), min_size=3, max_size=3), remote=st.booleans())
def test_references_are_filled_as_they_are_written(folder: Path, texts: list[str], remote: bool):
    first, second, third = texts
    entry: dict[str, Any] = {"command": "x", "args": [f"a{first}", second], "env": {"E": third}}
    if remote:
        entry = {"type": "sse", "url": f"a{first}", "headers": {"A": second, "E": third}}
    spec = server_spec("a", entry, folder)
    try:
        wanted = [filled(f"a{first}"), filled(second), filled(third)]
    except LookupError:
        with pytest.raises(ConfigError, match=r"needs the environment variable \w+, which is not set") as caught:
            resolve(spec, ENVIRON)
        assert SECRET not in str(caught.value)
        return
    resolved, secrets = resolve(spec, ENVIRON)
    given = [resolved.url, resolved.headers["A"]] if remote else list(resolved.args)
    assert [*given, (resolved.headers if remote else resolved.env)["E"]] == wanted
    assert {*(wanted[1:] if remote else wanted[2:])} <= secrets
    assert SECRET not in "".join(wanted) or ENVIRON["KEY"] in secrets
    assert SECRET not in repr(spec)
