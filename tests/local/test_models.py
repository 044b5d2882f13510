"""Loading models: what is loaded is what is there, and what is not there is said in one line."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import CONTEXT, GROUPED, LEAN, make_model, save_toy

from art_mcp.errors import ModelError
from art_mcp.local.models import TINY, context_of, hash_weights, load_dialect, load_model, load_tokenizer, model_source
from art_mcp.types import LoraSpec, ModelSpec


@pytest.fixture
def folder(tmp_path):
    return save_toy(tmp_path / "toy")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_is_loaded_as_it_is(folder):
    loaded = load_model(ModelSpec(source=str(folder)))
    wanted = make_model(vocab_size=768).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.facts == {
        "source": str(folder),
        "architecture": "qwen2",
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "dtype": "float32",
        "quantization": None,
        "lora": None,
        "weights_sha256": hash_weights(str(folder)),
    }
    assert context_of(loaded.model) == CONTEXT


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_the_precision_is_the_one_asked_for(folder, name, dtype):
    loaded = load_model(ModelSpec(source=str(folder), dtype=name))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.facts["dtype"] == name


def test_tiny_is_the_policy_in_the_package():
    assert Path(model_source("tiny")) == TINY
    loaded = load_model(ModelSpec())
    assert loaded.facts["parameters"] < 2_000_000
    assert len(loaded.tokenizer) <= loaded.model.config.vocab_size


def test_adapters_are_drawn_from_the_seed_alone(folder):
    def drawn(seed):
        state = torch.get_rng_state()
        model = load_model(ModelSpec(source=str(folder), lora=LoraSpec(rank=4, alpha=8), seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        assert model.facts["lora"] == {"rank": 4, "alpha": 8}
        assert 0 < model.facts["trainable_parameters"] < model.facts["parameters"]
        return [value for name, value in model.model.state_dict().items() if "lora_A" in name]

    first, torch_seed = drawn(1), torch.initial_seed()
    assert all(map(torch.equal, first, drawn(1)))
    assert not any(map(torch.equal, first, drawn(2)))
    assert torch.initial_seed() == torch_seed


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 998\n"

DAMAGE = {
    "no config.json": (remove("config.json"), "is not a model folder: it has no config.json"),
    "no weights": (remove("model.safetensors"), r"has no weights: put \*\.safetensors there"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer: put tokenizer.json there"),
    "no tokenizer but its settings": (remove("tokenizer.json"), "has no tokenizer: put tokenizer.json there"),
    "weights cut short": (lambda folder: os.truncate(folder / "model.safetensors", 2000), "loading .*header"),
    "weights that git-lfs has not fetched": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is only a pointer of git-lfs to the file: fetch it with `git lfs pull`",
    ),
    "a tokenizer that git-lfs has not fetched": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is only a pointer of git-lfs",
    ),
    "broken settings": (lambda folder: (folder / "config.json").write_text("{"), "loading .*not a valid JSON file"),
    "no such architecture": (lambda folder: edit(folder / "config.json", model_type="nonesuch"), "loading .*nonesuch"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "loading the tokenizer of"),
    "settings of a deeper model": (
        lambda folder: edit(folder / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"lacks 12 of its weights, model\.layers\.2\.\S+ first",
    ),
    "settings of a wider model": (lambda folder: edit(folder / "config.json", intermediate_size=50), "loading .*mismatched"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(folder, damage):
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(ModelSpec(source=str(folder)))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere"])
def test_a_path_that_leads_nowhere_is_not_taken_for_a_hub_id(source):
    for load in (load_model, load_dialect):
        with pytest.raises(ModelError, match=f"no model folder at {source}"):
            load(ModelSpec(source=source))


def test_a_folder_that_is_no_model_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="is not a model folder"):
        load_tokenizer(str(tmp_path))


def test_an_architecture_without_token_prediction_is_refused(folder):
    edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(ModelError, match="loading"):
        load_model(ModelSpec(source=str(folder)))


def test_the_context_of_a_model_with_a_text_part_is_the_texts():
    settings = GROUPED | {"head_dim": 16, "vocab_size": 97}
    assert context_of(make_model(("Gemma3TextConfig", settings))) == CONTEXT
    assert context_of(make_model(LEAN["qwen3"], max_position_embeddings=77)) == 77


FROM_THE_HUB = """
import json, sys
from art_mcp.errors import ModelError
from art_mcp.local.models import load_model
from art_mcp.types import ModelSpec

facts = load_model(ModelSpec(source="somebody/toy")).facts
try:
    load_model(ModelSpec(source="somebody/else"))
except ModelError as error:
    facts["error"] = str(error)
print(json.dumps(facts))
"""


def prime_hub(hub, folder):
    """The cache that a download of somebody/toy leaves behind."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--somebody--toy"
    snapshot = repository / "snapshots" / commit
    for place in (repository / "refs", repository / "blobs", snapshot):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = repository / "blobs" / f"{file.name}-blob"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


def test_a_hub_id_is_read_from_the_cache_without_a_network(tmp_path, folder):
    prime_hub(tmp_path / "hub", folder)
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_HUB], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["architecture"] == "qwen2"
    assert facts["source"] == "somebody/toy"
    assert facts["error"].startswith("no folder somebody/else here, and none could be had from the hub: ")
    assert "\n" not in facts["error"]


MISSING = """
import sys
from art_mcp.errors import ModelError
from art_mcp.local.models import load_tokenizer
try:
    load_tokenizer("somebody/else")
except ModelError as error:
    print(error)
"""


def test_a_hub_that_is_not_there_is_asked_once_and_leaves_no_lines_of_its_client(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as place:
        hub = f"http://127.0.0.1:{place.getsockname()[1]}"
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": hub}
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment = kept | settings | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", MISSING], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"no folder somebody/else here, and none could be had from the hub: .*refused.*\n", done.stdout)
