"""kill -9 of a training run's processes at random moments: nothing stays behind, and the run goes on as if never killed."""

import json
import random
import signal
from pathlib import Path

import psutil
import pytest
import torch

from art_mcp.local.checkpoints import OPTIMIZER_FILE
from art_mcp.store.run import Run
from tests.slow.killing import ROOT, Command, processor_seconds, started, steps_recorded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHAPE = ["--groups", "2", "--rollouts", "4", "--lr", "1e-3", "--save-every", "1", "--eval-n", "0", "--deterministic"]
CHILD = ["-P", "-m", "art_mcp.local.remote"]
"""What trains and samples, in a process of its own; the launcher's command ends with it too."""
VICTIMS = [*["parent"] * 4, *["trainer"] * 3, *["launcher"] * 3]
MOST_SECONDS = 1.5
"""Of processor time after its first new step, in which a run is killed: several steps of rollouts, training and saving."""


def train(folder: Path, name: str, steps: int):
    (folder / "config.json").write_text(
        json.dumps({"mcpServers": {"calculator": {"command": "python", "args": [f"{ROOT}/servers/calculator/server.py"]}}})
    )
    asked = ["train", f"{ROOT}/environments/calculator.py", "--name", name, "--steps", str(steps), "--child-process", *SHAPE]
    return started(*asked, folder=folder)


def victim_of(command: Command, name: str) -> psutil.Process:
    parent, *below = command.family()
    if name == "parent":
        return parent
    ours = [process for process in below if process.cmdline()[-len(CHILD) :] == CHILD]
    # the launcher's guard has its command too
    (found,) = [one for one in ours if (one.cmdline()[1:] == CHILD if name == "trainer" else one.ppid() == parent.pid)]
    return found


def kill_at(command: Command, run: Run, *, victim: str, moment: float) -> int:
    """Kills `victim` when the run has recorded a step of its own and used `moment` seconds of processor time since."""
    before = steps_recorded(run)
    command.until(lambda: steps_recorded(run) > before)
    used = processor_seconds(command.family())
    command.until(lambda: processor_seconds(command.family()) - used >= moment)
    return command.kill(victim_of(command, victim))


def timeless(run: Run):
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in run.read_metrics()]


def files(folder: Path):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def optimizer(checkpoint: Path):
    """All numbers of it; torch's own random numbers, which nothing here draws, begin anywhere."""
    state = torch.load(checkpoint / OPTIMIZER_FILE, weights_only=True)["optimizer"]["state"]
    return {(place, name): value.tolist() for place, values in state.items() for name, value in values.items()}


def test_a_run_killed_ten_times_leaves_no_process_and_takes_the_steps_of_one_that_never_was(tmp_path):
    draws = random.Random(5)
    victims = draws.sample(VICTIMS, len(VICTIMS))
    run, last = Run(tmp_path / "runs" / "killed"), []
    for number, victim in enumerate(victims):
        resumed = started("train", "--resume", "killed", folder=tmp_path)
        with resumed if number else train(tmp_path, "killed", 100_000) as command:
            code = kill_at(command, run, victim=victim, moment=draws.uniform(0.0, MOST_SECONDS))
            # without the process that trains, the command ends by itself and says why
            wanted = (-signal.SIGKILL, False) if victim == "parent" else (2, True)
            assert (code, "has ended (killed by SIGKILL)" in command.said) == wanted, command.said
        assert run.manifest["status"] == ("running" if victim == "parent" else "failed")
        last.append((run.checkpoints() or [0])[-1])
    assert last == sorted(last)
    assert len(set(last)) > 5
    steps = last[-1] + 2
    with started("train", "--resume", "killed", "--steps", str(steps), folder=tmp_path) as command:
        assert command.process.wait(120) == 0, command.said
    assert [resumed["step"] for resumed in run.manifest["resumed"]] == last
    with train(tmp_path, "straight", steps) as command:
        assert command.process.wait(240) == 0, command.said
    straight = Run(tmp_path / "runs" / "straight")
    assert len(timeless(run)) == steps
    assert timeless(run) == timeless(straight)
    assert files(run.folder / "trajectories") == files(straight.folder / "trajectories")
    killed, whole = run.checkpoint(steps), straight.checkpoint(steps)
    assert files(killed) | {OPTIMIZER_FILE: b""} == files(whole) | {OPTIMIZER_FILE: b""}
    assert optimizer(killed) == optimizer(whole)
