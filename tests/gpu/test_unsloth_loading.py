"""What Unsloth really loads: its own build in place of a hub's model, the model itself, 4-bit weights of a folder."""

import json
import shutil
from dataclasses import replace

import pytest

from art_mcp.local.remote import RemoteWorker
from art_mcp.local.unsloth_names import predict_replacement
from art_mcp.local.worker import Settings
from art_mcp.types import LoraSpec, ModelSpec, TrainConfig

pytestmark = [pytest.mark.gpu, pytest.mark.anyio, pytest.mark.timeout(400), pytest.mark.filterwarnings("default")]

ASKED = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
UNSLOTH = Settings(trainer="unsloth")


def prime(cache, repository, model_folder):
    """A hub's cache folder in which `repository` is the model folder."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    for file in model_folder.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(file.resolve())


async def test_four_bit_weights_of_a_folder_are_trained(gpu_run, note):
    spec = ModelSpec(source=str(gpu_run.model), lora=LoraSpec(), load_in_4bit=True)
    worker = RemoteWorker("policy", spec, UNSLOTH)
    demonstrations = [replace(sample, logprobs=None, advantage=1.0) for sample in gpu_run.after[:32]]
    config = TrainConfig(learning_rate=3e-4, warmup_steps=1, micro_batch_tokens=8192)
    losses = [(await worker.imitate(demonstrations, config))["loss"] for _ in range(6)]
    facts = worker.facts
    await worker.close()
    note(losses=losses, facts=facts)
    assert losses[-1] < 0.8 * losses[0]
    assert facts["load_in_4bit"]
    assert "nf4" in facts["quantization"]
    assert facts["loaded"] == str(gpu_run.model)
    assert not facts["replaced"]
    assert facts["dtype"] == "bfloat16"


@pytest.mark.parametrize("exact_model", [False, True])
async def test_a_hubs_model_becomes_what_was_predicted_or_with_exact_model_stays(
    exact_model, model_folder, tmp_path, monkeypatch, note
):
    cache = tmp_path / "hub"
    predicted = predict_replacement(ASKED, load_in_4bit=True)
    assert predicted == "unsloth/Qwen2.5-Coder-0.5B-Instruct-bnb-4bit"
    for repository in (ASKED, predicted):
        prime(cache, repository, model_folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = ModelSpec(source=ASKED, lora=LoraSpec(), load_in_4bit=True, exact_model=exact_model)
    worker = RemoteWorker("policy", spec, UNSLOTH)
    facts = worker.facts
    await worker.write_weights(tmp_path / "adapter")
    await worker.close()
    shutil.rmtree(cache)
    note(facts=facts)
    assert facts["loaded"] == (ASKED if exact_model else predicted)
    assert facts["replaced"] is not exact_model
    assert facts["asked"] == ASKED
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == facts["loaded"]
