"""Who is let in, and what a request may be: everything else gets OpenAI's error shape, and never a 500."""

import json
from contextlib import suppress

import httpx2
import pytest
from openai import AuthenticationError

from art_mcp.errors import ConfigError
from art_mcp.serve.app import BODY_LIMIT
from art_mcp.serve.listen import Endpoint
from tests.serve.guests import USER, Told, opened, voice_of

pytestmark = pytest.mark.anyio

ROUTES = [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/openapi.json"), ("GET", "/nothing")]
ASKED = {"model": "told", "messages": [USER]}


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def door(anyio_backend):
    """The endpoint at which these tests knock, with the token "right"; whatever it was asked, it answers the next."""
    async with opened(voice_of(Told(["a"])), token="right") as (_, endpoint):
        yield endpoint


async def knock(endpoint, *requests):
    """The answers to requests (method, path, and what httpx takes), each with the token unless it has an Authorization."""
    async with httpx2.AsyncClient(verify=False) as client:
        answers = []
        for method, path, more in requests:
            headers = {"Authorization": f"Bearer {endpoint.token}"} | more.pop("headers", {})
            url = f"http://127.0.0.1:{endpoint.port}{path}"
            answers.append(await client.request(method, url, headers=headers, **more))
        return answers


def check_refused(answer, status, word=""):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert word in error["message"]


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer x", "Basic {token}", "Bearer {token}x", "{token}", "Bearer é"])
async def test_no_route_is_open_without_the_token(door, token):
    headers = {"Authorization": token.replace("{token}", "right").encode()}
    answers = await knock(door, *[(method, path, {"headers": headers}) for method, path in ROUTES])
    for answer in answers:
        check_refused(answer, 401, "API key")
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_client_library_says_that_its_key_is_wrong():
    async with opened(voice_of(Told(["a"]))) as (client, _):
        with pytest.raises(AuthenticationError, match="API key"):
            await client.with_options(api_key="wrong").chat.completions.create(model="told", messages=[USER])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "a:b", ""]
)
async def test_a_foreign_host_is_refused_on_every_route_token_or_not(door, host):
    for headers in ({"Host": host}, {"Host": host, "Authorization": "Bearer wrong"}):
        for answer in await knock(door, *[(method, path, {"headers": dict(headers)}) for method, path in ROUTES]):
            check_refused(answer, 421, "not")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://evil.example:443", "null", "http://localhost.evil.example", "x"]
)
async def test_a_foreign_origin_is_refused_on_every_route(door, origin):
    for answer in await knock(door, *[(method, path, {"headers": {"Origin": origin}}) for method, path in ROUTES]):
        check_refused(answer, 403, "may not ask")


async def test_this_machine_is_let_in_under_its_names_and_pages_of_its_own(door):
    named = [{"Host": host} for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000")]
    paged = [{"Origin": origin} for origin in ("http://localhost:3000", "http://127.0.0.1")]
    answers = await knock(door, *[("GET", "/v1/models", {"headers": headers}) for headers in [*named, *paged]])
    assert [answer.status_code for answer in answers] == [200] * 6


async def test_a_name_that_was_allowed_is_let_in_and_no_other():
    requests = [("GET", "/v1/models", {"headers": {"Host": host}}) for host in ("box.example:1", "other.example")]
    async with opened(voice_of(Told(["a"])), hosts=["Box.example"]) as (_, endpoint):
        answers = await knock(endpoint, *requests)
    assert [answer.status_code for answer in answers] == [200, 421]


async def test_an_endpoint_beyond_loopback_needs_the_names_by_which_it_is_called():
    with pytest.raises(ConfigError, match="is not loopback"):
        Endpoint({}, host="0.0.0.0")
    async with Endpoint({}, host="0.0.0.0", hosts=["box.example"]) as endpoint:
        assert endpoint.base_url == f"http://box.example:{endpoint.port}/v1"


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("http://box.example", "write box.example"),
        ("https://box.example:8000/v1", "write box.example"),
        ("box.example:8000", "write box.example"),
        ("box.example/v1", "write box.example"),
        ("me:hush@box.example", "write box.example"),
        (" box.example", "write box.example"),
        ("two words", "plain host name"),
        ("bücher.example", "plain host name"),
        ("*", "plain host name"),
        ("//[", "plain host name"),
        ("", "plain host name"),
    ],
)
async def test_an_allowed_host_is_a_plain_name(name, right):
    with pytest.raises(ConfigError, match="is no plain host name") as failure:
        Endpoint({}, hosts=["fine.example", name])
    assert right in str(failure.value)


async def test_an_allowed_host_may_be_an_address():
    for name in ("10.0.0.7", "2001:db8::7", "[2001:db8::7]"):
        async with Endpoint({}, host="127.0.0.1", hosts=[name]) as endpoint, httpx2.AsyncClient(verify=False) as client:
            host = f"[{name.strip('[]')}]:80" if ":" in name else name
            headers = {"Authorization": f"Bearer {endpoint.token}", "Host": host}
            assert (await client.get(f"{endpoint.base_url}/models", headers=headers)).status_code == 200


@pytest.mark.parametrize("token", ["schlüssel", "two words", "line\n", "\udce9", "\x7f"])
async def test_a_token_that_no_header_can_carry_is_refused_at_once(token):
    with pytest.raises(ConfigError, match="printable ASCII"):
        Endpoint({}, token=token)


@pytest.mark.parametrize("header", ["Authorization", "Host", "Origin"])
@pytest.mark.parametrize("value", [b"Bearer \xff\xfe", "Bearer rïght".encode(), b"\xe9", "\u2100:80".encode()])
async def test_bytes_beyond_ascii_in_a_header_are_refused(door, header, value):
    (answer,) = await knock(door, ("GET", "/v1/models", {"headers": {header: value}}))
    check_refused(answer, {"Authorization": 401, "Host": 421, "Origin": 403}[header])


async def test_a_port_in_use_is_said_so():
    async with Endpoint({}) as endpoint:
        with pytest.raises(ConfigError, match=f"port {endpoint.port} on 127.0.0.1 is in use"):
            Endpoint({}, port=endpoint.port)


BODIES = {
    "nothing": b"",
    "half": b'{"model": "told", "mess',
    "no object": b"[1]",
    "null": b"null",
    "no text": b"\xff\xfe",
    "half a character": b'{"model": "told", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "deep": b'{"model": "told", "messages": ' + b"[" * 100_000,
    "infinite": b'{"model": "told", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
    "a long number": b'{"model": "told", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
    "a deep schema": b'{"model": "told", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", '
    b'"function": {"name": "f", "parameters": ' + b'{"items": ' * 150 + b"{}" + b"}" * 150 + b"}}]}",
    "no messages": json.dumps({"model": "told"}).encode(),
    "a call without arguments": json.dumps(
        ASKED
        | {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]}]}
    ).encode(),
    "a call with half a character": json.dumps(
        ASKED
        | {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]},
                USER,
            ]
        }
    ).encode(),
}


DEEP = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": ' + "[" * 900 + "]" * 900 + "}"}}
BODIES["a deep call"] = json.dumps(ASKED | {"messages": [{"role": "assistant", "tool_calls": [DEEP]}, USER]}).encode()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_a_body_that_is_no_request_is_refused(door, body):
    (answer,) = await knock(door, ("POST", "/v1/chat/completions", {"content": body}))
    check_refused(answer, 400)


async def test_a_body_that_is_too_long_is_refused_and_one_without_an_end_is_cut_off(door):
    async def endless():
        while True:
            yield b" " * 65536

    (long,) = await knock(door, ("POST", "/v1/chat/completions", {"content": b" " * (BODY_LIMIT + 1)}))
    check_refused(long, 413, str(BODY_LIMIT))
    with suppress(httpx2.TransportError):  # whether it still reads the answer is chance; that it comes to an end is not
        (cut_off,) = await knock(door, ("POST", "/v1/chat/completions", {"content": endless()}))
        check_refused(cut_off, 413, str(BODY_LIMIT))


async def test_unknown_routes_and_methods_have_the_same_shape(door):
    nowhere, wrong = await knock(door, ("GET", "/v1/nothing", {}), ("GET", "/v1/chat/completions", {}))
    check_refused(nowhere, 404)
    check_refused(wrong, 405)
    assert wrong.headers["allow"] == "POST"


async def test_models_are_listed_under_their_names_and_their_policies(door):
    listed, one, none = await knock(door, *[("GET", f"/v1/models{name}", {}) for name in ("", "/told@0", "/nobody")])
    assert [entry["id"] for entry in listed.json()["data"]] == ["told", "told@0"]
    assert (one.json()["id"], one.json()["root"], one.json()["max_model_len"]) == ("told@0", "told", 100_000)
    check_refused(none, 404, "there is told, told@0")
