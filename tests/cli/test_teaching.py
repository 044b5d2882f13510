"""sft, train --warm-start, --curriculum, prepare and export, through the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from art_mcp.local.models import TINY, load_tokenizer
from art_mcp.store.run import Run

ENVIRONMENT = str(Path(__file__).parents[1] / "wiring" / "calculator_here.py")
SHORT = ["--eval-n", "2", "--in-process"]
SHARE = r"\d\.\d+ \[\d\.\d+, \d\.\d+\]"


@pytest.fixture
def art(art, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return art


@pytest.mark.parametrize("command", ["sft", "train", "prepare", "export"])
def test_help_shows_an_example(art, command):
    code, out, _ = art(command, "--help")
    assert code == 0
    assert f"Example: art-mcp {command} " in " ".join(out.replace("│", " ").split())


def test_a_supervised_start_goes_on_with_rewards_and_is_exported(art, tmp_path):
    code, out, err = art("sft", ENVIRONMENT, "-d", "8", "--batch", "4", "--lora", "2", "--name", "start", *SHORT, "--json")
    assert code == 0, err
    assert out.startswith("runs/start: 2 steps in ")
    assert len(re.findall(rf"  level +1  n=1 +{SHARE} -> {SHARE}\n", out)) == 2
    report = json.loads(out.splitlines()[-1])
    assert report["warm_start"]["demonstrations"] == 8
    assert report["after"]["greedy"]["n"] == 2
    code, out, err = art("train", "--resume", "start", "--steps", "1", "--json")
    assert code == 0, err
    assert out.count(", 95 % interval: before -> after the warm start -> after training\n") == 2
    assert len(re.findall(rf"  level all  n=2 +{SHARE} -> {SHARE} -> {SHARE}\n", out)) == 2
    assert json.loads(out.splitlines()[-1])["steps"] == 3
    code, out, err = art("export", "start", "whole", "--json")
    assert code == 0, err
    assert out.startswith(f"whole: merged of {TINY} in bfloat16; logits differ by ")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"base_model: {json.dumps(str(TINY))}" in card
    assert "a LoRA adapter of rank 2; 8 demonstrations (solutions) in 2 steps; reinforcement learning of 1 step;" in card
    assert "| greedy | 2 |" in card
    assert "| greedy |" not in card_of(art, tmp_path, "start@2", "earlier", "--adapter")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_of_an_older_sft_that_goes_on_shows_what_it_recorded_and_a_dash_for_what_it_did_not(art, tmp_path, recorded):
    code, taught, err = art("sft", ENVIRONMENT, "-d", "8", "--batch", "4", "--lora", "2", "--name", "old", *SHORT, "--json")
    assert code == 0, err
    run = Run(tmp_path / "runs" / "old")
    told = run.manifest
    # it measured once, after everything, and an older train took the place of those figures by its own
    run.describe({"warm_start": {**told["warm_start"], "after": {}}, **({} if recorded else {"steps": 3})})
    code, out, err = art("train", "--resume", "old", "--steps", "1", "--json")
    assert code == 0, err
    assert out.count(", 95 % interval: before -> after the warm start -> after training\n") == 2
    middle = SHARE if recorded else "-"
    assert len(re.findall(rf"  level all  n=2 +{SHARE} -> {middle} -> {SHARE}\n", out)) == 2
    kept = json.loads(out.splitlines()[-1])["warm_start"]["after"]
    assert kept == (json.loads(taught.splitlines()[-1])["after"] if recorded else {})


def card_of(art, tmp_path, model, out, *options):
    assert art("export", model, out, *options)[0] == 0
    return (tmp_path / out / "README.md").read_text()


def test_a_run_with_a_warm_start_and_a_curriculum_shows_what_each_part_gave(art, tmp_path):
    shape = ["--groups", "2", "--rollouts", "2", "--steps", "1", "--temperature", "1.2", "--name", "both"]
    warm = ["--warm-start", "32", "--warm-epochs", "2"]
    code, out, err = art("train", ENVIRONMENT, *warm, "--curriculum", *shape, *SHORT, "--json")
    assert code == 0, err
    assert out.startswith("runs/both: 3 steps in ")
    assert len(re.findall(rf"  level all  n=2 +{SHARE} -> {SHARE} -> {SHARE}\n", out)) == 2
    run = Run(tmp_path / "runs" / "both")
    asked = run.manifest["training"]
    assert (asked["config"]["temperature"], asked["warm_start"]["epochs"]) == (1.2, 2.0)
    lines = run.read_metrics()
    assert [line.get("phase") for line in lines] == ["warm start", "warm start", None]
    assert sum(played for _, played in lines[2]["outcomes"].values()) == 4
    assert any(name.startswith("solved/level") for name in lines[2])


@pytest.mark.parametrize(("given", "meant"), [(["--target-kl", "1e-3"], 1e-3), (["--target-kl", "0"], None), ([], 5e-4)])
def test_how_far_a_step_may_go_is_an_option_and_0_is_any_distance(art, tmp_path, given, meant):
    assert art("train", ENVIRONMENT, "--steps", "0", "--name", "asked", *given, *SHORT)[0] == 0
    assert Run(tmp_path / "runs" / "asked").manifest["training"]["config"]["target_kl"] == meant


@pytest.mark.parametrize("given", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("option", ["--target-kl", "--lr", "--seconds", "--temperature"])
def test_a_number_that_is_not_finite_is_refused_before_anything_begins(art, tmp_path, option, given):
    code, _, err = art("train", ENVIRONMENT, option, given, "--name", "asked", *SHORT)
    assert code == 2
    assert f"Invalid value for '{option}'" in err
    assert not (tmp_path / "runs").exists()


def untrained(folder):
    """The packaged policy, but that <tool_call> has the row of a token that nobody uses."""
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    rows = load_tokenizer(str(folder)).convert_tokens_to_ids(["<tool_call>", "<|box_start|>"])
    weights["model.embed_tokens.weight"][rows[0]] = weights["model.embed_tokens.weight"][rows[1]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_is_refused_then_prepared_trained_and_exported_with_what_was_changed(art, tmp_path):
    untrained(tmp_path / "raw")
    train = ["sft", ENVIRONMENT, "-d", "4", "--lora", "2", "--eval-n", "0", "--in-process", "--name", "start", "--model"]
    code, out, err = art(*train, "raw")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: raw can hardly learn to write <tool_call>: .*`art-mcp prepare raw raw-prepared`.*\n", err)
    code, out, err = art("prepare", "raw", "raw-prepared", "--json")
    assert (code, err) == (0, "")
    assert re.match(r"<tool_call> \(token \d+\) was never trained: its row is that of <\|box_start\|>, cosine 1\.0+\n", out)
    assert json.loads(out.splitlines()[-1])["tags"][0]["tag"] == "<tool_call>"
    assert art(*train, "raw-prepared")[0] == 0
    card = card_of(art, tmp_path, "start", "adapter", "--adapter")
    assert "That base is a copy of `raw`" in card
    assert "The adapter needs that copy" in card
    assert (tmp_path / "adapter" / "art_mcp_prepared.json").is_file()
    code, out, err = art("prepare", "raw-prepared", "again")
    assert (code, out) == (2, "")
    assert "raw-prepared needs no preparation" in err


MISTAKES = {
    "no file": (["sft", ENVIRONMENT, "--from", "nowhere.jsonl"], r"reading demonstrations from nowhere\.jsonl"),
    "a bad line": (["sft", ENVIRONMENT, "--from", "bad.jsonl"], r"bad\.jsonl, line 1, is no demonstration"),
    "no tool of this name": (["sft", ENVIRONMENT, "--from", "wrong.jsonl"], "could not make: .*there is no tool .?.?nothing"),
    "warm start on a resume": (["train", "--resume", "x", "--warm-start", "3"], r"no run at runs/x|leave out --warm-start"),
    "epochs of nothing": (["train", ENVIRONMENT, "--warm-epochs", "3"], "--warm-epochs 3 .*name --warm-start N too"),
    "no such model": (["prepare", "./nowhere", "out"], r"no model folder at \./nowhere"),
    "an adapter that is none": (["export", "tiny", "out", "--adapter"], "tiny holds all weights, and no adapter"),
    "no such run": (["export", "runs/yours", "out"], "no run at runs/yours"),
}


@pytest.mark.parametrize(("args", "told"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_on_stderr_that_says_what_to_do(art, tmp_path, args, told):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "nothing", "arguments": {}}}]}
    messages = [{"role": "user", "content": "?"}, call, {"role": "tool", "content": ""}, {"role": "assistant", "content": "!"}]
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"messages": messages}))
    code, out, err = art(*args)
    assert not (tmp_path / "runs").exists()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(told, err), err
