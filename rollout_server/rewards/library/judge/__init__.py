"""A reward given by a language model, through any service that speaks OpenAI's chat API.

`judge.py` has the settings, `grading.py` builds the judge's prompt and parses its reply, `client.py` asks it,
`service.py` and `cache.py` of the library send requests with retries and store replies on disk.
"""

from rollout_server.rewards.library.judge.judge import Judge

__all__ = ["Judge"]
