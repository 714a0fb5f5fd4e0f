"""Whatever the client of a session sends, nothing that was sampled is tokenized again: each sampled token is
recorded once, with the log-prob and version that the engine gave it after exactly the tokens before it.

A longer run is in tests/chaos/test_hostile_sessions.py.
"""

from __future__ import annotations

from pathlib import Path

from rollout_server.rendering.library import LibraryRenderer
from tests.support.chat_models import STRIPPING, jinja_renderer, options_of, qwen3_tokenizer
from tests.support.engine_harness import Engine
from tests.support.hostile_sessions import HostileSessions, check_seen
from tests.support.scripted_policy import VOCAB


def test_record_is_what_the_engine_sampled(engine: Engine, models: tuple[Path, Path]) -> None:
    """Long, because every example is a conversation with a real engine, sixteen of them."""
    sessions = HostileSessions(engine, models)
    stripping = jinja_renderer(STRIPPING)
    stripping.vocab_size = VOCAB
    sessions.play(stripping, num_examples=8, seed=None)
    tokenizer = qwen3_tokenizer()
    qwen3 = LibraryRenderer(tokenizer, name="qwen3", **options_of(tokenizer) | {"vocab_size": VOCAB})
    sessions.play(qwen3, num_examples=8, seed=None)
    print(sessions.seen)
    check_seen(sessions.seen)
