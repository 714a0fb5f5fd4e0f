"""Serves one of `environments/` as OpenEnv's `create_app` does: serve.py NAME PORT_FILE MAX_SESSIONS.

Runs in the interpreter that has OpenEnv. A free port is written to PORT_FILE; a PORT_FILE that is a number is
the port.
"""

from __future__ import annotations

import importlib
import socket
import sys
from pathlib import Path

import uvicorn
from openenv.core.env_server import create_app

if __name__ == "__main__":
    _, name, port_file, max_sessions = sys.argv
    module = importlib.import_module(f"environments.{name}")
    app = create_app(
        module.ENVIRONMENT, module.ACTION, module.OBSERVATION, max_concurrent_envs=int(max_sessions)
    )
    # Connections wait in the socket until the server runs.
    with socket.create_server(("127.0.0.1", int(port_file) if port_file.isdigit() else 0)) as listening:
        if not port_file.isdigit():
            written = Path(f"{port_file}.new")
            written.write_text(str(listening.getsockname()[1]))
            written.rename(port_file)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
