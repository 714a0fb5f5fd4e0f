"""The two agents of smolagents.

run("completion" | "tool_calling" | "tool_calling_streamed" | "code" | "code_streamed")
"""

from __future__ import annotations


def run(mode: str) -> str:
    from smolagents import ChatMessage, CodeAgent, MessageRole, OpenAIModel, ToolCallingAgent, tool

    @tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Its name.
        """
        return f"sunny in {city}"

    model = OpenAIModel("policy")
    if mode == "completion":
        question = [{"type": "text", "text": "Tokyo?"}]
        return str(model.generate([ChatMessage(role=MessageRole.USER, content=question)]).content)
    kind = CodeAgent if mode.startswith("code") else ToolCallingAgent
    agent = kind(tools=[get_weather], model=model, stream_outputs=mode.endswith("streamed"))
    return str(agent.run("Tokyo?"))
