"""One call on its way through a patched client: what is sent for it, what of its answer is recorded, what the agent sees. Bytes
in, bytes out; `patch` sends them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from art_mcp.errors import describe
from art_mcp.openai_patch.recording import Recording
from art_mcp.openai_patch.wire import MISSHAPEN, Choice, Draft, Unusable, checked_ids, hide


class Exchange:
    """A call of chat completions, its answer whole or in a stream, recorded once."""

    def __init__(self, recording: Recording, body: Mapping[str, Any]) -> None:
        self._recording, self._body = recording, body
        self.sent = json.dumps(recording.asked(body)).encode()
        self._drafts: dict[int, Draft] = {}
        self._prompt: Any = None
        self._model = ""
        self._rest = b""
        self._done = self._streams = False

    async def ready(self) -> None:
        """Returns when the recording wants it to be sent."""
        if self._recording.ready is not None:
            await self._recording.ready()

    def whole(self, content: bytes) -> bytes:
        """An answer in one piece, as the agent is to see it."""
        seen = self._seen(content)
        self._record()
        return content if seen is None else seen

    def begin_stream(self) -> None:
        """The answer comes in a stream: when the recording ends before it does, something is missing."""
        self._streams = True
        self._recording.unread += 1

    def passed(self, data: bytes) -> bytes:
        """The next bytes of a stream, as the agent is to see them; a line that is not whole yet waits for its rest."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return b"".join(self._line(line) + b"\n" for line in lines)

    def rest(self) -> bytes:
        """What a stream ended with, where that is no whole line."""
        line, self._rest = self._rest, b""
        return self._line(line)

    def end(self) -> None:
        """The stream is over, or the agent turned away: what is not whole by now is dropped."""
        self._record()

    def _line(self, line: bytes) -> bytes:
        name, colon, value = line.partition(b":")
        if name != b"data" or not colon:
            return line
        if value.strip() == b"[DONE]":
            self._record()
            return line
        seen = self._seen(value)
        if len(self._drafts) == (self._body.get("n") or 1) and all(draft.finish_reason for draft in self._drafts.values()):
            self._record()  # an agent may never read on
        return line if seen is None else b"data: " + seen + (b"\r" if line.endswith(b"\r") else b"")

    def _seen(self, text: bytes) -> bytes | None:
        """Takes in an answer or a chunk of one; what the agent is to see in its place, if it is to see anything else."""
        try:
            answer = json.loads(text)
            if "error" in answer and "choices" not in answer:
                raise Unusable(f"it broke off with {json.dumps(answer['error'])}")
            self._model = answer.get("model") or self._model
            self._prompt = answer.get("prompt_token_ids") or self._prompt
            for choice in answer["choices"]:
                self._drafts.setdefault(choice.get("index", 0), Draft()).add(choice)
            changed = hide(answer, asked=self._body)
        except MISSHAPEN as error:
            self._drop(f"the answer is no chat completion: {describe(error)}")
            return None
        return json.dumps(answer).encode() if changed else None

    def _settle(self) -> bool:
        """Whether this is the first time that the answer is done with."""
        first, self._done = not self._done, True
        self._recording.unread -= first and self._streams
        return first

    def _record(self) -> None:
        if not self._settle():
            return
        if not self._drafts:
            self._recording.drop("no choice of the answer came")
            return
        try:
            prompt = checked_ids(self._prompt)
        except Unusable as error:
            self._recording.drop(f"{error} for the prompt")
            return
        choices: list[Choice] = []
        for _, draft in sorted(self._drafts.items()):
            try:
                choices.append(draft.whole())
            except Unusable as error:
                self._recording.drop(str(error))
        try:
            self._recording.take(self._model, prompt, choices, self._body["messages"])
        except MISSHAPEN as error:
            self._recording.drop(f"what was asked is no conversation: {type(error).__name__}: {describe(error)}")

    def _drop(self, reason: str) -> None:
        if self._settle():
            self._recording.drop(reason)
