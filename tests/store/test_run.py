"""A run's folder: its name, what is appended and replaced, what a kill may leave, and how it is rewound."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from art_mcp.errors import RunError
from art_mcp.store.aside import put_back, replace_folder
from art_mcp.store.run import LOCK, Run, new_run, open_run
from art_mcp.store.trajectories import read_rows
from art_mcp.types import StopReason, Trajectory, TrajectoryGroup


def checkpoints(run, *steps):
    for step in steps:
        folder = run.checkpoint(step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")


def steps_of(run, folder="trajectories"):
    return sorted(path.name for path in (run.folder / folder).iterdir())


def test_a_new_run_has_a_folder_of_its_own_and_latest_points_to_it(tmp_path):
    runs = [new_run(tmp_path, name) for name in (None, None, None, "first-try")]
    assert len({run.folder for run in runs}) == 4
    assert runs[3].folder == tmp_path / "first-try"
    assert (tmp_path / "latest").resolve() == runs[3].folder.resolve()
    assert not (tmp_path / "latest").readlink().is_absolute()
    new = new_run(tmp_path, None)
    assert (tmp_path / "latest").resolve() == new.folder.resolve()


HOLD = """
import subprocess, sys
from pathlib import Path
from art_mcp.store.run import Run
with Run(Path(sys.argv[1])).held():
    subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"])  # outlives the kill
    print("held", flush=True)
    input()
"""


def test_a_run_is_held_by_one_process_alone_and_a_killed_one_lets_go_of_it(tmp_path):
    run = new_run(tmp_path, "mine")
    run.describe({})
    run.metrics(0, {"reward": 0.5})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run.folder)], text=True, **pipes)
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(RunError, match=rf"mine is being trained by process {other.pid} on .+: wait until that ends"),
        run.held(),
    ):
        pass
    assert open_run(run.folder).read_metrics() == [{"step": 0, "reward": 0.5}]
    other.kill()
    other.wait()
    with run.held():
        assert f"process {os.getpid()} on " in (run.folder / LOCK).read_text()
    other.communicate()


def test_a_run_on_a_file_system_without_locks_is_trained_all_the_same(tmp_path, monkeypatch):
    run = new_run(tmp_path, "mine")

    def fail(code):
        def take(file):
            raise OSError(code, os.strerror(code))

        return take

    monkeypatch.setattr("art_mcp.store.run.take", fail(errno.ENOSYS))
    with run.held():
        pass
    monkeypatch.setattr("art_mcp.store.run.take", fail(errno.EIO))
    with pytest.raises(RunError, match=r"locking .*mine/\.lock: .*Input/output error"), run.held():
        pass


def test_a_name_that_is_taken_is_refused_with_what_to_do(tmp_path):
    new_run(tmp_path, "mine")
    with pytest.raises(RunError, match="mine exists already: choose another name, or go on with it by --resume mine"):
        new_run(tmp_path, "mine")


@pytest.mark.parametrize("name", ["", "a/b", "../out", "x@3", "two words", "latest", ".hidden", "-n"])
def test_a_name_is_a_plain_word(tmp_path, name):
    with pytest.raises(RunError, match="plain word"):
        new_run(tmp_path / "runs", name)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_opened_by_its_folder_or_by_latest(tmp_path):
    run = new_run(tmp_path, "mine")
    run.describe({"status": "running"})
    assert open_run(tmp_path / "mine").folder == run.folder
    assert open_run(tmp_path / "latest").folder == run.folder


def test_a_run_that_is_not_there_is_told_with_those_that_are(tmp_path):
    with pytest.raises(RunError, match="`art-mcp train` makes runs"):
        open_run(tmp_path / "nope")
    for name in ("b", "a"):
        new_run(tmp_path, name).describe({})
    with pytest.raises(RunError, match=r"there are: a, b$"):
        open_run(tmp_path / "nope")


def test_the_manifest_gathers_what_it_is_told(tmp_path):
    run = new_run(tmp_path, "mine")
    run.describe({"seed": 1, "status": "running"})
    run.describe({"status": "finished", "name": "é"})
    assert run.manifest == {"seed": 1, "status": "finished", "name": "é"}
    assert [path.name for path in run.folder.iterdir()] == ["manifest.json"]


def test_a_broken_manifest_is_told_with_its_path(tmp_path):
    run = new_run(tmp_path, "mine")
    (run.folder / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json"):
        _ = run.manifest


def test_metrics_come_back_in_order_and_a_line_that_was_cut_off_is_none(tmp_path):
    run = new_run(tmp_path, "mine")
    assert run.read_metrics() == []
    for step in range(3):
        run.metrics(step, {"reward": step / 3})
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert run.read_metrics() == [{"step": step, "reward": step / 3} for step in range(3)]
    run.rewind(3)
    run.metrics(3, {"reward": 1.0})
    assert [line["step"] for line in run.read_metrics()] == [0, 1, 2, 3]


def test_a_broken_line_within_the_metrics_is_told(tmp_path):
    run = new_run(tmp_path, "mine")
    (run.folder / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        run.read_metrics()


def test_rewinding_forgets_all_that_came_after_and_what_a_kill_left_half_done(tmp_path):
    run = new_run(tmp_path, "mine")
    checkpoints(run, 2)
    for step in range(4):
        run.groups(step, [TrajectoryGroup(())])
        run.metrics(step, {"reward": 0.0})
    (run.folder / "trajectories" / ".step-000004.parquet.tmp").write_text("half")
    (run.folder / "checkpoints" / ".step-000004.99.tmp").mkdir()
    (run.folder / "checkpoints" / ".step-000004.99.tmp" / "model.safetensors").write_text("half")
    run.rewind(2)
    assert [line["step"] for line in run.read_metrics()] == [0, 1]
    assert steps_of(run) == ["step-000000.parquet", "step-000001.parquet"]
    assert steps_of(run, "checkpoints") == ["step-000002"]


@pytest.mark.parametrize("forget", [False, True])
def test_a_checkpoint_that_was_being_replaced_at_a_kill_is_there_again_when_the_run_is_opened(tmp_path, forget):
    run = new_run(tmp_path, "mine")
    run.describe({})
    checkpoints(run, 50, 100, 150)
    away = {step: run.checkpoint(step).with_name(f".step-{step:06d}.7.old.tmp") for step in (100, 150)}
    run.checkpoint(100).rename(away[100])
    shutil.copytree(run.checkpoint(150), away[150])  # its successor has taken its place already
    shutil.copytree(run.checkpoint(50), run.folder / "checkpoints" / ".step-000200.7.new.tmp")
    if forget:
        run.rewind(0)
        assert steps_of(run, "checkpoints") == ["step-000050", "step-000100", "step-000150"]
    else:
        run = open_run(run.folder)
    assert run.checkpoints() == [50, 100, 150]
    assert (run.checkpoint(100) / "model.safetensors").read_text() == "weights"


def test_a_checkpoint_that_cannot_be_put_back_is_told(tmp_path):
    (tmp_path / ".x.7.old.tmp").mkdir()
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(RunError, match=r"putting .*x back in its place"):
        put_back(tmp_path, "x")


def test_a_folder_that_replaces_another_leaves_nothing_beside_it(tmp_path):
    for text in ("one", "two"):
        aside = tmp_path / ".x.1.new.tmp"
        aside.mkdir()
        (aside / text).touch()
        replace_folder(aside, tmp_path / "x")
        assert [path.name for path in tmp_path.rglob("*")] == ["x", text]


def test_only_whole_checkpoints_count_and_in_the_order_of_their_steps(tmp_path):
    run = new_run(tmp_path, "mine")
    assert run.checkpoints() == []
    checkpoints(run, 1_000_000, 50, 100)
    (run.folder / "checkpoints" / ".step-000150.7.tmp").mkdir()
    assert run.checkpoints() == [50, 100, 1_000_000]


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3]), (1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_the_last_checkpoints_are_kept(tmp_path, keep, left):
    run = new_run(tmp_path, "mine")
    checkpoints(run, 1, 2, 3)
    run.prune(keep)
    assert run.checkpoints() == left
    assert steps_of(run, "checkpoints") == [f"step-{step:06d}" for step in left]


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_keeps_no_times_writes_none(tmp_path, keep):
    new_run(tmp_path, "mine", keep_seconds=keep).describe({})
    trajectory = Trajectory(None, "r", (), (), StopReason.ANSWERED, seconds=1.5)
    for step, run in enumerate([Run(tmp_path / "mine", keep), open_run(tmp_path / "mine", keep_seconds=keep)]):
        run.groups(step, [TrajectoryGroup((trajectory.scored(1.0),))])
        (row,) = read_rows(run.folder / "trajectories" / f"step-{step:06d}.parquet")
        assert row["seconds"] == (1.5 if keep else None)


def test_metrics_that_cannot_be_written_are_told_with_their_file(tmp_path):
    run = new_run(tmp_path, "mine")
    (run.folder / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"writing .*metrics\.jsonl"):
        run.metrics(0, {"reward": 1.0})


KILLED = """
import json, os, signal, sys
from pathlib import Path
from art_mcp.store.run import Run

run = Run(Path(sys.argv[1]))

def prune_until(fatal):
    calls = 0

    def trap(event, arguments):
        nonlocal calls
        calls += event in ("open", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(trap)
    run.prune(1)
    os._exit(0)

status, fatal, found = 1, 0, []
while status:
    for step in (1, 2, 3):
        run.checkpoint(step).mkdir(parents=True, exist_ok=True)
        for name in "ab":
            (run.checkpoint(step) / name).touch()
    fatal += 1
    if not (child := os.fork()):
        prune_until(fatal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append([[step, sorted(path.name for path in run.checkpoint(step).iterdir())] for step in run.checkpoints()])
    run.rewind(9)
print(json.dumps(found))
"""


def test_a_kill_while_old_checkpoints_are_removed_leaves_none_that_is_not_whole(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    assert len(found) > 8
    assert {tuple(names) for state in found for _, names in state} == {("a", "b")}
    assert {tuple(step for step, _ in state) for state in found} == {(1, 2, 3), (2, 3), (3,)}
    assert steps_of(Run(tmp_path), "checkpoints") == ["step-000003"]
