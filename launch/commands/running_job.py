"""The addresses of a running job's buffers and rollout servers, for commands from another shell."""

from __future__ import annotations

from typing import Any

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.daemon import read_endpoint
from areal_like.shards import all_shards
from launch.observation.http_json import Operator, fetch_json, post_json


def buffer_settings(config: Config, paths: RunPaths | None, given: str) -> list[str]:
    """Settings with the addresses of a job's buffers, for a server that joins it.

    `given`: host:port of the first shard's buffer. If it is empty, `paths` (the run's directory) is needed.
    Raises ConfigError when the addresses cannot be found.
    """
    if given:
        host, _, port = given.rpartition(":")
        if not (host and port.isdecimal()):
            raise ConfigError(f"--buffer {given}: expected host:port")
        return [
            f'buffer.host="{host.strip("[]")}"',
            "buffer.advertise_host=''",
            f"buffer.port={port}",
            "buffer.ports=[]",
        ]
    if paths is None:
        raise ConfigError(
            "rollout --join: there is no buffer to join; name a running job, or give --buffer host:port"
        )
    ports = []
    for shard in all_shards(config.buffer.num_shards):
        endpoint = read_endpoint(paths.endpoints / f"{shard.name}.json")
        if endpoint is None or "stream" not in endpoint:
            raise ConfigError(
                f"rollout --join: {shard.name} of {paths.root.name} is not running: start the job first"
            )
        ports.append(str(endpoint["stream"]).rpartition(":")[2])
    return [f"buffer.ports=[{','.join(ports)}]"]


def servers_of(config: Config, paths: RunPaths) -> set[str]:
    """Names of the rollout servers that are registered with a buffer of the job.

    Raises ConfigError when no buffer answers.
    """
    operator = Operator(config.security, paths.endpoints)
    answers = [
        status
        for address in _buffers(config, paths)
        if (status := fetch_json(address, "/status", operator=operator)) is not None
    ]
    if not answers:
        raise _no_answer(paths)
    return {
        str(peer["name"])
        for status in answers
        for peer in status.get("peers", [])
        if peer.get("role") == "rollout"
    }


def ask_buffers(config: Config, paths: RunPaths, path: str, body: dict[str, Any]) -> None:
    """POSTs a request to the job's buffers, in order, until one accepts it.

    Raises ConfigError with the last refusal, or when no buffer answers.
    """
    operator = Operator(config.security, paths.endpoints)
    error = _no_answer(paths)
    for address in _buffers(config, paths):
        try:
            post_json(address, path, body, operator=operator)
            return
        except ConfigError as refusal:
            error = refusal
        except OSError:
            continue
    raise error


def _buffers(config: Config, paths: RunPaths) -> list[str]:
    """HTTP addresses of the buffers that have written one."""
    endpoints = [
        read_endpoint(paths.endpoints / f"{shard.name}.json")
        for shard in all_shards(config.buffer.num_shards)
    ]
    return [str(endpoint["http"]) for endpoint in endpoints if endpoint and endpoint.get("http")]


def _no_answer(paths: RunPaths) -> ConfigError:
    return ConfigError(f"{paths.root}: its buffer does not answer; is the job running?")
