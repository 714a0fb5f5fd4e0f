"""The engine's step (admit, prefill, decode, sample, finish) and the swap of weights between two steps.

No threads and no sockets: the benchmark drives the same code. A step admits waiting sequences to rows,
computes or copies the KV of all but the last token of each new context, and then decodes one token for every
row at once. New rows are decoded together with old ones, because the last token of a new context is treated
like the last sampled token of an old row. Where the model can (`joins_passes`), the last prefill and the
decode step are one forward pass, which reads the weights once.

Weights change only between two steps, and the version recorded for a token is that of the weights whose
logits it was drawn from. `swap_weights` replaces all weights, so a forward pass never mixes two versions of
them. `activate_adapter` adds a version of the LoRA adapter, and running sequences may finish under the one
they have: a pass then applies to each row its own (models/adapters.py).

Shapes: N rows, V vocabulary, B contexts, T positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.trajectory import FinishReason
from areal_like.weights.adapters import AdapterHeader
from rollout_server.engine.contexts import PREFILL_AHEAD_TOKENS, Contexts
from rollout_server.engine.models.adapters import NO_SLOT
from rollout_server.engine.models.base import CausalModel, NewTokens, Weights
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.routes import RowRoutes
from rollout_server.engine.rows import RowState
from rollout_server.engine.sampling import Filters, rng_key, sample, uniforms
from rollout_server.engine.scheduler import Finish, Scheduler, Sequence, ServedVersion

Running = Literal["recompute", "keep", "finish"]
"""What happens to sequences that have begun when the weights change: they go on under the new weights with
their KV recomputed or kept, or finish under the old ones (adapters only)."""


class EngineCore:
    """Samples one token per step for every running sequence. Not thread-safe: one thread owns it."""

    def __init__(self, model: CausalModel, weights: Weights, options: EngineOptions, *, version: str) -> None:
        """`weights`: the model's active set, of version `version`."""
        facts = model.facts
        self.model = model
        self.options = options
        self.num_generated = 0
        """Tokens sampled."""
        self.num_steps = 0
        self.begun: list[Sequence] = []
        """Sequences that got their first token in the last step."""
        self.scheduler = Scheduler(
            num_rows=options.max_running_requests, max_prefill_tokens=options.max_prefill_tokens
        )
        self._active_weights = weights
        self._shadow_weights = weights if model.copies_weights else None
        self._rows = RowState(num_rows=options.max_running_requests, context_length=options.context_length)
        self._cache = facts.new_cache(
            num_rows=options.max_running_requests, context_length=options.context_length
        )
        self.routes: RowRoutes | None = None
        """Routes of the tokens in the rows; None: they are not recorded."""
        if model.routes is not None:
            self.routes = RowRoutes(
                model.routes,
                num_rows=options.max_running_requests,
                context_length=options.context_length,
            )
        self.contexts = Contexts(model, self._cache, self._rows, options, self.routes)
        self._serials = itertools.count()
        self._newest = ServedVersion(version=version, serial=next(self._serials), slot=NO_SLOT)
        """What sequences get when they begin."""
        self._sequence_index = itertools.count()

    @property
    def version(self) -> str:
        """Version of the newest weights."""
        return self._newest.version

    @property
    def kv_bytes(self) -> int:
        """Memory of the rows' keys and values."""
        return self._cache.num_bytes

    @property
    def state_bytes(self) -> int:
        """Memory of the rows' recurrent states."""
        return self._cache.state_bytes

    # Requests

    def submit(self, sequence: Sequence) -> None:
        """Puts a checked sequence in the queue."""
        seed, index = sequence.params.sampling_seed, sequence.sample_index
        if seed is None:
            # ~: a request whose sampling_seed equals the engine's seed must not draw the same numbers.
            seed, index = ~self.options.random_seed, next(self._sequence_index)
        sequence.rng_key = rng_key(seed, index)
        self.scheduler.submit(sequence)

    def abort(self, sequences: Iterable[Sequence], *, message: str = "Aborted") -> list[Sequence]:
        """Ends sequences with the tokens they have, and returns them; skips sequences already ended."""
        finish = Finish(reason=FinishReason.ABORT, message=message)
        return [self._finish(sequence, finish) for sequence in sequences if sequence.finish is None]

    def preempt_all(self) -> None:
        """Sends all running sequences back to the queue (SGLang's "retract").

        Their tokens are kept; their KV is recomputed when they are admitted again.
        """
        self._copy_running_outputs()
        for sequence in filter(None, self.scheduler.rows):
            self._copy_routes(sequence)
        self.scheduler.preempt_all()

    @property
    def all_sequences(self) -> list[Sequence]:
        """Every waiting or running sequence."""
        return list(self.scheduler.by_id.values())

    # Weights

    def take_shadow_weights(self) -> Weights:
        """Returns a set of weights to fill while decoding continues with the active set.

        The caller owns the set until it passes it to `swap_weights` or `return_shadow_weights`.
        """
        shadow, self._shadow_weights = self._shadow_weights, None
        return shadow if shadow is not None else self.model.new_weights()

    @property
    def active_weights(self) -> Weights:
        """The set that forward passes read, or that the model has copied."""
        return self._active_weights

    def return_shadow_weights(self, weights: Weights) -> None:
        """Returns a set that will not be activated. Nothing may write into it any more."""
        self._shadow_weights = weights

    def swap_weights(self, weights: Weights, *, version: str, recompute: bool) -> None:
        """Activates a complete, verified set. The old set becomes the shadow set, or the new one if the model
        has copied it.

        Running sequences continue, with KV recomputed under the new weights if `recompute`, otherwise with
        their existing KV. The new weights have no adapter.
        """
        self._serve(version, slot=NO_SLOT, running="recompute" if recompute else "keep")
        self.model.activate(weights)
        self._shadow_weights = weights if self.model.copies_weights else self._active_weights
        self._active_weights = weights

    def activate_adapter(
        self, tensors: Mapping[str, Tensor], *, version: str, running: Running
    ) -> list[Sequence]:
        """Makes a verified adapter the one that new sequences get.

        `tensors`: of `new_adapter`. `running`: what happens to sequences that have begun. If they finish,
        each version in use keeps its slot; if all slots are in use, the sequences of the oldest version are
        aborted and returned.
        """
        slots = self.model.adapters
        assert slots is not None, "new_adapter allocates the slots"
        aborted: list[Sequence] = []
        in_use = dict[int, int]()  # slot -> serial; unless they finish, all sequences leave their slots now
        if running == "finish":
            begun = [
                s.served for s in self.all_sequences if s.served is not None and s.served.slot != NO_SLOT
            ]
            in_use = {served.slot: served.serial for served in begun}
            if len(in_use) == slots.num_slots:
                oldest = min(in_use, key=lambda slot: in_use[slot])
                del in_use[oldest]
                aborted = self.abort(
                    [s for s in self.all_sequences if s.served is not None and s.served.slot == oldest],
                    message=f"its adapter makes room for another: all {slots.num_slots} slots are in use",
                )
        slot = min(set(range(slots.num_slots)) - in_use.keys())
        slots.fill(slot, tensors)
        self._serve(version, slot=slot, running=running)
        return aborted

    def new_adapter(self, header: AdapterHeader) -> dict[str, Tensor]:
        """Returns uninitialized tensors by name, to receive an adapter with this header into. The first call
        allocates the slots. Raises WeightSyncError if this engine or model cannot have such an adapter."""
        if not self.options.max_adapters:
            raise WeightSyncError(
                "this engine takes no adapters: give trainer and rollout servers the same weights.lora"
            )
        if self.model.adapters is None:
            self.model.adapters = self.model.make_slots(header, num_slots=self.options.max_adapters)
        self.model.adapters.check(header)
        return self.model.adapters.new_tensors()

    def _serve(self, version: str, *, slot: int, running: Running) -> None:
        """Gives new sequences other weights, and those that have begun too unless they finish as they are."""
        served = ServedVersion(version=version, serial=next(self._serials), slot=slot)
        if running == "recompute":
            self.preempt_all()
        elif running == "keep":
            self._copy_running_outputs()
            self._rows.version_start[:] = self._rows.num_output
            self._rows.slot[:] = slot
        if running != "finish":
            for sequence in self.scheduler.by_id.values():
                sequence.served = served if sequence.served is not None else None
        self._newest = served
        self.contexts.clear(serial=served.serial)

    def _copy_running_outputs(self) -> None:
        for sequence in self.scheduler.rows:
            if sequence is not None:
                self._rows.copy_output_to(sequence)

    def flush_prefix_cache(self) -> None:
        """Drops all KV that no running sequence holds."""
        self.contexts.clear()

    # Stepping

    @torch.inference_mode()
    def score(self, tokens: list[int], *, first: int) -> NDArray[np.float32]:
        """Returns the log-probs of the tokens from index `first` (at least 1) on under the newest weights at
        temperature 1: float32[len(tokens) - first].

        Uses a KV row of its own. The tokens before `first` are one prefill; each later token is one decode
        step, as when it was sampled.
        """
        facts = self.model.facts
        cache = facts.new_cache(num_rows=1, context_length=len(tokens))
        if self.model.adapters is not None:
            self.model.adapters.select_one(self._newest.slot)
        tokens_1T = torch.tensor([tokens], device=facts.device)
        if first > 1:
            cache.begin_prefill(np.array([first - 1], np.int64), rows=[[0]])
            self.model.compute(NewTokens(tokens_BT=tokens_1T[:, : first - 1]), cache)
            cache.end_prefill()
        logprobs = []
        for position in range(first - 1, len(tokens) - 1):
            batch = cache.begin_decode(np.array([position]))
            logits_1V = self.model.decode(tokens_1T[0, position : position + 1], batch, cache)
            logprobs.append(torch.log_softmax(logits_1V[0].float(), -1)[tokens_1T[0, position + 1]])
        scores: NDArray[np.float32] = torch.stack(logprobs).cpu().numpy()
        return scores

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Samples one token for every running sequence.

        Returns the sequences that have output to report: sequences that ended, and sequences whose output
        length is a multiple of their `stream_interval`.
        """
        scheduler = self.scheduler
        if not scheduler.runnable:
            return []
        admitted, moves = scheduler.admit(num_to_compute=self.contexts.num_to_compute)
        if moves:
            sources, targets = [m.source for m in moves], [m.target for m in moves]
            num_positions = int(self._rows.num_tokens[sources].max())
            self._cache.move(sources, targets, num_positions=num_positions)
            if self.routes is not None:
                self.routes.move(sources, targets, num_positions=num_positions)
            self._rows.move(sources, targets)
        num_rows = scheduler.num_running
        new = None
        if admitted:
            for sequence in admitted:
                sequence.served = sequence.served or self._newest
            ahead = scheduler.upcoming(PREFILL_AHEAD_TOKENS)
            new = self.contexts.fill(admitted, num_rows=num_rows, waiting=ahead)
        self.begun = [sequence for sequence in admitted if not sequence.output_ids]
        tokens_N, logprobs_N = self._decode(num_rows, new)
        return self._append_tokens(num_rows, tokens_N, logprobs_N)

    def _decode(self, num_rows: int, new: NewTokens | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Samples a token for each of rows 0..num_rows-1; returns (tokens int64[N], log-probs float32[N]).

        `new`: the tokens of the step's last prefill or extension, which the same pass computes.
        """
        rows = self._rows
        batch = self._cache.begin_decode(rows.num_tokens[:num_rows] - 1)
        if self.model.adapters is not None:
            self.model.adapters.select(rows.slot[:num_rows])
        logits_NV = self.model.decode(self._tensor(rows.last_token[:num_rows]), batch, self._cache, new)
        if new is not None:
            self.contexts.filled()
        if self.routes is not None:
            self.routes.decoded(rows.num_tokens[:num_rows] - 1)
        temperature_N = rows.temperature[:num_rows]
        num_greedy = num_rows - int(np.count_nonzero(temperature_N))
        token_N, logprob_N = sample(
            logits_NV,
            temperature_N=self._tensor(temperature_N),
            uniform_N=self._tensor(uniforms(rows.rng_key[:num_rows], rows.num_output[:num_rows])),
            any_greedy=num_greedy > 0,
            any_random=num_greedy < num_rows,
            filters=self._filters(num_rows),
        )
        return token_N.cpu().numpy(), logprob_N.cpu().numpy()

    def _filters(self, num_rows: int) -> Filters | None:
        """Returns the rows' filters; None if no row has one, which avoids sorting the vocabulary."""
        rows = self._rows
        top_p, top_k, min_p = rows.top_p[:num_rows], rows.top_k[:num_rows], rows.min_p[:num_rows]
        if top_p.min() >= 1 and top_k.min() >= self.model.facts.vocab_size and min_p.max() <= 0:
            return None
        return Filters(
            top_p_N1=self._tensor(top_p[:, None]),
            top_k_N1=self._tensor(top_k[:, None]),
            min_p_N1=self._tensor(min_p[:, None]),
        )

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.model.facts.device)

    def _append_tokens(
        self, num_rows: int, tokens_N: NDArray[np.int64], logprobs_N: NDArray[np.float32]
    ) -> list[Sequence]:
        """Writes the sampled tokens to their rows, ends finished sequences, returns sequences to report."""
        rows, all_rows = self._rows, np.arange(num_rows)
        position_N = rows.num_output[:num_rows]
        rows.output_ids[all_rows, position_N] = tokens_N
        rows.output_logprobs[all_rows, position_N] = logprobs_N
        rows.last_token[:num_rows] = tokens_N
        rows.num_output[:num_rows] += 1
        rows.num_tokens[:num_rows] += 1
        self.num_steps += 1
        self.num_generated += num_rows
        stopped_N = (rows.stop_ids[:num_rows] == tokens_N[:, None]).any(1)
        broken_N = ~np.isfinite(logprobs_N)
        done_N = stopped_N | broken_N | (rows.num_output[:num_rows] >= rows.max_new_tokens[:num_rows])
        interval_N = rows.stream_interval[:num_rows]
        due_N = (interval_N > 0) & (rows.num_output[:num_rows] % np.maximum(interval_N, 1) == 0) & ~done_N
        reported = []
        for row in np.nonzero(due_N)[0].tolist():
            sequence = self._sequence_in(row)
            rows.copy_output_to(sequence)
            reported.append(sequence)
        for row in np.nonzero(done_N)[0].tolist():
            if broken_N[row]:
                rows.num_output[row] -= 1
                self._cache.clear_row(row)
                self.contexts.clear()
                finish = Finish(
                    reason=FinishReason.ABORT, message="the model's logits are not finite", is_error=True
                )
            elif stopped_N[row]:
                finish = Finish(reason=FinishReason.STOP, matched=int(tokens_N[row]))
            else:
                finish = Finish(reason=FinishReason.LENGTH)
            reported.append(self._finish(self._sequence_in(row), finish))
        return reported

    def _sequence_in(self, row: int) -> Sequence:
        sequence = self.scheduler.rows[row]
        assert sequence is not None, f"row {row} is empty"
        return sequence

    def _copy_routes(self, sequence: Sequence) -> None:
        """Gives a sequence that leaves its row the routes of all tokens but the last, if it wants them."""
        if self.routes is not None and sequence.return_routes:
            self.routes.copy_to(sequence, num_tokens=int(self._rows.num_tokens[sequence.row]) - 1)

    def _finish(self, sequence: Sequence, finish: Finish) -> Sequence:
        if sequence.row >= 0:
            self._rows.copy_output_to(sequence)
            self._copy_routes(sequence)
            if sequence.keeps_prefix and not finish.is_error:
                self.contexts.keep(sequence)
        self.scheduler.finish(sequence, finish)
        sequence.version_spans = _merged(sequence.version_spans)
        return sequence


def _merged(spans: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Joins adjacent spans of one version: a preempted sequence that was admitted again has two."""
    merged: list[tuple[str, int, int]] = []
    for version, start, end in spans:
        if merged and merged[-1][0] == version:
            start = merged.pop()[1]
        merged.append((version, start, end))
    return merged
