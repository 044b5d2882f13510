"""An endpoint that is being checked: how it is asked, and what must agree in each of its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from art_mcp.openai_patch.wire import Choice, Draft, Read, checked_ids

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from art_mcp.ports import Tokenizer

NUMBERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}
WHAT = {
    "add": "Add two numbers.",
    "subtract": "Subtract b from a.",
    "multiply": "Multiply two numbers.",
    "divide": "Divide a by b.",
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": NUMBERS}} for name, text in WHAT.items()
]
FORCED = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 256}
QUESTION: Any = {"role": "user", "content": "What is the sum of 19 and 98?"}
SPECIAL = re.compile(r"\s*<[^<>\s]+>\s*")
TRIES = 8
"""How often a model is asked that may or may not do what is looked for."""


class Missing(Exception):
    """What the endpoint does not do, and does not claim to."""


class Wrong(Exception):
    """What the endpoint does otherwise than it says."""


@dataclass
class Desk:
    """An endpoint that is being checked, and what was learned of it: `spellings`, the text of each token id that was seen;
    `calling`, how it is brought to calling a tool."""

    client: AsyncOpenAI
    model: str = ""
    tokenizer: Tokenizer | None = None
    spellings: dict[int, str] = field(default_factory=dict[int, str])
    calling: dict[str, Any] = field(default_factory=lambda: {"tools": TOOLS})

    async def create(self, **body: Any) -> Any:
        """What the client makes of an answer that comes with token ids and logprobs."""
        asked = {"model": self.model, "messages": [QUESTION], "max_tokens": 48, "temperature": 1.0, "seed": 1, **body}
        create: Any = self.client.chat.completions.create
        return await create(**asked, logprobs=True, extra_body={"return_token_ids": True})

    async def ask(self, **body: Any) -> Read:
        """An answer, whole, as JSON."""
        answer = await self.create(**body)
        if isinstance(answer, str):
            raise Wrong(f"the answer is no JSON object: {answer[:60]!r}")
        return answer.model_dump()

    async def read(self, **body: Any) -> tuple[tuple[int, ...], list[Choice]]:
        """The prompt's token ids and the choices of an answer, each examined."""
        answer = await self.ask(**body)
        return checked_ids(answer.get("prompt_token_ids")), [self.examined(choice) for choice in answer["choices"]]

    def examined(self, raw: Read) -> Choice:
        """A choice whose ids, logprobs and text agree. Raises Wrong where they do not, Unusable where they are not there."""
        draft = Draft()
        draft.add(raw)
        choice = draft.whole()
        if max(choice.logprobs) > 1e-6:
            raise Wrong(f"a logprob is {max(choice.logprobs):g}, more than 0")
        spelled = [str(entry["token"]) for entry in raw["logprobs"]["content"]]
        for token, text in zip(choice.token_ids, spelled, strict=True):
            known = self.spellings.setdefault(token, text)
            if known != text:
                raise Wrong(f"token id {token} stands for {known!r} and for {text!r}")
        if self.tokenizer is not None:
            compare([self.tokenizer.decode([token]) for token in choice.token_ids], choice, "the token ids decode to")
        compare(spelled, choice, "the tokens of the logprobs spell")
        return choice


def compare(tokens: Sequence[str], choice: Choice, what: str) -> None:
    """Raises Wrong where a message with text alone does not say what its tokens do; vLLM leaves special ones out of it."""
    said, text = str(choice.message["content"]), "".join(tokens)
    if set(choice.message) > {"role", "content"} or "\N{REPLACEMENT CHARACTER}" in text:
        return
    plain = "".join(token for token in tokens if not SPECIAL.fullmatch(token))
    after_thought = text.partition("</think>")[2]  # a thought without words is in no message
    if not any(whole.strip().startswith(said.strip()) for whole in (text, plain, after_thought)):
        raise Wrong(f"{what} {text[:60]!r}, and the message says {said[:60]!r}")
