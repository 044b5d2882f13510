"""What the tests on a GPU share: a run of the benchmark, with the adapter that it trained and what was sampled in it.

ART_MCP_GPU_MODEL names a prepared model folder. ART_MCP_GPU_RUN names the folder of a run that was made with
`python -m benchmarks.gpu_calculator … --save RUN/saved --dump RUN/samples.json --out RUN`; without it a short one is made.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from art_mcp.local.remote import unpacked
from art_mcp.types import Sample

sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests


@dataclass(frozen=True)
class GpuRun:
    """A finished run: `before` and `after` are what the base and the trained model sampled at temperature 1, `step` what the
    trained one would have learned from next."""

    model: Path
    adapter: Path
    before: list[Sample]
    after: list[Sample]
    step: list[Sample]
    result: dict


@pytest.fixture(scope="session")
def model_folder():
    folder = os.environ.get("ART_MCP_GPU_MODEL")
    assert folder, "set ART_MCP_GPU_MODEL to the folder that `art-mcp prepare` wrote"
    return Path(folder)


@pytest.fixture(scope="session")
def gpu_run(model_folder, tmp_path_factory):
    made = os.environ.get("ART_MCP_GPU_RUN")
    folder = Path(made) if made else tmp_path_factory.mktemp("run")
    if not made:
        options = ["--warm-start", "512", "--seconds", "40", "--eval-n", "300", "--before", "sampled", "--deadline", "400"]
        paths = ["--save", str(folder / "saved"), "--dump", str(folder / "samples.json"), "--out", str(folder)]
        command = [sys.executable, "-m", "benchmarks.gpu_calculator", "--model", str(model_folder), "--trainer", "unsloth"]
        subprocess.run([*command, *options, *paths], check=True)
    sampled = {
        label: [unpacked(row) for row in rows] for label, rows in json.loads((folder / "samples.json").read_text()).items()
    }
    result = json.loads((folder / "result.json").read_text())
    return GpuRun(model_folder, folder / "saved", sampled.get("before", []), sampled["after"], sampled.get("step", []), result)


@pytest.fixture
def note(request):
    """Keeps figures of a test in ART_MCP_GPU_NOTES, a JSON file, where that is set."""

    def keep(**figures):
        place = os.environ.get("ART_MCP_GPU_NOTES")
        if place:
            path = Path(place)
            values = json.loads(path.read_text()) if path.is_file() else {}
            values.setdefault(request.node.name, {}).update(figures)
            path.write_text(json.dumps(values, indent=1, default=str))

    return keep
