"""The calculator's questions, read and worked out a second time, and its rewards on hand-made trajectories."""

from __future__ import annotations

import ast
import json
import operator
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from art_mcp.environment import load_environment, module_of
from art_mcp.errors import EnvironmentLoadError
from art_mcp.types import Malformed, MalformedKind, Scenario, StopReason, ToolCall, ToolResult, ToolUse, Trajectory

ROOT = Path(__file__).parents[2]
FILE = ROOT / "environments" / "calculator.py"
SPLITS = ("train", "test", "test-wordings", "test-ranges")
LEVELS = range(1, 9)

calculator = module_of(FILE)
default = calculator.environment()
arithmetic = module_of(ROOT / "servers" / "calculator" / "arithmetic.py")


def questions(split, level, *, decimals=False):
    return calculator.questions(split, level, decimals=decimals)


def kinds(split, level):
    return {tuple(question.facts["kinds"]) for question in questions(split, level)}


# A second, independent calculator.

EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
BY_NAME = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv}


def exact(node):
    if isinstance(node, ast.BinOp):
        return EXACT[type(node.op)](exact(node.left), exact(node.right))
    return Fraction(repr(node.value))


def value_of(question):
    return exact(ast.parse(question.facts["expression"], mode="eval").body)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_reference_steps_and_answer_are_those_of_the_expression(split, level):
    for question in questions(split, level)[:1000]:
        steps = question.facts["steps"]
        value = BY_NAME[steps[-1]["name"]](*map(Fraction, steps[-1]["arguments"].values()))
        assert value_of(question) == value == Fraction(question.facts["answer"]), question
        assert len(steps) == question.level == level
        assert abs(value) <= 999_999


@pytest.mark.parametrize(("split", "level"), [("train", 1), ("test", 2), ("test-wordings", 3), ("test-ranges", 2), ("test", 5)])
def test_decimal_answers_are_the_exact_value_rounded(split, level):
    for question in questions(split, level, decimals=True)[:300]:
        places = question.facts["decimals"]
        nearest = round(value_of(question) * 10**places)
        assert Fraction(question.facts["answer"]) == Fraction(nearest, 10**places), question
        assert question.prompt.endswith(f" Round to {places} decimal{'s' if places > 1 else ''}.")
        written = re.findall(r"\d+\.(\d+)", question.prompt)
        assert all(len(decimals) <= 2 for decimals in written), question.prompt


@pytest.mark.parametrize("level", [2, 3, 5])
def test_reference_steps_pass_on_exactly_what_the_calculator_shows(level):
    for question in questions("test", level, decimals=True)[:200]:
        shown = set()
        for step in question.facts["steps"]:
            numbers = {name: arithmetic.read(value, name) for name, value in step["arguments"].items()}
            written = [value for value in step["arguments"].values() if str(value) not in question.prompt]
            assert shown.issuperset(written), question
            shown.add(arithmetic.display(getattr(arithmetic, step["name"])(*numbers.values()))[1])


def test_decimal_questions_have_divisions_that_do_not_come_out_even():
    asked = questions("train", 1, decimals=True)
    assert sum(value_of(question).denominator not in (1, 2, 4, 5, 10, 20, 25, 50, 100) for question in asked) > 100


# A reader of the questions, written from their English and not from the environment's tables.

N = r"(-?\d+)"
MEANINGS = {
    f"add {N} and {N}|add {N} to {N}|adding {N} and {N}|{N} plus {N}|sum of {N} and {N}|{N} (?:is )?increased by {N}|"
    f"{N} more than {N}|start with {N} and add {N}|take {N} and add {N} to it|{N} is added to {N}|{N} and {N} make together|"
    f"has {N} apples and gets {N} more": lambda x, y: x + y,
    f"{N} minus {N}|difference between {N} and {N}|{N} (?:is )?reduced by {N}|start with {N} and subtract {N}|"
    f"take {N} and subtract {N} from it|has {N} apples and sells {N} of them": lambda x, y: x - y,
    f"subtract {N} from {N}|subtracting {N} from {N}|take {N} away from {N}|{N} less than {N}|"
    f"{N} (?:is )?subtracted from {N}": lambda x, y: y - x,
    f"multiply {N} by {N}|multiply {N} and {N}|multiplying {N} by {N}|{N} times {N}|product of {N} and {N}|"
    f"{N} (?:is )?multiplied by {N}|start with {N} and multiply by {N}|take {N} and multiply it by {N}|"
    f"has {N} boxes with {N} apples in each|costs {N} dollars. how many dollars do {N} tickets": lambda x, y: x * y,
    f"divide {N} by {N}|dividing {N} by {N}|{N} (?:is )?divided by {N}|quotient of {N} and {N}|"
    f"start with {N} and divide by {N}|take {N} and divide it by {N}|split {N} into {N} equal parts|"
    f"puts {N} apples into {N} boxes": Fraction,
    f"times does {N} go into {N}": lambda x, y: Fraction(y, x),
}
NOUN = f"the (?:sum|product|quotient) of {N} and {N}|the difference between {N} and {N}|"
NOUN += f"the result of (?:adding|subtracting|multiplying|dividing) {N} (?:and|from|by) {N}"
SHORT = {  # what a clause leaves out
    rf"^add {N}$": r"add \1 to {r}",
    rf"^take {N} away$": r"take \1 away from {r}",
    rf"^(multiply|divide) by {N}$": r"\1 {r} by \2",
    rf"^(increased|reduced|multiplied|divided) by {N}$": r"{r} \1 by \2",
    rf"^subtracted from {N}$": r"{r} subtracted from \1",
}


def meaning(phrase):
    """The value of a phrase with one operation. Two readings with different values are a failure."""
    found = set()
    for pattern, function in MEANINGS.items():
        for match in re.finditer(pattern, phrase):
            x, y = (int(group) for group in match.groups() if group is not None)
            found.add(function(x, y))
    assert len(found) == 1, (phrase, found)
    return found.pop()


def read_phrase(text):
    while "(" in text:
        text = re.sub(r"\(([^()]*)\)", lambda match: str(read_phrase(match[1])), text)
    while re.search(NOUN, text):
        text = re.sub(NOUN, lambda match: str(meaning(match[0])), text)
    alone = re.fullmatch(rf"(?:what is )?{N}\??", text)
    return Fraction(alone[1]) if alone else meaning(text)


def read(prompt):
    """The value that a question asks for."""
    text = prompt.lower().removesuffix(" what is the final result?")
    if text.startswith("step 1:"):
        results = []
        for line in re.findall(r"step \d+: (.*?)\.", text):
            results.append(read_phrase(re.sub(r"the result of step (\d+)", lambda m: str(results[int(m[1]) - 1]), line)))
        return results[-1]
    first, *clauses = re.split(", (?:and )?then ", text.rstrip(".?"))
    value = read_phrase(first)
    for clause in clauses:
        for pattern, full in SHORT.items():
            clause = re.sub(pattern, full, clause)  # noqa: PLW2901
        clause = re.sub(r"the result|what you get|\{r\}", str(value), clause)  # noqa: PLW2901
        value = read_phrase(clause)
    return value


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_words_of_a_question_mean_what_its_answer_says(split, level):
    for question in questions(split, level)[: 600 if level < 3 else 60]:
        assert read(question.prompt) == Fraction(question.facts["answer"]), question.prompt


@pytest.mark.parametrize("decimals", [False, True])
def test_no_two_questions_have_equal_words(decimals):
    environment = calculator.environment("1-2", decimals=decimals)
    for split in SPLITS[1:] if decimals else SPLITS:
        asked = environment.scenarios(split)
        assert len({question.prompt for question in asked}) == len(asked)
        assert len({question.id for question in asked}) == len(asked)


@pytest.mark.parametrize("levels", ["1-2", "3-8"])
def test_no_training_question_is_in_a_test_split(levels):
    environment = calculator.environment(levels)
    trained = {question.prompt for question in environment.scenarios("train")}
    for split in SPLITS[1:]:
        assert trained.isdisjoint(question.prompt for question in environment.scenarios(split)), split


def test_no_pair_of_wordings_of_the_test_split_is_trained_but_each_wording_is():
    trained, tested = kinds("train", 2), kinds("test", 2)
    assert trained.isdisjoint(tested)
    assert 250 <= len(trained | tested) <= 300
    assert 0.25 <= len(tested) / len(trained | tested) <= 0.35
    seen = {wording for pair in trained for wording in pair}
    assert seen >= {wording for pair in tested for wording in pair}
    assert kinds("train", 1) == kinds("test", 1)
    assert 28 <= len(kinds("train", 1)) <= 32


@pytest.mark.parametrize("level", range(3, 9))
def test_longer_training_questions_do_not_begin_with_a_tested_pair(level):
    tested = kinds("test", 2)
    assert not [wordings for wordings in kinds("train", level) if wordings[:2] in tested]


def test_no_pair_of_numbers_of_the_test_split_is_trained_at_level_one():
    def numbers(split):
        steps = (question.facts["steps"][0] for question in questions(split, 1))
        return {(step["name"], *sorted(step["arguments"].values())) for step in steps}

    assert numbers("train").isdisjoint(numbers("test"))


@pytest.mark.parametrize("level", LEVELS)
def test_no_wording_of_test_wordings_is_trained(level):
    trained = {wording for wordings in kinds("train", level) for wording in wordings}
    assert trained.isdisjoint(wording for wordings in kinds("test-wordings", level) for wording in wordings)


def first_range(question):
    """The larger number that the first operation is made of: for a division, of divisor and quotient."""
    step = question.facts["steps"][0]
    a, b = step["arguments"].values()
    return {"add": min(a, b), "subtract": min(a, b), "multiply": max(a, b), "divide": max(b, a // b)}[step["name"]]


@pytest.mark.parametrize("level", [1, 2, 3, 8])
def test_the_numbers_of_test_ranges_are_beyond_those_of_training(level):
    assert max(map(first_range, questions("train", level))) <= 99
    assert min(map(first_range, questions("test-ranges", level))) >= 100


def test_training_is_a_fair_mix_from_its_beginning():
    trained = default.scenarios("train")
    assert len(trained) == 6000
    for part in (trained, trained[:100], trained[:1000], trained[5000:]):
        assert 0.38 <= sum(question.level == 2 for question in part) / len(part) <= 0.42
    operations = Counter(question.facts["steps"][-1]["name"] for question in trained)
    assert min(operations.values()) > 0.18 * len(trained)
    assert max(Counter(question.facts["answer"] for question in trained).values()) < 0.03 * len(trained)


def test_test_splits_have_600_questions_of_each_level():
    for split in SPLITS[1:]:
        assert Counter(question.level for question in default.scenarios(split)) == {1: 600, 2: 600}


def test_all_operand_orders_occur_at_level_two():
    orders = {
        (step["name"], "a" if step["arguments"]["a"] == first else "b")
        for question in questions("train", 2)
        for first, step in [(value_of_first(question), question.facts["steps"][1])]
        if step["arguments"]["a"] != step["arguments"]["b"]
    }
    assert orders >= {("subtract", "a"), ("subtract", "b"), ("divide", "a"), ("divide", "b")}


def value_of_first(question):
    step = question.facts["steps"][0]
    return BY_NAME[step["name"]](*map(Fraction, step["arguments"].values()))


def test_few_results_are_negative_and_no_intermediate_one_is():
    trained = default.scenarios("train")
    assert 0 < sum(question.facts["answer"].startswith("-") for question in trained) < 0.05 * len(trained)
    assert all(
        argument > 0 for question in trained for step in question.facts["steps"] for argument in step["arguments"].values()
    )


def test_the_vocabulary_of_levels_one_and_two_is_small():
    words = {
        word for split in SPLITS for question in default.scenarios(split) for word in re.findall("[a-z]+", question.prompt)
    }
    assert 50 < len(words) < 250


FINGERPRINT = """
import hashlib
from art_mcp.environment import load_environment
environment = load_environment({path!r}, levels="1-2")
text = repr([environment.scenarios(split) for split in ("train", "test")])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_scenarios_are_the_same_in_every_process():
    def fingerprint(seed):
        code = FINGERPRINT.format(path=str(FILE))
        variables = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True).stdout

    assert fingerprint("1") == fingerprint("2") != ""


def test_facts_are_json():
    for question in [*default.scenarios("train")[:50], *questions("train", 4, decimals=True)[:50]]:
        assert json.loads(json.dumps(question.facts)) == question.facts


# Options.


@pytest.mark.parametrize(
    ("given", "levels"),
    [("1-2", {1, 2}), ("1,2,4", {1, 2, 4}), (3, {3}), ("1,2-3", {1, 2, 3}), ("2-2", {2})],
)
def test_levels_are_read_as_the_command_line_gives_them(given, levels):
    environment = load_environment(str(FILE), levels=given)
    assert {question.level for question in environment.scenarios("test")} == levels
    assert environment.limits.turns == max(levels) + 4


@pytest.mark.parametrize("given", ["", "0", "9", "1-", "5-2", "two", "1-2-3", "-1", "1-99999999999"])
def test_levels_that_are_none_are_refused_with_examples(given):
    with pytest.raises(EnvironmentLoadError, match="1-2 or 1,2,5"):
        load_environment(str(FILE), levels=given)


@pytest.mark.parametrize(("given", "offered"), [(True, True), ("true", True), ("True", True), ("false", False), (False, False)])
def test_switches_are_read_as_the_command_line_gives_them(given, offered):
    assert ("evaluate" in (load_environment(str(FILE), evaluate=given).tools or ())) is offered
    assert ("Round to" in load_environment(str(FILE), decimals=given).scenarios("test")[0].prompt) is offered


def test_a_switch_that_is_none_is_refused():
    with pytest.raises(EnvironmentLoadError, match="true or false"):
        load_environment(str(FILE), evaluate="maybe")


def test_an_unknown_split_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"test-ranges.*'dev'"):
        default.scenarios("dev")


# Solutions.


def test_a_solution_is_one_call_an_operation_and_a_bare_number():
    question = next(question for question in default.scenarios("train") if question.level == 2)
    calls, answer = default.solution(question)
    assert [(call.name, call.arguments) for call in calls] == [(s["name"], s["arguments"]) for s in question.facts["steps"]]
    assert re.fullmatch(r"-?\d+", answer)


def test_with_evaluate_several_operations_are_one_call_of_it():
    environment = calculator.environment("1-3", evaluate="true")
    assert environment.tools == ("add", "subtract", "multiply", "divide", "evaluate")
    for question in environment.scenarios("test")[:60]:
        calls, _ = environment.solution(question)
        if question.level == 1:
            assert calls[0].name in BY_NAME
        else:
            assert [(call.name, call.arguments) for call in calls] == [
                ("evaluate", {"expression": question.facts["expression"]})
            ]


# Rewards.


def attempt(answer, *, expected="42", level=1, calls=(), stop_reason=StopReason.ANSWERED):
    facts = {"answer": expected, "decimals": None, "steps": [], "expression": expected, "kinds": []}
    uses = tuple(ToolUse(call, ToolResult("42"), turn) for turn, call in enumerate(calls))
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": answer})
    return Trajectory(Scenario("s", "?", level, facts), "r", messages, (), stop_reason, uses)


def rewards(trajectory):
    return {name: reward(trajectory) for name, reward in default.rewards.items()}


CALL = ToolCall("add", {"a": 40, "b": 2})
BROKEN = Malformed("{", "not JSON", MalformedKind.INVALID_JSON)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", "42"),
        ("42.0", "42"),
        ("**42**", "42"),
        ("The answer is 42.", "42"),
        ("12 + 30 = 42", "42"),
        ("$\\boxed{42}$", "42"),
        ("1,234", "1234"),
        ("It is 1,234,567.50.", "1234567.5"),
        ("-7", "-7"),
        ("\u22127", "-7"),
        ("The result is **-7**.", "-7"),
        ("5-7=-2", "-2"),
        ("9-7", "7"),
        (".5", "0.50"),
        ("3.10", "3.1"),
        ("-0", "0"),
    ],
)
def test_an_answer_is_right_in_whatever_form_its_last_number_is_written(answer, expected):
    assert rewards(attempt(answer, expected=expected)) == {"correct": 1.0, "malformed": 0.0, "needless": 0.0}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "42"),
        ("forty-two", "42"),
        ("-42", "42"),
        ("42", "-42"),
        ("420", "42"),
        ("42.4", "42"),
        ("It is 42, or 43.", "42"),
        (" ".join(map(str, range(1000))), "42"),
        ("42 " + ", ".join(map(str, range(100))), "42"),
        ("3.14159", "3.14"),
        ("1e99999999", "42"),
        ("9" * 10_000, "42"),
        ("\u0664\u0662", "42"),
    ],
)
def test_an_answer_whose_last_number_is_another_one_is_wrong(answer, expected):
    assert rewards(attempt(answer, expected=expected))["correct"] == 0.0


@pytest.mark.parametrize("stop_reason", [reason for reason in StopReason if reason is not StopReason.ANSWERED])
def test_a_rollout_that_did_not_end_with_an_answer_is_wrong(stop_reason):
    assert rewards(attempt("42", stop_reason=stop_reason))["correct"] == 0.0


@pytest.mark.parametrize(("broken", "cost"), [(1, -0.1), (2, -0.2), (3, -0.3), (9, -0.3)])
def test_malformed_calls_cost_a_tenth_each_and_three_at_most(broken, cost):
    trajectory = attempt("42", calls=(BROKEN,) * broken)
    assert rewards(trajectory) == {"correct": 1.0, "malformed": pytest.approx(cost), "needless": 0.0}


@pytest.mark.parametrize(("calls", "cost"), [(0, 0.0), (1, 0.0), (2, 0.0), (3, -0.05), (6, -0.2), (30, -0.2)])
def test_calls_beyond_the_number_of_operations_cost_a_little(calls, cost):
    assert rewards(attempt("42", level=2, calls=(CALL,) * calls))["needless"] == pytest.approx(cost)


def test_a_right_answer_pays_more_than_any_wrong_one_whatever_it_took():
    worst = sum(rewards(attempt("42", calls=(CALL, BROKEN) * 20)).values())
    best_wrong = sum(rewards(attempt("41", calls=(CALL,))).values())
    assert worst > best_wrong


def test_every_reference_answer_is_right():
    for question in default.scenarios("test"):
        calls, answer = default.solution(question)
        uses = tuple(ToolUse(call, ToolResult(""), turn) for turn, call in enumerate(calls))
        messages = ({"role": "assistant", "content": answer},)
        trajectory = Trajectory(question, "r", messages, (), StopReason.ANSWERED, uses)
        assert sum(rewards(trajectory).values()) == 1.0
