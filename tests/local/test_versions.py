"""Folders of weights: one's own, those of living processes, and those that a kill left behind."""

import subprocess
import sys

import pytest

from art_mcp.local.versions import Versions

HOLD = "from art_mcp.local.versions import Versions; v = Versions(); print(v.path, flush=True); input()"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def other():
    """A process with a folder of its own, and the folder's name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip().rpartition("/")[2]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(temporary):
    (temporary / "art-mcp-versions-unknown").mkdir()
    killed, left = other()
    killed.kill()
    killed.communicate()
    assert (temporary / left).is_dir()
    living, kept = other()
    assert not (temporary / left).exists()
    own = Versions()
    (own.path / "1").mkdir()
    names = {folder.name for folder in temporary.iterdir()}
    assert names == {kept, own.path.name, "art-mcp-versions-unknown"}
    own.cleanup()
    assert {folder.name for folder in temporary.iterdir()} == names - {own.path.name}
    living.communicate("\n")
    assert [folder.name for folder in temporary.iterdir()] == ["art-mcp-versions-unknown"]
