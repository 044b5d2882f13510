"""A run's metrics in Weights & Biases, offline."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from art_mcp.errors import ConfigError
from art_mcp.observe.wandb_metrics import open_wandb

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "wiring" / "calculator_here.py"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_an_offline_run_keeps_every_steps_numbers_for_wandb(tmp_path):
    program = "from art_mcp.cli.main import main; main()"
    command = f"train {HERE} --steps 2 --groups 1 --rollouts 2 --eval-n 0 --name first --wandb project --json"
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split()],
        cwd=tmp_path,
        env=environ | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    (file,) = (tmp_path / "runs" / "first" / "wandb").glob("offline-run-*/run-first.wandb")
    kept = file.read_bytes()
    assert all(name in kept for name in (b"entropy", b"gradient_norm", b"seconds_rollout", b"learning_rate"))


def test_where_wandb_is_missing_the_way_to_install_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"wandb is not installed: pip install 'art-mcp\[wandb\]'"),
        open_wandb("project", name="x", folder=tmp_path, settings={}),
    ):
        pass
