"""`art-mcp inspect`: which Inspector is started and how, and what is said where that cannot be. The real one: tests/slow."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import pytest

from art_mcp.wiring.inspector import PACKAGE, free
from tests.ports import free_port, silent_port
from tests.processes import remaining

ROOT = Path(__file__).parents[2]
FOLDER = str(Path(sys.executable).parent)
SERVERS = {
    "calculator": {"command": "python", "args": ["servers/calculator/server.py"]},
    "calculator-http": {"type": "http", "url": "http://localhost:{port}/mcp"},
    "everything": {"type": "sse", "url": "http://localhost:{port}/sse"},
    "everything-again": {"type": "sse", "url": "http://localhost:{port}/sse"},
    "far": {"type": "sse", "url": "http://far.example/sse"},
    "unknown": {"type": "sse", "url": "http://localhost:${PORT}/sse"},
}
NODE = """#!/bin/sh
if [ "$1" = --version ]; then echo v{version}; exit 0; fi
{first}
echo "$CLIENT_PORT $PWD $(command -v python) $*"
{then}
"""


@pytest.fixture
def silent():
    """The socket at whose port nothing listens, as config.json says of its servers."""
    with silent_port() as held:
        yield held


@pytest.fixture
def project(tmp_path, monkeypatch, silent):
    """A folder with a config.json, and a PATH on which nothing is but what a test puts into bin/."""
    (tmp_path / "bin").mkdir()
    servers = json.dumps({"mcpServers": SERVERS}).replace("{port}", str(silent.getsockname()[1]))
    (tmp_path / "config.json").write_text(servers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin/nothing")
    return tmp_path


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def install(project, first="", then="", version="22.19.0"):
    """A stand-in for what `make peers` makes: it tells what it was started with."""
    local = project / ".peers" / "inspector" / "node_modules"
    program(local / ".bin" / "mcp-inspector", "")
    return program(local / "node" / "bin" / "node", NODE.format(version=version, first=first, then=then))


def test_an_inspector_that_is_installed_here_is_preferred_with_its_own_node(project, art):
    node = install(project)
    program(project / "bin" / "node", NODE.format(version="20.1.0", first="", then=""))
    code, out, _ = art("inspect", "calculator", "--json")
    told = json.loads(out)
    script = str(project / ".peers" / "inspector" / "node_modules" / ".bin" / "mcp-inspector")
    assert code == 0
    assert told["command"] == [str(node), script, "--config", str(project / "config.json"), "--server", "calculator"]
    assert told["cwd"] == str(project)
    assert told["env"]["PATH"].split(":") == [FOLDER, str(node.parent), f"{project}/bin", "/usr/bin/nothing"]


def test_without_one_npx_fetches_the_version_that_is_known_to_work(project, art):
    program(project / "bin" / "node", NODE.format(version="24.0.1", first="", then=""))
    npx = program(project / "bin" / "npx", "")
    code, out, _ = art("inspect", "--print", "--port", "7000")
    assert code == 0
    path, port, *words = shlex.split(out)
    assert path == f"PATH={FOLDER}:$PATH"
    assert port == "CLIENT_PORT=7000"
    assert words == [str(npx), "--yes", PACKAGE, "--config", str(project / "config.json")]


def test_the_printed_command_can_be_run_from_here(project, art, monkeypatch):
    install(project)
    monkeypatch.chdir(project.parent)
    (project / ".peers").rename(project.parent / ".peers")
    code, out, _ = art("inspect", "everything", "--config", f"{project.name}/config.json", "--print")
    assert code == 0
    told = subprocess.run(["/bin/sh", "-c", out], capture_output=True, text=True, check=True).stdout.split()
    assert told[:3] == ["6274", str(project), f"{FOLDER}/python"]
    assert told[-4:] == ["--config", str(project / "config.json"), "--server", "everything"]


@pytest.mark.parametrize(
    ("version", "npx", "told"),
    [
        (None, True, r"the MCP Inspector needs node 22.19 or newer, and there is none: install it"),
        (
            "20.20.2",
            True,
            "/bin/node is 20.20.2: install a newer one, or have one here: npm install --prefix .peers/",
        ),
        ("22.18.9", True, "is 22.18.9"),
        ("tomorrow", True, "is none that says its version"),
        ("22.19.0", False, "npx is missing, which fetches the MCP Inspector: install npm"),
    ],
)
def test_what_is_missing_is_told_in_one_line(project, art, version, npx, told):
    if version is not None:
        program(project / "bin" / "node", NODE.format(version=version, first="", then=""))
    if npx:
        program(project / "bin" / "npx", "")
    code, out, err = art("inspect")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert told in err


def test_a_wrong_server_and_a_port_in_use_are_told_before_anything_starts(project, art):
    install(project)
    code, _, err = art("inspect", "everthing")
    assert (code, err.count("\n")) == (2, 1)
    assert "no server 'everthing' in config.json; did you mean 'everything'?" in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = art("inspect", "--port", str(port))
    assert (code, err) == (2, f"error: port {port} on 127.0.0.1 is in use; choose another with --port\n")


def test_servers_that_are_still_to_be_started_are_named_with_a_command(project, art, silent):
    install(project)
    port = silent.getsockname()[1]
    *_, err = art("inspect", "--print")
    first, second = err.splitlines()
    assert first.startswith(f"hint: calculator-http: nothing listens on localhost:{port} yet, so start a server in another ter")
    assert first.endswith(f"such as: python servers/calculator/server.py --transport streamable-http --port {port}")
    assert second.startswith("hint: everything, everything-again: nothing listens")
    assert second.endswith(f"such as: python servers/calculator/server.py --transport sse --port {port}")
    assert art("inspect", "calculator", "--print")[2] == ""
    silent.listen()
    assert not free("localhost", port)
    assert art("inspect", "everything", "--print")[2] == ""


def test_an_inspector_that_fails_is_told_with_its_exit_code(project, art):
    install(project, then="exit 3")
    code, _, err = art("inspect", "calculator", "--port", str(free_port()))
    assert (code, err) == (2, "error: the MCP Inspector ended with exit code 3\n")


COMMAND = (sys.executable, "-c", "from art_mcp.cli.main import main; main()", "inspect")


def test_ctrl_c_ends_the_inspector_and_all_that_it_started(project):
    install(project, first="trap '' INT; /bin/sleep 1000 &", then="wait")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with inspecting("--port", str(free_port()), environ=environ) as process:
        assert process.stdout.readline().split()[1] == str(project)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_real_inspector_answers_until_ctrl_c(project, monkeypatch):
    real = ROOT / ".peers" / "inspector"
    if not (real / "node_modules" / ".bin" / "mcp-inspector").exists():
        pytest.skip("the MCP Inspector is not in .peers/inspector, where `make peers` puts it")
    (project / ".peers").mkdir()
    (project / ".peers" / "inspector").symlink_to(real)
    quiet = {"MCP_AUTO_OPEN_ENABLED": "false", "MCP_INSPECTOR_SECRET_STORE": "memory", "HOME": str(project)}
    port = free_port()
    with inspecting("calculator", "--port", str(port), environ={**os.environ, **quiet, "PYTHONPATH": str(ROOT)}) as process:
        url = next(line.strip() for line in process.stdout if "http://127.0.0.1" in line)
        assert urlsplit(url).port == port
        with urlopen(url, timeout=60) as page:
            assert page.status == 200


@contextmanager
def inspecting(*words, environ):
    """`art-mcp inspect` in a process of its own; Ctrl-C when the block ends, which must end all that it started."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*COMMAND, *words], env=environ, start_new_session=True, **pipes) as process:
        try:
            yield process
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert len(children) >= 3
    assert remaining(children) == []
