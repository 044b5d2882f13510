"""Rollouts with servers of their own, as they are played, measured, trained on, demonstrated and checked: with a shopping
cart, whose state every call changes."""

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import psutil
import pytest
from odd import odd_url

from art_mcp.agent.check import check_environment
from art_mcp.agent.demonstrate import show_solutions
from art_mcp.agent.evaluate import evaluate
from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.agent.loop import Plan, train_loop
from art_mcp.errors import ConfigError
from art_mcp.sampling.scripted import ScriptedSampler
from art_mcp.tools import open_servers, open_tools
from art_mcp.types import Limits, ToolCall, TrainConfig
from tests.agent.players import Obedient, Playhouse, calls, dialect, environment, obedient, scenario
from tests.clocks import skip
from tests.processes import ended

pytestmark = pytest.mark.anyio

CART = str(Path(__file__).parents[2] / "servers" / "cart" / "server.py")
STDIO = {"name": "cart", "command": sys.executable, "args": [CART]}
FILE = """
import sys
from pathlib import Path
from mcp.server import MCPServer

server = MCPServer("file", log_level="CRITICAL")
notes = Path(__file__).with_name("notes.txt")


@server.tool()
async def put(item: str, quantity: int) -> str:
    notes.write_text(item)
    return "done"


@server.tool()
async def contents() -> dict[str, int]:
    return {notes.read_text(): 2} if notes.exists() else {}


if __name__ == "__main__":
    server.run(sys.argv[1], port=int(sys.argv[2]))
"""


def errand(number, *, quantity=2):
    """Puts something into the cart by two calls in turns, so that other rollouts' calls come between."""
    put = calls(("put", {"item": "eggs", "quantity": 1}))
    return scenario(*[put] * quantity, "Done.", id=f"errand-{number}", want={"eggs": 2})


ERRANDS = [errand(number) for number in range(4)]


async def filled(trajectory, toolbox):
    found = await toolbox.call(ToolCall("contents", {}))
    return float(found.structured == trajectory.scenario.facts["want"])


async def empty(scenario_, toolbox):
    await toolbox.call(ToolCall("fill", {"items": {}}))


def solution(scenario_):
    return [ToolCall("put", {"item": "eggs", "quantity": 2})], "Done."


def shop(*scenarios, server=f"{CART}:server", **fields):
    fields = {"rewards": {"filled": filled}, "tools": ["put"], "solution": solution, "copies": 3, "reset": empty, **fields}
    return replace(environment(*(scenarios or ERRANDS), **fields), servers=[server])


@pytest.fixture(params=["reset", "started anew"])
def place(request):
    return shop() if request.param == "reset" else shop(reset=None)


async def gather(place, **options):
    async with open_servers(place) as servers:
        scenarios = place.split("train")
        return await gather_trajectory_groups(
            scenarios, model=await obedient(), environment=place, toolbox=servers, rollouts=4, **options
        )


def rewards_of(groups):
    return [[one.reward for one in group.trajectories] for group in groups]


async def test_rollouts_at_the_same_time_find_nothing_of_each_other_in_their_servers(place):
    assert rewards_of(await gather(place)) == [[1.0] * 4] * 4
    shared = replace(place, copies=0, reset=None)
    assert rewards_of(await gather(shared)) != [[1.0] * 4] * 4


async def test_evaluation_training_and_demonstrations_play_on_servers_of_their_own(place):
    house = Playhouse(Obedient)
    async with open_servers(place) as servers:
        measured = await evaluate(await obedient(), place, toolbox=servers, n=4)
        assert (measured.solved, measured.failed) == (1.0, 0)
        await train_loop(
            await obedient(house),
            place,
            toolbox=servers,
            plan=Plan(steps=2, groups=2, rollouts=4, overlap=1),
            config=TrainConfig(),
            recorder=Quiet(),
            save=house_save,
        )
        assert [rewards_of(groups) for groups in house.trained] == [[[1.0] * 4] * 2] * 2
        assert len(await show_solutions(place.split("train"), environment=place, toolbox=servers)) == 4


class Quiet:
    def groups(self, step, groups):
        pass

    def metrics(self, step, values):
        pass


async def house_save(step):
    pass


async def test_a_reset_begins_a_rollout_where_its_scenario_says():
    async def fill(scenario_, toolbox):
        await toolbox.call(ToolCall("fill", {"items": scenario_.facts["want"]}))

    filled_already = [errand(number, quantity=0) for number in range(3)]
    assert rewards_of(await gather(shop(*filled_already, reset=fill))) == [[1.0] * 4] * 3


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            ToolCall("take_out", {"item": "pears", "quantity": 1}),
            "ValueError: take_out answers with an error: .*only 0 pears in",
        ),
        (ToolCall("clear", {}), "LookupError: no server has a tool 'clear'; there are: put, take_out, contents, fill"),
    ],
)
async def test_a_reset_that_fails_fails_its_rollout_alone_and_says_what_to_do(call, told):
    def first(scenario_, toolbox):
        return toolbox.call(call) if scenario_.id == "errand-0" else empty(scenario_, toolbox)

    broken, *others = await gather(shop(reset=first))
    assert broken.trajectories == ()
    assert {failure.kind for failure in broken.failures} == {"ResetError"}
    for failure in broken.failures:
        assert re.match(rf"the reset before scenario 'errand-0': {told}.*; mend `reset`, or leave it out", failure.message)
    assert rewards_of(others) == [[1.0] * 4] * 3


async def test_a_reset_that_hangs_fails_its_rollout_within_its_limit():
    async def hang(scenario_, toolbox):
        skip(3600)
        await anyio.sleep_forever()

    (broken,) = await gather(shop(ERRANDS[0], reset=hang, limits=Limits(code_seconds=3600)))
    told = "the reset before scenario 'errand-0' had not ended after 3600 s, all that Limits(code_seconds=…) allows it; mend"
    assert {failure.kind for failure in broken.failures} == {"ResetError"}
    assert all(failure.message.startswith(told) for failure in broken.failures)


async def test_servers_that_are_shared_are_refused_where_each_rollout_is_to_have_its_own():
    place = shop()
    async with open_tools(place.servers) as toolbox:
        with pytest.raises(ConfigError, match=r"\(copies=3\), but these are shared: open them by open_servers\(environment\)"):
            await gather_trajectory_groups(ERRANDS, model=await obedient(), environment=place, toolbox=toolbox)


async def warnings_of(place):
    async with open_servers(place) as servers:
        verdict = await check_environment(place, dialect=dialect(), toolbox=servers, play=ScriptedSampler)
    return verdict.warnings


async def test_the_check_names_what_to_do_where_rollouts_find_what_others_left_and_is_quiet_where_they_do_not(place):
    assert await warnings_of(place) == ()
    (warning,) = await warnings_of(replace(place, copies=0, reset=None))
    assert warning.startswith(
        "state leaks from one rollout into another: an empty turn in scenario 'errand-0' scores 1.000 after "
    )
    assert "give each rollout servers of its own, by Environment(copies=8), or let the reward depend on" in warning


async def test_the_check_still_tells_of_state_that_copies_do_not_keep_apart(tmp_path):
    async def nothing(scenario_, toolbox):
        await toolbox.call(ToolCall("contents", {}))

    (warning,) = await warnings_of(shop(reset=nothing))
    assert "`reset` does not bring back all that the one before it left there; the README has more" in warning
    (tmp_path / "file.py").write_text(FILE)
    (warning,) = await warnings_of(shop(server=f"{tmp_path}/file.py:server", reset=None))
    assert "they keep something outside: in a file, a database or behind a url; the README has more" in warning


@dataclass
class Crowd:
    """A reward that writes down what was answered where, with how many rollouts under way, and keeps all from going on until
    `meeting` have been under way at once."""

    meeting: int
    under_way: int = 0
    log: list[tuple[str, str, int]] = field(default_factory=list)
    met: anyio.Event = field(default_factory=anyio.Event)

    async def filled(self, trajectory, toolbox):
        self.under_way += 1
        self.log.append((trajectory.answer, trajectory.scenario.id, self.under_way))
        if self.under_way == self.meeting:
            self.met.set()
        await self.met.wait()
        found = await filled(trajectory, toolbox)
        self.under_way -= 1
        return found

    @property
    def most(self):
        return max(under_way for _, _, under_way in self.log)


async def crowded(place, *, meeting):
    crowd = Crowd(meeting)
    assert await warnings_of(replace(place, rewards={"filled": crowd.filled})) == ()
    return crowd


PAIRS = [(answer, one.id, 1) for one in ERRANDS for answer in ("Done.", "")]
"""The reference solution and then the empty turn of each scenario, nobody else being under way."""


async def test_the_check_plays_as_many_rollouts_at_once_as_there_are_servers_started_for_them_but_solutions_alone():
    place = shop(reset=None, copies=4)
    crowd = await crowded(place, meeting=4)
    assert crowd.most == 4
    assert crowd.log[16:24] == PAIRS
    assert [answer for answer, _, _ in crowd.log[24:]] == [""] * 4 + ["0"] * 4


async def test_the_check_plays_at_once_on_servers_in_processes_of_their_own():
    crowd = await crowded(shop(ERRANDS[0], server=STDIO, reset=None), meeting=3)
    assert crowd.most == 3
    assert crowd.log[4:6] == PAIRS[:2]


async def test_the_check_plays_one_rollout_after_the_other_where_servers_wander_and_solutions_at_once_when_it_has_seen_that():
    order = [(answer, one.id, 1) for answer in ("I do not know.", "42", "1 1", "") for one in ERRANDS]
    order += [*PAIRS, *((answer, one.id, 1) for answer in ("", "0") for one in ERRANDS)]
    log = (await crowded(shop(), meeting=1)).log
    assert log[: len(order)] == order
    assert sorted((answer, name) for answer, name, _ in log[len(order) :]) == [("Done.", one.id) for one in ERRANDS]

    async def own(trajectory, toolbox):
        return float(bool(trajectory.uses) and trajectory.answer == "Done.")

    crowd = Crowd(1)
    shared = shop(copies=0, reset=None, rewards={"own": own, "crowd": crowd.filled})
    await warnings_of(shared)
    assert crowd.log == order


FRUIT = [scenario("Done.", id=item) for item in ("apples", "bananas", "carrots", "lemons")]


def buy(scenario_):
    return [ToolCall("put", {"item": scenario_.id, "quantity": 2})], "Done."


async def bought(trajectory, toolbox):
    return float(trajectory.scenario.id in (await toolbox.call(ToolCall("contents", {}))).structured)


@pytest.mark.parametrize("where", ["in a file", "behind a url"])
async def test_the_check_finds_what_each_solution_leaves_outside_though_the_next_one_overwrites_it(tmp_path, where):
    path = tmp_path / "file.py"
    path.write_text(FILE)
    place = shop(*FRUIT, server=f"{path}:server", reset=None, solution=buy, rewards={"bought": bought})
    if where == "in a file":
        (warning,) = await warnings_of(place)
    else:
        with odd_url("streamable-http", script=str(path)) as spec:
            entry = {"name": "file", "type": "streamable-http", "url": spec.url}
            (warning,) = await warnings_of(replace(place, servers=[entry]))
    assert warning.startswith(
        "state leaks from one rollout into another: an empty turn in scenario 'apples' scores 1.000 after its reference "
        "solution was played, 0.000 before (so in 4 of 4 scenarios): though each rollout has servers of its own"
    )


ONE_CART = """
import sys
import anyio
from mcp.server import MCPServer

server = MCPServer("one", log_level="CRITICAL")
cart = {}


@server.tool()
async def fill(items: dict[str, int]) -> str:
    cart.clear()
    cart.update(items)
    return "done"


@server.tool()
async def put(item: str, quantity: int) -> str:
    await anyio.sleep(0.2)
    cart[item] = cart.get(item, 0) + quantity
    return "done"


@server.tool()
async def contents() -> dict[str, int]:
    return dict(cart)


server.run(sys.argv[1], port=int(sys.argv[2]))
"""


async def test_the_check_finds_that_copies_behind_a_url_are_one_which_a_reset_hides_while_one_rollout_plays(tmp_path):
    (tmp_path / "one.py").write_text(ONE_CART)
    with odd_url("streamable-http", script=str(tmp_path / "one.py")) as spec:
        place = replace(shop(), servers=[{"name": "one", "type": "streamable-http", "url": spec.url}])
        async with open_servers(place) as servers:
            verdict = await check_environment(place, dialect=dialect(), toolbox=servers, play=ScriptedSampler)
    (failure,) = verdict.failures
    assert verdict.solved["reference solution"] == 1.0
    assert "solves it alone and not while 3 rollouts play at the same time" in failure
    assert "the copies share their state, as connections to one URL do" in failure


async def test_the_check_finds_what_a_reset_leaves_there_of_other_scenarios():
    async def nothing(scenario_, toolbox):
        await toolbox.call(ToolCall("contents", {}))

    async def spoiled(trajectory, toolbox):
        found = (await toolbox.call(ToolCall("contents", {}))).structured
        return float(bool(trajectory.uses)) - any(item > trajectory.scenario.id for item in found)

    (warning,) = await warnings_of(shop(*FRUIT, reset=nothing, copies=8, solution=buy, rewards={"spoiled": spoiled}))
    assert "'apples' scores -1.000 after the other scenarios were played, 0.000 before (so in 3 of 4 scenarios)" in warning
    assert "`reset` does not bring back all that the one before it left there" in warning


async def test_a_check_that_is_cancelled_leaves_no_server_behind():
    before, scope = set(psutil.Process().children(recursive=True)), anyio.CancelScope()
    started: list[psutil.Process] = []

    async def cancel(trajectory, toolbox):
        started.extend(set(psutil.Process().children(recursive=True)) - before)
        scope.cancel()
        return 0.0

    with scope:
        await warnings_of(shop(server=STDIO, reset=None, rewards={"cancel": cancel}))
    assert scope.cancelled_caught
    assert started
    assert all(ended(process.pid) for process in started)
