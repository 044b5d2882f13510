"""Plays the part of vLLM's server that we ask, with the answers that vLLM 0.32.0 gave; started by `fake_vllm`.

`POST /hold` keeps completions waiting until `POST /release`; `GET /told` lists what was asked. A model whose folder has a
file `broken` does not start, and one with `slow-<port>` not before that is gone; an adapter with `broken` is refused.
"""

import argparse
import asyncio
import os
import socket
import sys
import time
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MODEL_LENGTH = 64


def is_broken(folder: str | Path) -> bool:
    return not Path(folder).is_dir() or (Path(folder) / "broken").exists()


class Fake:
    def __init__(self, args: argparse.Namespace, door: str) -> None:
        self.args, self.door = args, door
        self.adapters: dict[str, str] = {}
        self.told: list[str] = []
        self.free = asyncio.Event()
        self.free.set()

    def refusal(self, status: int, kind: str, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)

    async def completions(self, request: Request) -> Response:
        asked = await request.json()
        found = await self.turn(asked["model"], asked["prompt"], asked)
        if isinstance(found, Response):
            return found
        ids, reason = found
        logprobs = {"token_logprobs": [-0.5] * len(ids), "tokens": ["x"] * len(ids), "text_offset": [0] * len(ids)}
        choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": reason[0], "stop_reason": reason[1]}
        choice |= {"token_ids": ids, "prompt_token_ids": asked["prompt"]}
        return JSONResponse({"id": "cmpl-1", "object": "text_completion", "model": asked["model"], "choices": [choice]})

    async def generate(self, request: Request) -> Response:
        if self.door != "always" and not getattr(self.args, "enable_scale_out", False):
            message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
            return self.refusal(403, "PermissionDeniedError", message)
        asked = await request.json()
        assert not set("@/") & set(asked["cache_salt"])
        found = await self.turn(asked["model"], asked["token_ids"], asked["sampling_params"])
        if isinstance(found, Response):
            return found
        ids, reason = found
        content = [{"token_id": token, "logprob": -0.5, "rank": 1, "top_logprobs": []} for token in ids]
        choice = {"index": 0, "logprobs": {"content": content}, "finish_reason": reason[0], "stop_reason": reason[1]}
        return JSONResponse({"request_id": "g-1", "model": asked["model"], "choices": [choice | {"token_ids": ids}]})

    async def turn(self, model: str, prompt: list[int], asked: dict) -> Response | tuple[list[int], tuple]:
        """Sampled tokens with the reason for their end, or a refusal."""
        known = (self.args.served_model_name, *self.adapters)
        if model not in known:
            message = f"The model `{model}` does not exist. Valid aliases: {self.args.served_model_name}."
            return self.refusal(404, "NotFoundError", message)
        if max(prompt) >= 1000:
            return self.refusal(400, "BadRequestError", f"Token id {max(prompt)} is out of vocabulary")
        if max(prompt) == 999:
            return self.refusal(500, "InternalServerError", "EngineCore encountered an issue.")
        if max(prompt) in (997, 998):  # as Python 3.12 says it, and 3.11
            said = "Out of range float values are not JSON compliant" + ": nan" * (max(prompt) == 998)
            return self.refusal(400, "BadRequestError", said)
        self.told.append(f"begin {model}")
        await self.free.wait()
        self.told.append(f"end {model}")
        stop, count = asked.get("stop_token_ids", []), asked["max_tokens"]
        ids = [prompt[-1] + 1 + number for number in range(count)]
        ended = next((place for place, token in enumerate(ids) if token in stop), None)
        ids = ids if ended is None else ids[: ended + 1]
        return ids, ("length", None) if ended is None else ("stop", ids[-1])

    async def load(self, request: Request) -> Response:
        asked = await request.json()
        name, path = asked["lora_name"], asked["lora_path"]
        self.told.append(f"load {name}")
        if name in self.adapters:
            message = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set …"
            return self.refusal(400, "InvalidUserInput", message)
        if is_broken(path):
            return self.refusal(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for <path>")
        self.adapters[name] = path
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        self.told.append(f"unload {name}")
        if self.adapters.pop(name, None) is None:
            return self.refusal(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    async def models(self, request: Request) -> Response:
        base = {"id": self.args.served_model_name, "root": self.args.model, "max_model_len": MODEL_LENGTH}
        cards = [{"id": name, "root": path, "max_model_len": None} for name, path in self.adapters.items()]
        return JSONResponse({"object": "list", "data": [base, *cards]})

    async def rpc(self, request: Request) -> Response:
        asked = await request.json()
        folder = Path(asked["kwargs"]["weights_path"])
        self.told.append(f"{asked['method']} {folder.name}")
        if is_broken(folder):
            return self.refusal(500, "InternalServerError", "reload failed")
        return JSONResponse({"results": [None]})

    async def simple(self, request: Request) -> Response:
        match request.url.path:
            case "/hold":
                self.free.clear()
            case "/release":
                self.free.set()
            case "/reset_prefix_cache":
                self.told.append("reset")
            case "/told":
                graphs = {"graphs_are_cut": os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH")}
                return JSONResponse([{**vars(self.args), **graphs}, self.told])
            case "/version":
                return JSONResponse({"version": "0.32.0"})
        return JSONResponse({})

    def app(self) -> Starlette:
        posts = {
            "/v1/completions": self.completions,
            "/inference/v1/generate": self.generate,
            "/v1/load_lora_adapter": self.load,
            "/collective_rpc": self.rpc,
        }
        posts |= {"/v1/unload_lora_adapter": self.unload}
        posts |= dict.fromkeys(("/hold", "/release", "/reset_prefix_cache"), self.simple)
        gets = {"/v1/models": self.models} | dict.fromkeys(("/told", "/version", "/health"), self.simple)
        app = Starlette(
            routes=[Route(path, work, methods=["POST"]) for path, work in posts.items()]
            + [Route(path, work) for path, work in gets.items()]
        )

        async def guarded(scope, receive, send):
            key = dict(scope.get("headers", ())).get(b"authorization", b"").decode()
            if scope["type"] == "http" and scope["path"] != "/health" and key != f"Bearer {os.environ['VLLM_API_KEY']}":
                await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
            else:
                await app(scope, receive, send)

        return guarded


def serve(args: argparse.Namespace, *, door: str) -> None:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind((args.host, args.port))
    if (Path(args.model) / "broken").exists():
        sys.stderr.write("(EngineCore pid=8) ERROR 11-23 19:14:22 [core.py:1] ValueError: these weights are broken\n")
        sys.exit(1)
    while (Path(args.model) / f"slow-{args.port}").exists():
        time.sleep(0.01)
    keep = int(os.environ["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"])
    server = uvicorn.Server(
        uvicorn.Config(Fake(args, door).app(), log_level="info", timeout_keep_alive=keep, timeout_graceful_shutdown=1)
    )
    asyncio.run(server.serve([listening]))
