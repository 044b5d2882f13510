"""The calculator's arithmetic as pure functions: exactness, limits, and errors that help."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "servers" / "calculator"))

import arithmetic
from arithmetic import MAX_DIGITS, CalculationError, display, read

thorough = settings(deadline=None, max_examples=150)
whole_numbers = st.integers(-(10**300), 10**300)


def value(number: object) -> arithmetic.Number:
    return read(number, "a")


def calculate(operation: str, *numbers: object) -> str:
    return display(getattr(arithmetic, operation)(*map(value, numbers)))[0]


@thorough
@given(whole_numbers, whole_numbers)
def test_whole_numbers_add_subtract_and_multiply_exactly(a: int, b: int):
    assert display(arithmetic.add(value(a), value(b))) == (str(a + b), a + b)
    assert display(arithmetic.subtract(value(a), value(b))) == (str(a - b), a - b)
    assert display(arithmetic.multiply(value(a), value(b))) == (str(a * b), a * b)


@thorough
@given(st.integers(-(10**40), 10**40), st.integers(-(10**20), 10**20).filter(bool))
def test_floor_division_and_remainder_follow_python(a: int, b: int):
    assert arithmetic.floor_divide(value(a), value(b)) == a // b
    assert arithmetic.modulo(value(a), value(b)) == a % b


@thorough
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_the_decimal_that_it_is_written_as(number: float):
    assume(number == 0 or abs(number) >= 1e-299)
    assert value(number) == Fraction(repr(number))
    assert float(display(value(number))[0]) == pytest.approx(number, rel=1e-14)


@thorough
@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**9))
def test_the_text_and_the_number_of_a_result_are_the_same_value(fraction: Fraction):
    text, number = display(fraction)
    assert float(text) == number
    assert "." in text or isinstance(number, int)
    assert Fraction(text) == fraction or abs(Fraction(text) - fraction) <= abs(fraction) / 10**14


@pytest.mark.parametrize(
    ("operation", "numbers", "text"),
    [
        ("add", (0.1, 0.2), "0.3"),
        ("add", (40, 2), "42"),
        ("add", (1e300, 1), "1" + "0" * 299 + "1"),
        ("subtract", (0.3, 0.1), "0.2"),
        ("multiply", (1.1, 1.1), "1.21"),
        ("multiply", (2.5, 2), "5"),
        ("multiply", (12345678.125, 87654321.875), "1082152044133896.484375"),
        ("divide", (10, 4), "2.5"),
        ("divide", (10, 3), "3.33333333333333"),
        ("divide", (2, 3), "0.666666666666667"),
        ("divide", (1, 1024), "0.0009765625"),
        ("divide", (1, 10**20), "1e-20"),
        ("divide", (10**50, 3), "3.33333333333333e+49"),
        ("divide", (10**15, 3), "333333333333333"),
        ("divide", (10**16, 3), "3.33333333333333e+15"),
        ("power", (2, -2), "0.25"),
        ("power", (2, 100), str(2**100)),
        ("power", (9, 1000), str(9**1000)),
        ("power", (2.25, 0.5), "1.5"),
        ("power", (-2, 3), "-8"),
        ("power", (-1, 10**30 + 1), "-1"),
        ("power", (0, 0), "1"),
        ("power", (0, 2.5), "0"),
        ("power", (1.0001, 5000), "1.64868005593118"),
        ("sqrt", (2.25,), "1.5"),
        ("sqrt", (2,), "1.4142135623731"),
        ("sqrt", (10**998,), "1" + "0" * 499),
        ("modulo", (-7, 3), "2"),
        ("modulo", (5.5, 0.2), "0.1"),
        ("absolute", (-0.5,), "0.5"),
        ("round_to", (2.675, 2), "2.68"),
        ("round_to", (-2.5, 0), "-3"),
        ("round_to", (1250, -2), "1300"),
        ("round_to", (0.4, 0), "0"),
    ],
)
def test_results_carry_no_binary_noise(operation: str, numbers: tuple[float, ...], text: str):
    assert calculate(operation, *numbers) == text


@pytest.mark.parametrize(
    ("operation", "numbers", "part"),
    [
        ("divide", (1, 0), "division by zero"),
        ("modulo", (1, 0), "division by zero"),
        ("power", (0, -1), "division by zero"),
        ("power", (10, 10**10), f"more than {MAX_DIGITS} digits"),
        ("power", (2, 10**999), f"more than {MAX_DIGITS} digits"),
        ("power", (1.1, 10**30), f"more than {MAX_DIGITS} digits"),
        ("power", (10, -400), "too small"),
        ("power", (2, -(10**30)), "too small"),
        ("power", (-8, 0.5), "not a real number"),
        ("multiply", (10**600, 10**600), f"more than {MAX_DIGITS} digits"),
        ("sqrt", (-1,), "negative"),
        ("round_to", (1, 0.5), "whole number"),
        ("round_to", (1, 10**6), "whole number"),
    ],
)
def test_what_has_no_answer_says_why(operation: str, numbers: tuple[float, ...], part: str):
    with pytest.raises(CalculationError, match=part) as caught:
        calculate(operation, *numbers)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (True, "not true or false"),
        ("1", "not text"),
        (None, "not null"),
        ([1], "not a list"),
        ({}, "not an object"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        (-math.inf, "finite"),
        pytest.param(10**5000, f"more than {MAX_DIGITS} digits", id="5001 digits"),
        (-(10**MAX_DIGITS), f"more than {MAX_DIGITS} digits"),
        (5e-324, "too small"),
    ],
)
def test_an_argument_that_is_no_usable_number_is_refused_by_name(number: object, part: str):
    with pytest.raises(CalculationError, match=part) as caught:
        value(number)
    assert str(caught.value).startswith("a ")


def test_the_largest_whole_number_is_accepted_and_the_next_is_not():
    largest = 10**MAX_DIGITS - 1
    assert display(value(largest)) == ("9" * MAX_DIGITS, largest)
    with pytest.raises(CalculationError):
        arithmetic.add(value(largest), value(1))
