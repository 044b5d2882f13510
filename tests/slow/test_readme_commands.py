"""Every command line that the README shows in a block, run in its order; sizes are cut, nothing else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
SMALLER = {
    r"--n 200": "--n 8",
    r"(train calculator) --steps 100": r"\1 --steps 2 --eval-n 8",
    r"--steps 150": "--steps 3",
    r"(sft calculator) --demonstrations 200": r"\1 --demonstrations 64 --eval-n 8",
    r"--steps 20$": "--steps 2",
    r"(inspect \w+)": r"\1 --print",
    r"^(art-mcp serve \w+).*": r"timeout --signal INT 30 \1 || test $? = 124",
}


def cut(command: str) -> str:
    for pattern, smaller in SMALLER.items():
        command = re.sub(pattern, smaller, command)
    return command


COMMANDS = [cut(line) for line in LINES if line.startswith("art-mcp ") and " letters" not in line]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_every_command_does_what_the_readme_says(tmp_path):
    shutil.copy(ROOT / "config.json", tmp_path)
    for folder in ("servers", "environments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    script = Path(sys.executable).with_name("art-mcp")
    environ = {**os.environ, "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or expected(command, done.stderr), f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or expected(command, done.stderr)
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"first"}


def expected(command: str, errors: str) -> bool:
    """What is told of servers that nobody has started, and of a machine without Node."""
    return (command == "art-mcp tools" and "nothing listens" in errors) or (" inspect " in command and "node" in errors.lower())
