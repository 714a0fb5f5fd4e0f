"""Fills rows with the KV of new sequences' contexts: copied where it is known, computed where it is not.

    the prompt of a group          copied from the samples that computed it (PrefixCache)
    the samples of a group, after  their long prompt is computed once under the new weights, and what each of
    an update of the weights       them has sampled is computed over it: an extension
    the next turn of a conversation  its earlier turns are copied (KeptPrefixes), and the rest is computed
                                   over them: an extension
    anything else                  computed from its beginning: a prefill

The last pass of a step is left to the caller where the model joins it with the decode step (`fill`).

Only sequences that a later request may continue (`Sequence.keeps_prefix`) are kept when they end; for all
others a copy would be wasted. All KV that is kept was computed under the newest weights: a swap drops it, and
a row whose KV is older than the last swap is not kept. A sequence that goes on under an older adapter neither
reads nor fills the caches.

For models with linear attention, what is copied, computed and kept is the recurrent state too (states.py): a
prompt of a group is kept with the state after it, and a conversation is continued from the end of a turn.
Limits in tokens count a state as the tokens whose KV takes as much memory.

Shapes: B contexts, T positions.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout_server.engine.cache import KVCache, Prefix, PrefixCache
from rollout_server.engine.kept_prefixes import KeptPrefixes
from rollout_server.engine.models.base import CausalModel, NewTokens
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.routes import RowRoutes
from rollout_server.engine.rows import RowState
from rollout_server.engine.scheduler import Sequence, ServedVersion

logger = logging.getLogger(__name__)

PREFILL_AHEAD_TOKENS = 128
"""A prefill with fewer tokens than this is filled up with prompts of sequences that still wait for a row."""
LEAST_SHARED_TOKENS = 32
"""Shortest prompt that sequences with output share when their KV is computed again. With a shorter one, one
pass over all tokens is as fast as a pass over prompts and one over outputs."""
MAX_SCORES = 1 << 22
"""Maximum number of pairs of a new and a known position in one extension; bounds the attention mask."""

_Context = tuple[int, ...]


class Contexts:
    """The KV of contexts; belongs to one EngineCore."""

    def __init__(
        self,
        model: CausalModel,
        cache: KVCache,
        rows: RowState,
        options: EngineOptions,
        routes: RowRoutes | None = None,
    ) -> None:
        """`routes`: the routes of the rows; None: they are not recorded."""
        self._model = model
        self._routes = routes
        self._cache = cache
        self._rows = rows
        self._max_prefill_tokens = min(
            options.max_prefill_tokens, model.max_pass_tokens or options.max_prefill_tokens
        )
        """Also the maximum number of new tokens in one forward pass."""
        self._state_tokens = cache.state_tokens
        # Kept routes take the place of KV.
        kv_share = 1.0 if routes is None else cache.num_bytes / (cache.num_bytes + routes.num_bytes)
        self._prefixes = PrefixCache(
            max_tokens=int(kv_share * options.prefix_cache_tokens), state_tokens=self._state_tokens
        )
        self.kept = KeptPrefixes(
            max_tokens=int(kv_share * options.kept_tokens(self._state_tokens)),
            state_tokens=self._state_tokens,
        )
        self._warn_of_small_caches()
        self._filling: Iterator[tuple[NewTokens, bool]] = iter(())
        """The passes of which `fill` returned the last one."""
        self.num_prefilled = 0
        """Context tokens computed."""
        self.num_copied = 0
        """Context tokens whose KV was copied instead of computed."""
        self.num_shared = 0
        """Sequences whose context was copied from another sequence instead of computed."""
        self.num_continued = 0
        """Sequences that started with KV kept from an earlier turn of their conversation."""

    def _warn_of_small_caches(self) -> None:
        limits = {
            "prefix_cache_tokens": self._prefixes.max_tokens,
            "conversation_cache_tokens": self.kept.max_tokens,
        }
        for name, max_tokens in limits.items():
            if 0 < max_tokens <= self._state_tokens:
                logger.warning(
                    "%s=%d keeps nothing: a recurrent state of this model takes as much memory as %d tokens",
                    name, max_tokens, self._state_tokens,
                )  # fmt: skip

    def clear(self, *, serial: int | None = None) -> None:
        """Drops all KV outside the rows; `serial`: of the weights that new sequences get from now on."""
        self._prefixes.clear(serial=serial)
        self.kept.clear()

    def num_to_compute(self, sequence: Sequence) -> int:
        """Returns the tokens that count towards a step's limit when this waiting sequence is admitted."""
        context = sequence.context
        if not self._is_newest(sequence.served):
            return len(context)
        if not sequence.keeps_prefix:
            if sequence.output_ids and _is_long(sequence) and sequence.prompt in self._prefixes:
                return len(sequence.output_ids)
            return 0 if context in self._prefixes else len(context)
        num_known = self.kept.num_matched(context[:-1])
        return 0 if num_known == len(context) - 1 else len(context) - num_known

    @torch.inference_mode()
    def keep(self, sequence: Sequence) -> None:
        """Keeps the KV of a sequence that has ended, before it leaves its row."""
        if self._rows.kv_serial[sequence.row] == self._prefixes.serial:
            self._keep_row(sequence.row, sequence.context, is_shared=False)

    def _keep_row(self, row: int, context: _Context, *, is_shared: bool) -> None:
        """Keeps what a row holds, which is all but the last token of `context`."""
        self.kept.insert(
            context[:-1],
            partial(self._read, row),
            snapshot=partial(self._cache.snapshot_state, row),
            is_shared=is_shared,
        )

    def fill(
        self, admitted: list[Sequence], *, num_rows: int, waiting: Iterable[Sequence]
    ) -> NewTokens | None:
        """Fills the rows of new sequences with the KV of all but the last token of their contexts.

        `num_rows`: rows in use. `waiting`: sequences whose prompts may be computed ahead, for the cache.
        Returns the tokens of the last pass if the caller is to compute them in one pass with a decode step of
        all rows in use, and then to call `filled`.
        """
        groups: dict[ServedVersion, list[Sequence]] = {}  # nearly always one
        for sequence in admitted:
            assert sequence.served is not None, f"{sequence.seq_id} is admitted without weights"
            groups.setdefault(sequence.served, []).append(sequence)
            self._rows.enter(sequence)
        for i, (served, group) in enumerate(groups.items()):
            if self._model.adapters is not None:
                self._model.adapters.select_one(served.slot)
            # Slots are selected for all rows of a pass, and its last layer has fewer rows than the others.
            one_slot = bool((self._rows.slot[:num_rows] == served.slot).all())
            can_join = self._model.joins_passes and one_slot and i + 1 == len(groups)
            passes = self._passes(group, served, waiting=waiting if self._is_newest(served) else ())
            for new, is_last in passes:
                if is_last and can_join:
                    self._filling = passes
                    return new
                self._model.compute(new, self._cache)
        return None

    def filled(self) -> None:
        """Keeps what the pass that `fill` returned has computed."""
        for _ in self._filling:
            raise AssertionError("it was not the last pass")

    def _is_newest(self, served: ServedVersion | None) -> bool:
        return served is None or served.serial == self._prefixes.serial

    def _passes(
        self, admitted: list[Sequence], served: ServedVersion, *, waiting: Iterable[Sequence]
    ) -> Iterator[tuple[NewTokens, bool]]:
        """The passes that fill the rows of sequences that are sampled with the same weights, each with True
        if nothing but keeping KV follows it. The caller computes each pass before it takes the next one."""
        uses_caches = self._is_newest(served)
        # Context -> rows that need it: each context is computed once for all its rows. A prompt computed
        # ahead has no row yet.
        missing: dict[_Context, list[int]] = {}
        known: dict[_Context, int] = {}
        """Context -> tokens at its beginning that were copied to the first of its rows."""
        kept: set[_Context] = set()
        shared = self._shared_prompts(admitted) if uses_caches else set()
        begun: dict[_Context, list[int]] = {}
        """Shared prompt that has to be computed -> rows of sequences that have it and output."""
        for sequence in admitted:
            context = sequence.context
            if uses_caches and sequence.keeps_prefix and not sequence.output_ids:
                kept.add(context)
            if context in missing:
                missing[context].append(sequence.row)
                self._count_shared(sequence)
            elif sequence.output_ids and sequence.prompt in shared and not sequence.keeps_prefix:
                missing[context] = [sequence.row]
                known[context] = len(sequence.prompt) - 1
                if (prefix := self._prefixes.get(sequence.prompt)) is not None:
                    self._write(sequence.row, prefix)
                    self._cache.restore_state(sequence.row, prefix.state_R)
                else:
                    begun.setdefault(sequence.prompt, []).append(sequence.row)
                if prefix is not None or len(begun[sequence.prompt]) > 1:
                    self._count_copied(sequence, known[context])
            elif uses_caches and sequence.keeps_prefix:
                known[context] = self._copy_kept(sequence)
                if known[context] < len(context) - 1:
                    missing[context] = [sequence.row]
            elif uses_caches and (prefix := self._prefixes.get(context)) is not None:
                self._write(sequence.row, prefix)
                self._cache.restore_state(sequence.row, prefix.state_R)
                self._count_shared(sequence)
            elif len(context) > 1:
                missing[context] = [sequence.row]
            if len(context) == 1:
                self._cache.begin_row(sequence.row)
        if not missing:
            return
        prompts = {sequence.prompt for sequence in admitted if not sequence.output_ids} - kept
        if not uses_caches:
            prompts.clear()
        extensions = {context: rows for context, rows in missing.items() if known.get(context)}
        whole = {context: rows for context, rows in missing.items() if context not in extensions}
        for prompt, rows in begun.items():
            whole[prompt] = whole.get(prompt, []) + rows
        prompts |= begun.keys()
        if whole:
            self._add_waiting_prompts(whole, prompts, waiting)
            for new, is_last in self._prefills(whole, prompts):
                yield new, is_last and not extensions
        if extensions:
            is_copied = any(len(rows) > 1 for rows in extensions.values())
            left = [(context, rows[0], known[context]) for context, rows in extensions.items()]
            for new, is_last in self._extensions(left):
                yield new, is_last and not is_copied
            for context, (first, *others) in extensions.items():
                if others:
                    self._move([first] * len(others), others, num_positions=len(context) - 1)
        for context in kept & missing.keys():
            if 2 * known.get(context, 0) > len(context):
                continue  # a later turn, which no other sequence needs before it ends
            self._keep_row(missing[context][0], context, is_shared=True)

    def _shared_prompts(self, admitted: Iterable[Sequence]) -> set[_Context]:
        """Long prompts that several of these sequences have, or that are in the cache."""
        counts = Counter(sequence.prompt for sequence in admitted if _is_long(sequence))
        return {prompt for prompt, count in counts.items() if count > 1 or prompt in self._prefixes}

    def _count_shared(self, sequence: Sequence) -> None:
        self.num_shared += 1
        self._count_copied(sequence, len(sequence.context) - 1)

    def _count_copied(self, sequence: Sequence, num_tokens: int) -> None:
        self.num_copied += num_tokens
        if not sequence.output_ids:  # otherwise its row was refilled after an update of the weights
            sequence.num_cached_tokens = num_tokens

    def _copy_kept(self, sequence: Sequence) -> int:
        """Copies the kept part of the sequence's context to its row; returns the number of tokens."""
        start = 0
        parts, state_R = self.kept.match(sequence.context[:-1])
        for part in parts:
            self._write(sequence.row, part, start=start)
            start += part.kv_L2HTD.shape[3]
        if start:
            self._cache.restore_state(sequence.row, state_R)
            self.num_continued += 1
            self._count_copied(sequence, start)
        return start

    def _add_waiting_prompts(
        self, missing: dict[_Context, list[int]], prompts: set[_Context], waiting: Iterable[Sequence]
    ) -> None:
        """Fills up a small prefill with prompts from the queue, whose KV goes to the prefix cache only.

        Rows become free one by one, and a small prefill costs the same for sixteen prompts as for one.
        """
        room = PREFILL_AHEAD_TOKENS - sum(map(len, missing))
        cache_room = self._prefixes.max_tokens // 2 - sum(map(self._prefixes.size_of, missing))
        for sequence in waiting:
            prompt = sequence.prompt
            if sequence.output_ids or prompt in missing or prompt in self._prefixes or len(prompt) == 1:
                continue
            if sequence.keeps_prefix:
                continue
            room -= len(prompt)
            cache_room -= self._prefixes.size_of(prompt)
            if min(room, cache_room) < 0:
                break
            missing[prompt] = []
            prompts.add(prompt)

    def _prefills(
        self, missing: dict[_Context, list[int]], prompts: set[_Context]
    ) -> Iterator[tuple[NewTokens, bool]]:
        """The passes that compute contexts from their beginning, each with True if it is the last."""
        # Contexts of similar length share a batch, so that little computation is spent on padding.
        queue = sorted(missing.items(), key=lambda item: len(item[0]))
        while queue:
            size = max(1, self._max_prefill_tokens // (len(queue[-1][0]) + self._state_tokens))
            queue, batch = queue[:-size], queue[-size:]
            yield self._begin_prefill(batch), not queue
            self._end_prefill(batch, prompts)

    def _begin_prefill(self, batch: list[tuple[_Context, list[int]]]) -> NewTokens:
        tokens_BT = np.zeros((len(batch), max(len(context) for context, _ in batch) - 1), np.int64)
        for i, (context, _) in enumerate(batch):
            tokens_BT[i, : len(context) - 1] = context[:-1]
            self.num_prefilled += len(context) - 1
        self._cache.begin_prefill(
            np.array([len(context) - 1 for context, _ in batch], np.int64), rows=[rows for _, rows in batch]
        )
        return NewTokens(tokens_BT=self._tensor(tokens_BT))

    def _end_prefill(self, batch: list[tuple[_Context, list[int]]], prompts: set[_Context]) -> None:
        self._cache.end_prefill()
        routes_BTLK = None if self._routes is None else self._routes.prefilled(len(batch))
        if self._routes is not None and routes_BTLK is not None:
            for (_, rows), routes_TLK in zip(batch, routes_BTLK, strict=True):
                for row in rows:
                    self._routes.write(row, routes_TLK)
        for i, (context, _) in enumerate(batch):
            # Only prompts are cached: the other samples of a group share the prompt, but no other sequence
            # has the same prompt and output.
            if context in prompts:
                prefix = self._cache.computed_prefix(i)
                if routes_BTLK is not None:
                    prefix = replace(prefix, routes_TLK=routes_BTLK[i, : len(context) - 1].copy())
                self._prefixes.put(context, prefix)

    def _extensions(self, left: list[tuple[_Context, int, int]]) -> Iterator[tuple[NewTokens, bool]]:
        """The passes that compute contexts from a given position on, given what their rows hold before it,
        each with True if it is the last.

        `left`: (context, row, position). A long one takes several passes, so that masks stay small.
        """
        while left:
            left.sort(key=lambda item: len(item[0]) - item[2])
            num_positions = max(len(context) for context, _, _ in left) - 1
            context, _, start = left[-1]
            length = min(len(context) - 1 - start, max(1, MAX_SCORES // num_positions))
            size = max(1, min(self._max_prefill_tokens, MAX_SCORES // num_positions) // length)
            left, batch = left[:-size], left[-size:]
            tokens_BT = np.zeros((len(batch), length), np.int64)
            starts_B = np.array([start for _, _, start in batch], np.int64)
            lengths_B = np.zeros(len(batch), np.int64)
            for i, (context, row, start) in enumerate(batch):
                new = context[start:-1][:length]
                tokens_BT[i, : len(new)] = new
                lengths_B[i] = len(new)
                if start + len(new) < len(context) - 1:
                    left.append((context, row, start + len(new)))
            self.num_prefilled += int(lengths_B.sum())
            rows = [row for _, row, _ in batch]
            extension = self._cache.begin_extension(rows=rows, starts_B=starts_B, lengths_B=lengths_B)
            yield NewTokens(tokens_BT=self._tensor(tokens_BT), extension=extension), not left
            if self._routes is not None:
                self._routes.extended(rows, starts_B, lengths_B)

    def _read(self, row: int, start: int, end: int) -> Prefix:
        """Returns a view of a row's positions."""
        return Prefix(
            kv_L2HTD=self._cache.read(row, start, end),
            routes_TLK=None if self._routes is None else self._routes.read(row, start, end),
        )

    def _write(self, row: int, prefix: Prefix, *, start: int = 0) -> None:
        """Copies a prefix into a row."""
        self._cache.write(row, prefix.kv_L2HTD, start=start)
        if self._routes is not None and prefix.routes_TLK is not None:
            self._routes.write(row, prefix.routes_TLK, start=start)

    def _move(self, sources: list[int], targets: list[int], *, num_positions: int) -> None:
        self._cache.move(sources, targets, num_positions=num_positions)
        if self._routes is not None:
            self._routes.move(sources, targets, num_positions=num_positions)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._model.facts.device)


def _is_long(sequence: Sequence) -> bool:
    return len(sequence.prompt) >= LEAST_SHARED_TOKENS
