"""The command line, called in this process."""

import sys

import pytest

from art_mcp.cli.main import main


@pytest.fixture
def art(monkeypatch, capsys):
    """Runs `art-mcp` with these words; gives its exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["art-mcp", *args])
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
        return code, *capsys.readouterr()

    return run
