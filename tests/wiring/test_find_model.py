"""What a model's name stands for, also behind a kill."""

from art_mcp.wiring.stage import find_model


def test_a_model_folder_that_was_being_replaced_at_a_kill_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / ".from-python.7.old.tmp").mkdir(parents=True)
    assert find_model("runs/from-python") == "runs/from-python"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["from-python"]
