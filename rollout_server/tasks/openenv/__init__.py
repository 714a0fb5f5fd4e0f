"""Environments of OpenEnv servers. Read `task.py` first."""

from rollout_server.tasks.openenv.task import OpenEnvTask

__all__ = ["OpenEnvTask"]
