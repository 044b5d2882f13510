"""A run's metrics in Weights & Biases, offline."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import anyio
import pytest

from art_mcp.errors import ConfigError, RunError
from art_mcp.observe.wandb_metrics import WandbMetrics, open_wandb
from art_mcp.store.run import Run
from art_mcp.wiring.stage import Setting
from art_mcp.wiring.training import Training, resume, train

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "wiring" / "calculator_here.py"


COMMANDS = """
import sys
from contextlib import suppress
from art_mcp.cli.main import main

for words in sys.argv[1:]:
    sys.argv[1:] = words.split()
    with suppress(SystemExit):
        main()
"""
TOLD = """
import sys
from pathlib import Path
from art_mcp.observe.wandb_metrics import open_wandb

with open_wandb("project", id="one", name="one", folder=Path(sys.argv[1]), settings={}) as recorder:
    for step, loss in (0, 0.5), (1, 0.25):
        recorder.metrics(step, {"phase": "warm start", "loss": loss})
    for step, reward in (2, 0.0), (3, 0.25), (4, 0.5), (3, 0.75), (4, 1.0):
        recorder.metrics(step, {"reward": reward})
"""
NEEDS_WANDB = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
BLOCK = 2**15
HEADER, WHOLE, LAST = struct.Struct("<IHB"), 1, 4


def run_offline(folder, program, *words):
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        env=environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_offline(file):
    """What is logged in a run's file (LevelDB's log format, after a header of 7 bytes), and the axis of each metric."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    rows, axes = [], {}
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER.size:  # the rest of a block that no header fits into is padding
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(data, at)
        whole += data[at + HEADER.size : at + HEADER.size + size]
        at += HEADER.size + size
        if kind in (WHOLE, LAST):
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                rows.append({name: value for name, value in row.items() if not name.startswith("_")})
            if record.HasField("metric"):
                axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return rows, axes


def files_of(folder, id):
    """The files of all sessions of the run, in the order in which they were begun."""
    return sorted((folder / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"), key=lambda file: file.stat().st_mtime_ns)


@NEEDS_WANDB
def test_steps_that_a_resumed_run_takes_again_are_logged_again_and_supervised_ones_have_an_axis_of_their_own(tmp_path):
    run_offline(tmp_path, TOLD, str(tmp_path))
    (file,) = files_of(tmp_path, "one")
    rows, axes = read_offline(file)
    assert rows[:2] == [{"sft/step": 0, "sft/loss": 0.5}, {"sft/step": 1, "sft/loss": 0.25}]
    assert [row["step"] for row in rows[2:]] == [2, 3, 4, 3, 4]
    assert [row["reward"] for row in rows[2:]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert axes == {"step": "", "*": "step", "sft/step": "", "sft/loss": "sft/step"}


@NEEDS_WANDB
def test_an_offline_run_keeps_every_steps_numbers_for_wandb_and_goes_on_under_its_id(tmp_path):
    shape = f"{HERE} --eval-n 0 --wandb project --json --name"
    out = run_offline(
        tmp_path,
        COMMANDS,
        f"train {shape} first --warm-start 2 --steps 1 --groups 1 --rollouts 2",
        "train --resume first --steps 2 --json",
        f"sft {shape} taught --demonstrations 2",
    )
    assert [json.loads(line)["steps"] for line in out.splitlines() if line.startswith("{")] == [2, 3, 1]
    (taught, played), (later,) = rows_of(tmp_path / "runs" / "first")
    ((alone,),) = rows_of(tmp_path / "runs" / "taught")
    assert (taught["sft/step"], played["step"], later["step"], alone["sft/step"]) == (0, 1, 2, 0)
    assert taught.keys() == alone.keys() > {"sft/loss", "sft/gradient_norm", "sft/learning_rate", "sft/seconds_train"}
    assert all(name.startswith("sft/") for name in taught)
    for row in (played, later):
        assert row.keys() > {"reward", "loss", "gradient_norm", "seconds_rollout"}


def rows_of(run):
    """What each session of a run logged."""
    return [read_offline(file)[0] for file in files_of(run, json.loads((run / "manifest.json").read_text())["wandb_id"])]


def test_a_step_that_wandb_does_not_take_is_named():
    class Away:
        def define_metric(self, name, step_metric=None):
            pass

        def log(self, values):
            raise ConnectionError("the service\nis away")

    with pytest.raises(RunError, match=r"^Weights & Biases did not take step 3: the service is away$"):
        WandbMetrics(Away()).metrics(3, {"loss": 0.5})


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
    assert {path.name for path in tmp_path.rglob("*")} == {"runs", "first", "manifest.json", ".lock"}
