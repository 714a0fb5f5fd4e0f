"""Bounds on the requests of the weight control socket, checked before anything is done.

Without keys (`security.keys`) anyone who can reach the socket can send these requests. The checks then
prevent a forged request from making the engine connect to another machine, wait for hours or allocate memory.
They do not prevent a valid forged request from being performed.
"""

from __future__ import annotations

import math
import re

from areal_like.config.common import NAME, NAME_RULE
from areal_like.config.weights import MAX_TIMEOUT_S
from areal_like.errors import WeightSyncError
from areal_like.hosts import is_loopback
from areal_like.weights.adapters import AdapterHeader
from areal_like.wire.messages.weights import FormGroup, PushWeights, ScoreTokens

MAX_WORLD_SIZE = 1 << 14
"""Maximum number of ranks in a weight group."""
MAX_SCORED, MAX_SCORE_CONTEXT = 256, 8192
"""Maximum number of scored tokens, and of all tokens, in one ScoreTokens."""
MAX_SENDERS = 256
"""Maximum number of senders of a push, each with a group of its own."""
_HOST = re.compile(r"[A-Za-z0-9.:%_-]{1,255}")
_HEX_64 = re.compile(r"([0-9a-f]{64})?")
_UPDATE_MODES = ("recompute", "keep", "abort_resume", "drain")
_INTEGRITIES = ("none", "sha256")
_MAX_VERSION = 2**63 - 1


def reason_to_refuse(request: object, *, host: str, num_ranks: int, integrity: str) -> str:
    """Returns what is wrong with a request; empty if it is valid. For the arguments see the checks below."""
    try:
        if isinstance(request, FormGroup):
            check_form_group(request, host=host, num_ranks=num_ranks)
        elif isinstance(request, PushWeights):
            check_push(request, integrity=integrity)
    except WeightSyncError as error:
        return str(error)
    return ""


def check_form_group(request: FormGroup, *, host: str, num_ranks: int) -> None:
    """Checks a FormGroup. `host`: address of this server's control socket. `num_ranks`: ranks of its engine.

    Raises WeightSyncError.
    """
    _check_common(request)
    _require(request.num_senders <= MAX_SENDERS, f"{request.num_senders} senders: want at most {MAX_SENDERS}")
    for number in range(request.num_senders):
        _check_store(request.of_sender(number), host=host)
    _require(2 <= request.world_size <= MAX_WORLD_SIZE, f"world_size {request.world_size}")
    _require(
        1 <= request.rank <= request.world_size - num_ranks,
        f"rank {request.rank} of {request.world_size}, and this engine has {num_ranks}",
    )
    _require(request.backend in ("gloo", "nccl"), "backend: want gloo or nccl")
    _require(_HEX_64.fullmatch(request.secret) is not None, "secret: want 64 hexadecimal digits or nothing")


def _check_store(request: FormGroup, *, host: str) -> None:
    _require(1 <= request.master_port <= 65535, f"master_port {request.master_port}")
    _require(
        _HOST.fullmatch(request.master_address) is not None, "master_address: want a host name or address"
    )
    _require(
        not is_loopback(host) or is_loopback(request.master_address),
        f"master_address {request.master_address} is on another machine, and this server listens on {host}: "
        "set rollout.host, or weights.host to a loopback address",
    )


def check_push(request: PushWeights, *, integrity: str) -> None:
    """Checks a PushWeights. `integrity`: required by this server's configuration. Raises WeightSyncError."""
    _check_common(request)
    _require(0 <= request.version <= _MAX_VERSION, "version: want a number of 64 bits")
    _require(request.update_mode in _UPDATE_MODES, f"update_mode: want one of {', '.join(_UPDATE_MODES)}")
    _require(request.integrity in _INTEGRITIES, f"integrity: want one of {', '.join(_INTEGRITIES)}")
    _require(
        integrity == "none" or request.integrity == integrity,
        f"the trainer sends no digests, and this server requires weights.integrity={integrity}: "
        "give both the same setting",
    )
    _require(
        (request.base_version >= 0) == bool(request.base_digest), "base_version and base_digest: want both"
    )
    _require(_HEX_64.fullmatch(request.base_digest) is not None, "base_digest: want 64 hexadecimal digits")


def check_base(request: PushWeights, *, version: int, base_digest: str) -> None:
    """Checks that the engine has the base of a push that sends only what changed. Raises WeightSyncError.

    `version`: active in the engine; `base_digest`: of its weights, empty if they cannot be a base.
    """
    if not request.base_digest or (request.base_version, request.base_digest) == (version, base_digest):
        return
    _require(bool(base_digest), "this engine needs all weights: what it has cannot be the base of a push")
    raise WeightSyncError(
        f"refused: the push sends what differs from version {request.base_version} "
        f"({request.base_digest[:12]}), the engine has version {version} ({base_digest[:12]})"
    )


def check_adapter(adapter: AdapterHeader | None, *, base: str) -> None:
    """Checks what a push carries. `base`: digest of this server's base model; empty if it takes all weights.

    Raises WeightSyncError.
    """
    _require(
        (adapter is not None) == bool(base),
        f"the trainer pushes {'all weights' if adapter is None else 'an adapter'}, and this server expects "
        f"{'an adapter' if base else 'all weights'}: give both the same weights.lora",
    )
    _require(
        adapter is None or adapter.base == base,
        "the adapter belongs to another base model: give trainer and rollout servers the same model.path",
    )


def check_score(request: ScoreTokens) -> None:
    """Checks a ScoreTokens. Raises WeightSyncError."""
    num_scored = len(request.tokens) - request.first
    _require(request.first >= 1, f"first {request.first}: want at least 1")
    _require(1 <= num_scored <= MAX_SCORED, f"{num_scored} tokens to score: want 1 to {MAX_SCORED}")
    _require(len(request.tokens) <= MAX_SCORE_CONTEXT, f"tokens: want at most {MAX_SCORE_CONTEXT}")


def _check_common(request: FormGroup | PushWeights) -> None:
    _require(NAME.fullmatch(request.group_name) is not None, f"group_name: {NAME_RULE}")
    _require(
        math.isfinite(request.timeout_s) and 0 < request.timeout_s <= MAX_TIMEOUT_S,
        f"timeout_s {request.timeout_s:g}: want at most {MAX_TIMEOUT_S:g}",
    )


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise WeightSyncError(f"refused: {problem}")
