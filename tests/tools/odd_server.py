"""A tool server for tests, which can do what servers should not. `odd_server.py [sse|streamable-http PORT]`, default stdio."""

import os
import sys
import time

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import (
    AudioContent,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
    ToolAnnotations,
)

server = MCPServer("odd", log_level="CRITICAL")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
async def add(a: int, b: int) -> int:
    """Adds.

    Both must be whole.
    """
    return a + b


@server.tool()
async def refuse() -> str:
    raise ToolError("not today")


@server.tool()
async def pause(seconds: float) -> str:
    await anyio.sleep(seconds)
    return f"paused {seconds}"


@server.tool()
def hold(seconds: float) -> str:
    """Holds a thread, so that the process outlives the end of its stdin."""
    time.sleep(seconds)
    return "held"


@server.tool()
async def die() -> str:
    sys.stderr.write("my last words\n")
    sys.stderr.flush()
    os._exit(3)


@server.tool()
async def leave(code: int) -> str:
    """Ends as a script does: the thread that reads stdin is still at it then."""
    sys.stderr.write("my last words\n")
    sys.exit(code)


@server.tool()
def leave_thread(code: int) -> str:
    sys.stderr.write("my last words\n")
    sys.exit(code)


@server.tool()
async def shut() -> str:
    """Closes the server's streams; its process goes on."""
    for descriptor in range(10):
        if descriptor != 2:
            os.closerange(descriptor, descriptor + 1)
    await anyio.sleep_forever()
    return ""


@server.tool()
async def pid() -> int:
    return os.getpid()


@server.tool()
async def variables() -> dict[str, str]:
    return dict(os.environ)


@server.tool()
async def folder() -> str:
    return os.getcwd()


@server.tool()
async def long_text(length: int) -> str:
    return "x" * length


@server.tool(annotations=ToolAnnotations(destructive_hint=True))
async def rename(title: str, subtitle: str = "none") -> str:
    return title


@server.tool(structured_output=False)
async def exhibits() -> list[TextContent | ImageContent | AudioContent | ResourceLink | EmbeddedResource]:
    page = TextResourceContents(uri="file:///page", mime_type="text/plain", text="the page")
    return [
        TextContent(type="text", text="look:"),
        ImageContent(type="image", data="AAECAw==", mime_type="image/png"),
        AudioContent(type="audio", data="AAEC", mime_type="audio/wav"),
        ResourceLink(type="resource_link", uri="file:///big", name="big", mime_type="text/csv"),
        EmbeddedResource(type="resource", resource=page),
    ]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        server.run(sys.argv[1], port=int(sys.argv[2]))
    else:
        server.run()
