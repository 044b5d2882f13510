"""What every test may ask for."""

import signal

import pytest


@pytest.fixture
def anyio_backend():
    return "asyncio"


# a shell starts what it puts in the background with Ctrl-C ignored, and children would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
