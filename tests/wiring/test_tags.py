"""A run does not begin with a model that cannot learn to write its tags, unless it may mend it."""

import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import anyio
import pytest
from safetensors.torch import load_file, save_file

from art_mcp.agent.imitation import Lessons
from art_mcp.agent.loop import Plan
from art_mcp.errors import ModelError
from art_mcp.local.models import load_tokenizer
from art_mcp.store.run import Run
from art_mcp.types import TrainConfig
from art_mcp.wiring import training
from art_mcp.wiring.stage import Setting
from art_mcp.wiring.tags import check_tags

sys.path.append(str(Path(__file__).parents[1] / "sampling"))
from toys import save_toy

ENVIRONMENT = str(Path(__file__).parent / "calculator_here.py")


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """A toy in which <tool_call> has the row of a token that nobody uses; the user's cache is empty."""
    folder = save_toy(tmp_path / "toy", tie_word_embeddings=True, max_position_embeddings=2048)
    weights = load_file(folder / "model.safetensors")
    rows = load_tokenizer(str(folder)).convert_tokens_to_ids(["<tool_call>", "<|box_start|>"])
    weights["model.embed_tokens.weight"][rows[0]] = weights["model.embed_tokens.weight"][rows[1]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def train(asked):
    return anyio.run(lambda: training.train(asked, name="run", stream=StringIO()))


def asked_of(folder, **fields):
    setting = Setting(ENVIRONMENT, model=str(folder), lora=2, in_process=True)
    lessons = Lessons(demonstrations=4, batch=2)
    return training.Training(setting, Plan(steps=0), TrainConfig(), eval_n=0, warm_start=lessons, **fields)


def test_training_refuses_a_model_with_untrained_tags_and_names_the_command(untrained, tmp_path):
    with pytest.raises(ModelError) as refused:
        train(asked_of(untrained))
    told = str(refused.value)
    assert "can hardly learn to write <tool_call>: in its embedding" in told
    assert f"`art-mcp prepare {untrained} toy-prepared`" in told
    assert "--prepare" in told
    assert not (tmp_path / "runs").exists()


def test_a_run_that_may_mend_its_model_learns_on_a_copy_and_says_what_was_changed(untrained, tmp_path):
    before = (untrained / "model.safetensors").read_bytes()
    train(asked_of(untrained, prepare=True))
    (copy,) = (tmp_path / "cache" / "art_mcp" / "prepared").iterdir()
    assert (untrained / "model.safetensors").read_bytes() == before
    manifest = Run(tmp_path / "runs" / "run").manifest
    assert manifest["training"]["setting"]["model"] == str(copy)
    told = manifest["model"]["prepared"]
    assert told["source"] == str(untrained)
    assert [tag["tag"] for tag in told["tags"]] == ["<tool_call>"]
    written = (copy / "model.safetensors").stat().st_mtime_ns
    assert check_tags(Setting(ENVIRONMENT, model=str(untrained)), prepare=True).model == str(copy)
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    assert check_tags(Setting(ENVIRONMENT, model="runs/run"), prepare=False).model == "runs/run"


def test_a_trained_model_is_what_it_was(untrained, tmp_path):
    setting = Setting(ENVIRONMENT)
    assert check_tags(setting, prepare=True) is setting
    whole = replace(setting, model=str(save_toy(tmp_path / "whole")))
    assert check_tags(whole, prepare=True) is whole
    assert not (tmp_path / "cache").exists()
