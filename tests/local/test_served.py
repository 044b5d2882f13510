"""A worker that samples from vLLM, whose part a fake plays, and trains here: every step reaches the server, by name."""

import asyncio
import json
import stat
import sys
from pathlib import Path

import psutil
import pytest
from toys import draw_tokens, save_toy

from art_mcp import LocalBackend, TrainableModel
from art_mcp.errors import ConfigError, EngineError, ModelError
from art_mcp.local.models import base_of
from art_mcp.local.served import APART, open_served
from art_mcp.local.worker import Settings, Worker
from art_mcp.sampling.vllm_args import VllmSettings
from art_mcp.types import LoraSpec, ModelSpec, Sample, SamplingParams, TrainConfig
from tests.processes import commands, remaining

pytestmark = pytest.mark.anyio

FAKE = Path(__file__).parents[1] / "sampling" / "fake_vllm.py"
PROMPT = draw_tokens(6, seed="prompt")
CONFIG = TrainConfig(learning_rate=1e-2, warmup_steps=0)
DEMONSTRATION = Sample((*PROMPT, 3, 4), (False,) * 6 + (True,) * 2, None, 1.0)


@pytest.fixture
def python(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("art_mcp.sampling.vllm_server.POLL_SECONDS", 0.02)  # the fake starts in a moment
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy(tmp_path_factory.mktemp("toy") / "toy"))


async def served(python, spec):
    return await open_served("toy", spec, lambda: Worker("toy", spec, Settings(threads=1)), VllmSettings(python))


def servers():
    """Those that serve; what is asked for its options alone is none."""
    below = commands(psutil.Process().children(recursive=True))
    return [child for child, words in below if {str(FAKE), "vllm.entrypoints.openai.api_server"} <= {*words}]


async def test_the_server_starts_while_the_learner_is_still_loading_its_adapters(python, toy):
    spec = ModelSpec(source=toy, lora=LoraSpec(rank=4))

    def load():
        while not servers():
            pass  # until the test's timeout, were the server to wait for the learner
        return Worker("toy", spec, Settings(threads=1))

    worker = await open_served("toy", spec, load, VllmSettings(python))
    assert (await draw(worker)).span.policy_version == 0
    await worker.close()
    assert not servers()


async def test_a_learner_that_cannot_be_loaded_takes_the_server_with_it(python, toy, tmp_path):
    spec = ModelSpec(source=toy, lora=LoraSpec(rank=4))

    def load():
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        await open_served("toy", spec, load, VllmSettings(python))
    assert not servers()


async def told(worker):
    _, answer = await worker.engine.server.connections.get("/told")
    return json.loads(answer)


async def loads(worker):
    return [line for line in (await told(worker))[1] if "load" in line]


async def draw(worker):
    return await worker.sample(PROMPT, params=SamplingParams(max_tokens=3), stop=frozenset())


async def test_no_turn_begins_while_weights_are_published_and_the_next_is_of_the_new_policy(python, toy, monkeypatch):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        assert (await draw(worker)).span.policy_version == 0
        writing, go_on, write = asyncio.Event(), asyncio.Event(), worker.learner.write_weights

        async def slowly(folder):
            writing.set()
            await go_on.wait()
            await write(folder)

        monkeypatch.setattr(worker.learner, "write_weights", slowly)
        on = (False,) * len(PROMPT) + (True,) * 2
        step = asyncio.create_task(worker.train([Sample((*PROMPT, 5, 6), on, (0.0,) * 6 + (-1.0, -1.0), 1.0)], CONFIG))
        await writing.wait()
        waiting = [asyncio.create_task(work) for work in (draw(worker), worker.ready())]
        await worker.engine.server.connections.get("/told")  # time for a turn to begin
        assert not any(task.done() for task in waiting)
        go_on.set()
        turn, *_ = await asyncio.gather(*waiting)
        assert turn.span.policy_version == 1
        assert (await step)["seconds_publish"] > 0
    finally:
        await worker.close()


async def test_an_engine_that_computes_something_else_than_is_trained_is_told_once(python, toy, capsys):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        on = (False,) * len(PROMPT) + (True,)

        async def learn(logprob):
            metrics = await worker.train([Sample((*PROMPT, 5), on, (0.0,) * len(PROMPT) + (logprob,), 1.0)], CONFIG)
            return metrics["mismatch"], "nats from the trainer's" in capsys.readouterr().err

        first, told = await learn(-1.0)  # of 768 tokens in a model that knows nothing: the trainer's is far below
        assert (first > 1, told) == (True, True)
        second, told = await learn(-1.0)
        assert (second > 1, told) == (True, False)
        worker._told_apart = False
        third, told = await learn(-1.0 - second)
        assert (third < APART, told) == (True, False)
    finally:
        await worker.close()


@pytest.mark.parametrize(("patience", "waits"), [(60.0, True), (0.0, False)])
async def test_an_answer_is_handed_on_when_the_weights_are_published_or_they_take_too_long(
    python, toy, monkeypatch, patience, waits
):
    monkeypatch.setattr("art_mcp.local.served.ANSWER_SECONDS", patience)
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        asked, answered, writing, go_on = (asyncio.Event() for _ in range(4))
        sample, write = worker.engine.sample, worker.learner.write_weights

        async def answers_meanwhile(*args, **kwargs):
            asked.set()
            await writing.wait()
            completion = await sample(*args, **kwargs)
            answered.set()
            return completion

        async def slowly(folder):
            writing.set()
            await go_on.wait()
            await write(folder)

        monkeypatch.setattr(worker.engine, "sample", answers_meanwhile)
        monkeypatch.setattr(worker.learner, "write_weights", slowly)
        turn = asyncio.create_task(draw(worker))
        await asked.wait()
        on = (False,) * len(PROMPT) + (True,) * 2
        step = asyncio.create_task(worker.train([Sample((*PROMPT, 5, 6), on, (0.0,) * 6 + (-1.0, -1.0), 1.0)], CONFIG))
        await answered.wait()
        await worker.engine.server.connections.get("/told")  # time for the answer to be handed on
        assert turn.done() is not waits
        go_on.set()
        assert (await turn).span.policy_version == 0
        await step
    finally:
        await worker.close()


async def test_turns_begin_again_where_an_engine_takes_too_long_for_the_new_weights(python, toy, monkeypatch):
    monkeypatch.setattr("art_mcp.local.served.PATIENCE_SECONDS", 0.1)
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        await draw(worker)
        hangs, go_on, publish = asyncio.Event(), asyncio.Event(), worker.engine.publish

        async def hanging(step, folder):
            hangs.set()
            await go_on.wait()
            await publish(step, folder)

        monkeypatch.setattr(worker.engine, "publish", hanging)
        on = (False,) * len(PROMPT) + (True,) * 2
        step = asyncio.create_task(worker.train([Sample((*PROMPT, 5, 6), on, (0.0,) * 6 + (-1.0, -1.0), 1.0)], CONFIG))
        await hangs.wait()
        assert (await draw(worker)).span.policy_version == 0
        go_on.set()
        await step
        assert (await draw(worker)).span.policy_version == 1
    finally:
        await worker.close()


async def test_every_step_is_published_under_its_own_name(python, toy):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        folders = [worker.engine.version.folder]
        for step in (1, 2):
            turn = await draw(worker)
            assert turn.span.policy_version == step - 1
            on = (False,) * len(PROMPT) + (True,) * 3
            sample = Sample((*PROMPT, 5, 6, 7), on, (0.0,) * 6 + turn.span.logprobs, 1.0)
            metrics = await worker.train([sample], CONFIG)
            assert metrics["gradient_norm"] > 0
            assert 0 < metrics["seconds_write"] < metrics["seconds_publish"]
            assert metrics["seconds_held"] < metrics["seconds_publish"] - metrics["seconds_write"]
            folders.append(worker.engine.version.folder)
        assert (worker.step, worker.policy.step, str(worker.policy)) == (2, 2, "toy@2")
        assert [folder.exists() for folder in folders] == [False, False, True]
        assert (folders[2] / "adapter_model.safetensors").exists()
        args, lines = await told(worker)
        assert (args["model"], args["max_lora_rank"], args["dtype"]) == (toy, 8, "float32")
        assert [line for line in lines if "load" in line] == [
            *("load toy@0", "load toy@1", "unload toy@0", "load toy@2", "unload toy@1")
        ]
    finally:
        await worker.close()


def end(worker, python):
    """Kills the server and keeps another from starting, until what this returns is called."""
    works = Path(python).read_text()
    Path(python).write_text("#!/bin/sh\nexit 1\n")
    process = worker.engine.server._process
    for child in servers():
        child.kill()
    process.wait()
    return lambda: Path(python).write_text(works)


def folders(worker):
    return [folder for folder in worker._versions.path.iterdir() if folder.is_dir()]


async def test_a_step_stands_though_its_engine_cannot_have_it_yet(python, toy, capsys):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        mend = end(worker, python)
        sample = Sample((*PROMPT, 5, 6, 7), (False,) * 6 + (True,) * 3, (0.0,) * 6 + (-0.5,) * 3, 1.0)
        assert (await worker.train([sample], CONFIG))["gradient_norm"] > 0
        assert worker.step == 1
        assert "step 1 is not published yet: " in capsys.readouterr().err
        with pytest.raises(EngineError):
            await draw(worker)
        mend()
        assert (await draw(worker)).span.policy_version == 1
        assert len(folders(worker)) == 1
    finally:
        await worker.close()


async def test_weights_that_a_dead_server_did_not_get_are_not_kept(python, toy):
    worker = await served(python, ModelSpec(source=toy))
    try:
        await worker.imitate([DEMONSTRATION], CONFIG)
        mend = end(worker, python)
        for _ in range(3):
            with pytest.raises(EngineError):
                await draw(worker)
        assert len(folders(worker)) == 1
        mend()
        assert (await draw(worker)).span.policy_version == 1
        assert len(folders(worker)) == 1
    finally:
        await worker.close()


async def test_supervised_steps_are_published_once_when_somebody_samples(python, toy):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        before = worker.engine.version.folder
        for step in (1, 2, 3):
            metrics = await worker.imitate([DEMONSTRATION], CONFIG)
            assert "seconds_publish" not in metrics
            assert (worker.step, str(worker.policy)) == (step, f"toy@{step}")
        assert await loads(worker) == ["load toy@0"]
        turns = await asyncio.gather(*(draw(worker) for _ in range(5)))
        assert {turn.span.policy_version for turn in turns} == {3}
        assert await loads(worker) == ["load toy@0", "load toy@3", "unload toy@0"]
        assert not before.exists()
        await worker.imitate([DEMONSTRATION], CONFIG)
        await asyncio.gather(worker.ready(), worker.ready())
        await worker.ready()
        assert (await loads(worker))[3:] == ["load toy@4", "unload toy@3"]
        await worker.imitate([DEMONSTRATION], CONFIG)
        on = (False,) * len(PROMPT) + (True,) * 3
        await worker.train([Sample((*PROMPT, 5, 6, 7), on, (0.0,) * 6 + (-0.5,) * 3, 1.0)], CONFIG)
        assert (await loads(worker))[5:] == ["load toy@6", "unload toy@4"]
        assert (await draw(worker)).span.policy_version == worker.policy.step == 6
    finally:
        await worker.close()


async def test_a_turn_asked_for_during_a_supervised_step_waits_for_it_where_nothing_newer_is_published(python, toy):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        first = asyncio.create_task(worker.imitate([DEMONSTRATION], CONFIG))
        await asyncio.sleep(0)
        early = await draw(worker)  # what is published is what was current when it was asked for
        assert early.span.policy_version in {0, 1}
        await first
        second = asyncio.create_task(worker.imitate([DEMONSTRATION], CONFIG))
        await asyncio.sleep(0)
        late = asyncio.create_task(draw(worker))
        gone = asyncio.create_task(draw(worker))
        await asyncio.sleep(0)
        gone.cancel()
        assert (await late).span.policy_version == (await draw(worker)).span.policy_version
        await second
        assert (await draw(worker)).span.policy_version == 2
    finally:
        await worker.close()


async def test_a_policy_that_could_not_be_published_is_tried_again(python, toy, monkeypatch):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    try:
        await worker.imitate([DEMONSTRATION], CONFIG)
        publish, written = worker.engine.publish, []

        async def broken(step, folder):
            (folder / "broken").touch()
            written.append(folder)
            await publish(step, folder)

        monkeypatch.setattr(worker.engine, "publish", broken)
        failures = await asyncio.gather(*(draw(worker) for _ in range(3)), return_exceptions=True)
        assert {type(failure) for failure in failures} == {EngineError}
        assert len(written) == 1
        monkeypatch.undo()
        assert (await draw(worker)).span.policy_version == 1
    finally:
        await worker.close()


async def test_replicas_of_an_engine_are_all_taught(python, toy):
    backend = LocalBackend(engine_python=python, engine_replicas=2, in_process=True, threads=1)
    async with backend:
        model = TrainableModel(name="toy", base_model=toy, lora=LoraSpec(rank=4))
        await model.register(backend)
        worker = model.sampler()
        assert backend.facts(model)["engine_replicas"] == len(servers()) == 2
        await backend.imitate(model, [DEMONSTRATION], config=CONFIG)
        assert {(await draw(worker)).span.policy_version for _ in range(4)} == {1}
        for server in worker.engine.servers:
            _, answer = await server.connections.get("/told")
            assert [line for line in json.loads(answer)[1] if "load" in line] == ["load toy@0", "load toy@1", "unload toy@0"]
    assert not servers()


async def test_closing_leaves_no_process_and_no_folder(python, toy):
    worker = await served(python, ModelSpec(source=toy, lora=LoraSpec(rank=4)))
    launcher = psutil.Process(worker.engine.server._process.pid)
    family, folder = [launcher, *launcher.children(recursive=True)], worker.engine.version.folder
    await worker.close()
    assert remaining(family) == []
    assert not folder.parent.exists()


async def test_full_weights_reach_the_server_as_a_whole_model(python, toy):
    worker = await served(python, ModelSpec(source=toy))
    try:
        await worker.imitate([DEMONSTRATION], CONFIG)
        assert (await draw(worker)).span.policy_version == 1
        args, lines = await told(worker)
        assert args["model"] == str(worker.engine.version.folder)
        assert (worker.engine.version.folder / "config.json").exists()
        assert not any("load" in line for line in lines)
    finally:
        await worker.close()


async def test_a_checkpoint_of_the_learner_is_served_on_its_base(python, toy, tmp_path):
    spec = ModelSpec(source=toy, lora=LoraSpec(rank=4))
    learner = Worker("toy", spec, Settings(threads=1))
    await learner.imitate([DEMONSTRATION], CONFIG)
    await learner.save(tmp_path / "saved")
    await learner.close()
    resumed = ModelSpec(source=str(tmp_path / "saved"), resume=True)
    assert base_of(resumed.source) == toy
    worker = await served(python, resumed)
    try:
        assert (worker.step, worker.policy.step) == (1, 1)
        assert (await told(worker))[0]["model"] == toy
        await worker.save(tmp_path / "again")
        assert (tmp_path / "again" / "adapter_model.safetensors").exists()
    finally:
        await worker.close()


async def test_a_server_that_does_not_start_leaves_nothing_behind(python, tmp_path):
    broken = save_toy(tmp_path / "broken-model")
    (broken / "broken").touch()
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(EngineError, match="these weights are broken"):
        await served(python, ModelSpec(source=str(broken), lora=LoraSpec(rank=4)))
    left = set(psutil.Process().children(recursive=True)) - before
    assert remaining(left) == []


async def test_the_backend_serves_through_the_interpreter_that_has_vllm(python, toy):
    async with LocalBackend(engine_python=python, engine_args={"max_num_seqs": 7}, in_process=True, threads=1) as backend:
        model = TrainableModel(name="toy", base_model=toy, lora=LoraSpec(rank=4))
        await model.register(backend)
        assert (await draw(model.sampler())).span.policy_version == 0
        facts = backend.facts(model)
        assert (facts["engine"], facts["vllm"], facts["engine_args"]) == ("vllm", "0.32.0", {"max_num_seqs": 7})
        assert facts["lora"] == {"rank": 4, "alpha": 32}


async def test_without_a_gpu_the_engine_is_transformers(toy):
    async with LocalBackend(threads=1) as backend:
        model = TrainableModel(name="toy", base_model=toy)
        await model.register(backend)
        assert backend.facts(model)["engine"] == "transformers"


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"engine": "vllm"}, "vLLM is not installed"),
        ({"engine": "vllm", "engine_python": "python", "deterministic": True}, "need engine='transformers'"),
        ({"trainer": "unsloth", "deterministic": True}, "need trainer='torch'"),
        ({"engine": "transformers", "engine_args": {"max_num_seqs": 7}}, "engine_args: these are vLLM's options"),
        ({"engine": "transformers", "engine_replicas": 2}, "engine_replicas: these are vLLM's options"),
        ({"engine_python": "python", "engine_replicas": 0}, "vLLM has one or more"),
    ],
)
def test_choices_that_cannot_be_had_are_refused_at_once(choice, reason):
    with pytest.raises(ConfigError, match=reason):
        LocalBackend(**choice)


@pytest.mark.parametrize(
    ("options", "source", "reason"),
    [
        ({}, "tiny", "engine_args and engine_replicas: .* the tiny policy is sampled by transformers"),
        ({"deterministic": True}, "toy", "a deterministic run is sampled by transformers"),
        ({}, "toy", "without a GPU, or without vLLM, transformers samples: leave them out, or ask for vLLM"),
    ],
)
async def test_options_of_vllms_are_not_passed_over_where_the_engine_is_transformers(options, source, reason, toy, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    async with LocalBackend(engine_args={"max_num_seqs": 7}, engine_replicas=2, in_process=True, **options) as backend:
        model = TrainableModel(name="toy", base_model=toy if source == "toy" else source)
        with pytest.raises(ConfigError, match=reason):
            await model.register(backend)
