"""The Inspector's page in a real browser, opened by the documented words as they are written, on the documented ports."""

import json
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.slow.programs import ROOT, Clone, answers, line_with
from tests.slow.test_inspector_cli import TOOLS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PORTS = (8001, 6274, 6275)
SERVE = "python servers/calculator/server.py --transport sse"
SERVE_THERE = "python server.py --transport sse"
INSPECT = "npx @modelcontextprotocol/inspector --config ./config.json --server everything"
THERE = "servers/calculator"
PAGE = ROOT / "tests" / "slow" / "page.cjs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on PATH (Debian's package is called chromium)")
    return found


@pytest.fixture
def ports() -> None:
    if busy := list(filter(answers, PORTS)):
        pytest.skip(f"port {busy[0]}, which the documented words use, is taken")


@contextmanager
def looking(clone: Clone, browser: str, url: str, *servers: str) -> Iterator[list[dict]]:
    """What the page showed of each server; it is open, and connected to the last one, until the block ends."""
    folder = str(clone.folder.parent)  # a failing test keeps it, with a picture of the page
    with clone.starts("node", str(PAGE), browser, url, folder, *servers) as page:
        yield [json.loads(line_with('"server"', page)) for _ in servers]


@pytest.mark.usefixtures("ports")
@pytest.mark.parametrize(
    ("serve", "serve_place", "inspect_place", "servers"),
    [
        (SERVE, ".", ".", ["everything", "calculator-sse", "calculator"]),
        (SERVE_THERE, THERE, ".", ["everything"]),
        (SERVE_THERE, THERE, THERE, ["everything", "calculator"]),
        (SERVE.replace("sse", "streamable-http"), ".", ".", ["calculator-http"]),
    ],
    ids=["the README", "the server from its folder", "both from its folder", "streamable HTTP"],
)
def test_the_documented_words_open_a_page_that_lists_and_calls_tools(
    clone, browser, serve, serve_place, inspect_place, servers
):
    with clone.starts(*shlex.split(serve), place=serve_place) as server:
        line_with("serving", server)
        with clone.starts(*shlex.split(INSPECT), place=inspect_place) as inspector:
            url = line_with("?MCP_INSPECTOR_API_TOKEN=", inspector)
            with looking(clone, browser, url, *servers) as shown:
                assert shown == [{"server": name, "tools": TOOLS, "result": "5"} for name in servers]


@pytest.mark.usefixtures("ports")
def test_art_mcp_inspect_opens_the_page_and_ctrl_c_ends_it_with_the_server_that_it_started(clone, browser):
    with clone.starts("art-mcp", "inspect", "calculator") as inspector:
        url = line_with("?MCP_INSPECTOR_API_TOKEN=", inspector)
        with looking(clone, browser, url, "calculator") as shown:
            assert shown == [{"server": "calculator", "tools": TOOLS, "result": "5"}]
            inspector.send_signal(signal.SIGINT)
            assert inspector.wait(30) == 130


def test_these_are_the_words_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{SERVE}\n{INSPECT}\n" in text
