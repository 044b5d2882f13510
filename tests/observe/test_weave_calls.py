"""Traces through the real weave client into a recorder on loopback: the tree of calls of one group, and of a training step."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from art_mcp.errors import ConfigError
from art_mcp.observe.weave_calls import open_weave

ROOT = Path(__file__).parents[2]
TRACED = Path(__file__).with_name("traced.py")
HERE = ROOT / "tests" / "wiring" / "calculator_here.py"
needs_weave = pytest.mark.skipif(importlib.util.find_spec("weave") is None, reason="weave is not installed")


class Recorder(BaseHTTPRequestHandler):
    """As much of W&B's servers as weave asks for; it keeps the calls."""

    protocol_version = "HTTP/1.1"
    calls: list[dict]

    def do_GET(self):
        self.answer({"min_required_weave_python_version": "0.0.1", "trace_server_version": "99.0.0"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path.endswith("/calls/complete"):
            self.calls += json.loads(body)["batch"]
        viewer = {"username": "me", "defaultEntity": {"name": "team"}}
        self.answer({"data": {"viewer": viewer, "project": {"name": "project"}}, "digest": "d", "id": "1", "res": []})

    def answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@contextmanager
def recorder() -> Iterator[tuple[dict[str, str], list[dict]]]:
    """The environment in which weave talks to a recorder, and the calls that it then gets."""
    calls: list[dict] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Recorder,), {"calls": calls}))
    thread = Thread(target=server.serve_forever)
    thread.start()
    where = f"http://127.0.0.1:{server.server_port}"
    environ = {**os.environ, "WF_TRACE_SERVER_URL": where, "WANDB_BASE_URL": where, "WANDB_API_KEY": "k" * 40}
    try:
        yield environ | {"WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, calls
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(*command, environ, cwd):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environ, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def kind(call):
    return call["op_name"].rpartition("/")[2].partition(":")[0]


def tree(calls, parent=None):
    """Kinds as nested tuples, children in the order in which they began."""
    children = sorted((call for call in calls if call["parent_id"] == parent), key=lambda call: call["id"])
    return tuple((kind(call), tree(calls, call["id"])) for call in children)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What a process wrote that played a group, trained on it, and evaluated; and the calls of both, by their traces' roots."""
    folder = tmp_path_factory.mktemp("traced")
    with recorder() as (environ, calls):
        evaluation = ("eval", HERE, "--n", 2, "--weave", "team/project", "--json")
        done = run(TRACED, HERE, *evaluation, environ=environ, cwd=folder)
    evaluations = {call["trace_id"] for call in calls if kind(call) == "art_mcp.evaluation"}
    apart = [[call for call in calls if (call["trace_id"] in evaluations) is part] for part in (False, True)]
    return done, *apart


@needs_weave
def test_one_group_and_a_training_step_are_a_tree_of_calls(traced):
    done, calls, _ = traced
    played = json.loads(done.stdout.splitlines()[0])
    assert "weave.init patches other libraries in this process globally" in done.stderr
    ours = [call for call in calls if kind(call).startswith("art_mcp.")]
    (root, rollouts), step = tree(ours)
    assert (root, step) == ("art_mcp.group", ("art_mcp.train_step", ()))
    assert [name for name, _ in rollouts] == ["art_mcp.rollout"] * 3
    assert all(below == () for _, inner in rollouts for _, below in inner)
    tools = {call["id"] for call in ours if kind(call) == "art_mcp.tool"}
    assert {call["parent_id"] for call in calls if call not in ours} <= tools  # what weave's own patch of mcp adds
    assert sorted([name for name, _ in inner] for _, inner in rollouts) == sorted(played["kinds"])
    assert {"art_mcp.turn", "art_mcp.tool", "art_mcp.reward"} == {name for _, inner in rollouts for name, _ in inner}
    assert len({call["trace_id"] for call in calls}) == 2

    def told(name, side):
        return [call[side] for call in calls if kind(call) == f"art_mcp.{name}"]

    assert sorted(result["text"] for result in told("tool", "output")) == sorted(played["results"])
    assert {given["messages"][-1]["content"] for given in told("turn", "inputs") if given["turn"] == 0} == {played["prompt"]}
    assert sorted(result["reward"] for result in told("reward", "output")) == sorted(played["rewards"])
    assert sorted(result["reward"] for result in told("rollout", "output")) == sorted(played["rewards"])
    assert told("group", "output") == [{"rewards": played["rewards"], "failed": 0}]
    assert told("train_step", "output")[0]["loss"] == played["loss"]
    assert all(call["ended_at"] and not call.get("exception") for call in calls)


@needs_weave
def test_the_command_line_traces_an_evaluation(traced):
    done, _, calls = traced
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 2
    assert done.stderr.count("tracing into the weave project 'team/project'") == 2
    ((root, groups),) = tree(calls)
    assert root == "art_mcp.evaluation"
    assert Counter(name for name, _ in groups) == {"art_mcp.group": 2}
    assert [name for _, rollouts in groups for name, _ in rollouts] == ["art_mcp.rollout"] * 2


@needs_weave
@pytest.mark.anyio
async def test_weave_that_does_not_start_is_one_line_that_says_why():
    program = (
        "import anyio; from art_mcp.errors import ConfigError; from art_mcp.observe.weave_calls import open_weave\n"
        "try: anyio.run(open_weave, 'a/b/c')\n"
        "except ConfigError as error: print(error)"
    )
    with recorder() as (environ, _):
        done = run("-c", program, environ=environ, cwd=ROOT)
    assert done.stdout.startswith("weave does not start for project 'a/b/c': project_name must be of the form")


@pytest.mark.anyio
async def test_where_weave_is_missing_the_way_to_install_it_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"weave is not installed: pip install 'art-mcp\[weave\]'"):
        await open_weave("project")
