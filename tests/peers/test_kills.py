"""kill -9 in a training run that samples from a real vLLM: of its engine, after which it goes on; of its trainer and of itself,
after which nothing of it is left and it goes on from its last checkpoint when it is resumed."""

import json
import random
import signal
from collections.abc import Callable

import psutil
import pytest

from art_mcp.store.run import Run
from tests.slow.killing import ROOT, Command, processor_seconds, started, steps_recorded

PYTHON = ROOT / ".peers" / "vllm" / "bin" / "python"

pytestmark = [
    pytest.mark.peers,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM in .peers/vllm: `make test-peers` puts it there"),
]

SHAPE = ["--groups", "4", "--rollouts", "4", "--lora", "8", "--save-every", "1", "--eval-n", "0", "--child-process"]
VLLM = ["--engine", "vllm", "--engine-python", str(PYTHON), "--engine-arg", f"kv_cache_memory_bytes={2**28}"]


def engine(command: Command) -> psutil.Process:
    (found,) = [process for process in command.family() if process.name().startswith("VLLM::Engine")]
    return found


def trainer(command: Command) -> psutil.Process:
    (found,) = [process for process in command.family() if process.cmdline()[1:] == ["-P", "-m", "art_mcp.local.remote"]]
    return found


def after_steps(command: Command, run: Run, count: int, *, busy: Callable[[], psutil.Process] | None = None) -> int:
    """Waits for so many more steps, and then until what is `busy` (default: all processes) has done some of the next one;
    returns how many are recorded by then."""
    recorded = steps_recorded(run)
    command.until(lambda: steps_recorded(run) >= recorded + count, seconds=240)
    watched = [busy()] if busy else command.family()
    used, moment = processor_seconds(watched), random.Random(f"{count}:{recorded}").uniform(0.05, 0.25)
    command.until(lambda: processor_seconds(watched) - used >= moment)
    return steps_recorded(run)


def test_a_run_outlives_its_engine_and_is_resumed_after_its_trainer_or_itself_was_killed(tmp_path):
    calculator = {"mcpServers": {"calculator": {"command": "python", "args": [f"{ROOT}/servers/calculator/server.py"]}}}
    (tmp_path / "config.json").write_text(json.dumps(calculator))
    run = Run(tmp_path / "runs" / "mine")
    asked = ["train", f"{ROOT}/environments/calculator.py", "--name", "mine", "--steps", "100000", *SHAPE, *VLLM]
    with started(*asked, folder=tmp_path) as command:
        # policies are published before their step is recorded: what the engine does after that are rollouts
        before = after_steps(command, run, 2, busy=lambda: engine(command))
        first = engine(command)
        first.kill()
        after_steps(command, run, 3)
        assert engine(command).pid != first.pid
        lines = run.read_metrics()
        assert sum(line["failed_rollouts"] for line in lines[before:]) > 0
        assert sum(line["failed_rollouts"] for line in lines[:before]) == 0
        assert (command.kill(trainer(command)), "has ended (killed by SIGKILL)" in command.said) == (2, True), command.said
    last = run.checkpoints()[-1]
    assert last >= before + 2
    with started("train", "--resume", "mine", folder=tmp_path) as command:
        after_steps(command, run, 2)
        assert run.manifest["resumed"][-1]["step"] == last
        assert command.kill(command.family()[0]) == -signal.SIGKILL
    assert run.checkpoints()[-1] > last
