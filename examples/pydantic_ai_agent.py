"""An agent of Pydantic AI (pydantic-ai-slim[openai,mcp]) with the calculator as its MCP server, trained for some steps."""

import asyncio
import sys
from statistics import fmean

from fastmcp.client.transports import StdioTransport
from openai import AsyncOpenAI
from pydantic_ai import Agent, UnexpectedModelBehavior, UsageLimitExceeded, UsageLimits
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from art_mcp import LocalBackend, Scenario, TrainableModel, load_environment
from art_mcp.openai_patch import Recording, gather_agent_groups

environment = load_environment("calculator")
CALCULATOR = MCPToolset(StdioTransport(sys.executable, ["servers/calculator/server.py"]))
OFFERED = CALCULATOR.filtered(lambda context, tool: tool.name in environment.tools)


async def agent(client: AsyncOpenAI, scenario: Scenario) -> str:
    model = OpenAIChatModel("gpt-4o", provider=OpenAIProvider(openai_client=client))
    calculating = Agent(model, toolsets=[OFFERED], model_settings={"max_tokens": 192})
    try:
        done = await calculating.run(scenario.prompt, usage_limits=UsageLimits(request_limit=6))
    except (UsageLimitExceeded, UnexpectedModelBehavior):  # worth 0: going round in circles, or calling nothing that there is
        return ""
    return done.output  # (what is raised is left out)


def solved(recording: Recording, answer: str) -> float:
    return float(answer.split()[-1:] == [recording.scenario.facts["answer"]])


async def main(steps: int = 20, scenarios: int = 16) -> list[float]:
    model, rewards = TrainableModel(name="calculator", base_model="tiny"), []
    async with LocalBackend() as backend, CALCULATOR:
        await model.register(backend)
        for step in range(steps):
            batch = environment.split("train")[step * scenarios : (step + 1) * scenarios]
            groups = await gather_agent_groups(agent, batch, model=model, reward=solved)
            await model.train(groups)
            rewards.append(fmean(one.reward for group in groups for one in group.rollouts))
            print(f"step {step}: reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    asyncio.run(main())
