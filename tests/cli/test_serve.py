"""`art-mcp serve`: what it prints is enough for a client, Ctrl-C ends it, and what cannot be served is one line."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI

from art_mcp.wiring.serving import served_name

ROOT = Path(__file__).parents[2]
PROGRAM = "from art_mcp.cli.main import main; main()"


def start(folder, *words, **environ):
    command = [sys.executable, "-c", PROGRAM, "serve", *words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_it_prints_is_enough_for_a_client_and_ctrl_c_ends_it(tmp_path):
    process = start(tmp_path, "--json", ART_MCP_TOKEN="open sesame".replace(" ", "-"))
    try:
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines[0] == "tiny@0 is served; Ctrl-C ends it\n"
        told = json.loads(lines[-1])
        assert [line.split() for line in lines[1:4]] == [[key, told[key]] for key in ("base_url", "api_key", "model")]
        assert (told["api_key"], told["model"], told["policy"]) == ("open-sesame", "tiny", "tiny@0")
        assert told["base_url"].startswith("http://127.0.0.1:")
        messages = [{"role": "user", "content": "What is 2 plus 3?"}]
        with OpenAI(base_url=told["base_url"], api_key=told["api_key"]) as client:
            answer = client.chat.completions.create(model=told["model"], messages=messages, max_tokens=4)
            assert answer.model == told["policy"]
            with pytest.raises(AuthenticationError):
                client.with_options(api_key="wrong").models.list()
    finally:
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in complaint
    assert "error" not in complaint.lower()


def test_a_port_in_use_is_told_before_anything_is_loaded(art):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = art("serve", "--port", str(port))
    assert (code, out) == (2, "")
    assert err == f"error: port {port} on 127.0.0.1 is in use: choose another, or 0 for any free one\n"


def test_an_address_beyond_this_machine_needs_the_names_it_is_called_by(art):
    code, _, err = art("serve", "--host", "0.0.0.0")
    assert code == 2
    assert "--allow-host" in err


def test_a_model_that_is_not_there_is_one_line(art):
    code, out, err = art("serve", "runs/nowhere")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("tiny", "tiny"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("runs/first/checkpoints/step-50", "first-step-50"),
        ("models/my model@2", "my-model-2"),
    ],
)
def test_a_model_is_served_under_a_plain_word(source, name):
    assert served_name(source) == name
