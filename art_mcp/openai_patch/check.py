"""Whether an endpoint can be trained through: all probes in turn, what each found in words, and the verdict."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio

from art_mcp.errors import ArtMcpError, describe
from art_mcp.openai_patch import probes
from art_mcp.openai_patch.desk import Desk, Missing, Wrong
from art_mcp.openai_patch.wire import MISSHAPEN, Contradictory, Unusable

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from art_mcp.ports import Tokenizer

Probe: TypeAlias = Callable[[Desk], Awaitable[str]]

PROBES: tuple[tuple[str, Probe, bool], ...] = (
    ("models", probes.models, False),
    ("chat", probes.chat, True),
    ("token ids", probes.token_ids, True),
    ("logprobs", probes.logprobs, True),
    ("usage", probes.usage, False),
    ("seed", probes.seed, False),
    ("max_tokens", probes.max_tokens, False),
    ("stop", probes.stop, False),
    ("n > 1", probes.several, False),
    ("streaming", probes.streaming, False),
    ("tools", probes.tools, False),
    ("streamed tools", probes.streamed_tools, False),
    ("parallel calls", probes.parallel, False),
    ("bridged", probes.bridged, False),
    ("pinned", probes.pinned, False),
    ("recorded", probes.recorded, True),
)
"""A line's name, what finds it out, and whether training needs it."""


WORDS = 240
"""Characters of what a probe found."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report. "no": not supported, and not claimed to be; "fails": it lies or breaks."""

    name: str
    verdict: Literal["yes", "no", "fails"]
    words: str
    needed: bool

    @property
    def stands_in_the_way(self) -> bool:
        return self.verdict == "fails" or (self.needed and self.verdict == "no")


async def examine(
    client: AsyncOpenAI,
    *,
    model: str = "",
    tokenizer: Tokenizer | None = None,
    seconds: float = 30.0,
    only: Collection[str] = (),
) -> AsyncGenerator[Finding]:
    """Each finding as soon as it is there; where the endpoint does not chat at all, nothing more is asked. `seconds` bounds
    each probe. Without `model` the first that is listed is asked; `tokenizer`: the model's own, to read token ids with.
    `only`: lines to find out, beside those that all others need."""
    desk = Desk(client.with_options(max_retries=0, timeout=seconds), model, tokenizer)
    for name, probe, needed in PROBES:
        if only and name not in (*only, "models", "chat"):
            continue
        finding = await find(desk, name, probe, needed=needed, seconds=seconds)
        yield finding
        if finding.stands_in_the_way and (name == "chat" or not desk.model):
            return


async def find(desk: Desk, name: str, probe: Probe, *, needed: bool, seconds: float) -> Finding:
    from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError

    verdict: Literal["no", "fails"] = "fails"
    try:
        with anyio.fail_after(seconds):
            return Finding(name, "yes", shortened(await probe(desk)), needed)
    except (Wrong, Contradictory, ArtMcpError) as error:
        words = str(error)
    except (Missing, Unusable) as error:
        verdict, words = "no", str(error)
    except (APITimeoutError, TimeoutError):
        words = f"no answer within {seconds:g} s"
    except APIStatusError as error:
        verdict = "fails" if error.status_code >= 500 else "no"
        words = f"the endpoint answers {error.status_code}: {describe(error)[:200]} {error.response.text[:100]}"
    except APIConnectionError as error:
        words = f"the connection fails: {describe(error.__cause__ or error)}"
    except APIError as error:
        words = f"the endpoint breaks off: {describe(error)[:200]}"
    except json.JSONDecodeError as error:
        words = f"the answer is not whole JSON: {error}"
    except MISSHAPEN as error:
        words = f"the answer is no chat completion: {type(error).__name__}: {describe(error)[:200]}"
    return Finding(name, verdict, shortened(words), needed)


def shortened(words: str) -> str:
    """One line, however much an endpoint had to say."""
    line = " ".join(words.split())
    return line if len(line) <= WORDS else f"{line[:WORDS]}…"


@asynccontextmanager
async def tiny_endpoint() -> AsyncGenerator[tuple[AsyncOpenAI, str, Any]]:
    """The packaged policy as an endpoint: a client of it, the model's name, and its tokenizer."""
    from art_mcp.local.backend import LocalBackend
    from art_mcp.local.models import load_tokenizer, model_source
    from art_mcp.model import TrainableModel
    from art_mcp.sampling.tokenizer import BackendTokenizer

    model = TrainableModel(name="tiny")
    async with LocalBackend(deterministic=True) as backend:
        await model.register(backend)
        async with model.openai_client() as client:
            yield client, model.name, BackendTokenizer(load_tokenizer(model_source("tiny")))
