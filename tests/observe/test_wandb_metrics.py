"""A run's metrics in Weights & Biases, offline."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import anyio
import pytest

from art_mcp.errors import ConfigError
from art_mcp.observe.wandb_metrics import open_wandb
from art_mcp.store.run import Run
from art_mcp.wiring.stage import Setting
from art_mcp.wiring.training import Training, resume, train

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "wiring" / "calculator_here.py"


TWICE = """
import sys
from contextlib import suppress
from art_mcp.cli.main import main

for words in sys.argv[1:]:
    sys.argv[1:] = words.split()
    with suppress(SystemExit):
        main()
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_an_offline_run_keeps_every_steps_numbers_for_wandb_and_goes_on_under_its_id(tmp_path):
    asked = f"train {HERE} --steps 1 --groups 1 --rollouts 2 --eval-n 0 --name first --wandb project --json"
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TWICE, asked, "train --resume first --steps 2 --json"],
        cwd=tmp_path,
        env=environ | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    run = tmp_path / "runs" / "first"
    id = json.loads((run / "manifest.json").read_text())["wandb_id"]
    files = list((run / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert len(files) == 2
    for file in files:
        assert all(name in file.read_bytes() for name in (b"entropy", b"gradient_norm", b"seconds_rollout", b"learning_rate"))


def test_where_wandb_is_missing_the_way_to_install_it_is_told_before_anything_is_opened(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "wandb" else real(name, *more))
    monkeypatch.chdir(tmp_path)
    told = r"wandb is not installed: pip install 'art-mcp\[wandb\]'"
    with pytest.raises(ConfigError, match=told), open_wandb("project", id="x", name="x", folder=tmp_path, settings={}):
        pass
    asked = Training(Setting("nowhere"), wandb="project")
    with pytest.raises(ConfigError, match=told):
        anyio.run(lambda: train(asked, name="first", stream=StringIO()))
    kept = Run(tmp_path / "runs" / "first")
    kept.folder.mkdir(parents=True)
    kept.describe({"training": asdict(asked)})
    with pytest.raises(ConfigError, match=told):
        anyio.run(lambda: resume("first", plan={}, stream=StringIO()))
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "first", "manifest.json"]
