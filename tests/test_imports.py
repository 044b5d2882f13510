"""Importing art_mcp, or its command line, costs little and touches nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "vllm", "unsloth", "mcp", "openai", "weave", "wandb", "peft", "pyarrow", "matplotlib"}


def in_fresh_interpreter(program: str, folder: Path) -> dict:
    """What `program` leaves in the variable `seen`."""
    program = f"import json, sys\n{program}\nsys.stdout.write(json.dumps(seen))"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environ, capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["art_mcp", "art_mcp.cli.main", "art_mcp.openai_patch"])
def test_importing_loads_no_heavy_library(module, tmp_path):
    loaded = in_fresh_interpreter(f"import {module}\nseen = [name for name in sys.modules if '.' not in name]", tmp_path)
    assert module.partition(".")[0] in loaded
    assert not HEAVY & set(loaded)


def test_the_help_of_the_command_line_loads_no_heavy_library(tmp_path):
    program = """
import contextlib, io
from art_mcp.cli.main import main
sys.argv = ["art-mcp", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    main()
seen = [printed.getvalue(), *(name for name in sys.modules if '.' not in name)]
"""
    printed, *loaded = in_fresh_interpreter(program, tmp_path)
    assert "Usage" in printed
    assert not HEAVY & set(loaded)


def test_importing_changes_neither_the_environment_nor_the_folder_nor_other_libraries(tmp_path):
    (tmp_path / ".env").write_text("ART_MCP_TEST_OF_DOTENV=1\n")
    program = """
import logging, os, signal, warnings
def state():
    return [dict(os.environ), os.getcwd(), sys.path[:], logging.root.handlers[:], logging.root.level,
            str(signal.getsignal(signal.SIGTERM)), str(sys.excepthook)]
before = state()
import art_mcp, art_mcp.cli.main
seen = [name for name, old, new in zip(["environ", "cwd", "path", "log handlers", "log level", "SIGTERM", "excepthook"],
                                       before, state()) if old != new]
"""
    assert in_fresh_interpreter(program, tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def test_every_exported_name_can_be_had(tmp_path):
    program = "import art_mcp\nseen = [name for name in art_mcp.__all__ if getattr(art_mcp, name, None) is None]"
    assert in_fresh_interpreter(program, tmp_path) == []


def test_a_name_that_does_not_exist_is_an_attribute_error():
    import art_mcp

    with pytest.raises(AttributeError, match="NoSuchThing"):
        art_mcp.NoSuchThing  # noqa: B018
