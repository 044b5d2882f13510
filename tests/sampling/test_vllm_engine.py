"""The engine on a server that plays vLLM's part: which version is loaded and unloaded when, and what a dead server leaves."""

import asyncio
import json
import os
import signal
import stat
import sys
from collections import defaultdict
from pathlib import Path

import anyio
import psutil
import pytest

from art_mcp.agent.overlap import open_rounds
from art_mcp.agent.places import places_of
from art_mcp.errors import ConfigError, EngineError
from art_mcp.sampling.vllm_args import Served, VllmSettings
from art_mcp.sampling.vllm_engine import VllmEngine
from art_mcp.sampling.vllm_graphs import BREAKABLE
from art_mcp.sampling.vllm_messages import COMPLETIONS, TOKENS
from art_mcp.sampling.vllm_server import errors_among
from art_mcp.types import SamplingParams, Span
from tests.processes import remaining, runs

pytestmark = pytest.mark.anyio

FAKE = Path(__file__).with_name("fake_vllm.py")
PARAMS = SamplingParams(max_tokens=4)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No GPU, unless a test brings one, and a cache of the test's own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("art_mcp.sampling.vllm_server.POLL_SECONDS", 0.02)  # the fake starts in a moment


@pytest.fixture
def python(tmp_path):
    """An "interpreter that has vLLM"."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.fixture
def folders(tmp_path):
    """Makes the folder of a version; `broken`: one that a server refuses."""

    def make(name, *, broken=False):
        folder = tmp_path / name
        folder.mkdir()
        if broken:
            (folder / "broken").touch()
        return folder

    return make


@pytest.fixture
async def engine(python, tmp_path, folders):
    engine = VllmEngine(Served("policy", str(folders("base")), "float32", lora_rank=4), VllmSettings(python))
    await engine.start(0, folders("v0"))
    yield engine
    await engine.close()


async def draw(engine, prompt=(1, 2, 3), *, stop=()):
    return await engine.sample(prompt, params=PARAMS, stop=frozenset(stop))


async def post(engine, path):
    assert (await engine.server.connections.post(path, {}))[0] == 200


async def told(engine):
    """What the server has been asked, the tokens of its start apart."""
    _, answer = await engine.server.connections.get("/told")
    lines = json.loads(answer)[1]
    start = 2 if engine.facts["engine_door"] == COMPLETIONS.path else 4
    return lines[start:]


async def in_flight(engine, count=1):
    """So many requests, held by the server; awaiting one releases none."""
    await post(engine, "/hold")
    begun = [line for line in await told(engine) if line.startswith("begin")]
    tasks = [asyncio.create_task(draw(engine)) for _ in range(count)]
    while True:
        if len([line for line in await told(engine) if line.startswith("begin")]) == len(begun) + count:
            return tasks
        await asyncio.sleep(0.01)


def kill(engine):
    """Ends the server itself; its launcher follows."""
    launcher = psutil.Process(engine.server._process.pid)
    (server,) = [process for process in launcher.children() if str(FAKE) in process.cmdline()]
    server.send_signal(signal.SIGKILL)
    return launcher


async def test_a_turn_is_its_tokens_and_logprobs_and_the_version_that_sampled_it(engine):
    free, cut = await draw(engine), await draw(engine, stop={5, 9})
    assert (free.span, free.stopped) == (Span((4, 5, 6, 7), (-0.5,) * 4, 0), False)
    assert (cut.span, cut.stopped) == (Span((4, 5), (-0.5,) * 2, 0), True)
    assert engine.context_length == 64
    assert engine.facts["vllm"] == "0.32.0"
    assert not any(engine.server.key in word for word in engine.facts["engine_command"])


@pytest.mark.parametrize("door", ["asked", "always", "never"])
async def test_tokens_come_through_the_leanest_door_that_the_server_offers(python, folders, monkeypatch, door):
    monkeypatch.setenv("FAKE_VLLM_DOOR", door)
    engine = VllmEngine(Served("policy", str(folders("base")), "float32", lora_rank=4), VllmSettings(python))
    await engine.start(0, folders("v0"))
    try:
        wanted = COMPLETIONS if door == "never" else TOKENS
        assert engine.facts["engine_door"] == wanted.path
        assert ("--enable-scale-out" in engine.server.command) == (door == "asked")
        free, cut = await draw(engine), await draw(engine, stop={5, 9})
        assert (free.span, free.stopped) == (Span((4, 5, 6, 7), (-0.5,) * 4, 0), False)
        assert (cut.span, cut.stopped) == (Span((4, 5), (-0.5,) * 2, 0), True)
        await engine.server.ask("/v1/unload_lora_adapter", {"lora_name": "policy@0"})
        with pytest.raises(EngineError, match="The model `policy@0` does not exist"):
            await draw(engine)
    finally:
        await engine.close()


async def test_a_turn_is_no_longer_than_the_context(engine):
    assert len((await draw(engine, [1] * 62)).span.token_ids) == 2
    with pytest.raises(EngineError, match="a prompt of 64 tokens does not fit a context of 64 tokens"):
        await draw(engine, [1] * 64)
    with pytest.raises(EngineError, match="Token id 5000 is out of vocabulary"):
        await draw(engine, [5000])


async def test_a_turn_is_answered_though_the_server_does_not_let_go_of_its_old_version(engine, folders, capsys):
    (flying,) = await in_flight(engine)
    await engine.publish(1, folders("v1"))
    await engine.server.ask("/v1/unload_lora_adapter", {"lora_name": "policy@0"})
    await post(engine, "/release")
    assert (await flying).span.policy_version == 0
    assert "keeps an adapter that nobody needs: vLLM refused /v1/unload_lora_adapter" in capsys.readouterr().err
    await engine.publish(2, folders("v2"))
    assert (await draw(engine)).span.policy_version == 2


async def test_a_new_version_is_a_new_name_and_the_idle_old_one_goes_with_its_folder(engine, folders, tmp_path):
    await draw(engine)
    await engine.publish(1, folders("v1"))
    assert engine.policy.step == 1
    assert (await draw(engine)).span.policy_version == 1
    assert await told(engine) == [
        *("load policy@0", "begin policy@0", "end policy@0"),
        *("load policy@1", "unload policy@0", "begin policy@1", "end policy@1"),
    ]
    assert not (tmp_path / "v0").exists()
    assert (tmp_path / "v1").exists()


async def test_an_old_version_stays_until_its_last_request_has_ended(engine, folders, tmp_path):
    old = await in_flight(engine, count=2)
    await engine.publish(1, folders("v1"))
    new = asyncio.create_task(draw(engine))
    assert (tmp_path / "v0").exists()
    assert "unload policy@0" not in await told(engine)
    await post(engine, "/release")
    assert [turn.span.policy_version for turn in await asyncio.gather(*old, new)] == [0, 0, 1]
    lines = await told(engine)
    assert lines.index("unload policy@0") > max(place for place, line in enumerate(lines) if line == "end policy@0")
    assert not (tmp_path / "v0").exists()


async def test_a_version_waits_for_room_until_one_of_two_that_are_still_sampled_under_is_gone(engine, folders):
    old = await in_flight(engine)
    await engine.publish(1, folders("v1"))
    (newer,) = await in_flight(engine)
    await engine.publish(2, folders("v2"))  # which does not wait for either
    fourth = asyncio.create_task(engine.publish(3, folders("v3")))
    for _ in range(3):
        await post(engine, "/hold")  # time for a wrong order to show
    assert not fourth.done()
    assert "unload policy@0" not in await told(engine)
    newer.cancel()
    await fourth
    await post(engine, "/release")
    await asyncio.gather(*old)
    lines = await told(engine)
    assert lines.index("load policy@2") < lines.index("unload policy@1") < lines.index("load policy@3")
    assert lines.index("load policy@3") < lines.index("unload policy@0")
    assert (await draw(engine)).span.policy_version == 3


async def test_a_cancelled_request_lets_its_version_go(engine, folders, tmp_path):
    (old,) = await in_flight(engine)
    await engine.publish(1, folders("v1"))
    old.cancel()
    await asyncio.wait([old])
    assert "unload policy@0" in await told(engine)
    assert not (tmp_path / "v0").exists()


async def test_a_refused_adapter_raises_and_the_old_policy_goes_on(engine, folders):
    with pytest.raises(EngineError, match="Loading lora policy@1 failed: No adapter found"):
        await engine.publish(1, folders("v1", broken=True))
    assert (await draw(engine)).span.policy_version == 0


async def test_an_adapter_whose_loading_was_not_answered_is_published_under_the_same_name_again(engine, folders, monkeypatch):
    request = engine.server.connections.post

    async def broken(path, values):
        await request(path, values)
        raise ConnectionResetError("the answer was lost")

    monkeypatch.setattr(engine.server.connections, "post", broken)
    with pytest.raises(EngineError, match="vLLM does not answer"):
        await engine.publish(1, folders("v1"))
    monkeypatch.undo()
    await engine.publish(1, folders("v1-again"))
    assert (await draw(engine)).span.policy_version == 1
    assert (await told(engine))[1:4] == ["load policy@1", "unload policy@1", "load policy@1"]


async def test_a_killed_server_fails_what_is_in_flight_and_the_next_request_starts_another(engine, folders, tmp_path):
    await engine.publish(1, folders("v1"))
    flying = await in_flight(engine, count=3)
    first = kill(engine)
    for failure in await asyncio.gather(*flying, return_exceptions=True):
        assert isinstance(failure, EngineError)
        assert "its log:" in str(failure)
    turns = await asyncio.gather(*(draw(engine) for _ in range(3)))
    assert {turn.span.policy_version for turn in turns} == {1}
    assert (await told(engine))[0] == "load policy@1"
    assert not runs(first)
    assert (tmp_path / "v1").exists()


async def test_weights_published_to_a_dead_server_are_those_of_the_next_one(engine, folders):
    kill(engine).wait(60)
    await engine.publish(1, folders("v1"))
    assert engine.server.alive
    assert (await draw(engine)).span.policy_version == 1
    assert (await told(engine))[0] == "load policy@1"


async def test_a_failing_engine_is_looked_after_before_the_next_request(engine):
    with pytest.raises(EngineError, match=r"vLLM failed: EngineCore encountered an issue\."):
        await draw(engine, [999])
    before = engine.server._process.pid
    assert (await draw(engine)).span.policy_version == 0  # its health is good, so it stays
    assert engine.server._process.pid == before


@pytest.mark.parametrize("token", [997, 998])
async def test_an_engine_that_computes_no_numbers_fails_the_request_with_what_to_look_at(engine, token):
    with pytest.raises(EngineError, match="logprobs that are no numbers: look at engine_args"):
        await draw(engine, [token])
    assert (await draw(engine)).span.policy_version == 0


async def test_all_that_wait_for_a_start_share_its_failure_and_the_next_one_tries_again(engine, tmp_path):
    kill(engine).wait(60)
    mark = tmp_path / "base" / "broken"
    mark.touch()
    failures = await asyncio.gather(*(draw(engine) for _ in range(4)), return_exceptions=True)
    assert {type(failure) for failure in failures} == {EngineError}
    assert len({str(failure) for failure in failures}) == 1
    assert "vLLM ended with exit code 1 before it answered: ValueError: these weights are broken" in str(failures[0])
    mark.unlink()
    assert (await draw(engine)).stopped is False


def test_what_pydantic_says_under_its_error_is_quoted():
    log = """  File "/vllm/engine/arg_utils.py", line 1955, in create_model_config
    return ModelConfig(
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (4096) is greater than the derived max_model_len
    For further information visit the manual
ValueError: another
  File "/vllm/core.py", line 7, in run
ValueError: another
"""
    assert errors_among(log.splitlines()) == [
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: "
        "Value error, User-specified max_model_len (4096) is greater than the derived max_model_len",
        "ValueError: another",
    ]


async def test_a_new_server_that_does_not_take_the_weights_is_told_again_by_the_next_request(engine, tmp_path):
    kill(engine).wait(60)
    mark = tmp_path / "v0" / "broken"
    mark.touch()
    with pytest.raises(EngineError, match="Loading lora policy@0 failed"):
        await draw(engine)
    started = engine.server._process.pid
    mark.unlink()
    assert (await draw(engine)).span.policy_version == 0
    assert engine.server._process.pid == started


async def test_whoever_asks_in_the_very_moment_in_which_a_start_ends_goes_on(engine, monkeypatch):
    start, late = engine._start, []

    async def start_and_ask():
        await start()
        late.append(asyncio.create_task(engine.ready()))  # runs before anybody is told of the end

    monkeypatch.setattr(engine, "_start", start_and_ask)
    kill(engine).wait(60)
    await draw(engine)
    await late[0]


async def test_weights_published_while_a_server_starts_are_those_with_which_it_begins(engine, folders, tmp_path):
    process = kill(engine)
    process.wait(10)
    slow = tmp_path / "base" / f"slow-{engine.server.connections.port}"
    slow.touch()
    early = asyncio.create_task(draw(engine))
    while True:
        if engine.server.alive:
            break
        await asyncio.sleep(0.01)
    await engine.take(1, folders("v1"))
    publishing = asyncio.create_task(engine.publish(2, folders("v2")))
    slow.unlink()
    await publishing
    assert (await early).span.policy_version == (await draw(engine)).span.policy_version == 2
    assert [line for line in await told(engine) if "load" in line] == ["load policy@2"]
    assert [path.name for path in tmp_path.glob("v*")] == ["v2"]


async def test_a_start_goes_on_when_the_request_that_caused_it_is_cancelled(engine):
    kill(engine).wait(60)
    asking = asyncio.create_task(draw(engine))
    while True:
        if engine._starting is not None:
            break
        await asyncio.sleep(0)
    starting = engine._starting
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await draw(engine)
    assert starting.done()
    assert not starting.cancelled()


async def test_closing_fails_what_is_in_flight_and_what_comes_after(engine):
    (flying,) = await in_flight(engine)
    launcher = psutil.Process(engine.server._process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    log = engine.server.log
    await engine.close()
    with pytest.raises(EngineError):
        await flying
    with pytest.raises(EngineError, match="the engine is closed"):
        await draw(engine)
    assert remaining(family) == []
    assert not log.exists()


async def test_an_unknown_argument_is_named_with_the_closest(python, folders):
    served = Served("policy", str(folders("base")), "float32", lora_rank=4)
    engine = VllmEngine(served, VllmSettings(python, {"max_num_sqs": 3}))
    with pytest.raises(ConfigError, match=r"vLLM has no engine argument 'max_num_sqs'; did you mean max_num_seqs\?"):
        await engine.start(0, folders("v0"))
    await engine.close()


async def test_a_value_that_vllm_refuses_is_told_in_its_own_words(python, folders):
    served = Served("policy", str(folders("base")), "float32", lora_rank=4)
    engine = VllmEngine(served, VllmSettings(python, {"max_num_seqs": "many"}))
    with pytest.raises(ConfigError, match="argument --max-num-seqs: invalid int value: 'many'"):
        await engine.start(0, folders("v0"))
    await engine.close()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with one, as far as its tool says."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "40000, 80000"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.parametrize(
    ("model_type", "graphs", "cut"), [("qwen2", "FULL_AND_PIECEWISE", "1"), ("mamba", "FULL_DECODE_ONLY", None)]
)
async def test_the_server_is_told_in_its_environment_that_graphs_are_cut_at_attention(
    model_type, graphs, cut, gpu, python, folders, monkeypatch
):
    monkeypatch.delenv(BREAKABLE, raising=False)
    base = folders("base")
    (base / "config.json").write_text(json.dumps({"model_type": model_type}))
    engine = VllmEngine(Served("policy", str(base), "float32", lora_rank=4), VllmSettings(python))
    await engine.start(0, folders("v0"))
    asked, _ = json.loads((await engine.server.connections.get("/told"))[1])
    await engine.close()
    assert json.loads(asked["compilation_config"])["cudagraph_mode"] == graphs
    assert asked["graphs_are_cut"] == cut


@pytest.fixture
async def whole(gpu, python, folders):
    """An engine for full weights, on a machine with a GPU."""
    engine = VllmEngine(Served("policy", "unused", "float32"), VllmSettings(python))
    await engine.start(0, folders("v0"))
    yield engine
    await engine.close()


async def test_full_weights_are_replaced_when_nothing_is_sampled_and_later_requests_wait(whole, folders, tmp_path):
    old = await in_flight(whole, count=2)
    publishing = asyncio.create_task(whole.publish(1, folders("v1")))
    await asyncio.sleep(0)
    late = asyncio.create_task(draw(whole))
    for _ in range(3):
        await post(whole, "/hold")
    assert not publishing.done()
    await post(whole, "/release")
    assert [turn.span.policy_version for turn in await asyncio.gather(*old, late)] == [0, 0, 1]
    await publishing
    lines = await told(whole)
    assert lines[:6] == [*["begin policy"] * 2, *["end policy"] * 2, "reload_weights v1", "reset"]
    assert not (tmp_path / "v0").exists()


async def test_full_weights_are_published_beside_rollouts_that_go_on_and_wait_for_their_turns_alone(whole, folders):
    versions = defaultdict(set)

    async def gather(step, places):
        async def play():
            async with places.take():
                for _ in range(3):
                    versions[step].add((await draw(whole)).span.policy_version)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(play)
        return ()

    async with open_rounds(gather, places=places_of(3), rollouts=4, ahead=1, steps=4) as rounds:
        for step in range(4):
            await rounds.play(step)
            await whole.publish(step + 1, folders(f"v{step + 1}"))
    assert all(found <= {step - 1, step} for step, found in versions.items())
    lines = await told(whole)
    changes = [place for place, line in enumerate(lines) if line.startswith("reload_weights")]
    assert [lines[:place].count("begin policy") - lines[:place].count("end policy") for place in changes] == [0] * 4
    assert lines.count("begin policy") == 4 * 4 * 3


async def test_a_server_that_cannot_take_full_weights_is_started_anew_with_them(whole, folders, tmp_path, monkeypatch):
    before, ask = whole.server._process.pid, whole.server.ask
    broken, asked = folders("v1", broken=True), []

    async def once(path, values):
        answer = await ask(path, values)
        if path == "/collective_rpc":
            asked.append((values["method"], answer[0]))
            (broken / "broken").unlink()  # what it cannot take in place it can read from the start
        return answer

    monkeypatch.setattr(whole.server, "ask", once)
    await whole.publish(1, broken)
    assert asked == [("reload_weights", 500)]
    assert whole.server._process.pid != before
    assert whole.server.command[whole.server.command.index("--model") + 1] == str(tmp_path / "v1")
    assert (await draw(whole)).span.policy_version == 1
