"""Access to a running job for commands, from a machine that sees the run's directory or from any other.

With the directory, addresses come from its endpoint files and settings from its `config.yaml`. Without it, a
user gives the HTTP addresses of the buffers, which serve the settings at /config and report every peer in
/status. Nothing else is requested then: the HTTP address of a peer may be a loopback address of its own
machine, and the operator's token is never sent to an address that one daemon reports for another.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from areal_like.config import Config, from_mapping
from areal_like.config.security import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.shards import all_shards
from launch.observation.http_json import COMMAND_TIMEOUT_S, Operator, fetch_json, post_json
from launch.observation.observer import (
    DaemonView,
    look_at_daemon,
    look_at_daemons,
    merged_peers,
    merged_status,
)
from launch.run_directory.rundir import find_run
from launch.run_files import read_object

_MIN_SILENCE_S = 2.0
"""A peer is alive if the buffer has heard from it within this time, or within three heartbeats."""


class NoResponseError(ConfigError):
    """A buffer does not respond; the cause is the OSError."""


class RunningJob:
    """The buffers of one job, and requests to them."""

    def __init__(
        self, config: Config, *, operator: Operator, paths: RunPaths | None, addresses: Sequence[str] = ()
    ) -> None:
        """`paths`: the run's directory; None where it cannot be seen, and `addresses` are given."""
        self.config = config
        self.operator = operator
        self.paths = paths
        self._given = list(addresses)

    @classmethod
    def in_directory(cls, run: str) -> Self:
        """The job of a run that this machine sees. It need not be running. Raises ConfigError."""
        paths = RunPaths(find_run(run))
        config = load_config(["--config", str(paths.config)])
        return cls(config, operator=Operator(config.security, paths.endpoints), paths=paths)

    @classmethod
    def at(cls, addresses: Sequence[str], *, keys: str = "", tls_certificate: str = "") -> Self:
        """The job of the buffers at these HTTP addresses, of which at least one responds. Raises ConfigError.

        `keys`: a directory with `operator.token` or `monitor.token`. `tls_certificate`: as the setting.
        """
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not (host and port.isdecimal() and 0 < int(port) < 65536):
                raise ConfigError(f"--buffer {address}: give HOST:PORT of the buffer's HTTP server")
        security = SecurityConfig(keys=keys, tls_certificate=tls_certificate, tls_private_key=tls_certificate)
        operator = Operator(security, None, given=addresses)
        return cls(_config_from(addresses, operator), operator=operator, paths=None, addresses=addresses)

    @property
    def name(self) -> str:
        """For messages: the directory of the run, or its name."""
        return str(self.paths.root) if self.paths is not None else self.config.name

    @property
    def short_name(self) -> str:
        """The name of the run's directory."""
        return self.paths.root.name if self.paths is not None else self.config.name

    @property
    def buffers(self) -> list[str]:
        """HTTP addresses of the buffers: the given ones, or those in endpoint files."""
        if self.paths is None:
            return self._given
        shards = all_shards(self.config.buffer.num_shards)
        endpoints = [read_object(self.paths.endpoints / f"{shard.name}.json") for shard in shards]
        return [str(endpoint["http"]) for endpoint in endpoints if endpoint.get("http")]

    def get(self, address: str, path: str) -> dict[str, Any] | None:
        """The JSON object at a page of a buffer; None if it does not respond. Raises ConfigError."""
        return fetch_json(address, path, operator=self.operator, timeout_s=COMMAND_TIMEOUT_S)

    def statuses(self) -> list[dict[str, Any]]:
        """/status of each buffer that responds, in the order of the shards. Raises ConfigError."""
        statuses = [self.get(address, "/status") for address in self.buffers]
        return [status for status in statuses if status is not None]

    def status(self) -> dict[str, Any]:
        """The first shard's /status, with the tickets, drops and peers of all. Raises ConfigError."""
        statuses = self.statuses()
        if not statuses:
            raise self.no_response()
        return merged_status(statuses)

    def servers(self) -> set[str]:
        """Names of the rollout servers that are registered. Raises ConfigError when no buffer responds."""
        return {str(peer["name"]) for peer in self.status()["peers"] if peer.get("role") == "rollout"}

    def post(self, verb: str, body: Mapping[str, Any], *, timeout_s: float = 5.0) -> dict[str, Any]:
        """POSTs /control/<verb> to the buffers, in order, until one accepts it; returns its response.

        Raises ConfigError with the last refusal, or when no buffer responds.
        """
        error = self.no_response()
        for address in self.buffers:
            try:
                return self.post_to(address, verb, body, timeout_s=timeout_s)
            except NoResponseError:
                continue
            except ConfigError as refusal:
                error = refusal
        raise error

    def post_all(
        self, verb: str, body: Mapping[str, Any], *, timeout_s: float = 30.0
    ) -> list[dict[str, Any]]:
        """POSTs /control/<verb> to every shard's buffer; returns their responses.

        Raises ConfigError with the first refusal, or when one of them is not known or does not respond.
        """
        num_shards, addresses = self.config.buffer.num_shards, self.buffers
        if not addresses:
            raise self.no_response()
        if len(addresses) != num_shards:
            raise ConfigError(
                f"{verb}: the job has {num_shards} buffers, and {len(addresses)} are known: "
                + ("give --buffer for each" if self.paths is None else "is one of them being restarted?")
            )
        return [self.post_to(address, verb, body, timeout_s=timeout_s) for address in addresses]

    def post_to(
        self, address: str, verb: str, body: Mapping[str, Any], *, timeout_s: float
    ) -> dict[str, Any]:
        """POSTs to one buffer. Raises NoResponseError, or ConfigError if it refuses."""
        path = f"/control/{verb}"
        try:
            return post_json(address, path, dict(body), operator=self.operator, timeout_s=timeout_s)
        except OSError as error:
            raise NoResponseError(
                f"{verb}: the buffer at {address} does not respond ({error}): is its disk full? See its "
                "/status"
            ) from error

    def daemons(self, *, before: dict[str, DaemonView] | None = None) -> dict[str, DaemonView]:
        """Every daemon of the job, by name: from its own response, or else from its heartbeats at the
        buffers.

        `before`: the previous result.
        """
        if self.paths is not None:
            views = look_at_daemons(
                self.paths.endpoints, before=before, operator=self.operator, timeout_s=COMMAND_TIMEOUT_S
            )
        else:
            views = {view.name: view for view in self._given_buffers(before or {})}
        statuses = [view.status for view in views.values() if view.role == "buffer" and view.status]
        alive_s = max(_MIN_SILENCE_S, 3 * self.config.daemon.heartbeat_s)
        for peer in merged_peers(statuses):
            name = str(peer["name"])
            known = views.get(name)
            is_heard = peer.get("silent_s", 0.0) <= alive_s
            if known is None or (known.status is None and is_heard):
                views[name] = peer_view(peer, endpoint=known.endpoint if known else {}, is_heard=is_heard)
        return dict(sorted(views.items()))

    def no_response(self) -> ConfigError:
        """The error when no buffer responds."""
        return ConfigError(f"{self.name}: its buffer does not respond; is the job running?")

    def _given_buffers(self, before: Mapping[str, DaemonView]) -> Iterable[DaemonView]:
        by_address = {view.endpoint.get("http"): view for view in before.values()}
        names = [shard.name for shard in all_shards(self.config.buffer.num_shards)]
        for index, address in enumerate(self._given):
            known = by_address.get(address)
            default = names[index] if index < len(names) else f"buffer at {address}"
            view = look_at_daemon(
                known.name if known else default,
                {"role": "buffer", "http": address},
                known=known,
                operator=self.operator,
                timeout_s=COMMAND_TIMEOUT_S,
            )
            yield dataclasses.replace(view, name=str((view.status or {}).get("name") or view.name))


def peer_view(
    peer: Mapping[str, Any], *, endpoint: Mapping[str, Any] | None = None, is_heard: bool = True
) -> DaemonView:
    """A daemon from its entry in the buffer's /status, as if it had responded with the numbers of its
    heartbeat.

    `is_heard`: False if the buffer does not hear from it either; its status is then None.
    """
    status = {
        **(peer.get("stats") or {}),
        **{key: value for key, value in peer.items() if key not in ("stats", "waits")},
        "not_ready": "" if peer.get("state") != "starting" else "starting",
        "waiting_on": peer.get("waits") or {},
    }
    if (quarantine := peer.get("quarantine")) is not None:
        status["not_ready"] = f"quarantine: {quarantine.get('reason', '')}"
    own = {"role": str(peer.get("role", "?")), "http": str(peer.get("http", ""))}
    return DaemonView(
        name=str(peer["name"]),
        endpoint=own | dict(endpoint or {}),
        status=status if is_heard else None,
        seen_s=time.monotonic() - peer.get("silent_s", 0.0),
    )


def _config_from(addresses: Sequence[str], operator: Operator) -> Config:
    """The settings that the first responding buffer serves."""
    for address in addresses:
        status = fetch_json(address, "/status", operator=operator, timeout_s=COMMAND_TIMEOUT_S)
        if status is None:
            continue
        if status.get("role") != "buffer":
            raise ConfigError(
                f"--buffer {address}: this is {status.get('name', 'a daemon')}: give a buffer's address"
            )
        settings = fetch_json(address, "/config", operator=operator, timeout_s=COMMAND_TIMEOUT_S)
        if settings is None:
            raise ConfigError(
                f"--buffer {address}: it does not serve /config: was it started by an earlier release?"
            )
        try:
            return from_mapping(settings)
        except ConfigError as error:
            raise ConfigError(
                f"--buffer {address}: this release cannot read the job's settings ({error}): use the job's"
            ) from None
    raise ConfigError(
        f"no buffer responds at {', '.join(addresses)}: give the address of its HTTP server (`http` in "
        "endpoints/buffer.json), not that of its stream; with TLS also --tls-certificate"
    )
