"""The clients that are tested: what the policy says to each, and what is recorded of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def tool_call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


NODE = "clients-node"
"""The environment of the clients in JavaScript."""
ANSWER = "It is sunny."
RESULT = "sunny in Tokyo"
CALL = tool_call("get_weather", city="Tokyo")
THREE_CALLS = (f"<think>hm</think>Let me see.{CALL}", CALL + CALL, ANSWER)


def fields(**texts: str) -> str:
    """An answer in the format of DSPy."""
    parts = [f"[[ ## {name} ## ]]\n{text}" for name, text in texts.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def code(line: str) -> str:
    """A step of a CodeAgent, which ends with its stop text."""
    return f"I look.\n<code>\n{line}\n</code>\\"


def command(line: str) -> str:
    return tool_call("bash", command=line)


_STEP = fields(next_thought="hm", next_tool_name="get_weather", next_tool_args='{"city": "Tokyo"}')


@dataclass(frozen=True, kw_only=True)
class Client:
    """One client in one mode: a row of the table in docs/reference/clients.md."""

    name: str
    """As the page has it."""
    mode: str
    packages: tuple[str, ...]
    """The page shows their versions."""
    program: str
    """In `programs`."""
    runs: tuple[tuple[str, ...], ...]
    """Arguments of the program, for each of its runs; all of them are recorded in the same way."""
    says: tuple[str, ...] = THREE_CALLS
    answer: str = ANSWER
    segments: int = 1
    results: int = 3
    """How often the last prompt has `RESULT`."""
    note: str = ""
    refused: Mapping[int, int] = field(default_factory=dict)
    """Requests that are refused on purpose, by HTTP status."""
    environment: str = "clients"
    """See install.sh; NODE: see install_node.sh."""
    variables: Mapping[str, str] = field(default_factory=dict)


def _looped(name: str, mode: str, package: str, client: str, note: str = "", **options: Any) -> Client:
    """A client of `tool_loop`, whole and streamed."""
    runs = ((client, "create"), (client, "stream"))
    mode = f"{mode}; whole and streamed"
    return Client(
        name=name, mode=mode, packages=(package,), program="tool_loop", runs=runs, note=note, **options
    )


def _completed(name: str, package: str, program: str, *runs: str, **options: Any) -> Client:
    """A client that asks once."""
    return Client(
        name=name,
        mode="one completion",
        packages=(package,),
        program=program,
        runs=tuple((run,) for run in runs),
        says=(ANSWER,),
        results=0,
        **options,
    )


def _node(name: str, mode: str, packages: tuple[str, ...], client: str, note: str = "") -> Client:
    """A client in JavaScript, whole and streamed."""
    runs = ((client, "create"), (client, "stream"))
    return Client(
        name=name,
        mode=f"{mode}; whole and streamed",
        packages=packages,
        program="node_tool_loop",
        runs=runs,
        note=note,
        environment=NODE,
    )


_LITELLM = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
_LITELLM_NOTE = "`LITELLM_LOCAL_MODEL_COST_MAP=True`: it downloads no list of prices"
_PYDANTIC_NOTE = (
    "streamed by `run(..., event_stream_handler=...)`; `run_stream` takes text beside a call for the answer"
)
_CREWAI_NOTE = "`LLM(..., custom_openai=True)` in both modes: else it wants the name of a model of OpenAI"
_CREWAI = {"CREWAI_DISABLE_TELEMETRY": "true"}
_MINI = {"MSWEA_COST_TRACKING": "ignore_errors", **_LITELLM}

CLIENTS = (
    _looped("openai", "chat completions", "openai", "openai_chat"),
    _looped("openai", "Responses", "openai", "openai_responses"),
    _looped("openai", "Responses, `previous_response_id`", "openai", "openai_previous"),
    _looped("anthropic", "Messages", "anthropic", "anthropic", refused={400: 1}),
    _looped(
        "OpenAI Agents SDK",
        "Responses (its default)",
        "openai-agents",
        "agents",
        "`set_tracing_disabled(True)`: else it sends traces to OpenAI",
    ),
    _looped("Pydantic AI", "`openai:` (Responses)", "pydantic-ai-slim", "pydantic_openai", _PYDANTIC_NOTE),
    _looped(
        "Pydantic AI", "`anthropic:` (Messages)", "pydantic-ai-slim", "pydantic_anthropic", _PYDANTIC_NOTE
    ),
    _looped("LiteLLM", "`openai/`", "litellm", "litellm_openai", _LITELLM_NOTE, variables=_LITELLM),
    _looped("LiteLLM", "`anthropic/`", "litellm", "litellm_anthropic", _LITELLM_NOTE, variables=_LITELLM),
    _looped("LiteLLM", "`responses()`", "litellm", "litellm_responses", _LITELLM_NOTE, variables=_LITELLM),
    _completed("LangChain", "langchain-openai", "langgraph_agent", "completion", "completion_streamed"),
    Client(
        name="LangGraph",
        mode="`create_react_agent`; whole and streamed",
        packages=("langgraph", "langchain-openai"),
        program="langgraph_agent",
        runs=(("agent",), ("agent_streamed",)),
    ),
    _completed("AutoGen", "autogen-agentchat", "autogen_agent", "completion"),
    Client(
        name="AutoGen",
        mode="`AssistantAgent`, `max_tool_iterations=10`",
        packages=("autogen-agentchat",),
        program="autogen_agent",
        runs=(("agent",),),
        note="needs `model_info` for a model whose name it does not know",
    ),
    Client(
        name="AutoGen",
        mode="`AssistantAgent`, `reflect_on_tool_use=True`",
        packages=("autogen-agentchat",),
        program="autogen_agent",
        runs=(("reflection",),),
        says=(CALL, ANSWER),
        results=1,
        segments=2,
        note="the reflection has no tools in its request, so it is another prompt",
    ),
    _completed(
        "CrewAI",
        "crewai",
        "crewai_crew",
        "completion",
        note=_CREWAI_NOTE,
        environment="clients-crewai",
        variables=_CREWAI,
    ),
    Client(
        name="CrewAI",
        mode="crew of one agent",
        packages=("crewai",),
        program="crewai_crew",
        runs=(("crew",),),
        segments=2,
        note="`CREWAI_DISABLE_TELEMETRY=true`: else it sends usage data; it drops text beside a call",
        environment="clients-crewai",
        variables=_CREWAI,
    ),
    Client(
        name="instructor",
        mode="tools (its default), second attempt",
        packages=("instructor",),
        program="instructor_model",
        runs=(("tools",),),
        says=(tool_call("Weather", city="Tokyo"), tool_call("Weather", city="Tokyo", sky="sunny")),
        results=0,
        environment="clients-instructor",
    ),
    Client(
        name="instructor",
        mode="`Mode.JSON`, second attempt",
        packages=("instructor",),
        program="instructor_model",
        runs=(("json",),),
        says=('{"city": "Tokyo"}', '{"city": "Tokyo", "sky": "sunny"}'),
        results=0,
        environment="clients-instructor",
    ),
    Client(
        name="DSPy",
        mode="`Predict`",
        packages=("dspy",),
        program="dspy_program",
        runs=(("predict",),),
        says=(fields(answer=ANSWER),),
        results=0,
        note="`dspy.LM(..., cache=False)`: else an equal prompt makes no request",
        variables=_LITELLM,
    ),
    Client(
        name="DSPy",
        mode="`ReAct`",
        packages=("dspy",),
        program="dspy_program",
        runs=(("react",),),
        says=(
            *(3 * (_STEP,)),
            fields(next_thought="done", next_tool_name="finish", next_tool_args="{}"),
            fields(reasoning="I looked.", answer=ANSWER),
        ),
        segments=5,
        note="each step is one user message with all steps before it",
        variables=_LITELLM,
    ),
    _completed("smolagents", "smolagents", "smolagents_agents", "completion"),
    Client(
        name="smolagents",
        mode="`ToolCallingAgent`; whole and streamed",
        packages=("smolagents",),
        program="smolagents_agents",
        runs=(("tool_calling",), ("tool_calling_streamed",)),
        says=(CALL, CALL + CALL, tool_call("final_answer", answer=ANSWER)),
        segments=3,
        note="it sends its calls back as text",
    ),
    Client(
        name="smolagents",
        mode="`CodeAgent`; whole and streamed",
        packages=("smolagents",),
        program="smolagents_agents",
        runs=(("code",), ("code_streamed",)),
        says=(
            code('print(get_weather("Tokyo"))'),
            code('print(get_weather("Tokyo"), get_weather("Tokyo"))'),
            code(f'final_answer("{ANSWER}")'),
        ),
        note="as long as each turn ends with its stop text `</code>`; one more segment after any other end",
    ),
    Client(
        name="mini-swe-agent",
        mode="`DefaultAgent`, LiteLLM, `mini.yaml`",
        packages=("mini-swe-agent",),
        program="mini_swe_agent",
        runs=((),),
        says=(
            "I look." + command("printf 'sunny in %s' Tokyo > weather.txt; cat weather.txt"),
            command("cat weather.txt") + command("head -c 20 weather.txt"),
            command(f"echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo {ANSWER}"),
        ),
        note="`MSWEA_COST_TRACKING=ignore_errors`: else the model's unknown price ends the run",
        variables=_MINI,
    ),
    _node("openai (JavaScript)", "chat completions", ("openai",), "openai_chat"),
    _node("openai (JavaScript)", "Responses", ("openai",), "openai_responses"),
    _node("openai (JavaScript)", "Responses, `previous_response_id`", ("openai",), "openai_previous"),
    _node("anthropic (JavaScript)", "Messages", ("@anthropic-ai/sdk",), "anthropic"),
    _node("Vercel AI SDK", "`openai()` (Responses)", ("ai", "@ai-sdk/openai"), "vercel_openai"),
    _node("Vercel AI SDK", "`openai.chat()`", ("ai", "@ai-sdk/openai"), "vercel_openai_chat"),
    _node("Vercel AI SDK", "`anthropic()` (Messages)", ("ai", "@ai-sdk/anthropic"), "vercel_anthropic"),
)
