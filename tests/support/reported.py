"""What a LeaseRunner reports, in place of a server's clients of the buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_server.leases.held_leases import Place, SampleResult


@dataclass
class Reported:
    """The part of a ShardedBufferClient that a LeaseRunner uses."""

    results: list[SampleResult] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    """Of all samples, in the order of their moves."""

    def deliver(self, result: SampleResult) -> None:
        self.results.append(result)

    def moved(self, lease_id: int, sample_index: int, place: Place) -> None:
        self.places.append(place)
