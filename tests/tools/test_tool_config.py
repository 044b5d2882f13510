"""The mcpServers file: what it may say, and one clear line for each thing that it may not."""

import json
import sys
from pathlib import Path

import pytest

from art_mcp.errors import ConfigError
from art_mcp.tools.config import load_config, pick, resolve, server_spec, target_spec
from art_mcp.types import ServerSpec


def written(folder: Path, servers: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"mcpServers": servers, "other": 1}))
    return path


def test_our_own_config_has_a_type_on_every_entry_and_loads():
    path = Path(__file__).parents[2] / "config.json"
    entries = json.loads(path.read_text())["mcpServers"]
    assert all("type" in entry for entry in entries.values())
    servers = load_config(path)
    assert [(spec.name, spec.transport) for spec in servers.values()] == [
        ("calculator", "stdio"),
        ("calculator-sse", "sse"),
        ("calculator-http", "streamable-http"),
        ("everything", "sse"),
    ]


def test_python_is_this_interpreter_and_the_server_runs_in_the_folder_of_the_file(tmp_path):
    path = written(tmp_path, {"a": {"command": "python", "args": ["server.py"], "env": {"X": "1"}}})
    expected = ServerSpec("a", "stdio", command=sys.executable, args=("server.py",), env={"X": "1"}, cwd=tmp_path.resolve())
    assert load_config(path) == {"a": expected}


def test_with_a_cwd_files_beside_the_config_are_still_found(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "server.py").touch()
    (tmp_path / "run").touch()
    spec = server_spec("a", {"command": "./run", "args": ["server.py", "--flag"], "cwd": "work"}, tmp_path)
    assert spec.cwd == tmp_path.resolve() / "work"
    assert spec.command == str(tmp_path.resolve() / "run")
    assert spec.args == (str(tmp_path.resolve() / "server.py"), "--flag")


def test_an_argument_that_is_too_long_for_a_path_is_no_path(tmp_path):
    spec = server_spec("a", {"command": "x", "args": ["y" * 5000], "cwd": "work"}, tmp_path)
    assert spec.args == ("y" * 5000,)


def test_a_missing_variable_is_told_on_one_line_whatever_it_was_for():
    spec = server_spec("a", {"command": "x", "env": {"two\nlines": "${NOT_SET}"}})
    with pytest.raises(ConfigError, match=r"env\.'two\\nlines' needs the environment variable NOT_SET"):
        resolve(spec, {})


def test_http_is_streamable_http():
    assert server_spec("a", {"type": "http", "url": "http://x/mcp", "headers": {"H": "v"}}) == ServerSpec(
        "a", "streamable-http", url="http://x/mcp", headers={"H": "v"}
    )


def test_keys_of_other_clients_are_left_alone():
    entry = {"command": "x", "disabled": False, "alwaysAllow": [], "timeout": 60, "x-note": "mine"}
    assert server_spec("a", entry).command == "x"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"url": "http://x/mcp"}, 'server \'a\' has a url but no type: add "type": "streamable-http"'),
        ({"url": "http://x/sse?k=1"}, 'add "type": "sse"'),
        ({"url": "http://x", "type": "SSE"}, "has type 'SSE', which no URL has"),
        ({"url": "http://x", "type": "stdio"}, "has type 'stdio', which no URL has"),
        ({"command": "x", "type": "sse"}, "has a command, so its type is \"stdio\", not 'sse'"),
        ({"command": "x", "url": "http://x"}, "either a command (stdio) or a url, not both"),
        ({}, "and has neither"),
        ({"command": "x", "args": "y"}, "args must be a list, got a string"),
        ({"command": "x", "args": ["y", 1]}, "args[1] must be a string, got a value of type int"),
        ({"command": "x", "env": {"PIN": 4711}}, "env.PIN must be a string, got a value of type int"),
        ({"command": ["x"]}, "command must be a string, got a list"),
        ({"command": "x", "args": {}}, "args must be a list, got an object"),
        ({"command": "x", "cwd": False}, "cwd must be a string, got a value of type bool"),
        ({"command": "x", "env": {"two\nlines\ud800": 4711}}, "env.'two\\nlines\\ud800' must be a string, got a value"),
        ({"command": "x", "arg": []}, "unknown key 'arg'; did you mean 'args'?"),
        ("x", "expected an object, got a string"),
    ],
)
def test_a_wrong_entry_is_one_clear_line(entry, message):
    with pytest.raises(ConfigError) as caught:
        server_spec("a", entry)
    assert message in str(caught.value)
    assert str(caught.value).startswith("server 'a'")
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"mcpServers": {\n  "a": {,}}}', "line 2, column 9"),
        ('{"mcpServers": {\n  "a": {"command": "python",}}}', "line 2, column 29: remove the comma before the closing bracket"),
        ('{\n  // mine\n  "mcpServers": {}}', "line 2, column 3: JSON has no comments; remove this one"),
        ('{"mcpServers": {}}', "names no servers"),
        ("[]", "names no servers"),
        ('{"servers": {"a": {}}}', "names no servers: .*; its 'servers' has to be called 'mcpServers'"),
        ('{"mcpservers": {"a": {}}}', "its 'mcpservers' has to be called 'mcpServers'"),
        ('{"mcpServers": {"a": {"command": 5}}}', "server 'a': command must be a string"),
        ("[" * 100_000, "nested too deep"),
        (f'{{"mcpServers": {{"a": {{"command": "x", "timeout": {"9" * 5000}}}}}}}', "too many digits"),
    ],
)
def test_a_broken_file_is_one_clear_line(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_file_may_begin_with_the_mark_of_windows_editors(tmp_path):
    path = written(tmp_path, {"a": {"command": "x"}})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert list(load_config(path)) == ["a"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no config file at .*nowhere\.json"):
        load_config(tmp_path / "nowhere.json")


def test_a_name_that_is_too_long_for_a_path_is_told_like_any_other_wrong_one(tmp_path):
    name = "x" * 300
    with pytest.raises(ConfigError, match=rf"no config file at .*{name}\.json"):
        load_config(tmp_path / f"{name}.json")
    with pytest.raises(ConfigError, match=rf"no server at .*{name}\.py"):
        target_spec(f"{name}.py", tmp_path)


def test_a_wrong_server_name_gets_the_closest_one_and_all_of_them():
    servers = {name: ServerSpec(name, "stdio", command="x") for name in ("calculator", "files")}
    with pytest.raises(
        ConfigError, match=r"no server 'calculater' in c\.json; did you mean 'calculator'\? there are: calculator, f"
    ):
        pick(servers, "calculater", "c.json")


def test_references_are_filled_everywhere_and_what_they_bring_is_secret():
    spec = server_spec(
        "a",
        {
            "command": "x",
            "args": ["--key=${KEY}", "${NONE:-fallback}", "$HOME ${1}"],
            "env": {"K": "a${KEY}b"},
            "cwd": "${HERE}",
        },
    )
    resolved, secrets = resolve(spec, {"KEY": "k1", "HERE": "/there"})
    assert resolved.args == ("--key=k1", "fallback", "$HOME ${1}")
    assert resolved.env == {"K": "ak1b"}
    assert resolved.cwd == Path("/there")
    assert {"k1", "ak1b"} <= secrets
    assert "k1" not in repr(spec)


def test_references_in_urls_and_headers_are_filled():
    spec = server_spec("a", {"type": "sse", "url": "http://${HOST}/sse", "headers": {"Authorization": "Bearer ${TOKEN}"}})
    resolved, secrets = resolve(spec, {"HOST": "h:1", "TOKEN": "t"})
    assert resolved.url == "http://h:1/sse"
    assert resolved.headers == {"Authorization": "Bearer t"}
    assert "Bearer t" in secrets


def test_a_missing_variable_matters_only_to_the_server_that_needs_it(tmp_path):
    servers = load_config(written(tmp_path, {"a": {"command": "x"}, "b": {"command": "x", "env": {"T": "${NOT_SET}"}}}))
    assert resolve(servers["a"], {})[0].command == "x"
    with pytest.raises(ConfigError, match=r"server 'b': env\.T needs the environment variable NOT_SET, which is not set"):
        resolve(servers["b"], {})


def test_an_in_process_server_is_named_after_its_file_or_folder(tmp_path):
    (tmp_path / "files").mkdir()
    for file in ("files/server.py", "clock.py"):
        (tmp_path / file).touch()
    assert target_spec("clock.py", tmp_path) == ServerSpec("clock", "in-process", target=f"{tmp_path / 'clock.py'}:server")
    assert target_spec("files/server.py:app", tmp_path).name == "files"
    with pytest.raises(ConfigError, match=r"no server at .*clocks\.py"):
        target_spec("clocks.py:server", tmp_path)
