"""Runs Harbor's tasks in sessions of a running job, in Harbor's own interpreter (Python 3.12 or later).

    python -m areal_like.agents.harbor_runner TASKS --url http://127.0.0.1:7800

`make harbor` builds that interpreter. A session's index is a row of the directory's tasks, in the order of
their names. Each rollout is one of Harbor's trials: its agent works on the task in its environment with the
session as its model, and the reward is that of the task's verifier. An agent finds its model by the variables
OPENAI_BASE_URL, OPENAI_API_KEY and the like, which Harbor's agents read.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
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

_MODEL = "openai/policy"


@dataclass(kw_only=True)
class Runner(SessionRunner):
    """Runs a trial in each session."""

    agent: Mapping[str, Any]
    """Harbor's AgentConfig."""
    environment: Mapping[str, Any]
    """Harbor's EnvironmentConfig."""
    reward_key: str
    """Which of a verifier's rewards counts; empty: `reward`, or the only one."""
    trials_dir: Path | None
    """Where Harbor's records of the trials are kept; None: nowhere."""

    async def run(self) -> None:
        """Runs until `stopping` is set; trials in progress are finished. Raises UserError."""
        slots = asyncio.Semaphore(self.concurrency)
        async with asyncio.TaskGroup() as group:
            while True:
                await slots.acquire()
                session = await self.claim()
                if session is None:
                    break
                made = self.report(session, self._rollout(session))
                group.create_task(made).add_done_callback(lambda _: slots.release())
        if self.failure is not None:
            raise self.failure

    async def _rollout(self, session: ClaimedSession) -> float:
        task = self.task_of(session)
        with session.heartbeats():  # an environment may take long to build
            if self.trials_dir is not None:
                return await self._trial(task, session, self.trials_dir)
            with tempfile.TemporaryDirectory(prefix="harbor-trials-", ignore_cleanup_errors=True) as folder:
                return await self._trial(task, session, Path(folder))

    async def _trial(self, task: Path, session: ClaimedSession, folder: Path) -> float:
        configs = _module("models.trial.config")
        variables = {
            **dict.fromkeys(("OPENAI_BASE_URL", "OPENAI_API_BASE"), session.base_url),
            **dict.fromkeys(("ANTHROPIC_BASE_URL", "ANTHROPIC_API_BASE"), session.anthropic_base_url),
            **dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY"), session.api_key),
        }
        agent = {"model_name": _MODEL, **self.agent, "env": {**self.agent.get("env", {}), **variables}}
        config = configs.TrialConfig(
            task=configs.TaskConfig(path=task),
            trials_dir=folder,
            agent=configs.AgentConfig(**agent),
            environment=configs.EnvironmentConfig(**self.environment),
        )
        try:
            trial = await _module("trial.trial").Trial.create(config)
            result = await trial.run()
        except SystemExit as error:  # Harbor's checks of the machine
            raise RuntimeError(str(error)) from None
        return self._reward(result)

    def _reward(self, result: Any) -> float:
        """Returns a trial's reward. One that was not valid to Harbor fails the rollout."""
        if not result.reward_valid:
            raised = result.recorded_exceptions()
            why = f"{raised[-1].exception_type}: {raised[-1].exception_message}" if raised else "no rewards"
            raise RuntimeError(f"the trial has no valid reward ({why})")
        rewards = result.verifier_result.rewards
        key = self.reward_key or ("reward" if "reward" in rewards else next(iter(rewards)))
        if key not in rewards or (key != "reward" and not self.reward_key and len(rewards) > 1):
            raise UserError(f"the verifier's rewards are {', '.join(rewards):.200}: choose one with --reward")
        return float(rewards[key])


def _module(name: str) -> Any:
    return importlib.import_module(f"harbor.{name}")


def tasks_of(directory: Path, *, num_rows: int) -> list[Path]:
    """Returns the directories of Harbor's tasks in a directory. Raises UserError."""
    tasks = sorted(path.parent for path in directory.glob("*/task.toml"))
    if not tasks:
        raise UserError(f"{directory}: no directory in it has a task.toml")
    return tasks[: num_rows or None]


def check(agent: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Raises UserError if these are no settings of Harbor, or the machine has no such environment."""
    configs = _module("models.trial.config")
    for option, kind, given in (
        ("--agent", configs.AgentConfig, agent),
        ("--environment", configs.EnvironmentConfig, environment),
    ):
        if unknown := sorted(set(given) - set(kind.model_fields)):
            known = ", ".join(kind.model_fields)
            raise UserError(f"{option}: Harbor has no {', '.join(unknown)}; it has {known}")
        try:
            kind(**given)
        except ValueError as error:
            raise UserError(f"{option}: {error}") from None
    of_harbor = configs.EnvironmentConfig(**environment)
    try:
        _module("environments.factory").EnvironmentFactory.run_preflight(
            type=of_harbor.type, import_path=of_harbor.import_path
        )
    except (SystemExit, ImportError, ValueError, AttributeError) as error:
        raise UserError(f"--environment: {error}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASKS", type=Path, help="directory whose directories are tasks")
    add_session_arguments(parser)
    parser.add_argument(
        "--agent",
        type=json_object,
        default={"name": "terminus-2"},
        metavar="JSON",
        help='Harbor\'s AgentConfig, as {"name": "terminus-2", "kwargs": {...}}',
    )
    parser.add_argument(
        "--environment",
        type=json_object,
        default={},
        metavar="JSON",
        help='Harbor\'s EnvironmentConfig, as {"type": "docker"}, the default',
    )
    parser.add_argument("--reward", default="", help="which of a verifier's rewards counts")
    parser.add_argument("--trials-dir", type=Path, default=None, help="keep Harbor's records of trials here")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGINT or SIGTERM. Returns the exit code: 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m areal_like.agents.harbor_runner")
    add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    os.environ.setdefault("HARBOR_TELEMETRY", "0")
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # a download at each start otherwise
    try:
        token = Path(args.token_file).read_text().strip() if args.token_file else ""
        rows = Rows(tasks_of(args.tasks, num_rows=args.rows), args.eval_rows)
        check(args.agent, args.environment)
        logging.getLogger("harbor.utils.logger").setLevel(logging.WARNING)  # it has set DEBUG
        return asyncio.run(_run(args, token, rows))
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


async def _run(args: argparse.Namespace, token: str, rows: Rows) -> int:
    runner = Runner(
        url=args.url,
        token=token,
        ca_file=args.ca_file,
        rows=rows,
        concurrency=args.concurrency,
        agent=args.agent,
        environment=args.environment,
        reward_key=args.reward,
        trials_dir=args.trials_dir,
    )
    return await run_until_stopped(runner, name=str(args.tasks))


if __name__ == "__main__":
    sys.exit(main())
