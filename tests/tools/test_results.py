"""What a call returns: text of everything, a cap on its size, and whose fault a protocol error is."""

import pytest
from mcp import MCPError
from mcp.server import MCPServer, Server
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import INTERNAL_ERROR, INVALID_PARAMS, CallToolResult, ListToolsResult, Tool
from odd import odd_in_process, odd_stdio, text_of

from art_mcp.errors import ToolServerError
from art_mcp.tools import open_tools
from art_mcp.types import ToolCall, ToolResult

pytestmark = pytest.mark.anyio
IN_PROCESS = odd_in_process()


async def test_content_that_is_not_text_is_described():
    async with open_tools([IN_PROCESS]) as toolbox:
        assert (await text_of(toolbox, "exhibits")).splitlines() == [
            "look:",
            "[image image/png, 4 bytes]",
            "[audio audio/wav, 3 bytes]",
            "[resource link file:///big, big, text/csv]",
            "[resource file:///page, text/plain]",
            "the page",
        ]


async def test_a_long_result_is_cut_and_says_by_how_much():
    async with open_tools([IN_PROCESS], text_limit=100) as toolbox:
        assert await text_of(toolbox, "long_text", length=100) == "x" * 100
        assert await text_of(toolbox, "long_text", length=250) == "x" * 100 + "\n[150 more characters cut]"


async def test_two_megabytes_come_through_streamable_http_and_stdio(http):
    for spec in (http, odd_stdio()):
        async with open_tools([spec], text_limit=3_000_000) as toolbox:
            assert len(await text_of(toolbox, "long_text", length=2_000_000)) == 2_000_000


async def test_a_result_over_the_limit_of_sse_loses_that_session_with_a_hint(sse):
    async with open_tools([sse]) as toolbox:
        with pytest.raises(ToolServerError, match=r"server 'odd' is lost at http://.*over 1 MiB"):
            await text_of(toolbox, "long_text", length=2_000_000)


def strict_server() -> Server:
    """A server of protocol errors: its tools are on two pages, and each call fails with the code that it asks for."""

    async def list_tools(context, params) -> ListToolsResult:
        second = params is not None and params.cursor == "more"
        tool = Tool(name="two" if second else "one", input_schema={"type": "object"})
        return ListToolsResult(tools=[tool], next_cursor=None if second else "more")

    async def call_tool(context, params) -> CallToolResult:
        if "code" in params.arguments:
            raise MCPError(params.arguments["code"], "as you wish")
        return CallToolResult(content=[], structured_content={"π": 3})

    return Server("strict", on_list_tools=list_tools, on_call_tool=call_tool)


async def test_all_pages_of_a_listing_are_offered():
    async with open_tools([strict_server()]) as toolbox:
        assert [tool.name for tool in toolbox.tools] == ["one", "two"]
        assert toolbox.tools[0].parameters == {"type": "object", "properties": {}}


async def test_a_protocol_error_about_the_call_is_a_result():
    async with open_tools([strict_server()]) as toolbox:
        result = await toolbox.call(ToolCall("one", {"code": INVALID_PARAMS}))
        assert result == ToolResult("as you wish", is_error=True)


async def test_a_protocol_error_about_the_server_is_its_failure_and_the_next_call_works():
    async with open_tools([strict_server()]) as toolbox:
        with pytest.raises(ToolServerError, match="server 'strict' failed at 'one': as you wish"):
            await toolbox.call(ToolCall("one", {"code": INTERNAL_ERROR}))
        assert await toolbox.call(ToolCall("one", {})) == ToolResult('{"π": 3}', structured={"π": 3})


HALF = "\ud83d"


def halving_server() -> MCPServer:
    """Its texts have halves of characters: one alone, and two that belong together."""
    server = MCPServer("halving", log_level="CRITICAL")

    @server.tool(structured_output=False)
    async def say() -> str:
        return f"é {HALF} \ud83d\ude00"

    @server.tool()
    async def tell() -> CallToolResult:
        return CallToolResult(content=[], structured_content={"a": HALF})

    @server.tool()
    async def refuse() -> str:
        raise ToolError(f"no {HALF}")

    @server.tool()
    async def fail(code: int) -> str:
        raise MCPError(code, f"no {HALF}")

    return server


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_half_characters_of_an_in_process_tool_become_whole_ones(mode):
    async with open_tools([halving_server()], mode=mode) as toolbox:
        assert await text_of(toolbox, "say") == "é \ufffd \U0001f600"
        assert await text_of(toolbox, "tell") == '{"a": "\ufffd"}'
        assert await text_of(toolbox, "refuse") == "Error executing tool refuse: no \ufffd"
        assert await text_of(toolbox, "fail", code=INVALID_PARAMS) == "no \ufffd"
        with pytest.raises(ToolServerError, match="failed at 'fail': no \ufffd"):
            await text_of(toolbox, "fail", code=INTERNAL_ERROR)
