"""Conversations in the engine's core: what is kept of a turn for the next, and that log-probs stay right."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from areal_like.trajectory import FinishReason
from rollout_server.engine.cache import Prefix
from rollout_server.engine.core import EngineCore
from rollout_server.engine.kept_prefixes import KeptPrefixes
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams, Sequence
from tests.support.engine_harness import KINDS, load_model, reference_logprobs, save_model, swap
from tests.support.quick import others_in_chaos

CONTEXT = 64


def make_core(
    path: Path, *, fast: bool = True, max_running: int = 4, kept_tokens: int | None = None
) -> EngineCore:
    model, weights = load(
        str(path),
        dtype=torch.float32,
        device=torch.device("cpu"),
        context_length=CONTEXT,
        allow_fast_path=fast,
    )
    options = EngineOptions(
        max_running_requests=max_running, context_length=CONTEXT, conversation_cache_tokens=kept_tokens
    )
    return EngineCore(model, weights, options, version="0")


def submit(
    core: EngineCore, name: str, prompt: list[int], num_tokens: int, *, keeps: bool = True
) -> Sequence:
    sequence = Sequence(
        seq_id=name,
        prompt=tuple(prompt),
        params=SamplingParams(max_new_tokens=num_tokens),
        keeps_prefix=keeps,
    )
    core.submit(sequence)
    return sequence


def run(core: EngineCore) -> None:
    while core.all_sequences:
        core.step()
        core.scheduler.check()
        core.contexts.kept.check()


def error(model: Any, sequence: Sequence) -> float:
    want = reference_logprobs(model, sequence.prompt, sequence.output_ids)
    return float(np.abs(want - np.array(sequence.output_logprobs)).max())


@pytest.mark.parametrize(
    ("kind", "fast"),
    others_in_chaos(
        itertools.product(KINDS, (True, False)),
        quick=[("qwen3", True), ("qwen3_moe", True), ("llama", False)],
    ),
)
def test_a_turn_computes_only_what_is_new(
    kind: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes and new parts of different lengths in one pass, on every path; on the fast one it is the pass
    of a decode step."""
    path = save_model(tmp_path / kind, kind)
    core, model = make_core(path, fast=fast), load_model(path)
    if core.model.joins_passes:
        monkeypatch.setattr(core.model, "compute", None)
    said = [list(range(5, 8)), list(range(5, 20)), [9], list(range(5, 8))]
    for turn in range(3):
        before = core.contexts.num_prefilled
        turns = [submit(core, f"{i}.{turn}", tokens, 4 + i) for i, tokens in enumerate(said)]
        run(core)
        assert max(error(model, sequence) for sequence in turns) < 1e-5
        if turn:
            new = [2 + turn + 3 * i for i in range(4)]
            assert core.contexts.num_prefilled - before == sum(new)
            assert [sequence.num_cached_tokens for sequence in turns] == [
                len(tokens) - 1 - num for tokens, num in zip(said, new, strict=True)
            ]
        said = [
            [*sequence.prompt, *sequence.output_ids, *range(30, 33 + turn + 3 * i)]
            for i, sequence in enumerate(turns)
        ]
    assert core.contexts.num_continued >= 8


def test_a_long_turn_is_computed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.engine.contexts.MAX_SCORES", 200)
    path = save_model(tmp_path / "m", "qwen2")
    core, model = make_core(path), load_model(path)
    said = [list(range(5, 8 + i)) for i in range(4)]
    for new in (20, 15):
        turns = [submit(core, str(i), tokens, 3) for i, tokens in enumerate(said)]
        run(core)
        assert max(error(model, sequence) for sequence in turns) < 1e-4
        said = [[*s.prompt, *s.output_ids, *range(30, 30 + new - 3 * i)] for i, s in enumerate(turns)]
    before = core.contexts.num_prefilled
    turns = [submit(core, str(i), tokens, 3) for i, tokens in enumerate(said)]
    run(core)
    assert max(error(model, sequence) for sequence in turns) < 1e-4
    assert core.contexts.num_prefilled - before == 15 + 12 + 9 + 6


def test_a_branch_and_a_group_share_what_is_equal(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    core, model = make_core(path), load_model(path)
    group = [submit(core, str(i), list(range(5, 25)), 6) for i in range(9)]
    run(core)
    assert core.contexts.num_prefilled == 19, "a group's prompt is computed once, also over several steps"
    assert core.contexts.kept.num_tokens <= 19 + 9 * 6
    again = submit(core, "again", list(range(5, 25)), 6)
    edited = submit(core, "edited", [*range(5, 15), *range(50, 60)], 6)
    branch = submit(core, "branch", [*group[3].prompt, *group[3].output_ids[:3], 40, 41], 6)
    run(core)
    assert (again.num_cached_tokens, edited.num_cached_tokens, branch.num_cached_tokens) == (19, 10, 23)
    assert core.contexts.num_prefilled == 19 + 9 + 1
    assert max(error(model, s) for s in (*group, again, edited, branch)) < 1e-4
    core.flush_prefix_cache()
    assert submit(core, "flushed", list(range(5, 25)), 2) and core.contexts.kept.num_tokens == 0
    run(core)
    assert core.contexts.num_prefilled == 29 + 19


def test_other_requests_are_not_kept(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", "llama")
    core = make_core(path)
    first = submit(core, "1", list(range(5, 25)), 6, keeps=False)
    run(core)
    assert core.contexts.kept.num_tokens == 0
    submit(core, "2", [*first.prompt, *first.output_ids, 9], 6)
    run(core)
    assert core.contexts.num_continued == 0


def test_a_turn_copies_only_its_own_tokens() -> None:
    kept = KeptPrefixes(max_tokens=24)
    tokens = list(range(9))
    places = []
    for end in (4, 6, 9):
        kept.insert(tokens[:end], partial(prefix_of, tokens))
        parts, _ = kept.match(tokens[:end])
        places.append([part.kv_L2HTD.data_ptr() for part in parts])
        assert sum(part.kv_L2HTD.shape[3] for part in parts) == end
    assert places[2][:2] == places[1] and places[1][:1] == places[0]


def test_no_kv_is_kept_without_its_state() -> None:
    kept = KeptPrefixes(max_tokens=24, state_tokens=4)
    tokens = list(range(12))
    for end in (4, 8):
        kept.insert(tokens[:end], partial(prefix_of, tokens), snapshot=lambda: state_of(tokens))
    other = list(range(20, 30))
    kept.insert(other, partial(prefix_of, other), snapshot=lambda: state_of(other))
    kept.check()
    assert (kept.num_tokens, kept.num_states) == (10, 1)


def test_dropped_kv_is_freed_at_once() -> None:
    kept = KeptPrefixes(max_tokens=24)
    arrays = list[weakref.ref[Tensor]]()

    def between(start: int, end: int) -> Prefix:
        return Prefix(kv_L2HTD=torch.zeros(1, 2, 1, end - start, 1), routes_TLK=None)

    def insert(*tokens: int) -> None:
        kept.insert(tokens, between)
        parts, _ = kept.match(tokens)
        for part in parts:
            assert part.kv_L2HTD._base is not None
            arrays.append(weakref.ref(part.kv_L2HTD._base))

    gc.disable()
    try:
        insert(1, 2, 3, 4, 5, 6)
        insert(1, 2, 3, 4, 5, 6, 7, 8, 9)
        insert(1, 2, 3, 20, 21)
        insert(*range(30, 50))  # the others are dropped for it
        assert [array() is None for array in arrays[:-1]] == [True] * (len(arrays) - 1)
        kept.clear()
        assert kept.num_tokens == 0 and all(array() is None for array in arrays)
    finally:
        gc.enable()


def test_kv_older_than_a_swap_is_not_kept(tmp_path: Path) -> None:
    paths = [save_model(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1)]
    for recompute in (True, False):
        core = make_core(paths[0])
        early = submit(core, "early", list(range(5, 25)), 8)
        for _ in range(3):
            core.step()
        swap(core, paths[1], version="1", recompute=recompute)
        run(core)
        assert core.contexts.kept.num_tokens == (27 if recompute else 0)
        late = submit(core, "late", [*early.prompt, *early.output_ids, 9], 6)
        run(core)
        assert late.num_cached_tokens == (27 if recompute else 0)
        assert error(load_model(paths[1]), late) < 1e-4


@dataclass
class Play:
    """Random conversations on one engine, with everything that may happen between two steps."""

    core: EngineCore
    paths: list[Path]
    rng: random.Random
    recompute: bool
    version: int = 0
    open: list[Sequence] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    num_turns: int = 0

    def act(self) -> None:
        rng, core = self.rng, self.core
        self.ended += [sequence for sequence in self.open if sequence.finish is not None]
        self.open = [sequence for sequence in self.open if sequence.finish is None]
        kind = rng.choices(
            ["step", "start", "turn", "abort", "swap", "preempt", "flush"], [30, 6, 12, 3, 1.5, 1, 0.5]
        )[0]
        if kind == "start":
            self._submit(self._tokens() if rng.random() < 0.5 else [3] * 6 + self._tokens())
        elif kind == "turn" and self.ended:
            last = rng.choice(self.ended[-6:])
            said = [*last.prompt, *last.output_ids]
            if rng.random() < 0.2:
                said = said[: rng.randint(1, len(said))]
            self._submit((said + self._tokens())[: CONTEXT - 4])
        elif kind == "abort" and self.open:
            core.abort([rng.choice(self.open)])
        elif kind == "swap":
            self.version += 1
            swap(core, self.paths[self.version % 2], version=str(self.version), recompute=self.recompute)
        elif kind == "preempt":
            core.preempt_all()
        elif kind == "flush":
            core.flush_prefix_cache()
        else:
            core.step()
        core.scheduler.check()
        core.contexts.kept.check()

    def _tokens(self) -> list[int]:
        return [self.rng.randint(3, 6) for _ in range(self.rng.randint(1, 9))]

    def _submit(self, prompt: list[int]) -> None:
        num_tokens = self.rng.randint(1, CONTEXT - len(prompt))
        keeps = self.rng.random() < 0.9
        self.open.append(submit(self.core, str(self.num_turns), prompt, min(num_tokens, 9), keeps=keeps))
        self.num_turns += 1


@pytest.mark.parametrize("recompute", [pytest.param(True, marks=pytest.mark.chaos), False])
def test_random_conversations_have_right_logprobs(recompute: bool, tmp_path: Path) -> None:
    """Under the recorded versions: of every token with `recompute`, and of all sequences that no swap fell
    into with `keep`."""
    paths = [save_model(tmp_path / str(seed), "qwen3", seed=seed) for seed in (0, 1)]
    models = [load_model(path) for path in paths]
    for seed in range(3):
        core = make_core(paths[0], max_running=3, kept_tokens=(0, 60, 400)[seed])
        play = Play(core, paths, random.Random(seed), recompute)
        for _ in range(250):
            play.act()
        run(core)
        sequences = play.ended + play.open
        assert len(sequences) > 30 and play.version > 1
        assert (core.contexts.num_continued > 5) == (seed > 0)
        for sequence in sequences:
            assert sequence.finish is not None and sequence.finish.reason is not FinishReason.STOP
            spans = sequence.version_spans
            if not spans or (len(spans) > 1 and not recompute):
                continue
            got = np.array(sequence.output_logprobs)
            for version, start, end in spans:
                want = reference_logprobs(models[int(version) % 2], sequence.prompt, sequence.output_ids)
                assert np.abs(want - got)[start:end].max() < 1e-4


def kv_of(tokens: list[int]) -> torch.Tensor:
    """[1, 2, 1, T, 1]: a different number for every sequence of tokens before a position."""
    numbers = [float(hash(tuple(tokens[: end + 1])) % 9973) for end in range(len(tokens))]
    return torch.tensor(numbers).view(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 1)


def prefix_of(tokens: list[int], start: int, end: int) -> Prefix:
    """KV and routes that both depend on all tokens before a position."""
    kv = kv_of(tokens)
    routes = kv[0, 0, 0].numpy().astype(np.uint16)[:, None]
    return Prefix(kv_L2HTD=kv[:, :, :, start:end], routes_TLK=routes[start:end])


def state_of(tokens: list[int]) -> torch.Tensor:
    """A different state for every sequence of tokens."""
    return torch.tensor(tokens)


class KeptPrefixesMachine(RuleBasedStateMachine):
    """Against all sequences that were ever put in."""

    max_tokens = 40
    state_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.kept = KeptPrefixes(max_tokens=self.max_tokens, state_tokens=self.state_tokens)
        self.inserted: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 2), max_size=18), continues=st.booleans(), is_shared=st.booleans())
    def insert(self, tokens: list[int], continues: bool, is_shared: bool) -> None:
        if continues and self.inserted:
            tokens = self.inserted[-1] + tokens
        self.kept.insert(
            tokens,
            partial(prefix_of, tokens),
            snapshot=lambda: state_of(tokens),
            is_shared=is_shared,
        )
        if len(tokens) + self.state_tokens <= self.max_tokens:
            self.inserted.append(tokens)
            assert self.kept.num_matched(tokens) == len(tokens)

    @rule(tokens=st.lists(st.integers(0, 2), max_size=20))
    def look_up(self, tokens: list[int]) -> None:
        parts, state = self.kept.match(tokens)
        found = sum(part.kv_L2HTD.shape[3] for part in parts)
        longest = max((shared(tokens, other) for other in self.inserted), default=0)
        assert found == longest if self.max_tokens > 1000 and not self.state_tokens else found <= longest
        if parts:
            want = prefix_of(tokens, 0, found)
            assert torch.equal(torch.cat([part.kv_L2HTD for part in parts], 3), want.kv_L2HTD)
            routes = [part.routes_TLK for part in parts if part.routes_TLK is not None]
            assert np.array_equal(np.concatenate(routes), want.routes_TLK)
            assert tokens[:found] in self.inserted or not self.state_tokens
        assert (state is not None) == (found > 0 and self.state_tokens > 0)
        assert state is None or torch.equal(state, state_of(tokens[:found]))

    @rule()
    def clear(self) -> None:
        if len(self.inserted) > 12:
            self.kept.clear()
            self.inserted.clear()

    @invariant()
    def is_consistent(self) -> None:
        self.kept.check()


class RoomyMachine(KeptPrefixesMachine):
    """Nothing is dropped, so that the longest prefix is always found."""

    max_tokens = 1 << 30


class StatesMachine(KeptPrefixesMachine):
    """With recurrent states, of which three and a few tokens fit."""

    state_tokens = 11


class RoomyStatesMachine(StatesMachine):
    """Nothing is dropped to make room, so that the state after a prompt is always found."""

    max_tokens = 1 << 30

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=9))
    def insert_prompt(self, tokens: list[int]) -> None:
        self.insert(tokens, continues=False, is_shared=True)
        self.prompts.append(tokens)

    @invariant()
    def knows_all_prompts(self) -> None:
        if not self.inserted:  # cleared
            self.prompts.clear()
        assert all(self.kept.num_matched(prompt) == len(prompt) for prompt in self.prompts)


def shared(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


TestKeptPrefixes = KeptPrefixesMachine.TestCase
TestKeptPrefixes.settings = settings(max_examples=40, stateful_step_count=25)
TestRoomy = RoomyMachine.TestCase
TestRoomy.settings = settings(max_examples=25, stateful_step_count=25)
TestStates = StatesMachine.TestCase
TestStates.settings = settings(max_examples=40, stateful_step_count=25)
TestRoomyStates = RoomyStatesMachine.TestCase
TestRoomyStates.settings = settings(max_examples=25, stateful_step_count=25)
