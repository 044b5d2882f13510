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
    are the same in every conversation with these tools. `thoughts`: those of each assistant message, as they stand in it."""

    token_ids: tuple[int, ...]
    shared: int
    bridged: bool
    thoughts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """All tokens up to the end of a sampled turn; `reply` is that turn with the dialect's ids, `ids` are those by the ones
    that the client has (None for a call that cannot be made). `thoughts`: those of each assistant message, the reply's last."""

    token_ids: array[int]
    shared: int
    reply: Message
    ids: Mapping[str, str | None]
    thoughts: tuple[str, ...]

    def has(self, hints: Sequence[str], *, others: bool = False) -> bool:
        """Whether its thoughts are those of the messages of a client, as far as it sent any. `others`: messages without
        thoughts here may have some there, of the client's own."""
        return all(hint in ("", own) or (others and not own) for hint, own in zip(hints, self.thoughts, strict=False))


class Conversations:
    """The finished conversations of one model, under whatever policy their turns were sampled. Rivals, of which clients got the
    same text and the same ids for other tokens, are kept side by side and go together: one that was left alone would pass for
    the only one. What was used longest ago goes first."""

    def __init__(self, *, count: int = COUNT, tokens: int = TOKENS) -> None:
        self._count, self._most_tokens = count, tokens
        self._kept: OrderedDict[bytes, tuple[Conversation, ...]] = OrderedDict()
        self._size = self.tokens = 0

    def __len__(self) -> int:
        return self._size

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, dialect: Dialect, hints: Sequence[str] = ()
    ) -> Prompt:
        """The tokens before the next turn: those of the one conversation that the messages extend, and a bridge; or, where they
        extend none or may extend several, a rendering of them all. `hints` are the thoughts that the client sent with each
        assistant message, empty for none. Raises TemplateError where the template refuses the messages."""
        bridged = self._bridged(messages, tools, dialect, hints=hints)
        if bridged is not None:
            return bridged
        shared, rest = dialect.opening(messages, tools)
        said = sum(message["role"] == "assistant" for message in messages)
        return Prompt((*shared, *rest), len(shared), bridged=False, thoughts=("",) * said)

    def _bridged(
        self, messages: Sequence[Message], tools: Sequence[Tool], dialect: Dialect, *, hints: Sequence[str]
    ) -> Prompt | None:
        last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        following = messages[last + 1 :]
        if last < 0 or not following or any(message["role"] not in ("user", "tool") for message in following):
            return None
        earlier = self._find(Key(tools, messages[:last]).after(messages[last]), hints)
        if earlier is None:
            return None
        own = [with_id(message, earlier.ids) for message in following]
        try:
            bridge = dialect.bridge(earlier.reply, own, earlier.token_ids[-1])
        except TemplateError:  # rendered afresh, where the template says what is wrong if it is wrong there too
            return None
        return Prompt((*earlier.token_ids, *bridge), earlier.shared, bridged=True, thoughts=earlier.thoughts)

    def remember(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        *,
        prompt: Prompt,
        turn: Sequence[int],
        reply: Message,
        shown: Message,
    ) -> Message:
        """Keeps the conversation that ends with `reply`, the dialect's reading of `turn`, which is `shown` to the client: calls
        that cannot be made may be among the others there, without an id. Returns it with ids that no other conversation has."""
        whole = array("I", prompt.token_ids)
        whole.extend(turn)
        calls: Sequence[dict[str, Any]] = shown.get("tool_calls") or ()
        own = [name_call(whole, index) for index in range(len(calls))]
        named = [{**call, "id": id} for call, id in zip(calls, own, strict=True)]
        shown = {**shown, "tool_calls": named} if named else shown
        ids: dict[str, str | None] = {id: call.get("id") for call, id in zip(calls, own, strict=True)}
        thoughts = (*prompt.thoughts, str(reply.get("reasoning_content", "")))
        self._keep(Key(tools, messages).after(shown), Conversation(whole, prompt.shared, reply, ids, thoughts))
        return shown

    def _find(self, key: bytes, hints: Sequence[str]) -> Conversation | None:
        rivals = self._kept.get(key, ())
        if rivals:
            self._kept.move_to_end(key)
        fitting = [one for one in rivals if one.has(hints)] or [one for one in rivals if one.has(hints, others=True)]
        return fitting[0] if len(fitting) == 1 else None

    def _keep(self, key: bytes, conversation: Conversation) -> None:
        rivals = self._kept.get(key, ())
        if not any(one.token_ids == conversation.token_ids for one in rivals):
            self._kept[key] = (*rivals, conversation)
            self._size += 1
            self.tokens += len(conversation.token_ids)
        self._kept.move_to_end(key)
        while self._size > self._count or self.tokens > self._most_tokens:
            _, oldest = self._kept.popitem(last=False)
            self._size -= len(oldest)
            self.tokens -= sum(len(one.token_ids) for one in oldest)


def with_id(message: Message, ids: Mapping[str, str | None]) -> Message:
    """The answer to a call as the runner writes it, which names no call where none could be made."""
    id = str(message.get("tool_call_id"))
    if id not in ids:
        return message
    own = ids[id]
    return {"role": "tool", "content": message["content"]} if own is None else {**message, "tool_call_id": own}


def name_call(conversation: array[int], index: int) -> str:
    """A call's id, which stands for all tokens up to it: two conversations whose texts agree and whose tokens do not are told
    apart by it. Nine letters and digits: the strictest template (Mistral's) takes no other ids."""
    digest = blake2b(conversation.tobytes() + index.to_bytes(4, "big"), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return "".join(DIGITS[number // 36**place % 36] for place in range(9))
