"""Repair small repositories with tools, in a sandbox. Read `environment.py` first."""

from rollout_server.tasks.coding.task import CodingTask

__all__ = ["CodingTask"]
