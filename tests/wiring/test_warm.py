"""Supervised starts of the packaged policy: by themselves, before rewards, stopped, resumed, from other sources."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import anyio
import pytest
import torch

from art_mcp.agent.imitation import Lessons
from art_mcp.agent.loop import Plan
from art_mcp.errors import ConfigError, TrainError
from art_mcp.store.run import Run
from art_mcp.store.trajectories import read_rows
from art_mcp.types import TrainConfig
from art_mcp.wiring import training
from art_mcp.wiring.stage import Setting
from art_mcp.wiring.warm import draw, read_file, say_where_done

ENVIRONMENT = str(Path(__file__).parent / "calculator_here.py")
SETTING = Setting(ENVIRONMENT, deterministic=True, in_process=True)
LESSONS = Lessons(demonstrations=12, batch=4, learning_rate=1e-3)
PLAN = Plan(steps=2, groups=2, rollouts=2, save_every=2)
ASKED = training.Training(SETTING, PLAN, TrainConfig(learning_rate=1e-3), eval_n=0, keep=0, warm_start=LESSONS)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, one_thread):
    """Three supervised steps, then two by reward, in one run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report = train(replace(ASKED, eval_n=2), "straight")
    return Run(folder / "runs" / "straight"), report


def train(asked, name):
    return anyio.run(lambda: training.train(asked, name=name, stream=StringIO()))


def resume(name, **plan):
    return anyio.run(lambda: training.resume(name, plan=plan, stream=StringIO()))


def timeless(run):
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in run.read_metrics()]


def same(run, other, *, step=5):
    """The same metrics and weights, to the last bit."""
    assert timeless(run) == timeless(other)[:step]
    folders = run.checkpoint(step), other.checkpoint(step)
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    return True


def optimizer_of(run, step):
    return torch.load(run.checkpoint(step) / "optimizer.pt", weights_only=True)["optimizer"]


def test_a_run_learns_by_example_first_and_by_reward_from_there(straight):
    run, report = straight
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line.get("phase") for line in lines] == ["warm start"] * 3 + [None] * 2
    assert all("reward" in line for line in lines[3:])
    totals = [line["seconds_total"] for line in lines]
    assert totals == sorted(totals)
    assert run.checkpoints() == [2, 3, 4, 5]
    assert (run.folder / "reward.png").is_file()
    files = sorted(path.name for path in (run.folder / "trajectories").iterdir())
    assert files == ["step-000003.parquet", "step-000004.parquet"]
    rows = read_rows(run.folder / "trajectories" / files[0])
    assert {span.policy_version for row in rows for span in row["spans"]} == {None, 3}
    assert report["steps"] == 5
    assert [one["greedy"]["n"] for one in (report["before"], report["warm_start"]["after"], report["after"])] == [2, 2, 2]


def test_the_optimizer_begins_anew_after_the_examples_and_the_manifest_says_so(straight):
    run, _ = straight
    assert optimizer_of(run, 2)["state"]
    assert optimizer_of(run, 3)["state"] == {}
    assert max(int(entry["step"]) for entry in optimizer_of(run, 5)["state"].values()) <= 2
    manifest = run.manifest
    assert training.read_training(run) == replace(ASKED, eval_n=2)
    assert manifest["status"] == "finished"
    told = manifest["warm_start"]
    assert (told["optimizer_reset_at_step"], told["steps"], told["demonstrations"], told["source"]) == (3, 3, 12, "solutions")
    assert told["learned_tokens"] == sum(line["trainable_tokens"] for line in run.read_metrics()[:3])
    assert manifest["seconds"].keys() == {
        *("start", "evaluate_before", "warm_start", "evaluate_warm_start", "train", "evaluate_after"),
    }


def test_a_supervised_run_goes_on_with_rewards_as_if_both_had_been_asked_for_at_once(straight, project):
    taught = train(replace(ASKED, plan=replace(PLAN, steps=0), eval_n=2), "parts")
    run = Run(project / "runs" / "parts")
    assert [line["phase"] for line in run.read_metrics()] == ["warm start"] * 3
    assert (run.manifest["status"], run.manifest["steps"]) == ("finished", 3)
    resume("parts", steps=2)
    assert same(run, straight[0])
    parts = run.manifest
    measured = [parts["before"], parts["warm_start"]["after"], parts["after"]]
    assert measured == [straight[1]["before"], straight[1]["warm_start"]["after"], straight[1]["after"]]
    assert taught["after"] == parts["warm_start"]["after"]


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (Plan(steps=2), "taken 2 steps of 2 beside sft's 3: ask for more with --steps 102"),
        (Plan(seconds=165.0), "spent 180 s, sft's included, of 165: ask for more with --seconds 300"),
        (Plan(steps=3, seconds=181.0), None),
    ],
)
def test_a_run_with_nothing_left_is_told_what_counts_and_how_it_is_given_more(plan, told):
    stream = StringIO()
    say_where_done(plan, taken=5, taught=3, spent=180.4, stream=stream)
    assert stream.getvalue() == (f"nothing is left to train: the run has {told}\n" if told else "")


@pytest.mark.parametrize("last", [0, 2, 3, 4])
def test_a_run_that_was_stopped_in_either_part_takes_the_steps_of_one_that_never_was(straight, project, last):
    run = Run(project / "runs" / "stopped")
    shutil.copytree(straight[0].folder, run.folder)
    for step in run.checkpoints():  # as a kill would have left it
        if step > last:
            shutil.rmtree(run.checkpoint(step))
    told = run.manifest["warm_start"]
    run.describe({"status": "running", "warm_start": {"steps": told["steps"]} if last < 3 else told})
    resume("stopped")
    assert same(run, straight[0])
    assert run.manifest["status"] == "finished"
    assert optimizer_of(run, 3)["state"] == {}


def test_a_kill_between_the_last_example_and_its_record_is_made_good(straight, project):
    run = Run(project / "runs" / "killed")
    shutil.copytree(straight[0].folder, run.folder)
    for step in (4, 5):
        shutil.rmtree(run.checkpoint(step))
    shutil.copy(run.checkpoint(2) / "optimizer.pt", run.checkpoint(3))  # the optimizer was not reset yet
    run.describe({"status": "running", "warm_start": {"steps": 3}})
    resume("killed")
    assert same(run, straight[0])


def test_what_was_learned_is_kept_in_a_file_that_can_be_learned_again(straight, project):
    kept = straight[0].folder / "demonstrations.jsonl"
    assert len(kept.read_text().splitlines()) == 12
    train(replace(ASKED, plan=replace(PLAN, steps=0), warm_start=replace(LESSONS, source=str(kept))), "file")
    run = Run(project / "runs" / "file")
    assert same(run, straight[0], step=3)
    few = replace(LESSONS, source=str(kept), demonstrations=4)
    train(replace(ASKED, plan=replace(PLAN, steps=0), warm_start=few), "few")
    assert Run(project / "runs" / "few").manifest["warm_start"]["demonstrations"] == 4


def test_a_policy_may_learn_from_its_own_successes(project):
    lessons = replace(LESSONS, source="successes", demonstrations=6)
    asked = replace(ASKED, plan=replace(PLAN, steps=0, rollouts=4), warm_start=lessons)
    train(asked, "own")
    run = Run(project / "runs" / "own")
    told = run.manifest["warm_start"]
    assert told["asked"] == 6
    assert 1 <= told["demonstrations"] <= 6
    lines = [json.loads(line) for line in (run.folder / "demonstrations.jsonl").read_text().splitlines()]
    assert len({line["messages"][0]["content"] for line in lines}) == told["demonstrations"]


def test_nothing_to_imitate_is_told(project, tmp_path):
    place = tmp_path / "hard.py"
    place.write_text(
        "from dataclasses import replace\nfrom art_mcp.environment import load_environment\n"
        f"environment = replace(load_environment({ENVIRONMENT!r}), rewards={{'never': lambda trajectory: 0.0}})\n"
    )
    asked = replace(ASKED, setting=replace(SETTING, environment=str(place)), warm_start=replace(LESSONS, source="successes"))
    with pytest.raises(TrainError, match="none of 24 rollouts succeeded: there is nothing to imitate"):
        train(replace(asked, plan=replace(PLAN, steps=0)), "hopeless")


def test_a_file_that_holds_no_demonstrations_is_told(tmp_path):
    path = tmp_path / "some.jsonl"
    with pytest.raises(ConfigError, match=r"reading demonstrations from .*some\.jsonl: .*No such file"):
        read_file(path, offered=())
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no demonstrations"):
        read_file(path, offered=())
    path.write_text('\n{"messages": []}\n')
    with pytest.raises(ConfigError, match=r"some.jsonl, line 2, is no demonstration"):
        read_file(path, offered=())


def test_demonstrations_are_spread_evenly_over_the_levels_and_drawn_from_the_seed():
    from art_mcp.environment import load_environment

    scenarios = load_environment(ENVIRONMENT).split("train")
    first, again, other = (draw(scenarios, 10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [scenario.level for scenario in first].count(1) == 5
