"""Agents of other makers, as the examples have them: each drives the calculator over MCP and is trained for a step."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"openai_loop": "openai", "agents_sdk": "agents", "pydantic_ai_agent": "pydantic_ai"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", EXAMPLES)
async def test_an_example_scores_what_its_agent_did_and_trains_on_it(name, monkeypatch, capfd):
    pytest.importorskip(EXAMPLES[name])
    monkeypatch.chdir(ROOT)
    (reward,) = await load(name).main(steps=1, scenarios=4)
    assert 0 < reward < 1
    assert capfd.readouterr().out == f"step 0: reward {reward:.3f}\n"


def test_every_example_is_tested_short_and_named_in_the_readme():
    files = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert files.keys() == EXAMPLES.keys()
    assert [name for name, text in files.items() if len(text.splitlines()) > 60] == []
    readme = (ROOT / "README.md").read_text()
    assert [name for name in files if f"examples/{name}.py" not in readme] == []
