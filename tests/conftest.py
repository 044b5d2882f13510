"""What every test may ask for, and what none may depend on: how quick the machine is, and how it likes its output."""

import gc
import math
import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

from art_mcp.cli.main import main


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def art(monkeypatch, capsys):
    """Runs `art-mcp` with these words; gives its exit code, stdout and stderr, without progress: how much of it there is
    depends on the machine."""
    monkeypatch.setattr("art_mcp.observe.console.QUIET_SECONDS", math.inf)

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


# by these, CI services and people's shells have programs take a pipe for a terminal, or for one of another width
for name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)
for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
    os.environ.pop(name, None)

# all that is imported here is a million objects, and each full collection looks at them for half a second: fewer of these
gc.set_threshold(gc.get_threshold()[0], 10, 100)

# where other work runs on the same processors, torch's threads would spin for ten times as long as they compute
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# a shell starts what it puts in the background with Ctrl-C ignored, and children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
