"""langchain-openai's chat model, and langgraph's agent of it.

run("completion" | "completion_streamed" | "agent" | "agent_streamed")
"""

from __future__ import annotations

from typing import Any


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def run(mode: str) -> str:
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    model = ChatOpenAI(model="policy")
    if mode == "completion":
        return str(model.invoke("Tokyo?").content)
    if mode == "completion_streamed":
        return "".join(str(chunk.content) for chunk in model.stream("Tokyo?"))
    agent = create_react_agent(model, [get_weather])
    question: Any = {"messages": [("user", "Tokyo?")]}
    if mode == "agent":
        return str(agent.invoke(question)["messages"][-1].content)
    texts: dict[str, str] = {}
    for piece, _ in agent.stream(question, stream_mode="messages"):
        if piece.type == "AIMessageChunk":
            texts[piece.id] = texts.get(piece.id, "") + piece.content
    return list(texts.values())[-1]
