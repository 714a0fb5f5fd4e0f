"""Settings of distillation: which teacher scores which samples, and how its log-probs are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from areal_like.config.common import NonNegativeFloat, PositiveFloat, PositiveInt, Section, require

DEFAULT = "default"
"""Key of the teacher of every label that has none of its own."""
_SCHEMES = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section, key="distill"):
    """Teachers, which score the tokens that the policy has sampled.

    With `objective=distill` the policy learns from them alone. With another objective their term is added to
    the advantage of each token, which the task's rewards determine otherwise.
    """

    teachers: dict[str, Any] = field(default_factory=dict)
    """Label of a task, or `default` for all others -> its teacher: a Hugging Face directory or name, which
    the trainer loads; or `http(s)://host:port` of a server that returns the log-probs of a prompt (SGLang, or
    the embedded engine), or a list of such servers. Samples of a label without a teacher have no such term.
    All teachers need the policy's vocabulary."""
    coef: PositiveFloat = 1.0
    """Weight of the term, -log(policy / teacher) of the token, in the advantage, or of the KL in the loss."""
    loss: Literal["sampled", "full"] = "sampled"
    """`sampled`: the term in the advantage, from the token that was sampled. `full`: the KL over the whole
    vocabulary at each token is added to the loss instead, for teachers in the trainer. It has less variance
    and no importance weight, and each micro-batch keeps the teachers' log-probs of the vocabulary: 4 bytes
    for each sampled token and entry."""
    api_key_file: str = ""
    """File with the key of the teachers' servers, readable by its owner only; empty: they need none."""
    ca_file: str = ""
    """PEM file with the certificates that verify https servers; empty: those of the system."""
    timeout_s: PositiveFloat = 60.0
    """Time limit of one request to a server, in seconds."""
    retry_s: NonNegativeFloat = 120.0
    """Time for which a request that failed is repeated, at the next server of its list, in seconds. After it
    the sample counts as failed (`buffer.on_failure.teacher`)."""
    max_requests: PositiveInt = 32
    """Requests that a rollout server has at one teacher's server at the same time; others wait."""

    def check(self) -> None:
        require(
            self.loss == "sampled" or not self.servers,
            "distill.loss=full needs the teachers' log-probs of the whole vocabulary, and servers return "
            "those of the sampled tokens: set distill.loss=sampled, or give directories",
        )
        for label, value in self.teachers.items():
            places = value if isinstance(value, (list, tuple)) else [value]
            texts = [place for place in places if isinstance(place, str) and place]
            are_servers = [place.startswith(_SCHEMES) for place in texts]
            # Not repeated in the message, because each failure of a teacher names its address.
            require(
                not any("@" in place.split("/")[2] for place in texts if place.startswith(_SCHEMES)),
                f"distill.teachers.{label}: a user name or password does not belong into an address: put the "
                "key into a file of mode 600 and name it with distill.api_key_file",
            )
            require(
                isinstance(label, str)
                and 0 < len(texts) == len(places)
                and (not isinstance(value, (list, tuple)) or all(are_servers)),
                f"distill.teachers.{label}={value!r}: give a directory, http(s)://host:port, or a list of "
                "such addresses",
            )
        require(
            bool(self.servers) or not (self.api_key_file or self.ca_file),
            "distill.api_key_file and distill.ca_file are for teachers at servers, and distill.teachers "
            "names none: remove them",
        )

    @property
    def models(self) -> dict[str, str]:
        """Label -> directory or name, of the teachers that the trainer loads."""
        return {label: value for label, value in self.teachers.items() if not _is_at_server(value)}

    @property
    def servers(self) -> dict[str, tuple[str, ...]]:
        """Label -> addresses, of the teachers at servers."""
        return {
            label: (value,) if isinstance(value, str) else tuple(value)
            for label, value in self.teachers.items()
            if _is_at_server(value)
        }

    @property
    def longest_s(self) -> float:
        """Longest time from the first request for a sample to its failure, in seconds."""
        return self.retry_s + self.timeout_s

    def teacher_of(self, label: str) -> str:
        """The key in `teachers` for a sample with this label; empty: it has no teacher."""
        if label in self.teachers and label:
            return label
        return DEFAULT if DEFAULT in self.teachers else ""


def _is_at_server(value: Any) -> bool:
    return not isinstance(value, str) or value.startswith(_SCHEMES)
