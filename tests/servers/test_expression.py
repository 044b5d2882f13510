"""The calculator's expressions: what they mean, and what a wrong one is told."""

from __future__ import annotations

import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "servers" / "calculator"))

from arithmetic import MAX_DIGITS, CalculationError, display
from expression import MAX_DEPTH, MAX_LENGTH, evaluate

thorough = settings(deadline=None, max_examples=150)


def solve(expression: str) -> str:
    return display(evaluate(expression))[0]


def complaint(expression: str) -> str:
    with pytest.raises(CalculationError) as caught:
        display(evaluate(expression))
    return str(caught.value)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("-2 ** 2", "-4"),
        ("2 ** 3 ** 2", "512"),
        ("2 ^ 10", "1024"),
        ("2 ** -1", "0.5"),
        ("2 - 3 - 4", "-5"),
        ("7 // 2 * 2 + 7 % 2", "7"),
        ("-7 // 2", "-4"),
        ("--3 + +4", "7"),
        ("\t.5 + 1.\n", "1.5"),
        ("1.5e3 + 1E-1", "1500.1"),
        ("1e400 / 1e399", "10"),
        ("1e400", "1" + "0" * 400),
        ("sqrt(16) + abs(-3)", "7"),
        ("max(1, 2, 3) - min(4, 5)", "-1"),
        ("min(pi, e)", "2.71828182845905"),
        ("round(2.5) + round(2.345, 2)", "5.35"),
        ("1/3 + 1/3 + 1/3", "1"),
        ("1/3 * 3", "1"),
        ("2 * pi", "6.28318530717959"),
        ("sqrt(2) * sqrt(2)", "2"),
        ("sqrt(2) ** 2 // 2", "1"),
        ("sqrt(2) + sqrt(3) - sqrt(2) - sqrt(3)", "0"),
        ("8 ** (1 / 3)", "2"),
        ("3.33 ** 500", "1.66769548568381e+261"),
        ("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, "1"),
        ("-" * 900 + "1", "1"),
        ("0.1 + " * 150 + "0.1", "15.1"),
    ],
)
def test_expressions_have_their_usual_meaning(expression: str, text: str):
    assert solve(expression) == text


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("1 +", "expected a number before the end at position 4"),
        ("* 2", "expected a number before '*' at position 1"),
        ("(1 + 2", "expected ')' before the end at position 7"),
        ("1 + 2)", "')' at position 6"),
        ("()", "expected a number before ')' at position 2"),
        ("2 pi", "expected an operator, such as *, before 'pi' at position 3"),
        ("2(3)", "expected an operator, such as *, before '(' at position 2"),
        ("1.2.3", "'.3' at position 4"),
        ("1,000", "thousands separators"),
        ("max(1,000)", "'000' at position 7 starts with 0"),
        ("007", "starts with 0"),
        ("1_000", "'_000' at position 2"),
        ("__import__('os')", "unknown name '__import__' at position 1"),
        ("x" * 900, "unknown name 'xxxxxxxxxxxxxxxxxxxx…'"),
        ("1 + 'os'", 'unexpected "\'" at position 5'),
        ("１+１", "unexpected '１' at position 1: write digits as 0 to 9"),
        ("2 + ٣", "unexpected '٣' at position 5: write digits as 0 to 9"),
        ("3 × 4", "unexpected '×' at position 3: write *"),
        ("1\N{NO-BREAK SPACE}+ 1", "position 2"),
        ("1\x00", "unexpected '\\x00'"),
        ("sqrt", "expected '(' of sqrt"),
        ("sqrt(1, 2)", "takes 1 value, not 2"),
        ("round(1, 2, 3)", "takes 1 or 2 values, not 3"),
        ("sqrt(-1)", "'sqrt' at position 1"),
        ("1 / 0", "division by zero, for '/' at position 3"),
        ("1 % (2 - 2)", "division by zero, for '%' at position 3"),
        ("9**9**9", f"more than {MAX_DIGITS} digits, for '**' at position 2"),
        ("9" * 995 + "*9**9", f"more than {MAX_DIGITS} digits, for '*'"),
        ("1e1000", f"more than {MAX_DIGITS} digits"),
        ("1e-301", "too small"),
        ("1e999999999999999999", "exponent is too large"),
        ("1e" + "9" * 900, "exponent is too large"),
        ("(" * 10_000 + "1" + ")" * 10_000, "20001 characters"),
        ("(" * 400 + "1" + ")" * 400, f"nested more than {MAX_DEPTH} deep at position {MAX_DEPTH + 1}"),
        ("sqrt(" * 150 + "1" + ")" * 150, f"nested more than {MAX_DEPTH} deep"),
        ("1" + "**1" * 300, f"nested more than {MAX_DEPTH} deep"),
        ("7" * 10_000_000, f"10000000 characters, more than {MAX_LENGTH}"),
    ],
    ids=lambda text: text[:30],
)
def test_a_wrong_expression_names_the_place_and_what_to_fix(expression: str, part: str):
    message = complaint(expression)
    assert part in message
    assert len(message) < 120
    assert "\n" not in message


def test_results_of_full_length_are_written_where_python_converts_fewer_digits():
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(sys.int_info.str_digits_check_threshold)
    try:
        assert solve("9" * 1000) == "9" * 1000
    finally:
        sys.set_int_max_str_digits(before)


Pair = tuple[str, Fraction]


def literal(digits: int, places: int) -> Pair:
    text = format(Decimal(digits).scaleb(-places), "f")
    return text, Fraction(text)


def operated(left: Pair, operator: str, right: Pair) -> Pair:
    (left_text, a), (right_text, b) = left, right
    assume(operator in "+-*" or b)
    known = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b, "%": lambda: a % b}
    return f"({left_text} {operator} {right_text})", Fraction(known[operator]() if operator != "//" else a // b)


literals = st.builds(literal, st.integers(0, 10**6), st.integers(0, 3))
expressions = st.recursive(
    literals,
    lambda inner: st.one_of(
        st.builds(operated, inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner),
        st.builds(lambda pair: (f"-{pair[0]}", -pair[1]), inner),
        st.builds(lambda pair, n: (f"{pair[0]} ** {n}" if pair[0][0] != "-" else pair[0], pair[1]), inner, st.just(1)),
    ),
    max_leaves=8,
)


@thorough
@given(expressions)
def test_evaluating_agrees_with_fractions(pair: Pair):
    expression, expected = pair
    assert evaluate(expression) == expected


@thorough
@given(st.lists(st.integers(1, 99), min_size=2, max_size=12), st.data())
def test_operators_bind_as_in_python(numbers: list[int], data: st.DataObject):
    operators = [data.draw(st.sampled_from(["+", "-", "*", "//", "%", "- -", "* -"])) for _ in numbers[1:]]
    expression = "".join(f"{n} {o} " for n, o in zip(numbers, operators, strict=False)) + str(numbers[-1])
    oracle = eval(expression)  # its own numbers and operators only
    assert evaluate(expression) == oracle


@thorough
@given(st.text("0123456789.eE+-*/%^(), sqrtabminxpo１\n", max_size=60))
def test_any_text_has_a_value_or_a_short_complaint(text: str):
    try:
        outcome = display(evaluate(text))[0]
        Fraction(outcome)
    except CalculationError as error:
        outcome = str(error)
    assert 0 < len(outcome) <= MAX_DIGITS + 1
    assert "\n" not in outcome
