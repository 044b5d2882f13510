"""What a model's name stands for, also behind a kill."""

import pytest

from art_mcp.errors import RunError
from art_mcp.local.backend import LocalBackend
from art_mcp.model import TrainableModel
from art_mcp.wiring.stage import find_model


def test_a_model_folder_that_was_being_replaced_at_a_kill_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / ".from-python.7.old.tmp").mkdir(parents=True)
    assert find_model("runs/from-python") == "runs/from-python"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["from-python"]


@pytest.mark.anyio
async def test_a_run_of_this_name_is_registered_from_python_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with LocalBackend(in_process=True) as backend:
        first = TrainableModel(name="first")
        await first.register(backend)
        await backend.save(first, "runs/mine/checkpoints/step-000007")
        (tmp_path / "runs" / "mine" / "manifest.json").write_text("{}")
        for number, place in enumerate(("mine", "runs/mine", "mine@7")):
            model = TrainableModel(name=f"again-{number}", base_model=place)
            await model.register(backend)
            assert backend.facts(model)["source"] == "runs/mine/checkpoints/step-000007"
        with pytest.raises(RunError, match="no checkpoint of step 8; it has 7"):
            await TrainableModel(name="other", base_model="mine@8").register(backend)
