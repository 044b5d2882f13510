"""Both trainers, and torch in both process modes, take the same first step from the same samples."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradient import CONFIG, first_gradient
from safetensors import safe_open

from art_mcp.local.remote import RemoteWorker
from art_mcp.local.worker import Settings, Worker
from art_mcp.types import ModelSpec

pytestmark = [pytest.mark.gpu, pytest.mark.anyio, pytest.mark.timeout(400), pytest.mark.filterwarnings("default")]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def samples(gpu_run):
    """Real rollouts, half of them better than the others."""
    return [replace(sample, advantage=(-1.0) ** place) for place, sample in enumerate(gpu_run.after[:96])]


@pytest.fixture(scope="module")
def here(gpu_run, samples):
    found = first_gradient("torch", gpu_run.adapter, samples)
    torch.cuda.empty_cache()
    return found


def in_a_process(kind, gpu_run, samples, folder):
    rows = [[list(s.token_ids), [int(on) for on in s.trainable], s.logprobs, s.advantage] for s in samples]
    (folder / "samples.json").write_text(json.dumps(rows))
    out = folder / f"{kind}.safetensors"
    command = [sys.executable, str(HERE / "gradient.py"), kind, str(gpu_run.adapter), str(folder / "samples.json"), str(out)]
    subprocess.run(command, check=True, cwd=HERE.parent.parent)
    with safe_open(out, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["figures"])  # noqa: SIM118


def cosine(one, other):
    assert one.keys() == other.keys()
    flat = [torch.cat([gradient[name].flatten().double() for name in sorted(one)]) for gradient in (one, other)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0)), float(flat[0].norm() / flat[1].norm())


@pytest.mark.parametrize("kind", ["unsloth", "torch"])
def test_the_first_gradient_has_the_direction_of_torchs_in_this_process(kind, gpu_run, samples, here, tmp_path, note):
    gradient, figures = in_a_process(kind, gpu_run, samples, tmp_path)
    direction, size = cosine(gradient, here[0])
    note(cosine=direction, norm_ratio=size, figures=figures, torch_figures=here[1])
    assert direction >= 0.99
    assert size == pytest.approx(1.0, abs=0.05)


async def test_torch_takes_the_same_step_in_both_process_modes(gpu_run, samples, note):
    spec = ModelSpec(source=str(gpu_run.adapter))
    metrics = []
    for make in (Worker, RemoteWorker):
        worker = make("policy", spec, Settings())
        metrics.append(await worker.train(samples, CONFIG))
        await worker.close()
        del worker
        torch.cuda.empty_cache()
    note(here=metrics[0], child=metrics[1])
    for name in ("loss", "gradient_norm", "mismatch"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=0.02, abs=1e-4)
