"""Untrained tags are found by their rows, and mended in a copy that differs in those rows alone."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import make_model, save_toy

from art_mcp.errors import ModelError
from art_mcp.local.models import TINY, hash_weights, load_model, load_tokenizer
from art_mcp.local.prepare import RECORD, prepare, read_record, template_tags, untrained_tags
from art_mcp.local.rows import token_matrices
from art_mcp.types import LoraSpec, ModelSpec

TAGS = ["<tool_call>", "</tool_call>"]
INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def ids(*tokens):
    return load_tokenizer(str(TINY)).convert_tokens_to_ids(list(tokens))


def toy(folder, *, change=None, tied=False, **settings):
    """A random model whose weights `change` edited."""
    save_toy(folder, tie_word_embeddings=tied, **settings)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if change:
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def unused(*names, like="<|box_start|>", tags=TAGS, noise=1e-3):
    """Gives the tags' rows in these matrices the direction of an unused token's, but for rounding."""

    def change(weights):
        (source,) = ids(like)
        for name in names:
            for tag in ids(*tags):
                row = weights[name][source]
                weights[name][tag] = 1.1 * row + noise * row.norm() * torch.randn(len(row)) / len(row) ** 0.5

    return change


UNTRAINED = {
    "tied": ({"tied": True}, (INPUT,)),
    "both matrices": ({}, (INPUT, OUTPUT)),
    "output alone": ({}, (OUTPUT,)),
    "input alone": ({}, (INPUT,)),
}


@pytest.mark.parametrize("case", UNTRAINED)
def test_a_tag_whose_row_is_an_unused_tokens_was_never_trained(tmp_path, case):
    settings, names = UNTRAINED[case]
    found = untrained_tags(str(toy(tmp_path / "toy", change=unused(*names), **settings)))
    assert [one.tag for one in found] == TAGS
    assert [one.id for one in found] == ids(*TAGS)
    assert {one.like for one in found} <= {"<|box_start|>", *TAGS}
    assert all(0.999 < one.cosine <= 1 for one in found)


def test_trained_tags_are_left_alone(tmp_path):
    assert untrained_tags("tiny") == []
    for tied in (True, False):
        assert untrained_tags(str(toy(tmp_path / f"tied-{tied}", tied=tied))) == []
    near = toy(tmp_path / "near", change=unused(INPUT, OUTPUT, noise=0.2))  # as a tag after a few texts: cosine 0.98
    assert untrained_tags(str(near)) == []


def test_rows_beyond_the_vocabulary_are_unused_tokens_too(tmp_path):
    def change(weights):
        weights[INPUT][768:] = weights[INPUT][768] * torch.linspace(0.9, 1.1, 32)[:, None]
        weights[INPUT][ids(*TAGS)] = weights[INPUT][768] * 1.05

    folder = tmp_path / "toy"
    make = make_model(vocab_size=800, tie_word_embeddings=True)
    save_toy(folder)
    make.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert [one.tag for one in untrained_tags(str(folder))] == TAGS


def test_one_tag_alone_may_be_untrained_and_a_row_of_zeros_is(tmp_path):
    one = toy(tmp_path / "one", tied=True, change=unused(INPUT, tags=TAGS[1:]))
    assert [found.tag for found in untrained_tags(str(one))] == TAGS[1:]

    def zero(weights):
        weights[INPUT][ids("<tool_call>")] = 0.0

    (found,) = untrained_tags(str(toy(tmp_path / "zero", tied=True, change=zero)))
    assert (found.tag, found.cosine) == ("<tool_call>", 0.0)
    assert "zeros" in found.like


def test_where_all_rows_are_alike_nothing_can_be_told(tmp_path):
    def flatten(weights):
        weights[INPUT][:] = weights[INPUT][0] + 1e-3 * weights[INPUT]

    assert untrained_tags(str(toy(tmp_path / "toy", tied=True, change=flatten))) == []


def test_the_tags_are_those_single_tokens_that_the_template_writes():
    found = template_tags(load_tokenizer(str(TINY)))
    assert set(found.values()) == {"<|im_start|>", "<|im_end|>", *TAGS}
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert template_tags(tokenizer) == {}
    tokenizer.chat_template = "{{ raise_exception('no tools') }}"
    assert template_tags(tokenizer) == {}


def changed_rows(before: Path, after: Path):
    """(matrix, row) of every difference between two weight files of the same layout; the files are compared byte for byte."""
    old, new = before.read_bytes(), after.read_bytes()
    assert len(old) == len(new)
    weights = load_file(before), load_file(after)
    rows = {
        (name, row)
        for name, value in weights[0].items()
        for row in (value != weights[1][name]).reshape(value.shape[0], -1).any(dim=1).nonzero().flatten().tolist()
    }
    spans = {
        (m.start + row * m.row_bytes, m.row_bytes) for m in token_matrices(before.parent) for n, row in rows if n == m.name
    }
    outside = bytearray(old)
    for start, length in spans:
        outside[start : start + length] = new[start : start + length]
    assert bytes(outside) == new
    return rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_copy_differs_in_the_rows_of_the_tags_alone(tmp_path, tied, dtype):
    names = [INPUT] if tied else [INPUT, OUTPUT]
    folder = toy(tmp_path / "toy", tied=tied, change=unused(OUTPUT if not tied else INPUT))
    weights = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record = prepare(str(folder), tmp_path / "copy")
    rows = changed_rows(folder / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    assert rows == {(name, tag) for name in names for tag in ids(*TAGS)}
    assert untrained_tags(str(tmp_path / "copy")) == []
    others = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in others} == others
    assert record["matrices"] == sorted(names, reverse=True)
    assert json.loads((tmp_path / "copy" / RECORD).read_text()) == record == read_record(str(tmp_path / "copy"))
    assert record["source_sha256"] == hash_weights(str(folder))
    assert record["weights_sha256"] == hash_weights(str(tmp_path / "copy")) != record["source_sha256"]


def test_a_mended_row_is_the_mean_of_its_spelling_with_the_norm_of_an_ordinary_row(tmp_path):
    folder = toy(tmp_path / "toy", change=unused(INPUT, OUTPUT))
    record = prepare(str(folder), tmp_path / "copy")
    tokenizer = load_tokenizer(str(TINY))
    for tag in record["tags"]:
        assert tokenizer.decode(tag["pieces"]) == tag["tag"]
        assert tag["id"] not in tag["pieces"]
        for name in (INPUT, OUTPUT):
            before = load_file(folder / "model.safetensors")[name]
            row = load_file(tmp_path / "copy" / "model.safetensors")[name][tag["id"]]
            mean = before[tag["pieces"]].mean(dim=0)
            assert torch.cosine_similarity(row, mean, dim=0) > 0.99999
            assert row.norm() == pytest.approx(float(before.norm(dim=1).median()), rel=0.02)


def test_the_copy_is_a_model_that_loads_and_says_what_was_changed(tmp_path):
    folder = toy(tmp_path / "toy", tied=True, change=unused(INPUT))
    prepare(str(folder), tmp_path / "copy")
    old, new = (load_model(ModelSpec(source=str(place))).model for place in (folder, tmp_path / "copy"))
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        differences = (old(tokens).logits - new(tokens).logits).abs().amax(dim=(0, 1))
    assert differences.nonzero().flatten().tolist() == sorted(ids(*TAGS))
    adapter = load_model(ModelSpec(source=str(tmp_path / "copy"), lora=LoraSpec(rank=2)))
    adapter.model.save_pretrained(tmp_path / "adapter")
    adapter.tokenizer.save_pretrained(tmp_path / "adapter")
    assert read_record(str(tmp_path / "adapter")) == read_record(str(tmp_path / "copy"))
    assert read_record(str(folder)) is None
    assert untrained_tags(str(tmp_path / "adapter")) == []


def test_on_pythonpath_alone_where_the_package_has_no_metadata_it_is_prepared_and_a_doctor_says_so(tmp_path):
    folder = toy(tmp_path / "toy", tied=True, change=unused(INPUT))
    packages = tmp_path / "packages"
    packages.mkdir()
    for found in Path(sysconfig.get_path("purelib")).iterdir():
        if not found.name.startswith("art_mcp"):
            (packages / found.name).symlink_to(found)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(packages)])}

    def art(*args):
        command = [sys.executable, "-S", "-c", "from art_mcp.cli.main import main; main()", *args]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert art("--version") == "art-mcp (not installed)\n"
    assert "libraries: art-mcp itself is not installed" in art("doctor")
    art("prepare", str(folder), str(tmp_path / "copy"))
    assert read_record(str(tmp_path / "copy"))["made_by"] == "art-mcp (not installed)"


def test_weights_in_several_files_are_mended_where_they_lie(tmp_path):
    folder = toy(tmp_path / "toy", change=unused(INPUT, OUTPUT))
    loaded = load_model(ModelSpec(source=str(folder)))
    (folder / "model.safetensors").unlink()
    loaded.model.save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert [one.tag for one in untrained_tags(str(folder))] == TAGS
    prepare(str(folder), tmp_path / "copy")
    same = [name for name in shards if (folder / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()]
    assert len(shards) - len(same) in (1, 2)
    assert untrained_tags(str(tmp_path / "copy")) == []


def test_what_cannot_be_prepared_is_told(tmp_path):
    trained = toy(tmp_path / "trained")
    with pytest.raises(ModelError, match="needs no preparation: none of the tags that its template writes is untrained"):
        prepare(str(trained), tmp_path / "copy")
    with pytest.raises(ModelError, match="trained exists already: choose another place"):
        prepare(str(toy(tmp_path / "other", change=unused(OUTPUT))), trained)
    adapter = load_model(ModelSpec(source=str(trained), lora=LoraSpec(rank=2)))
    adapter.model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is an adapter: prepare its base .*trained"):
        prepare(str(tmp_path / "adapter"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_weights_without_plain_embeddings_are_told(tmp_path):
    folder = toy(tmp_path / "toy")
    weights = load_file(folder / "model.safetensors")
    weights.pop(INPUT)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no embedding matrix was found in its safetensors files"):
        prepare(str(folder), tmp_path / "copy")
    assert untrained_tags(str(folder)) == []
    (folder / "model.safetensors").write_bytes(b"\x05")
    with pytest.raises(ModelError, match=r"reading .*model\.safetensors"):
        untrained_tags(str(folder))
    with pytest.raises(ModelError, match=r"no model folder at \./nowhere"):
        untrained_tags("./nowhere")
