"""A reward given by a language model, through any service that speaks OpenAI's chat API.

`judge.py` has the settings, `grading.py` builds the judge's prompt and parses its reply, `client.py` is the
HTTP client with retries, `cache.py` stores replies on disk.
"""

from rollout_server.rewards.library.judge.judge import Judge

__all__ = ["Judge"]
