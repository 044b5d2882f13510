"""Whole training runs of the packaged policy: repeated, in either process, stopped, killed, resumed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from time import monotonic

import anyio
import psutil
import pytest

from art_mcp.agent.evaluate import wilson
from art_mcp.agent.imitation import Lessons
from art_mcp.agent.loop import Plan
from art_mcp.errors import ConfigError, EnvironmentLoadError, RunError
from art_mcp.store.run import LOCK, Run
from art_mcp.store.trajectories import read_rows
from art_mcp.types import TrainConfig
from art_mcp.wiring import measured, training
from art_mcp.wiring.stage import Setting, find_model
from tests.processes import remaining

HERE = Path(__file__).parent
ENVIRONMENT = str(HERE / "calculator_here.py")
SETTING = Setting(ENVIRONMENT, deterministic=True, in_process=True)
PLAN = Plan(steps=4, groups=2, rollouts=4, save_every=2)
ASKED = training.Training(SETTING, PLAN, TrainConfig(learning_rate=1e-3), eval_n=2)
MAIN = "from art_mcp.observe import console; console.QUIET_SECONDS = 1e9; from art_mcp.cli.main import main; main()"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, one_thread):
    """A run of four steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report, _ = train(ASKED, "straight")
    return Run(folder / "runs" / "straight"), report


def train(asked, name):
    stream = StringIO()
    return anyio.run(lambda: training.train(asked, name=name, stream=stream)), stream.getvalue()


def resume(name, *, stream=None, **plan):
    return anyio.run(lambda: training.resume(name, plan=plan, stream=stream or StringIO()))


def run_at(project, name):
    return Run(project / "runs" / name)


def trajectories(run):
    return {path.name: path.read_bytes() for path in sorted((run.folder / "trajectories").iterdir())}


def timeless(run):
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in run.read_metrics()]


def weights(run, step):
    return {name: (run.checkpoint(step) / name).read_bytes() for name in ("model.safetensors", "trainer.json")}


def same(run, other, *, steps=4):
    """The same trajectories, metrics and weights, to the last bit."""
    names = [f"step-{step:06d}.parquet" for step in range(steps)]
    assert list(trajectories(run)) == names
    assert {name: trajectories(other)[name] for name in names} == trajectories(run)
    assert timeless(run) == timeless(other)[:steps]
    assert weights(run, steps) == weights(other, steps)
    return True


def test_a_run_learns_from_what_it_recorded(straight):
    run, report = straight
    rows = [row for path in sorted((run.folder / "trajectories").iterdir()) for row in read_rows(path)]
    assert len(rows) == 4 * 2 * 4
    assert {(span.policy_version, row["step"]) for row in rows for span in row["spans"] if span.logprobs is not None} == {
        (step, step) for step in range(4)
    }
    assert any(row["tool_calls"] for row in rows)
    assert weights(run, 2) != weights(run, 4)
    assert [line["step"] for line in run.read_metrics()] == [0, 1, 2, 3]
    means = [sum(row["reward"] for row in rows if row["step"] == step) / 8 for step in range(4)]
    assert [line["reward"] for line in run.read_metrics()] == pytest.approx(means)
    assert run.checkpoints() == [2, 4]
    assert (run.folder / "reward.png").stat().st_size > 1000
    assert report["steps"] == 4
    assert report["before"]["greedy"]["n"] == report["after"]["sampled"]["n"] == 2


def test_the_manifest_holds_everything_that_is_needed_to_repeat_a_run(straight):
    run, report = straight
    manifest = run.manifest
    assert training.read_training(run) == ASKED
    assert manifest["status"] == "finished"
    assert {"python", "torch", "transformers", "mcp", "tokenizers"} <= {name for name, v in manifest["versions"].items() if v}
    assert manifest["model"].keys() >= {"source", "parameters", "dtype", "quantization", "weights_sha256", "in_process"}
    for name in ("template_sha256", "tool_schema_sha256", "opening_sha256"):
        assert len(manifest[name]) == 64
    assert len({manifest[name] for name in ("template_sha256", "tool_schema_sha256", "opening_sha256")}) == 3
    assert manifest["tools"] == ["add", "subtract", "multiply", "divide"]
    assert manifest["seconds"].keys() == {"start", "evaluate_before", "train", "evaluate_after"}
    assert all(seconds > 0 for seconds in manifest["seconds"].values())
    assert (manifest["before"], manifest["after"], manifest["steps"]) == (report["before"], report["after"], 4)


def test_the_same_seed_makes_the_same_run_and_another_seed_another(straight, project):
    short = replace(ASKED, plan=replace(PLAN, steps=2), eval_n=0)
    train(short, "again")
    assert same(run_at(project, "again"), straight[0], steps=2)
    train(replace(short, plan=replace(short.plan, seed=1)), "other")
    assert timeless(run_at(project, "other")) != timeless(straight[0])[:2]


@pytest.mark.slow
def test_a_child_process_makes_the_same_run(straight, project):
    setting = replace(SETTING, in_process=False)
    train(replace(ASKED, setting=setting, plan=replace(PLAN, steps=2), eval_n=0), "child")
    assert same(run_at(project, "child"), straight[0], steps=2)
    assert run_at(project, "child").manifest["model"]["in_process"] is False


def test_a_run_that_was_stopped_and_resumed_takes_the_steps_of_one_that_never_was(straight, project):
    train(replace(ASKED, plan=replace(PLAN, steps=2)), "parts")
    report = resume("parts", steps=4)
    run = run_at(project, "parts")
    assert same(run, straight[0])
    assert report["before"] == straight[1]["before"]
    assert report["after"] == straight[1]["after"]
    totals = [line["seconds_total"] for line in run.read_metrics()]
    assert totals == sorted(totals)
    assert run.manifest["resumed"][0]["step"] == 2
    assert run.manifest["model"]["source"] == "tiny"


def test_a_resumed_run_with_nothing_left_to_do_changes_nothing(straight, project):
    shutil.copytree(straight[0].folder, project / "runs" / "done")
    before, told = run_at(project, "done").checkpoint(4).stat().st_mtime_ns, StringIO()
    assert resume("done", stream=told)["train_seconds"] >= run_at(project, "done").read_metrics()[-1]["seconds_total"]
    assert same(run_at(project, "done"), straight[0])
    assert run_at(project, "done").checkpoint(4).stat().st_mtime_ns == before
    assert told.getvalue() == "nothing is left to train: the run has taken 4 steps of 4: ask for more with --steps 104\n"


def test_fewer_steps_than_a_run_has_taken_take_none_back_and_measure_nothing_again(straight, project, monkeypatch):
    shutil.copytree(straight[0].folder, project / "runs" / "enough")
    measured, told = run_at(project, "enough").manifest["after"], StringIO()
    monkeypatch.setattr(training, "measure", None)
    assert resume("enough", steps=2, stream=told)["after"] == measured
    assert told.getvalue() == "nothing is left to train: the run has taken 4 steps of 4: ask for more with --steps 104\n"
    assert run_at(project, "enough").manifest["training"]["plan"]["steps"] == 4
    assert run_at(project, "enough").manifest["status"] == "finished"


def test_a_run_without_a_checkpoint_is_resumed_from_its_start_and_new_limits_replace_the_old(straight, project):
    spent = replace(ASKED, plan=replace(PLAN, steps=None, seconds=0.0), eval_n=0)
    train(spent, "early")
    run = run_at(project, "early")
    shutil.rmtree(run.folder / "checkpoints")
    run.metrics(0, {"reward": 0.5})
    resume("early", steps=2)
    assert same(run, straight[0], steps=2)


def test_the_metrics_of_a_run_go_on_at_one_id_in_wandb_after_a_stop_and_no_other_run_of_its_name_has_it(project, monkeypatch):
    opened = []

    @contextmanager
    def kept(where, *, id, name, folder, settings):
        metrics = Counted()
        opened.append((where, id, name, metrics.steps, folder.is_dir()))
        yield metrics

    class Counted:
        def __init__(self):
            self.steps = []  # and of which part each is

        def groups(self, step, groups):
            pass

        def metrics(self, step, values):
            self.steps.append((step, values.get("phase")))

    monkeypatch.setattr("art_mcp.observe.wandb_metrics.refuse_missing", lambda: None)
    monkeypatch.setattr("art_mcp.observe.wandb_metrics.open_wandb", kept)
    plan, lessons = Plan(steps=1, groups=1, rollouts=2), Lessons(demonstrations=2)
    asked = replace(ASKED, plan=plan, eval_n=0, warm_start=lessons, wandb="team/project")
    train(asked, "watched")
    resume("watched", steps=2)
    run_at(project, "watched").folder.rename(project / "elsewhere")
    train(replace(asked, plan=replace(asked.plan, steps=0)), "watched")
    first, second, other = opened
    assert first == (
        "team/project",
        Run(project / "elsewhere").manifest["wandb_id"],
        "watched",
        [(0, "warm start"), (1, None)],
        True,
    )
    assert second == (*first[:3], [(2, None)], True)
    assert other[3] == [(0, "warm start")]
    assert other[1] == run_at(project, "watched").manifest["wandb_id"] != first[1]


def test_a_service_that_takes_no_metrics_is_told_once_and_ends_no_run(project, monkeypatch):
    tried = []

    class Offline:
        def groups(self, step, groups):
            pass

        def metrics(self, step, values):
            tried.append(step)
            raise RunError(f"the service did not take step {step}: it is away")

    @contextmanager
    def away(where, **_):
        yield Offline()

    monkeypatch.setattr("art_mcp.observe.wandb_metrics.refuse_missing", lambda: None)
    monkeypatch.setattr("art_mcp.observe.wandb_metrics.open_wandb", away)
    plan = Plan(steps=3, groups=1, rollouts=2)
    report, shown = train(replace(ASKED, plan=plan, eval_n=0, wandb="project"), "watched")
    assert report["steps"] == len(run_at(project, "watched").read_metrics()) == 3
    assert tried == [0, 1, 2]
    (told,) = [line for line in shown.splitlines() if "service" in line]
    lost = "note: the service did not take step 0: it is away, and may miss others"
    assert told == f"{lost}: training goes on, and runs/watched has them all"


def test_a_run_whose_metrics_cannot_be_written_is_saved_and_goes_on_behind_that_step(straight, project, monkeypatch):
    def full(run, step, values):
        raise RunError(f"writing {run.folder}/metrics.jsonl: no room")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "metrics", full)
        with pytest.raises(RunError, match="no room"):
            train(replace(ASKED, eval_n=0), "full")
    run = run_at(project, "full")
    assert (run.checkpoints(), run.manifest["status"], run.read_metrics()) == ([1], "failed", [])
    resume("full")
    assert weights(run, 4) == weights(straight[0], 4)
    assert trajectories(run) == trajectories(straight[0])
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]


@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_that_overlaps_its_steps_learns_from_tokens_of_two_policies_and_corrects_for_it(project, in_process):
    setting = Setting(ENVIRONMENT, in_process=in_process)
    plan = Plan(steps=3, groups=4, rollouts=4, concurrency=32, overlap=1)
    train(replace(ASKED, setting=setting, plan=plan, eval_n=0), "beside")
    resume("beside", steps=4)
    run = run_at(project, "beside")
    assert training.read_training(run).plan == replace(plan, steps=4)
    lines, versions = run.read_metrics(), []
    for step, path in enumerate(sorted((run.folder / "trajectories").iterdir())):
        spans = [span for row in read_rows(path) for span in row["spans"] if span.logprobs is not None]
        versions.append({span.policy_version for span in spans})
        old = sum(len(span.token_ids) for span in spans if span.policy_version < step)
        assert lines[step]["staleness"] == pytest.approx(old / sum(len(span.token_ids) for span in spans))
    # there is a place for each rollout of both steps, so the second begins with the first; nothing is ahead of a resumed step
    assert versions[0] == {0}
    assert 0 in versions[1] <= {0, 1}
    assert 1 in versions[2] <= {1, 2}
    assert versions[3] == {3}
    # the ratio in the loss makes up for how far trainer and sampler are apart: by rounding alone, where both are one policy
    assert lines[0]["mismatch_max"] < 1e-4 < lines[1]["mismatch_max"]


def test_a_deterministic_run_that_overlaps_its_steps_is_refused_in_words(project):
    with pytest.raises(ConfigError, match=r"cannot overlap its steps.*leave out --overlap or --deterministic"):
        train(replace(ASKED, plan=replace(PLAN, overlap=2)), "beside")
    assert not (project / "runs" / "beside").exists()


def command(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a session of its own, as a terminal's foreground job has: signals reach every process in it
    return subprocess.Popen([sys.executable, "-c", MAIN, *args], env=environment, text=True, start_new_session=True, **pipes)


def endless(name, *more, environment=ENVIRONMENT):
    """A run in a process of its own, once it has recorded three steps."""
    shape = ["--groups", "2", "--rollouts", "4", "--lr", "1e-3", "--save-every", "2", "--eval-n", "0", "--deterministic"]
    process = command("train", environment, "--steps", "100000", "--name", name, *shape, *more)
    metrics = Path("runs") / name / "metrics.jsonl"
    deadline = monotonic() + 90
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert monotonic() < deadline
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(process.communicate())
    return process


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(straight, project):
    process = endless("killed", "--in-process")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = run_at(project, "killed")
    assert run.manifest["status"] == "running"
    assert run.checkpoints()
    for step in run.checkpoints():  # as if the kill had come right after the first checkpoint, in the middle of a line
        if step > 2:
            shutil.rmtree(run.checkpoint(step))
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "rew')
    resume("killed", steps=4)
    assert same(run, straight[0])
    assert run.manifest["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_it_goes_on_and_leaves_no_process(sent, project):
    name = f"interrupted-{sent.name}"
    process = endless(name, "--child-process")
    children = psutil.Process(process.pid).children(recursive=True)
    if sent is signal.SIGINT:
        os.killpg(process.pid, sent)  # a terminal sends it to all
    else:
        process.send_signal(sent)
    output, errors = process.communicate(timeout=60)
    run = run_at(project, name)
    (last,) = run.checkpoints()[-1:]
    assert process.returncode == 130
    assert output == ""
    assert errors == f"stopped after {last} steps; to go on: art-mcp train --resume runs/{name}\n"
    assert run.manifest["status"] == "stopped"
    assert last == len(run.read_metrics()) >= 3
    assert children
    assert remaining(children) == []
    again = run.manifest["training"]
    run.describe({"training": {**again, "setting": {**again["setting"], "in_process": True}}})  # a second child is not needed
    resume(name, steps=last + 1)
    assert [line["step"] for line in run.read_metrics()] == list(range(last + 1))


def press_until_it_ends(process):
    """Ctrl-C again and again, as somebody who waits no longer; gives the exit code."""
    while True:
        os.killpg(process.pid, signal.SIGINT)
        try:
            return process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue


def tells_what_is_kept(line, run):
    """Whether this is what a second Ctrl-C is answered with. (A child may have finished a checkpoint after that.)"""
    told = re.fullmatch(r"ended at once, the checkpoint of step (\d+) is kept; to go on: art-mcp train --resume (\S+)\n", line)
    return told is not None and int(told[1]) in run.checkpoints() and told[2] == f"runs/{run.folder.name}"


@pytest.mark.slow
def test_a_second_interruption_ends_a_run_at_once_and_says_what_is_kept(project):
    process = endless("impatient", "--child-process")
    children = psutil.Process(process.pid).children(recursive=True)
    code, run = press_until_it_ends(process), run_at(project, "impatient")
    output, errors = process.communicate(timeout=60)
    assert (code, output) == (130, "")
    *before, last = errors.splitlines(keepends=True)
    assert tells_what_is_kept(last, run)
    assert len(before) <= 1  # that of a run which had been stopped already
    assert run.manifest["status"] == "stopped"
    assert children
    assert remaining(children) == []


STAYING = """
import runpy, time
runpy.run_path({server!r}, run_name="server")["server"].run("stdio")
time.sleep(600)
"""
STAYS = """
from dataclasses import replace
from pathlib import Path
from art_mcp.environment import load_environment
server = {"command": "python", "args": [str(Path(__file__).with_name("staying.py"))]}
environment = replace(load_environment("@ROOT@/environments/calculator.py"), servers=[server])
"""


@pytest.mark.slow
def test_an_interruption_while_a_stopped_run_waits_for_its_server_ends_it_and_the_server(project):
    root = str(HERE.parents[1])
    (project / "staying.py").write_text(STAYING.format(server=f"{root}/servers/calculator/server.py"))
    (project / "stays.py").write_text(STAYS.replace("@ROOT@", root))
    process = endless("closing", "--in-process", environment="stays.py")
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr.readline().startswith("stopped after ")
    assert press_until_it_ends(process) == 130
    assert tells_what_is_kept(process.stderr.read(), run_at(project, "closing"))
    process.communicate()
    assert len(children) > 1
    assert remaining(children) == []


def test_a_mistake_leaves_no_run_behind(project):
    with pytest.raises(EnvironmentLoadError):
        train(replace(ASKED, setting=replace(SETTING, environment="nothing")), "typo")
    (project / "config.json").write_text(json.dumps({"mcpServers": {"calc": {"command": "python", "args": []}}}))
    calculator = str(HERE.parents[1] / "environments" / "calculator.py")
    with pytest.raises(ConfigError, match="no server 'calculator'"):
        train(replace(ASKED, setting=replace(SETTING, environment=calculator)), "typo")
    assert not (project / "runs").exists()


def test_a_run_that_is_alive_is_not_resumed_and_nothing_in_it_is_touched(straight, project):
    shutil.copytree(straight[0].folder, project / "runs" / "alive")
    run = run_at(project, "alive")
    files = {path: path.stat().st_mtime_ns for path in run.folder.glob("**/*") if path.name != LOCK}
    with run.held():
        told = rf"runs/alive is being trained by process {os.getpid()} on .*: wait until that ends, or stop it \(Ctrl-C"
        with pytest.raises(RunError, match=told):
            resume("alive", steps=6)
        assert {path: path.stat().st_mtime_ns for path in run.folder.glob("**/*") if path.name != LOCK} == files
        assert find_model("alive") == "runs/alive/checkpoints/step-000004"  # reading needs no leave
    resume("alive")


def test_a_run_is_held_from_before_it_can_be_found_until_it_ends(project, monkeypatch):
    held = []

    def describe(stage):
        with pytest.raises(RunError, match=f"is being trained by process {os.getpid()} on "), run_at(project, "new").held():
            pass
        held.append(True)
        return {}

    def finish(run, asked):
        describe(None)

    monkeypatch.setattr(training, "describe_stage", describe)
    monkeypatch.setattr(training, "finish", finish)
    train(replace(ASKED, plan=replace(PLAN, steps=0), eval_n=0), "new")
    resume("new", steps=0)
    assert len(held) == 4
    with run_at(project, "new").held():
        pass


def test_a_name_that_is_taken_is_refused_before_anything_is_opened(straight, project):
    shutil.copytree(straight[0].folder, project / "runs" / "mine")
    with pytest.raises(RunError, match="runs/mine exists already"):
        train(replace(ASKED, setting=replace(SETTING, environment="nothing")), "mine")


def test_a_manifest_of_another_version_cannot_be_resumed_and_is_told(project):
    run = run_at(project, "old")
    run.folder.mkdir(parents=True)
    for manifest in ({}, {"training": {"setting": {}, "plan": {"epochs": 3}, "config": {}}}):
        run.describe(manifest)
        with pytest.raises(RunError, match="runs/old: its manifest is not one that can be resumed"):
            resume("old")


def test_a_model_may_be_named_by_its_run_and_step(straight, project):
    shutil.copytree(straight[0].folder, project / "runs" / "mine")
    (project / "runs" / "latest").symlink_to("mine")
    assert find_model("mine") == find_model("runs/latest") == find_model("runs/mine") == "runs/mine/checkpoints/step-000004"
    assert find_model("mine@2") == find_model("runs/mine@000002") == "runs/mine/checkpoints/step-000002"
    for text in ("mine@3", "mine@x"):
        with pytest.raises(RunError, match=r"no checkpoint of step .*; it has 2, 4"):
            find_model(text)
    for text in ("runs/mien", "mien@2"):
        with pytest.raises(RunError, match=r"no run at runs/mien .*did you mean \'mine\'\? there are: mine"):
            find_model(text)
    assert find_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


def test_a_run_may_have_the_name_of_the_packaged_model(project):
    folder = project / "runs" / "tiny" / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    run_at(project, "tiny").describe({})
    assert find_model("tiny") == "tiny"
    assert find_model("runs/tiny") == "runs/tiny/checkpoints/step-000001"


def test_a_policy_that_learned_nothing_is_not_measured_again(project):
    report, shown = train(replace(ASKED, plan=replace(PLAN, steps=0)), "untaught")
    assert report["after"] == report["before"]
    assert report["before"]["greedy"]["n"] == 2
    assert "after training" not in shown


def test_a_measurement_that_solves_nothing_at_first_ends_there_before_and_after_training(project, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "HOPELESS", 3)
    place = tmp_path / "never.py"
    place.write_text(
        "from dataclasses import replace\nfrom art_mcp.environment import load_environment\n"
        f"environment = replace(load_environment({ENVIRONMENT!r}), rewards={{'never': lambda trajectory: 0.0}})\n"
    )
    asked = replace(ASKED, setting=replace(SETTING, environment=str(place)), plan=replace(PLAN, steps=1), eval_n=5)
    report, shown = train(asked, "never")
    assert [report[label]["sampled"]["n"] for label in ("before", "after")] == [3, 3]
    assert "note: " not in shown


def test_a_run_that_ends_clearly_worse_than_it_began_says_so_once_and_what_to_try(project, tmp_path):
    place = tmp_path / "short.py"
    place.write_text(
        "from dataclasses import replace\nfrom art_mcp.environment import load_environment\nfrom art_mcp.types import Limits\n"
        f"environment = replace(load_environment({ENVIRONMENT!r}), limits=Limits(turns=4, turn_tokens=32))\n"
    )
    setting = Setting(str(place), in_process=True)
    asked = replace(ASKED, setting=setting, plan=replace(PLAN, steps=2, save_every=1))
    report, shown = train(replace(asked, config=TrainConfig(learning_rate=1.0, target_kl=None), eval_n=40), "ruined")
    (told,) = (line for line in shown.splitlines() if line.startswith("note: "))
    before, after = (report[label]["greedy"]["solved"] for label in ("before", "after"))
    assert told.startswith("note: fewer held-out scenarios are solved, by more than chance (greedy ")
    assert f"(greedy {before:.3f} before training, now {after:.3f}; sampled " in told
    assert "try a lower --lr than 1.0e+00 or --target-kl 5e-4, more demonstrations (--warm-start N, art-mcp sft), or " in told
    command = shlex.split(told.rpartition(": ")[2])
    assert command == ["art-mcp", "eval", str(place), "--model", "runs/ruined@1"]
    assert find_model(command[-1]) == "runs/ruined/checkpoints/step-000001"


def figures(solved, n=1000):
    low, high = wilson(solved, n)
    return {"solved": solved / n, "ci95": [low, high]}


@pytest.mark.parametrize(
    ("before", "taught", "after", "told"),
    [
        (500, None, 450, None),  # the intervals meet
        (500, None, 430, r"\(greedy 0\.500 before training, now 0\.430\)"),
        (0, 800, 700, r"\(greedy 0\.800 after the warm start, now 0\.700\)"),
        (500, 300, 400, r"\(greedy 0\.500 before training, now 0\.400\)"),
        (0, 700, 800, None),
    ],
)
def test_a_decline_is_told_from_the_best_that_was_measured_before(project, before, taught, after, told):
    run, stream = run_at(project, "some"), StringIO()
    run.folder.mkdir(parents=True)
    warm = {} if taught is None else {"warm_start": {"steps": 10, "after": {"greedy": figures(taught)}}}
    run.describe({"before": {"greedy": figures(before)}, **warm})
    run.metrics(5, {"phase": "warm start", "learning_rate": 1e-2})
    run.metrics(15, {"learning_rate": 1e-3})
    for step in (5, 10, 20):
        run.checkpoint(step).mkdir(parents=True)
    setting = replace(SETTING, environment="calculator", options={"levels": "1-5"}, lenient=True)
    measured.note_decline(run, {"greedy": figures(after)}, setting=setting, step=20, stream=stream)
    if told is None:
        assert stream.getvalue() == ""
    else:
        assert re.search(rf"chance {told}: try a lower --lr than 1.0e-03, ", stream.getvalue())
        model = f"{run.folder}@{5 if taught is None else 10}"
        assert stream.getvalue().endswith(f": art-mcp eval calculator -o levels=1-5 --lenient --model {model}\n")


@pytest.mark.parametrize(
    ("config", "lines", "advice"),
    [
        ({"learning_rate": 2e-3, "target_kl": 5e-4}, [(1e-3, 0.5)], "a lower --lr than 2.0e-03 or --target-kl"),
        ({"learning_rate": None, "target_kl": 5e-4}, [(1e-3, 0.5), (3e-4, 1.0)], "a lower --lr than 1.0e-03 or --target-kl"),
        ({"learning_rate": 2e-3, "target_kl": 5e-4}, [(1e-3, 1.0)], "a lower --lr than 2.0e-03"),
        ({"learning_rate": 2e-3, "target_kl": None}, [(1e-3, 1.0)], "a lower --lr than 2.0e-03 or --target-kl 5e-4"),
        ({"learning_rate": None, "target_kl": 5e-4}, [], "a lower --lr"),
    ],
)
def test_after_a_decline_shorter_steps_are_told_by_what_was_asked_for(project, config, lines, advice):
    run = run_at(project, "some")
    run.folder.mkdir(parents=True)
    run.describe({"training": {"config": config}})
    taken = [{"learning_rate": rate, "step_kept": kept} for rate, kept in lines]
    assert measured.shorter_steps(run, taken) == advice
    taught = [{"learning_rate": 1e-2, "phase": "warm start"}]
    assert measured.shorter_steps(run, [*taught, *taken]) == (advice if lines else "a lower --lr than 1.0e-02")


@pytest.mark.parametrize(("kept", "told"), [([1e-3, 0.01, 1.0], True), ([0.01, 0.05, 0.3], False), ([], False)])
def test_a_rate_of_which_the_target_leaves_nothing_is_told(project, kept, told):
    run, stream = run_at(project, "some"), StringIO()
    run.folder.mkdir(parents=True)
    run.metrics(0, {"phase": "warm start"})
    for step, part in enumerate(kept):
        run.metrics(step + 1, {"step_kept": part})
    measured.note_cuts(run, stream=stream)
    expected = "note: --target-kl cut half of the steps to 1.0e-02 of their length or less: --lr is far too large"
    assert stream.getvalue().startswith(expected) if told else stream.getvalue() == ""


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([5.0] * 9 + [0.2] * 10, "agreement_t 0.2, "),
        ([1.4] * 10, "agreement_t 1.4, "),
        ([0.2] * 9, None),
        ([0.2] * 10 + [2.0] * 10, None),
        ([], None),
    ],
)
def test_a_run_whose_last_steps_do_not_agree_says_what_it_means(project, values, told):
    run, stream = run_at(project, "some"), StringIO()
    run.folder.mkdir(parents=True)
    run.describe({"training": {"config": {"min_agreement": 3.0}}})
    run.metrics(0, {"agreement": 0.1})
    for step, value in enumerate(values):
        run.metrics(step + 1, {"agreement_t": value})
    measured.note_chance(run, stream=stream)
    if told is None:
        assert stream.getvalue() == ""
    else:
        assert stream.getvalue().startswith(f"note: the last gradients hardly agree ({told}")


@pytest.mark.parametrize(
    ("step", "solved", "n", "told"),
    [
        (3, [0, 0, 0], 20, True),
        (3, [0, 0, 0], 19, False),
        (3, [0, 0, 1], 20, False),
        (3, [1, 0, 0], 20, False),  # a decline, which is told already
        (0, [0, 0, 0], 20, False),
        (3, [], 20, False),
    ],
)
def test_a_run_that_solves_nothing_says_where_to_look(step, solved, n, told):
    stream, (before, *after) = StringIO(), [{**figures(one, n), "n": n} for one in solved] or [None]
    measured.note_nothing(
        {"greedy": before} if before else {},
        dict(zip(("greedy", "sampled"), after, strict=False)),
        step=step,
        stream=stream,
    )
    assert stream.getvalue().startswith("note: not one held-out scenario is solved: ") is told


def test_where_no_earlier_checkpoint_is_left_a_decline_says_how_to_keep_one(project):
    run, stream = run_at(project, "some"), StringIO()
    run.checkpoint(20).mkdir(parents=True)
    run.describe({"before": {"greedy": figures(900)}})
    measured.note_decline(run, {"greedy": figures(0)}, setting=SETTING, step=20, stream=stream)
    assert stream.getvalue().endswith("or a run that keeps the checkpoints of earlier steps (--save-every 10 --keep 0)\n")


@pytest.mark.parametrize(("reward", "why"), [(0.0, "hardly any of them solves its scenario"), (1.0, "nearly all of them")])
def test_a_run_whose_rewards_tie_says_once_whether_at_success_or_at_failure(project, tmp_path, reward, why):
    place = tmp_path / "tied.py"
    place.write_text(
        "from dataclasses import replace\nfrom art_mcp.environment import load_environment\n"
        f"environment = replace(load_environment({ENVIRONMENT!r}), rewards={{'same': lambda trajectory: {reward}}})\n"
    )
    plan = Plan(steps=12, groups=2, rollouts=2)
    _, shown = train(replace(ASKED, setting=Setting(str(place), in_process=True), plan=plan, eval_n=0), "tied")
    (note,) = (line for line in shown.splitlines() if line.startswith("note: "))
    assert f"note: 100 % of the last 10 steps' rollouts taught nothing, as rewards tie in their groups: {why}" in note
    assert [line["solved"] for line in run_at(project, "tied").read_metrics()] == [reward] * 12
