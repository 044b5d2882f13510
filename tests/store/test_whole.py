"""A file that is replaced is the old one or the new one, and nothing stays beside it."""

import pytest

from art_mcp.store.whole import replace_text, replacing


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
        assert aside.parent == path.parent
    replace_text(tmp_path / "b.json", "für")
    assert {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()} == {"a.json": "new", "b.json": "für"}


def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):  # when the file beside it is open already
        replace_text(path, "ne\ud800w")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]
