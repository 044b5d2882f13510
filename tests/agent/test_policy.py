"""Rollouts of the packaged policy: what its engine was asked and what became of it, token for token, at any concurrency."""

from dataclasses import replace
from pathlib import Path

import anyio
import pytest
import torch

from art_mcp.agent.group import gather_trajectory_groups
from art_mcp.environment import load_environment
from art_mcp.local.backend import LocalBackend
from art_mcp.model import TrainableModel
from art_mcp.tools import open_tools
from art_mcp.types import StopReason
from tests.agent.players import text_of, tokenizer, whole

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
SERVER = str(ROOT / "servers" / "calculator" / "server.py")
ENVIRONMENT = load_environment(str(ROOT / "environments" / "calculator.py"))


class Recorded:
    """The policy's own sampler, with what passes through it."""

    def __init__(self, sampler):
        self.sampler, self.policy, self.context_length = sampler, sampler.policy, sampler.context_length
        self.turns = []

    async def sample(self, token_ids, **options):
        prompt = tuple(token_ids)
        done = await self.sampler.sample(token_ids, **options)
        self.turns.append((prompt, done))
        return done


class RecordedBackend(LocalBackend):
    """Hands out a recorded sampler for each rollout."""

    def sampler(self, trainable):
        self.handed_out.append(Recorded(super().sampler(trainable)))
        return self.handed_out[-1]


@pytest.fixture(scope="module")
def model():
    backend = RecordedBackend(in_process=True, deterministic=True, threads=1)
    made = TrainableModel(name="tiny")
    threads = torch.get_num_threads()
    anyio.run(made.register, backend)
    yield made
    anyio.run(backend.close)
    torch.set_num_threads(threads)


async def play(model, *, scenarios=4, rollouts=2, **options):
    model.backend.handed_out = []
    async with open_tools([f"{SERVER}:server"], only=ENVIRONMENT.tools) as toolbox:
        groups = await gather_trajectory_groups(
            ENVIRONMENT.split("train")[:scenarios],
            model=model,
            environment=ENVIRONMENT,
            toolbox=toolbox,
            rollouts=rollouts,
            **options,
        )
        played = [one.trajectory for group in groups for one in group.trajectories]
        return groups, played, {one.rollout_id: whole(one, toolbox) for one in played}


def timeless(groups):
    """All trajectories with their rewards, without their times."""
    scored = [one for group in groups for one in group.trajectories]
    return [(replace(one.trajectory, seconds=0.0), one.reward, one.parts) for one in scored]


def in_own_form(trajectory):
    """Whether the policy answered, and wrote its calls as the template would have: with nothing before them."""
    called = [message for message in trajectory.messages if message.get("tool_calls")]
    clean = not trajectory.malformed and not any(message["content"] for message in called)
    return trajectory.stop_reason is StopReason.ANSWERED and clean


async def test_what_the_engine_was_asked_and_answered_is_what_the_trainer_gets(model):
    _, played, rendered = await play(model)
    assert len(played) == 8
    assert any(one.uses for one in played)
    records = {id(sampler.turns[0][1].span): sampler.turns for sampler in model.backend.handed_out}
    compared = 0
    for trajectory in played:
        policy = [at for at, span in enumerate(trajectory.spans) if span.logprobs is not None]
        turns = records.pop(id(trajectory.spans[policy[0]]))
        assert len(turns) == len(policy)
        for at, (prompt, done) in zip(policy, turns, strict=True):
            assert prompt == tuple(token for span in trajectory.spans[:at] for token in span.token_ids)
            assert trajectory.spans[at] == done.span
        if in_own_form(trajectory):
            compared += 1
            assert rendered[trajectory.rollout_id] == text_of(trajectory) + "\n<|im_start|>assistant\n"
            last = tokenizer().decode(trajectory.spans[-1].token_ids)
            assert last == f"{trajectory.answer}<|im_end|>"
    assert compared >= 4


async def test_the_same_seed_gives_the_same_trajectories_whatever_the_concurrency(model):
    alone, _, _ = await play(model, concurrency=1, seed=3, step=5)
    together, _, _ = await play(model, concurrency=128, seed=3, step=5)
    assert timeless(alone) == timeless(together)


async def test_another_seed_step_or_rollout_gives_other_trajectories(model):
    runs = [await play(model, scenarios=2, rollouts=4, seed=seed, step=step) for seed, step in [(0, 0), (1, 0), (0, 1)]]
    texts = [[one.token_ids for one in played] for _, played, _ in runs]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    assert all(len(set(run)) > 2 for run in texts)


async def test_the_greedy_policy_plays_every_rollout_of_a_group_alike(model):
    groups, _, _ = await play(model, scenarios=2, rollouts=3, temperature=0.0)
    for group in groups:
        assert len({one.trajectory.token_ids for one in group.trajectories}) == 1
