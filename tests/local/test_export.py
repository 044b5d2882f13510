"""What is exported is loaded by others, and computes what was trained."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from toys import draw_tokens, save_toy

from art_mcp.errors import ModelError
from art_mcp.local import export as exporting
from art_mcp.local.export import export
from art_mcp.local.models import load_model, without_peft_noise
from art_mcp.types import LoraSpec, ModelSpec

TOKENS = torch.tensor([draw_tokens(30, seed="export")])


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


@pytest.fixture
def base(tmp_path):
    return save_toy(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    """A checkpoint of adapters that do something, and their logits."""
    loaded = load_model(ModelSpec(source=str(base), lora=LoraSpec(rank=4), seed=1))
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path / "checkpoint"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"much")
    return folder, logits(loaded.model)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_merged_model_is_loaded_by_plain_transformers_and_computes_the_same(tmp_path, base, adapter):
    folder, wanted = adapter
    told = export(str(folder), tmp_path / "out", adapter=False, dtype=None)
    assert (told.kind, told.base, told.dtype, told.prepared) == ("merged", str(base), "float32", None)
    found = logits(load(tmp_path / "out"))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert not torch.allclose(logits(load(base)), wanted, atol=0.1)
    assert told.rounding < 1e-4
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert not files & {"optimizer.pt", "adapter_config.json"}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer("<tool_call>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<tool_call>")]
    assert "tool_call" in tokenizer.chat_template


def test_half_precision_is_cast_after_the_merge_and_its_rounding_is_told(tmp_path, adapter):
    folder, wanted = adapter
    told = export(str(folder), tmp_path / "out", adapter=False, dtype="bfloat16")
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert 1e-4 < told.rounding < 0.1
    assert float((logits(load(tmp_path / "out")) - wanted).abs().max() / wanted.abs().max()) < 0.1


def test_an_adapter_is_loaded_by_plain_peft_on_its_base(tmp_path, base, adapter):
    folder, wanted = adapter
    told = export(str(folder), tmp_path / "out", adapter=True, dtype=None)
    assert (told.kind, told.rounding) == ("adapter", 0.0)
    with without_peft_noise():
        again = peft.PeftModel.from_pretrained(load(base), tmp_path / "out")
    assert torch.equal(logits(again), wanted)
    assert peft.PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == str(base)
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_all_weights_are_written_as_they_are_trained(tmp_path, base):
    told = export(str(base), tmp_path / "out", adapter=False, dtype=None)
    assert (told.kind, told.dtype, told.rounding) == ("full", "float32", 0.0)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(base)))


def test_what_cannot_be_exported_is_told_and_nothing_is_left(tmp_path, base, adapter):
    with pytest.raises(ModelError, match="holds all weights, and no adapter: leave out --adapter"):
        export(str(base), tmp_path / "out", adapter=True, dtype=None)
    with pytest.raises(ModelError, match="base exists already: choose another folder"):
        export(str(adapter[0]), base, adapter=False, dtype=None)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_computes_something_else_is_not_left_behind(tmp_path, adapter, monkeypatch):
    real = exporting.write_merged

    def broken(model, out, *, dtype):
        written = real(model, out, dtype=dtype)
        with torch.no_grad():
            next(written.parameters()).mul_(1.01)
        return written

    monkeypatch.setattr(exporting, "write_merged", broken)
    with pytest.raises(ModelError, match="computes something else: its logits differ by"):
        export(str(adapter[0]), tmp_path / "out", adapter=False, dtype=None)
    assert not (tmp_path / "out").exists()
