"""Mistakes that type checkers must find: one on each line that ends with `# wrong`, and no others."""

from typing import assert_type

from pydantic import BaseModel

from art_mcp import Model, TrainableModel


class MyConfig(BaseModel):
    turns: int = 3


class OtherConfig(BaseModel):
    size: int = 1


model = TrainableModel(name="x", config=MyConfig())
assert_type(model.config, OtherConfig)  # wrong
assert_type(TrainableModel(name="x").config, MyConfig)  # wrong
model.config.size  # wrong
TrainableModel(name="x").config.turns  # wrong
Model(name="x", config=3)  # wrong
other: TrainableModel[OtherConfig] = model  # wrong
