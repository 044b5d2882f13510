"""An agent on the `openai` package with the calculator as its MCP server, trained for some steps."""

import asyncio
import json
import sys
from statistics import fmean
from typing import Any

from mcp import Client, StdioServerParameters
from openai import AsyncOpenAI

from art_mcp import LocalBackend, Scenario, TrainableModel, load_environment
from art_mcp.openai_patch import Recording, gather_agent_groups

environment = load_environment("calculator")
CALCULATOR = StdioServerParameters(command=sys.executable, args=["servers/calculator/server.py"])


async def work_out(client: AsyncOpenAI, question: str, calculator: Client, tools: list[Any]) -> str:
    """The agent: nothing in it knows that it is being trained."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(6):
        answer = await client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools, max_tokens=192)
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = await calculator.call_tool(call.function.name, json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result.content[0].text})
    return ""


def solved(recording: Recording, answer: str) -> float:
    return float(answer.split()[-1:] == [recording.scenario.facts["answer"]])


async def main(steps: int = 20, scenarios: int = 16) -> list[float]:
    model, rewards = TrainableModel(name="calculator", base_model="tiny"), []
    async with LocalBackend() as backend, Client(CALCULATOR) as calculator:
        await model.register(backend)
        offered = [tool for tool in (await calculator.list_tools()).tools if tool.name in environment.tools]
        told = [{"name": tool.name, "description": tool.description, "parameters": tool.input_schema} for tool in offered]
        tools = [{"type": "function", "function": function} for function in told]

        async def agent(client: AsyncOpenAI, scenario: Scenario) -> str:
            return await work_out(client, scenario.prompt, calculator, tools)

        for step in range(steps):
            batch = environment.split("train")[step * scenarios : (step + 1) * scenarios]
            groups = await gather_agent_groups(agent, batch, model=model, reward=solved)
            await model.train(groups)
            rewards.append(fmean(one.reward for group in groups for one in group.rollouts))
            print(f"step {step}: reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    asyncio.run(main())
