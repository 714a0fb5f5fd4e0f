"""The options of an embedded engine: one dataclass, given as data or on a command line.

    a server   ProcessOptions -> JSON -> a pipe -> `python -m rollout_server.engine --options /dev/fd/N`
    a person   `python -m rollout_server.engine --model-path PATH --api-key-file FILE ...`

Types, bounds, choices and texts of --help are those of the fields, as in areal_like/config/. Command-line
options have the same names as those of `sglang.launch_server`. The API key is read from a file, because every
user of the machine can read command lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from areal_like.config import RolloutConfig
from areal_like.config.arguments import add_arguments
from areal_like.config.common import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, Section, require
from areal_like.config.loading import build
from areal_like.errors import ConfigError
from areal_like.security.tokens import read_secret


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Section):
    """Sizes of the engine."""

    max_running_requests: PositiveInt = RolloutConfig.max_running
    """Sequences decoded at the same time (KV rows)."""
    context_length: PositiveInt = 1024
    """Longest sequence, prompt and output, in tokens."""
    max_prefill_tokens: PositiveInt = 8192
    """Context tokens computed before a decode step."""
    prefix_cache_tokens: NonNegativeInt = 16384
    """Tokens of prompts kept for the other samples of their groups; 0: none. A recurrent state, and
    the routes of tokens, count as the tokens whose KV takes as much memory."""
    conversation_cache_tokens: int | None = None
    """Tokens whose KV is kept for the next turns of conversations, allocated as they are needed; 0: none;
    not given: as many as the rows hold. States and routes count as in `prefix_cache_tokens`."""
    enable_return_routed_experts: bool = False
    """Record which experts are chosen for each token, for requests with `return_routed_experts`."""
    max_adapters: NonNegativeInt = 0
    """Versions of a LoRA adapter that sequences can use at the same time; 0: the engine takes whole weights
    only."""
    random_seed: int = 0
    """Seed of sequences that have none of their own."""

    def kept_tokens(self, state_tokens: int) -> int:
        """The resolved `conversation_cache_tokens`. `state_tokens`: what a recurrent state counts as; 0 for a
        model without."""
        tokens = self.conversation_cache_tokens
        return self.max_running_requests * (self.context_length + state_tokens) if tokens is None else tokens

    def check(self) -> None:
        tokens = self.conversation_cache_tokens
        require(tokens is None or tokens >= 0, "conversation_cache_tokens must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(EngineOptions):
    """All options of an engine's process."""

    model_path: str
    """Hugging Face directory or name."""
    api_key: str = field(repr=False)
    """The key that requests need (Authorization: Bearer KEY); on the command line `--api-key-file`."""
    port: Annotated[int, Bounds(0, 65535)] = 30000
    """Port on 127.0.0.1; 0 picks a free one."""
    port_file: str = ""
    """File to which the port is written once the engine accepts requests."""
    device: str = RolloutConfig.engine_device
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """Type of weights and KV."""
    enable_fp32_lm_head: bool = False
    """Compute the logits in float32."""
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to which the products of a mixture's routers are rounded, as `model.router_dtype`."""
    weights_from: tuple[str, ...] = ()
    """Directory that /update_weights_from_disk may load from, in addition to `model_path`; repeatable."""
    weight_version: str = "default"
    """Version of the weights at `model_path`."""
    num_threads: PositiveInt = 1
    """CPU threads of the forward pass."""
    max_threads: NonNegativeInt = 0
    """CPU threads of the forward pass while other cores are idle; 0: as many as `num_threads`."""
    stream_interval: NonNegativeInt = 0
    """Tokens between streamed chunks; 0: only the end of each sequence."""
    max_body_bytes: PositiveInt = 64 << 20
    """Longest request body."""
    max_connections: PositiveInt = 1024
    """Connections above which idle ones are closed."""
    weights_timeout_s: PositiveFloat = 60.0
    """Time limit of joining a weight group and of one broadcast, in seconds, where a request sets none."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the log."""

    def to_json(self) -> str:
        """Serializes the options for another process, including the API key."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_command_line(cls, argv: Sequence[str]) -> ProcessOptions:
        """Parses a command line, or the output of `to_json` in the file of `--options FILE`.

        Raises ConfigError for a wrong value or key file. An unknown or missing option exits with code 2.
        """
        if len(argv) == 2 and argv[0] == "--options":
            return build(cls, json.loads(Path(argv[1]).read_text()))
        parser = argparse.ArgumentParser(
            prog="python -m rollout_server.engine",
            description="One embedded inference engine, as a process.",
            epilog="A rollout server gives all options as JSON instead: --options FILE.",
        )
        parser.add_argument(
            "--api-key-file",
            required=True,
            metavar="FILE",
            help="File of mode 600 with the key that requests need (Authorization: Bearer KEY).",
        )
        add_arguments(parser, cls, leaves_out=["api_key"])
        given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
        file = given.pop("api_key_file")
        try:
            return build(cls, given | {"api_key": read_secret(Path(file))})
        except FileNotFoundError:
            raise ConfigError(f"--api-key-file {file}: no such file") from None
