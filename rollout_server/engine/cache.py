"""The KV cache, with one dense row per running sequence, and the cache of prompts shared by a group.

A row holds a whole sequence; there are no pages. A decode step reads rows 0..n-1 as one strided view, with no
gather and no block table, and at the lengths of short RL completions pages would save little memory. The
price is that `num_rows * context_length` tokens are allocated up front. A prefix is kept as a copy outside
the rows, so that it outlives the sequence that computed it and can be copied into any number of rows.

Layers with linear attention have a recurrent state in place of KV (states.py). It belongs to the row too, so
every method that moves, copies or clears a row does the same with its state.

Shapes: L layers, S rows, H KV heads, T positions, D head size, B computed contexts, N rows decoded.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout_server.engine.states import StateLayout, StateRows, StateShape

_LEAST_POSITIONS = 24
"""A decode step attends to at least this many positions: on a CPU, torch has no fast kernels for smaller
products and softmaxes. With 54 rows, attention to 12 positions took 122 us, and to 18 positions 48 us."""
_LEAST_MAPPED_BYTES = 64 << 20
"""Size of a cache from which on its memory is mapped and not allocated."""


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """Sizes of one layer's keys and values; layers may differ (MLA, hybrid head counts)."""

    num_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeBatch:
    """Positions, mask and write indices of one decode step: computed once per step, used by every layer."""

    num_rows: int
    num_positions: int
    """T: one more than the largest position, or `_LEAST_POSITIONS`; masked beyond a row's own position."""
    position_N: Tensor
    """int64[N] position of the token being decoded."""
    bias_N1T: Tensor
    """Additive attention bias in the model's dtype: 0 up to the row's position, -inf beyond it."""
    write_index_by_heads: dict[int, Tensor]
    """H -> int64[N*H]: index of each new key and value in a layer's cache viewed as [S*H*T, D]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Extension:
    """Positions, mask and indices of a pass that extends the contents of rows: B contexts, T new positions in
    each, right-padded, and S positions in the longest row."""

    num_positions: int
    """S"""
    position_BT: Tensor
    """int64; positions of padding are within the context length and otherwise arbitrary."""
    bias_B1TS: Tensor
    """Additive attention bias in the model's dtype: 0 up to the new token's position, -inf beyond it."""
    rows_B: Tensor
    """int64"""
    read_index_V: Tensor
    """int64[V]: index of the tokens that are not padding among all B*T."""
    write_index_by_heads: dict[int, Tensor]
    """H -> int64[V*H]: index of each new key and value in a layer's cache viewed as [S*H*T, D]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """What a row holds of T adjacent tokens."""

    kv_L2HTD: Tensor
    state_R: Tensor | None = None
    """A snapshot (`StateRows.snapshot`) after the last token; None for models without recurrent states, and
    for tokens after which none was taken."""
    routes_TLK: NDArray[Any] | None = None
    """The experts chosen in the pass that computed the KV, if the engine records them."""


class KVCache:
    """Keys and values of `num_rows` sequences of up to `context_length` tokens.

    Every layer gets the memory for the most heads and the largest head size of any layer.
    `states` holds the rows' recurrent states, which the model itself reads and writes in every pass.

    Decode step: `begin_decode`, then `append` for each layer.
    Prefill: `begin_prefill`, then `fill` for each layer, then `end_prefill`.
    Extension: `begin_extension`, then `extend` for each layer.
    A prefill or an extension may be one pass with a decode step of all rows in use: in each layer `fill` or
    `extend` comes before `append`.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        *,
        num_rows: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        state_shapes: Iterable[StateShape] = (),
    ) -> None:
        """`shapes`: of the layers that have keys and values, at least one. `state_shapes`: of those that have
        a recurrent state."""
        heads, dim = max(s.num_heads for s in shapes), max(max(s.key_dim, s.value_dim) for s in shapes)
        self.num_rows, self.context_length, self.device, self.dtype = num_rows, context_length, device, dtype
        # Zeros, not empty: masked positions have weight 0, and 0 times an uninitialized NaN is NaN.
        self._storage = _zeros(
            (len(shapes), 2, num_rows, heads, context_length, dim), dtype=dtype, device=device
        )
        self.keys = [self._storage[i, 0, :, : s.num_heads, :, : s.key_dim] for i, s in enumerate(shapes)]
        """Per layer [S, H, T, D] view."""
        self.values = [self._storage[i, 1, :, : s.num_heads, :, : s.value_dim] for i, s in enumerate(shapes)]
        self._flat = [
            (self._storage[i, 0].view(-1, dim), self._storage[i, 1].view(-1, dim)) for i in range(len(shapes))
        ]
        self._heads = sorted({s.num_heads for s in shapes})
        self._storage_heads = heads
        self._arange_T = np.arange(context_length)
        self._batch: DecodeBatch | None = None
        self._extension: Extension | None = None
        self._computed_L2BHTD = torch.empty(0)
        self._filled_rows = self._filled_from = torch.empty(0, dtype=torch.int64)
        """int64: rows that the prefill fills, and for each of them its context."""
        self.new_lengths_B: NDArray[np.int64] = np.zeros(0, np.int64)
        """Tokens of each context in the prefill or extension that was begun last, without padding."""
        layout = StateLayout(state_shapes, dtype=dtype)
        self._state_layout = layout if layout.parts else None
        self.states = layout.zeros(num_rows, device=device) if layout.parts else None
        """States of the rows; None for models without."""
        self.computed_states: StateRows | None = None
        """States of the contexts of a prefill, zero when it begins."""

    @property
    def num_bytes(self) -> int:
        """Size of the rows' keys and values in bytes."""
        return self._storage.numel() * self._storage.element_size()

    @property
    def state_bytes(self) -> int:
        """Size of the rows' recurrent states in bytes."""
        return 0 if self.states is None else self.states.num_bytes

    @property
    def state_tokens(self) -> int:
        """Number of tokens whose keys and values take as much memory as one state, rounded up.

        Limits in tokens count a state as that many.
        """
        return -(-self.state_bytes * self.context_length // self.num_bytes)

    # Decoding

    def begin_decode(self, position_N: NDArray[np.int64]) -> DecodeBatch:
        """Prepares a step over rows 0..N-1 whose new tokens are at `position_N`."""
        num_rows = len(position_N)
        num_positions = min(max(int(position_N.max()) + 1, _LEAST_POSITIONS), self.context_length)
        # In numpy: launching a torch kernel costs more than computing these small arrays.
        bias_NT = np.where(
            self._arange_T[:num_positions] > position_N[:, None], np.float32("-inf"), np.float32(0)
        )
        index = self._write_index(np.arange(num_rows, dtype=np.int64), position_N)
        self._batch = DecodeBatch(
            num_rows=num_rows,
            num_positions=num_positions,
            position_N=torch.from_numpy(position_N).to(self.device),
            bias_N1T=torch.from_numpy(bias_NT).to(self.device, self.dtype).unsqueeze(1),
            write_index_by_heads=index,
        )
        return self._batch

    def _write_index(self, row_N: NDArray[np.int64], position_N: NDArray[np.int64]) -> dict[int, Tensor]:
        """Returns H -> int64[N*H]: where the keys and values of these rows and positions are in a flat
        layer."""
        index = {}
        for heads in self._heads:
            row_head = row_N[:, None] * self._storage_heads + np.arange(heads, dtype=np.int64)
            flat = row_head * self.context_length + position_N[:, None]
            index[heads] = torch.from_numpy(flat.reshape(-1)).to(self.device)
        return index

    def append(self, layer: int, key_NHD: Tensor, value_NHD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes this step's keys and values; returns views [N, H, T, D] of all positions that are in use."""
        batch = self._batch
        assert batch is not None, "begin_decode first"
        self._write(layer, batch.write_index_by_heads[key_NHD.shape[1]], key_NHD, value_NHD)
        key_NHTD = self.keys[layer][: batch.num_rows, :, : batch.num_positions]
        return key_NHTD, self.values[layer][: batch.num_rows, :, : batch.num_positions]

    def _write(self, layer: int, index: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        flat_key, flat_value = self._flat[layer]
        key_dim, value_dim = key_NHD.shape[2], value_NHD.shape[2]
        flat_key[:, :key_dim].index_copy_(0, index, key_NHD.reshape(-1, key_dim))
        flat_value[:, :value_dim].index_copy_(0, index, value_NHD.reshape(-1, value_dim))

    # Prefill

    def begin_prefill(self, lengths_B: NDArray[np.int64], *, rows: Sequence[Sequence[int]]) -> None:
        """Prepares for one `fill` per layer, with contexts of `lengths_B` tokens, right-padded to the longest
        one. `rows`: for each context, the rows that get it."""
        layers, _, _, heads, _, dim = self._storage.shape
        num_contexts = len(lengths_B)
        shape = (layers, 2, num_contexts, heads, int(lengths_B.max()), dim)
        self._computed_L2BHTD = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.new_lengths_B = lengths_B
        sources = [source for source, targets in enumerate(rows) for _ in targets]
        filled = [row for targets in rows for row in targets]
        self._filled_rows = torch.tensor(filled, dtype=torch.int64, device=self.device)
        self._filled_from = torch.tensor(sources, dtype=torch.int64, device=self.device)
        if self._state_layout is not None:
            self.computed_states = self._state_layout.zeros(num_contexts, device=self.device)

    def fill(self, layer: int, key_BHTD: Tensor, value_BHTD: Tensor) -> None:
        """Writes one layer's computed keys and values to the rows, and keeps them until the next prefill.

        The KV of the padding after a shorter context is written too; the row's own tokens overwrite it before
        it is read.
        """
        _, heads, length, key_dim = key_BHTD.shape
        computed_2BHTD = self._computed_L2BHTD[layer]
        computed_2BHTD[0, :, :heads, :, :key_dim] = key_BHTD
        computed_2BHTD[1, :, :heads, :, : value_BHTD.shape[3]] = value_BHTD
        if len(self._filled_rows):
            used = self._storage[layer, :, :, :, :length]
            used.index_copy_(1, self._filled_rows, computed_2BHTD.index_select(1, self._filled_from))

    def end_prefill(self) -> None:
        """Writes the computed states to the rows, in models that have them."""
        if self.states is not None and len(self._filled_rows):
            assert self.computed_states is not None, "begin_prefill first"
            self.states.write(self._filled_rows, self.computed_states.select(self._filled_from))

    def computed_prefix(self, source: int) -> Prefix:
        """Copies what the last prefill computed for context `source`."""
        length, states = int(self.new_lengths_B[source]), self.computed_states
        return Prefix(
            kv_L2HTD=self._computed_L2BHTD[:, :, source, :, :length].clone(),
            state_R=None if states is None else states.snapshot(source),
        )

    # Extension

    def begin_extension(
        self, *, rows: Sequence[int], starts_B: NDArray[np.int64], lengths_B: NDArray[np.int64]
    ) -> Extension:
        """Prepares to add `lengths_B` tokens to each of these rows, starting at positions `starts_B`."""
        num_positions, num_new = int((starts_B + lengths_B).max()), int(lengths_B.max())
        new_T = np.arange(num_new)
        position_BT = np.minimum(starts_B[:, None] + new_T, self.context_length - 1)
        context, new = np.nonzero(new_T < lengths_B[:, None])
        row_B = np.array(rows, np.int64)
        bias_BTS = np.where(
            self._arange_T[:num_positions] > position_BT[:, :, None], np.float32("-inf"), np.float32(0)
        )
        self.new_lengths_B = lengths_B
        self._extension = Extension(
            num_positions=num_positions,
            position_BT=torch.from_numpy(position_BT).to(self.device),
            bias_B1TS=torch.from_numpy(bias_BTS).to(self.device, self.dtype).unsqueeze(1),
            rows_B=torch.from_numpy(row_B).to(self.device),
            read_index_V=torch.from_numpy(context * num_new + new).to(self.device),
            write_index_by_heads=self._write_index(row_B[context], position_BT[context, new]),
        )
        return self._extension

    def extend(self, layer: int, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values; returns copies [B, H, S, D] of all positions of these rows."""
        extension = self._extension
        assert extension is not None, "begin_extension first"
        key_VHD, value_VHD = (
            new.transpose(1, 2).flatten(0, 1).index_select(0, extension.read_index_V)
            for new in (key_BHTD, value_BHTD)
        )
        self._write(layer, extension.write_index_by_heads[key_BHTD.shape[1]], key_VHD, value_VHD)
        rows_B, num_positions = extension.rows_B, extension.num_positions
        key_BHSD = self.keys[layer][:, :, :num_positions].index_select(0, rows_B)
        return key_BHSD, self.values[layer][:, :, :num_positions].index_select(0, rows_B)

    # Rows

    def move(self, sources: Sequence[int], targets: Sequence[int], *, num_positions: int) -> None:
        """Copies the first `num_positions` of rows `sources`, and their states, to rows `targets`, which must
        not overlap."""
        source, target = (torch.tensor(rows, device=self.device) for rows in (sources, targets))
        used = self._storage[:, :, :, :, :num_positions]
        used.index_copy_(2, target, used.index_select(2, source))
        if self.states is not None:
            self.states.write(target, self.states.select(source))

    def write(self, row: int, kv_L2HTD: Tensor, *, start: int = 0) -> None:
        """Copies the KV of T tokens [L, 2, H, T, D] into a row, starting at position `start`."""
        self._storage[:, :, row, :, start : start + kv_L2HTD.shape[3]] = kv_L2HTD

    def read(self, row: int, start: int, end: int) -> Tensor:
        """Returns a view [L, 2, H, end - start, D] of a row's positions."""
        return self._storage[:, :, row, :, start:end]

    def snapshot_state(self, row: int) -> Tensor | None:
        """Returns a copy of a row's state; None for models without."""
        return None if self.states is None else self.states.snapshot(row)

    def restore_state(self, row: int, state_R: Tensor | None) -> None:
        """Writes a snapshot into a row; does nothing for models without states."""
        if self.states is not None:
            assert state_R is not None, "a prefix without its state"
            self.states.restore(row, state_R)

    def begin_row(self, row: int) -> None:
        """Prepares a row for a sequence of which nothing is computed before its first decode step.

        KV need no preparation: positions that the sequence has not written are masked.
        """
        if self.states is not None:
            self.states.clear(row)

    def clear_row(self, row: int) -> None:
        """Zeroes a row that holds values that are not finite.

        Otherwise they would reach the row's next sequence through masked positions: 0 times NaN is NaN.
        """
        self._storage[:, :, row].zero_()
        self.begin_row(row)


def _zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where they are written, on a CPU and if there are many.

    Rows have room for the longest sequence, and most sequences are far shorter. Without huge pages, because
    one of them covers several heads of a row.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _LEAST_MAPPED_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class PrefixCache:
    """The most recently used prompts, up to `max_tokens` positions in all.

    Entries are keyed by the serial number of the weights that computed them, so that an entry computed under
    older weights is never found; a swap of weights drops all entries.
    """

    def __init__(self, *, max_tokens: int, state_tokens: int = 0) -> None:
        """`state_tokens`: of KVCache; each entry counts that many more."""
        self.max_tokens = max_tokens
        self._state_tokens = state_tokens
        self.serial = 0
        self.num_tokens = 0
        self._entries: OrderedDict[tuple[int, tuple[int, ...]], Prefix] = OrderedDict()

    def __contains__(self, context: tuple[int, ...]) -> bool:
        return (self.serial, context) in self._entries

    def size_of(self, context: tuple[int, ...]) -> int:
        """Returns what an entry counts towards `max_tokens`."""
        return len(context) + self._state_tokens

    def get(self, context: tuple[int, ...]) -> Prefix | None:
        """Returns the prefix of all but the last token of `context`, or None."""
        key = (self.serial, context)
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, context: tuple[int, ...], prefix: Prefix) -> None:
        """Adds an entry, and drops the least recently used ones to make room.

        An entry larger than `max_tokens` is not added.
        """
        if self.size_of(context) > self.max_tokens or context in self:
            return
        self._entries[(self.serial, context)] = prefix
        self.num_tokens += self.size_of(context)
        while self.num_tokens > self.max_tokens:
            (_, oldest), _ = self._entries.popitem(last=False)
            self.num_tokens -= self.size_of(oldest)

    def clear(self, *, serial: int | None = None) -> None:
        """Drops everything; `serial` is the serial number of the weights that are now active."""
        self._entries.clear()
        self.num_tokens = 0
        if serial is not None:
            self.serial = serial
