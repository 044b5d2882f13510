"""A setting that is misspelt or out of its bounds is refused where it is made."""

import math

import pytest

from art_mcp.agent.imitation import Lessons
from art_mcp.agent.loop import Plan
from art_mcp.errors import ConfigError
from art_mcp.types import LoraSpec, ModelSpec, TrainConfig


@pytest.mark.parametrize(
    ("kind", "wrong", "told"),
    [
        (TrainConfig, {"objective": "PPO"}, "TrainConfig: objective is 'PPO'; write 'cispo', 'reinforce', 'ppo', 'gspo'"),
        (TrainConfig, {"baseline": "rloo"}, "write 'mean', 'leave_one_out'"),
        (TrainConfig, {"normalize": "token"}, "write 'tokens', 'sequences', 'constant'"),
        (TrainConfig, {"control": "shuffle"}, "write 'none', 'shuffled'"),
        (TrainConfig, {"temperature": 0}, "temperature is 0; write a finite number above 0"),
        (TrainConfig, {"temperature": math.nan}, "temperature is nan; write a finite number above 0"),
        (TrainConfig, {"target_kl": 0.0}, "write a finite number above 0 or None"),
        (TrainConfig, {"target_kl": math.inf}, "target_kl is inf; write a finite number above 0 or None"),
        (TrainConfig, {"min_agreement": -1.0}, "min_agreement is -1.0; write a finite number above 0 or None"),
        (TrainConfig, {"learning_rate": "1e-4"}, "learning_rate is '1e-4'; write a finite number from 0 on or None"),
        (TrainConfig, {"micro_batch_tokens": True}, "write a whole number from 1 on"),
        (TrainConfig, {"sequence_ratio_bounds": (2.0, 1.0)}, "write the lower one first, above 0"),
        (LoraSpec, {"rank": 8.0}, "LoraSpec: rank is 8.0; write a whole number from 1 on"),
        (ModelSpec, {"dtype": "bf16"}, "write 'auto', 'float32', 'bfloat16', 'float64'"),
        (Plan, {"groups": 0}, "write a whole number from 1 on"),
        (Plan, {"draw": "level"}, "write 'uniform', 'solved'"),
        (Lessons, {"epochs": -1}, "write a finite number above 0"),
        (Lessons, {"schedule": "linear"}, "write 'cosine', 'constant'"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_with_what_it_can_be(kind, wrong, told):
    with pytest.raises(ConfigError) as caught:
        kind(**wrong)
    assert told in str(caught.value)


def test_what_a_setting_can_be_is_taken_as_it_is():
    config = TrainConfig(learning_rate=0, target_kl=None, min_agreement=2, weight_cap=1, sequence_ratio_bounds=(0.5, 2.0))
    assert (config.learning_rate, config.target_kl, config.min_agreement) == (0, None, 2)
    assert Plan(steps=0, seconds=0.5, save_every=0).steps == 0
    assert Lessons(steps=3, learning_rate=None).steps == 3


def test_a_copy_with_a_wrong_value_is_refused_too():
    with pytest.raises(ConfigError, match="temperature"):
        TrainConfig().with_(temperature=-1.0)
