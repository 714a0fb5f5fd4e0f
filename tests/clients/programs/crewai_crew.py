"""crewai's model, and a crew of one agent.

run("completion" | "crew")

`custom_openai`: any name of a model will do. Without it, it must be one of OpenAI's.
"""

from __future__ import annotations


def run(mode: str) -> str:
    from crewai import LLM, Agent, Crew, Task
    from crewai.tools import tool

    @tool("get_weather")
    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    model = LLM(model="policy", custom_openai=True)
    if mode == "completion":
        return str(model.call("Tokyo?"))
    agent = Agent(
        role="Assistant",
        goal="Answer questions about the weather.",
        backstory="You are short.",
        tools=[get_weather],
        llm=model,
    )
    task = Task(description="Tokyo?", expected_output="The weather in one sentence.", agent=agent)
    return str(Crew(agents=[agent], tasks=[task]).kickoff().raw)
