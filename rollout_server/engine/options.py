"""The options of an embedded engine, given as data or on a command line generated from the same fields.

    a server   ProcessOptions -> JSON -> a pipe -> `python -m rollout_server.engine --options /dev/fd/N`
    a person   `python -m rollout_server.engine --model-path PATH --api-key-file FILE ...`

Command-line options have the same names as those of `sglang.launch_server`. The API key is read from a file,
because every user of the machine can read command lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError
from areal_like.security.tokens import read_secret


def _option(
    help: str, *, default: Any = MISSING, least: int | None = None, choices: Sequence[str] = ()
) -> Any:
    """Makes a field. `least`: smallest allowed integer. `choices`: allowed strings."""
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes of the engine."""

    max_running_requests: int = _option("sequences decoded at a time (KV rows)", default=128, least=1)
    context_length: int = _option("longest sequence, prompt and output, in tokens", default=1024, least=1)
    max_prefill_tokens: int = _option("context tokens computed before a decode step", default=8192, least=1)
    prefix_cache_tokens: int = _option(
        "tokens of prompts kept for the other samples of their groups; 0: none", default=16384, least=0
    )
    conversation_cache_tokens: int | None = _option(
        "tokens whose KV is kept for the next turns of conversations, allocated as they are needed; 0: none; "
        "default: as many as the rows hold",
        default=None,
        least=0,
    )
    random_seed: int = _option("seed of sequences that have none of their own", default=0)


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(EngineOptions):
    """All options of an engine's process."""

    model_path: str = _option("Hugging Face directory or name")
    api_key: str = field(repr=False)
    """The key that requests need (Authorization: Bearer KEY); on the command line `--api-key-file`."""
    port: int = _option("port on 127.0.0.1; 0 picks a free one", default=30000)
    port_file: str = _option("the port is written here once the engine accepts requests", default="")
    device: str = _option("cpu | cuda | cuda:N", default="cpu")
    dtype: str = _option(
        "type of weights and KV", default="float32", choices=("bfloat16", "float16", "float32")
    )
    enable_fp32_lm_head: bool = _option("compute the logits in float32", default=False)
    weights_from: tuple[str, ...] = _option(
        "directory that /update_weights_from_disk may load from, in addition to --model-path; repeatable",
        default=(),
    )
    weight_version: str = _option("version of the weights that --model-path holds", default="default")
    num_threads: int = _option("CPU threads of the forward pass", default=1, least=1)
    stream_interval: int = _option(
        "tokens between streamed chunks; 0: only the end of each sequence", default=0, least=0
    )
    max_body_bytes: int = _option("longest request body", default=64 << 20, least=1)
    max_connections: int = _option("connections above which idle ones are closed", default=1024, least=1)
    weights_timeout_s: float = _option(
        "time limit of joining a weight group and of one broadcast, where a request sets none", default=60.0
    )
    log_level: str = _option(
        "level of the log", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR")
    )

    def to_json(self) -> str:
        """Serializes the options for another process, including the API key."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProcessOptions:
        """Parses the output of `to_json`."""
        raw = json.loads(text)
        return cls(**{**raw, "weights_from": tuple(raw["weights_from"])})

    @classmethod
    def from_command_line(cls, argv: Sequence[str]) -> ProcessOptions:
        """Parses a command line; a wrong option exits with code 2. Raises ConfigError for a wrong key
        file."""
        if len(argv) == 2 and argv[0] == "--options":
            return cls.from_json(Path(argv[1]).read_text())
        given = vars(_parser().parse_args(argv))
        file = given.pop("api_key_file")
        try:
            key = read_secret(Path(file))
        except FileNotFoundError:
            raise ConfigError(f"--api-key-file {file}: no such file") from None
        return cls(api_key=key, **given | {"weights_from": tuple(given["weights_from"])})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rollout_server.engine",
        description="One embedded inference engine, as a process.",
        epilog="A rollout server gives all options as JSON instead: --options FILE.",
    )
    parser.add_argument(
        "--api-key-file",
        required=True,
        help="file of mode 600 with the key that requests need (Authorization: Bearer KEY)",
    )
    for one in fields(ProcessOptions):
        if not one.metadata:
            continue
        flag = f"--{one.name.replace('_', '-')}"
        kind = str(one.type)
        settings: dict[str, Any] = {"help": one.metadata["help"]}
        if kind == "bool":
            parser.add_argument(flag, action="store_true", **settings)
            continue
        settings |= {"required": True} if one.default is MISSING else {"default": one.default}
        if kind.startswith("int"):
            settings["type"] = _at_least(one.metadata["least"])
        elif kind == "float":
            settings["type"] = float
        elif kind.startswith("tuple"):
            settings |= {"action": "append", "metavar": "DIR", "default": []}
        if one.metadata["choices"]:
            settings["choices"] = one.metadata["choices"]
        parser.add_argument(flag, **settings)
    return parser


def _at_least(minimum: int | None) -> Callable[[str], int]:
    """Returns an argparse type: an integer of at least `minimum`."""

    def integer(text: str) -> int:
        value = int(text)
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return value

    return integer
