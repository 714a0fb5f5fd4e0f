"""The code of the guides, which tests run as it is written."""

from __future__ import annotations

import re
import textwrap

from tests.support.launching import ROOT


def code_of(page: str, name: str) -> str:
    """The block of a guide that begins with the name of its file. `page`: the guide, without suffix."""
    text = (ROOT / "docs" / "guides" / f"{page}.md").read_text()
    (code,) = re.findall(rf"^```\w+\n((?:#|//) {re.escape(name)}\n.*?)^```", text, re.M | re.S)
    return textwrap.dedent(code)
