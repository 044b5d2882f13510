"""A clone with the Inspector in it, for as long as a test takes; whatever a test leaves running makes it fail."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import commands, remaining
from tests.slow.programs import INSTALLED, ROOT, Clone, node_folder

MARK = "STARTED_BY_TEST"


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    """npx finds what is installed in the clone, as it would after `npm install` there, and asks no registry for it."""
    if not (INSTALLED / ".bin" / "mcp-inspector").exists():
        pytest.skip("the MCP Inspector is not in .peers/inspector, where `make test-slow` puts it if npm is installed")
    if (node := node_folder()) is None:
        pytest.skip("no node 22.19 or newer, which the MCP Inspector needs")
    if not shutil.which("npx"):
        pytest.skip("no npx, which comes with npm")
    folder, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    shutil.copytree(ROOT / "servers", folder / "servers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "config.json", folder)
    (folder / ".peers").mkdir()
    (folder / ".peers" / "inspector").symlink_to(INSTALLED.parent)
    (folder / "node_modules").symlink_to(INSTALLED)
    environ = {
        "PATH": os.pathsep.join([str(node), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(home),
        "NODE_PATH": str(INSTALLED),
        "npm_config_offline": "true",
        "npm_config_update_notifier": "false",
        "MCP_AUTO_OPEN_ENABLED": "false",
        "MCP_INSPECTOR_SECRET_STORE": "memory",
        MARK: str(tmp_path),
    }
    yield Clone(folder, environ)
    assert left_running(str(tmp_path)) == []


def left_running(mark: str) -> list[str]:
    """What still runs half a minute after the test, by command line; it is killed."""
    alive = remaining([process for process in psutil.process_iter() if marked(process, mark)], within=30)
    lines = [" ".join(words) for _, words in commands(alive)]
    for process in alive:
        process.kill()
    return lines


def marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark or any(mark in word for word in process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
