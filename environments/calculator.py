"""Questions for the calculator server, and what counts as a good answer. The tools live in servers/calculator, the wordings
in calculator_wordings.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, TypeAlias
from zlib import crc32

from art_mcp.environment import Environment
from art_mcp.types import Limits, Scenario, ToolCall, Trajectory

Sources: TypeAlias = tuple[int | None, int | None]
"""The earlier steps that an operation's operands are the results of; None for a number that the question gives."""
Table: TypeAlias = Mapping[str, Sequence[str]]  # wordings by operation

GIVEN: Sources = (None, None)
SPLITS = ("train", "test", "test-wordings", "test-ranges")
SIZES = {1: 3600, 2: 2400}
"""Scenarios of the split train by level; 1,200 of each higher one, and 600 of each in the other splits."""
SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
NAMES = tuple(SYMBOLS)
FUNCTIONS = (Fraction.__add__, Fraction.__sub__, Fraction.__mul__, Fraction.__truediv__)
EXACT: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = dict(zip(NAMES, FUNCTIONS, strict=True))
WORDINGS: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("calculator_wordings.toml").read_text(encoding="utf-8"))
COUNTED = re.compile("How many|difference|each part|left")
"""Wordings that make sense only for whole numbers and results that are not negative."""
MINUS_SIGNS = str.maketrans("\u2212\u2013", "--")
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


class Unfit(Exception):
    """The numbers drawn so far allow no further operation."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a question, in one of its wordings."""

    name: str
    wording: str
    operands: tuple[Fraction, Fraction]
    sources: Sources

    @property
    def value(self) -> Fraction:
        """The result as the calculator passes it on: exact, or where it does not end the double of its first 15 digits."""
        value = EXACT[self.name](*self.operands)
        if value.denominator == 1:
            return value
        digits = [Context(prec=places).divide(Decimal(value.numerator), value.denominator) for places in (30, 15)]
        return Fraction(repr(float(digits[0] if Fraction(digits[0]) == value else digits[1])))

    def told(self, phrases: Sequence[str] = (), **more: str) -> str:
        """The wording with its operands: numbers, or the `phrases` for the steps that they come from."""
        pairs = zip("ab", self.operands, self.sources, strict=True)
        named = {key: phrases[source] if phrases and source is not None else str(plain(n)) for key, n, source in pairs}
        return self.wording.format(**named, **more)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked and how it is worked out."""

    prompt: str
    steps: Sequence[Step]

    @property
    def held_out(self) -> bool:
        """Whether it is for the split test: by its two numbers, or from level 2 on by its first two wordings."""
        first, *others = self.steps
        key = f"{first.wording} | {others[0].wording}" if others else f"{first.name} {sorted(first.operands)}"
        return crc32(key.encode()) % 10 < 3


def nested(steps: Sequence[Step]) -> str:
    """The steps as one phrase, in which every inner one is in parentheses."""
    phrases: list[str] = []
    for step in steps:
        phrase = step.told(phrases)
        phrases.append(phrase if step.wording.startswith("(") else f"({phrase})")
    return phrases[-1][1:-1]


@dataclass(frozen=True, slots=True)
class Composer:
    """Composes questions of `level` operations. Operands are in [low, high], or beyond where a division or a difference
    needs it; `decimals` gives them one or two places. What composes or adds steps raises Unfit when numbers do not work out."""

    rng: Random
    wordings: Mapping[str, Any]
    level: int
    decimals: bool
    low: int
    high: int

    def question(self) -> Question:
        """A question of a random form that suits the level."""
        higher = (self.chain, self.chain, self.tree, self.tree, self.numbered)
        return self.rng.choice({1: (self.single,), 2: (self.chain, self.chain, self.nest)}.get(self.level, higher))()

    def single(self) -> Question:
        (step,) = self.steps(self.wordings["single"], {}, [GIVEN])
        return Question(step.told(), [step])

    def chain(self) -> Question:
        chains = self.wordings["chains"]
        chain = self.rng.choices(chains, [chain["weight"] for chain in chains])[0]
        steps = self.steps(chain["firsts"], chain["thens"], [GIVEN] + [None] * (self.level - 1))
        return Question(", ".join(step.told() for step in steps) + chain["end"], steps)

    def nest(self) -> Question:
        noun, frame = steps = self.steps(self.wordings["nouns"], self.wordings["frames"], [GIVEN, None])
        return Question(frame.told(n=noun.told()), steps)

    def tree(self) -> Question:
        steps = self.steps(self.wordings["nouns"], self.wordings["nouns"], self.shape(self.level))
        return Question(f"What is {nested(steps)}?", steps)

    def numbered(self) -> Question:
        firsts = self.wordings["chains"][0]["firsts"]
        steps = self.steps(firsts, firsts, self.shape(self.level))
        phrases = [f"the result of step {number}" for number in range(1, len(steps) + 1)]
        told = (step.told(phrases) for step in steps)
        lines = [f"Step {number}: {text[0].lower()}{text[1:]}." for number, text in enumerate(told, 1)]
        return Question(" ".join([*lines, f"What is {phrases[-1]}?"]), steps)

    def shape(self, operations: int, start: int = 0) -> list[Sources]:
        """A random binary tree of operations numbered from `start`, in the order of evaluation."""
        if not operations:
            return []
        left = self.shape(self.rng.randrange(operations), start)
        right = self.shape(operations - 1 - len(left), start + len(left))
        ends = (start + len(left) - 1 if left else None, start + operations - 2 if right else None)
        return [*left, *right, ends]

    def steps(self, firsts: Table, others: Table, shape: Sequence[Sources | None]) -> list[Step]:
        """A step for each of `shape`: the first worded by `firsts`."""
        done: list[Step] = []
        for sources in shape:
            done.append(self.step(others if done else firsts, sources, done))
        return done

    def step(self, table: Table, sources: Sources | None, done: Sequence[Step]) -> Step:
        """The next step; without `sources`, the operand that its wording leaves out is the last result."""
        for _ in range(20):
            name = self.rng.choice(NAMES)
            wording = self.rng.choice(table[name])
            counted = COUNTED.search(wording) is not None
            if counted and self.decimals:
                continue
            left, right = sources or (None if hole in wording else len(done) - 1 for hole in ("{a}", "{b}"))
            given = (None if left is None else done[left].value, None if right is None else done[right].value)
            signed = not counted and len(done) == self.level - 1 and self.rng.random() < 0.08
            for _ in range(24 if None in given else 1):
                step = Step(name, wording, self.guess(name, given), (left, right))
                if self.fits(step.value, signed=signed):
                    return step
        raise Unfit

    def guess(self, name: str, given: tuple[Fraction | None, Fraction | None]) -> tuple[Fraction, Fraction]:
        """`given` with the missing operands drawn, so that the result has a good chance to fit."""
        a, b = given
        scale = self.rng.choice((10, 100)) if self.decimals else 1
        one, other = (self.rng.randint(self.low * scale, self.high * scale) for _ in given)
        factor = self.rng.randint(2, self.rng.choice((12, 99)))
        if name == "subtract" and b is not None:
            one += int(b) * scale
        elif name == "multiply" and not self.decimals:
            one, other = self.rng.sample((one, factor), 2)
        elif name == "divide" and not self.decimals:
            one, other = (one * factor if b is None else factor * int(b)), factor
        return (Fraction(one, scale) if a is None else a, Fraction(other, scale) if b is None else b)

    def fits(self, value: Fraction, *, signed: bool) -> bool:
        """Whether a result is of a fair size, above 0 unless `signed`, and whole unless decimals are asked for."""
        largest = 9_999 if self.level < 3 and self.high < 100 else 999_999
        return (self.decimals or value.denominator == 1) and 0.1 <= float(abs(value) if signed else value) <= largest


def plain(number: Fraction) -> int | float:
    """A number as JSON holds it."""
    return number.numerator if number.denominator == 1 else float(number)


def rounded(number: Fraction, places: int) -> str:
    """The number with so many decimals. Raises Unfit where it lies (nearly) between two of them."""
    scaled = number * 10**places
    if abs(scaled % 1 - Fraction(1, 2)) < Fraction(1, 1000):
        raise Unfit
    return str(Decimal(round(scaled)).scaleb(-places))


def scenario_of(question: Question, identity: str, places: int | None) -> Scenario:
    """The question with the facts that rewards and `solution` need; its answer is asked for with so many decimals."""
    steps = question.steps
    facts = {
        "answer": str(plain(steps[-1].value)) if places is None else rounded(steps[-1].value, places),
        "decimals": places,
        "steps": [{"name": step.name, "arguments": dict(zip("ab", map(plain, step.operands), strict=True))} for step in steps],
        "expression": nested([replace(step, wording=f"{{a}} {SYMBOLS[step.name]} {{b}}") for step in steps]),
        "kinds": [step.wording for step in steps],
    }
    ending = "" if places is None else f" Round to {places} decimal{'s' * (places > 1)}."
    return Scenario(identity, question.prompt + ending, len(steps), facts)


@cache
def questions(split: str, level: int, *, decimals: bool) -> tuple[Scenario, ...]:
    """The scenarios of one split and level; the same in every process."""
    key = f"calculator-{split}-{level}{'-decimals' * decimals}"
    rng = Random(key)
    wordings = WORDINGS["unseen" if split == "test-wordings" else "known"]
    composer = Composer(rng, wordings, level, decimals, *((100, 999) if split == "test-ranges" else (2, 99)))
    found: dict[str, Scenario] = {}
    while len(found) < (SIZES.get(level, 1200) if split == "train" else 600):
        with suppress(Unfit):
            question = composer.question()
            if split not in ("train", "test") or question.held_out == (split == "test"):
                places = rng.choice((1, 2, 2)) if decimals else None
                scenario = scenario_of(question, f"{key}-{len(found)}", places)
                found.setdefault(scenario.prompt, scenario)
    return tuple(found.values())


def correct(trajectory: Trajectory) -> float:
    """1.0 if the last number of the answer is the expected one; earlier numbers count for nothing."""
    assert trajectory.scenario is not None
    numbers = NUMBER.findall(trajectory.answer.translate(MINUS_SIGNS))
    return float(bool(numbers) and Decimal(numbers[-1].replace(",", "")) == Decimal(trajectory.scenario.facts["answer"]))


def malformed(trajectory: Trajectory) -> float:
    """-0.1 for each malformed call, at most -0.3."""
    return -0.1 * min(trajectory.malformed, 3)


def needless(trajectory: Trajectory) -> float:
    """-0.05 for each call beyond the number of operations, at most -0.2."""
    assert trajectory.scenario is not None
    calls = sum(isinstance(use.call, ToolCall) for use in trajectory.uses)
    return -0.05 * min(max(calls - trajectory.scenario.level, 0), 4)


def solution(scenario: Scenario, *, evaluate: bool) -> tuple[list[ToolCall], str]:
    """The reference calls and the bare answer: one call an operation, or one `evaluate` for several where it is offered."""
    facts = scenario.facts
    if evaluate and scenario.level > 1:
        return [ToolCall("evaluate", {"expression": facts["expression"]})], facts["answer"]
    return [ToolCall(step["name"], step["arguments"]) for step in facts["steps"]], facts["answer"]


def parse_levels(text: str) -> list[int]:
    """The levels of "1-2" or "1,2,5", in order. Raises ValueError for anything else."""
    parts = text.split(",") if re.fullmatch("[1-8](-[1-8])?(,[1-8](-[1-8])?)*", text) else []
    levels = sorted({level for part in parts for level in range(int(part[0]), int(part[-1]) + 1)})
    if not levels:
        raise ValueError(f"levels are 1 to 8, such as 1-2 or 1,2,5; got {text!r}")
    return levels


def parse_switch(value: bool | str) -> bool:
    """A switch as Python or the command line gives it."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"a switch is true or false, got {value!r}")
    return str(value).lower() == "true"


def environment(levels: str | int = "1-2", *, evaluate: bool | str = False, decimals: bool | str = False) -> Environment:
    """Arithmetic in words. `levels`: numbers of operations, 1 to 8 ("1-2", "1,2,5"); `evaluate` offers the tool for whole
    expressions; `decimals` asks for numbers with decimals and rounded answers."""
    chosen, whole, fractional = parse_levels(str(levels)), parse_switch(evaluate), parse_switch(decimals)

    @cache
    def scenarios(split: str) -> tuple[Scenario, ...]:
        if split not in SPLITS:
            raise ValueError(f"the calculator has the splits {', '.join(SPLITS)}, not {split!r}")
        parts = [questions(split, level, decimals=fractional) for level in chosen]
        placed = [((index + 0.5) / len(part), scenario) for part in parts for index, scenario in enumerate(part)]
        return tuple(scenario for _, scenario in sorted(placed, key=lambda place: place[0]))  # any beginning is a fair mix

    top = chosen[-1]
    return Environment(
        servers=["calculator"],
        scenarios=scenarios,
        rewards={"correct": correct, "malformed": malformed, "needless": needless},
        tools=(*NAMES, "evaluate") if whole else NAMES,
        limits=Limits(turns=top + 4, tokens=1024 + 256 * top, turn_tokens=192, calls=top + 8, seconds=60.0),
        splits=SPLITS,
        solution=partial(solution, evaluate=whole),
    )
