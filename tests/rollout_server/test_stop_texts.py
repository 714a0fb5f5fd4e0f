"""Stop texts in a stream of tokens, against decoding everything from the start; and in resumed turns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from areal_like.trajectory import FinishReason
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.policy.generation import Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.stop_texts import StopFinder
from tests.rollout_server.test_episodes import EXAMPLE, CountingEngine, Digits
from tests.support.engine_harness import VOCAB, PieceTokenizer

TEXTS = st.lists(st.text("abcdéê", min_size=1, max_size=5), min_size=1, max_size=3)


@settings(max_examples=300)
@given(tokens=st.lists(st.integers(0, VOCAB - 1) | st.sampled_from([8, 9, 39, 2]), max_size=40), stops=TEXTS)
def test_the_first_token_that_completes_a_text(tokens: list[int], stops: list[str]) -> None:
    tokenizer = PieceTokenizer()
    finder = StopFinder(stops, tokenizer)
    found = next((end for end, token in enumerate(tokens, 1) if finder.find(token)), None)
    assert found == tokenizer.first_stop(tokens, stops)


class Bytes:
    """A token is a byte."""

    def text_of(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def token_of(self, text: str) -> int | None:
        return None


@settings(max_examples=300)
@given(
    text=st.text("a\u00e9\u4e2d\U0001f600", max_size=12),
    stop=st.text("a\u00e9\u4e2d\U0001f600", min_size=1, max_size=3),
)
@example(text="\U0001f600\u4e2d", stop="\U0001f600\u4e2d")
def test_characters_of_several_bytes(text: str, stop: str) -> None:
    tokens = list(text.encode())
    finder = StopFinder([stop], Bytes())
    found = next((end for end, token in enumerate(tokens, 1) if finder.find(token)), None)
    ends = (end for end in range(1, len(tokens) + 1) if stop in Bytes().text_of(tokens[:end]))
    assert found == next(ends, None)


def test_a_text_is_found_after_bytes_that_are_no_characters() -> None:
    finder = StopFinder(["ab"], Bytes())
    found = [end for end, token in enumerate(b"\xf0\x9f" * 50 + b"aab", 1) if finder.find(token)]
    assert found == [103]


def test_a_resumed_turn_says_what_was_sampled() -> None:
    async def body() -> CountingEngine:
        engine = CountingEngine(interrupt_after=[2, 3])
        sampling = Sampling(max_new_tokens=8, stop=("x",))
        policy = PolicyClient(engine, sampling=sampling, rid="1.0", gate=GenerationGate())
        generation = await policy.sample(Digits().encode(EXAMPLE))
        assert generation.finish_reason is FinishReason.LENGTH
        return engine

    engine = asyncio.run(body())
    sent = [sampling for _, sampling, _ in engine.requests]
    assert [(sampling.num_resumed, sampling.stop) for sampling in sent] == [
        (0, ("x",)),
        (2, ("x",)),
        (5, ("x",)),
    ]
