"""A Chat over any OpenAI-compatible endpoint: what is asked, how failures are borne. `core.chat` reads the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from random import random
from time import time
from typing import TYPE_CHECKING, Any

import anyio

from art_mcp.core.address import without_login
from art_mcp.core.chat import read_answer
from art_mcp.errors import ConfigError, EngineError, NoRoomError, describe
from art_mcp.types import Message, Patience, Reply, SamplingParams, Tool

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 that are worth another try."""
WRONG = frozenset({401, 402, 403, 404, 405})
"""Statuses that say of the address, the key or the model's name that it is wrong, whatever is asked."""
CONNECT_SECONDS = 15.0
"""The longest that a connection takes to be made."""
LONGEST_WAIT = 30.0
"""Seconds between two tries, unless the endpoint asks for more."""
NO_ROOM = ("context_length_exceeded", "exceed_context_size_error")
"""How endpoints name a full context; others say it in words."""


class Trouble(Exception):
    """One try that gave no answer. `passing`: another may; `wait`: the seconds that the endpoint asks for; `wrong`: what was
    asked is not to blame, but where, by whom, or for which model."""

    def __init__(self, what: str, *, passing: bool = True, wait: float | None = None, wrong: bool = False) -> None:
        super().__init__(what)
        self.passing, self.wait, self.wrong = passing, wait, wrong


class OtherName(Exception):
    """The endpoint wants the limit of tokens by its other name: the same request again, so named, is no new try."""


class RemoteChat:
    """A Chat with `model` behind `client`, whose own retries and timeout are not used. `doubted`: until the endpoint has
    answered once, one that is not there, or refuses the key or the model, raises ConfigError at the first try."""

    def __init__(self, client: AsyncOpenAI, model: str, *, patience: Patience | None = None, doubted: bool = False) -> None:
        from openai import Timeout

        self._patience, self._doubted = patience or Patience(), doubted
        timeout = Timeout(self._patience.timeout, connect=min(CONNECT_SECONDS, self._patience.timeout))
        self._client = client.with_options(max_retries=0, timeout=timeout)
        self._model, self._where = model, without_login(str(client.base_url)).rstrip("/")
        self._limit = "max_tokens"

    async def reply(self, conversation: Sequence[Message], *, tools: Sequence[Tool], params: SamplingParams) -> Reply:
        """The next turn. Raises EngineError when the endpoint's failures outlast the patience, or the time that is left in the
        caller's scope; NoRoomError where it says that the context is full."""
        body: dict[str, Any] = {"model": self._model, "messages": list(conversation), "temperature": params.temperature}
        if params.temperature:
            body["seed"] = params.seed
        if tools:
            body["tools"] = [tool.schema() for tool in tools]
        began, tries = anyio.current_time(), 0
        latest = min(began + self._patience.seconds, anyio.current_effective_deadline())
        while True:
            limit = self._limit
            try:
                reply = await self._try({**body, limit: params.max_tokens}, tools, limit=limit)
                self._doubted = False
                return reply
            except OtherName:
                continue
            except Trouble as trouble:
                tries += 1
                if trouble.wrong and self._doubted:
                    raise ConfigError(self._blame(trouble, tries, 0.0)) from trouble
                wait = self._wait(trouble, tries)
                if not trouble.passing or tries >= self._patience.tries or anyio.current_time() + wait > latest:
                    raise EngineError(self._blame(trouble, tries, anyio.current_time() - began)) from trouble
            await anyio.sleep(wait)

    async def _try(self, body: Mapping[str, Any], tools: Sequence[Tool], *, limit: str) -> Reply:
        import httpx2
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            # as text: what came is read here, whatever it is
            answer = await self._client.post("/chat/completions", cast_to=str, body=body)
        except APIStatusError as error:
            raise self._judge(error, limit) from error
        except APITimeoutError as error:
            if isinstance(error.__cause__, httpx2.ConnectTimeout):
                raise Trouble(f"no connection within {CONNECT_SECONDS:g} s", wrong=True) from error
            raise Trouble(f"no answer within {self._patience.timeout:g} s") from error
        except APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, httpx2.ConnectError):
                raise Trouble(f"it cannot be reached: {describe(cause)}", wrong=True) from error
            raise Trouble(describe(cause)) from error
        if not answer.strip():
            raise Trouble("an empty answer")
        try:
            read = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise Trouble(f"an answer that is no JSON: {answer[:80]!r}") from error
        refuse_failure(read)
        try:
            return read_answer(read, tools)
        except EngineError as error:
            raise EngineError(f"{self._where}, model {self._model!r}: {error}") from error

    def _judge(self, error: APIStatusError, limit: str) -> Trouble | OtherName:
        """Whether another try of the request, which gave its limit of tokens by the name `limit`, is worth it. Raises
        NoRoomError for a conversation that is too long for the model."""
        status, said = error.status_code, describe(error)
        if error.code in NO_ROOM or error.type in NO_ROOM or (status == 400 and "context length" in said):
            raise NoRoomError(f"{self._where}: {said}") from error
        if status == 400 and limit == "max_tokens" and error.param == limit:  # OpenAI's reasoning models
            self._limit = "max_completion_tokens"  # from here on; others that are on their way are refused as this one was
            return OtherName(said)
        unpaid = error.code == "insufficient_quota"
        wait = asked_wait(error.response.headers)
        return Trouble(said, passing=is_passing(status) and not unpaid, wait=wait, wrong=unpaid or status in WRONG)

    def _wait(self, trouble: Trouble, tries: int) -> float:
        """Seconds until the next try, never the same for all that failed together."""
        if trouble.wait is not None:
            return trouble.wait * (1 + random() / 4)
        return min(LONGEST_WAIT, self._patience.first_wait * 2 ** (tries - 1)) * (0.5 + random() / 2)

    def _blame(self, trouble: Trouble, tries: int, seconds: float) -> str:
        often = f", after {tries} tries in {seconds:.1f} s" if tries > 1 else ""
        asked = f"; it asks to wait {trouble.wait:g} s" if trouble.passing and trouble.wait else ""
        return f"{self._where}, model {self._model!r}: {trouble}{often}{asked}"


def is_passing(status: int) -> bool:
    """Whether what failed with this status may succeed a little later."""
    return status in PASSING or status >= 500


def refuse_failure(answer: Any) -> None:
    """Raises Trouble for a failure that came with status 200, as those of gateways do."""
    failure = answer.get("error") if isinstance(answer, dict) and not answer.get("choices") else None
    code = failure.get("code") if isinstance(failure, dict) else None
    if isinstance(code, int) and is_passing(code):
        raise Trouble(f"answered with an error: {json.dumps(failure)[:200]}")


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds by Retry-After (RFC 9110, section 10.2.3: a number or a date) or OpenAI's retry-after-ms; None without."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if value.replace(".", "", 1).isdecimal():
            return float(value) / unit
        if value and unit == 1.0:
            try:
                return max(0.0, parsedate_to_datetime(value).timestamp() - time())
            except ValueError:
                return None
    return None
