"""Plays the tasks of a `verifiers` environment in sessions of a running job, in verifiers' own interpreter.

    python -m areal_like.agents.verifiers_runner ENV_ID --url http://127.0.0.1:7800 --model DIR

`make verifiers` builds that interpreter. A session's index is a row of the taskset; the last `--eval-rows`
rows of the taskset are the eval split. Each rollout uses the environment's own scoring and limits. Its
requests go to the session, which records tokens, log-probs and versions, and its reward is that of the trace.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.agents.session_runner import (
    Rows,
    SessionRunner,
    add_session_arguments,
    json_object,
    run_until_stopped,
)
from areal_like.client.areal_like_client import ClaimedSession
from areal_like.errors import UserError

_ROLLOUTS_PER_SERVING = 500
"""verifiers keeps a client for each endpoint until an environment stops serving, and each session has one."""


@dataclass(kw_only=True)
class Runner(SessionRunner):
    """Plays a rollout in each session."""

    env_config: Any
    client: dict[str, Any]
    """Settings of verifiers' train client."""

    async def run(self) -> None:
        """Runs until `stopping` is set; rollouts in progress are played to the end. Raises UserError."""
        slots = asyncio.Semaphore(self.concurrency)
        servings: set[asyncio.Task[None]] = set()
        while not self.stopping.is_set():
            has_claimed = asyncio.Event()
            serving = asyncio.create_task(self._serve(slots, has_claimed))
            servings.add(serving)
            serving.add_done_callback(servings.discard)
            claimed = asyncio.create_task(has_claimed.wait())
            await asyncio.wait({serving, claimed}, return_when=asyncio.FIRST_COMPLETED)
            claimed.cancel()
            if serving.done():
                await serving
        await asyncio.gather(*servings)
        if self.failure is not None:
            raise self.failure

    async def _serve(self, slots: asyncio.Semaphore, has_claimed: asyncio.Event) -> None:
        env = _loaders().load_environment(self.env_config)
        async with env.serving(), asyncio.TaskGroup() as group:
            for _ in range(_ROLLOUTS_PER_SERVING):
                await slots.acquire()
                session = await self.claim()
                if session is None:
                    slots.release()
                    break
                played = self.report(session, self._rollout(env, session))
                group.create_task(played).add_done_callback(lambda _: slots.release())
            has_claimed.set()

    async def _rollout(self, env: Any, session: ClaimedSession) -> float:
        task = self.task_of(session)
        vf = importlib.import_module("verifiers.v1")
        client = vf.TrainClientConfig(
            base_url=session.base_url,
            api_key_var="AREAL_LIKE_NO_KEY",  # the header below has the session's
            headers={"Authorization": f"Bearer {session.api_key}"},
            **self.client,
        )
        # Its requests never outlive the session, so the environment needs no limit of its own.
        episode = await env.run_slot(env.slots(task)[0], vf.ModelContext(model="policy", client=client))
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if not episode.ok:
            raise RuntimeError(f"{errors[-1].type}: {errors[-1].message}" if errors else "the rollout failed")
        if len(episode.traces) != 1:
            raise RuntimeError(f"the environment made {len(episode.traces)} traces; a session is one sample")
        return float(episode.traces[0].reward)


def _loaders() -> Any:
    return importlib.import_module("verifiers.v1.utils.loaders")


def load(env_id: str, settings: dict[str, Any], *, num_rows: int, num_eval: int) -> tuple[Any, Rows]:
    """The environment's config and its rows. Raises UserError."""
    harnesses = importlib.import_module("verifiers.v1.harnesses")
    harnesses.__path__.append(str(Path(__file__).parent / "verifiers_harnesses"))
    agent = {"harness": {"id": "in_process"}, "runtime": {"type": "subprocess"}} | settings.get("agent", {})
    taskset = {"id": env_id} | settings.get("taskset", {})
    try:
        config = _loaders().resolve_env_config(settings | {"taskset": taskset, "agent": agent})
        env = _loaders().load_environment(config)
        taskset_view = env.taskset if not num_rows else env.taskset.take(num_rows)
        if not taskset_view.bounded:
            raise UserError(f"{env_id} has an unlimited number of rows: give --rows N")
        tasks = list(taskset_view)
    except (ValueError, TypeError, AttributeError, ImportError, OSError) as error:
        raise UserError(f"{env_id}: {error}") from error
    if not tasks:
        raise UserError(f"{env_id} has no tasks")
    return config, Rows(tasks, num_eval)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("env_id", metavar="ENV", help="id of a taskset: a module that verifiers can import")
    add_session_arguments(parser)
    parser.add_argument("--model", required=True, help="directory with the tokenizer of the job's model")
    parser.add_argument(
        "--env-args",
        type=json_object,
        default={},
        metavar="JSON",
        help='verifiers\' [env], as {"taskset": {...}}',
    )
    parser.add_argument(
        "--renderer",
        type=json_object,
        default=None,
        metavar="JSON",
        help='e.g. {"name": "qwen3"}',
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGINT or SIGTERM. Returns the exit code: 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m areal_like.agents.verifiers_runner")
    add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        token = Path(args.token_file).read_text().strip() if args.token_file else ""
        config, rows = load(args.env_id, args.env_args, num_rows=args.rows, num_eval=args.eval_rows)
        if not Path(args.model, "tokenizer_config.json").is_file():
            raise UserError(f"--model={args.model} has no tokenizer_config.json: give the job's model")
        client: dict[str, Any] = {"renderer_model_name": args.model}
        if args.renderer is not None:
            client["renderer"] = args.renderer
        return asyncio.run(_run(args, token, config, rows, client))
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


async def _run(args: argparse.Namespace, token: str, config: Any, rows: Rows, client: dict[str, Any]) -> int:
    runner = Runner(
        url=args.url,
        token=token,
        ca_file=args.ca_file,
        env_config=config,
        rows=rows,
        client=client,
        concurrency=args.concurrency,
    )
    return await run_until_stopped(runner, name=args.env_id)


if __name__ == "__main__":
    sys.exit(main())
