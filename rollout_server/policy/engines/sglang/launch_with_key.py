"""`python launch_with_key.py KEY_FILE OPTION ...` runs sglang.launch_server with an API key read from a file.

SGLang takes its key from the command line, which every user of the machine can read, and logs it. So this
script adds the option inside the process, and removes the key from log records. It runs in SGLang's own
environment and imports nothing of this project. SGLang's worker processes are spawned as if the module had
been started by `python -m`.
"""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path
from typing import Any


def redact(key: str) -> None:
    """Removes the key from all later log records of this process, whatever handlers SGLang installs."""
    make = logging.getLogRecordFactory()

    def without_key(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        text = record.getMessage()
        if key in text:
            record.msg, record.args = text.replace(key, "<API key>"), ()
        return record

    logging.setLogRecordFactory(without_key)


if __name__ == "__main__":
    api_key = Path(sys.argv[1]).read_text().strip()
    redact(api_key)
    sys.argv = ["sglang.launch_server", *sys.argv[2:], f"--api-key={api_key}"]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
