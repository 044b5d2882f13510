"""Checkpoints: whole or not there, and training goes on from one as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import draw_tokens, log_probs_of, save_toy

from art_mcp.errors import ArtMcpError, RunError
from art_mcp.local.checkpoints import (
    OPTIMIZER_FILE,
    STATE_FILE,
    load_checkpoint,
    save_checkpoint,
    write_weights,
    written_aside,
)
from art_mcp.local.models import load_model
from art_mcp.local.torch_trainer import TorchTrainer
from art_mcp.types import LoraSpec, ModelSpec, Sample, TrainConfig

CONFIG = TrainConfig(learning_rate=1e-3)


def make_sample(number, advantage):
    tokens = tuple(draw_tokens(20, seed=number))
    return Sample(tokens, (False,) * 8 + (True,) * 12, (0.0,) * 8 + (-2.0,) * 12, advantage)


BATCHES = [[make_sample(2 * step, 1.0), make_sample(2 * step + 1, -1.0)] for step in range(3)]


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy")


def open_trainer(source, *, lora=None, dtype="auto"):
    loaded = load_model(ModelSpec(source=str(source), lora=lora, dtype=dtype))
    return TorchTrainer(loaded.model), loaded


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4)])
def test_training_goes_on_from_a_checkpoint_to_the_last_bit(tmp_path, toy, lora):
    trainer, loaded = open_trainer(toy, lora=lora)
    for step in range(2):
        trainer.step(BATCHES[step], CONFIG, step=step)
    folder = tmp_path / "run" / "2"
    save_checkpoint(folder, trainer=trainer, tokenizer=loaded.tokenizer, step=2)
    assert (folder / "adapter_config.json").exists() == (lora is not None)

    torch.manual_seed(99)
    resumed, again = open_trainer(folder)
    assert load_checkpoint(folder, resumed) == 2
    assert all(map(torch.equal, weights_of(resumed), weights_of(trainer)))
    assert again.facts["lora"] == (None if lora is None else {"rank": 4, "alpha": 32})
    assert again.facts["trainable_parameters"] == loaded.facts["trainable_parameters"]
    assert trainer.step(BATCHES[2], CONFIG, step=2) == resumed.step(BATCHES[2], CONFIG, step=2)
    assert all(map(torch.equal, weights_of(resumed), weights_of(trainer)))


@pytest.mark.parametrize("lora", [None, LoraSpec(rank=4)])
def test_what_an_engine_gets_is_the_policy_as_the_checkpoint_has_it_and_no_optimizer(tmp_path, toy, lora):
    trainer, loaded = open_trainer(toy, lora=lora)
    trainer.step(BATCHES[0], CONFIG, step=0)
    write_weights(tmp_path / "published", trainer=trainer, tokenizer=loaded.tokenizer)
    save_checkpoint(tmp_path / "saved", trainer=trainer, tokenizer=loaded.tokenizer, step=1)
    name = "model.safetensors" if lora is None else "adapter_model.safetensors"
    assert (tmp_path / "published" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert not (tmp_path / "published" / OPTIMIZER_FILE).exists()


def test_an_adapter_is_published_as_peft_reads_it_in_the_precision_of_its_base(tmp_path, toy):
    trainer, loaded = open_trainer(toy, lora=LoraSpec(rank=4), dtype="bfloat16")
    trainer.step(BATCHES[0], CONFIG, step=0)
    write_weights(tmp_path / "published", trainer=trainer, tokenizer=loaded.tokenizer)
    save_checkpoint(tmp_path / "saved", trainer=trainer, tokenizer=loaded.tokenizer, step=1)
    read = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("published", "saved")]
    assert {weight.dtype for weight in read[1].values()} == {torch.float32}
    assert read[0].keys() == read[1].keys()
    assert all(torch.equal(read[0][name], weight.bfloat16()) for name, weight in read[1].items())
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("published", "saved")]
    assert configs[0] == configs[1]


def test_weights_that_find_something_in_their_way_are_a_clear_error(tmp_path, toy):
    trainer, loaded = open_trainer(toy)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"writing .*file"):
        write_weights(tmp_path / "file" / "1", trainer=trainer, tokenizer=loaded.tokenizer)


def test_weights_that_were_half_written_when_it_failed_are_removed(tmp_path, toy, monkeypatch):
    trainer, loaded = open_trainer(toy)

    def full(folder):
        assert (folder / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loaded.tokenizer, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left"):
        write_weights(tmp_path / "published", trainer=trainer, tokenizer=loaded.tokenizer)
    assert not (tmp_path / "published").exists()


def test_the_random_numbers_of_torch_go_on_too(tmp_path, toy):
    trainer, loaded = open_trainer(toy)
    save_checkpoint(tmp_path / "1", trainer=trainer, tokenizer=loaded.tokenizer, step=1)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_checkpoint(tmp_path / "1", trainer)
    assert torch.equal(torch.rand(3), wanted)


def test_a_checkpoint_is_a_model_folder_that_transformers_reads(tmp_path, toy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer, loaded = open_trainer(toy)
    trainer.step(BATCHES[0], CONFIG, step=9)
    save_checkpoint(tmp_path / "1", trainer=trainer, tokenizer=loaded.tokenizer, step=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    tokens = draw_tokens(9, seed=1)
    assert torch.equal(log_probs_of(model, tokens), log_probs_of(trainer.model, tokens))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "1")) == len(loaded.tokenizer)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path):
    with written_aside(tmp_path / "runs" / "7") as aside:
        (aside / "a").write_text("new")
        assert names(tmp_path / "runs") == [aside.name]
    assert names(tmp_path / "runs") == ["7"]
    assert (tmp_path / "runs" / "7" / "a").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("disk full"), RunError), (RuntimeError("disk full"), RunError), (KeyError("bug"), KeyError)]
)
def test_a_writer_that_fails_leaves_the_old_checkpoint_as_it_was(tmp_path, error, raised):
    folder = tmp_path / "7"
    with written_aside(folder) as aside:
        (aside / "a").write_text("old")

    def fail():
        with written_aside(folder) as aside:
            (aside / "a").write_text("half")
            raise error

    with pytest.raises(raised):
        fail()
    assert names(tmp_path) == ["7"]
    assert (folder / "a").read_text() == "old"
    with written_aside(folder) as aside:
        (aside / "b").write_text("new")
    assert names(tmp_path) == ["7"]
    assert names(folder) == ["b"]


def test_the_old_checkpoint_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = tmp_path / "7", Path.rename
    with written_aside(folder) as aside:
        (aside / "a").write_text("old")

    def refuse(path, target):
        if path.name.endswith(".new.tmp"):
            raise OSError("the disk went away")
        return rename(path, target)

    def replace():
        with written_aside(folder) as aside:
            (aside / "a").write_text("new")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match="the disk went away"):
        replace()
    assert names(tmp_path) == ["7"]
    assert (folder / "a").read_text() == "old"


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path, toy):
    trainer, loaded = open_trainer(toy)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"writing .*file/7"):
        save_checkpoint(tmp_path / "file" / "7", trainer=trainer, tokenizer=loaded.tokenizer, step=7)
    assert names(tmp_path) == ["file", "toy"]


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from art_mcp.errors import RunError
from art_mcp.local.checkpoints import written_aside
from art_mcp.local.models import model_source

folder, opener = Path(sys.argv[1]), sys.argv[2]
STEPS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}

def write_until(fatal):
    calls = 0

    def trap(event, arguments):
        nonlocal calls
        calls += event in STEPS
        if event in STEPS and calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(trap)
    with written_aside(folder) as aside:
        for name in "ab":
            (aside / name).write_text("new")
    os._exit(0)

def fail_to_save():
    try:
        with written_aside(folder) as aside:
            (aside / "a").write_text("half")
            raise OSError("disk full")
    except RunError:
        pass

def state():
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None

status, fatal, found = 1, 0, []
while status:
    shutil.rmtree(folder.parent)  # what is left over would cost the next child steps of its own
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / name).write_text("old")
    fatal += 1
    if not (child := os.fork()):
        write_until(fatal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    left = state()
    fail_to_save() if opener == "save" else model_source(str(folder))
    mended = state()
    if opener == "save":
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    shutil.rmtree(folder)
    model_source(str(folder))
    found.append((left, mended, state()))
print(json.dumps(found))
"""


@pytest.mark.parametrize("opener", ["save", "load"])
def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint_for_the_next_that_comes(tmp_path, opener):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    folder = tmp_path / "runs" / "[7]"
    folder.parent.mkdir()
    command = [sys.executable, "-c", KILLED, str(folder), opener]
    found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    old, new = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}
    assert len(found) > 12
    left, mended, after_removal = zip(*found, strict=True)
    assert [state for state in left if state not in (old, new, None)] == []
    assert left.count(None) == 1  # between two renames
    assert [state for state in mended if state not in (old, new)] == []
    assert (left[0], mended[0], left[-1], mended[-1]) == (old, old, new, new)
    assert [state for state in after_removal if state not in (old, None)] == []  # what is half removed never comes back
    assert names(tmp_path / "runs") == []


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "foreign", "stateless", "other model"])
def test_a_checkpoint_that_cannot_be_resumed_says_so(tmp_path, toy, damage):
    trainer, loaded = open_trainer(toy)
    trainer.step(BATCHES[0], CONFIG, step=0)
    folder = tmp_path / "1"
    save_checkpoint(folder, trainer=trainer, tokenizer=loaded.tokenizer, step=1)
    optimizer = folder / OPTIMIZER_FILE
    if damage == "missing":
        optimizer.unlink()
    elif damage == "empty":
        optimizer.write_bytes(b"")
    elif damage == "cut":
        os.truncate(optimizer, 5000)
    elif damage == "foreign":
        optimizer.write_bytes(b"hello, world")
    elif damage == "stateless":
        (folder / STATE_FILE).write_text(json.dumps({}))
    else:
        trainer, _ = open_trainer(toy, lora=LoraSpec(rank=4))
    with pytest.raises(ArtMcpError, match=r"resuming from .*1") as caught:
        load_checkpoint(folder, trainer)
    assert "\n" not in str(caught.value)
