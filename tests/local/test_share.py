"""A trainer and vLLM on one GPU: they start together where there is room for both, and vLLM is told what it may take."""

import os
import stat
import sys
from pathlib import Path

import pytest
from toys import save_toy

from art_mcp.errors import ConfigError
from art_mcp.local.served import open_served
from art_mcp.local.share import GIB, cache_beside, settings_beside
from art_mcp.local.worker import Settings, Worker
from art_mcp.sampling.vllm_args import Memory, Served, VllmSettings
from art_mcp.types import LoraSpec, ModelSpec

pytestmark = pytest.mark.anyio

FAKE = Path(__file__).parents[1] / "sampling" / "fake_vllm.py"
H100 = Memory(free=80_000, total=81_559)
SMALL = Memory(free=11_000, total=12_288)


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Says how much memory the machine's GPU has."""

    def make(memory):
        executable(tmp_path / "nvidia-smi", f'echo "{memory.free}, {memory.total}"')

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make


LATER = Memory(free=40_000, total=81_559)


def option(command, name):
    return float(command[command.index(name) + 1])


async def start(tmp_path, script, load, **settings):
    """The command line of the server that was started, once both are there."""
    python = executable(tmp_path / "python", f'case "$*" in *api_server*) {script};; esac; exec {sys.executable} {FAKE} "$@"')
    spec = ModelSpec(source=str(tmp_path / "toy"), lora=LoraSpec(rank=4))

    def learner():
        load()
        return Worker("toy", spec, Settings(threads=1))

    worker = await open_served("toy", spec, learner, VllmSettings(python, **settings))
    await worker.close()
    return worker.engine.server.command


async def test_they_start_together_where_there_is_room_and_vllm_is_told_what_it_may_take(tmp_path, gpu):
    gpu(H100)
    save_toy(tmp_path / "toy")
    begun, loaded = tmp_path / "begun", tmp_path / "loaded"
    os.mkfifo(begun)
    os.mkfifo(loaded)

    def load():  # neither goes on before the other has begun
        begun.read_text()
        loaded.write_text("")

    command = await start(tmp_path, f"echo > {begun}; cat {loaded}", load)
    assert option(command, "--gpu-memory-utilization") == pytest.approx(0.45 * H100.free / H100.total, abs=1e-3)
    assert 30 * GIB < option(command, "--kv-cache-memory-bytes") < 32 * GIB


@pytest.mark.parametrize(("memory", "settings"), [(SMALL, {}), (H100, {"together": False})])
async def test_else_vllm_waits_for_the_trainer_and_measures_what_is_left(tmp_path, gpu, memory, settings):
    gpu(memory)
    save_toy(tmp_path / "toy")
    begun = tmp_path / "begun"

    def load():
        assert not begun.exists()
        gpu(LATER)

    command = await start(tmp_path, f"touch {begun}", load, **settings)
    assert option(command, "--gpu-memory-utilization") == pytest.approx(0.45 * LATER.free / LATER.total, abs=1e-3)
    assert "--kv-cache-memory-bytes" not in command


@pytest.mark.parametrize(
    ("weights", "settings", "memory", "gib"),
    [
        (1 * GIB, {}, H100, 30),
        (3 * GIB, {}, H100, 28),
        (15 * GIB, {}, H100, None),
        (1 * GIB, {"memory_share": 0.8}, H100, 57),
        (1 * GIB, {"memory_share": 0.9}, H100, None),
        (1 * GIB, {"memory_share": 0.05}, H100, None),
        (1 * GIB, {}, SMALL, None),
        (1 * GIB, {"replicas": 3}, H100, 8),
        (1 * GIB, {"args": {"gpu-memory-utilization": 0.5}}, H100, None),
        (1 * GIB, {"args": {"max_num_seqs": 64}}, H100, 30),
    ],
)
def test_the_share_is_known_where_weights_and_trainer_are_known_to_fit(weights, settings, memory, gib):
    cache = cache_beside(weights, VllmSettings(**settings), memory)
    assert (None if cache is None else cache // GIB) == gib


def test_who_asks_for_both_together_where_there_may_be_no_room_is_refused(tmp_path, gpu):
    gpu(SMALL)
    served = Served("toy", str(save_toy(tmp_path / "toy")), "float32", lora_rank=4)
    with pytest.raises(ConfigError, match="fit beside each other into 11000 MiB of free GPU memory"):
        settings_beside(served, VllmSettings(together=True))
