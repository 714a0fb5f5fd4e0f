"""smolagents against sessions: its documentation's examples, with the base URL and the key set.

It writes its messages anew for each step: a tool call becomes text behind that of the reply. So what follows
a tool call is a new segment. A CodeAgent's reply ends with a stop text and without an end of turn. The text
behind it goes on after exactly the sampled tokens: all its steps are one segment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from tests.support.engine_harness import Engine, load_model, running_engine
from tests.support.framework_sessions import FrameworkSession, framework_session
from tests.support.lazily import lazily
from tests.support.quick import only_in_chaos
from tests.support.scripted_policy import save_chat_model, tool_call

smolagents = lazily("smolagents", reason="needs smolagents")
CONTEXT = 16384
"""The framework's own system prompts have ten thousand characters, and each is a token here."""


def model_downloads() -> Any:
    """A tool as the documentation writes it."""

    class ModelDownloads(smolagents.Tool):  # type: ignore[misc, name-defined]
        name = "model_download_tool"
        description = "Returns the most downloaded model of a task."
        inputs: ClassVar[dict[str, Any]] = {"task": {"type": "string", "description": "The task category."}}
        output_type = "string"

        def forward(self, task: str) -> str:
            return f"the best of {task}"

    return ModelDownloads()


Run = Callable[..., tuple[Any, FrameworkSession]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs `agent(model)` on a task; returns its answer and the session, whose segments are checked."""
    path = save_chat_model(tmp_path_factory.mktemp("long") / "0", context=CONTEXT)
    reference = load_model(path)

    async def scenario(
        engine: Engine, *replies: str, agent: Callable[[Any], Any], task: str, segments: list[list[int]]
    ) -> tuple[Any, FrameworkSession]:
        async with framework_session(engine, *replies, context=CONTEXT) as session:
            model = smolagents.OpenAIModel(
                model_id="policy", api_base=session.base_url, api_key=session.api_key
            )
            try:
                answer = await asyncio.to_thread(lambda: agent(model).run(task))
            finally:
                model.client.close()
            session.check_segments(*segments, reference=reference)
            return answer, session

    with running_engine(path, context_length=CONTEXT, max_running_requests=2) as engine:
        yield lambda *replies, **options: asyncio.run(scenario(engine, *replies, **options))


def code(text: str) -> str:
    return f"Thought: I compute it.\n<code>\n{text}\n"


@pytest.mark.parametrize("streams", [*only_in_chaos(False), True])
def test_a_code_agent_computes(run: Run, streams: bool) -> None:
    answer, session = run(
        # The policy ends at the stop text that the agent asks for.
        code("result = 2 * 21\nprint(result)") + "</code>",
        code("final_answer(result)") + "</code>",
        agent=lambda model: smolagents.CodeAgent(
            tools=[], model=model, stream_outputs=streams, verbosity_level=0
        ),
        task="How much is 2 * 21?",
        segments=[[0, 1]],
    )
    assert answer == 42
    assert "Execution logs:\n42" in session.prompts[1]


@pytest.mark.parametrize("streams", [False, *only_in_chaos(True)])
def test_a_tool_calling_agent_calls_its_tools(run: Run, streams: bool) -> None:
    answer, session = run(
        tool_call("model_download_tool", task="text-to-video"),
        "I know it." + tool_call("final_answer", answer="the best of text-to-video"),
        agent=lambda model: smolagents.ToolCallingAgent(
            tools=[model_downloads()], model=model, stream_outputs=streams, verbosity_level=0
        ),
        task="Which is the most downloaded text-to-video model?",
        segments=[[0], [1]],
    )
    assert answer == "the best of text-to-video"
    assert "Observation:\nthe best of text-to-video" in session.prompts[1]


def test_tools_are_called_in_parallel(run: Run) -> None:
    answer, session = run(
        tool_call("model_download_tool", task="a") + tool_call("model_download_tool", task="b"),
        tool_call("final_answer", answer="both"),
        agent=lambda model: smolagents.ToolCallingAgent(
            tools=[model_downloads()], model=model, verbosity_level=0
        ),
        task="Which are the best?",
        segments=[[0], [1]],
    )
    assert answer == "both"
    assert "the best of a" in session.prompts[1] and "the best of b" in session.prompts[1]


def test_an_agent_hits_its_maximum_of_steps(run: Run) -> None:
    """It then asks once more, for a final answer."""
    answer, _ = run(
        tool_call("model_download_tool", task="a"),
        tool_call("model_download_tool", task="b"),
        "I give up.",
        agent=lambda model: smolagents.ToolCallingAgent(
            tools=[model_downloads()], model=model, max_steps=2, verbosity_level=0
        ),
        task="Which is the best?",
        segments=[[0], [1], [2]],
    )
    assert answer == "I give up."


@pytest.mark.chaos
def test_an_agent_manages_another_one(run: Run) -> None:
    def agent(model: Any) -> Any:
        searcher = smolagents.ToolCallingAgent(
            tools=[model_downloads()],
            model=model,
            name="web_search_agent",
            description="Runs web searches for you.",
            verbosity_level=0,
        )
        return smolagents.CodeAgent(tools=[], model=model, managed_agents=[searcher], verbosity_level=0)

    answer, _ = run(
        code('print(web_search_agent(task="find the best model"))') + "</code>",
        tool_call("model_download_tool", task="x"),
        tool_call("final_answer", answer="the best of x"),
        code('final_answer("found")') + "</code>",
        agent=agent,
        task="Find the best model.",
        segments=[[1], [2], [0, 3]],
    )
    assert answer == "found"
