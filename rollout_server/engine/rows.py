"""Per-row state of the running sequences, as numpy arrays.

One decode step updates all rows with a few array operations; a Python object is touched only when a sequence
enters or leaves a row, or reports its output.
"""

from __future__ import annotations

import numpy as np

from rollout_server.engine.scheduler import Sequence

_NO_TOP_K = 1 << 40
"""Larger than any vocabulary."""


class RowState:
    """Arrays whose entry i belongs to the sequence in the scheduler's row i. Token counts are int64."""

    def __init__(self, *, num_rows: int, context_length: int) -> None:
        self.num_tokens = np.zeros(num_rows, np.int64)
        """Tokens of prompt and output; the last one has not been through the model yet."""
        self.num_output = np.zeros(num_rows, np.int64)
        self.max_new_tokens = np.zeros(num_rows, np.int64)
        self.last_token = np.zeros(num_rows, np.int64)
        self.temperature = np.zeros(num_rows, np.float32)
        self.rng_key = np.zeros(num_rows, np.uint64)
        self.stream_interval = np.zeros(num_rows, np.int64)
        self.top_p = np.ones(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int64)
        self.min_p = np.zeros(num_rows, np.float32)
        self.stop_ids = np.full((num_rows, 1), -1, np.int64)
        """[row, i] stop tokens, padded with -1; widened when a sequence has more than any before it."""
        self.output_ids = np.zeros((num_rows, context_length), np.int64)
        self.output_logprobs = np.zeros((num_rows, context_length), np.float32)
        self.version_start = np.zeros(num_rows, np.int64)
        """Index of the first output token sampled under the sequence's current version."""
        self.slot = np.full(num_rows, -1, np.int64)
        """Adapter of the sequence (`ServedVersion.slot`)."""
        self.kv_serial = np.zeros(num_rows, np.int64)
        """Serial number of the weights that the row's first KV was computed under."""

    def enter(self, sequence: Sequence) -> None:
        """Fills the row of a sequence; a sequence that was preempted already has output."""
        row, params, num_output = sequence.row, sequence.params, len(sequence.output_ids)
        assert sequence.served is not None, f"{sequence.seq_id} enters a row without weights"
        self.slot[row], self.kv_serial[row] = sequence.served.slot, sequence.served.serial
        self.num_tokens[row] = len(sequence.prompt) + num_output
        self.num_output[row] = self.version_start[row] = num_output
        self.max_new_tokens[row] = params.max_new_tokens
        self.last_token[row] = sequence.output_ids[-1] if num_output else sequence.prompt[-1]
        self.temperature[row] = params.temperature
        self.rng_key[row] = sequence.rng_key
        self.stream_interval[row] = sequence.stream_interval
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.top_k[row] = params.top_k if params.top_k > 0 else _NO_TOP_K
        if len(params.stop_token_ids) > self.stop_ids.shape[1]:
            wider = np.full((len(self.stop_ids), len(params.stop_token_ids)), -1, np.int64)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(params.stop_token_ids)] = params.stop_token_ids
        if num_output:
            self.output_ids[row, :num_output] = sequence.output_ids
            self.output_logprobs[row, :num_output] = sequence.output_logprobs

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies rows `sources` over rows `targets`, in every array."""
        for array in vars(self).values():
            array[targets] = array[sources]

    def copy_output_to(self, sequence: Sequence) -> None:
        """Updates the sequence's output from its row."""
        row = sequence.row
        assert sequence.served is not None, f"{sequence.seq_id} has a row and no weights"
        count, start = int(self.num_output[row]), int(self.version_start[row])
        sequence.output_ids = self.output_ids[row, :count].tolist()
        sequence.output_logprobs = self.output_logprobs[row, :count].tolist()
        # A span under the current version grows from one report to the next: replace it.
        spans = [span for span in sequence.version_spans if span[2] <= start]
        if count > start:
            spans.append((sequence.served.version, start, count))
        sequence.version_spans = spans
