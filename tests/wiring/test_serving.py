"""`art-mcp serve` while its model loads and while it ends: whoever asks then is told so, and finds no engine half there."""

from dataclasses import replace

import pytest
from openai import APIStatusError, AsyncOpenAI, NotFoundError

from art_mcp.errors import ConfigError
from art_mcp.local.backend import LocalBackend
from art_mcp.local.models import TINY
from art_mcp.serve.listen import open_socket
from art_mcp.store.run import Run
from art_mcp.wiring.remote import only_model
from art_mcp.wiring.serving import Place, Serving, serving
from art_mcp.wiring.stage import Setting

pytestmark = pytest.mark.anyio

SETTING = Setting(environment="", trainer="torch")
QUESTION = [{"role": "user", "content": "What is 2 plus 3?"}]


def free_port():
    with open_socket("127.0.0.1", 0) as one:
        return one.getsockname()[1]


async def answers_of(port):
    """What each route says: a status, a code, and when to come back."""
    told = []
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="right", max_retries=0) as client:
        for ask in (
            client.models.list,
            lambda: client.models.retrieve("tiny"),
            lambda: client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=4),
            lambda: client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=4, stream=True),
        ):
            try:
                await ask()
                told.append((200, None, None))
            except APIStatusError as error:
                shaped = error.body.keys() == {"message", "type", "param", "code"}
                told.append((error.status_code, shaped and error.code, error.response.headers.get("retry-after")))
    return told


async def test_clients_are_asked_to_come_back_while_the_model_loads_and_are_refused_before_its_engine_ends(monkeypatch):
    """The moments are those in which the backend is about to load and to close."""
    port, seen = free_port(), []
    register, close = LocalBackend.register, LocalBackend.close

    async def about_to_load(backend, model):
        seen.append(await answers_of(port))
        await register(backend, model)

    async def about_to_close(backend):
        seen.append(await answers_of(port))
        await close(backend)

    monkeypatch.setattr(LocalBackend, "register", about_to_load)
    monkeypatch.setattr(LocalBackend, "close", about_to_close)
    async with serving(SETTING, Place(port=port, token="right")) as (served, _):
        assert served.base_url == f"http://127.0.0.1:{port}/v1"
        seen.append(await answers_of(port))
    loading, open_, closing = seen
    assert loading == [(503, "loading", "5")] * 4
    assert open_ == [(200, None, None)] * 4
    assert closing == [(503, "closing", None)] * 4


async def test_a_runs_model_answers_to_the_runs_name_and_what_is_wrong_is_told_all_names(tmp_path):
    run = Run(tmp_path / "units")
    run.checkpoint(20).parent.mkdir(parents=True)
    run.checkpoint(20).symlink_to(TINY)
    run.describe({"status": "finished"})
    names = ["units", "units-step-000020", "units-step-000020@0"]
    async with serving(replace(SETTING, model=str(run.folder)), Place(token="right")) as (served, _):
        assert (served.model, served.policy) == ("units", "units-step-000020@0")
        async with AsyncOpenAI(base_url=served.base_url, api_key="right", max_retries=0) as client:
            assert [entry.id async for entry in client.models.list()] == names
            for name in names:
                assert (await client.models.retrieve(name)).id == name
                answer = await client.chat.completions.create(model=name, messages=QUESTION, max_tokens=4)
                assert answer.model == served.policy
            for wrong in ("unit", "units@20"):
                with pytest.raises(NotFoundError, match=f"no model '{wrong}'; there is {', '.join(names)}"):
                    await client.chat.completions.create(model=wrong, messages=QUESTION)
        assert await only_model(served.base_url, "right") == "units"


async def test_a_key_is_in_no_repr():
    shown = repr((Place(token="hush"), Serving("http://x/v1", "hush", "m", "m@0")))
    assert "hush" not in shown


async def test_an_allowed_host_that_is_an_address_is_told_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"'http://box.example' is no plain host name.*write box.example"):
        async with serving(SETTING, Place(hosts=("http://box.example",))):
            pass
