"""One tiny policy for all tests of this folder: computed row by row, so that the same seed gives the same turn."""

import pytest

from art_mcp import LocalBackend, TrainableModel, load_environment, open_tools
from tests.openai_patch.agents import MODEL


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def backend(anyio_backend):
    async with LocalBackend(deterministic=True) as backend:
        yield backend


@pytest.fixture(scope="module")
async def model(backend):
    model = TrainableModel(name=MODEL)
    await model.register(backend)
    return model


@pytest.fixture
async def client(model):
    async with model.openai_client() as client:
        yield client


@pytest.fixture(scope="module")
def environment():
    return load_environment("calculator")


@pytest.fixture
async def toolbox(environment):
    async with open_tools(["servers/calculator/server.py:server"], only=environment.tools) as toolbox:
        yield toolbox
