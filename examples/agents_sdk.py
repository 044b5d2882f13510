"""An agent of the OpenAI Agents SDK (openai-agents) with the calculator as its MCP server, trained for some steps."""

import asyncio
import sys
from statistics import fmean

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner
from agents.exceptions import MaxTurnsExceeded, ModelBehaviorError
from agents.mcp import MCPServerStdio, create_static_tool_filter
from openai import AsyncOpenAI

from art_mcp import LocalBackend, Scenario, TrainableModel, load_environment
from art_mcp.openai_patch import Recording, gather_agent_groups

environment = load_environment("calculator")
CALCULATOR = MCPServerStdio(
    {"command": sys.executable, "args": ["servers/calculator/server.py"]},
    cache_tools_list=True,
    tool_filter=create_static_tool_filter(allowed_tool_names=list(environment.tools)),
)


async def agent(client: AsyncOpenAI, scenario: Scenario) -> str:
    model, settings = OpenAIChatCompletionsModel("gpt-4o", openai_client=client), ModelSettings(max_tokens=192)
    calculating = Agent(name="Calculator", model=model, model_settings=settings, mcp_servers=[CALCULATOR])
    try:
        done = await Runner.run(calculating, scenario.prompt, max_turns=6, run_config=RunConfig(tracing_disabled=True))
    except (MaxTurnsExceeded, ModelBehaviorError):  # worth 0: going round in circles, or calling a tool that is not there
        return ""
    return done.final_output  # (what is raised is left out)


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
