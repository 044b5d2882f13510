"""The wheel, installed as a user installs it: what it carries, what type checkers know of it, and that it runs."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TYPED = ROOT / "tests" / "typed"
TINY = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

pytestmark = pytest.mark.timeout(400)  # builds and installs a wheel; mypy reads torch from cold


def run(*command: object, cwd: Path, ok: bool = True, **environ: str) -> str:
    """What a command printed; with `ok`, it must end well."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment in which art_mcp is the wheel and everything else is what is installed here."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=ROOT)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", home / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=ROOT)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "the_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def where_it_is(home: Path, cwd: Path) -> Path:
    program = "import art_mcp, sys; sys.stdout.write(art_mcp.__file__)"
    return Path(run(home / "bin" / "python", "-c", program, cwd=cwd))


def test_the_wheel_carries_the_types_marker_the_licence_and_the_tiny_policy(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "art_mcp/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {f"art_mcp/tiny_policy/{name}" for name in (*TINY, "chat_template.jinja", "README.md")} <= set(names)
    assert all(name.startswith(("art_mcp/", "art_mcp-")) for name in names)


def test_no_exact_version_is_in_the_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
    needed = [line for line in required if "extra == 'dev'" not in line]
    assert needed
    assert all(">=" in line and "<" in line and "==" not in line.partition(";")[0] for line in needed), needed


@pytest.fixture(scope="session")
def typed(tmp_path_factory) -> Path:
    """The example files in a folder of their own, so that no settings of this repository apply."""
    return Path(shutil.copytree(TYPED, tmp_path_factory.mktemp("typed") / "project"))


def mistakes() -> set[tuple[str, int]]:
    lines = (TYPED / "wrong.py").read_text().splitlines()
    return {("wrong.py", number) for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


def reported(output: str) -> set[tuple[str, int]]:
    return {(Path(file).name, int(line)) for file, line in re.findall(r"([^\s:]+\.py):(\d+)\S*:?(?: -)? error:", output)}


def test_pyright_knows_a_models_config_and_finds_every_mistake(installed, typed):
    assert where_it_is(installed, typed).is_relative_to(installed)
    output = run(sys.executable, "-m", "pyright", "--pythonpath", installed / "bin" / "python", cwd=typed, ok=False)
    assert reported(output) == mistakes(), output


HEAVY = ("torch", "transformers", "peft", "safetensors", "huggingface_hub", "numpy", "rich", "uvicorn", "weave")
UNREAD = f"[mypy]\n[mypy-{','.join(f'{name}.*' for name in HEAVY)}]\nfollow_imports = skip\n"
"""None of the types that users meet is theirs, and mypy reads them for longer than all the rest; pyright does read them."""


def test_mypy_knows_a_models_config_and_finds_every_mistake(installed, typed, tmp_path):
    config = tmp_path / "mypy.ini"
    config.write_text(UNREAD)
    options = ("--python-executable", installed / "bin" / "python", "--config-file", config, "--cache-dir", tmp_path)
    output = run(sys.executable, "-m", "mypy", *options, "right.py", "wrong.py", cwd=typed, ok=False)
    assert reported(output) == mistakes(), output


def test_training_runs_from_the_wheel_beside_servers_and_environments_alone(installed, tmp_path):
    shutil.copy(ROOT / "config.json", tmp_path)
    for folder in ("servers", "environments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert where_it_is(installed, tmp_path).is_relative_to(installed)
    command = "train calculator --steps 1 --eval-n 4 --groups 2 --rollouts 2 --name first"
    output = run(installed / "bin" / "art-mcp", *command.split(), cwd=tmp_path)
    assert "1 step in" in output
    assert output.count("n=4 ") == 2
    checkpoint = tmp_path / "runs" / "first" / "checkpoints" / "step-000001"
    assert (checkpoint / "model.safetensors").stat().st_size > 1_000_000
