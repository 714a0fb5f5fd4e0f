"""A server of tools written with the official SDK: `python mcp_good.py` serves stdio."""

from __future__ import annotations

import os

from mcp.server import MCPServer
from mcp_types import ImageContent

server = MCPServer("good")
_notes: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


@server.tool()
def note(text: str) -> str:
    """Keeps a text; returns all that it has kept."""
    _notes.append(text)
    return " ".join(_notes)


@server.tool()
def variables() -> str:
    """Returns the names of its environment variables."""
    return " ".join(sorted(os.environ))


@server.tool()
def picture() -> ImageContent:
    """Draws a picture."""
    return ImageContent(type="image", data="AAAA", mime_type="image/png")


@server.tool()
def fail() -> str:
    """Always fails."""
    raise ValueError("nothing here")


if __name__ == "__main__":
    server.run()
