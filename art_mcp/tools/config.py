"""Reads the standard `mcpServers` file into ServerSpecs, and resolves their `${NAME}` references; nothing is started here."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from art_mcp.core.json_scan import remedy
from art_mcp.core.names import suggest
from art_mcp.errors import ConfigError, boundary
from art_mcp.types import ServerSpec, Transport

KEYS = ("type", "command", "args", "env", "cwd", "url", "headers", "name")
OTHERS_KEYS = ("disabled", "alwaysAllow", "autoApprove", "timeout", "description", "envFile", "oauth", "tools")
LIKE_SERVERS = ("servers", "mcpservers", "mcp_servers", "MCPServers", "mcpServer")
"""What other programs call it, and how it is mistyped."""
URL_TYPES: Mapping[str, Transport] = {"sse": "sse", "streamable-http": "streamable-http", "http": "streamable-http"}
PYTHONS = ("python", "python3")
REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load_config(path: str | Path) -> Mapping[str, ServerSpec]:
    """The servers of a `mcpServers` file, by name, in its order. `${NAME}` references stay as they are until `resolve`.

    Raises ConfigError, which names the file: no file, broken JSON (with line and column), no servers, or an entry that
    `server_spec` refuses.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise ConfigError(f"no config file at {path}; --config names another")
    with boundary(ConfigError, f"reading {path}", OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a mark before the text
    try:
        content: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {remedy(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: its lists and objects are nested too deep") from None
    except ValueError:  # Python's own limit on the digits of an int
        raise ConfigError(f"{path}: a number in it has too many digits") from None
    entries = cast("dict[str, object]", content).get("mcpServers") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        needed = f'{path} names no servers: it needs {{"mcpServers": {{"NAME": {{"command": …}}}}}}'
        others = [key for key in LIKE_SERVERS if isinstance(content, dict) and key in content]
        raise ConfigError(f"{needed}; its {others[0]!r} has to be called 'mcpServers'" if others else needed)
    folder = path.resolve().parent
    try:
        return {name: server_spec(name, entry, folder) for name, entry in cast("dict[str, object]", entries).items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def server_spec(name: str, entry: object, folder: str | Path = ".") -> ServerSpec:
    """One `mcpServers` entry as a ServerSpec. Relative paths start at `folder`, and so does a command without `cwd`;
    the command "python" is the running interpreter.

    Raises ConfigError: a field of a wrong type, both or neither of command and url, a URL without a type, or a key that
    looks like a misspelt one (others are left to the MCP clients that know them).
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"server {name!r}: expected an object, got {kind_of(entry)}")
    fields = _Fields(name, cast("Mapping[str, object]", entry))
    fields.refuse_misspellings()
    kind, command, url = fields.text("type"), fields.text("command"), fields.text("url")
    if bool(command) == bool(url):
        raise ConfigError(
            f"server {name!r} needs either a command (stdio) or a url, {'not both' if url else 'and has neither'}"
        )
    if url:
        return ServerSpec(name, url_transport(name, kind, url), url=url, headers=fields.texts("headers"))
    if kind not in ("", "stdio"):
        raise ConfigError(f'server {name!r} has a command, so its type is "stdio", not {kind!r}')
    root = Path(folder).resolve()
    place = fields.text("cwd")
    cwd = Path(place) if place.startswith("${") else root / place
    args = tuple(anchored(argument, root, cwd) for argument in fields.items("args"))
    command = sys.executable if command in PYTHONS else anchored(command, root, cwd)
    return ServerSpec(name, "stdio", command=command, args=args, env=fields.texts("env"), cwd=cwd)


def is_target(server: str) -> bool:
    """Whether this is no name but a "file.py:server"."""
    return re.search(r"\.py(:|$)", server) is not None


def target_spec(target: str, folder: str | Path = ".") -> ServerSpec:
    """The in-process server "file.py:attribute"; a relative file starts at `folder`, and the attribute may be left out."""
    file, _, attribute = (target if not target.endswith(".py") else f"{target}:server").rpartition(":")
    path = (Path(folder) / file).absolute()
    if not os.path.isfile(path):  # Path.is_file raises for a text that is too long for a path
        raise ConfigError(f'no server at {path}; an in-process server is given as "file.py:server"')
    return ServerSpec(path.parent.name if path.stem == "server" else path.stem, "in-process", target=f"{path}:{attribute}")


def pick(servers: Mapping[str, ServerSpec], name: str, path: str | Path) -> ServerSpec:
    """The server of this name; ConfigError with the names there are, the closest one first."""
    if name not in servers:
        raise ConfigError(f"no server {name!r} in {path}; {suggest(name, servers)}")
    return servers[name]


def resolve(spec: ServerSpec, environ: Mapping[str, str] | None = None) -> tuple[ServerSpec, frozenset[str]]:
    """The spec with every `${NAME}` and `${NAME:-default}` replaced (from `os.environ`), and the values to keep secret.

    Secret are the values of env and headers and whatever a reference brought in, wherever it stands.
    Raises ConfigError naming the variable, the server and the field; never a value.
    """
    found = _References(spec.name, os.environ if environ is None else environ)
    resolved = replace(
        spec,
        command=found.fill("command", spec.command),
        args=tuple(found.fill(f"args[{index}]", argument) for index, argument in enumerate(spec.args)),
        env={key: found.fill(f"env.{plain(key)}", value) for key, value in spec.env.items()},
        cwd=spec.cwd and Path(found.fill("cwd", str(spec.cwd))),
        url=found.fill("url", spec.url),
        headers={key: found.fill(f"headers.{plain(key)}", value) for key, value in spec.headers.items()},
    )
    return resolved, frozenset((*found.values, *resolved.env.values(), *resolved.headers.values()))


class _References:
    """Fills `${NAME}` references in one server's fields and remembers the values that it put in."""

    def __init__(self, server: str, environ: Mapping[str, str]) -> None:
        self.server = server
        self.environ = environ
        self.values: list[str] = []

    def fill(self, field: str, text: str) -> str:
        return REFERENCE.sub(lambda match: self._value(match, field), text)

    def _value(self, match: re.Match[str], field: str) -> str:
        name, default = match[1], cast("str | None", match[2])
        value: str | None = self.environ.get(name, default)
        if value is None:
            raise ConfigError(f"server {self.server!r}: {field} needs the environment variable {name}, which is not set")
        self.values.append(value)
        return value


class _Fields:
    """The fields of one entry, typed; errors name the server and the field, never a value."""

    def __init__(self, server: str, entry: Mapping[str, object]) -> None:
        self.server = server
        self.entry = entry

    def text(self, key: str) -> str:
        return self._checked(key, self._given(key, ""), str)

    def items(self, key: str) -> tuple[str, ...]:
        items = self._checked(key, self._given(key, []), list)
        return tuple(self._checked(f"{key}[{index}]", item, str) for index, item in enumerate(items))

    def texts(self, key: str) -> dict[str, str]:
        pairs = self._checked(key, self._given(key, {}), dict)
        return {name: self._checked(f"{key}.{plain(name)}", value, str) for name, value in pairs.items()}

    def _given(self, key: str, absent: object) -> object:
        value = self.entry.get(key)
        return absent if value is None else value

    def _checked(self, key: str, value: Any, kind: type[Any]) -> Any:
        if not isinstance(value, kind):
            raise ConfigError(f"server {self.server!r}: {key} must be {KINDS[kind]}, got {kind_of(value)}")
        return value

    def refuse_misspellings(self) -> None:
        for key in self.entry:
            close = get_close_matches(key, KEYS, n=1, cutoff=0.75)
            if close and key not in KEYS and key not in OTHERS_KEYS:
                raise ConfigError(f"server {self.server!r}: unknown key {key!r}; did you mean {close[0]!r}?")


KINDS: Mapping[type[Any], str] = {str: "a string", list: "a list", dict: "an object"}


def kind_of(value: object) -> str:
    """What a value is, never the value: it may be a secret."""
    return KINDS.get(type(value), f"a value of type {type(value).__name__}")


def plain(name: str) -> str:
    """A name as it is, or quoted where it would not fit on a line."""
    return name if name.isprintable() else repr(name)


def url_transport(name: str, kind: str, url: str) -> Transport:
    if kind in URL_TYPES:
        return URL_TYPES[kind]
    guess = "sse" if url.partition("?")[0].rstrip("/").endswith("/sse") else "streamable-http"
    problem = f"has type {kind!r}, which no URL has: write" if kind else "has a url but no type: add"
    others = ", ".join(f'"{one}"' for one in URL_TYPES if one != guess)
    raise ConfigError(f'server {name!r} {problem} "type": "{guess}" (or {others}, lower case)')


def anchored(text: str, folder: Path, cwd: Path) -> str:
    """A path that exists from the config's folder but not from where the server runs, made absolute; else the text."""
    if cwd == folder or not text or os.path.exists(cwd / text):  # Path.exists raises for a text that is too long for a path
        return text
    path = folder / text
    return str(path) if os.path.exists(path) else text
