"""What goes wrong around a command, in a process of its own: one clear line on stderr, exit code 2, and no traceback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ART = str(Path(sys.executable).with_name("art-mcp"))
SERVER = ROOT / "servers" / "calculator" / "server.py"
HERE = str(ROOT / "tests" / "wiring" / "calculator_here.py")
ENVIRONMENT = """
from art_mcp import Environment, Scenario

environment = Environment(
    servers=["calculator"], scenarios=lambda split: [Scenario("one", "1 + 1?")], rewards={"correct": lambda trajectory: 0.0}
)
"""
SERVERS = {
    "calculator": {"command": "python", "args": [str(SERVER)]},
    "mortal": {"command": "python", "args": ["-c", "import sys; sys.exit('no database here')"]},
    "secret": {"command": "python", "args": ["x.py"], "env": {"KEY": "${NO_SUCH_VARIABLE}"}},
}
BROKEN = {
    "comma": b'{"mcpServers": {\n  "a": {"command": "x",}}}',
    "empty": b"",
    "list": b"[1, 2]",
    "nameless": b'{"mcpServers": {}}',
    "untyped": b'{"mcpServers": {"a": {"url": "http://localhost:1/mcp"}}}',
    "latin": b'{"mcpServers": {"a": {"command": "\xe9"}}}',
    "deep": b"[" * 100_000,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder as a user has it, with things in it that are wrong."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "environments").mkdir()
    (folder / "environments" / "sums.py").write_text(ENVIRONMENT)
    (folder / "mine.py").write_text(ENVIRONMENT)
    (folder / "config.json").write_text(json.dumps({"mcpServers": SERVERS}))
    for name, content in BROKEN.items():
        (folder / f"{name}.json").write_bytes(content)
    (folder / "folder.json").mkdir()
    (folder / "hollow").mkdir()
    (folder / "hollow" / "config.json").write_text("{}")
    return folder


def run(project, *words, **options):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    environ.pop("NO_SUCH_VARIABLE", None)
    return subprocess.run(
        words, cwd=project, env=environ, stderr=subprocess.PIPE, text=True, check=False, timeout=280, **options
    )


def one_line(done, told):
    """The process ended with 2 after one line that says this."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.search(told, done.stderr), done.stderr
    return True


FAULTS = {
    "wrong environment": ("eval smus", r"no environment at environments/smus\.py; there are: sums"),
    "wrong module": ("eval mien:environment", "loading the environment module 'mien': ModuleNotFoundError"),
    "wrong split of a module in this folder": ("eval mine:environment --split tset", "no split 'tset'; it has train, test"),
    "wrong server": ("tools calculatr", r"no server 'calculatr' in config\.json; did you mean 'calculator'\? there are: "),
    "server that exits": ("tools mortal", "server 'mortal' ended with exit code 1 before it was ready: no database here"),
    "missing variable": ("tools secret", r"'secret': env\.KEY needs the environment variable NO_SUCH_VARIABLE, which is not"),
    "model without weights": ("eval sums --model hollow", r"hollow has no weights: put \*\.safetensors there"),
    "config with a comma too many": ("tools --config comma.json", r"comma\.json, line 2, column \d+: "),
    "empty config": ("tools --config empty.json", r"empty\.json, line 1, column 1: "),
    "config that is a list": ("tools --config list.json", r"list\.json names no servers: it needs "),
    "config without servers": ("tools --config nameless.json", r"nameless\.json names no servers"),
    "config with a URL without a type": ("tools --config untyped.json", 'has a url but no type: add "type": "streamable-http"'),
    "config that is no UTF-8": ("tools --config latin.json", r"reading latin\.json: .*can't decode"),
    "config without an end": ("tools --config deep.json", r"deep\.json: its lists and objects are nested too deep"),
    "config that is a folder": ("tools --config folder.json", r"reading folder\.json: .*[Ii]s a directory"),
    "no config": ("tools --config nowhere.json", r"no config file at nowhere\.json"),
}


@pytest.mark.parametrize(("words", "told"), FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_one_line_and_exit_code_2(project, words, told):
    done = run(project, ART, *words.split(), stdout=subprocess.PIPE)
    assert one_line(done, told)
    assert done.stdout == ""


LOADED = """
import sys
from art_mcp.cli.main import main

try:
    main()
finally:
    print(*sys.modules)
"""


@pytest.mark.parametrize("words", ["eval sums --model hollow", "train sums --model hollow", "serve hollow"])
def test_a_model_without_weights_is_told_before_torch_is_loaded(project, words):
    done = run(project, sys.executable, "-c", LOADED, *words.split(), stdout=subprocess.PIPE)
    assert one_line(done, r"hollow has no weights: put \*\.safetensors there")
    loaded = done.stdout.split()
    assert "art_mcp.wiring.stage" in loaded
    assert not {"torch", "transformers", "mcp"} & set(loaded)


ONE_AFTER_THE_OTHER = """
import os, sys
from art_mcp.cli.main import main

place, *commands = sys.argv[1:]
for folder in (os.getcwd(), place):
    os.chdir(folder)
    for words in commands:
        sys.argv = ["art-mcp", *words.split()]
        try:
            main()
        except SystemExit as end:
            print(end.code, words, file=sys.stderr)
"""
"""Commands in this folder, then in another: what loads transformers, to ask the hub, does so once."""


def test_a_mistyped_run_is_told_as_one_before_the_hub_is_mentioned(project, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shutil.copytree(project, tmp_path / "used")
    for name in ("my-first", "other"):
        (tmp_path / "used" / "runs" / name).mkdir(parents=True)
        (tmp_path / "used" / "runs" / name / "manifest.json").write_text("{}")
    told = "no folder my-frist here, and none could be had from the hub: "
    missed = "no run 'my-frist' under runs/, did you mean 'my-first'? there are: my-first, other; "
    commands = ("eval sums --model my-frist", "export my-frist out", "doctor my-frist")
    done = run(project, sys.executable, "-c", ONE_AFTER_THE_OTHER, str(tmp_path / "used"), *commands, stdout=subprocess.PIPE)
    lines = done.stderr.splitlines()
    for first in ("", missed):
        for words in commands:
            ended = lines.index(f"2 {words}")
            assert lines[ended - 1].startswith(f"error: {first}{told}"), done.stderr
            lines = lines[ended + 1 :]
    assert lines == []


def test_a_port_in_use_is_one_line(project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(project, sys.executable, str(SERVER), "--transport", "sse", "--port", str(port), stdout=subprocess.PIPE)
    told = f"calculator: port {port} on 127.0.0.1 is in use; choose another with --port\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
@pytest.mark.parametrize("words", ["--help", "--version"])
def test_an_answer_that_finds_the_disk_full_is_one_line(project, words):
    with Path("/dev/full").open("w") as full:
        assert one_line(run(project, ART, words, stdout=full), "No space left on device: make room there")


MOUNT = 'mkdir -p runs && mount -t tmpfs -o size="$1" none runs && shift && "$@"; code=$?; cp -r runs kept; exit $code'
"""A really full disk needs a small one of its own, which goes with the process that has it."""
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
TRAIN = (ART, "train", HERE, "--steps", "2", "--groups", "1", "--rollouts", "2", "--eval-n", "0", "--save-every", "1")


@pytest.fixture
def small_disk(tmp_path):
    """Runs a command in a folder whose runs/ lies on a disk of so many kB; gives what it left there."""
    if not shutil.which("unshare") or run(tmp_path, *NAMESPACE, MOUNT, "sh", "4k", "true").returncode:
        pytest.skip("no disk of its own can be mounted here, for which unshare must be allowed")
    shutil.rmtree(tmp_path / "kept")

    def on(size, *command):
        done = run(tmp_path, *NAMESPACE, MOUNT, "sh", f"{size}k", *command, stdout=subprocess.PIPE)
        return done, tmp_path / "kept" / "x"

    return on


def nothing_claims_to_be_whole(left):
    """Neither a checkpoint nor a picture, and a manifest that does not say that the run has ended well."""
    assert list(left.rglob("*.tmp")) == []
    assert list(left.glob("checkpoints/*")) == []
    assert not (left / "reward.png").exists()
    assert json.loads((left / "manifest.json").read_text()).get("status") != "finished"
    return True


FILES = {8: "manifest.json", 20: "checkpoints/step-000001", 44: "checkpoints/step-000001"}
"""What a training run writes last when a disk of so many kB is full: with 20, the policy of a step that it could not record."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", FILES)
def test_a_disk_that_is_full_ends_a_training_run_in_one_line(small_disk, size):
    done, left = small_disk(size, *TRAIN, "--name", "x")
    assert one_line(done, f"writing runs/x/{FILES[size]}: .*No space left on device")
    assert done.stdout == ""
    assert nothing_claims_to_be_whole(left)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_found_the_disk_full_goes_on_once_there_is_room(small_disk):
    again = '"$0" "$@" || mount -o remount,size=100m runs && "$0" train --resume x --json'
    done, left = small_disk(40, "sh", "-c", again, *TRAIN, "--name", "x")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    assert json.loads((left / "manifest.json").read_text())["status"] == "finished"
    assert [path.name for path in sorted((left / "checkpoints").iterdir())] == ["step-000001", "step-000002"]
    assert (left / "reward.png").stat().st_size > 1000
