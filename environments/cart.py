"""Errands with a shopping cart, a server with state: each rollout has one of its own, filled as its scenario begins. The
policy may put and take out; what the reward and the reset use is not offered to it."""

from collections.abc import Sequence
from random import Random

from art_mcp import Environment, Scenario, Toolbox, ToolCall, Trajectory

SHELF = ("apples", "bananas", "carrots", "eggs", "lemons", "pears")
SIZES = {"train": 2000, "test": 200}
WANTED = {"train": (2, 3, 5, 6, 8, 9), "test": (4, 7)}


def scenarios(split: str) -> Sequence[Scenario]:
    return [errand(split, number) for number in range(SIZES[split])]


def errand(split: str, number: int) -> Scenario:
    """Level 1 puts one item into the cart; level 2 also takes some of another out again."""
    random = Random(f"{split}-{number}")
    level = 1 + number % 2
    new, old = random.sample(SHELF, 2)
    wanted, there, less = random.choice(WANTED[split]), random.randint(3, 9), random.randint(1, 3)
    prompt = f"Put {wanted} {new} into my cart."
    after = {old: there, new: wanted}
    if level == 2:
        prompt += f" Take {less} {old} out."
        after[old] -= less
    after = {item: quantity for item, quantity in after.items() if quantity}
    return Scenario(f"{split}-{number}", prompt, level, {"before": {old: there}, "after": after})


async def reset(scenario: Scenario, toolbox: Toolbox) -> None:
    await toolbox.call(ToolCall("fill", {"items": scenario.facts["before"]}))


async def correct(trajectory: Trajectory, toolbox: Toolbox) -> float:
    assert trajectory.scenario is not None
    found = await toolbox.call(ToolCall("contents", {}))
    return float(found.structured == trajectory.scenario.facts["after"])


def solution(scenario: Scenario) -> tuple[Sequence[ToolCall], str]:
    before, after = scenario.facts["before"], scenario.facts["after"]
    changes = {item: after.get(item, 0) - before.get(item, 0) for item in {**before, **after}}
    put = [ToolCall("put", {"item": item, "quantity": change}) for item, change in changes.items() if change > 0]
    out = [ToolCall("take_out", {"item": item, "quantity": -change}) for item, change in changes.items() if change < 0]
    return [*put, *out], "Done."


environment = Environment(
    servers=["servers/cart/server.py:server"],
    scenarios=scenarios,
    rewards={"correct": correct},
    tools=["put", "take_out"],
    solution=solution,
    copies=64,
    reset=reset,
)
