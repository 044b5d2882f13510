"""kill -9 on a GPU: of the engine, of the trainer's child, of the parent. Nothing stays, no process and no GPU memory."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560), pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
SPARE_MIB = 300


def used_mib():
    """Of the GPU that this process sees first."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def until(process, event):
    """Reads what the run tells until it tells of `event`."""
    for line in process.stdout:
        told = json.loads(line)
        if told["event"] == event:
            return told
    raise AssertionError(f"the run ended before it told of {event!r}")


def below(process, words):
    """The process under `process` whose command has all `words`, and that itself has no child with them."""
    found = [child for child in process.children(recursive=True) if all(word in " ".join(child.cmdline()) for word in words)]
    return found[-1]


def test_nothing_is_left_when_engine_trainer_and_parent_are_killed(model_folder, note):
    before = used_mib()
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/gpu/endless.py"), str(model_folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    parent = psutil.Process(run.pid)
    try:
        until(run, "ready")
        until(run, "trained")
        until(run, "sampled")  # what was learned is published, and the next turn is on its way
        below(parent, ["vllm.entrypoints.openai.api_server"]).kill()
        failed = until(run, "engine failed")
        until(run, "sampled again")
        below(parent, ["art_mcp.local.remote"]).kill()
        lost = until(run, "trainer failed")
        until(run, "sampled")
        family = parent.children(recursive=True)
        parent.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(family, timeout=10)
        left = used_mib()
    finally:
        for process in [*parent_family(parent), parent]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        run.communicate()
    note(engine=failed, trainer=lost, before_mib=before, left_mib=left, ended=len(gone))
    assert not alive
    assert left <= before + SPARE_MIB


def parent_family(parent):
    with suppress(psutil.NoSuchProcess):
        return parent.children(recursive=True)
    return []
