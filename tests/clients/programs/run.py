"""Claims a session, runs a program of this directory in it, posts a reward and ends the session.

    python run.py URL PROGRAM [ARGUMENT ...]

Prints the session's group and the answer of the program's `run`. The program learns the session's address and
key as most programs do, from the environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from areal_like_client import claim

if __name__ == "__main__":
    url, program, *arguments = sys.argv[1:]
    session = claim(url, wait_s=60, name=program)
    assert session is not None, "no sample is wanted"
    os.environ["OPENAI_BASE_URL"] = os.environ["OPENAI_API_BASE"] = session.base_url
    os.environ["ANTHROPIC_BASE_URL"] = session.anthropic_base_url
    os.environ["OPENAI_API_KEY"] = os.environ["ANTHROPIC_API_KEY"] = session.api_key
    with session.heartbeats():  # some packages take a minute to import on a busy machine
        answer = importlib.import_module(program).run(*arguments)
    session.reward(1.0)
    assert session.end(), "there is no sample"
    print(json.dumps({"group": session.group, "answer": answer}))
