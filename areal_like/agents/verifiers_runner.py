"""Plays the tasks of a `verifiers` environment in sessions of a running job, in verifiers' own interpreter.

    python -m areal_like.agents.verifiers_runner ENV_ID --url http://127.0.0.1:7800 --model DIR

`make verifiers` builds that interpreter. A session's index is a row of the taskset; the last `--eval-rows`
rows of the taskset are the eval split. Each rollout uses the environment's own scoring and limits. Its
requests go to the session, which records tokens, log-probs and versions, and its reward is that of the trace.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from areal_like.client.areal_like_client import (
    ClaimedSession,
    ClientError,
    JobOverError,
    RefusedError,
    SessionOverError,
    claim,
)
from areal_like.errors import UserError

_LOG = logging.getLogger("areal_like.agents.verifiers")
_WAIT_S = 5.0
"""Longest wait of one claim, which also bounds how long a stop takes."""
_UNREACHABLE_S = 2.0
_ROLLOUTS_PER_SERVING = 500
"""verifiers keeps a client for each endpoint until an environment stops serving, and each session has one."""
_TRIES = 30


@dataclass(frozen=True)
class TasksetRows:
    """The tasks of an environment by split and index."""

    tasks: Sequence[Any]
    num_eval: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_eval < len(self.tasks):
            raise UserError(
                f"--eval-rows={self.num_eval}: the environment has {len(self.tasks)} rows; "
                "leave at least one of them for training"
            )

    def task(self, split: str, index: int) -> Any:
        """The task of one row. Raises UserError if there is none: other sessions would fail too."""
        num_train = len(self.tasks) - self.num_eval
        rows = self.tasks[num_train:] if split == "eval" else self.tasks[:num_train]
        if not 0 <= index < len(rows):
            setting = "task.num_eval" if split == "eval" else "task.num_train"
            raise UserError(
                f"the job asks for row {index} of the split {split}, which has {len(rows)} rows: start the "
                f"job with {setting}={len(rows)}" + (", or give --eval-rows" if split == "eval" else "")
            )
        return rows[index]


@dataclass(kw_only=True)
class Runner:
    """Claims sessions and plays a rollout in each, `concurrency` at a time."""

    url: str
    token: str = field(repr=False)
    ca_file: str
    env_config: Any
    rows: TasksetRows
    client: dict[str, Any]
    """Settings of verifiers' train client."""
    concurrency: int
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    num_done: int = 0
    num_failed: int = 0
    _failure: UserError | None = None

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
        if self._failure is not None:
            raise self._failure

    async def _serve(self, slots: asyncio.Semaphore, has_claimed: asyncio.Event) -> None:
        env = _loaders().load_environment(self.env_config)
        async with env.serving(), asyncio.TaskGroup() as group:
            for _ in range(_ROLLOUTS_PER_SERVING):
                await slots.acquire()
                session = await self._claim()
                if session is None:
                    slots.release()
                    break
                group.create_task(self._play(env, session)).add_done_callback(lambda _: slots.release())
            has_claimed.set()

    async def _claim(self) -> ClaimedSession | None:
        """The next session; None when stopping."""
        failures = 0
        while not self.stopping.is_set():
            try:
                session = await asyncio.to_thread(
                    claim, self.url, token=self.token, wait_s=_WAIT_S, ca_file=self.ca_file
                )
            except RefusedError as error:
                self._fail(UserError(str(error)))
            except JobOverError:
                self.stopping.set()
            except OSError as error:
                failures += 1
                if failures == _TRIES:
                    self._fail(UserError(f"{self.url}: no response after {_TRIES} tries ({error})"))
                elif failures == 1:
                    _LOG.warning("%s: %s; trying again", self.url, error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), _UNREACHABLE_S)
            else:
                failures = 0
                if session is not None:
                    return session
        return None

    def _fail(self, error: UserError) -> None:
        self._failure = self._failure or error
        self.stopping.set()

    async def _play(self, env: Any, session: ClaimedSession) -> None:
        problem = ""
        try:
            task = self.rows.task(str(session.example["split"]), int(session.example["index"]))
            reward = await self._rollout(env, task, session)
            await asyncio.to_thread(session.reward, reward)
        except (UserError, RefusedError) as error:
            self._fail(UserError(str(error)))
            problem = str(error)
        except SessionOverError as error:
            problem = str(error)
        except Exception as error:  # a rollout fails alone
            problem = f"{type(error).__name__}: {error}"
        try:
            await asyncio.to_thread(session.end)
        except ClientError as error:
            problem = problem or str(error)
        self.num_done += not problem
        self.num_failed += bool(problem)
        if problem:
            _LOG.warning("session %s: %s", session.id, problem[:500])

    async def _rollout(self, env: Any, task: Any, session: ClaimedSession) -> float:
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


def load(env_id: str, settings: dict[str, Any], *, num_rows: int, num_eval: int) -> tuple[Any, TasksetRows]:
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
    return config, TasksetRows(tasks, num_eval)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_object.__name__ = "JSON object"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "number above 0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("env_id", metavar="ENV", help="id of a taskset: a module that verifiers can import")
    parser.add_argument("--url", required=True, help="base URL of a rollout server's sessions")
    parser.add_argument("--model", required=True, help="directory with the tokenizer of the job's model")
    parser.add_argument(
        "--env-args",
        type=_object,
        default={},
        metavar="JSON",
        help='verifiers\' [env], as {"taskset": {...}}',
    )
    parser.add_argument(
        "--renderer",
        type=_object,
        default=None,
        metavar="JSON",
        help='e.g. {"name": "qwen3"}',
    )
    parser.add_argument("--concurrency", type=_positive, default=16, metavar="N", help="rollouts at a time")
    parser.add_argument("--rows", type=_positive, default=0, metavar="N", help="the first N rows only")
    parser.add_argument("--eval-rows", type=int, default=0, metavar="N", help="the last N rows: split eval")
    parser.add_argument("--token-file", default="", help="token of role agent, if the job has keys")
    parser.add_argument("--ca-file", default="", help="PEM file of the certificate's authority")


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


async def _run(
    args: argparse.Namespace, token: str, config: Any, rows: TasksetRows, client: dict[str, Any]
) -> int:
    runner = Runner(
        url=args.url,
        token=token,
        ca_file=args.ca_file,
        env_config=config,
        rows=rows,
        client=client,
        concurrency=args.concurrency,
    )
    for stop in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stop, runner.stopping.set)
    sys.stdout.write(
        f"{args.env_id}: {len(rows.tasks) - rows.num_eval} rows to train on, {rows.num_eval} to evaluate; "
        f"claiming sessions at {args.url}\n"
    )
    sys.stdout.flush()
    try:
        await runner.run()
    finally:
        sys.stdout.write(f"{runner.num_done} rollouts, {runner.num_failed} failed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
