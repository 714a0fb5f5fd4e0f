"""Settings of the score servers: processes that hold the reward model of `task.reward: model`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from areal_like.config.common import Bounds, NonNegativeInt, PositiveInt, Section, check_device, require

MAX_SCORERS = 64
"""Maximum number of score servers of one job."""


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(Section, key="scorer"):
    """The job's own score servers; none without `scorer.path`. What a score becomes is in `task.reward`."""

    path: str = ""
    """Hugging Face directory of a reward model: a sequence classifier with one label, in safetensors, with
    its tokenizer. `areal-like run` and `submit` then start score servers for `task.reward: model`. Empty:
    none."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reward model's chat template: those with which it was trained
    (`model.chat_template_kwargs` of its run)."""
    num_servers: Annotated[int, Bounds(1, MAX_SCORERS)] = 1
    """Number of score servers; each holds the whole model."""
    device: str = "cpu"
    """Device of the model: `cpu`, `cuda` or `cuda:N`; `{index}` is replaced by the server's number."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; `auto`: float32 on a CPU, bfloat16 on a GPU."""
    max_length: NonNegativeInt = 0
    """Longest text that is scored, in tokens, prompt included; longer ones are refused. 0: the model's
    context."""
    max_batch_tokens: PositiveInt = 16384
    """Tokens of one forward pass, padding included. A longer text has a pass of its own."""
    max_waiting: PositiveInt = 4096
    """Texts that may wait in one server; more are refused with HTTP status 503, and sent again later."""
    num_threads: PositiveInt = 1
    """CPU threads of one server's model."""
    host: str = "127.0.0.1"
    """Address that the score server binds. Other machines need `security.keys`."""
    port: int = 0
    """Port of server 0, server i adds i; 0: free ones."""
    advertise_host: str = ""
    """Host at which rollout servers reach the score servers; empty: `scorer.host`."""

    def device_of(self, index: int) -> str:
        """The device of the server with this number."""
        return self.device.replace("{index}", str(index))

    def check(self) -> None:
        check_device(self.device_of(0), key="scorer.device")
        require(bool(self.host), "scorer.host is empty: give an address to bind, e.g. 127.0.0.1")
        require(
            self.port == 0 or 1024 <= self.port <= 65535 - MAX_SCORERS,
            f"scorer.port={self.port}: use 1024..{65535 - MAX_SCORERS}, or 0 for free ports",
        )
