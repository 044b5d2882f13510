"""The token ids of turn n's whole prompt, against transformers' apply_chat_template: `python -m benchmarks.template --json`

Qwen2.5's template and the tiny policy's tokenizer, eight tools, one call a turn. Both sides begin when a tool's result is
there and end with the ids of the whole prompt: the peer renders and tokenizes all messages, ours puts the bridge behind the
tokens that it has. Every result is new, so that no cache holds it. The ids are compared before anything is timed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from art_mcp.core.dialect import TemplateDialect
from art_mcp.local.models import TINY, load_dialect, load_tokenizer
from art_mcp.types import Message, ModelSpec
from benchmarks.pairs import compare, figure, repeats_for, rounds, settled, time_of
from benchmarks.report import duration, own_versions, publish, read_options, result_of
from benchmarks.tool_call_texts import DRAWS, TOOLS

TURNS = (2, 4, 8, 16, 32)
BOUND = 10.0
SECONDS = {False: 0.1, True: 0.002}
"""How long one measurement of a pair takes, by whether it is a quick run."""
SCHEMAS = [tool.schema() for tool in TOOLS]


@dataclass(frozen=True, slots=True)
class History:
    """What is there when the result of the last call arrives: the messages up to the policy's reply, and their tokens."""

    messages: tuple[Message, ...]
    tokens: tuple[int, ...]


def fresh_results() -> Iterator[str]:
    """Tool results, none of them twice."""
    return (f'{{"station": "Zürich {number:x}", "celsius": {number / 8}, "sky": "clear"}}' for number in count(1))


def answer_to(reply: Message, text: str) -> Message:
    (call,) = reply["tool_calls"]
    return {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": text}


def draw_reply(turn: int) -> Message:
    index = turn % len(TOOLS)
    function = {"name": TOOLS[index].name, "arguments": DRAWS[index](random.Random(turn))}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call00000", "function": function}]}


def play(dialect: TemplateDialect, results: Iterator[str]) -> dict[int, History]:
    """The history before turn n, by n, as a rollout makes it: the opening, then policy and tool in turns."""
    messages: list[Message] = [{"role": "user", "content": "Is it warmer in Zürich than in Łódź today? Look it up."}]
    shared, rest = dialect.opening(messages, TOOLS)
    tokens, histories = [*shared, *rest], {}
    for turn in range(2, max(TURNS) + 1):
        reply = draw_reply(turn)
        tokens += dialect.written(messages[:1], reply, TOOLS)
        messages.append(reply)
        histories[turn] = History(tuple(messages), tuple(tokens))
        messages.append(answer_to(reply, next(results)))
        tokens += dialect.bridge(reply, messages[-1:], tokens[-1])
    return histories


class Sides:
    """Both ways to the prompt of a turn, each with a result of its own every time."""

    def __init__(self) -> None:
        self.dialect, self.tokenizer = load_dialect(ModelSpec()), load_tokenizer(str(TINY))
        self.tokenizer.model_max_length = 10**6  # it would warn of prompts that are too long for its model
        self.tokenizer.chat_template = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
        self.results = fresh_results()
        self.histories = play(self.dialect, self.results)

    def ours(self, turn: int, result: str) -> list[int]:
        history = self.histories[turn]
        reply = history.messages[-1]
        return [*history.tokens, *self.dialect.bridge(reply, [answer_to(reply, result)], history.tokens[-1])]

    def peer(self, turn: int, result: str) -> list[int]:
        messages = self.histories[turn].messages
        whole = [*messages, answer_to(messages[-1], result)]
        return self.tokenizer.apply_chat_template(whole, SCHEMAS, add_generation_prompt=True, tokenize=True, return_dict=False)

    def work(self, side: str, turn: int) -> Callable[[], object]:
        reach: Callable[[int, str], list[int]] = getattr(self, side)
        return lambda: reach(turn, next(self.results))


def check_agreement(sides: Sides) -> dict[str, int]:
    """The ids of both sides must be the same; how many there are, by turn."""
    lengths: dict[str, int] = {}
    for turn in TURNS:
        result = next(sides.results)
        ours, peer = sides.ours(turn, result), sides.peer(turn, result)
        if ours != peer:
            raise SystemExit(f"the sides differ at turn {turn}: {ours[-80:]} and {peer[-80:]}")
        lengths[case_of(turn)] = len(ours)
    return lengths


def case_of(turn: int) -> str:
    return f"turn_{turn}"


def measure_times(ways: Mapping[str, Callable[[], object]], *, pairs: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a prompt of each way, in turns."""
    repeats = {name: repeats_for(work, seconds) for name, work in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name in rounds(list(ways), pairs):
        times[name].append(time_of(ways[name], repeats[name]))
    return times


def measure(*, pairs: int, seconds: float) -> dict[str, Any]:
    sides = Sides()
    tokens = check_agreement(sides)
    cases: dict[str, dict[str, Any]] = {}
    first, last = case_of(min(TURNS)), case_of(max(TURNS))
    with settled():
        for turn in TURNS:
            ways = {side: sides.work(side, turn) for side in ("ours", "peer")}
            times = measure_times(ways, pairs=pairs, seconds=seconds)
            cases[case_of(turn)] = compare(times["ours"], times["peer"])
        ends = {case_of(turn): sides.work("ours", turn) for turn in (min(TURNS), max(TURNS))}
        times = measure_times(ends, pairs=pairs, seconds=seconds)
    growth = [late / early for early, late in zip(times[first], times[last], strict=True)]
    versions = own_versions("transformers", "tokenizers", "jinja2")
    return result_of(
        "template", cases, versions=versions, bounds={last: BOUND}, growth=figure(growth), tokens=tokens, tools=len(TOOLS)
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(__doc__, argv)
    result = measure(pairs=options.pairs, seconds=SECONDS[options.quick])
    low, high = result["growth"]["interval"]
    print(f"ours at turn {max(TURNS)} costs {result['growth']['median']:.3f} × turn {min(TURNS)}  [{low:.3f}, {high:.3f}]")
    for case, length in result["tokens"].items():
        print(f"{case:<16} {length} tokens, ours {duration(result['cases'][case]['ours_seconds']['median'])}")
    publish(result, options)


if __name__ == "__main__":
    main()
