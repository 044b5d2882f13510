"""What a doctor finds in models: made here with one fault each, and with real templates of other makers."""

import importlib.util
import json
import pickle
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from toys import make_model, save_toy

from art_mcp.core.bridging import PROBE
from art_mcp.core.reading import UnreadableError
from art_mcp.core.template import Unbridgeable
from art_mcp.local.doctor_model import admit, examine_model
from art_mcp.local.models import TINY, load_dialect, load_tokenizer
from art_mcp.types import ModelSpec, ToolCall

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else None
CONTROL = re.compile(
    r"<\|[^|>\s'\"]+\|?>|<[^|<>\s'\"]+\|>|<｜[^｜]+｜>|</?s>|<(?:start|end)_of_turn>|</?tool_call>|</?tool_response>|</?think>"
)


def with_template(folder: Path, source: str, end: str) -> Path:
    """A model folder that speaks by this template; its control tokens are tokens, and `end` ends a turn."""
    make_model(vocab_size=1024, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in sorted({*CONTROL.findall(source), end})])
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template = end, "<|bos|>", source
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def levels(folder: Path) -> dict[str, str]:
    """The worst level of what was said about each thing."""
    found: dict[str, str] = {}
    for finding in examine_model(admit(str(folder))):
        found[finding.about] = max(found.get(finding.about, "ok"), finding.level, key=["ok", "warning", "problem"].index)
    return found


IM_END, EOT = "<|im_end|>", "<|eot_id|>"
TEMPLATES = {
    "qwen2_5": (IM_END, "ok", "ok", "ok"),
    "qwen3_instruct_2507": (IM_END, "ok", "ok", "ok"),
    "qwen3": (IM_END, "ok", "warning", "ok"),  # it rewrites an earlier turn's empty thoughts
    "llama3_1": (EOT, "ok", "warning", "problem"),  # one call a turn; its calls are bare JSON with "parameters"
    "glm4moe": ("<|user|>", "ok", "ok", "problem"),  # calls in tags of their own
    "gptoss": ("<|return|>", "ok", "warning", "problem"),
    "qwen3_5_think": (IM_END, "ok", "warning", "ok"),
    "qwen3_5_nothink": (IM_END, "ok", "warning", "ok"),
    "qwen3_8": (IM_END, "ok", "ok", "ok"),
    "gemma4": ("<turn|>", "ok", "warning", "problem"),
    "lfm2_v2": (IM_END, "ok", "ok", "problem"),
    "nemotron_3_nano": (IM_END, "ok", "warning", "ok"),  # as Qwen3.5's, exact where every turn thinks
    "lfm2": (IM_END, "problem", "problem", None),  # knows of tools, and leaves out the calls
    "gemma": ("<end_of_turn>", "problem", "problem", None),  # knows of no tools
    "llama3": (EOT, "problem", "problem", None),
}
"""What ends a turn, and what is to be found of the template, of bridging and of the parser (None: there is no call to read)."""


@pytest.mark.skipif(FOLDER is None, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_are_known_for_what_they_are(tmp_path, name):
    end, *wanted = TEMPLATES[name]
    assert FOLDER is not None
    found = levels(with_template(tmp_path, (FOLDER / f"{name}.jinja").read_text(), end))
    assert [found["template"], found["bridging"], found.get("parser")] == wanted
    assert found["stop tokens"] == "ok"


@pytest.mark.skipif(FOLDER is None, reason="trl is not installed: its wheel brings the templates")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_is_loaded_only_if_the_doctor_finds_that_its_calls_are_bridged_and_read(tmp_path, name):
    end, _, bridging, parser = TEMPLATES[name]
    assert FOLDER is not None
    spec = ModelSpec(str(with_template(tmp_path, (FOLDER / f"{name}.jinja").read_text(), end)))
    if bridging == "problem":
        with pytest.raises(Unbridgeable):
            load_dialect(spec)
    elif parser == "problem":
        with pytest.raises(
            UnreadableError, match=r"(?s)(is not read back|that could be read): .*; calls in this model's form are"
        ) as refusal:
            load_dialect(spec)
        assert finding(tmp_path, "parser").remedy == refusal.value.remedy
    else:
        load_dialect(spec)


@pytest.mark.skipif(FOLDER is None, reason="trl is not installed: its wheel brings the templates")
def test_a_model_whose_calls_are_read_leniently_alone_is_refused_with_the_option_that_reads_them(tmp_path):
    assert FOLDER is not None
    folder = with_template(tmp_path, (FOLDER / "llama3_1.jinja").read_text(), EOT)
    with pytest.raises(UnreadableError, match=r'"parameters": .* add --lenient') as refusal:
        load_dialect(ModelSpec(str(folder)))
    again = pickle.loads(pickle.dumps(refusal.value))
    assert (str(again), again.remedy) == (str(refusal.value), refusal.value.remedy)
    dialect = load_dialect(ModelSpec(str(folder), lenient=True))
    _, calls = dialect.read_text('{"name": "look_up", "parameters": {"word": "egret"}}', [PROBE])
    assert [call.arguments for call in calls if isinstance(call, ToolCall)] == [{"word": "egret"}]


def finding(folder: Path, about: str):
    (found,) = [one for one in examine_model(admit(str(folder))) if one.about == about]
    return found


def changed(folder: Path, file: str, **values) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_the_shipped_policy_is_healthy():
    assert {found.level for found in examine_model(admit("tiny"))} == {"ok"}


def test_a_refusal_shows_the_conversation_that_does_not_bridge(tmp_path):
    folder = save_toy(tmp_path / "toy")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{- message.content }}", "{{- message.content | upper }}"))
    found = finding(folder, "bridging")
    assert found.level == "problem"
    assert "user → assistant → tool" in found.text
    assert '"content": "A bird, no. 0."}' in found.text


def test_tags_that_were_never_trained_are_found_with_what_mends_them(tmp_path):
    folder = save_toy(tmp_path / "toy", tie_word_embeddings=True)
    tags = load_tokenizer(str(TINY)).convert_tokens_to_ids(["<tool_call>", "</tool_call>", "<|box_start|>"])
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tags[:2]] = 1.1 * weights["model.embed_tokens.weight"][tags[2]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = [one for one in examine_model(admit(str(folder))) if one.about == "tag rows"]
    assert [(one.level, (one.facts or {})["tag"]) for one in found] == [("problem", "<tool_call>"), ("problem", "</tool_call>")]
    assert all(f"art-mcp prepare {folder} OUT" in one.remedy for one in found)
    assert finding(save_toy(tmp_path / "sound", tie_word_embeddings=True), "tag rows").level == "ok"


def test_weights_that_cannot_be_read_are_a_finding_among_the_others(tmp_path):
    folder = save_toy(tmp_path / "toy")
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0[]")
    found = finding(folder, "weights")
    assert (found.level, "its header is no JSON object" in found.text) == ("problem", True)
    assert finding(folder, "generation").level == "ok"


def test_tags_that_are_several_tokens_are_told(tmp_path):
    folder = save_toy(tmp_path / "toy")
    settings = json.loads((folder / "tokenizer.json").read_text())
    kept = [token for token in settings["added_tokens"] if "tool_call" not in token["content"]]
    vocabulary = {("§" + name if "tool_call>" in name else name): id for name, id in settings["model"]["vocab"].items()}
    settings |= {"added_tokens": kept, "model": settings["model"] | {"vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    found = finding(folder, "tags")
    assert found.level == "warning"
    assert "<tool_call> and </tool_call> are more than one token each" in found.text


def test_a_pad_token_that_ends_turns_too_is_told(tmp_path):
    folder = changed(save_toy(tmp_path / "toy"), "tokenizer_config.json", pad_token="<|im_end|>")
    found = finding(folder, "pad token")
    assert (found.level, found.text) == ("warning", "it is <|im_end|>, the end of a turn as well")
    assert finding(changed(folder, "tokenizer_config.json", pad_token=None), "pad token").text == "there is none"


def test_a_stop_token_that_is_not_the_templates_own_is_a_problem(tmp_path):
    folder = changed(save_toy(tmp_path / "toy"), "tokenizer_config.json", eos_token="<|box_start|>")
    (folder / "generation_config.json").unlink()
    found = finding(folder, "stop tokens")
    assert found.level == "problem"
    assert "ends a turn with '<|im_end|>', which is no stop token (<|box_start|> are)" in found.text


@pytest.mark.parametrize(
    ("config", "settings", "told"),
    [
        ({"top_p": 0.8, "repetition_penalty": 1.1}, {}, "repetition_penalty 1.1, top_p 0.8: left out here"),
        ({}, {"eos_token_id": 5}, r"ends turns with token \[710, 712\], config.json with \[5\]"),
    ],
)
def test_a_generation_config_that_wants_something_else_is_told(tmp_path, config, settings, told):
    folder = changed(save_toy(tmp_path / "toy"), "generation_config.json", **config)
    found = finding(changed(folder, "config.json", **settings), "generation")
    assert found.level == "warning"
    assert re.search(told, found.text)


def test_a_model_without_a_template_is_told_what_stands_in(tmp_path):
    folder = save_toy(tmp_path / "toy")
    (folder / "chat_template.jinja").unlink()
    assert finding(folder, "template").level == "warning"
