"""The calculator's arithmetic, its limits and how results are written. Pure: no server, no parsing of expressions.

A `Fraction` is an exact value. A `Decimal` is one rounded to WORKING_DIGITS: a root, pi, or a fraction grown too long.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Underflow
from fractions import Fraction
from typing import Final, TypeAlias

Number: TypeAlias = Fraction | Decimal

MAX_DIGITS: Final = 1000
"""Whole numbers, given or computed, have at most so many digits."""
MIN_EXPONENT: Final = -300
"""Nothing but 0 is nearer to 0 than ten to this power (a JSON reader's float would take it for 0)."""
EXACT_DIGITS: Final = 30
"""A terminating decimal of at most so many significant digits is written exactly."""
SHOWN_DIGITS: Final = 15
"""Significant digits of every other result; so many survive the way through a float unchanged."""
WORKING_DIGITS: Final = 50
"""Significant digits of intermediate values that cannot be exact."""
GUARD_DIGITS: Final = 10
"""The last working digits, which rounding errors may have reached."""

LARGEST: Final = 10**MAX_DIGITS
SMALLEST: Final = Fraction(1, 10**-MIN_EXPONENT)
EXACT_BITS: Final = 7000
"""Longest numerator or denominator kept exact. More than 2 * log2(LARGEST), so every whole power in range stays exact."""
PLAIN_EXPONENT: Final = -15
"""A decimal whose first digit stands for a smaller power of ten is written with an exponent."""

WORKING: Final = Context(
    prec=WORKING_DIGITS,
    Emin=-3 * MAX_DIGITS,
    Emax=3 * MAX_DIGITS,
    traps=[InvalidOperation, DivisionByZero, Overflow, Underflow],
)
TRUSTED: Final = Context(prec=WORKING_DIGITS - GUARD_DIGITS)
EXACT: Final = Context(prec=EXACT_DIGITS)
SHOWN: Final = Context(prec=SHOWN_DIGITS)

JSON_NAMES: Final[dict[type, str]] = {bool: "true or false", type(None): "null", str: "text", list: "a list", dict: "an object"}


class CalculationError(ValueError):
    """A calculation that has no answer, or none within the limits: one short line that says what to change."""


def read(value: object, name: str) -> Number:
    """The number that a client sent as argument `name`: a float means the shortest decimal that reads back as it, so 0.1
    is one tenth. Raises CalculationError for anything but a finite number within the limits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CalculationError(f"{name} must be a number, not {JSON_NAMES.get(type(value), type(value).__name__)}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CalculationError(f"{name} must be a finite number")
        return within_limits(Fraction(Decimal(float.__repr__(value))), name)
    return within_limits(Fraction(value), name)


def display(value: Number) -> tuple[str, int | float]:
    """A result as text without noise, and as the number nearest to that text (an int where it is whole)."""
    if isinstance(value, Fraction) and value.denominator == 1:
        return format(Decimal(value.numerator), "f"), value.numerator
    shown = shorten(value).normalize(EXACT)
    number = int(shown) if shown == shown.to_integral_value() else float(shown)
    reaches_units = isinstance(number, float) or shown.adjusted() < SHOWN_DIGITS  # else plain digits would end in false zeros
    plain = reaches_units and shown.adjusted() >= PLAIN_EXPONENT
    return format(shown, "f" if plain else "e"), number


def shorten(value: Number) -> Decimal:
    if isinstance(value, Decimal):
        return SHOWN.plus(value)
    numerator, denominator = Decimal(value.numerator), Decimal(value.denominator)
    exact = EXACT.divide(numerator, denominator)
    return exact if Fraction(exact) == value else SHOWN.divide(numerator, denominator)


def add(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return settle(a + b)
    x, y = rounded(a), rounded(b)
    total = WORKING.add(x, y)
    largest = max(x.copy_abs(), y.copy_abs()).adjusted()
    cancelled = total.adjusted() < largest - (WORKING_DIGITS - GUARD_DIGITS)
    return Fraction(0) if cancelled else settle(total)


def subtract(a: Number, b: Number) -> Number:
    return add(a, negate(b))


def negate(a: Number) -> Number:
    return -a if isinstance(a, Fraction) else a.copy_negate()  # `-` on a Decimal rounds to the thread's context


def absolute(a: Number) -> Number:
    return negate(a) if a < 0 else a


def multiply(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return settle(a * b)
    return settle(WORKING.multiply(rounded(a), rounded(b)))


def divide(a: Number, b: Number) -> Number:
    if not b:
        raise CalculationError("division by zero")
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return settle(a / b)
    return settle(WORKING.divide(rounded(a), rounded(b)))


def floor_divide(a: Number, b: Number) -> Number:
    """The quotient rounded down, as in Python: -7 // 2 is -4."""
    if b and isinstance(a, Fraction) and isinstance(b, Fraction):
        return settle(Fraction(a // b))
    return settle(Fraction(math.floor(Fraction(divide(a, b)))))


def modulo(a: Number, b: Number) -> Number:
    """What `floor_divide` leaves over; it has the sign of b, as in Python."""
    if b and isinstance(a, Fraction) and isinstance(b, Fraction):
        return settle(a % b)
    return subtract(a, multiply(b, floor_divide(a, b)))


def power(base: Number, exponent: Number) -> Number:
    """The real power; 0 to the 0 is 1, as in Python and IEEE 754. Raises CalculationError where there is none."""
    if not base:
        if exponent < 0:
            raise CalculationError("division by zero: 0 to a negative power")
        return Fraction(not exponent)
    whole = exponent.numerator if isinstance(exponent, Fraction) and exponent.denominator == 1 else None
    if base < 0 and whole is None:
        raise CalculationError("a negative number to a power that is not whole is not a real number")
    if whole is not None and isinstance(base, Fraction) and bits(base) * abs(whole) <= EXACT_BITS:
        return settle(base**whole)
    if exponent == Fraction(1, 2):
        return sqrt(base)
    size = rounded_power(rounded(absolute(base)), rounded(exponent))
    return settle(size.copy_negate() if base < 0 and whole is not None and whole % 2 else size)


def rounded_power(base: Decimal, exponent: Decimal) -> Decimal:
    try:
        return WORKING.power(base, exponent)
    except Overflow as error:
        raise too_large("the result") from error
    except Underflow as error:
        raise too_small("the result") from error


def sqrt(a: Number) -> Number:
    if a < 0:
        raise CalculationError("a negative number has no real square root")
    if isinstance(a, Fraction):
        root = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
        if root * root == a:
            return root
    return settle(WORKING.sqrt(rounded(a)))


def round_to(a: Number, decimals: Number) -> Number:
    """`a` with so many digits after the point; negative `decimals` round to tens, hundreds, …; halves away from zero."""
    if not isinstance(decimals, Fraction) or decimals.denominator != 1 or abs(decimals) > MAX_DIGITS:
        raise CalculationError(f"decimals must be a whole number from -{MAX_DIGITS} to {MAX_DIGITS}")
    unit = Fraction(10) ** -decimals.numerator
    size = math.floor(abs(Fraction(a)) / unit + Fraction(1, 2)) * unit
    return settle(size if a > 0 else -size)


def settle(value: Number) -> Number:
    """A result in its proper form. A rounded value whose trusted digits end in zeros is the exact one next to it, so that
    sqrt(2) * sqrt(2) is 2. Raises CalculationError outside the limits."""
    within_limits(value, "the result")
    if isinstance(value, Fraction):
        if bits(value) <= EXACT_BITS:
            return value
        value = rounded(value)
    trusted = TRUSTED.plus(value).normalize(TRUSTED)
    return Fraction(trusted) if len(trusted.as_tuple().digits) <= EXACT_DIGITS else value


def within_limits(value: Number, name: str) -> Number:
    size = abs(Fraction(value))
    if size >= LARGEST:
        raise too_large(name)
    if 0 < size < SMALLEST:
        raise too_small(name)
    return value


def too_large(name: str) -> CalculationError:
    return CalculationError(f"{name} has more than {MAX_DIGITS} digits")


def too_small(name: str) -> CalculationError:
    return CalculationError(f"{name} is too small: nearer to 0 than 1e{MIN_EXPONENT}")


def bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def rounded(value: Number) -> Decimal:
    if isinstance(value, Decimal):
        return value
    return WORKING.divide(Decimal(value.numerator), Decimal(value.denominator))
