"""Evaluates arithmetic expressions by recursive descent, within limits that are checked first. No `eval`; no arithmetic of
its own.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | "//" | "%") signed)*
    signed  = ("+" | "-")* power
    power   = atom (("**" | "^") signed)?              so -2 ** 2 is -4, and 2 ** 3 ** 2 is 2 ** 9
    atom    = number | constant | function "(" sum ("," sum)* ")" | "(" sum ")"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final, TypeAlias

from arithmetic import (
    MAX_DIGITS,
    CalculationError,
    Number,
    absolute,
    add,
    divide,
    floor_divide,
    modulo,
    multiply,
    negate,
    power,
    round_to,
    settle,
    sqrt,
    subtract,
)

MAX_LENGTH: Final = 1000
"""Characters of an expression."""
MAX_DEPTH: Final = 50
"""Parentheses, function calls and powers inside each other."""

Operation: TypeAlias = Callable[[Number, Number], Number]
SUMS: Final[dict[str, Operation]] = {"+": add, "-": subtract}
PRODUCTS: Final[dict[str, Operation]] = {"*": multiply, "/": divide, "//": floor_divide, "%": modulo}
POWERS: Final[dict[str, Operation]] = {"**": power, "^": power}

CONSTANTS: Final[dict[str, Number]] = {
    "pi": Decimal("3.14159265358979323846264338327950288419716939937510"),
    "e": Decimal("2.71828182845904523536028747135266249775724709369995"),
}


def round_number(a: Number, decimals: Number = Fraction(0)) -> Number:
    return round_to(a, decimals)


def least(*values: Number) -> Number:
    return min(values, key=exact)


def greatest(*values: Number) -> Number:
    return max(values, key=exact)


def exact(value: Number) -> Fraction:
    return Fraction(value)


FUNCTIONS: Final[dict[str, tuple[Callable[..., Number], int, int]]] = {
    "abs": (absolute, 1, 1),
    "max": (greatest, 1, MAX_LENGTH),
    "min": (least, 1, MAX_LENGTH),
    "round": (round_number, 1, 2),
    "sqrt": (sqrt, 1, 1),
}
"""Each function with the fewest and the most values it takes."""

TOKEN: Final = re.compile(
    r"[ \t\r\n]*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<symbol>\*\*|//|[-+*/%^(),])|(?P<end>\Z))"
)
BLANKS: Final = " \t\r\n"
HINTS: Final = {"×": "write *", "·": "write *", "÷": "write /", "−": "write -", "π": "write pi", "√": "write sqrt(...)"}


def evaluate(expression: str) -> Number:
    """The value of an expression such as "2 * (3 + 4) ** 2". Raises CalculationError with the position (from 1) and what to
    fix, at once, however long or deep the expression is."""
    if len(expression) > MAX_LENGTH:
        raise CalculationError(f"the expression has {len(expression)} characters, more than {MAX_LENGTH}")
    if not expression.strip(BLANKS):
        raise CalculationError("the expression is empty; write one such as 2 * (3 + 4)")
    parser = Parser(expression)
    value = parser.sum()
    parser.expect_end()
    return value


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the expression; `kind` is a group of TOKEN; `position` counts characters from 1."""

    kind: str
    text: str
    position: int

    def __str__(self) -> str:
        name = "the end" if self.kind == "end" else f"'{abbreviate(self.text)}'"
        return f"{name} at position {self.position}"


def abbreviate(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:20]}…"


class Parser:
    """Reads an expression from left to right and computes as it goes, looking one token ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.depth = 0
        self.index = 0
        self.token = self.scan()

    def scan(self) -> Token:
        match = TOKEN.match(self.text, self.index)
        if match is None:
            raise self.unreadable()
        self.index = match.end()
        kind = match.lastgroup or "end"
        return Token(kind, match[kind], match.start(kind) + 1)

    def unreadable(self) -> CalculationError:
        rest = self.text[self.index :].lstrip(BLANKS)
        character = rest[0]
        hint = HINTS.get(character) or ("write digits as 0 to 9" if character.isnumeric() else "remove it")
        return CalculationError(f"unexpected {character!r} at position {len(self.text) - len(rest) + 1}: {hint}")

    def take(self) -> Token:
        taken, self.token = self.token, self.scan()
        return taken

    def take_symbol(self, text: str, *, instead: str) -> None:
        if self.token.text != text:
            raise CalculationError(f"expected {instead} before {self.token}")
        self.take()

    def expect_end(self) -> None:
        match self.token:
            case Token(kind="end"):
                return
            case Token(text=","):
                raise CalculationError(f"unexpected {self.token}: write numbers without thousands separators")
            case Token(text=")"):
                raise CalculationError(f"unexpected {self.token}: no '(' is open")
            case _:
                raise CalculationError(f"expected an operator, such as *, before {self.token}")

    def sum(self) -> Number:
        return self.chain(SUMS, self.product)

    def product(self) -> Number:
        return self.chain(PRODUCTS, self.signed)

    def chain(self, operations: dict[str, Operation], operand: Callable[[], Number]) -> Number:
        value = operand()
        while operation := operations.get(self.token.text):
            place = self.take()
            right = operand()
            with located(place):
                value = operation(value, right)
        return value

    def signed(self) -> Number:
        negative = False
        while self.token.text in SUMS:
            negative ^= self.take().text == "-"
        value = self.power()
        return negate(value) if negative else value

    def power(self) -> Number:
        base = self.atom()
        if (operation := POWERS.get(self.token.text)) is None:
            return base
        place = self.take()
        with self.nested(place):
            exponent = self.signed()
        with located(place):
            return operation(base, exponent)

    def atom(self) -> Number:
        if self.token.kind == "number":
            return number(self.take())
        if self.token.kind == "name":
            return self.named(self.take())
        if self.token.text == "(":
            with self.nested(self.take()):
                value = self.sum()
                self.take_symbol(")", instead="')'")
                return value
        raise CalculationError(f"expected a number before {self.token}")

    def named(self, name: Token) -> Number:
        if name.text in CONSTANTS:
            return CONSTANTS[name.text]
        if name.text not in FUNCTIONS:
            known = ", ".join([*FUNCTIONS, *CONSTANTS])
            raise CalculationError(f"unknown name {name}; known are {known}")
        function, fewest, most = FUNCTIONS[name.text]
        values = self.arguments(name)
        if not fewest <= len(values) <= most:
            count = "1 value" if most == 1 else f"{fewest} or {most} values"
            raise CalculationError(f"{name} takes {count}, not {len(values)}")
        with located(name):
            return function(*values)

    def arguments(self, name: Token) -> list[Number]:
        self.take_symbol("(", instead=f"'(' of {name.text}")
        with self.nested(name):
            values = [self.sum()]
            while self.token.text == ",":
                self.take()
                values.append(self.sum())
            self.take_symbol(")", instead="')'")
        return values

    @contextmanager
    def nested(self, place: Token) -> Generator[None]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise CalculationError(f"nested more than {MAX_DEPTH} deep at position {place.position}")
        yield
        self.depth -= 1


@contextmanager
def located(place: Token) -> Generator[None]:
    """Adds the operator's or function's position to what its calculation raises."""
    try:
        yield
    except CalculationError as error:
        raise CalculationError(f"{error}, for {place}") from error


def number(token: Token) -> Number:
    """The exact value of a number token, its exponent checked before anything is expanded."""
    digits, _, exponent = token.text.lower().partition("e")
    if len(digits) > 1 and digits[0] == "0" and digits[1] != ".":
        raise CalculationError(f"{token} starts with 0: write no leading zeros and no thousands separators")
    if len(exponent.lstrip("+-0")) > len(str(MAX_DIGITS)):
        raise CalculationError(f"{token} is out of range: its exponent is too large")
    with located(token):
        return settle(Fraction(Decimal(digits)) * Fraction(10) ** int(exponent or 0))
