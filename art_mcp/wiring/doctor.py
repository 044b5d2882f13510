"""A doctor's visit: the machine, then a model, then a model in an environment; each finding as soon as it is made."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from art_mcp.agent.rollout import opening_of
from art_mcp.environment import Environment, load_environment
from art_mcp.errors import ConfigError, ModelError, TemplateError, ToolServerError
from art_mcp.local.doctor import Finding, ok, problem, size, warning
from art_mcp.store.versions import installed
from art_mcp.types import ModelSpec, Trajectory
from art_mcp.wiring.stage import find_model, told_unseen

if TYPE_CHECKING:
    from art_mcp.local.doctor_memory import Estimate, Load
    from art_mcp.local.doctor_model import Patient
    from art_mcp.local.shape import Shape
    from art_mcp.ports import Dialect, Toolboxes

RANK = 16
"""Of the adapters that are reckoned beside full training, where none is asked for."""
PLAYED = 4
"""Scenarios whose reference solutions tell how long conversations are."""
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Visit:
    """What is to be examined. `tokens`: of a conversation, where no environment tells; `lora`: the rank of adapters."""

    model: str | None = None
    environment: str | None = None
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    config: str = "config.json"
    lora: int | None = None
    groups: int = 16
    rollouts: int = 8
    tokens: int | None = None


async def examine(visit: Visit, tell: Tell) -> AsyncIterator[Finding]:
    """Every finding in its order; `tell` hears of what takes its time. Raises ModelError and EnvironmentLoadError for names
    that lead nowhere, ConfigError for a broken config file."""
    environment = None if visit.environment is None else load_environment(visit.environment, **visit.options)
    source = None if visit.model is None else find_model(visit.model)
    from art_mcp.local.doctor_machine import ask_gpus, examine_machine

    gpus = ask_gpus()
    for finding in [*examine_machine(gpus), find_node()]:
        yield finding
    if source is None or not (installed("torch") and installed("transformers")):  # what is missing has been told
        return
    tell("loading torch and the tokenizer")
    from art_mcp.local.doctor_model import admit, examine_model

    try:
        patient = admit(source)
    except TemplateError as error:
        yield problem("template", str(error), "mend chat_template.jinja in the model's folder")
        return
    for finding in examine_model(patient):
        yield finding
    load = None
    if environment is not None:
        tell("starting the environment's servers")
        findings, load = await examine_environment(visit, environment, patient)
        for finding in findings:
            yield finding
    for finding in find_memory(visit, patient, load, gpu=bool(gpus)):
        yield finding


def find_node() -> Finding:
    """Whether `art-mcp inspect` would find a node for the MCP Inspector."""
    from art_mcp.wiring.inspector import find_inspector, version_of

    try:
        node = find_inspector(Path("config.json"), None, port=6274).argv[0]
        return ok("Inspector", f"art-mcp inspect finds a node or npx for it: {node}, {'.'.join(map(str, version_of(node)))}")
    except ConfigError as error:
        return warning("Inspector", str(error), "only art-mcp inspect needs it")


async def examine_environment(visit: Visit, environment: Environment, patient: Patient) -> tuple[list[Finding], Load | None]:
    """Its servers and its opening; and how long its conversations are, where a reference solution tells."""
    from art_mcp.local.doctor_model import read_json
    from art_mcp.local.models import load_dialect
    from art_mcp.local.shape import context_of
    from art_mcp.tools import open_servers

    try:
        async with open_servers(environment, config=visit.config) as toolbox:
            names = ", ".join(tool.name for tool in toolbox.tools)
            served = [ok("servers", f"all start; {len(toolbox.tools)} tools are offered: {names}")]
            if unseen := told_unseen(patient.source, toolbox):
                remedy = f"teach it first, by art-mcp sft {visit.environment}, or choose a model that was made for tools"
                served.append(warning("tools", unseen, remedy))
            try:
                dialect = load_dialect(ModelSpec(source=patient.source, lenient=True))
            except (ModelError, TemplateError):  # a finding of its own, made before
                return served, None
            context = context_of(read_json(patient.folder / "config.json"))
            opening = find_opening(environment, dialect, toolbox, context=context)
            if opening.level == "problem" or environment.solution is None:
                return [*served, opening], None
            return [*served, opening], await measure_conversations(visit, environment, dialect, toolbox=toolbox)
    except ToolServerError as error:
        return [problem("servers", str(error), "look at it alone: art-mcp tools SERVER")], None


def find_opening(environment: Environment, dialect: Dialect, toolbox: Toolboxes, *, context: int) -> Finding:
    """The longest of some openings against the context and the limits of a rollout."""
    scenarios = environment.split(environment.splits[0])[:PLAYED]
    length = max(sum(map(len, open_with(environment, dialect, toolbox, prompt=one.prompt))) for one in scenarios)
    limits = environment.limits
    room = min(context, limits.tokens) - length
    text = f"{length} tokens of a context of {context}; a conversation may have {min(limits.tokens, context)}"
    if room <= 0:
        return problem("opening", text, "offer fewer tools, shorten their descriptions, or raise Limits.tokens", tokens=length)
    if room < limits.turn_tokens:
        remedy = "offer fewer tools or shorten their descriptions: not even one whole turn fits"
        return warning("opening", f"{text}; a turn {limits.turn_tokens}", remedy, tokens=length)
    return ok("opening", text, tokens=length)


def open_with(environment: Environment, dialect: Dialect, toolbox: Toolboxes, *, prompt: str) -> tuple[list[int], list[int]]:
    return dialect.opening(opening_of(prompt, environment.system), toolbox.tools)


async def measure_conversations(visit: Visit, environment: Environment, dialect: Dialect, *, toolbox: Toolboxes) -> Load:
    """A step's conversations, each as long as the longest of some reference solutions."""
    from art_mcp.agent.check import play_script, reference
    from art_mcp.agent.lending import toolbox_for
    from art_mcp.local.doctor_memory import Load
    from art_mcp.sampling.scripted import ScriptedSampler

    played: list[Trajectory] = []
    for scenario in environment.split(environment.splits[0])[:PLAYED]:
        async with toolbox_for(scenario, environment=environment, toolbox=toolbox) as lent:
            scored = await play_script(
                reference(environment),
                scenario,
                environment=environment,
                dialect=dialect,
                toolbox=lent,
                play=ScriptedSampler,
            )
        played.append(scored.trajectory)
    longest = max(played, key=lambda one: len(one.token_ids))
    said = [len(span.token_ids) for span in longest.spans if span.logprobs is not None]
    prompt = longest.scenario.prompt if longest.scenario else ""
    shared, rest = map(len, open_with(environment, dialect, toolbox, prompt=prompt))
    added = len(longest.token_ids) - shared - rest - sum(said)
    return Load(
        groups=visit.groups,
        rollouts=visit.rollouts,
        shared=shared,
        question=rest,
        turns=len(said),
        sampled=math.ceil(sum(said) / len(said)),
        added=math.ceil(added / max(1, len(said) - 1)),
    )


def find_memory(visit: Visit, patient: Patient, load: Load | None, *, gpu: bool) -> Iterator[Finding]:
    """What sampling and training would take, of all weights and of adapters, beside what is free."""
    from art_mcp.local.doctor_memory import Load, conversation_within, estimate
    from art_mcp.local.doctor_model import read_json
    from art_mcp.local.headers import count_parameters
    from art_mcp.local.machine_memory import read_memory
    from art_mcp.local.shape import shape_of

    config = read_json(patient.folder / "config.json")
    try:
        shape = shape_of(config, count_parameters(patient.folder, tied=bool(config.get("tie_word_embeddings", True))))
        asked = replace(load or Load(), groups=visit.groups, rollouts=visit.rollouts)
        if visit.tokens is not None or load is None:
            asked = conversation_within(shape, asked, visit.tokens or asked.length)
    except ModelError as error:
        yield warning("memory needed", str(error), "try a small batch, and watch it")
        return
    file_bytes = sum(file.stat().st_size for file in patient.folder.glob("*.safetensors"))
    usable = read_memory().usable
    ways: Sequence[int | None] = (None, RANK) if visit.lora is None else (visit.lora,)
    reckoned = {rank: estimate(shape, asked, lora=rank, file_bytes=file_bytes) for rank in ways}
    fits = [rank for rank, one in reckoned.items() if one.process <= usable]
    yield ok("batch", told_load(asked), parameters=shape.parameters, exact=shape.exact)
    if gpu:
        kept = " or ".join(f"{size(shape.kept_on_gpu(rank))} for {told_way(rank)}" for rank in ways)
        text = f"on a GPU only what training keeps is reckoned, {kept}, and no activations; on the CPU it would be:"
        yield warning("memory needed", text, "try a small batch, and watch it")
    for rank, one in reckoned.items():
        found = judge(shape, one, rank=rank, usable=usable, others=[other for other in fits if other != rank])
        yield replace(found, level="warning") if found.level == "problem" and gpu else found


def told_load(load: Load) -> str:
    return (
        f"{load.groups} scenarios × {load.rollouts} rollouts of {load.length} tokens: {load.shared} shared, a question of "
        f"{load.question}, {load.turns} turns of {load.sampled}, {load.added} between two"
    )


def told_way(rank: int | None) -> str:
    return "full training" if rank is None else f"LoRA {rank}"


def judge(shape: Shape, one: Estimate, *, rank: int | None, usable: int, others: Sequence[int | None]) -> Finding:
    about = told_way(rank)
    rough = "" if shape.exact else f" (roughly: {shape.architecture} models are reckoned as if they were Llamas)"
    text = (
        f"about {size(one.process)} on the CPU, at most {size(one.worst)}, of {size(usable)} free{rough}: weights "
        f"{size(one.weights)}, gradients {size(one.gradients)}, AdamW {size(one.optimizer)}, "
        f"activations {size(one.activations)}, logits {size(one.logits)}, "
        f"kept keys and values {size(one.cache)}; sampling alone {size(one.sampling)}"
    )
    facts = one.to_json()
    if one.process > usable:
        if others:
            how = "train adapters: --lora 16" if rank is None else "train all weights, which takes less here"
            return warning(about, text, how, **facts)
        return problem(about, text, "have fewer groups or rollouts, shorter conversations, or a smaller model", **facts)
    if one.worst > usable:
        return warning(about, text, "close other programs, or have fewer rollouts", **facts)
    return ok(about, text, **facts)
