"""Questions for the calculator server and what counts as a good answer. The tools themselves live in servers/calculator."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache
from operator import add, mul, sub
from random import Random
from typing import Any, TypeAlias
from zlib import crc32

from art_mcp.environment import Environment
from art_mcp.types import Limits, Scenario, ToolCall, Trajectory

Number: TypeAlias = int | Fraction
Table: TypeAlias = Mapping[str, Sequence[str]]
Pair: TypeAlias = tuple[Number, Number]


def divide(a: Number, b: Number) -> Number:
    """The exact quotient; an int where it comes out even."""
    quotient = Fraction(a) / b
    return quotient.numerator if quotient.denominator == 1 else quotient


EXACT: Mapping[str, Callable[[Any, Any], Number]] = {"add": add, "subtract": sub, "multiply": mul, "divide": divide}
SYMBOLS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
SPLITS = ("train", "test", "test-wordings", "test-ranges")
COUNTED = re.compile("How many|difference|each part")
"""Wordings that make sense only for whole numbers and results that are not negative."""


def table(lines: str) -> Table:
    """Wordings by operation, from lines of "operation: wording | wording"."""
    rows = (line.split(": ", 1) for line in lines.strip().splitlines())
    return {name.strip(): tuple(text.strip() for text in texts.split("|")) for name, texts in rows}


@dataclass(frozen=True, slots=True)
class Chain:
    """A first operation, further ones on the result, and an end. The operand that a wording does not name is the result."""

    firsts: Table
    thens: Table
    end: str
    weight: int


@dataclass(frozen=True, slots=True)
class Phrases:
    """One set of wordings: whole questions, chains, noun phrases, and frames around one noun phrase {n}."""

    single: Table
    chains: Sequence[Chain]
    nouns: Table
    frames: Table


KNOWN = Phrases(
    single=table("""
        add: What is {a} plus {b}? | How much is {a} plus {b}? | Add {a} and {b}. | Add {a} to {b}. | What is the sum of {a} and {b}? | What do you get when {a} is increased by {b}? | What is {a} more than {b}? | A shop has {a} apples and gets {b} more. How many apples does it have now?
        subtract: What is {a} minus {b}? | How much is {a} minus {b}? | Subtract {b} from {a}. | Take {b} away from {a}. | What is the difference between {a} and {b}? | What do you get when {a} is reduced by {b}? | What is {b} less than {a}? | A shop has {a} apples and sells {b} of them. How many apples are left?
        multiply: What is {a} times {b}? | How much is {a} times {b}? | Multiply {a} by {b}. | Multiply {a} and {b}. | What is the product of {a} and {b}? | What do you get when {a} is multiplied by {b}? | A shop has {a} boxes with {b} apples in each box. How many apples does it have? | How many dollars do {a} tickets cost at {b} dollars each?
        divide: What is {a} divided by {b}? | How much is {a} divided by {b}? | Divide {a} by {b}. | What is the quotient of {a} and {b}? | What do you get when {a} is divided by {b}? | How many times does {b} go into {a}? | Split {a} into {b} equal parts. How big is each part? | A shop puts {a} apples into {b} boxes, the same number in each box. How many apples are in each box?
    """),  # noqa: E501
    chains=(
        Chain(
            table("""
                add: Add {a} and {b} | Add {a} to {b} | Start with {a} and add {b}
                subtract: Subtract {b} from {a} | Take {b} away from {a} | Start with {a} and subtract {b}
                multiply: Multiply {a} by {b} | Multiply {a} and {b} | Start with {a} and multiply by {b}
                divide: Divide {a} by {b} | Start with {a} and divide by {b}
            """),
            table("""
                add: then add {b} to the result | then add {b}
                subtract: then subtract {b} from the result | then take {b} away | then subtract the result from {a} | then take the result away from {a}
                multiply: then multiply the result by {b} | then multiply by {b}
                divide: then divide the result by {b} | then divide by {b} | then divide {a} by the result
            """),  # noqa: E501
            end=".",
            weight=40,
        ),
        Chain(
            table("""
                add: {a} is increased by {b}
                subtract: {b} is subtracted from {a}
                multiply: {a} is multiplied by {b}
                divide: {a} is divided by {b}
            """),
            table("""
                add: then {b} is added to the result
                subtract: then {b} is subtracted from the result | then the result is subtracted from {a}
                multiply: then the result is multiplied by {b}
                divide: then the result is divided by {b} | then {a} is divided by the result
            """),
            end=". What is the final result?",
            weight=15,
        ),
        Chain(
            table("""
                add: What is {a} plus {b}
                subtract: What is {a} minus {b}
                multiply: What is {a} times {b}
                divide: What is {a} divided by {b}
            """),
            table("""
                add: then increased by {b}
                subtract: then reduced by {b} | then subtracted from {a}
                multiply: then multiplied by {b}
                divide: then divided by {b}
            """),
            end="?",
            weight=15,
        ),
    ),
    nouns=table("""
        add: the sum of {a} and {b} | ({a} plus {b})
        subtract: the difference between {a} and {b} | ({a} minus {b})
        multiply: the product of {a} and {b} | ({a} times {b})
        divide: the quotient of {a} and {b} | ({a} divided by {b})
    """),
    frames=table("""
        add: Add {b} to {n}. | What is {b} more than {n}?
        subtract: Subtract {b} from {n}. | What do you get when {n} is reduced by {b}? | Subtract {n} from {a}. | How much is {a} minus {n}?
        multiply: What is {b} times {n}? | What do you get when {n} is multiplied by {b}?
        divide: Divide {n} by {b}. | What do you get when {n} is divided by {b}? | Divide {a} by {n}. | How much is {a} divided by {n}?
    """),  # noqa: E501
)

UNSEEN = Phrases(
    single=table("""
        add: What do {a} and {b} make together? | When {b} is added to {a}, what is the result? | Find {a} plus {b}.
        subtract: What is left when {b} is subtracted from {a}? | When {a} is reduced by {b}, what is the result? | Find {a} minus {b}.
        multiply: How much is {a} multiplied by {b}? | When {a} is multiplied by {b}, what is the result? | Find {a} times {b}.
        divide: What does {a} divided by {b} make? | When {a} is divided by {b}, what is the result? | Find {a} divided by {b}.
    """),  # noqa: E501
    chains=(
        Chain(
            table("""
                add: Find {a} plus {b} | Take {a} and add {b} to it
                subtract: Find {a} minus {b} | Take {a} and subtract {b} from it
                multiply: Find {a} times {b} | Take {a} and multiply it by {b}
                divide: Find {a} divided by {b} | Take {a} and divide it by {b}
            """),
            table("""
                add: and then add {b} to what you get
                subtract: and then subtract {b} from what you get | and then subtract what you get from {a}
                multiply: and then multiply what you get by {b}
                divide: and then divide what you get by {b} | and then divide {a} by what you get
            """),
            end=".",
            weight=60,
        ),
    ),
    nouns=table("""
        add: the result of adding {a} and {b}
        subtract: the result of subtracting {b} from {a}
        multiply: the result of multiplying {a} by {b}
        divide: the result of dividing {a} by {b}
    """),
    frames=table("""
        add: When {b} is added to {n}, what do you get?
        subtract: When {n} is reduced by {b}, what do you get? | When {a} is reduced by {n}, what do you get?
        multiply: When {n} is multiplied by {b}, what do you get?
        divide: When {n} is divided by {b}, what do you get? | When {a} is divided by {n}, what do you get?
    """),
)
