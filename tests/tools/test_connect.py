"""Connections that do not come about: each is one clear line that names the server and says what to do."""

import os
import sys
import tempfile
from pathlib import Path

import anyio
import pytest
from mcp import Client
from odd import odd_in_process, odd_stdio

from art_mcp.errors import ConfigError, ToolServerError
from art_mcp.tools.connect import connect
from art_mcp.types import ServerSpec
from tests.ports import silent_port

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["auto", "legacy"])
def mode(request) -> str:
    return request.param


async def failure_of(spec: ServerSpec, **options) -> str:
    with pytest.raises(ToolServerError) as caught:
        async with connect(spec, **options):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"server {spec.name!r} ")
    return message


async def test_a_server_that_exits_at_once_is_quoted(mode):
    spec = ServerSpec("broken", "stdio", command=sys.executable, args=("-c", "import no_such_module"))
    message = await failure_of(spec, mode=mode)
    assert "ended with exit code 1 before it was ready" in message
    assert message.endswith("ModuleNotFoundError: No module named 'no_such_module'")


async def test_what_a_server_prints_among_its_messages_is_told_of_it_and_of_no_other():
    printing = ServerSpec("chatty", "stdio", command=sys.executable, args=("-c", "print('Starting up!'); raise SystemExit(4)"))
    quiet = ServerSpec("quiet", "stdio", command="sh", args=("-c", "read line; exit 5"))
    told: dict[str, str] = {}

    async def fail(spec: ServerSpec) -> None:
        told[spec.name] = await failure_of(spec)

    async with anyio.create_task_group() as group:
        for spec in (printing, quiet):
            group.start_soon(fail, spec)
    assert told["chatty"].endswith("printed to stdout, where nothing but MCP messages belongs: 'Starting up!'")
    assert told["chatty"].startswith("server 'chatty' ended with exit code 4 before it was ready: ")
    assert told["quiet"] == "server 'quiet' ended with exit code 5 before it was ready: it wrote nothing to stderr"


async def test_its_last_words_do_not_give_a_secret_away(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter22")
    program = "import os, sys; sys.exit('shouting ' + os.environ['SHOUT'])"
    spec = ServerSpec("loud", "stdio", command=sys.executable, args=("-c", program), env={"SHOUT": "${SECRET}"})
    message = await failure_of(spec)
    assert message.endswith("shouting ***")


async def test_a_command_that_does_not_exist_is_named():
    assert "no command 'no-such-command'" in await failure_of(ServerSpec("missing", "stdio", command="no-such-command"))


async def test_a_command_with_its_arguments_in_it_is_told_where_they_belong():
    message = await failure_of(ServerSpec("whole", "stdio", command="python server.py --fast"))
    assert message.endswith(
        """no command 'python server.py --fast'; what follows the program's name belongs into "args", a list"""
    )


async def test_a_working_folder_that_does_not_exist_is_named():
    spec = ServerSpec("lost", "stdio", command=sys.executable, cwd=Path("/no/such/folder"))
    assert "/no/such/folder does not exist" in await failure_of(spec)


async def test_where_no_file_can_be_made_for_its_words_that_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ToolServerError, match=r"no file can be made for what a server writes to stderr: .*nowhere"):
        async with connect(odd_stdio()):
            pass


async def test_a_server_that_never_answers_is_given_up(mode):
    mute = ServerSpec("mute", "stdio", command=sys.executable, args=("-c", "import sys; sys.stdin.read()"))
    assert "did not answer within 0.3 s" in await failure_of(mute, mode=mode, connect_timeout=0.3)


@pytest.mark.parametrize("transport", ["sse", "streamable-http"])
async def test_a_port_where_nothing_listens_is_named_without_credentials(transport, mode):
    with silent_port() as held:
        port = held.getsockname()[1]
        message = await failure_of(ServerSpec("away", transport, url=f"http://me:word@127.0.0.1:{port}/x?key=word"), mode=mode)
    assert f"nothing listens at http://127.0.0.1:{port}/x;" in message
    assert "word" not in message


@pytest.mark.parametrize("transport", ["sse", "streamable-http"])
@pytest.mark.parametrize("server", ["sse", "http"])
async def test_a_wrong_path_is_a_404_with_a_hint(transport, server, mode, request):
    url = request.getfixturevalue(server).url.rpartition("/")[0] + "/elsewhere"
    message = await failure_of(ServerSpec("astray", transport, url=url), mode=mode)
    assert f"answered 404 Not Found at {url}" in message
    assert "the path is usually" in message


async def test_a_wrong_type_for_a_url_gets_a_hint(sse, mode):
    message = await failure_of(ServerSpec("mistaken", "streamable-http", url=sse.url), mode=mode)
    assert 'for /sse the type is "sse"' in message


async def test_a_variable_that_is_not_set_is_named_with_server_and_field():
    with pytest.raises(ConfigError, match=r"server 'odd': env\.A needs the environment variable NO_SUCH_VARIABLE"):
        async with connect(odd_stdio(env={"A": "${NO_SUCH_VARIABLE}"})):
            pass


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "has no MCP server named 'server'; it has none"),
        ("from mcp.server import MCPServer\nother = MCPServer()", "it has other"),
        ("1 / 0", "division by zero"),
    ],
)
async def test_a_file_without_a_server_is_a_config_error(source, message, tmp_path):
    file = tmp_path / "some_server.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=message):
        async with connect(ServerSpec("some", "in-process", target=f"{file}:server")):
            pass


@pytest.mark.parametrize("transport", ["http", "sse"])
async def test_both_eras_are_spoken(transport, request):
    spec = request.getfixturevalue(transport)
    async with connect(spec) as new, connect(spec, mode="legacy") as old:
        assert (new.client.protocol_version, old.client.protocol_version) == ("2026-07-28", "2025-11-25")


async def test_cancelling_the_block_ends_the_server_before_it_is_left():
    with anyio.move_on_after(60) as scope:
        async with connect(odd_stdio()) as connection:
            pid = (await connection.client.call_tool("pid")).structured_content["result"]
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_server_file_is_loaded_anew_for_each_session():
    async with connect(odd_in_process()) as one, connect(odd_in_process()) as two:
        assert isinstance(one.client, Client)
        assert one.client.server is not two.client.server


async def test_secrets_are_in_no_repr(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter22")
    spec = ServerSpec(
        "odd", "in-process", target=odd_in_process().target, env={"A": "${SECRET}"}, headers={"B": "plain-secret"}
    )
    async with connect(spec) as connection:
        assert "hunter22" not in repr(connection.endpoint)
        assert "plain-secret" not in repr(connection.endpoint)
