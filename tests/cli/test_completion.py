"""What the shell offers after Tab, asked as the shell asks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = {
    "environments": ("eval ", ["sums", "words"]),
    "environments by their beginning": ("train su", ["sums"]),
    "models": ("eval sums --model ", ["tiny", "first", "latest"]),
    "models to examine": ("doctor fi", ["first"]),
    "environments to examine in": ("doctor tiny su", ["sums"]),
    "runs": ("train --resume f", ["first"]),
    "servers": ("tools ", ["files", "words"]),
    "servers of another file": ("call --config other.json ", ["other"]),
    "servers of a broken file": ("inspect --config broken.json ", []),
    "servers of no file": ("tools --config nowhere.json ", []),
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name in ("sums", "words", "_private"):
        (tmp_path / "environments").mkdir(exist_ok=True)
        (tmp_path / "environments" / f"{name}.py").touch()
    for name in ("first", "latest"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").touch()
    (tmp_path / "runs" / "no-run").mkdir()
    for file, servers in {"config": ["words", "files"], "other": ["other"]}.items():
        (tmp_path / f"{file}.json").write_text(json.dumps({"mcpServers": {name: {"command": "x"} for name in servers}}))
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tab(art, monkeypatch, words):
    typed = f"art-mcp {words}"
    for name, value in {"COMP_WORDS": typed, "COMP_CWORD": len(f"{typed}x".split()) - 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("_ART_MCP_COMPLETE", "complete_bash")
    code, out, err = art()
    assert (code, err) == (0, "")
    return out.split()


@pytest.mark.parametrize(("words", "offered"), WORDS.values(), ids=list(WORDS))
def test_the_shell_offers_names_that_lie_in_this_folder(project, art, monkeypatch, words, offered):
    assert tab(art, monkeypatch, words) == offered


def test_commands_and_options_are_offered_too(project, art, monkeypatch):
    assert tab(art, monkeypatch, "ca") == ["call"]
    assert tab(art, monkeypatch, "tools --j") == ["--json"]


def test_completion_loads_nothing_heavy(project):
    """The shell starts a process for each Tab."""
    program = """
import atexit, json, sys
heavy = {"torch", "transformers", "mcp", "openai", "pyarrow", "jsonschema", "httpx2"}
atexit.register(lambda: sys.stderr.write(json.dumps(sorted(heavy & set(sys.modules)))))
sys.argv = ["art-mcp"]
from art_mcp.cli.main import main
main()
"""
    asked = {"COMP_WORDS": "art-mcp tools ", "COMP_CWORD": "2", "_ART_MCP_COMPLETE": "complete_bash", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout.split(), done.stderr) == (["files", "words"], "[]")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_shown(art, shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    code, out, _ = art("--show-completion", shell)
    assert code == 0
    assert f"_ART_MCP_COMPLETE=complete_{shell}" in out
