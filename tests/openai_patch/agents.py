"""Agents as people write them on the `openai` package, and endpoints that stand between them and a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from art_mcp.serve.listen import Server, open_socket
from art_mcp.types import ToolCall

MODEL = "tiny"


async def usual(client: AsyncOpenAI, question: str, *, toolbox: Any, turns: int = 6, model: str = MODEL, **options: Any) -> str:
    """The loop that everybody writes."""
    messages: list[Any] = [{"role": "user", "content": question}]
    tools = [tool.schema() for tool in toolbox.tools]
    for _ in range(turns):
        answer = await client.chat.completions.create(model=model, messages=messages, tools=tools, max_tokens=192, **options)
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = await toolbox.call(ToolCall(call.function.name, json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result.text})
    return ""


@dataclass
class Between:
    """A proxy before an endpoint: `told` are the bodies that it was asked with, `forge` changes answers."""

    base_url: str
    api_key: str
    forge: Callable[[dict[str, Any], Response], Awaitable[Response] | Response] | None = None
    told: list[dict[str, Any]] = field(default_factory=list)

    async def pass_on(self, request: Request) -> Response:
        body = await request.body()
        headers = {"authorization": f"Bearer {self.api_key}", "content-type": "application/json"}
        async with httpx2.AsyncClient() as http:
            url = self.base_url + request.url.path.removeprefix("/v1")
            answer = await http.request(request.method, url, content=body, headers=headers, timeout=60)
        seen = Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])
        if request.method == "GET":
            return seen
        self.told.append(json.loads(body))
        forged = seen if self.forge is None else self.forge(self.told[-1], seen)
        return forged if isinstance(forged, Response) else await forged

    @asynccontextmanager
    async def client(self):
        """A client of this proxy, while it runs."""
        import uvicorn

        socket = open_socket("127.0.0.1", 0)
        app = Starlette(routes=[Route("/v1/{path:path}", self.pass_on, methods=["GET", "POST"])])
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        server = Server(config)
        task = asyncio.get_running_loop().create_task(server.serve([socket]))
        try:
            async with AsyncOpenAI(
                base_url=f"http://127.0.0.1:{socket.getsockname()[1]}/v1", api_key="k", max_retries=0
            ) as client:
                yield client
        finally:
            server.should_exit = True
            await asyncio.wait([task])
            socket.close()


def forged(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[dict[str, Any], Response], Response]:
    """Changes the JSON of whole answers with token ids, given what was asked; streams pass."""

    def forge(asked: dict[str, Any], answer: Response) -> Response:
        if asked.get("stream") or not asked.get("return_token_ids"):
            return answer
        body = json.loads(bytes(answer.body))
        change(body, asked)
        return Response(json.dumps(body), answer.status_code, media_type="application/json")

    return forge
