"""The README is true: its programs run, its commands are accepted, its links lead somewhere."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from art_mcp.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = {re.match(r"# (\S+)\n", text)[1]: text for kind, text in BLOCKS if kind == "python"}
LINES = [line.partition("#")[0].strip() for kind, text in BLOCKS if not kind for line in text.splitlines()]
QUOTED = [text.replace("…", "tiny") for text in re.findall(r"`(art-mcp \w[^`]*)`", TEXT.replace("\n", " "))]
COMMANDS = sorted({line for line in [*LINES, *QUOTED] if line.startswith("art-mcp ")})
SIZE = "STEPS, SCENARIOS = 100, 16"


def run(*command: str, cwd: Path) -> str:
    """What a command printed; it must end well."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def clone(tmp_path) -> Path:
    """What a clone holds beside the package."""
    shutil.copy(ROOT / "config.json", tmp_path)
    for folder in ("servers", "environments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_there_is_something_to_check():
    assert set(PROGRAMS) == {"servers/letters.py", "environments/letters.py", "train_calculator.py", "ask_policy.py"}
    assert {command.split()[1] for command in COMMANDS} >= {"train", "rollout", "eval", "check", "tools", "call", "inspect"}
    assert len(COMMANDS) > 10


def test_the_training_script_trains_and_its_model_can_be_measured(clone, art, monkeypatch, capsys):
    assert SIZE in PROGRAMS["train_calculator.py"]
    assert len(PROGRAMS["train_calculator.py"].splitlines()) <= 26  # its name and 25 lines
    (clone / "train_calculator.py").write_text(PROGRAMS["train_calculator.py"].replace(SIZE, SIZE.replace("100, 16", "2, 2")))
    monkeypatch.chdir(clone)
    runpy.run_path("train_calculator.py", run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["step 0", "step 1"]
    code, measured, _ = art(*shlex.split("eval calculator --model runs/from-python --n 2 --json"))
    assert (code, json.loads(measured.splitlines()[-1])["n"]) == (0, 2)


def test_the_program_that_asks_the_policy_is_answered(clone, capsys):
    (clone / "ask_policy.py").write_text(PROGRAMS["ask_policy.py"])
    runpy.run_path(str(clone / "ask_policy.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("calculator@0 ")
    assert printed.endswith("{'bridged': False, 'policy': 'calculator@0'}\n")


def test_the_environment_of_ones_own_passes_its_check_with_no_config_file(tmp_path, art, monkeypatch):
    for name in ("servers/letters.py", "environments/letters.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(PROGRAMS[name])
    monkeypatch.chdir(tmp_path)
    code, printed, _ = art("check", "letters")
    assert code == 0
    assert "How many times does a occur in strawberry?" in printed
    assert printed.splitlines()[-1].startswith("ok")


def parse(command: str) -> None:
    _, name, *rest = shlex.split(command)
    typer.main.get_command(app).commands[name].make_context(name, rest)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_accepts(command):
    parse(command)


@pytest.mark.parametrize("command", ["art-mcp train calculator --secnods 165", "art-mcp eval --n 200", "art-mcp check a b"])
def test_the_command_line_refuses_what_is_misspelt(command):
    with pytest.raises(Exception, match=r"(?i)no such option|missing parameter|unexpected"):
        parse(command)


def test_what_the_inspector_is_told_to_open_is_what_the_server_serves():
    (start,) = (line for line in LINES if line.startswith("python "))
    (inspect,) = (line for line in LINES if line.startswith("npx "))
    program = start.split()[1]
    assert (ROOT / program).is_file()
    options = dict(zip(inspect.split()[2::2], inspect.split()[3::2], strict=True))
    entry = json.loads((ROOT / options["--config"]).read_text())["mcpServers"][options["--server"]]
    usage = run(sys.executable, str(ROOT / program), "--help", cwd=ROOT)
    assert entry["type"] == start.split()[-1] == "sse"
    port = re.search(r":(\d+)/sse$", entry["url"])[1]
    assert f"default: {port}" in usage


def test_every_link_and_every_folder_exists():
    linked = re.findall(r"\]\(([^)]+)\)", TEXT)
    folders = re.findall(r"^\| `(\w+/)` \|", TEXT, re.MULTILINE)
    assert linked
    assert folders
    assert [name for name in [*linked, *folders] if not (ROOT / name).exists()] == []


def test_every_make_target_that_is_named_exists():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^|`)make (\w+)", TEXT, re.MULTILINE)
    assert named
    assert set(named) <= set(targets)
