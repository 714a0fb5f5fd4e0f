"""Tasks: prompts and their reward functions. Read `base.py` before writing a task."""

from rollout_server.tasks.base import ChatMessage, Example, Split, Task, make_task

__all__ = ["ChatMessage", "Example", "Split", "Task", "make_task"]
