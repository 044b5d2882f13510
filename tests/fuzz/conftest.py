"""Fuzzing's only fixture."""

import pytest


@pytest.fixture
def part(request):
    """Which part of a test's examples this is: `fuzzing.fuzz` cuts a long run into several."""
    return request.param
