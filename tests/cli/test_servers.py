"""`art-mcp tools` and `art-mcp call`: what servers offer, and one call, as people and programs read them."""

import io
import json
import sys
from pathlib import Path

import pytest

from art_mcp.cli.signature import first_line, parameter_lines

ROOT = Path(__file__).parents[2]
CALCULATOR = f"{ROOT}/servers/calculator/server.py:server"
ODD = f"{ROOT}/tests/tools/odd_server.py"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder whose config.json has one server that answers, and two that cannot."""
    servers = {
        "gone": {"command": "no-such-command"},
        "calculator": {"command": "python", "args": [str(ROOT / "servers" / "calculator" / "server.py")]},
        "secret": {"command": "python", "args": ["x.py"], "env": {"KEY": "${NO_SUCH_VARIABLE}"}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"mcpServers": servers}))
    (tmp_path / "here.py").write_text("from mcp.server import MCPServer\nserver = MCPServer('mine')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_every_server_of_the_file_is_asked_and_the_failure_of_one_hides_no_other(project, art):
    code, out, err = art("tools", "--json")
    assert code == 2
    assert out.startswith("calculator (stdio): 10 tools\n  add (read-only): Add two numbers.\n    a: number, required\n")
    first, second = err.splitlines()
    assert first.startswith("error: server 'gone' cannot start: no command 'no-such-command'")
    assert second.startswith("error: server 'secret': env.KEY needs the environment variable NO_SUCH_VARIABLE")
    gone, calculator, secret = last(out)["servers"]
    assert (gone["name"], gone["transport"], gone["error"]) == ("gone", "stdio", first.removeprefix("error: "))
    assert "tools" not in secret
    assert [tool["name"] for tool in calculator["tools"]][:2] == ["add", "subtract"]
    assert calculator["tools"][0]["parameters"]["required"] == ["a", "b"]
    assert calculator["tools"][0]["read_only"] is True


def test_one_server_may_be_a_file_beside_where_the_user_is(project, art):
    (project / "elsewhere").mkdir()
    (project / "elsewhere" / "config.json").write_text("{")
    assert art("tools", "here.py", "--config", "elsewhere/config.json") == (0, "here (in-process): 0 tools\n", "")


def test_a_listing_tells_what_is_optional_and_what_changes_things(art):
    code, out, err = art("tools", ODD)
    assert (code, err) == (0, "")
    assert "  add (read-only): Adds.\n    a: integer, required\n" in out
    assert '  rename (changes things)\n    title: string, required\n    subtitle: string, default "none"\n' in out
    assert "  refuse\n" in out


def test_the_names_of_tools_are_bold_on_a_terminal_and_what_a_server_says_does_not_command_it(tmp_path, art, monkeypatch):
    server = tmp_path / "rude.py"
    server.write_text(
        "from mcp.server import MCPServer\nserver = MCPServer('rude')\n"
        "@server.tool()\nasync def shout() -> str:\n    '''Clears \\x1b[2J the screen.'''\n    return '\\x1b[2Jboo\\ttab'\n"
    )
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert art("call", str(server), "shout")[1] == "\x1b[2Jboo\ttab\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert art("tools", str(server))[1] == "rude (in-process): 1 tool\n  \x1b[1mshout\x1b[0m: Clears �[2J the screen.\n"
    assert art("call", str(server), "shout")[1] == "�[2Jboo\ttab\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "  shout: " in art("tools", str(server))[1]


def test_a_call_prints_its_result(project, art):
    assert art("call", "calculator", "add", '{"a": 2, "b": 40}') == (0, "42\n", "")
    code, out, _ = art("call", CALCULATOR, "add", '{"a": 2, "b": 40}', "--json")
    assert (code, last(out)) == (0, {"text": "42", "is_error": False, "structured": {"result": 42}, "server_wrote": ""})


def test_a_call_without_arguments_needs_none(art):
    code, out, _ = art("call", ODD, "pid")
    assert (code, out.strip().isdigit()) == (0, True)


def test_arguments_may_come_from_stdin_and_a_long_result_is_not_cut(art, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('\n{"length": 300000}\n'))
    assert art("call", ODD, "long_text", "-") == (0, "x" * 300000 + "\n", "")


def test_what_the_encoding_of_stdout_lacks_becomes_an_escape(art, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    assert art("call", ODD, "rename", '{"title": "für"}')[0] == 0
    assert written.buffer.getvalue() == b"f\\xfcr\n"


def test_a_tools_own_error_is_one_line_on_stderr_and_exit_code_1(art):
    assert art("call", ODD, "refuse") == (1, "", "error: Error executing tool refuse: not today\n")
    code, out, err = art("call", CALCULATOR, "divide", '{"a": 1, "b": 0}', "--json")
    assert (code, last(out)["is_error"], err.count("\n")) == (1, True, 1)


FAULTY = """
import json
import sys

from mcp.server import MCPServer

server = MCPServer("faulty")


@server.tool()
async def crash() -> str:
    return {"kept": 1}["lost"]


def speak_by_hand():
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"error": {"code": -32601, "message": "not known"}}
        if request["method"] == "initialize":
            about = {"serverInfo": {"name": "by hand", "version": "1"}, "capabilities": {"tools": {}}}
            answer = {"result": {"protocolVersion": "2025-06-18", **about}}
        elif request["method"] == "tools/list":
            answer = {"result": {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in ("die", "fail")]}}
        elif request["method"] == "tools/call" and request["params"]["name"] == "die":
            print(len({}["lost"]))
        elif request["method"] == "tools/call":
            sys.stderr.write("Traceback (most recent call last):\\n  File x\\nOSError: no more room\\n")
            answer = {"error": {"code": -32603, "message": "Internal error"}}
        if "id" in request:
            print(json.dumps({"jsonrpc": "2.0", "id": request["id"], **answer}), flush=True)


if __name__ == "__main__":
    speak_by_hand() if sys.argv[1:] else server.run("stdio")
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Two servers, one on the SDK and one that does without, whose tools fail in every way but the meant one."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    servers = {
        "sdk": {"command": "python", "args": ["faulty.py"]},
        "hand": {"command": "python", "args": ["-u", "faulty.py", "x"]},
    }
    (tmp_path / "config.json").write_text(json.dumps({"mcpServers": servers}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("server", ["sdk", "faulty.py"])
def test_what_a_tool_raised_is_told_where_its_server_keeps_it_from_clients(faulty, art, server):
    told = "error: Error executing tool crash (its server wrote: KeyError: 'lost')\n"
    assert art("call", server, "crash") == (1, "", told)
    _, out, _ = art("call", server, "crash", "--json")
    assert (last(out)["text"], last(out)["server_wrote"]) == ("Error executing tool crash", "KeyError: 'lost'")


def test_a_server_that_fails_at_a_call_or_dies_of_it_is_quoted(faulty, art):
    told = "error: server 'hand' failed at 'fail': Internal error (its server wrote: OSError: no more room)\n"
    assert art("call", "hand", "fail") == (2, "", told)
    code, out, err = art("call", "hand", "die")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: server 'hand' ended with exit code 1: File ")
    assert err.endswith(""", in speak_by_hand / print(len({}["lost"])) / KeyError: 'lost'\n""")


MISTAKES = {
    "wrong server": (
        ["calculatr", "add"],
        "no server 'calculatr' in config.json; did you mean 'calculator'? there are: g",
    ),
    "wrong file": (["nowhere.py", "add"], "no server at "),
    "wrong tool": ([CALCULATOR, "ad"], "server 'calculator' has no tool 'ad'; did you mean 'add'? there are: add, subtract, "),
    "missing argument": ([CALCULATOR, "add", '{"a": 1}'], 'add was not called: missing argument "b"; add needs "a" and "b"'),
    "wrong type": ([CALCULATOR, "sqrt", '{"a": "4"}'], 'sqrt was not called: "a" must be a number, got the string "4"'),
    "no JSON": (
        [CALCULATOR, "sqrt", "{a: 4}"],
        'line 1, column 2: put names in double quotes ("); what arrived is {a: 4},',
    ),
    "a trailing comma": (
        [CALCULATOR, "sqrt", '{"a": 4,}'],
        'line 1, column 9: remove the comma before the closing bracket; what arrived is {"a": 4,}\n',
    ),
    "words": ([CALCULATOR, "sqrt", "a=4"], 'must be a JSON object, such as \'{"a": 2}\', not "a=4"'),
    "no object": ([CALCULATOR, "sqrt", "[4]"], "must be a JSON object, such as '{\"a\": 2}', not [4]"),
    "too slow": ([ODD, "pause", '{"seconds": 30}', "--timeout", "0.1"], "did not answer 'pause' within 0.1 s"),
    "dead server": (["gone", "add"], "server 'gone' cannot start"),
}


@pytest.mark.parametrize(("words", "told"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_call_that_cannot_be_made_is_one_line_and_exit_code_2(project, art, words, told):
    code, out, err = art("call", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_broken_json_from_stdin_is_told_with_its_line(art, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 1,\n "b" 2}'))
    code, _, err = art("call", CALCULATOR, "add", "-")
    assert (code, err) == (
        2,
        "error: the arguments of the call: invalid JSON at line 2, column 6: write a colon after the name\n",
    )


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"type": "string"}, "string"),
        ({"type": ["integer", "null"]}, "integer or null"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string or null"),
        ({"type": "array", "items": {"type": "string"}}, "array of string"),
        ({"type": "array"}, "array"),
        ({"enum": ["a", 1]}, '"a" or 1'),
        ({"enum": list(range(20))}, "0 or 1 or 2 or 3 or 4 or 5 or 6 or 7 or 12 more"),
        ({"const": True}, "true"),
        ({"$ref": "#/$defs/missing"}, "anything"),
        ({"$ref": "#/$defs/loop"}, "anything"),
        ({}, "anything"),
        (True, "anything"),
    ],
)
def test_a_parameter_is_told_by_its_type(rule, told):
    schema = {"properties": {"x": rule}, "required": ["x"], "$defs": {"node": NODE, "loop": {"$ref": "#/$defs/loop"}}}
    assert parameter_lines(schema) == [f"x: {told}, required"]


ITEM = {
    "type": "object",
    "properties": {"sku": {"type": "string"}, "count": {"type": "integer", "default": 1}},
    "required": ["sku"],
}


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"$ref": "#/$defs/item"}, "object"),
        ({"type": "array", "items": {"$ref": "#/$defs/item"}}, "array of object"),
        ({"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/item"}}, {"type": "null"}]}, "array of object or null"),
    ],
)
def test_the_parts_of_an_object_stand_below_it_also_where_it_is_in_a_list(rule, told):
    schema = {"properties": {"x": rule, "y": {}}, "$defs": {"item": ITEM}}
    parts = ["  sku: string, required", "  count: integer, default 1"]
    assert parameter_lines(schema) == [f"x: {told}, optional", *parts, "y: anything, optional"]


def test_an_object_that_holds_its_own_kind_is_opened_once():
    schema = {"properties": {"x": {"$ref": "#/$defs/node"}}, "$defs": {"node": NODE}}
    assert parameter_lines(schema) == ["x: object, optional", "  next: object, optional"]


def test_a_parameter_that_need_not_be_given_has_a_default_or_is_optional():
    rules = {"x": {"type": "integer", "default": 3, "description": "How many.\n\nMore of it."}, "y": {}}
    assert parameter_lines({"properties": rules}) == ["x: integer, default 3. How many.", "y: anything, optional"]
    assert len(first_line("word " * 1000)) <= 200
