"""Environments: how one is found, what its rewards may be, and how its mistakes are told."""

import sys
from functools import partial
from pathlib import Path

import anyio
import pytest

from art_mcp.environment import Environment, load_environment, takes_toolbox
from art_mcp.errors import EnvironmentLoadError, RewardError, ToolServerError
from art_mcp.tools.toolbox import AllTools
from art_mcp.types import Limits, Scenario, StopReason, Trajectory
from tests.clocks import skip

SMALLEST = """
from art_mcp import Environment, Scenario

environment = Environment(
    servers=["sums.py:server"],
    scenarios=lambda split: [Scenario(split, "2 + 3?")],
    rewards={"correct": lambda trajectory: 1.0},
)
"""
PLAYED = Trajectory(Scenario("s", "", facts={"answer": "5"}), "r", (), (), StopReason.ANSWERED)
TOOLBOX = AllTools((), {}, 0)


def make(**fields):
    values = {"scenarios": lambda split: [Scenario("one", "")], "rewards": {"first": lambda t: 1.0}, "name": "mine"}
    return Environment(**{"servers": [], **values, **fields})


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "environments").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(project, text, name="sums"):
    path = project / "environments" / f"{name}.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["sums", "environments/sums.py", "environments/sums.py:environment"])
def test_an_environment_is_found_by_name_or_path(project, name):
    write(project, SMALLEST)
    found = load_environment(name)
    assert [scenario.id for scenario in found.split("test")] == ["test"]
    assert found.name == "sums"


def test_an_environment_is_found_in_an_installed_module(project, monkeypatch):
    (project / "my_module_of_sums.py").write_text(SMALLEST.replace("environment =", "mine ="))
    monkeypatch.syspath_prepend(project)
    assert load_environment("my_module_of_sums:mine").split("train")


def test_a_module_in_the_current_folder_is_found_as_if_it_were_installed(project, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(project))])
    (project / "our_package_of_sums").mkdir()
    (project / "our_package_of_sums" / "hard.py").write_text(SMALLEST.replace("environment =", "mine ="))
    assert load_environment("our_package_of_sums.hard:mine").split("train")
    assert sys.path[0] == str(project)


def test_options_reach_the_function_that_makes_the_environment(project):
    path = write(project, "")
    path.write_text(
        "from art_mcp import Environment, Scenario\n"
        "def environment(levels='1', *, hard=False):\n"
        "    if levels == '9':\n        raise ValueError('levels are 1 to 8')\n"
        "    return Environment(servers=[], scenarios=lambda s: [Scenario(f'{levels} {hard}', '')], rewards={'r': len})\n"
    )
    assert load_environment("sums", levels="2", hard="true").split("train")[0].id == "2 true"
    assert load_environment("sums").split("train")[0].id == "1 False"
    with pytest.raises(EnvironmentLoadError, match="has no option level; it has levels, hard"):
        load_environment("sums", level="2")
    with pytest.raises(EnvironmentLoadError, match="'sums': levels are 1 to 8"):
        load_environment("sums", levels="9")


def test_options_for_an_environment_that_takes_none_are_refused(project):
    write(project, SMALLEST)
    with pytest.raises(EnvironmentLoadError, match="takes no options, got levels"):
        load_environment("sums", levels="2")


def test_a_wrong_name_is_told_with_the_names_there_are(project):
    write(project, SMALLEST)
    write(project, SMALLEST, "words")
    with pytest.raises(EnvironmentLoadError, match=r"no environment at environments/sum\.py; there are: sums, words"):
        load_environment("sum")
    with pytest.raises(EnvironmentLoadError, match="run from the folder that holds environments/"):
        load_environment("nowhere/sums.py")
    with pytest.raises(EnvironmentLoadError, match="no_such_module"):
        load_environment("no_such_module:environment")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "needs a value `environment`"),
        ("environment = 3\n", "needs a value `environment`"),
        ("def environment():\n    return 3\n", "needs a value `environment`"),
        ("import nothing_of_this_name\n", r"ModuleNotFoundError: No module .*sums\.py, line 1"),
        ("x = 1\n\nx.y\n", r"AttributeError: .*sums\.py, line 3"),
        ("x = (\n", r"SyntaxError: .*sums\.py, line 1"),
        ("def environment():\n    return {}['x']\n", r"'sums': KeyError: 'x' \(.*sums\.py, line 2\)"),
        (SMALLEST.replace('{"correct": lambda trajectory: 1.0}', "{}"), "needs a reward"),
    ],
)
def test_a_broken_module_is_told_in_one_line_with_its_place(project, text, told):
    write(project, text)
    with pytest.raises(EnvironmentLoadError, match=told) as caught:
        load_environment("sums")
    assert "\n" not in str(caught.value)


def test_a_split_must_be_one_of_those_that_the_environment_names():
    with pytest.raises(EnvironmentLoadError, match="'mine' has no split 'tset'; it has train, test"):
        make().split("tset")
    assert make(splits=["easy"]).split("easy")


def test_an_empty_split_and_an_id_that_stands_twice_are_told():
    with pytest.raises(EnvironmentLoadError, match="no scenarios in its split 'train'"):
        make(scenarios=lambda split: []).split("train")
    with pytest.raises(EnvironmentLoadError, match="2 scenarios of 'mine' have the id 'a'"):
        make(scenarios=lambda split: [Scenario("a", ""), Scenario("b", ""), Scenario("a", "x")]).split("train")


def test_what_a_scenarios_function_raises_is_told_with_its_place():
    def broken(split):
        return {"train": []}["no " + split]

    with pytest.raises(EnvironmentLoadError, match=r"split 'test': KeyError: 'no test' \(.*test_environment\.py, line \d+\)"):
        make(scenarios=broken).split("test")


def test_scenarios_may_come_from_a_generator_but_each_must_be_one_and_none_is_waited_for():
    def drawn(split):
        yield from (Scenario("a", ""), Scenario("b", ""))

    async def later(split):
        return [Scenario("a", "")]

    assert [scenario.id for scenario in make(scenarios=drawn).split("train")] == ["a", "b"]
    with pytest.raises(EnvironmentLoadError, match=r"split 'train': each is a Scenario\(id, prompt\), not 'What is 1 plus 1"):
        make(scenarios=lambda split: ["What is 1 plus 1?"]).split("train")
    with pytest.raises(EnvironmentLoadError, match="split 'train': TypeError: it is asynchronous: write `def` in place of"):
        make(scenarios=later).split("train")


@pytest.mark.parametrize("copies", ["8", -1, True, 2.5, None])
def test_copies_are_a_number_of_sets(copies):
    with pytest.raises(EnvironmentLoadError, match=f"copies is how many sets of servers there are at most, .* not {copies!r}"):
        make(copies=copies)


def test_solved_by_must_name_a_reward():
    with pytest.raises(EnvironmentLoadError, match="solved_by is 'frist', but the rewards are first"):
        make(solved_by="frist")


@pytest.mark.parametrize("name", ["servers", "tools", "splits"])
def test_a_name_where_a_list_belongs_is_told_with_what_to_write(name):
    with pytest.raises(EnvironmentLoadError, match=rf"{name} is a list: write {name}=\['units'\] in place of {name}='units'"):
        make(**{name: "units"})


async def later(trajectory):
    return 0.25


async def look(trajectory, toolbox):
    return 2.0 if toolbox is TOOLBOX else 0.0


@pytest.mark.anyio
async def test_rewards_may_be_plain_or_async_and_ask_for_the_toolbox_and_are_added_up():
    rewards = {"plain": lambda t: True, "later": later, "look": look, "bound": partial(look, toolbox=TOOLBOX)}
    scored = await make(rewards=rewards).score(PLAYED, TOOLBOX)
    assert scored.parts == {"plain": 1.0, "later": 0.25, "look": 2.0, "bound": 2.0}
    assert scored.reward == 5.25
    assert scored.trajectory is PLAYED


def test_only_a_second_positional_parameter_without_a_default_asks_for_the_toolbox():
    asks = [lambda t, box: 0.0, lambda t, /, toolbox: 0.0, look]
    leaves = [lambda t: 0.0, lambda t, scale=2.0: 0.0, lambda t, *, box=None: 0.0, partial(look, toolbox=None), later]
    assert [takes_toolbox(reward) for reward in asks] == [True] * 3
    assert [takes_toolbox(reward) for reward in leaves] == [False] * 5


def explode(trajectory):
    return 1 / 0


async def lose(trajectory, toolbox):
    raise ToolServerError("server 'db' is gone")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reward", "kind", "told"),
    [
        (explode, RewardError, r"reward 'r': ZeroDivisionError: division by zero \(.*test_environment\.py, line \d+\)"),
        (lambda t: None, RewardError, "reward 'r' gave None: it has to return a finite number"),
        (lambda t: "much", RewardError, "reward 'r' gave 'much': it has to return a finite number"),
        (lambda t: float("nan"), RewardError, "reward 'r' gave nan: it has to return a finite number"),
        (lambda t: float("-inf"), RewardError, "reward 'r' gave -inf"),
        (lambda: 1.0, RewardError, "reward 'r': TypeError"),
        (lose, ToolServerError, "server 'db' is gone"),
    ],
)
async def test_a_reward_that_fails_is_told_by_name_and_a_lost_server_stays_one(reward, kind, told):
    with pytest.raises(kind, match=told):
        await make(rewards={"fine": later, "r": reward}).score(PLAYED, TOOLBOX)


@pytest.mark.anyio
async def test_an_async_reward_that_hangs_is_ended_and_told_by_its_name_and_limit():
    gone = []

    async def hang(trajectory):
        skip(70)
        try:
            await anyio.sleep_forever()
        finally:
            gone.append(trajectory)

    told = r"^reward 'r' had not ended after 70 s, all that Limits\(code_seconds=…\) allows it$"
    with pytest.raises(RewardError, match=told):
        await make(rewards={"fine": later, "r": hang}, limits=Limits(code_seconds=70)).score(PLAYED, TOOLBOX)
    assert gone == [PLAYED]


@pytest.mark.anyio
async def test_a_timeout_of_an_outer_block_ends_a_reward_and_is_not_called_its_own():
    async def hang(trajectory):
        skip(60)
        await anyio.sleep_forever()

    with anyio.move_on_after(60) as outer:
        await make(rewards={"r": hang}).score(PLAYED, TOOLBOX)
    assert outer.cancelled_caught


@pytest.mark.parametrize(
    ("parts", "solved"), [({"a": 1.0}, True), ({"a": 0.9}, False), ({"b": 1.0}, False), ({"a": 1.5}, True)]
)
def test_solved_means_that_the_first_reward_gave_1_unless_another_is_named(parts, solved):
    rewards = {"a": later, "b": later}
    assert make(rewards=rewards).solved(PLAYED.scored(0.0, parts)) is solved
    swapped = {{"a": "b", "b": "a"}[name]: value for name, value in parts.items()}
    assert make(rewards=rewards, solved_by="b").solved(PLAYED.scored(0.0, swapped)) is solved


def test_the_packaged_environment_has_every_split_that_it_names():
    environment = load_environment(str(Path(__file__).parents[1] / "environments" / "calculator.py"))
    assert {split: bool(environment.split(split)) for split in environment.splits} == dict.fromkeys(environment.splits, True)
