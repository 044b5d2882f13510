"""An agent written on the `openai` package, with the calculator as its MCP server: recorded, scored, and trained for some steps.

    python examples/openai_loop.py
"""

import asyncio
import json
import sys
from typing import Any

from mcp import Client, StdioServerParameters
from openai import AsyncOpenAI

from art_mcp import LocalBackend, Scenario, TrainableModel, load_environment
from art_mcp.openai_patch import gather_agent_groups

CALCULATOR = StdioServerParameters(command=sys.executable, args=["servers/calculator/server.py"])
TURNS = 6


async def work_out(client: AsyncOpenAI, question: str, calculator: Client, tools: list[Any]) -> str:
    """The agent: nothing in it knows that it is being trained."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(TURNS):
        answer = await client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools, max_tokens=192)
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = await calculator.call_tool(call.function.name, json.loads(call.function.arguments))
            text = "".join(part.text for part in result.content)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
    return ""


async def main(steps: int = 20, scenarios: int = 16, rollouts: int = 8) -> list[float]:
    environment = load_environment("calculator")
    questions = environment.split("train")
    model = TrainableModel(name="calculator", base_model="tiny")
    rewards: list[float] = []
    async with LocalBackend() as backend, Client(CALCULATOR) as calculator:
        await model.register(backend)
        offered = [tool for tool in (await calculator.list_tools()).tools if tool.name in environment.tools]
        parts = [{"name": tool.name, "description": tool.description, "parameters": tool.input_schema} for tool in offered]
        tools = [{"type": "function", "function": part} for part in parts]

        async def agent(client: AsyncOpenAI, scenario: Scenario) -> str:
            return await work_out(client, scenario.prompt, calculator, tools)

        for step in range(steps):
            batch = questions[step * scenarios : (step + 1) * scenarios]
            groups = await gather_agent_groups(
                agent, batch, model=model, rollouts=rollouts, reward=lambda recording, answer: environment.rewards["correct"](recording.trajectory)
            )
            await model.train(groups)
            rewards.append(sum(one.reward for group in groups for one in group.rollouts) / (scenarios * rollouts))
            print(f"step {step}: reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    asyncio.run(main())
