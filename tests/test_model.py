"""The handles that users hold: names, typed configs, and what is said to those who forget to register."""

import pytest
from pydantic import BaseModel

from art_mcp.errors import ModelError
from art_mcp.model import Model, TrainableModel
from art_mcp.types import LoraSpec, ModelSpec, TrainConfig

pytestmark = pytest.mark.anyio


class Settings(BaseModel):
    greeting: str = "hello"


class Shelf:
    """A Backend that notes what it is asked."""

    tracer = None

    def __init__(self):
        self.asked = []

    async def register(self, trainable):
        self.asked.append(("register", trainable.name, trainable.spec))

    async def ready(self, trainable):
        self.asked.append(("ready", trainable.name))

    async def train(self, trainable, groups, *, config):
        self.asked.append(("train", list(groups), config))
        return {"loss": 0.5}

    async def get_step(self, trainable):
        return 7

    def sampler(self, trainable):
        return "sampler"

    def dialect(self, trainable):
        return "dialect"

    def endpoint(self, trainable):
        self.asked.append(("endpoint", trainable.name))
        return "http://127.0.0.1:5/v1", "the key"

    async def save(self, trainable, folder):
        self.asked.append(("save", folder))


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a@1", "a\\b", "a\tb", "a\n"])
@pytest.mark.parametrize("kind", [Model, TrainableModel])
def test_a_name_is_a_plain_word(name, kind):
    with pytest.raises(ModelError, match="plain word"):
        kind(name=name)


@pytest.mark.parametrize("name", ["policy", "Qwen2.5-0.5B", "é_1"])
def test_other_names_are_taken_as_they_are(name):
    assert TrainableModel(name=name).name == Model(name=name).name == name


def test_a_model_carries_the_users_own_config_or_none():
    assert Model(name="a", config=Settings(greeting="hi")).config.greeting == "hi"
    assert TrainableModel(name="a", config=Settings()).config == Settings()
    assert TrainableModel(name="a").config is None


def test_what_to_load_is_said_by_parts_or_as_a_whole():
    assert TrainableModel(name="a").spec == ModelSpec("tiny")
    made = TrainableModel(name="a", base_model="models/x", lora=LoraSpec(8), seed=3)
    assert made.spec == ModelSpec("models/x", lora=LoraSpec(8), seed=3)
    whole = ModelSpec("models/y", dtype="bfloat16", lenient=True)
    assert TrainableModel(name="a", spec=whole).spec is whole


async def test_before_it_is_registered_a_model_says_what_to_do_first():
    model = TrainableModel(name="mine")
    told = r"model 'mine' has no backend yet: `await model\.register\(LocalBackend\(\)\)` first"
    for ask in (model.sampler, model.dialect):
        with pytest.raises(ModelError, match=told):
            ask()
    with pytest.raises(ModelError, match=told):
        await model.train([])
    for ask in (model.get_step, model.ready):
        with pytest.raises(ModelError, match=told):
            await ask()


async def test_a_registered_model_hands_everything_to_its_backend():
    model, shelf = TrainableModel(name="mine", seed=1), Shelf()
    await model.register(shelf)
    assert model.backend is shelf
    assert (model.sampler(), model.dialect(), await model.get_step()) == ("sampler", "dialect", 7)
    assert await model.train([]) == {"loss": 0.5}
    config = TrainConfig(learning_rate=1.0)
    await model.train([], config=config)
    await model.ready()
    asked = [("register", "mine", model.spec), ("train", [], TrainConfig()), ("train", [], config), ("ready", "mine")]
    assert shelf.asked == asked


async def test_its_client_speaks_with_its_backends_endpoint():
    model, shelf = TrainableModel(name="mine"), Shelf()
    await model.register(shelf)
    async with model.openai_client() as client:
        assert (str(client.base_url), client.api_key) == ("http://127.0.0.1:5/v1/", "the key")
    assert shelf.asked[-1] == ("endpoint", "mine")


async def test_a_model_whose_registration_failed_is_not_registered():
    class Broken(Shelf):
        async def register(self, trainable):
            raise ModelError("no weights")

    model = TrainableModel(name="mine")
    with pytest.raises(ModelError, match="no weights"):
        await model.register(Broken())
    with pytest.raises(ModelError, match="no backend yet"):
        _ = model.backend
