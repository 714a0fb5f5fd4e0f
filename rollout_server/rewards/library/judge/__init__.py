"""A reward that a language model gives: any service that speaks OpenAI's chat API.

`judge.py` has the settings, `prompt.py` what the judge reads, `verdict.py` how its reply is read, `client.py`
the HTTP client with retries, `cache.py` the replies on disk.
"""

from rollout_server.rewards.library.judge.judge import Judge

__all__ = ["Judge"]
