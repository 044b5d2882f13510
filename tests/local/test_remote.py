"""A worker in a child process: the same numbers, its failures by name, and an end whoever dies first."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict

import anyio
import psutil
import pytest
from toys import draw_tokens, save_toy

from art_mcp.errors import EngineError, ModelError, TrainError
from art_mcp.local.backend import LocalBackend
from art_mcp.local.remote import RemoteWorker, packed, unpacked
from art_mcp.local.worker import WORKSPACE, Settings, Worker
from art_mcp.model import TrainableModel
from art_mcp.types import LoraSpec, ModelSpec, Sample, SamplingParams, TrainConfig
from tests.processes import commands, remaining

pytestmark = pytest.mark.anyio

PROMPT = draw_tokens(12, seed="prompt")
SETTINGS = Settings(deterministic=True, threads=1)
CONFIG = TrainConfig(learning_rate=1e-3, sequence_ratio_bounds=(0.5, 2.0))
ENDLESS = SamplingParams(max_tokens=150_000)
"""Half an hour, for each token costs more than the one before."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return ModelSpec(source=str(save_toy(tmp_path_factory.mktemp("toy") / "toy", max_position_embeddings=200_000)))


@pytest.fixture(scope="module")
def kept():
    """The workers of this module, each for as long as no test has ended it: starting one takes as long as loading torch."""
    workers = {}
    yield workers
    for worker in workers.values():
        asyncio.run(worker.close())


@pytest.fixture
def worker_like(kept):
    """The worker with this spec and these settings, started where there is none."""

    def find(spec, settings):
        key = json.dumps([asdict(spec), asdict(settings), os.environ.get(WORKSPACE)])
        if key not in kept or kept[key]._process.poll() is not None:
            kept[key] = RemoteWorker("toy", spec, settings)
        return kept[key]

    return find


@pytest.fixture
def remote(spec, worker_like):
    return worker_like(ModelSpec(source=spec.source, lora=LoraSpec(rank=4)), SETTINGS)


@pytest.fixture
def chosen(spec, worker_like, monkeypatch):
    """One whose user has chosen cuBLAS's workspace."""
    with monkeypatch.context() as patch:
        patch.setenv(WORKSPACE, ":16:8")
        return worker_like(spec, SETTINGS)


async def two_steps(worker):
    """Everything that two training steps show to the outside."""
    seen = []
    for step in range(2):
        samples = []
        for number in range(4):
            params = SamplingParams(10, 0.0 if number == 3 else 1.0, seed=10 * step + number)
            done = await worker.sample(PROMPT, params=params, stop=frozenset(range(40)), shared=8)
            span = done.span
            on = (False,) * len(PROMPT) + (True,) * len(span.token_ids)
            logprobs = (0.0,) * len(PROMPT) + span.logprobs
            samples.append(Sample((*PROMPT, *span.token_ids), on, logprobs, 1.0 if number % 2 else -1.0))
            seen.append(done)
        seen.append((await worker.train(samples, CONFIG), worker.step, worker.policy))
    return seen


async def test_a_child_gives_the_numbers_of_this_process_to_the_last_bit(remote):
    here = Worker("toy", ModelSpec(source=remote.facts["source"], lora=LoraSpec(rank=4)), SETTINGS)
    assert remote.facts == here.facts
    assert remote.context_length == here.context_length
    wanted = await two_steps(here)
    await here.close()
    assert await two_steps(remote) == wanted


@pytest.mark.parametrize("logprobs", [(0.0, -1 / 3, -5e-324), None])
def test_a_sample_crosses_to_the_last_bit(logprobs):
    sample = Sample((2**31 - 1, 0, 151_665), (False, True, True), logprobs, -0.1)
    assert unpacked(json.loads(json.dumps(packed(sample)))) == sample


async def test_the_child_of_a_deterministic_run_starts_with_what_cublas_needs_unless_its_user_chose_it(
    remote, chosen, spec, worker_like
):
    plain = worker_like(spec, Settings(threads=1))
    assert [worker_of(family(worker)).environ().get(WORKSPACE) for worker in (remote, chosen, plain)] == [
        ":4096:8",
        ":16:8",
        None,
    ]


async def test_failures_in_the_child_arrive_by_name(remote):
    with pytest.raises(TrainError, match="a demonstration has no sampled log probabilities"):
        await remote.train([Sample((1, 2), (False, True), None, 1.0)], CONFIG)
    with pytest.raises(EngineError, match="does not fit a context of 200000 tokens"):
        await remote.sample([1] * 200_000, params=ENDLESS, stop=frozenset())
    with pytest.raises(RuntimeError, match="ValueError") as bug:
        await remote.train([Sample((1, 2), (False, True), (0.0,), 1.0)], CONFIG)
    assert re.search(r"torch_trainer\.py\", line \d+, in _learn", bug.value.__notes__[0])


async def test_a_cancelled_request_is_cancelled_in_the_child_too(remote, tmp_path):
    asking = asyncio.create_task(remote.sample(PROMPT, params=ENDLESS, stop=frozenset()))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="another tokenizer"):  # which the child says after it has begun with the other
        await remote.sample([-1], params=ENDLESS, stop=frozenset())
    asking.cancel()
    await asyncio.wait([asking])
    with anyio.fail_after(60):
        await remote.save(tmp_path / "saved")  # waits until nothing is being sampled
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


async def test_closing_ends_the_child_and_what_is_in_flight(remote, monkeypatch):
    monkeypatch.setattr("art_mcp.local.remote.CLOSE_SECONDS", 100)  # it has to end by itself: a kill is no exit code 0
    processes = family(remote)
    assert len(processes) == 3  # the launcher, its guard, the worker
    pending = asyncio.create_task(remote.sample(PROMPT, params=ENDLESS, stop=frozenset()))
    await asyncio.sleep(0)
    await remote.close()
    assert remaining(processes) == []
    with pytest.raises(EngineError, match=r"closed|has ended \(exit code 0\)"):
        await pending
    with pytest.raises(EngineError, match=r"has ended \(exit code 0\)"):
        await remote.sample(PROMPT, params=ENDLESS, stop=frozenset())
    await remote.close()


def family(worker):
    launcher = psutil.Process(worker._process.pid)
    return [launcher, *launcher.children(recursive=True)]


def worker_of(processes):
    (child,) = [process for process, words in commands(processes) if words[1] == "-P"]  # the others are the launcher's
    return child


async def test_a_child_that_is_killed_fails_what_waits_for_it_and_says_so(chosen):
    worker = chosen
    processes = family(worker)
    child = worker_of(processes)
    sampling = [asyncio.create_task(worker.sample(PROMPT, params=ENDLESS, stop=frozenset())) for _ in range(2)]
    child.suspend()  # so that more than a pipe holds is still being written when it dies
    training = asyncio.create_task(worker.train([Sample((1, 2) * 100000, (False, True) * 100000, None, 1.0)], CONFIG))
    await asyncio.sleep(0)
    child.send_signal(signal.SIGKILL)
    with anyio.fail_after(60):
        results = await asyncio.gather(*sampling, training, return_exceptions=True)
    assert all(isinstance(result, EngineError) for result in results)
    assert {str(result) for result in results} == {f"the worker process {processes[0].pid} has ended (killed by SIGKILL)"}
    with pytest.raises(EngineError, match="killed by SIGKILL"):
        await worker.train([], CONFIG)
    await worker.close()
    assert remaining(processes) == []


def test_a_child_that_dies_in_the_middle_of_a_reply_is_told_of_and_nobody_waits_for_the_rest(spec, monkeypatch):
    program = 'import sys; sys.stdin.readline(); sys.stdout.write(\'{"id": 0, "fac\')'
    monkeypatch.setattr("art_mcp.local.remote.launch_command", lambda command, args: (command, ["-c", program]))
    with pytest.raises(EngineError, match=r"the worker process \d+ has ended \(exit code 0\)"):
        RemoteWorker("toy", spec, SETTINGS)


async def test_what_an_import_prints_in_the_child_is_a_line_of_its_log(spec, tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text("print('a library says hello')\nprint(17)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    worker = await asyncio.to_thread(RemoteWorker, "toy", spec, SETTINGS)
    try:
        assert worker.step == 0
    finally:
        await worker.close()
    assert "a library says hello\n17\n" in capfd.readouterr().err


async def test_a_model_that_cannot_be_loaded_is_refused_and_no_child_stays(tmp_path):
    before = set(psutil.Process().children())
    with pytest.raises(ModelError, match="no model folder at"):
        await asyncio.to_thread(RemoteWorker, "toy", ModelSpec(source=str(tmp_path / "nowhere")), SETTINGS)
    left = set(psutil.Process().children()) - before
    assert remaining(left) == []


PARENT = """
import psutil, sys
from art_mcp.local.backend import LocalBackend
from art_mcp.local.remote import RemoteWorker
from art_mcp.local.worker import Settings
from art_mcp.types import ModelSpec

worker = RemoteWorker("toy", ModelSpec(source=sys.argv[1]), Settings(threads=1))
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_no_child(spec):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PARENT, spec.source]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        processes = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(processes) == 3
    assert remaining(processes) == []


def test_a_child_whose_parent_is_dead_leaves_no_traceback_on_the_terminal():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "art_mcp.local.remote"], **pipes) as child:
        child.stdout.close()
        child.stdin.write(b'{"id": 1, "do": "save", "folder": "nowhere"}\n')
        child.stdin.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


async def test_a_backend_ends_every_child_though_one_of_them_does_not_end_as_it_should(monkeypatch):
    before = set(psutil.Process().children(recursive=True))
    backend = LocalBackend(in_process=False, threads=1)
    models = [TrainableModel(name=name) for name in ("first", "second")]
    async with anyio.create_task_group() as group:
        for model in models:
            group.start_soon(model.register, backend)
    children = set(psutil.Process().children(recursive=True)) - before
    assert len(children) >= 2
    second, close = models[1].sampler(), models[1].sampler().close

    async def stubborn():
        await close()
        raise EngineError("did not end as it should")

    monkeypatch.setattr(second, "close", stubborn)
    with pytest.raises(EngineError, match="did not end as it should"):
        await backend.close()
    assert remaining(children) == []


async def test_a_model_whose_registration_was_cancelled_has_no_child(spec):
    backend = LocalBackend(in_process=False, threads=1)
    model = TrainableModel(name="toy", spec=spec)
    before = set(psutil.Process().children(recursive=True))

    def children():
        return [child for child in psutil.Process().children(recursive=True) if child not in before]

    async with anyio.create_task_group() as group:
        group.start_soon(model.register, backend)
        while True:
            if any("art_mcp.local.remote" in words for _, words in commands(children())):
                break
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    assert remaining(children()) == []
    await backend.close()
