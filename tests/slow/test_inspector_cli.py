"""The MCP Inspector's command line against every entry of the config files, from the folders in which they stand."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from art_mcp.wiring.inspector import PACKAGE
from tests.slow.programs import ROOT, Clone, line_with, servers_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOOLS = ["add", "subtract", "multiply", "divide", "modulo", "power", "sqrt", "absolute", "round_to", "evaluate"]
PLACES = [".", "servers/calculator"]
ENTRIES = [(place, name) for place in PLACES for name in servers_of(place)]


@contextmanager
def listening(clone: Clone, entry: dict, place: str) -> Iterator[None]:
    """The server of an entry with a URL, on a free port that the clone's config is told; one with a command needs nothing."""
    if "url" not in entry:
        yield
        return
    server = ("python", "servers/calculator/server.py", "--transport", entry["type"], "--port", "0")
    with clone.starts(*server) as process:
        port = re.search(r":(\d+)/", line_with("serving", process))[1]
        config = clone.folder / place / "config.json"
        config.write_text(config.read_text().replace(":8001/", f":{port}/"))
        yield


def ask(clone: Clone, place: str, *words: str) -> tuple[int, dict]:
    """The Inspector's exit code, and the result that it printed."""
    inspector = ("npx", "@modelcontextprotocol/inspector", "--cli", "--config", "./config.json")
    code, out, err = clone.runs(*inspector, *words, "--format", "json", "-q", place=place)
    assert out, err
    return code, json.loads(out)["result"]


@pytest.mark.parametrize(("place", "name"), ENTRIES)
def test_every_entry_lists_its_tools_and_answers_a_call(clone, place, name):
    with listening(clone, servers_of(place)[name], place):
        code, listed = ask(clone, place, "--server", name, "--method", "tools/list", "--strict")
        assert ([tool["name"] for tool in listed["tools"]], code) == (TOOLS, 0)
        add = ("--method", "tools/call", "--tool-name", "add", "--tool-arg", "a=2", "b=3")
        assert ask(clone, place, "--server", name, *add) == (
            0,
            {"content": [{"type": "text", "text": "5"}], "structuredContent": {"result": 5}, "isError": False},
        )


def test_a_mistake_is_a_result_that_says_what_is_wrong(clone):
    divide = ("--method", "tools/call", "--tool-name", "divide", "--tool-arg", "a=1", "b=0")
    _, result = ask(clone, ".", "--server", "calculator", *divide)
    assert result["isError"]
    assert "division by zero" in result["content"][0]["text"]


def test_both_folders_offer_the_same_servers():
    here, there = (servers_of(place) for place in PLACES)
    for entry in here.values():
        if "args" in entry:
            entry["args"] = [Path(argument).name for argument in entry["args"]]
    assert there == here


def test_it_is_the_inspector_that_art_mcp_starts():
    pins = json.loads((ROOT / "tests" / "slow" / "package.json").read_text())["dependencies"]
    name, _, version = PACKAGE.rpartition("@")
    assert pins[name] == version
