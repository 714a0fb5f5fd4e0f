"""Tasks: prompts and their rewards. `base.py` is the one file to read before writing a task."""

from rollout_server.tasks.base import ChatMessage, Example, Split, Task, make_task

__all__ = ["ChatMessage", "Example", "Split", "Task", "make_task"]
