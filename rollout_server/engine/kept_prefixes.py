"""KV kept for the next turns of conversations: a radix tree over tokens.

A node holds the tokens of one sequence after those of its parent, with their KV, and is split where another
sequence branches off. So turns of a conversation, and conversations with a common prefix, store each token
once, and each turn copies only its own tokens. A lookup compares tokens, not hashes. To make room, the least
recently used leaves are dropped.

All KV in the tree was computed under one set of weights. `clear` drops everything at a swap, and a row whose
KV is older than the swap is never put in (see Contexts.keep).

A model with recurrent states continues a sequence only from where its state is known, and a state cannot be
cut (states.py). So the tree also keeps a snapshot of the state at the end of each sequence put in, and a
lookup finds the longest prefix that ends at one. The next turn of a conversation replaces the snapshot of the
turn before it. The snapshot after a prompt stays while others may start from it, as the samples of a group
do. A branch from the middle of a turn starts from the last snapshot before it. Left out: snapshots every so
many tokens within a sequence: each takes as much memory as the KV of hundreds or thousands of tokens.

Shapes: L layers, H KV heads, T tokens, D head size, R bytes of a snapshot; of routes: T tokens, L layers with
experts, K experts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout_server.engine.cache import Prefix

_SPARE_PARTS = 8
"""Once the tree is full, an eighth of it is freed at a time, so that few insertions have to search for
leaves."""


@dataclass(eq=False)
class _Node:
    """The tokens that follow those of the parent, with their KV."""

    tokens_T: NDArray[np.int64]
    kv_L2HTD: Tensor
    routes_TLK: NDArray[Any] | None
    """The experts chosen in the pass that computed the KV, if the engine records them."""
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    """Children by their first token."""
    used: int = 0
    """The tree's clock when a lookup or insertion last passed through this node."""
    state_R: Tensor | None = None
    """The recurrent state after the node's last token, if it was put in."""
    is_shared: bool = False
    """True if other sequences than the next turn may start from this state."""


class KeptPrefixes:
    """The KV of at most `max_tokens` tokens, of which each state takes the place of `state_tokens`."""

    def __init__(self, *, max_tokens: int, state_tokens: int = 0) -> None:
        """`state_tokens`: of KVCache; 0 for a model without recurrent states."""
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.num_states = 0
        self._state_tokens = state_tokens
        self._clock = 0
        self._root = _Node(np.empty(0, np.int64), torch.empty(0), None, None)

    def clear(self) -> None:
        """Drops everything."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            # Nodes refer to each other both ways, so their memory would wait for the garbage collector.
            node.children.clear()
        self.num_tokens = self.num_states = 0

    def num_matched(self, tokens: Sequence[int]) -> int:
        """Returns how many tokens at the start of `tokens` need not be computed."""
        return sum(length for _, length in self._known(tokens))

    def match(self, tokens: Sequence[int]) -> tuple[list[Prefix], Tensor | None]:
        """Returns the longest prefix of `tokens` that is here, in adjacent parts without states, and the
        state after it, uint8[R] (None without a prefix, or for a model without states).

        All are views: copy them before the next insertion.
        """
        path = self._known(tokens)
        state_R = path[-1][0].state_R if path and self._state_tokens else None
        parts = [
            Prefix(
                kv_L2HTD=node.kv_L2HTD[:, :, :, :length],
                routes_TLK=None if node.routes_TLK is None else node.routes_TLK[:length],
            )
            for node, length in path
        ]
        return parts, state_R

    def _known(self, tokens: Sequence[int]) -> list[tuple[_Node, int]]:
        """Returns the part of `_walk` from whose end a sequence can be continued."""
        path = self._walk(np.asarray(tokens, np.int64))
        while self._state_tokens and path:
            node, length = path[-1]
            if node.state_R is not None and length == len(node.tokens_T):
                break
            path.pop()
        return path

    def insert(
        self,
        tokens: Sequence[int],
        between: Callable[[int, int], Prefix],
        *,
        snapshot: Callable[[], Tensor | None] | None = None,
        is_shared: bool = False,
    ) -> None:
        """Adds all `tokens`; the tree copies only the part that it does not have.

        `between(start, end)`: what is kept of these tokens. `snapshot`: returns a copy of the state after all
        tokens; for models with states. `is_shared`: the tokens are a prompt from which several sequences may
        start. Does nothing if they do not fit into `max_tokens`.
        """
        tokens_T = np.asarray(tokens, np.int64)
        if not len(tokens_T) or len(tokens_T) + self._state_tokens > self.max_tokens:
            return
        path = self._walk(tokens_T)
        start = sum(length for _, length in path)
        node, length = path[-1] if path else (self._root, 0)
        has_end = start == len(tokens_T) and (
            not self._state_tokens or (node.state_R is not None and length == len(node.tokens_T))
        )
        if has_end:
            node.is_shared |= is_shared
            return
        if length < len(node.tokens_T):
            node = self._split(node, length)
        self._make_room(len(tokens_T) - start + self._state_tokens, end=node)
        if start < len(tokens_T):
            if not (node.children or node.is_shared):
                self._set_state(node, None)  # this is the next turn
            added = between(start, len(tokens_T))
            kv, routes = added.kv_L2HTD.clone(), added.routes_TLK
            new = _Node(
                tokens_T[start:], kv, None if routes is None else routes.copy(), node, used=self._clock
            )
            node.children[int(tokens_T[start])] = node = new
            self.num_tokens += len(tokens_T) - start
        if self._state_tokens:
            assert snapshot is not None, "a model with states keeps no KV without them"
            self._set_state(node, snapshot())
            node.is_shared = is_shared

    def _set_state(self, node: _Node, state_R: Tensor | None) -> None:
        self.num_states += (state_R is not None) - (node.state_R is not None)
        node.state_R = state_R

    @property
    def _size(self) -> int:
        return self.num_tokens + self.num_states * self._state_tokens

    def _walk(self, tokens_T: NDArray[np.int64]) -> list[tuple[_Node, int]]:
        """Returns the nodes along `tokens_T`, each with its number of matching tokens; marks them as used."""
        self._clock += 1
        node, start, path = self._root, 0, []
        while start < len(tokens_T):
            child = node.children.get(int(tokens_T[start]))
            if child is None:
                break
            rest_T = tokens_T[start : start + len(child.tokens_T)]
            different = np.nonzero(child.tokens_T[: len(rest_T)] != rest_T)[0]
            length = int(different[0]) if len(different) else len(rest_T)
            child.used = self._clock
            path.append((child, length))
            if length < len(child.tokens_T):
                break
            node, start = child, start + length
        return path

    def _split(self, node: _Node, length: int) -> _Node:
        """Splits a node after `length` tokens; returns the first part, whose only child is the second.

        Both copy what they keep: a view would hold all of it after the other part was dropped.
        """
        assert node.parent is not None
        routes = node.routes_TLK
        first = _Node(
            node.tokens_T[:length],
            node.kv_L2HTD[:, :, :, :length].clone(),
            None if routes is None else routes[:length].copy(),
            node.parent,
        )
        first.used = node.used
        node.parent.children[int(node.tokens_T[0])] = first
        node.tokens_T, node.kv_L2HTD = node.tokens_T[length:], node.kv_L2HTD[:, :, :, length:].clone()
        node.routes_TLK = None if routes is None else routes[length:].copy()
        node.parent, first.children = first, {int(node.tokens_T[0]): node}
        # The walk that asks for the split passed only the first part.
        node.used -= 1
        return first

    def _make_room(self, num_tokens: int, *, end: _Node) -> None:
        """Drops leaves, least recently used first, until `num_tokens` fit; keeps those that the last walk
        passed, up to `end`, and drops their states if there is no other way."""
        if self._size + num_tokens <= self.max_tokens:
            return
        most = self.max_tokens - self.max_tokens // _SPARE_PARTS - num_tokens
        leaves = [(node.used, id(node), node) for node in self._leaves()]
        heapq.heapify(leaves)
        while leaves and (self._size > most or leaves[0][0] < 0):
            used, _, node = heapq.heappop(leaves)
            if used == self._clock:
                break
            parent = node.parent
            assert parent is not None
            del parent.children[int(node.tokens_T[0])]
            self.num_tokens -= len(node.tokens_T)
            self._set_state(node, None)
            if not parent.children and parent is not self._root:
                # Nothing can start from a leaf without the state that its model needs.
                is_useless = self._state_tokens and parent.state_R is None and parent.used < self._clock
                heapq.heappush(leaves, (-1 if is_useless else parent.used, id(parent), parent))
        for node in _path_to(end):
            if self._size + num_tokens <= self.max_tokens:
                break
            self._set_state(node, None)

    def _leaves(self) -> list[_Node]:
        leaves, nodes = [], list(self._root.children.values())
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if not node.children:
                leaves.append(node)
        return leaves

    def check(self) -> None:
        """Asserts that token counts add up, that every node can be found by its first token, and that every
        leaf has the state that its model needs."""
        num_tokens, num_states, nodes = 0, 0, [self._root]
        while nodes:
            node = nodes.pop()
            for token, child in node.children.items():
                assert child.parent is node and child.tokens_T[0] == token
                assert child.kv_L2HTD.shape[3] == len(child.tokens_T) > 0
                assert child.children or not self._state_tokens or child.state_R is not None
                nodes.append(child)
            num_tokens += len(node.tokens_T)
            num_states += node.state_R is not None
        assert (num_tokens, num_states) == (self.num_tokens, self.num_states)
        assert self._size <= self.max_tokens


def _path_to(node: _Node) -> list[_Node]:
    """The nodes from the first one below the root to `node`; empty for the root."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]
