"""The shopping cart: an environment whose server has state, over its real server."""

import json
from pathlib import Path

import pytest

from art_mcp.environment import load_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("here")
def test_the_check_finds_nothing_wrong_with_it(art):
    code, out, err = art("check", "cart", "--n", "6", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out.splitlines()[-1])
    assert told["rewards"].pop("reference solution") == 1.0
    assert set(told["rewards"].values()) == {0.0}
    assert told["warnings"] == told["failures"] == []


@pytest.mark.usefixtures("here")
def test_the_tiny_policy_can_be_measured_on_it_though_it_never_saw_its_tools(art):
    code, out, err = art("eval", "cart", "--n", "4", "--json")
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert (report["n"], report["failed"]) == (4, 0)


@pytest.mark.usefixtures("here")
def test_no_errand_is_done_before_it_begins_and_none_is_in_two_splits():
    environment = load_environment("cart")
    train, test = environment.split("train"), environment.split("test")
    assert all(one.facts["before"] != one.facts["after"] for one in (*train, *test))
    assert not {one.prompt for one in train} & {one.prompt for one in test}
    assert {one.level for one in train} == {one.level for one in test} == {1, 2}
