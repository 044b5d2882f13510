"""Rollouts over Qwen3's own template, which writes an empty thought into the last turn and leaves it out of the others."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from art_mcp.agent.rollout import rollout
from art_mcp.local.models import TINY, load_dialect, load_tokenizer
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.sampling.tokenizer import BackendTokenizer
from art_mcp.types import Limits, ModelSpec, Scenario, StopReason
from tests.agent.players import calls, desk_tools

TRL = importlib.util.find_spec("trl")
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(TRL is None, reason="trl is not installed: its wheel brings the templates"),
]

ADD, AGAIN, BROKEN = calls(("add", {"a": 2, "b": 3})), calls(("add", {"a": 5, "b": -1})), "<tool_call>\n{broken\n</tool_call>"
SAID = [ADD, f"Let me see.\n{ADD}\n{AGAIN}", BROKEN, "The sum is 4."]
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture
def folder(tmp_path):
    assert TRL is not None
    assert TRL.origin is not None
    shutil.copytree(TINY, tmp_path / "qwen3")
    shutil.copy(Path(TRL.origin).parent / "chat_templates" / "qwen3.jinja", tmp_path / "qwen3" / "chat_template.jinja")
    return str(tmp_path / "qwen3")


async def play(folder, turns):
    """The trajectory, the texts of its spans, and what transformers renders of its messages."""
    dialect, hugging_face = load_dialect(ModelSpec(folder)), load_tokenizer(folder)
    tokenizer = BackendTokenizer(hugging_face)
    sampler = ScriptedSampler([tokenizer.encode(f"{turn}<|im_end|>") for turn in turns])
    async with desk_tools() as toolbox:
        played = await rollout(Scenario("one", "2 + 3?"), sampler=sampler, dialect=dialect, toolbox=toolbox, limits=Limits())
        schemas = [tool.schema() for tool in toolbox.tools]
        rendered = hugging_face.apply_chat_template(
            [dict(message) for message in played.messages], tools=schemas, tokenize=False
        )
    assert sampler.prompts[-1] == played.token_ids[: len(sampler.prompts[-1])]
    return played, [tokenizer.decode(span.token_ids) for span in played.spans], rendered


async def test_where_every_turn_thinks_the_spans_are_what_the_template_renders(folder):
    played, spans, rendered = await play(folder, [f"<think>\nStep {at}.\n</think>\n\n{said}" for at, said in enumerate(SAID)])
    assert (played.stop_reason, played.answer, len(played.uses)) == (StopReason.ANSWERED, "The sum is 4.", 4)
    assert "".join(spans) + "\n" == rendered
    assert [message["reasoning_content"] for message in played.messages if message["role"] == "assistant"] == [
        f"Step {at}." for at in range(4)
    ]


@pytest.mark.parametrize(
    "thoughts", [["", "", "", ""], [EMPTY] * 4, ["<think>\nHm.\n</think>\n\n", "", EMPTY, "<think>Ho</think>"]]
)
async def test_a_turn_without_a_thought_stays_as_it_was_sampled_between_the_same_bridges(folder, thoughts):
    _, thinking, _ = await play(folder, [f"<think>\nHm.\n</think>\n\n{said}" for said in SAID])
    turns = [thought + said for thought, said in zip(thoughts, SAID, strict=True)]
    played, spans, rendered = await play(folder, turns)
    assert (played.stop_reason, played.answer, played.malformed) == (StopReason.ANSWERED, "The sum is 4.", 1)
    sampled = iter(f"{turn}<|im_end|>" for turn in turns)
    told = [text if span.logprobs is None else next(sampled) for text, span in zip(thinking, played.spans, strict=True)]
    assert spans == told
    assert "".join(spans) + "\n" != rendered
