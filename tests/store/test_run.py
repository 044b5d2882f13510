"""A run's folder: its name, what is appended and replaced, what a kill may leave, and how it is rewound."""

import json

import pytest

from art_mcp.errors import RunError
from art_mcp.store.run import new_run, open_run
from art_mcp.types import TrajectoryGroup


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
    with pytest.raises(RunError, match=r"there are a, b$"):
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


def test_a_run_that_keeps_no_times_writes_none(tmp_path):
    assert new_run(tmp_path, "a", keep_seconds=False).keep_seconds is False
    run = new_run(tmp_path, "mine")
    run.metrics(0, {"reward": 1.0})
    assert json.loads((run.folder / "metrics.jsonl").read_text()) == {"step": 0, "reward": 1.0}
