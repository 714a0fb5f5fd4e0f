"""Settings of LoRA: low-rank adapters that are trained in place of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from areal_like.config.common import Bounds, PositiveFloat, Section, require


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section, key="model.lora"):
    """Trains two small matrices A and B for each of the chosen linear layers, which then compute
    x W^T + (alpha / rank) (x A^T) B^T. The model's own weights W do not change."""

    rank: Annotated[int, Bounds(0, 4096)] = 0
    """Number of rows of A and columns of B; 0: no adapters, all weights are trained."""
    alpha: PositiveFloat = 32.0
    """The adapters' outputs are multiplied by `alpha` / `rank`."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers with an adapter: `all-linear` (every linear layer except the output head), or the last parts of
    their names, as in PEFT: [q_proj, v_proj]."""
    dropout: Annotated[float, Bounds(0, 1)] = 0.0
    """Share of the adapters' inputs that a supervised step sets to zero. Reinforcement learning needs 0: the
    probability of a token would depend on the draw."""
    path: str = ""
    """PEFT directory (`adapter_model.safetensors`, `adapter_config.json`) of the adapter to start from, for
    example a checkpoint of another run; empty: a new adapter, which does not change the model's outputs."""

    def check(self) -> None:
        require(self.dropout < 1, f"model.lora.dropout={self.dropout}: use 0 or a number below 1")
        require(
            bool(self.targets) and all(map(bool, self.targets)),
            "model.lora.targets is empty: use all-linear, or a list of names such as [q_proj, v_proj]",
        )
        require(
            not isinstance(self.targets, str) or self.targets == "all-linear",
            f"model.lora.targets={self.targets}: use all-linear, or a list such as [{self.targets}]",
        )
        for key, is_given in (("path", bool(self.path)), ("dropout", self.dropout > 0)):
            require(
                not is_given or self.rank > 0,
                f"model.lora.{key} needs a rank, and model.lora.rank is 0: set it, or leave {key} out",
            )

    @property
    def is_on(self) -> bool:
        """True if adapters are trained in place of the model."""
        return self.rank > 0
