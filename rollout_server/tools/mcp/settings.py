"""An MCP server whose tools the policy may call: a program in the sandbox, or an HTTP address.

    MCPServer(server="files", command=["/opt/files/server", "--quiet"], readable=["/opt/files"])
    MCPServer(server="search", url="https://search.example:8443/mcp", key_variable="SEARCH_KEY")

    server.py       MCPServer
    settings.py     its settings, one object for all episodes
    session.py      the server in one episode: its list of tools, calls, restarts
    connection.py   one connection, with the session of the official SDK on it
    stdio.py        its streams to a program      http.py    its HTTP client
    schemas.py      what is accepted of a tool's schema, and the check of arguments

The policy chooses a tool of those listed, and its arguments. Programs, addresses and environment variables
come from the settings alone. A server is not trusted: what it sends is bounded in bytes, number, depth and
time. A call that it fails is an error that the policy reads; a server that cannot be started, or fails more
than `max_restarts` times in an episode, fails the sample (ToolServerError).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_like.errors import ConfigError
from rollout_server.sandbox import Limits, Sandbox, make_sandbox
from rollout_server.tools.address import problem_of_address
from rollout_server.tools.tool import TOOL_NAME

_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LARGEST_DEPTH = 24
"""What the rollout server accepts of a tool, less the levels around its schema."""
_POSITIVE = (
    "start_timeout_s", "list_timeout_s", "timeout_s", "lifetime_s", "max_tools", "max_schema_bytes",
    "max_schema_depth", "max_description_chars", "max_argument_chars", "max_chars", "max_response_bytes",
    "max_calls", "memory_mb", "max_processes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MCPSettings:
    """Where a server is, and its limits."""

    server: str
    """Name of the server in messages: letters, digits, `_`, `.` and `-`."""
    command: Sequence[str] = ()
    """Program and arguments of a server on stdio, run in the sandbox. Give this or `url`."""
    url: str = ""
    """Address of a server with the streamable HTTP transport: http or https. Nothing else is connected to."""
    tools: Sequence[str] = ()
    """Names of the server's tools that the policy may call; empty: all that it lists."""
    prefix: str = ""
    """Put before the name of each tool."""
    keep: bool = False
    """Keep the program or HTTP session for later episodes of the same worker process, with its state."""
    env_allow: Sequence[str] = ()
    """Environment variables passed to the program; of all others only a fixed HOME, PATH and the like."""
    readable: Sequence[str] = ()
    """Files and directories that the program may read, besides the system and this Python."""
    key_variable: str = ""
    """Environment variable that has the key of `url`, sent as `Authorization: Bearer`; empty: no key."""
    start_timeout_s: float = 15.0
    """Time limit for the start of the program and the handshake, in seconds."""
    list_timeout_s: float = 5.0
    """Time limit for the list of tools, in seconds."""
    timeout_s: float = 10.0
    """Time limit of one call, in seconds, with a restart before it."""
    lifetime_s: float = 3600.0
    """Time after which the program is ended, in seconds, and the CPU time of each of its processes."""
    max_restarts: int = 2
    """Number of times that it is started again in an episode, after it ended or failed a call."""
    max_calls: int = 64
    """Number of calls in an episode; further ones are refused."""
    max_tools: int = 64
    """Number of tools."""
    max_schema_bytes: int = 16384
    """Size of a tool's schema as JSON, in bytes."""
    max_schema_depth: int = 16
    """Depth of a tool's schema."""
    max_description_chars: int = 4096
    """Length of a tool's description, in characters."""
    max_argument_chars: int = 65536
    """Length of a call's arguments, in characters."""
    max_chars: int = 8192
    """Length of a result, in characters; the rest is cut with a note."""
    max_response_bytes: int = 1 << 20
    """Bytes that the server may send for one request; more end the connection."""
    memory_mb: int = 1024
    """Address space of one process of the program, in MiB."""
    max_processes: int = 32
    """Number of processes and threads of the program."""
    sandbox: str = "bwrap"
    """The job's `rewards.sandbox`."""

    def __post_init__(self) -> None:
        for name in ("command", "tools", "env_allow", "readable"):
            values = getattr(self, name)
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise self._error(f"{name}={values!r}: want a list of texts")
            object.__setattr__(self, name, tuple(values))  # a list could not be hashed
        if not _LABEL.fullmatch(self.server):
            raise self._error("server: want 1 to 32 letters, digits, _, . or -")
        if bool(self.command) == bool(self.url):
            raise self._error("give either command or url")
        if self.url:
            self._check_url()
        elif self.key_variable:
            raise self._error("key_variable is for a url; pass variables to a command with env_allow")
        if self.prefix and not TOOL_NAME.fullmatch(self.prefix):
            raise self._error(f"prefix={self.prefix}: want letters, digits, _ and -")
        for name in self.env_allow:
            if not _VARIABLE.fullmatch(name):
                raise self._error(f"env_allow: {name!r} is not the name of an environment variable")
        for path in self.readable:
            if not Path(path).is_absolute() or path == "/" or ".." in Path(path).parts:
                raise self._error(f"readable: {path}: want absolute paths below /, without ..")
        if low := [name for name in _POSITIVE if not getattr(self, name) > 0]:
            raise self._error(f"{', '.join(low)} must be above 0")
        if self.max_restarts < 0 or self.max_schema_depth > _LARGEST_DEPTH:
            raise self._error(f"max_restarts is at least 0, and max_schema_depth at most {_LARGEST_DEPTH}")
        make_sandbox(self.sandbox)

    def _check_url(self) -> None:
        if problem := problem_of_address(self.url, key_variable=self.key_variable):
            raise self._error(problem)
        if self.env_allow or self.readable:
            raise self._error("env_allow and readable are for a command")

    def check(self) -> None:
        """Raises ConfigError if the sandbox, a file or a variable that the server needs is missing."""
        if self.command:
            self.make_sandbox().check()
        if missing := [path for path in self.readable if not Path(path).exists()]:
            raise self._error(f"readable: {', '.join(missing)} does not exist")
        self.variables()
        self.key()

    def make_sandbox(self) -> Sandbox:
        return make_sandbox(self.sandbox)

    @property
    def limits(self) -> Limits:
        """Returns the limits of the program."""
        return Limits(timeout_s=self.lifetime_s, memory_mb=self.memory_mb, max_processes=self.max_processes)

    def variables(self) -> dict[str, str]:
        """Returns the environment variables that the program gets. Raises ConfigError if one is not set."""
        return {name: self._variable(name) for name in self.env_allow}

    def key(self) -> str:
        """Returns the key for `url`; empty without one. Raises ConfigError if it is not set."""
        return self._variable(self.key_variable) if self.key_variable else ""

    def _variable(self, name: str) -> str:
        if not (value := os.environ.get(name, "")):
            raise self._error(f"the environment variable {name} is not set")
        return value

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"MCP server {self.server:.32}: {problem}")
