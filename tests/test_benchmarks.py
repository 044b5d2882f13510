"""The benchmarks against peers run, compare what they say and report in one form; no figure of theirs is judged here."""

import json
import math
from argparse import Namespace

import pytest

from art_mcp.core.arguments import validate
from art_mcp.core.parse import parse_calls
from art_mcp.types import ToolCall
from benchmarks import parser, start, template, tool_calls, tool_cpu
from benchmarks.open_door import mcnemar
from benchmarks.pairs import compare, interval, rounds, settled, time_of
from benchmarks.report import QUICK_PAIRS, publish, read_options, result_of
from benchmarks.tool_call_texts import BROKEN, LONG, TOOLS, WELL_FORMED, draw_turns


@pytest.fixture
def nothing_older_is_collected():
    """Each measurement begins with a collection, which would look at all that the other tests have loaded."""
    with settled():
        yield


def check_result(result: dict, cases: set[str]) -> None:
    assert set(result["ratios"]) == set(result["cases"]) == cases
    for case, ratio in result["ratios"].items():
        figures = result["cases"][case]
        ours, peer = figures["ours_seconds"]["all"], figures["peer_seconds"]["all"]
        assert figures["pairs"] == len(ours) == len(peer)
        assert 0 < ratio == figures["ratio"]["median"]
        assert figures["ratio"]["interval"][0] <= ratio <= figures["ratio"]["interval"][1]
    assert {"bounds", "holds", "method", "versions", "machine", "date", "command"} <= result.keys()
    json.dumps(result)


def test_template_reaches_the_same_ids_on_both_sides_and_reports_every_turn():
    result = template.measure(pairs=2, seconds=0)
    check_result(result, {f"turn_{turn}" for turn in template.TURNS})
    assert result["bounds"] == {"turn_32": 10.0}
    assert result["growth"]["median"] > 0
    assert result["tokens"]["turn_2"] < result["tokens"]["turn_32"]


def test_no_tool_result_is_seen_twice():
    results = template.fresh_results()
    assert len({next(results) for _ in range(1000)}) == 1000


@pytest.mark.usefixtures("nothing_older_is_collected")
def test_tool_calls_are_timed_through_the_toolbox_and_the_sdk():
    result = tool_calls.measure(["in_process"], pairs=2, calls=32)
    check_result(result, {"in_process"})
    assert result["together"] == 16
    assert result["alone"]["in_process"]["ours_calls_per_second"] > 0
    assert list(tool_calls.CASES) == ["in_process", "stdio", "sse", "http"]


@pytest.mark.usefixtures("nothing_older_is_collected")
def test_a_calls_cpu_here_is_measured_with_the_connection_here_and_elsewhere():
    result = tool_cpu.measure(["in_process"], pairs=2, calls=64)
    check_result(result, {"in_process"})
    assert result["here"]["in_process"]["ours_seconds"]["median"] > 0
    assert result["bounds"]["in_process"] > 1


def test_start_times_fresh_processes_and_finds_no_heavy_library_in_them():
    times = start.time_in_turns(start.own_commands(), pairs=1)
    figures = start.seconds_of(times)
    assert figures["seconds"].keys() == {"import", "help", "python", "import mcp"}
    assert figures["within_limits"].keys() == figures["limits_seconds"].keys() == start.OURS.keys()
    assert [start.heavy_modules(arguments) for arguments in start.OURS.values()] == [[], []]


def test_start_would_see_a_heavy_library():
    assert start.heavy_modules(start.BESIDE["import mcp"]) == ["mcp"]


def test_the_parser_is_given_enough_well_formed_texts_the_same_each_time():
    assert sum(len(texts) for texts in WELL_FORMED.values()) >= 50
    for case, texts in WELL_FORMED.items():
        assert texts == draw_turns(int(case.removeprefix("calls_")))
        assert len(set(texts)) == len(texts)
        for text in texts:
            calls = parse_calls(text, TOOLS).calls
            assert len(text.encode()) <= 1000
            assert case == f"calls_{len(calls)}"
            assert all(isinstance(call, ToolCall) for call in calls)


def test_long_and_broken_texts_are_what_they_say():
    assert {len(parse_calls(text, TOOLS).calls) for text in BROKEN.values()} == {3}
    assert {round(math.log10(len(text))) for text in LONG.values()} == {4, 5}


def test_the_parser_is_timed_without_validation_and_has_it_afterwards():
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": 1}}\n</tool_call>'
    with parser.without_validation():
        assert parser.read(text) == [["get_weather", {"city": 1}]]
    assert parser.read(text) == []
    assert parser.read_call.validate is validate


@pytest.mark.usefixtures("nothing_older_is_collected")
def test_every_case_has_the_ratio_proper_and_the_others_beside_it():
    asked: list[dict] = []
    cases = {"calls_1": WELL_FORMED["calls_1"]}
    found = parser.measure_cases(lambda what, **given: asked.append(given) or 1.0, cases, pairs=3, seconds=0)["calls_1"]
    assert [given.get("way", "anew") for given in asked[:4]] == ["anew", "anew", "kept", "served"]
    assert len(asked) == 1 + 3 * len(parser.PEERS)
    assert {"validation_seconds", "validated", "kept", "served"} <= found.keys()
    assert found["peer_seconds"]["all"] == [1.0, 1.0, 1.0]


def test_sides_take_turns_at_going_first():
    assert list(rounds(["a", "b"], 3)) == ["a", "b", "b", "a", "a", "b"]


def test_a_ratio_is_the_peers_time_over_ours_pair_by_pair():
    figures = compare([1.0, 2.0, 1.0], [4.0, 4.0, 6.0])
    assert figures["ratio"]["all"] == [4.0, 2.0, 6.0]
    assert figures["ratio"]["median"] == 4.0


@pytest.mark.parametrize(("count", "low", "high", "confidence"), [(9, 2, 8, 0.961), (15, 4, 12, 0.965), (6, 1, 6, 0.969)])
def test_the_interval_of_a_median_lies_between_order_statistics(count: int, low: int, high: int, confidence: float):
    assert interval(list(range(count, 0, -1))) == (low, high, confidence)


def test_few_values_give_their_extremes_and_say_how_little_that_is_worth():
    assert interval([3, 1, 2]) == (1, 3, 0.75)
    assert interval([5]) == (5, 5, 0.0)


def test_work_is_done_as_often_as_asked():
    done: list[int] = []
    assert time_of(lambda: done.append(1), 7) > 0
    assert len(done) == 7


def test_a_result_is_printed_as_lines_and_as_json_and_written(tmp_path, capsys):
    cases = {"case": compare([1.0, 1.0], [3.0, 3.0])}
    result = result_of("name", cases, versions={"python": "3"}, bounds={"case": 2.0}, more=1)
    assert (result["ratios"], result["holds"], result["more"]) == ({"case": 3.0}, True, 1)
    assert not result_of("name", cases, versions={}, bounds={"case": 4.0})["holds"]
    publish(result, Namespace(json=True, out=tmp_path / "new" / "name.json"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("case")
    assert json.loads(lines[-1]) == json.loads((tmp_path / "new" / "name.json").read_text()) == result


def test_quick_takes_few_pairs_unless_told_otherwise():
    assert read_options("", ["--quick"]).pairs == QUICK_PAIRS
    assert read_options("", ["--quick", "--pairs", "5"]).pairs == 5
    assert read_options("", []).pairs >= 9


def test_mcnemar_counts_the_pairs_that_changed_and_no_others():
    before, after = [False] * 10 + [True] * 20, [True] * 30
    assert mcnemar(before, after) == {"gained": 10, "lost": 0, "p": 2 / 2**10}
    assert mcnemar(after, before) == {"gained": 0, "lost": 10, "p": 2 / 2**10}
    assert mcnemar([True, False], [False, True])["p"] == 1.0
    assert mcnemar(before, before)["p"] == 1.0
