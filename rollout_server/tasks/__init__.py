"""Tasks: prompts and their reward functions. Read `base.py` before writing a task."""

from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.tasks.base import Completion, Example, Score, Split, Task, make_task

__all__ = [
    "Completion",
    "Environment",
    "Example",
    "Message",
    "Reply",
    "Score",
    "Split",
    "Step",
    "Task",
    "make_task",
]
