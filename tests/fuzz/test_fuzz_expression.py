"""The calculator's expressions beside Python's own grammar and exact fractions: the same value, or a typed complaint."""

from __future__ import annotations

import ast
import math
import re
import sys
import warnings
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from fuzzing import Edit, edits, fuzz, spoil, well_encoded
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "servers" / "calculator"))

from arithmetic import EXACT_BITS, LARGEST, MAX_DIGITS, MIN_EXPONENT, SMALLEST, CalculationError, Number, bits, display
from expression import MAX_DEPTH, MAX_LENGTH, evaluate


class Unwritable(Exception):
    """The value has no exact form here (a root, pi, a fraction grown too long), or is too deep for Python's parser."""


class Wrong(Exception):
    """There is no value within the limits, or the text is none of our expressions."""


def oracle(text: str) -> Fraction:
    """What Python's parser and exact fractions make of `text`. Raises Wrong or Unwritable."""
    if len(text) > MAX_LENGTH or not re.fullmatch(r"[0-9A-Za-z_.+\-*/%^(), \t\r\n]*", text) or re.search(r",\s*\)", text):
        raise Wrong  # Python knows more characters, and allows a comma behind the last argument
    plain = re.sub(r"\s", " ", text).strip().replace("^", "**")
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(plain, mode="eval").body
        return compute(tree, plain)
    except SyntaxError as error:
        raise Wrong from error
    except (RecursionError, MemoryError) as error:
        raise Unwritable from error


def compute(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return literal(text[node.col_offset : node.end_col_offset])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -compute(operand, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return compute(operand, text)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
            return OPERATORS[type(operator)](compute(left, text), compute(right, text))
        case ast.Name(id="pi" | "e"):
            raise Unwritable
        case ast.Call(func=ast.Name(id=name) as function, args=arguments, keywords=[]) if name in FUNCTIONS:
            if not text[function.end_col_offset :].lstrip().startswith("("):  # (max)(1)
                raise Wrong
            return called(name, [compute(argument, text) for argument in arguments])
    raise Wrong


def literal(text: str) -> Fraction:
    if not re.fullmatch(r"(?!0[0-9])([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        raise Wrong
    digits, _, exponent = text.lower().partition("e")
    if abs(int(exponent or 0)) >= 10_000:
        raise Wrong
    return settled(Fraction(digits) * Fraction(10) ** int(exponent or 0))


def settled(value: Fraction) -> Fraction:
    if abs(value) >= LARGEST or 0 < abs(value) < SMALLEST:
        raise Wrong
    if bits(value) > EXACT_BITS:
        raise Unwritable
    return value


def divided(operation: Callable[[Fraction, Fraction], Fraction]) -> Callable[[Fraction, Fraction], Fraction]:
    def divide(a: Fraction, b: Fraction) -> Fraction:
        if not b:
            raise Wrong
        return settled(Fraction(operation(a, b)))

    return divide


def raised(base: Fraction, exponent: Fraction) -> Fraction:
    if not base:
        if exponent < 0:
            raise Wrong
        return Fraction(0 if exponent else 1)
    if exponent.denominator != 1 and base < 0:
        raise Wrong
    size = digits_of(base) * exponent
    if size > MAX_DIGITS + 1 or size < MIN_EXPONENT - 1:
        raise Wrong
    if exponent == Fraction(1, 2):
        return rooted(base)
    if exponent.denominator != 1 or bits(base) * abs(exponent) > EXACT_BITS:
        raise Unwritable
    return settled(base**exponent.numerator)


def digits_of(value: Fraction) -> Fraction:
    """The decimal logarithm of the value's size."""
    return Fraction(math.log10(abs(value.numerator)) - math.log10(value.denominator))


def rooted(value: Fraction) -> Fraction:
    if value < 0:
        raise Wrong
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root**2 != value:
        raise Unwritable
    return root


def called(name: str, values: list[Fraction]) -> Fraction:
    least, most, function = FUNCTIONS[name]
    if not least <= len(values) <= most:
        raise Wrong
    return function(*values)


def rounded(value: Fraction, decimals: Fraction = Fraction(0)) -> Fraction:
    if decimals.denominator != 1 or abs(decimals) > MAX_DIGITS:
        raise Wrong
    unit = Fraction(10) ** -decimals.numerator
    whole, rest = divmod(abs(value), unit)
    return settled((whole + (2 * rest >= unit)) * unit * (1 if value > 0 else -1))


OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: settled(a + b),
    ast.Sub: lambda a, b: settled(a - b),
    ast.Mult: lambda a, b: settled(a * b),
    ast.Div: divided(lambda a, b: a / b),
    ast.FloorDiv: divided(lambda a, b: Fraction(a // b)),
    ast.Mod: divided(lambda a, b: a % b),
    ast.Pow: raised,
}
FUNCTIONS: dict[str, tuple[int, int, Callable[..., Fraction]]] = {
    "abs": (1, 1, abs),
    "max": (1, MAX_LENGTH, lambda *values: max(values)),
    "min": (1, MAX_LENGTH, lambda *values: min(values)),
    "round": (1, 2, rounded),
    "sqrt": (1, 1, rooted),
}

LITERALS = ["0", "1", "2", "3", "7", "10", "49", ".5", "0.25", "1.", "1e3", "2.5E-1", "1e-7", "0.1", "1e299", "1e-300", "pi"]
LITERALS += ["1e999", "9e998", "1e1000", "1e-301", "9" * 20, "123456789.000000001", "9" * 400, "0." + "3" * 60, "e"]
NUMBERS = st.sampled_from(LITERALS) | st.integers(0, 10**6).map(str)
FORMS = ["{t} + {n}", "{n} - {t}", "{t} - {n}", "{t} * {n}", "{n}*{t}", "{t} / {n}", "{n}/({t})", "{t} // {n}", "{n} // ({t})"]
FORMS += ["{t} % {n}", "{n} % ({t})", "-{t}", "-({t})", "+ -{t}", "({t})", "{t} ** 2", "({t})**2", "({t}) ^ -3", "2**({t})"]
FORMS += ["({t}) ** {n}", "{n}**{t}", "{t} ** .5", "abs({t})", "max({t}, {n})", "min( {n},\t{t} )", "round({t})"]
FORMS += ["sqrt({t})", "({t}) * ({t})", "({t}) - ({t}) / 3", "sqrt(({t}) ** 2)", "max({t}, 1, {n}, {t})", "round({n}, -({t}))"]
FORMS += ["round({t}, {n})"]


def grown(number: str, steps: list[tuple[str, str]]) -> str:
    text = number
    for form, other in steps:
        text = form.format(t=text, n=other)
    return text


GROWN = st.builds(grown, NUMBERS, st.lists(st.tuples(st.sampled_from(FORMS), NUMBERS), max_size=7))
PIECES = [*"+-*/%^(),. \n", "**", "//", "e", "pi", "sqrt", "max(", "round", "abs(", "0", "007", "1_0", "1e", "e5", "1e9999"]
PIECES += ["1e99999", "**-", "9**9**9", "(" * 49, ")" * 49, "x", "__import__", "True", "lambda", "1j", "0x1", "if", "'", '"']
PIECES += [*"=!#\\", "\x00", "\ud800", "１", "٣", "π", "×", "\u2028", "\N{NO-BREAK SPACE}", "1" * 600, "- " * 300, "nan", "inf"]
PIECES += ["NaN", "1e+", "..", ":="]
TOKENS = re.compile(r"(\d+|[a-z]+|\*\*|//|[^\w\s]|\s+)")


def check(text: str) -> None:
    """The evaluator agrees with the oracle, and what it says can be shown."""
    wanted, value = expected(text), outcome(text)
    if isinstance(value, str):
        assert well_encoded(value)
        assert len(value) < 160
        too_deep = "nested more than" in value and len(re.findall(r"\(|\*\*|\^", text)) > MAX_DEPTH
        assert not isinstance(wanted, Fraction) or too_deep
    else:
        assert wanted is not Wrong
        assert wanted in (value, Unwritable)
        check_shown(value)


def expected(text: str) -> Fraction | type[Exception]:
    try:
        return oracle(text)
    except (Wrong, Unwritable) as error:
        return type(error)


def outcome(text: str) -> Number | str:
    try:
        return evaluate(text)
    except CalculationError as error:
        return str(error)


def check_shown(value: Number) -> None:
    text, number = display(value)
    shown = Fraction(text)
    assert len(text) <= MAX_DIGITS + 1
    assert number == (shown if isinstance(number, int) else float(shown))
    assert shown == value or abs(shown - Fraction(value)) <= abs(shown) / 10**14
    assert abs(shown) <= LARGEST
    assert not shown or abs(shown) >= SMALLEST * (1 - Fraction(1, 10**14))


@fuzz(0.5, text=GROWN)
def test_an_expression_has_the_value_that_exact_fractions_have(text: str):
    check(text)


@fuzz(0.35, text=GROWN | st.text(max_size=20), changes=edits(PIECES))
def test_a_spoiled_expression_means_what_python_reads_in_it_or_is_refused(text: str, changes: list[Edit]):
    check(spoil(text, changes, TOKENS))


NESTS = {"(": ")", "sqrt(": ")", "1**": "", "-": "", "+-": "", "abs(1-": ")", "max(1,": ")", "2^(": ")"}


@fuzz(0.05, kind=st.sampled_from(list(NESTS)), depth=st.integers(1, 120) | st.integers(1, 10_000))
def test_depth_has_one_limit_and_length_another(kind: str, depth: int):
    text = kind * depth + "1" + NESTS[kind] * depth
    levels = depth * (2 if kind == "2^(" else 1) if kind not in ("-", "+-") else 0
    if len(text) > MAX_LENGTH or levels > MAX_DEPTH:
        with pytest.raises(CalculationError, match="characters, more than" if len(text) > MAX_LENGTH else "nested more than"):
            evaluate(text)
    elif kind != "2^(" or depth < 4:
        assert evaluate(text) in (-1, 0, 1, 2, 4, 16)


PRECISE = Context(prec=120, Emin=-99999, Emax=99999)
POSITIVE: dict[str, Callable[[Decimal, Decimal], Decimal]] = {
    "{t} + {n}": PRECISE.add,
    "({t}) * {n}": PRECISE.multiply,
    "({t}) / {n}": PRECISE.divide,
    "{n} / ({t})": lambda t, n: PRECISE.divide(n, t),
    "sqrt({t})": lambda t, n: PRECISE.sqrt(t),
    "sqrt({n}) * ({t})": lambda t, n: PRECISE.multiply(PRECISE.sqrt(n), t),
    "({t}) ** 3": lambda t, n: PRECISE.power(t, 3),
    "({t}) ** -1.5": lambda t, n: PRECISE.power(t, Decimal("-1.5")),
    "({t}) ^ (1/2)": lambda t, n: PRECISE.sqrt(t),
    "max({t}, {n})": max,
    "abs(-({t}))": lambda t, n: t,
}
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")


STEPS = st.lists(st.tuples(st.sampled_from(list(POSITIVE)), st.integers(1, 10**4)), max_size=6)


@fuzz(0.1, first=st.integers(1, 10**6), steps=STEPS)
def test_what_is_not_exact_is_right_to_many_digits(first: int, steps: list[tuple[str, int]]):
    text, value = f"{first} * pi", PRECISE.multiply(Decimal(first), PI)
    beyond = False
    for form, number in steps:
        text, value = form.format(t=text, n=number), POSITIVE[form](value, Decimal(number))
        beyond = beyond or value.adjusted() >= MAX_DIGITS - 1 or value.adjusted() <= MIN_EXPONENT
    found = outcome(text)
    if isinstance(found, str):
        assert beyond  # on the way, perhaps: (… ** -1.5) + 1
    else:
        assert abs(Fraction(found) - Fraction(value)) <= Fraction(value) / 10**38
