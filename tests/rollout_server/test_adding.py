"""The addition task: its environment answers calls and mistakes, and rewards the exact sum."""

from __future__ import annotations

import asyncio

import pytest

from areal_like.trajectory import FinishReason
from rollout_server.environments.base import Reply
from rollout_server.rendering.tiny import TinyRenderer
from rollout_server.tasks.adding import AddingTask
from trainer.models.tiny_chat import chat_tokenizer

TOKENIZER = chat_tokenizer()
RENDERER = TinyRenderer(
    TOKENIZER, stop_token_ids=[TOKENIZER.eos_token_id], vocab_size=len(TOKENIZER), template_kwargs={}
)


def said(text: str, *, task: AddingTask, index: int = 0) -> Reply:
    """The reply of a policy that samples `text`, parsed as in a job."""
    tools = task.environment(task.example("train", index)).tools
    tokens = TOKENIZER(text + "<eos>", add_special_tokens=False)["input_ids"]
    parsed = RENDERER.parse(tokens, prompt_ids=[], tools=tools)
    return Reply(
        text=parsed.text,
        raw_text=text,
        tool_calls=parsed.tool_calls,
        finish_reason=FinishReason.STOP,
        num_tokens=len(tokens),
    )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<call>add 37 85</call>", "122"),
        ("<call>add 37 085</call>", "122"),
        ("<call>add 37</call>", "Error: missing argument b"),
        ("<call>add 37 8a</call>", "Error: argument b: "),
        ("<call>add 1 2 3</call>", "Error: unknown argument value 3: it takes a, b"),
        ("<call>sub 1 2</call>", 'Error: there is no tool "sub". Tools: add'),
        ("<call>add 37 85", 'Error: there is no tool "". Tools: add'),
        ("<call></call>", 'Error: there is no tool "". Tools: add'),
    ],
)
def test_a_call_is_answered(text: str, answer: str) -> None:
    task = AddingTask()
    environment = task.environment(task.example("train", 0))
    step = asyncio.run(environment.step(said(text, task=task)))
    assert not step.done and step.reward == 0
    (message,) = step.messages
    assert message["role"] == "tool" and message["content"].startswith(answer)
    assert step.metrics["tool_calls"] == 1
    assert step.metrics["tool_errors"] == answer.startswith("Error")


@pytest.mark.parametrize("use_tool", [True, False])
def test_the_exact_sum_is_rewarded(use_tool: bool) -> None:
    task = AddingTask(use_tool=use_tool)
    example = task.example("eval", 3)
    environment = task.environment(example)
    messages = asyncio.run(environment.reset())
    assert [message["content"] for message in messages] == [example.prompt]
    assert [tool["function"]["name"] for tool in environment.tools] == ["add"] * use_tool
    assert str(sum(map(int, example.prompt.split("+")))) == example.answer
    for text, reward in ((example.answer, 1.0), (example.answer + "0", 0.0), ("", 0.0), (" 1", 0.0)):
        step = asyncio.run(environment.step(said(text, task=task)))
        assert (step.done, step.reward) == (True, reward)
    longest = max((task.example("train", index).prompt for index in range(300)), key=len)
    prompt = RENDERER.render([{"role": "user", "content": longest}], tools=environment.tools)
    assert len(prompt) <= task.max_prompt_tokens
