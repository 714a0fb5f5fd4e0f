"""An external agent: claims sessions of a running job, adds (adding_agents.py), posts the reward.

    python -m benchmarks.outside_agent http://127.0.0.1:8321 [--concurrent 16] [--api responses]

The job has `task.external=true`. The agent waits for the server, and ends with the job, or when no server has
responded for 30 s.
"""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from openai import APIConnectionError, APIError

from areal_like.client.areal_like_client import (
    ClaimedSession,
    JobOverError,
    SessionOverError,
    UnreachableError,
    claim,
)
from benchmarks.adding_agents import RefusedTurnError, add_with
from benchmarks.conversations import CONVERSATIONS
from rollout_server.agents.base import Session

START_S = 180.0
"""The tiny model is warm-started first."""
WAIT_S = 20.0
RESTART_S = 30.0


def main() -> None:
    """Runs until the job is over, and prints the number of sessions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--api", choices=CONVERSATIONS, default="chat")
    args = parser.parse_args()
    print(asyncio.run(serve(args.url, api=args.api, concurrent=args.concurrent)), "sessions", flush=True)


async def serve(url: str, *, api: str, concurrent: int) -> int:
    """Works on sessions; returns the number of sessions that ended."""
    # A claim waits in a thread, and asyncio's own executor has only a few.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(concurrent))
    await listening(url)
    return sum(await asyncio.gather(*(work(url, api=api) for _ in range(concurrent))))


async def listening(url: str) -> None:
    """Waits until the server accepts connections. Raises TimeoutError after START_S."""
    address = urlsplit(url)
    async with asyncio.timeout(START_S):
        while True:
            try:
                _, writer = await asyncio.open_connection(address.hostname, address.port)
            except OSError:
                await asyncio.sleep(0.2)
            else:
                writer.close()
                return


async def work(url: str, *, api: str) -> int:
    """Works on one session after the other."""
    num_sessions = 0
    while True:
        try:
            session = await asyncio.to_thread(claim, url, wait_s=WAIT_S, restart_s=RESTART_S)
        except (JobOverError, UnreachableError):
            return num_sessions
        if session is None:
            continue
        try:
            await solve(session, api=api)
            num_sessions += 1
        except JobOverError:
            return num_sessions
        except (SessionOverError, UnreachableError):  # its sample is not wanted any more, or its server died
            continue


async def solve(session: ClaimedSession, *, api: str) -> None:
    """Makes one sample. Raises SessionOverError, UnreachableError."""
    try:
        given = Session(base_url=session.base_url, api_key=session.api_key)
        answer = await add_with(api, session.example["prompt"], given)
    except (APIConnectionError, OSError, EOFError) as error:  # no fault of the policy: it gets no reward
        raise UnreachableError(str(error)) from error
    except (APIError, RefusedTurnError):  # no room for another turn, or the sample is not wanted any more
        answer = ""
    await asyncio.to_thread(session.reward, float(answer == session.example["answer"]))
    await asyncio.to_thread(session.end)


if __name__ == "__main__":
    main()
