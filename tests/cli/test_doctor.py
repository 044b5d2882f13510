"""`art-mcp doctor`: findings as lines, a verdict as exit code, mistakes as one line on stderr."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALCULATOR = str(ROOT / "environments" / "calculator.py")
DEAD = """
from art_mcp import Environment, Scenario

environment = Environment(
    servers=[{"command": "python", "args": ["-c", "import sys; sys.exit('no database here')"]}],
    scenarios=lambda split: [Scenario("one", "Why?")],
    rewards={"any": lambda trajectory: 1.0},
)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "environments").mkdir()
    (tmp_path / "environments" / "dead.py").write_text(DEAD)
    server = {"command": "python", "args": [str(ROOT / "servers" / "calculator" / "server.py")]}
    (tmp_path / "config.json").write_text(json.dumps({"mcpServers": {"calculator": server}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_healthy_model_in_a_healthy_environment(project, art):
    code, out, err = art("doctor", "tiny", CALCULATOR, "--json")
    *lines, last = out.splitlines()
    report = json.loads(last)
    assert (code, report["healthy"]) == (0, True)
    found = {one["about"]: one for one in report["findings"]}
    assert found["opening"]["facts"]["tokens"] > 100
    assert found["full training"]["facts"]["training"] > found["full training"]["facts"]["sampling"] > 0
    assert {"memory", "Python", "template", "bridging", "servers", "LoRA 16"} <= found.keys()
    assert all(line.startswith(("ok ", "warning ", "problem ", "         ")) for line in lines)
    assert [line for line in err.splitlines() if not line.endswith("…")] == []


FOREIGN = """
from mcp.server import MCPServer

server = MCPServer("foreign")


@server.tool()
def lookup(word: str) -> str:
    return word
"""


def test_a_model_that_knows_a_few_tools_only_is_told_by_name_where_it_is_offered_others(project, art):
    (project / "foreign.py").write_text(FOREIGN)
    served = DEAD.replace('{"command": "python", "args": ["-c", "import sys; sys.exit(\'no database here\')"]}', '"foreign.py"')
    (project / "environments" / "words.py").write_text(served)
    code, out, _ = art("doctor", "tiny", "words")
    told = "tools: tiny was trained on the calculator environment's questions alone and never saw lookup"
    remedy = "→ teach it first, by art-mcp sft words, or choose a model that was made for tools"
    assert (code, f"warning  {told}\n         {remedy}\n" in out) == (0, True)
    shutil.copytree(ROOT / "art_mcp" / "tiny_policy", project / "mine")
    (project / "mine" / "art_mcp_tools.json").unlink()
    assert "never saw" not in art("doctor", "mine", "words")[1]
    assert "never saw" not in art("doctor", "tiny", CALCULATOR)[1]


def test_a_visit_asks_nvidia_smi_once(project, art, monkeypatch):
    asked = project / "asked"
    (project / "nvidia-smi").write_text(f"#!/bin/sh\necho once >> {asked}\necho 'NVIDIA H100, 81559, 81000, 570.86.15, 9.0'\n")
    (project / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{project}{os.pathsep}{os.environ['PATH']}")
    _, out, _ = art("doctor", "tiny", "--json")
    found = {one["about"]: one for one in json.loads(out.splitlines()[-1])["findings"]}
    assert found["GPU 0"]["facts"]["free_mib"] == "81000"
    kept = "on a GPU only what training keeps is reckoned, 18.6 MiB for full training or"
    assert found["memory needed"]["text"].startswith(kept)
    assert asked.read_text() == "once\n"


def test_what_is_wrong_is_told_with_its_remedy_and_exit_code_1(project, art):
    code, out, _ = art("doctor", "tiny", "dead")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("problem")]
    assert "no database here" in line
    assert "→ look at it alone: art-mcp tools SERVER" in out


def test_a_model_that_no_machine_holds_is_a_problem(project, art):
    shutil.copytree(ROOT / "art_mcp" / "tiny_policy", project / "huge")
    settings = json.loads((project / "huge" / "config.json").read_text())
    (project / "huge" / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 100_000}))
    code, out, _ = art("doctor", "huge", "--lora", "8", "--json")
    found = {one["about"]: one for one in json.loads(out.splitlines()[-1])["findings"]}["LoRA 8"]
    assert (code, found["level"]) == (1, "problem")
    assert found["facts"]["cache"] == 2**30  # what the engine keeps at most


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["./nowhere"], "no model folder at ./nowhere"),
        (["tiny", "nothing"], "no environment at environments/nothing.py"),
        (["tiny", "dead", "--option", "x"], "--option wants KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(project, art, words, told):
    code, _, err = art("doctor", *words)
    assert code == 2
    assert told in err.splitlines()[-1]


def test_the_machine_is_examined_without_torch(project):
    program = """
import atexit, sys
atexit.register(lambda: sys.stderr.write(" ".join(sorted({"torch", "transformers", "mcp"} & set(sys.modules)))))
sys.argv = ["art-mcp", "doctor"]
from art_mcp.cli.main import main
main()
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "processor" in done.stdout
