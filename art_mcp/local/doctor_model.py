"""What a model can do here, from its settings, tokenizer and template: its weights are not loaded, but for the rows of tags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from art_mcp.core.bridging import ANSWER, PROBE, QUESTION, Bridging, check_bridgeable
from art_mcp.core.reading import UnreadableError, find_parser
from art_mcp.core.template import ChatTemplate, Unbridgeable
from art_mcp.errors import ModelError, TemplateError, boundary
from art_mcp.local.doctor import Finding, ok, problem, warning
from art_mcp.local.models import adapter_base, load_tokenizer, make_template, model_source, stop_tokens
from art_mcp.local.prepare import CALL, RESULT, find_untrained
from art_mcp.local.rows import token_matrices
from art_mcp.local.unsloth_names import predict_replacement
from art_mcp.sampling.tokenizer import BackendTokenizer

SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
"""What is fetched of a model on the hub: everything but its weights."""
BENDING = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "typical_p": 1.0}
"""Settings of a generation config that change the distribution which is sampled from, and the values that leave it alone."""
FEATURES = {
    "text_with_calls": "text before a call",
    "parallel_calls": "several calls in one turn",
    "errors": "the answer to a malformed call",
    "follow_ups": "a user's next message",
    "without_thoughts": "a turn without a thought",
}


@dataclass(frozen=True, slots=True)
class Patient:
    """A model to be examined: its `folder` holds settings and tokenizer, and the weights where they are here."""

    source: str
    folder: Path
    tokenizer: Any
    template: ChatTemplate
    backend: BackendTokenizer


def admit(source: str) -> Patient:
    """Reads tokenizer and template of a model folder, an adapter or a hub id. Raises ModelError where there is no such model,
    and TemplateError for a template that is no valid one."""
    place = model_source(source)
    tokenizer = load_tokenizer(place)
    backend = BackendTokenizer(tokenizer)
    folder = settings_folder(adapter_base(source) or place)
    return Patient(source, folder, tokenizer, make_template(tokenizer, backend.specials), backend)


def settings_folder(place: str) -> Path:
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    with boundary(ModelError, f"fetching the settings of {place}", OSError, ValueError):
        return Path(snapshot_download(place, allow_patterns=list(SETTINGS)))


def read_json(path: Path) -> dict[str, Any]:
    """What a settings file says; nothing where there is none."""
    if not path.is_file():
        return {}
    with boundary(ModelError, f"reading {path}", OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def examine_model(patient: Patient) -> list[Finding]:
    """Every finding about a model but its memory, in the order in which they are told."""
    findings = [find_tools(patient), find_stops(patient), find_padding(patient), *find_bridging(patient.template)]
    if findings[0].level == "ok":
        findings.append(find_parsing(patient))
    return [*findings, *find_tags(patient), find_generation(patient), find_replacement(patient.source)]


def find_tools(patient: Patient) -> Finding:
    """Whether the template tells the model of its tools, and writes calls and results."""
    if not getattr(patient.tokenizer, "chat_template", None):
        text = "the model has no chat template, so Qwen2.5's stands in for it"
        return warning("template", text, "choose an instruct model, or teach this one by demonstrations first: art-mcp sft")
    return find_tool_text(patient.template)


def find_tool_text(template: ChatTemplate) -> Finding:
    remedy = "choose a model that was made for tools, or put a template that knows them into its chat_template.jinja"
    try:
        opening = template.prompt([QUESTION], [PROBE])
        whole = template.render([QUESTION, CALL, RESULT, ANSWER], tools=[PROBE])
    except TemplateError as error:
        return problem("template", f"it does not render a conversation with tools: {error}", remedy)
    if PROBE.name not in opening:
        return problem("template", "it leaves out the tools: the model would not know of them", remedy)
    for part, what in ((f"{RESULT['content']}", "results"), ("heron", "calls")):
        if part not in whole.replace(opening, "", 1):
            return problem("template", f"it leaves out the {what} of tools", remedy)
    return ok("template", "renders tools, calls and results")


def find_stops(patient: Patient) -> Finding:
    """The tokens that end a turn, among them the one with which the template itself ends one."""
    remedy = "name it as eos_token_id in generation_config.json"
    try:
        stops = stop_tokens(patient.tokenizer, str(patient.folder))
        ending = patient.template.ending(ANSWER)
    except (ModelError, TemplateError) as error:
        return problem("stop tokens", str(error), remedy)
    spelled = {patient.backend.decode([token]) for token in stops}
    named = ", ".join(sorted(spelled))
    if ending.stop not in spelled:
        text = f"the template ends a turn with {ending.stop!r}, which is no stop token ({named} are)"
        return problem("stop tokens", text, f"{remedy}: the model would not be stopped there")
    return ok("stop tokens", named, ids=sorted(stops))


def find_padding(patient: Patient) -> Finding:
    """Nothing here pads with the token, but Unsloth and other trainers do, and learn nothing from what is padding to them."""
    pad, eos = patient.tokenizer.pad_token, patient.tokenizer.eos_token
    remedy = "for Unsloth set pad_token in tokenizer_config.json to a token that no text uses; nothing else here needs one"
    if pad is None:
        return warning("pad token", "there is none", remedy)
    if pad == eos:
        return warning("pad token", f"it is {pad}, the end of a turn as well", remedy)
    return ok("pad token", f"{pad}, apart from the end of a turn")


def find_bridging(template: ChatTemplate) -> Iterator[Finding]:
    """What `register` asks: whether the turns of a conversation add up to its rendering; with the shortest one that do not."""
    try:
        bridging = check_bridgeable(template)
    except Unbridgeable as refusal:
        remedy = "the model is refused when it is loaded: choose another, or mend its chat_template.jinja there"
        yield problem("bridging", str(refusal), remedy)
        return
    yield ok("bridging", "calls, results and answers add up, turn by turn, to what the template renders")
    yield from find_inexact(bridging)


def find_inexact(bridging: Bridging) -> Iterator[Finding]:
    refusals = iter(bridging.refusals)
    for feature, named in FEATURES.items():
        if not getattr(bridging, feature):
            remedy = "training works; such turns read something near to what the template renders"
            yield warning("bridging", f"{named} is not exact: {next(refusals)}", remedy)


def find_parsing(patient: Patient) -> Finding:
    """Whether the parser reads what the template writes for a call."""
    try:
        find_parser(patient.template, patient.backend)
    except UnreadableError as unread:
        return problem("parser", unread.text, unread.remedy)
    return ok("parser", "reads back a call as the template writes it")


def find_tags(patient: Patient) -> Iterator[Finding]:
    """The tags around a call: single tokens, and with rows in the embedding that some text has trained."""
    tags = [tag for tag in ("<tool_call>", "</tool_call>") if tag in call_text(patient.template)]
    if not tags:
        return
    split = [tag for tag in tags if len(patient.backend.encode(tag)) != 1]
    if split:
        text = f"{' and '.join(split)} {'are' if len(split) > 1 else 'is'} more than one token each"
        remedy = "learnable, but slower: look whether its tokenizer.json has lost its added tokens (a GGUF's own often has)"
        yield warning("tags", text, remedy)
    else:
        yield ok("tags", f"{' and '.join(tags)} are single tokens")
    try:
        looked = bool(token_matrices(patient.folder))
        untrained = find_untrained(patient.folder, patient.tokenizer)
    except ModelError as error:
        yield problem("weights", str(error), "fetch them once more")
        return
    if not looked:
        yield warning("tag rows", "no embedding in safetensors files here, so it was not looked at", "fetch the weights first")
        return
    for one in untrained:
        text = f"{one.tag} (token {one.id}) was never trained: its row is that of {one.like}, cosine {one.cosine:.5f}"
        remedy = f"art-mcp prepare {patient.source} OUT, or train with --prepare"
        yield problem("tag rows", text, remedy, tag=one.tag, id=one.id, like=one.like, cosine=one.cosine)
    if not untrained:
        yield ok("tag rows", "the tags of a conversation have trained rows in the embedding")


def call_text(template: ChatTemplate) -> str:
    try:
        return template.render([QUESTION, CALL])
    except TemplateError:  # a template without calls is a finding of its own
        return ""


def find_generation(patient: Patient) -> Finding:
    """What a generation config asks for that cannot be had: the policy samples from the whole distribution."""
    config, settings = read_json(patient.folder / "generation_config.json"), read_json(patient.folder / "config.json")
    if not config:
        return ok("generation", "no generation_config.json: the tokenizer alone says what ends a turn")
    bent = {name: config[name] for name, idle in BENDING.items() if config.get(name) not in (None, idle)}
    ends, own = ids_of(config.get("eos_token_id")), ids_of(settings.get("eos_token_id"))
    if own and ends and not own & ends:
        text = f"generation_config.json ends turns with token {sorted(ends)}, config.json with {sorted(own)}"
        return warning("generation", text, "both are stop tokens only where generation_config.json lists both")
    if bent:
        named = ", ".join(f"{name} {value}" for name, value in bent.items())
        remedy = "whoever serves the trained model should leave them out too"
        return warning("generation", f"{named}: left out here, where the policy samples from its whole distribution", remedy)
    return ok("generation", "generation_config.json asks for nothing that bends the distribution")


def ids_of(value: Any) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {int(value)}


def find_replacement(source: str) -> Finding:
    """What Unsloth would load when it is asked for this model."""
    if source == "tiny" or Path(model_source(source)).is_dir():
        return ok("Unsloth", "would load this folder itself: folders are never replaced", replacement=None)
    try:
        plain, small = (predict_replacement(source, load_in_4bit=four) for four in (False, True))
    except ModelError as error:
        return ok("Unsloth", f"what it would load is not known: {error}")
    if plain != source:
        return warning("Unsloth", f"would load {plain} in its place", "exact_model=True refuses that", replacement=plain)
    return ok("Unsloth", f"would load this model itself; in 4 bits, {small}", replacement=plain, in_4bit=small)
