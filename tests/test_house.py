"""House rules that no linter knows: sizes, what may be caught where, names, who may import whom outside the package."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULE_LINES, FUNCTION_LINES = 300, 50

EXCUSES: dict[str, int] = {
    "art_mcp/types.py": 413,  # every noun that travels, in the order in which it is met: read as one page
}
"""Lines that a module ("path") or a function ("path:name") may have beyond the house numbers, and why."""

HANDED_ON = {
    ("art_mcp/sampling/transformers_engine.py", "_work"): "handed on to every caller that waits",
    ("art_mcp/sampling/transformers_engine.py", "run"): "handed on to the caller that waits",
    ("art_mcp/local/remote.py", "_answer"): "handed on to the parent process, which raises it",
    ("art_mcp/tools/holder.py", "line"): "handed on to the parent process, which raises it",
}
"""The functions that catch everything and do not raise it again, and what becomes of it."""

FILES = sorted(path for folder in ("art_mcp", "servers", "environments") for path in (ROOT / folder).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return ((file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def calls_of(name: str) -> list[str]:
    """Where `name` ("print", "time.sleep") is called."""
    nodes = ((file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [f"{file}:{node.lineno}" for file, node in nodes if ast.unparse(node.func) == name]


def sizes() -> dict[str, int]:
    """Every module and function that is longer than the house number, with its lines."""
    modules = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    lengths = {f"{file}:{node.name}": (node.end_lineno or 0) - node.lineno + 1 for file, node in functions()}
    long = {name: lines for name, lines in modules.items() if lines > MODULE_LINES}
    return long | {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}


def test_there_is_something_to_look_at():
    assert len(TREES) > 30
    assert "art_mcp/types.py" in TREES


def test_modules_and_functions_keep_to_the_house_numbers():
    assert {name: lines for name, lines in sizes().items() if lines > EXCUSES.get(name, 0)} == {}


def test_no_excuse_is_older_than_its_reason():
    assert EXCUSES.keys() <= sizes().keys()


def test_every_module_says_what_lives_there():
    named = {file: ast.get_docstring(tree) for file, tree in TREES.items()}
    assert [file for file, text in named.items() if not text] == []


def swallows_everything(handler: ast.AST) -> bool:
    """Whether this catches all exceptions, and may end otherwise than by raising."""
    if not isinstance(handler, ast.ExceptHandler):
        return False
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
    leaves = any(isinstance(node, ast.Return | ast.Continue | ast.Break) for node in ast.walk(handler))
    return broad and (leaves or not isinstance(handler.body[-1], ast.Raise))


def test_what_catches_everything_raises_it_or_hands_it_on():
    found = {(file, node.name) for file, node in functions() for inner in ast.walk(node) if swallows_everything(inner)}
    assert found == set(HANDED_ON)
    assert [place for name in ("Exception", "BaseException") for place in suppressions(name)] == []


def suppressions(name: str) -> list[str]:
    nodes = ((file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = ((file, node) for file, node in nodes if ast.unparse(node.func).endswith("suppress"))
    return [f"{file}:{node.lineno}" for file, node in named if name in map(ast.unparse, node.args)]


@pytest.mark.parametrize("name", ["print", "time.sleep", "sleep", "breakpoint", "load_dotenv", "nest_asyncio.apply"])
def test_nothing_in_the_package_calls(name):
    assert calls_of(name) == []


def requirements(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]]


def test_no_module_has_the_name_of_a_dependency():
    wanted = {requirement.name.lower() for requirement in requirements("local", "dev")}
    modules = {module for module, owners in packages_distributions().items() if wanted & {owner.lower() for owner in owners}}
    assert {"mcp", "torch"} <= modules
    own = {part.removesuffix(".py") for file in TREES for part in file.split("/")[1:]}
    assert own & (modules | {"vllm", "unsloth", "weave"}) == set()


def imported(tree: ast.Module) -> set[str]:
    """The top-level names of all modules that a file imports, wherever it does."""
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in plain | named}


def test_servers_know_nothing_of_the_package():
    servers = {file: imported(tree) for file, tree in TREES.items() if file.startswith("servers/")}
    assert servers
    assert [file for file, names in servers.items() if "art_mcp" in names] == []


def test_environments_import_the_package_and_the_standard_library_alone():
    allowed = sys.stdlib_module_names | {"art_mcp"}
    environments = {file: imported(tree) - allowed for file, tree in TREES.items() if file.startswith("environments/")}
    assert environments
    assert {file: names for file, names in environments.items() if names} == {}


def test_exact_versions_lie_within_the_ranges_of_the_metadata():
    ranges = {requirement.name: requirement.specifier for requirement in requirements("local")}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert {"torch", "transformers", "peft", "mcp"} <= pins.keys()
    assert [name for name, version in pins.items() if version not in ranges[name]] == []


def test_the_changelog_begins_with_the_version_of_the_package():
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == PROJECT["version"]


def test_make_says_which_python_it_needs(tmp_path):
    """`false` stands for an interpreter that is too old: it, too, ends the version check with 1."""
    command = ["make", "--file", str(ROOT / "Makefile"), "venv", "PYTHON=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
