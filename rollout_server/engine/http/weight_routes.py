"""The endpoints for weight updates. WeightUpdater documents the order in which they must be called.

    /init_weights_update_group          join a weight group, with `more_senders` one for each sender
    /begin_weight_update                open an update
    /update_weights_from_distributed    receive one bucket into it (repeated)
    /receive_weights                    open an update and receive all its buckets
    /end_weight_update                  verify the update and activate it
    /update_weights_from_disk           load and activate a whole update from a directory
    /destroy_weights_update_group       leave the group

All but `/receive_weights` are SGLang's endpoints. SGLang changes its active weights bucket by bucket; this
engine activates an update as a whole at its end. `/receive_weights` replaces one request per bucket by a
single request; with the header of a LoRA adapter (`adapter`) it receives the adapter's tensors only, and with
`base_digest` only what differs from the active weights, which must have that digest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from starlette.responses import Response

from areal_like.errors import UserError
from areal_like.http.bodies import ParamError, one_of, required_integer, text
from areal_like.weights.adapters import AdapterHeader
from areal_like.weights.buckets import Bucket
from rollout_server.engine.core import Running
from rollout_server.engine.http.protocol import success
from rollout_server.engine.options import ProcessOptions
from rollout_server.engine.weights.updater import WeightUpdater

DEFAULT_GROUP = "weight_update_group"
_MAX_TIMEOUT_S = 86400.0


class WeightRoutes:
    """Handlers of the weight update endpoints."""

    def __init__(self, updater: WeightUpdater, options: ProcessOptions) -> None:
        self._updater = updater
        self._default_timeout_s = options.weights_timeout_s
        self._model_path = options.model_path
        self._directories = [Path(directory).expanduser().resolve() for directory in options.weights_from]

    async def init_group(self, body: dict[str, Any]) -> Response:
        """/init_weights_update_group."""
        await self._updater.groups.join(
            master_address=text(body, "master_address"),
            master_port=required_integer(body, "master_port", high=65535),
            rank=required_integer(body, "rank_offset"),
            world_size=required_integer(body, "world_size"),
            group_name=text(body, "group_name", DEFAULT_GROUP),
            backend=text(body, "backend", "nccl"),
            timeout_s=_timeout(body, self._default_timeout_s),
            secret=_secret(body),
            more_senders=_more_senders(body),
        )
        return success("joined the weight group")

    async def destroy_group(self, body: dict[str, Any]) -> Response:
        """/destroy_weights_update_group."""
        await self._updater.groups.leave(text(body, "group_name", DEFAULT_GROUP))
        return success("left the weight group")

    async def begin(self, body: dict[str, Any]) -> Response:
        """/begin_weight_update."""
        await self._updater.begin()
        return success("weight update open")

    async def receive_bucket(self, body: dict[str, Any]) -> Response:
        """/update_weights_from_distributed."""
        load_format = body.get("load_format")
        if load_format not in (None, "flattened_bucket"):
            raise UserError(f"load_format must be null or flattened_bucket, got {load_format!r}")
        sums = await self._updater.receive(
            [Bucket.from_dict(body)],
            group_name=text(body, "group_name", DEFAULT_GROUP),
            flattened=load_format is not None,
            version=_weight_version(body),
            timeout_s=_timeout(body, self._default_timeout_s),
        )
        return success("received", checksum=next(iter(sums.checksums), None))

    async def receive_all(self, body: dict[str, Any]) -> Response:
        """/receive_weights."""
        buckets = body.get("buckets")
        if not isinstance(buckets, list) or not all(isinstance(bucket, dict) for bucket in buckets):
            raise UserError("buckets must be a list of objects")
        parsed = [Bucket.from_dict(bucket) for bucket in buckets]
        group_name = text(body, "group_name", DEFAULT_GROUP)
        timeout_s = _timeout(body, self._default_timeout_s)
        integrity = one_of(body, "integrity", ("none", "sha256"))
        header = body.get("adapter")
        base_digest = text(body, "base_digest") if "base_digest" in body else ""
        await self._updater.begin(
            None if header is None else AdapterHeader.from_dict(header), base_digest=base_digest
        )
        sums = await self._updater.receive(
            parsed, group_name=group_name, timeout_s=timeout_s, integrity=integrity
        )
        return success("received", checksums=sums.checksums, digests=sums.digests)

    async def end(self, body: dict[str, Any]) -> Response:
        """/end_weight_update."""
        stall_s = await self._updater.end(version=_weight_version(body), running=_running(body))
        return success("active", stall_s=stall_s, base_digest=self._updater.base_digest)

    async def load_from_disk(self, body: dict[str, Any]) -> Response:
        """/update_weights_from_disk."""
        path, version = text(body, "model_path"), _weight_version(body)
        self._check_source(path)
        stall_s = await self._updater.load_from_disk(path, version=version, running=_running(body))
        return success("active", stall_s=stall_s)

    def _check_source(self, path: str) -> None:
        """Raises UserError unless weights may be loaded from there. Links are followed first."""
        if path == self._model_path:
            return
        try:
            resolved = Path(path).expanduser().resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"model_path={path!r}: {error}") from None
        if not any(resolved.is_relative_to(directory) for directory in self._directories):
            raise UserError(
                f"model_path={path!r} is neither the engine's model nor below --weights-from: refused"
            )


def _timeout(body: Mapping[str, Any], default_s: float) -> float:
    """Returns `timeout_s`, which must be above 0 and at most a day."""
    timeout_s = body.get("timeout_s", default_s)
    if (
        isinstance(timeout_s, bool)
        or not isinstance(timeout_s, (int, float))
        or not 0 < timeout_s <= _MAX_TIMEOUT_S
    ):
        raise ParamError(
            f"timeout_s must be a number of seconds up to {_MAX_TIMEOUT_S:g}, got {timeout_s!r}",
            param="timeout_s",
        )
    return float(timeout_s)


def _weight_version(body: Mapping[str, Any]) -> str:
    """Returns `weight_version` as a string; empty if the body has none.

    SGLang's versions are strings, ours are numbers.
    """
    value = body.get("weight_version")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
        raise ParamError(f"weight_version must be a string, got {value!r}", param="weight_version")
    return "" if value is None else str(value)


def _secret(body: Mapping[str, Any]) -> str:
    """Returns `secret`, 32 bytes in hexadecimal; empty if the body has none."""
    value = body.get("secret", "")
    if not isinstance(value, str) or (value and re.fullmatch(r"[0-9a-f]{64}", value) is None):
        # The message omits the value, to keep it out of logs.
        raise ParamError("secret must be 64 hexadecimal digits", param="secret")
    return value


def _more_senders(body: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Returns `more_senders`, pairs of address and port; empty if the body has none."""
    value = body.get("more_senders", [])
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ParamError("more_senders must be a list of [address, port]", param="more_senders")
    pairs = [{"address": address, "port": port} for address, port in value]
    return [(text(pair, "address"), required_integer(pair, "port", high=65535)) for pair in pairs]


def _running(body: Mapping[str, Any]) -> Running:
    """Returns `running`: `recompute` (the default), `keep`, or `finish` for adapters."""
    found: Running = one_of(body, "running", get_args(Running))  # type: ignore[assignment]
    return found
