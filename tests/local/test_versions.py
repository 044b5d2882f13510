"""Folders of weights: one's own, those of living processes, and those that a kill left behind."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from art_mcp.local import versions
from art_mcp.local.versions import Versions

HOLD = "from art_mcp.local.versions import Versions; v = Versions(); print(v.path, flush=True); input()"
PLENTY, DOCKERS = 8 * 2**30, 64 * 2**20


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


@pytest.fixture
def memory(tmp_path_factory, monkeypatch):
    """A folder in the place of the machine's memory, and what is free there."""
    place = tmp_path_factory.mktemp("memory")
    monkeypatch.setattr(versions, "MEMORY", place)

    def free(size):
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size))
        return place

    return free


@pytest.mark.parametrize(("asked", "free", "there"), [(True, PLENTY, True), (True, DOCKERS, False), (False, PLENTY, False)])
def test_adapters_are_in_memory_where_it_has_room(asked, free, there, temporary, memory):
    place = memory(free)
    own = Versions(in_memory=asked)
    assert own.path.parent == (place if there else temporary)
    own.cleanup()
    assert not list(place.iterdir())
    assert not list(temporary.iterdir())


def test_a_machine_without_such_a_folder_takes_the_temporary_one(temporary, monkeypatch):
    monkeypatch.setattr(versions, "MEMORY", temporary / "no-such-folder")
    own = Versions(in_memory=True)
    assert own.path.parent == temporary
    own.cleanup()


def test_what_was_left_in_memory_is_removed_by_whoever_comes_next(temporary, memory):
    place = memory(PLENTY)
    killed, left = other()
    killed.kill()
    killed.communicate()
    (temporary / left).rename(place / left)
    Versions().cleanup()
    assert not list(place.iterdir())
