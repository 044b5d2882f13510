"""The conversations that an endpoint has sampled, so that the next turn follows exactly the tokens that were; bounded."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from art_mcp.errors import TemplateError
from art_mcp.ports import Dialect
from art_mcp.serve.messages import Key
from art_mcp.types import Message, Tool

COUNT, TOKENS = 8192, 2**24
"""How many conversations are kept, and how many tokens of them all together (64 MiB)."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy reads. `bridged`: it goes on from sampled tokens, and nothing was rendered again. `shared` leading tokens
    are the same in every conversation with these tools."""

    token_ids: tuple[int, ...]
    shared: int
    bridged: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """All tokens up to the end of a sampled turn; `reply` is that turn with the dialect's ids, `ids` are those by the ones
    that the client has."""

    token_ids: array[int]
    shared: int
    reply: Message
    ids: Mapping[str, str]


class Conversations:
    """The finished conversations of one model, under whatever policy their turns were sampled; the one used longest ago goes
    first."""

    def __init__(self, *, count: int = COUNT, tokens: int = TOKENS) -> None:
        self._count, self._most_tokens = count, tokens
        self._kept: OrderedDict[bytes, Conversation] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool], *, dialect: Dialect) -> Prompt:
        """The tokens before the next turn: those of the conversation that the messages extend, and a bridge; or, where they
        extend none, a rendering of them all. Raises TemplateError where the template refuses them."""
        bridged = self._bridged(messages, tools, dialect)
        if bridged is not None:
            return bridged
        shared, rest = dialect.opening(messages, tools)
        return Prompt((*shared, *rest), len(shared), bridged=False)

    def _bridged(self, messages: Sequence[Message], tools: Sequence[Tool], dialect: Dialect) -> Prompt | None:
        last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        following = messages[last + 1 :]
        if last < 0 or not following or any(message["role"] not in ("user", "tool") for message in following):
            return None
        earlier = self._find(Key(tools, messages[:last]).after(messages[last]))
        if earlier is None:
            return None
        own = [with_id(message, earlier.ids) for message in following]
        try:
            bridge = dialect.bridge(earlier.reply, own, earlier.token_ids[-1])
        except TemplateError:  # rendered afresh, where the template says what is wrong if it is wrong there too
            return None
        return Prompt((*earlier.token_ids, *bridge), earlier.shared, bridged=True)

    def remember(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, prompt: Prompt, turn: Sequence[int], reply: Message
    ) -> Message:
        """Keeps the conversation that ends with `reply`, the dialect's reading of `turn`; returns it as the client gets it,
        with ids that no other conversation has."""
        whole = array("I", prompt.token_ids)
        whole.extend(turn)
        calls: Sequence[dict[str, Any]] = reply.get("tool_calls") or ()
        own = [name_call(whole, index) for index in range(len(calls))]
        named = [{**call, "id": id} for call, id in zip(calls, own, strict=True)]
        shown: Message = {**reply, "tool_calls": named} if named else reply
        ids = {id: str(call["id"]) for call, id in zip(calls, own, strict=True)}
        self._keep(Key(tools, messages).after(shown), Conversation(whole, prompt.shared, reply, ids))
        return shown

    def _find(self, key: bytes) -> Conversation | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def _keep(self, key: bytes, conversation: Conversation) -> None:
        replaced = self._kept.pop(key, None)
        self.tokens += len(conversation.token_ids) - (len(replaced.token_ids) if replaced else 0)
        self._kept[key] = conversation
        while self._kept and (len(self._kept) > self._count or self.tokens > self._most_tokens):
            _, oldest = self._kept.popitem(last=False)
            self.tokens -= len(oldest.token_ids)


def with_id(message: Message, ids: Mapping[str, str]) -> Message:
    id = str(message.get("tool_call_id"))
    return {**message, "tool_call_id": ids[id]} if id in ids else message


def name_call(conversation: array[int], index: int) -> str:
    """A call's id, which stands for all tokens up to it: two conversations whose texts agree and whose tokens do not are told
    apart by it. Nine letters and digits: the strictest template (Mistral's) takes no other ids."""
    digest = blake2b(conversation.tobytes() + index.to_bytes(4, "big"), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return "".join(DIGITS[number // 36**place % 36] for place in range(9))
