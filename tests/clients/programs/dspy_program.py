"""DSPy: a prediction, and an agent with a tool.

run("predict" | "react")

Without `cache=False` an equal prompt of a later sample is answered from the cache, without a request.
"""

from __future__ import annotations


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def run(mode: str) -> str:
    import dspy

    dspy.configure(lm=dspy.LM("openai/policy", cache=False))
    program = (
        dspy.Predict("question -> answer")
        if mode == "predict"
        else dspy.ReAct("question -> answer", tools=[get_weather])
    )
    return str(program(question="Tokyo?").answer)
