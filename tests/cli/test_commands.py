"""The command line through its own door: answers on stdout, mistakes as one line on stderr that says what to do."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main

from art_mcp.cli.main import app
from art_mcp.environment import load_environment
from art_mcp.store.run import Run

ROOT = Path(__file__).parents[2]
HERE = str(ROOT / "tests" / "wiring" / "calculator_here.py")
CALCULATOR = str(ROOT / "environments" / "calculator.py")
SMALL = """
from art_mcp import Environment, Scenario, ToolCall

environment = Environment(
    servers=[{servers}],
    scenarios=lambda split: [Scenario(f"{{a}}", f"What is {{a}} + 1?", facts={{"a": a}}) for a in range(1, 5)],
    rewards={{"correct": {reward}}},
    solution=lambda scenario: ([ToolCall("add", {{"a": scenario.facts["a"], "b": 1}})], str(scenario.facts["a"] + 1)),
    tools=["add"],
)
"""
SERVER = f'"{ROOT}/servers/calculator/server.py:server"'
CORRECT = 'lambda trajectory: float(trajectory.answer == str(trajectory.scenario.facts["a"] + 1))'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with environments, config.json and one run, as a user has it."""
    (tmp_path / "environments").mkdir()
    write(tmp_path, "sums", SERVER, CORRECT)
    write(tmp_path, "lenient", SERVER, 'lambda trajectory: float(trajectory.answer != "")')
    write(tmp_path, "misspelt", '"calculater"', CORRECT)
    write(tmp_path, "secret", '"secret"', CORRECT)
    write(tmp_path, "mortal", '"mortal"', CORRECT)
    servers = {
        "calculator": {"command": "python", "args": [str(ROOT / "servers" / "calculator" / "server.py")]},
        "secret": {"command": "python", "args": ["x.py"], "env": {"KEY": "${NO_SUCH_VARIABLE}"}},
        "mortal": {"command": "python", "args": ["-c", "import sys; sys.exit('no database here')"]},
    }
    (tmp_path / "config.json").write_text(json.dumps({"mcpServers": servers}))
    (tmp_path / "broken.json").write_text('{"mcpServers": {\n  "a": {"command": "x",}}}')
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    run = Run(tmp_path / "runs" / "mine")
    (run.checkpoint(50)).mkdir(parents=True)
    run.describe({"status": "stopped"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return tmp_path


def write(project, name, servers, reward):
    (project / "environments" / f"{name}.py").write_text(SMALL.format(servers=servers, reward=reward))


MISTAKES = {
    "wrong environment": (["eval", "smus"], "no environment at environments/smus.py; there are: .*sums"),
    "wrong split": (["eval", "sums", "--split", "tset"], "environment 'sums' has no split 'tset'; it has train, test"),
    "wrong split of the calculator": (["rollout", CALCULATOR, "--split", "dev"], "no split 'dev'; it has train, test, test-w"),
    "wrong split to check": (["check", "sums", "--split", "tset"], "no split 'tset'; it has train, test"),
    "wrong server": (["check", "misspelt"], "no server 'calculater' in config.json; did you mean 'calculator'?"),
    "broken config": (["check", "secret", "--config", "broken.json"], "broken.json, line 2, column "),
    "no config": (["check", "secret", "--config", "nowhere.json"], "no config file at nowhere.json"),
    "missing variable": (["check", "secret"], "server 'secret': env.KEY needs the environment variable NO_SUCH_VARIABLE"),
    "server that exits": (["check", "mortal"], "'mortal'.*no database here"),
    "model without weights": (["eval", "sums", "--model", "hollow"], "hollow has no weights: put .*safetensors there"),
    "missing model folder": (["eval", "sums", "--model", "./models/x"], "no model folder at ./models/x"),
    "option that is no pair": (["eval", "sums", "--option", "levels"], "--option wants KEY=VALUE, .*not 'levels'"),
    "option for nobody": (["eval", "sums", "-o", "levels=2"], "environment 'sums' takes no options, got levels"),
    "unknown option of an environment": (
        ["eval", CALCULATOR, "-o", "level=2"],
        "has no option level; it has levels, evaluate, ",
    ),
    "bad value of an option": (["eval", CALCULATOR, "-o", "levels=99"], "levels are 1 to 8"),
    "step without checkpoint": (["eval", "sums", "--model", "mine@7"], "no checkpoint of step 7; it has 50"),
    "model of a missing run": (["eval", "sums", "--model", "runs/yours"], "no run at runs/yours .*: there are: mine"),
    "resume of a missing run": (["train", "--resume", "yours"], "no run at runs/yours .*: there are: mine"),
    "resume of a mistyped run": (
        ["train", "--resume", "mien"],
        "no run at runs/mien .*: did you mean 'mine'\\? there are: mine",
    ),
    "resume of a foreign run": (["train", "--resume", "mine"], "runs/mine: its manifest is not one that can be resumed"),
    "resume with settings": (["train", "--resume", "mine", "--lr", "1", "--seed", "2"], "leave out --lr, --seed"),
    "resume with an environment": (["train", "sums", "--resume", "mine"], "leave out environment"),
    "name that is taken": (["train", "sums", "--name", "mine"], "runs/mine exists already: choose another name"),
    "name that is no word": (["train", "sums", "--name", "a/b"], "a run's name is a plain word"),
    "no environment to train on": (["train"], "name an environment .*or --resume RUN"),
    "scenario out of range": (["rollout", "sums", "--number", "4"], "split 'test' has 4 scenarios: --number is at most 3"),
}


@pytest.mark.parametrize(("args", "told"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_on_stderr_that_says_what_to_do(project, art, args, told):
    code, out, err = art(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(told, err), err


def test_a_terminal_shows_that_a_command_is_at_work_and_no_trace_of_it_afterwards(project, art, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert art("call", "calculator", "add", '{"a": 2, "b": 40}') == (0, "42\n", "calling add …\r\x1b[K")
    code, _, err = art("check", "sums")
    assert (code, "playing  32/32 rollouts  reward " in err, err.endswith("\x1b[2K")) == (0, True, True)
    code, _, err = art("rollout", "sums", "--number", "4")
    loading = "loading …\r\x1b[K"
    assert (code, err.partition("error: ")[0]) == (2, loading)
    assert art("rollout", "sums")[::2] == (0, f"{loading}playing …\r\x1b[K")
    code, _, err = art("eval", "sums", "--n", "2")
    assert (code, err.startswith(loading)) == (0, True)
    code, _, err = art("sft", "sums", "-d", "2", "--eval-n", "0")
    assert (code, err.startswith(f"{loading}playing demonstrations …\r\x1b[K")) == (0, True)


def test_a_model_that_knows_a_few_tools_only_is_said_not_to_know_the_others(project, art):
    note = "note: tiny was trained on the calculator environment's questions alone and never saw power, sqrt: name another "
    (project / "environments" / "others.py").write_text(
        (project / "environments" / "sums.py").read_text().replace('tools=["add"]', 'tools=["add", "power", "sqrt"]')
    )
    for words in (["rollout"], ["eval", "--n", "2"], ["train", "--steps", "0", "--eval-n", "0"]):
        command, *options = words
        code, _, err = art(command, "others", *options)
        assert (code, err.startswith(note), err.count("\n")) == (0, True, 1), err
        assert "note" not in art(command, "sums", *options)[2]
    goes_on = "to go on by reward: art-mcp train --resume runs/taught --steps 100\n"
    assert art("sft", "others", "-d", "2", "--eval-n", "0", "--name", "taught")[::2] == (0, goes_on)
    assert art("eval", "others", "--n", "2", "--model", "taught")[::2] == (0, "")


def test_the_packaged_policy_is_said_to_know_the_tools_of_the_calculators_questions():
    known = json.loads((ROOT / "art_mcp" / "tiny_policy" / "art_mcp_tools.json").read_text())
    assert tuple(known["tools"]) == load_environment(CALCULATOR).tools


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["eval", "sums", "--splitt", "test"], "--splitt"),
        (["eval", "sums", "--n", "0"], "--n"),
        (["train", "sums", "--steps", "many"], "--steps"),
        (["train", "sums", "--control", "placebo"], "--control"),
        (["evaluate", "sums"], "evaluate"),
        (["eval"], "ENV"),
    ],
)
def test_a_wrong_use_of_the_command_line_ends_with_2_and_names_the_option(project, art, args, named):
    code, out, err = art(*args)
    assert (code, out) == (2, "")
    assert named in err
    assert "Traceback" not in err


def test_a_bug_is_a_crash_and_no_line(project, art, monkeypatch):
    (project / "environments" / "crash.py").write_text("environment = None\n")
    monkeypatch.setattr("art_mcp.environment.find_module", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        art("eval", "crash")


COMMANDS = typer.main.get_command(app).commands


def test_every_command_is_named_in_the_help(art):
    assert {"train", "rollout", "eval", "check", "tools", "call", "inspect"} <= COMMANDS.keys()
    code, out, err = art("--help")
    assert (code, err) == (0, "")
    assert all(re.search(rf"^│ {name} ", out, re.MULTILINE) for name in COMMANDS)
    assert all(option in out for option in ("--version", "--install-completion", "--show-completion"))


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["tools", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(words, tmp_path):
    heavy = ["torch", "transformers", "vllm", "mcp", "openai", "weave", "pyarrow", "jsonschema", "httpx2", "jinja2"]
    program = f"""
import atexit, sys
atexit.register(lambda: sys.stderr.write(" ".join(set({heavy}) & set(sys.modules))))
from art_mcp.cli.main import main
sys.argv = ["art-mcp", *{words}]
main()
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert "Usage: art-mcp" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_is_accepted_and_json_is_offered(art, command):
    code, out, err = art(command, "--help")
    assert (code, err) == (0, "")
    shown = " ".join(out.split())
    assert "--json" in shown
    epilog = COMMANDS[command].epilog
    assert epilog.startswith(f"Example: art-mcp {command} ")
    assert epilog in shown
    for name, *words in map(shlex.split, re.findall(r"art-mcp ([^;]+)", epilog)):
        COMMANDS[name].make_context(name, words)


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "art_mcp", "--version"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"art-mcp {version('art-mcp')}\n", "")


def test_the_version_is_that_of_the_package(art):
    assert art("--version") == (0, f"art-mcp {version('art-mcp')}\n", "")


def test_without_a_command_there_is_help(art):
    code, out, err = art()
    assert "Usage: art-mcp [OPTIONS] COMMAND [ARGS]..." in out + err
    assert code == 2


def test_check_shows_what_the_model_sees_and_the_reward_of_every_policy(project, art):
    code, out, _ = art("check", "sums", "--n", "2", "--json")
    assert code == 0
    assert "<|im_start|>system" in out
    assert '"name": "add"' in out
    assert "What is 1 + 1?" in out
    last = json.loads(out.splitlines()[-1])
    assert last["rewards"]["reference solution"] == 1.0
    assert len(last["rewards"]) == 6
    assert last["failures"] == []
    assert "ok: the reference solution scores above every lazy policy" in out


def test_check_shows_an_environment_without_a_reference_solution_and_says_what_is_not_checked(project, art):
    path = project / "environments" / "sums.py"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "solution=" not in line))
    code, out, _ = art("check", "sums", "--n", "2")
    assert code == 0
    assert "What is 1 + 1?" in out
    assert "constant answer" in out
    assert "not checked: whether lazy policies score less than a reference solution" in out
    assert "ok:" not in out


def test_check_plays_within_the_context_of_the_model(project, art):
    path = project / "environments" / "sums.py"
    path.write_text(path.read_text().replace('tools=["add"],', 'tools=["add"], system="sum " * 3000,'))
    code, _, err = art("check", "sums", "--n", "2")
    assert code == 2
    assert re.search(
        r"the opening has 3\d\d\d tokens and leaves no room for a turn: 2048 is the limit \(the model's context\)", err
    )


def test_check_finds_a_broken_reward_and_ends_with_1(project, art):
    code, out, _ = art("check", "lenient", "--n", "2")
    assert code == 1
    assert "FAILED: constant answer scores 1.000, not below the reference solution's 1.000" in out
    assert "ok:" not in out


def test_check_tells_what_keeps_the_reference_solution_from_solving_anything_and_compares_nothing_with_it(project, art):
    write(project, "hopeless", SERVER, "lambda trajectory: 0.0")
    code, out, _ = art("check", "hopeless", "--n", "2", "--json")
    assert code == 1
    lines = out.splitlines()
    assert [line for line in lines if line.startswith(("FAILED", "not checked"))] == [
        "FAILED: the reference solution solves only 0% of the scenarios",
        "not checked: whether lazy policies score less than the reference solution, since it solves none of the scenarios",
    ]
    assert "ok:" not in out
    last = json.loads(lines[-1])
    assert last["rewards"].keys() == {"reference solution"}
    assert last["unchecked"] != []


def test_check_shows_one_conversation_in_which_it_fails(project, art):
    picky = 'lambda trajectory: float(trajectory.scenario.facts["a"] != 3)'
    write(project, "picky", SERVER, picky)
    code, out, _ = art("check", "picky", "--json")
    assert code == 1
    *lines, last = out.splitlines()
    assert lines[lines.index("example: reference solution in scenario '3' (level 1)") :] == [
        "example: reference solution in scenario '3' (level 1)",
        "  user: What is 3 + 1?",
        '» policy: calls add({"a": 3, "b": 1})',
        "« tool: 4",
        "» policy: 4",
        "stopped: answered, reward 0.000 (correct 0)",
    ]
    assert json.loads(last)["example"]["lines"][-1] == ["policy", "4"]


def test_check_shows_where_a_lazy_policy_gains_the_most_if_that_is_what_fails(project, art):
    write(project, "lazy", SERVER, 'lambda trajectory: 1.0 if trajectory.uses else 3.0 * (trajectory.scenario.facts["a"] == 2)')
    code, out, _ = art("check", "lazy", "--n", "2")
    assert code == 1
    assert out.partition("\nexample: ")[2].splitlines() == [
        "no tool in scenario '2' (level 1)",
        "  user: What is 2 + 1?",
        "» policy: I do not know.",
        "stopped: answered, reward 3.000 (correct 3)",
    ]


CRASHING = """
import sys
from mcp.server import MCPServer

server = MCPServer("crashing")


@server.tool()
async def add(a: int, b: int) -> int:
    if {broken}:
        raise LookupError(f"no {a} in the books")
    return a + b


if __name__ == "__main__":
    server.run("stdio")
"""


@pytest.mark.parametrize("server", ['"crashing.py:server"', '"crashing"'], ids=["in-process", "stdio"])
def test_check_says_why_a_tool_crashed_under_the_reference_solution(project, art, server):
    reward = 'lambda trajectory: float(trajectory.messages[2]["content"] == trajectory.answer) if trajectory.uses else 0.0'
    entry = {"command": "python", "args": ["crashing.py"], "env": {"COLUMNS": "100"}}
    (project / "config.json").write_text(json.dumps({"mcpServers": {"crashing": entry}}))
    write(project, "books", server, reward)
    for broken, told in (
        ("a == 2", "1 of the reference solution's 4 calls are answered with an error, in scenarios that it does not solve: "),
        ("a < 9", "each of the reference solution's 4 calls is answered with an error: "),
    ):
        (project / "crashing.py").write_text(CRASHING.replace("{broken}", broken))
        code, out, err = art("check", "books")
        assert (code, err) == (1, "")
        first = 2 if broken == "a == 2" else 1
        call = f"add({json.dumps({'a': first, 'b': 1})}) in scenario '{first}'"
        assert f"FAILED: {told}{call}: Error executing tool add (its server wrote: LookupError: no {first} in the books)" in out


def test_check_warns_of_a_call_of_the_reference_solution_that_fails_where_the_reward_does_not_mind(project, art):
    (project / "crashing.py").write_text(CRASHING.replace("{broken}", "a == 2"))
    write(project, "books", '"crashing.py:server"', CORRECT)
    code, out, _ = art("check", "books", "--json")
    assert code == 0
    assert "\nWARNING: 1 of the reference solution's 4 calls are answered with an error, in scenarios that it solves " in out
    assert (
        """: add({"a": 2, "b": 1}) in scenario '2': Error executing tool add (its server wrote: LookupError: no 2 in""" in out
    )
    assert len(json.loads(out.splitlines()[-1])["warnings"]) == 1


STATEFUL = """
from mcp.server import MCPServer

server = MCPServer("shop")
orders: list[str] = {orders}


@server.tool()
async def order(item: str) -> str:
    orders.append(item)
    return item


@server.tool()
async def ordered() -> str:
    return " ".join(orders)
"""
SHOP = """
from art_mcp import Environment, Scenario, ToolCall


async def bought(trajectory, toolbox):
    ordered = (await toolbox.call(ToolCall("ordered", {{}}))).text.split()
    item = trajectory.scenario.id
    own = any(use.result.text == item for use in trajectory.uses)
    return float({reward})


environment = Environment(
    servers=["shop.py:server"],
    scenarios=lambda split: [Scenario(item, f"Order {{item}}.") for item in ("tea", "rum")],
    rewards={{"bought": bought}},
    solution=lambda scenario: ([ToolCall("order", {{"item": scenario.id}})], "done"),
)
"""
LEAKS = "WARNING: state leaks from one rollout into another: an empty turn in scenario"
GIVEN = "WARNING: an empty turn, which calls no tool and answers nothing, already scores"


@pytest.mark.parametrize(
    ("orders", "reward", "warning"),
    [
        (
            [],
            "item in ordered",
            f"{LEAKS} 'tea' scores 1.000 after its reference solution was played, 0.000 before (so in 2 of 2",
        ),
        ([], "ordered.count(item) == 1", f"{LEAKS} 'tea' scores 1.000 after its reference solution was played, 0.000 before"),
        (
            [],
            "own - (item == 'tea' and 'rum' in ordered)",
            f"{LEAKS} 'tea' scores -1.000 after the other scenarios were played",
        ),
        (
            ["rum"],
            "own or item in ordered",
            f"{GIVEN} 1.000 in scenario 'rum' (so in 1 of 2 scenarios): let the reward depend",
        ),
        ([], "0.5 + own", f"{GIVEN} 0.500 in scenario 'tea' (so in 2 of 2 scenarios): let the reward depend on this rollout's"),
    ],
)
def test_check_warns_where_state_or_nothing_at_all_is_rewarded(project, art, orders, reward, warning):
    (project / "shop.py").write_text(STATEFUL.format(orders=orders))
    (project / "environments" / "shop.py").write_text(SHOP.format(reward=reward))
    _, out, _ = art("check", "shop")
    assert f"\n{warning}" in out
    assert "README has more under Servers with state" in out


def test_check_does_not_warn_where_a_server_has_state_and_only_a_rollouts_own_calls_are_rewarded(project, art):
    (project / "shop.py").write_text(STATEFUL.format(orders=["milk"]))
    (project / "environments" / "shop.py").write_text(SHOP.format(reward="own and item in ordered"))
    code, out, _ = art("check", "shop", "--json")
    assert (code, json.loads(out.splitlines()[-1])["warnings"]) == (0, [])


def test_check_blames_state_that_is_kept_before_the_policy_that_scores_by_it(project, art):
    (project / "shop.py").write_text(STATEFUL.format(orders=[]))
    (project / "environments" / "shop.py").write_text(SHOP.format(reward="item in ordered"))
    code, out, _ = art("check", "shop")
    assert code == 1
    told = [line for line in out.splitlines() if line.startswith(("WARNING", "FAILED"))]
    assert told[0].startswith(LEAKS)
    assert told[1] == "FAILED: empty turn scores 1.000, not below the reference solution's 1.000"
    assert not any("no tool scores" in line for line in told)
    assert out.partition("\nexample: ")[2].startswith("empty turn in scenario 'tea'")


def test_rollout_shows_who_said_what_and_the_token_stream(project, art):
    code, out, _ = art("rollout", HERE, "--temperature", "0", "--number", "1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("  user: ")
    assert any(line.startswith("» policy: calls ") for line in lines)
    assert any(line.startswith("« tool: ") for line in lines)
    assert lines[-1].startswith("stopped: answered, reward ")
    code, out, _ = art("rollout", HERE, "--temperature", "0", "--number", "1", "--tokens", "--json")
    assert "» policy: <tool_call>" in out
    played = json.loads(out.splitlines()[-1])
    assert "".join(text for _, text in played["parts"]).startswith("<|im_start|>system")
    assert {author for author, _ in played["parts"]} == {"world", "policy"}
    assert "\x1b" not in out


def test_a_terminal_sees_what_the_policy_wrote_in_colour_unless_it_wants_none(project, art, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = art("rollout", HERE, "--temperature", "0")
    assert "\x1b[32m» policy: calls " in out
    assert "\x1b[36m« tool: " in out
    assert out.splitlines()[0].startswith("  user: ")
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = art("rollout", HERE, "--temperature", "0")
    assert "\x1b" not in out


def test_a_training_run_from_the_command_line_reports_before_and_after_by_level(project, art):
    shape = ["--groups", "1", "--rollouts", "2", "--eval-n", "2", "--name", "short"]
    code, out, _ = art("train", HERE, "--steps", "1", *shape, "--json")
    assert code == 0
    assert out.startswith("runs/short: 1 step in ")
    assert out.count("  level all  n=2 ") == out.count("  level   1  n=1 ") == 2
    report = json.loads(out.splitlines()[-1])
    assert report["run"] == "runs/short"
    assert report["after"]["greedy"]["by_level"].keys() == {"1", "2"}
    code, out, _ = art("train", "--resume", "short", "--steps", "2", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["steps"] == 2
    code, out, _ = art("eval", HERE, "--model", "short@2", "--n", "2", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["n"] == 2


def test_a_run_without_evaluation_reports_its_steps(project, art):
    shape = ["--groups", "1", "--rollouts", "2", "--concurrency", "3", "--eval-n", "0", "--name", "plain"]
    code, out, _ = art("train", HERE, "--steps", "0", *shape)
    assert code == 0
    assert json.loads((project / "runs" / "plain" / "manifest.json").read_text())["training"]["plan"]["concurrency"] == 3
    assert re.fullmatch(r"runs/plain: 0 steps in \d+ s\n", out)


def test_in_a_process_of_its_own_nothing_but_the_answer_is_written(project):
    """A real server over stdio, real stderr: neither the servers nor the libraries leave a line. Progress, told every ten
    seconds, is left out."""
    shutil.copy(CALCULATOR, project / "environments")
    shutil.copy(Path(CALCULATOR).with_name("calculator_wordings.toml"), project / "environments")
    code = "from art_mcp.observe import console; console.QUIET_SECONDS = 1e9; from art_mcp.cli.main import main; main()"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "eval", "calculator", "--n", "4", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"solved", "ci95", "reward", "n", "malformed_rate", "tool_error_rate", "turns_mean", "by_level"} <= found.keys()
    assert found["by_level"]["1"].keys() >= {"solved", "n", "turns_mean"}


def test_rollouts_that_a_reward_broke_are_told_with_its_error(project, art):
    write(project, "flaky", SERVER, 'lambda trajectory: 1.0 / (trajectory.scenario.facts["a"] - 3)')
    code, out, err = art("eval", "flaky")
    assert code == 0
    assert "n=3, failed=1" in out
    assert "evaluating: 1 of 4 rollouts failed and count neither way, first with RewardError: reward 'correct': Zero" in err
