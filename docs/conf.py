"""Sphinx configuration of the documentation site: `make docs` builds it, with every warning an error.

The tables of settings and the help of the commands are generated at build time, from the configuration's
dataclasses and the parsers of `areal-like`, so they cannot differ from the code. After the build every page
is checked for scripts, style sheets, fonts and images that a browser would load from the network: the
site must be readable without one.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.cli import COMMANDS, overview, parser_of  # noqa: E402
from launch.settings_help import all_keys  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "areal-like"
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "areal-like"
html_static_path = ["static"]
html_css_files = ["code.css"]
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def settings_tables() -> str:
    """Markdown: a heading and a table for each section of the configuration, in their own order."""
    sections: dict[str, list[str]] = {}
    for setting in all_keys():
        key, kind = setting.key, setting.type
        cells = (
            f"`{key}`",
            f"`{kind}`" if kind else "",
            f"`{setting.default}`" if setting.default else "(empty)",
        )
        row = "".join(f"| {cell.replace('|', chr(92) + '|')} " for cell in (*cells, setting.text))
        sections.setdefault(key.rpartition(".")[0], []).append(f"{row}|")
    lines = []
    for section, rows in sections.items():
        lines += [f"## `{section}`" if section else "## The job", ""]
        lines += ["| key | type or choices | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def overview_of_commands() -> str:
    """Markdown: the output of `areal-like --help` as a code block."""
    return f"```text\n{overview().strip()}\n```"


def commands() -> str:
    """Markdown: a heading for each verb, and the output of `areal-like VERB --help` as a code block."""
    with mock.patch.dict(os.environ, COLUMNS="92"):  # the width of the text
        helps = [(verb, parser_of(verb).format_help().strip()) for verb in COMMANDS]
    return "\n\n".join(f"### {verb}\n\n```text\n{text}\n```" for verb, text in helps)


GENERATED = {
    "<!-- settings -->": settings_tables,
    "<!-- overview -->": overview_of_commands,
    "<!-- commands -->": commands,
}
"""Comment in a page -> the Markdown that replaces it."""

_REMOTE = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//[^"']*"""
    r"""|<link\b[^>]*\brel=["'](?:stylesheet|preconnect|preload)["'][^>]*\bhref=["'](?:https?:)?//[^"']*"""
    r"""|url\(["']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*"""
)
"""Whatever makes a browser load something from another host. Plain links to follow are fine."""


def remote_resources(site: Path) -> list[str]:
    """`page: tag` for everything in a built site that is loaded from the network."""
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    return [
        f"{page.relative_to(site)}: {found}" for page in pages for found in _REMOTE.findall(page.read_text())
    ]


def _fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    for comment, generate in GENERATED.items():
        if comment in source[0]:
            source[0] = source[0].replace(comment, generate())


def _check_site(app: Sphinx, exception: Exception | None) -> None:
    from sphinx.errors import SphinxError

    found = remote_resources(Path(app.outdir)) if exception is None else []
    if found:
        raise SphinxError("the site would load from the network:\n" + "\n".join(found))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    from sphinx.search.en import SearchEnglish

    class Search(SearchEnglish):
        """Sphinx's English search, which also finds the verbs among its stop words, such as `why`."""

        stopwords = SearchEnglish.stopwords - set(COMMANDS)

    app.add_search_language(Search)
    app.connect("source-read", _fill_in)
    app.connect("build-finished", _check_site)
