"""`--model URL#NAME`: a model behind an endpoint from the command line."""

import json
import re
import socket
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

from art_mcp.errors import ModelError
from art_mcp.local.backend import LocalBackend
from art_mcp.model import Model, TrainableModel
from tests.agent.endpoints import endpoint, http, in_turn, refused, said

HERE = str(Path(__file__).parents[1] / "wiring" / "calculator_here.py")


@contextmanager
def in_a_thread(opened):
    """An async context manager, open in a thread with an event loop of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(opened) as value:
        yield value


@asynccontextmanager
async def served():
    """The tiny policy's own endpoint: its address, its key."""
    async with LocalBackend(in_process=True, threads=1) as backend:
        model = TrainableModel(name="tiny")
        await model.register(backend)
        yield backend.endpoint(model)


def scripted(answer_always, names=("only",)):
    listed = {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in names]}

    def answer(body):
        return http(200, json.dumps(listed)) if body.get("path") == "/v1/models" else answer_always

    return in_a_thread(endpoint(answer))


def test_an_evaluation_over_our_own_endpoint_needs_no_name_and_solves_what_the_folder_solves(art):
    code, out, _ = art("eval", HERE, "--n", "40", "--json")
    assert code == 0
    folder = json.loads(out.splitlines()[-1])
    with in_a_thread(served()) as (base_url, key):
        code, out, err = art("eval", HERE, "--n", "40", "--json", "--model", base_url, "--api-key", key)
    assert code == 0, err
    remote = json.loads(out.splitlines()[-1])
    assert 0 < folder["solved"] < 1
    assert remote["usage"].pop("completion_tokens") > 100
    solved = [[found["solved"], found["n"], found["failed"], found["by_level"]["2"]["solved"]] for found in (remote, folder)]
    assert solved[0] == solved[1]
    assert re.search(r"\n  tokens in \d+.*, out \d+\n", out)


def test_the_name_may_be_left_out_where_there_is_one_model_and_prices_give_the_cost(art, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-outside")
    answer = said("7", usage={"prompt_tokens": 1000, "completion_tokens": 100})
    with scripted(answer) as seen:
        code, out, _ = art("eval", HERE, "--n", "2", "--model", seen.base_url, "--price-in", "2", "--price-out", "10", "--json")
    assert code == 0
    assert "  tokens in 2000, out 200, cost 0.0060\n" in out
    assert json.loads(out.splitlines()[-1])["cost"] == pytest.approx(0.006)
    assert {body.get("model") for body in seen.bodies} == {None, "only"}
    assert {headers["authorization"] for headers in seen.headers} == {"bearer from-outside"}


@pytest.mark.parametrize(
    ("names", "played"),
    [
        (["pol@3", "pol"], "pol"),
        (["maker/pol@3"], "maker/pol@3"),
        (["pol", "pol@3", "other"], None),
        (["a@1", "a@2"], None),
        ([], None),
    ],
)
def test_the_only_model_is_the_one_that_all_names_mean_the_versions_of_a_policy_among_them(art, names, played):
    with scripted(said("7"), names) as seen:
        code, _, err = art("eval", HERE, "--n", "1", "--model", seen.base_url)
    assert code == (0 if played else 2)
    assert {body["model"] for body in seen.bodies if "model" in body} == ({played} if played else set())
    assert played or f"name the model, as in {seen.base_url}#NAME" in err


def test_one_conversation_of_an_endpoint_is_shown_and_has_no_tokens(art):
    with scripted(said("7")) as seen:
        code, out, _ = art("rollout", HERE, "--model", f"{seen.base_url}#gpt", "--tokens", "--json")
    assert code == 0
    assert "#gpt is an endpoint, whose tokens nobody sees; the conversation:" in out
    assert "\n» policy: 7\nstopped: answered" in out
    assert json.loads(out.splitlines()[-1])["parts"] == []


@pytest.mark.parametrize(
    ("babble", "shown", "more"),
    [
        ("\n".join(map(str, range(300))), "\n".join(map(str, range(20))), "280 more lines"),
        ("x" * 10_000, "x" * 2400, "7600 more characters"),
        ("\n".join(map(str, range(20))) + "\n", "\n".join(map(str, range(20))) + "\n", ""),
    ],
)
def test_a_turn_that_goes_on_and_on_is_cut_for_people_and_whole_in_json(art, babble, shown, more):
    with scripted(said(babble)) as seen:
        code, out, _ = art("rollout", HERE, "--model", f"{seen.base_url}#gpt", "--json")
    assert code == 0
    cut = f"\n  … ({more}; --json has all)" if more else ""
    assert f"\n» policy: {shown}{cut}\nstopped: " in out
    assert ["policy", babble] in json.loads(out.splitlines()[-1])["lines"]


def test_a_name_and_a_password_in_the_address_are_sent_and_never_shown(art):
    printed = ""
    with scripted(said("7")) as seen:
        secret = seen.base_url.replace("//", "//me:hu:sh@")
        for words in (("eval", "--n", "1"), ("rollout", "--tokens"), ("eval", "--lenient"), ("train",)):
            command, *options = words
            _, out, err = art(command, HERE, *options, "--model", f"{secret}#gpt", "--json")
            printed += out + err
            assert seen.base_url in out + err
    assert {headers["authorization"] for headers in seen.headers} == {"basic bwu6ahu6c2g="}
    with scripted(refused(401, "wrong key")) as seen:
        secret = seen.base_url.replace("//", "//me:hu:sh@")
        for name in ("", "#gpt"):
            _, out, err = art("eval", HERE, "--n", "1", "--model", f"{secret}{name}")
            printed += out + err
            assert seen.base_url in err
    with pytest.raises(ModelError, match="not 'ftp://host/v1'") as failure:
        Model(name="m", base_url="ftp://me:hush@host/v1")
    assert "hu:sh" not in printed
    assert "hush" not in str(failure.value)


def test_an_endpoint_that_refuses_is_one_line(art):
    with scripted(refused(401, "wrong key")) as seen:
        for words in (["eval", "--n", "8"], ["rollout"]):
            code, out, err = art(*words, HERE, "--model", f"{seen.base_url}#gpt")
            assert (code, out) == (2, "")
            assert "wrong key" in err
            assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_the_first_request_ends_the_command_before_the_other_rollouts(art, status):
    with scripted(refused(status, "not for you")) as seen:
        code, out, err = art("eval", HERE, "--n", "40", "--concurrency", "2", "--model", f"{seen.base_url}#gpt")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: {seen.base_url}, model 'gpt': .*not for you.*\n", err)
    assert len(seen.bodies) <= 2


def test_an_endpoint_that_is_not_there_ends_the_command_at_the_first_try(art):
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    for words in (["eval", "--n", "40"], ["rollout"]):
        code, out, err = art(*words, HERE, "--model", f"{address}#gpt")
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"error: {address}, model 'gpt': it cannot be reached: .*\n", err)
        assert "tries" not in err


@pytest.mark.parametrize("broken", [refused(401, "expired"), refused(404, "gone"), refused(400, "busy")])
def test_what_fails_once_the_endpoint_has_answered_is_a_failed_rollout(art, broken):
    answers = in_turn(said("7"), broken)
    with in_a_thread(endpoint(answers)) as seen:
        code, out, err = art("eval", HERE, "--n", "3", "--concurrency", "1", "--model", f"{seen.base_url}#gpt", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert (found["n"], found["failed"]) == (1, 2)


def test_a_first_request_that_is_only_put_off_is_tried_again(art):
    with in_a_thread(endpoint(in_turn(refused(429), refused(500), said("7")))) as seen:
        code, out, err = art("eval", HERE, "--n", "2", "--concurrency", "1", "--model", f"{seen.base_url}#gpt", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["failed"] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", HERE], "is an endpoint, whose weights are elsewhere: it can be played (rollout)"),
        (["sft", HERE], "is an endpoint, whose weights are elsewhere"),
        (["check", HERE], "is an endpoint, whose weights are elsewhere"),
        (["eval", HERE, "--lenient", "--engine", "vllm"], "leave out --lenient, --engine"),
        (["eval", HERE, "--split", "tset"], "no split 'tset'"),
    ],
)
def test_what_needs_a_model_of_this_machine_says_so(art, words, told):
    code, out, err = art(*words, "--model", "http://127.0.0.1:1/v1#gpt")
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
