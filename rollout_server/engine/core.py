"""One engine step, and the exchange of weights between two of them. No threads, no sockets: also what the benchmark drives.

A step: admit waiting sequences to rows, compute or copy the KV of all but the last token of each new context, decode one token for
every row at once, draw, finish. New and old rows are decoded alike, because a new context's last token is just a
token whose successor is wanted. Bookkeeping is arrays over rows; Python objects are touched only when a sequence joins or leaves.

Weights change only in `swap`, between two steps, so a forward pass never sees two versions, and the version
written beside a token is the one whose logits it was drawn from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.trajectory import FinishReason
from rollout_server.engine.cache import KVCache, PrefixCache
from rollout_server.engine.models.base import CausalModel, Weights
from rollout_server.engine.sampling import Filters, noise_key, sample, uniforms
from rollout_server.engine.scheduler import Finish, Scheduler, Sequence

LOOK_AHEAD_TOKENS = 128
"""Prompt tokens that a prefill takes along from the queue."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes of the engine."""

    max_running: int
    """Rows."""
    context_length: int
    """Longest sequence, prompt and output, in tokens."""
    max_prefill_tokens: int = 8192
    """Context tokens computed before one decode step."""
    prefix_cache_tokens: int = 16384
    """Positions kept for prefixes that several sequences share; 0 keeps none."""
    random_seed: int = 0


class _Rows:
    """Per-row state of the running sequences, as arrays; row i of each belongs to the scheduler's row i."""

    def __init__(self, options: EngineOptions) -> None:
        rows, length = options.max_running, options.context_length
        self.num_tokens = np.zeros(rows, np.int64)
        """Prompt and output; the last of them has not been through the model yet."""
        self.num_output = np.zeros(rows, np.int64)
        self.limit = np.zeros(rows, np.int64)
        self.last_token = np.zeros(rows, np.int64)
        self.temperature = np.zeros(rows, np.float32)
        self.noise_key = np.zeros(rows, np.uint64)
        self.interval = np.zeros(rows, np.int64)
        self.top_p = np.ones(rows, np.float32)
        self.top_k = np.zeros(rows, np.int64)
        self.min_p = np.zeros(rows, np.float32)
        self.stops = np.full((rows, 1), -1, np.int64)
        self.output_ids = np.zeros((rows, length), np.int64)
        self.output_logprobs = np.zeros((rows, length), np.float32)
        self.version_start = np.zeros(rows, np.int64)
        """First output token that was sampled under the current version."""

    def join(self, sequence: Sequence) -> None:
        """Fills a row with a sequence, new or coming back."""
        row, params, done = sequence.row, sequence.params, len(sequence.output_ids)
        self.num_tokens[row] = len(sequence.prompt) + done
        self.num_output[row] = self.version_start[row] = done
        self.limit[row] = params.max_new_tokens
        self.last_token[row] = sequence.output_ids[-1] if done else sequence.prompt[-1]
        self.temperature[row] = params.temperature
        self.noise_key[row] = sequence.noise_key
        self.interval[row] = sequence.stream_interval
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.top_k[row] = params.top_k if params.top_k > 0 else 1 << 40
        if len(params.stop_token_ids) > self.stops.shape[1]:
            wider = np.full((len(self.stops), len(params.stop_token_ids)), -1, np.int64)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        self.stops[row] = -1
        self.stops[row, : len(params.stop_token_ids)] = params.stop_token_ids
        if done:
            self.output_ids[row, :done] = sequence.output_ids
            self.output_logprobs[row, :done] = sequence.output_logprobs

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies rows."""
        for array in vars(self).values():
            array[targets] = array[sources]

    def report(self, sequence: Sequence, *, version: str) -> None:
        """Brings the sequence's own output up to date with its row."""
        row = sequence.row
        count, start = int(self.num_output[row]), int(self.version_start[row])
        sequence.output_ids = self.output_ids[row, :count].tolist()
        sequence.output_logprobs = self.output_logprobs[row, :count].tolist()
        spans = [span for span in sequence.version_spans if span[2] <= start]
        if count > start:
            spans.append((version, start, count))
        sequence.version_spans = spans


class EngineCore:
    """Sequences in, tokens out, one step at a time. Not thread safe: one thread owns it."""

    def __init__(self, model: CausalModel, weights: Weights, options: EngineOptions, *, version: str) -> None:
        facts = model.facts
        self.model = model
        self.options = options
        self.version = version
        self.num_generated = 0
        self.num_prefilled = 0
        self.num_prefix_hits = 0
        self.num_steps = 0
        self.scheduler = Scheduler(
            num_rows=options.max_running, max_prefill_tokens=options.max_prefill_tokens
        )
        self._weights = weights
        self._spare: Weights | None = None
        self._rows = _Rows(options)
        self._cache = KVCache(
            facts.kv_shapes,
            num_rows=options.max_running,
            context_length=options.context_length,
            dtype=facts.dtype,
            device=facts.device,
        )
        self._prefixes = PrefixCache(max_tokens=options.prefix_cache_tokens)
        self._serial = itertools.count(1)
        self._sequence_index = itertools.count()

    # Requests

    def submit(self, sequence: Sequence, *, index: int = 0) -> None:
        """Puts a checked sequence in the queue. `index` tells apart the samples of one request that share a `sampling_seed`."""
        seed = sequence.params.sampling_seed
        if seed is None:
            seed, index = ~self.options.random_seed, next(self._sequence_index)
        sequence.noise_key = noise_key(seed, index)
        self.scheduler.submit(sequence)

    def abort(self, sequences: Iterable[Sequence], *, message: str = "Aborted") -> list[Sequence]:
        """Ends sequences with what they have; those that have ended already are skipped. Returns the ended ones."""
        finish = Finish(reason=FinishReason.ABORT, message=message)
        return [self._finish(sequence, finish) for sequence in sequences if sequence.finish is None]

    def retract(self) -> None:
        """Sends all running sequences back to the queue; their KV is computed anew when they return."""
        for sequence in self.scheduler.rows:
            if sequence is not None:
                self._rows.report(sequence, version=self.version)
        self.scheduler.retract_all()

    @property
    def all_sequences(self) -> list[Sequence]:
        """Everything waiting or running."""
        return list(self.scheduler.by_id.values())

    # Weights

    def take_spare(self) -> Weights:
        """A set of weights to fill while decoding goes on with the active one; it belongs to the caller until `swap` or `give_back`."""
        spare, self._spare = self._spare, None
        return spare if spare is not None else self.model.new_weights()

    def give_back(self, weights: Weights) -> None:
        """Returns an unused set."""
        self._spare = weights

    def swap(self, weights: Weights, *, version: str, recompute: bool) -> None:
        """Activates a complete, verified set. Running sequences go on: with KV computed anew, or with the KV they have."""
        if recompute:
            self.retract()
        else:
            for sequence in self.scheduler.rows:
                if sequence is not None:
                    self._rows.report(sequence, version=self.version)
                    self._rows.version_start[sequence.row] = self._rows.num_output[sequence.row]
        self.model.activate(weights)
        self._spare, self._weights = self._weights, weights
        self.version = version
        self._prefixes.clear(serial=next(self._serial))

    def flush(self) -> None:
        """Forgets cached prefixes."""
        self._prefixes.clear()

    # Stepping

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One token for every running sequence. Returns the sequences to report: those that ended, and those whose interval came."""
        scheduler = self.scheduler
        if not scheduler.runnable:
            return []
        admitted, moves = scheduler.admit(is_cached=self._prefixes.__contains__)
        if moves:
            sources, targets = [m.source for m in moves], [m.target for m in moves]
            self._cache.move(sources, targets, num_positions=int(self._rows.num_tokens[sources].max()))
            self._rows.move(sources, targets)
        if admitted:
            self._bring_in(admitted)
        count = scheduler.num_running
        tokens_N, logprobs_N = self._decode(count)
        return self._record(count, tokens_N, logprobs_N)

    def _bring_in(self, admitted: list[Sequence]) -> None:
        """Fills the rows of new sequences with the KV of all but the last token of their contexts."""
        missing: dict[tuple[int, ...], list[int]] = {}
        for sequence in admitted:
            self._rows.join(sequence)
            context = sequence.context
            prefix = self._prefixes.get(context)
            if prefix is not None:
                self._cache.write([sequence.row], prefix)
                self.num_prefix_hits += 1
            elif context in missing:
                missing[context].append(sequence.row)
                self.num_prefix_hits += 1
            elif len(context) > 1:
                missing[context] = [sequence.row]
        if not missing:
            return
        prompts = {sequence.prompt for sequence in admitted if not sequence.output_ids}
        self._look_ahead(missing, prompts)
        # Contexts of like length together, so that little is computed for padding.
        queue = sorted(missing.items(), key=lambda item: len(item[0]))
        while queue:
            size = max(1, self.options.max_prefill_tokens // len(queue[-1][0]))
            queue, batch = queue[:-size], queue[-size:]
            self._prefill(batch, prompts)

    def _look_ahead(self, missing: dict[tuple[int, ...], list[int]], prompts: set[tuple[int, ...]]) -> None:
        """Adds prompts from the queue to a prefill that has to be done anyway: at small sizes a pass costs the same for one
        prompt as for sixteen, and rows fall free one by one."""
        room = min(LOOK_AHEAD_TOKENS, self.options.prefix_cache_tokens // 2) - sum(map(len, missing))
        for sequence in self.scheduler.upcoming(LOOK_AHEAD_TOKENS):
            prompt = sequence.prompt
            if sequence.output_ids or prompt in missing or prompt in self._prefixes or len(prompt) == 1:
                continue
            room -= len(prompt)
            if room < 0:
                break
            missing[prompt] = []
            prompts.add(prompt)

    def _prefill(self, batch: list[tuple[tuple[int, ...], list[int]]], prompts: set[tuple[int, ...]]) -> None:
        tokens_BT = np.zeros((len(batch), max(len(context) for context, _ in batch) - 1), np.int64)
        rows, sources = [], []
        for i, (context, context_rows) in enumerate(batch):
            tokens_BT[i, : len(context) - 1] = context[:-1]
            self.num_prefilled += len(context) - 1
            rows += context_rows
            sources += [i] * len(context_rows)
        self._cache.begin_prefill(num_contexts=tokens_BT.shape[0], num_positions=tokens_BT.shape[1])
        self.model.prefill(self._tensor(tokens_BT), self._cache)
        computed = self._cache.end_prefill(rows=rows, sources=sources)
        for i, (context, _) in enumerate(batch):
            if context in prompts:  # a prompt may come again; a prompt with its output will not
                self._prefixes.put(context, computed[:, :, i, :, : len(context) - 1].clone())

    def _decode(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows = self._rows
        batch = self._cache.begin_decode(rows.num_tokens[:count] - 1)
        logits_NV = self.model.decode(self._tensor(rows.last_token[:count]), batch, self._cache)
        temperature_N = rows.temperature[:count]
        num_greedy = count - int(np.count_nonzero(temperature_N))
        token_N, logprob_N = sample(
            logits_NV,
            temperature_N=self._tensor(temperature_N),
            uniform_N=self._tensor(uniforms(rows.noise_key[:count], rows.num_output[:count])),
            any_greedy=num_greedy > 0,
            any_random=num_greedy < count,
            filters=self._filters(count),
        )
        return token_N.cpu().numpy(), logprob_N.cpu().numpy()

    def _filters(self, count: int) -> Filters | None:
        rows = self._rows
        top_p, top_k, min_p = rows.top_p[:count], rows.top_k[:count], rows.min_p[:count]
        if top_p.min() >= 1 and top_k.min() >= self.model.facts.vocab_size and min_p.max() <= 0:
            return None
        return Filters(
            top_p_N1=self._tensor(top_p[:, None]),
            top_k_N1=self._tensor(top_k[:, None]),
            min_p_N1=self._tensor(min_p[:, None]),
        )

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.model.facts.device)

    def _record(
        self, count: int, tokens_N: NDArray[np.int64], logprobs_N: NDArray[np.float32]
    ) -> list[Sequence]:
        """Writes the drawn tokens to their rows and finishes who is done."""
        rows, all_rows = self._rows, np.arange(count)
        position_N = rows.num_output[:count]
        rows.output_ids[all_rows, position_N] = tokens_N
        rows.output_logprobs[all_rows, position_N] = logprobs_N
        rows.last_token[:count] = tokens_N
        rows.num_output[:count] += 1
        rows.num_tokens[:count] += 1
        self.num_steps += 1
        self.num_generated += count
        stopped_N = (rows.stops[:count] == tokens_N[:, None]).any(1)
        broken_N = ~np.isfinite(logprobs_N)
        done_N = stopped_N | broken_N | (rows.num_output[:count] >= rows.limit[:count])
        interval_N = rows.interval[:count]
        due_N = (interval_N > 0) & (rows.num_output[:count] % np.maximum(interval_N, 1) == 0) & ~done_N
        reported = []
        for row in np.nonzero(due_N)[0].tolist():
            sequence = self._at(row)
            rows.report(sequence, version=self.version)
            reported.append(sequence)
        for row in np.nonzero(done_N)[0].tolist():
            if broken_N[row]:
                rows.num_output[row] -= 1
                self._cache.clear_row(row)
                self._prefixes.clear()
                finish = Finish(
                    reason=FinishReason.ABORT, message="the model's logits are not finite", is_error=True
                )
            elif stopped_N[row]:
                finish = Finish(reason=FinishReason.STOP, matched=int(tokens_N[row]))
            else:
                finish = Finish(reason=FinishReason.LENGTH)
            reported.append(self._finish(self._at(row), finish))
        return reported

    def _at(self, row: int) -> Sequence:
        sequence = self.scheduler.rows[row]
        assert sequence is not None
        return sequence

    def _finish(self, sequence: Sequence, finish: Finish) -> Sequence:
        if sequence.row >= 0:
            self._rows.report(sequence, version=self.version)
        self.scheduler.finish(sequence, finish)
        sequence.version_spans = _merged(sequence.version_spans)
        return sequence


def _merged(spans: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Neighbours of one version as one span: a sequence that was retracted and came back has two."""
    merged: list[tuple[str, int, int]] = []
    for version, start, end in spans:
        if merged and merged[-1][0] == version:
            start = merged.pop()[1]
        merged.append((version, start, end))
    return merged
