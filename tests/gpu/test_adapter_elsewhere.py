"""The trained adapter works where it was not trained: in plain PEFT, and in a plain vLLM server."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import anyio
import pytest
import torch
from logprobs import computed_by, differences, sampled_of, some
from transformers import AutoModelForCausalLM

from art_mcp.agent.evaluate import wilson
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.environment import load_environment
from art_mcp.local.models import load_dialect
from art_mcp.model import TrainableModel
from art_mcp.sampling.vllm_http import Connections
from art_mcp.tools import open_tools
from art_mcp.types import Completion, ModelSpec, Policy, Span
from benchmarks.gpu_stage import SERVER

pytestmark = [pytest.mark.gpu, pytest.mark.anyio, pytest.mark.timeout(500), pytest.mark.filterwarnings("default")]

BOUNDS = {"mean": 0.01, "p99": 0.05}
EACH = 40
"""Questions of every level that the plain server is asked."""


@pytest.fixture(scope="module")
def base_difference(gpu_run):
    """The base model's own difference between sampler and trainer, in the same run."""
    model = AutoModelForCausalLM.from_pretrained(gpu_run.model, dtype=torch.bfloat16).cuda().eval()
    samples = some(gpu_run.before)
    found = differences(sampled_of(samples), computed_by(model, samples))
    del model
    torch.cuda.empty_cache()
    return found


def check(found, base, *, note):
    note(found=found, base=base)
    assert found["tokens"] >= 20_000
    for name, bound in BOUNDS.items():
        assert found[name] <= bound
        assert found[name] <= max(1.5 * base[name], 1e-3)


def test_plain_peft_gives_the_logprobs_that_were_sampled(gpu_run, base_difference, note):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(gpu_run.model, dtype=torch.bfloat16).cuda()
    model = PeftModel.from_pretrained(model, gpu_run.adapter).eval()
    samples = some(gpu_run.after)
    found = differences(sampled_of(samples), computed_by(model, samples))
    del model
    torch.cuda.empty_cache()
    check(found, base_difference, note=note)


class Plain:
    """A Sampler on a vLLM server that knows nothing of us."""

    policy = Policy("trained", 0)
    context_length = 4096

    def __init__(self, port):
        self.connections = Connections(port, "none")

    async def sample(self, token_ids, *, params, stop, shared=0):
        values = {
            "model": "trained",
            "prompt": list(token_ids),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
        }
        values |= {"stop_token_ids": sorted(stop), "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False}
        status, body = await self.connections.post("/v1/completions", values)
        assert status == 200, body[:500]
        choice = json.loads(body)["choices"][0]
        span = Span(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]), 0)
        return Completion(span, stopped=choice["finish_reason"] == "stop")

    async def prompt_logprobs(self, sample):
        values = {"model": "trained", "prompt": list(sample.token_ids), "max_tokens": 1, "prompt_logprobs": 0}
        status, body = await self.connections.post("/v1/completions", values)
        assert status == 200, body[:500]
        rows = json.loads(body)["choices"][0]["prompt_logprobs"]
        pairs = zip(sample.token_ids, rows, sample.trainable, strict=True)
        return [row[str(token)]["logprob"] for token, row, on in pairs if on]


class OnPlainServer(TrainableModel[None]):
    """A model whose sampler is the plain server."""

    tracer = None

    def at(self, plain):
        self._plain, self._dialect = plain, load_dialect(self.spec)
        return self

    async def ready(self):
        return 1

    def sampler(self):
        return self._plain

    def dialect(self):
        return self._dialect

    async def get_step(self):
        return 0


@contextmanager
def vllm_server(model, adapter, log):
    """`vllm serve` as its manual says, with the adapter as a file; ended with its whole group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"trained={adapter}", "--dtype", "bfloat16"]
    command += ["--max-model-len", "4096", "--gpu-memory-utilization", "0.2", "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--generation-config", "vllm"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process, port
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


async def until_ready(process, port, log):
    connections = Connections(port, "none")
    with anyio.fail_after(300):
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            try:
                if (await connections.get("/health"))[0] == 200:
                    return
            except OSError:
                pass
            await anyio.sleep(0.5)


async def test_a_plain_vllm_server_gives_the_logprobs_and_solves_as_many(gpu_run, base_difference, tmp_path, note):
    log = tmp_path / "vllm.log"
    with vllm_server(gpu_run.model, gpu_run.adapter, log) as (process, port):
        await until_ready(process, port, log)
        plain = Plain(port)
        samples = some(gpu_run.after)
        found = [None] * len(samples)
        limiter = anyio.CapacityLimiter(16)

        async def ask(place):
            async with limiter:
                found[place] = await plain.prompt_logprobs(samples[place])

        async with anyio.create_task_group() as tasks:
            for place in range(len(samples)):
                tasks.start_soon(ask, place)
        solved, wanted = await questions(gpu_run, plain)
        plain.connections.close()
    note(solved=sum(solved) / len(solved), wanted=sum(wanted) / len(wanted), n=len(solved))
    low, high = wilson(sum(wanted), len(wanted))
    assert low <= sum(solved) / len(solved) <= high
    check(differences(sampled_of(samples), [lp for row in found for lp in row]), base_difference, note=note)


async def questions(gpu_run, plain):
    """What the plain server solves of the questions that the run asked greedily, and what the run solved of them."""
    environment = load_environment("calculator", levels="1-8", evaluate=False)
    bits = gpu_run.result["after"]["without/greedy"]["solved_ids"]
    asked = {level: [s for s in environment.split("test") if s.level == level][:EACH] for level in range(1, 6)}
    wanted = [bits[str(level)][: len(scenarios)] for level, scenarios in asked.items()]
    model = OnPlainServer(name="trained", spec=ModelSpec(source=str(gpu_run.model))).at(plain)
    async with open_tools([SERVER], folder=".", only=environment.tools) as toolbox:
        groups = await gather_trajectory_groups(
            [scenario for scenarios in asked.values() for scenario in scenarios],
            model=model,
            environment=environment,
            toolbox=toolbox,
            rollouts=1,
            concurrency=128,
            temperature=0.0,
            step=-1,
        )
    solved = [environment.solved(one) for group in groups for one in group.trajectories]
    return solved, [bit == "1" for row in wanted for bit in row]
