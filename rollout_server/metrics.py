"""A server's statistics, collected once for the heartbeat, /status and /metrics.

Cumulative numbers survive a restart of the engine: they are summed over all engines that the server has
started.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

from areal_like.failures import FailureKind
from areal_like.runtime.metrics import SECONDS, Metrics
from areal_like.runtime.progress import ProgressClock
from areal_like.spans import recorder
from areal_like.trajectory import FinishReason
from rollout_server.leases.client import ShardedBufferClient
from rollout_server.leases.held_leases import Place
from rollout_server.policy.engines.supervisor import Engine, EngineSupervisor
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.sample.lease_runner import LeaseRunner
from rollout_server.sessions.book import WRONG_ROUTES, SessionBook
from rollout_server.sessions.open_session import SessionOutcome
from rollout_server.starvation import Starvation
from rollout_server.teachers.pool import TeacherPool
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.workers.environment_pool import EnvironmentPool
from rollout_server.workers.reward_pool import RewardPool

log = logging.getLogger(__name__)

_CUMULATIVE = {
    "tokens_generated": "generated_tokens",
    "busy_s": "busy_s",
    "idle_s": "idle_s",
    "prompt_tokens": "prompt_tokens",
    "cached_prompt_tokens": "cached_prompt_tokens",
    "retractions": "retractions",
}
"""Counters that the engine resets at its start: server's name -> engine's name."""
_COUNTERS = {
    "tokens_generated": ("tokens_generated", "Tokens that this server's engines sampled."),
    "busy_s": ("generation_busy_seconds", "Time in which an engine had a runnable sequence."),
    "idle_s": ("generation_idle_seconds", "Time in which an engine had no runnable sequence."),
    "at_engine_s": ("engine_request_seconds", "Time with a request at the engine, without stalls of pushes."),
    "requests_s": ("requests_at_engine_seconds", "Time at the engine, summed over requests."),
    "progress": ("progress", "Heartbeats at which the server had made progress."),
    "prompt_tokens": ("prompt_tokens", "Tokens of the prompts of finished requests."),
    "cached_prompt_tokens": (
        "cached_prompt_tokens",
        "Prompt tokens found in the engine's prefix cache.",
    ),
    "retractions": ("retractions", "Sequences that an engine retracted for lack of KV memory."),
    "samples_done": ("samples_done", "Samples finished."),
    "routes_bytes": ("routes_bytes", "Bytes of the routes of samples (model.router_replay)."),
    "routed_tokens": ("routed_tokens", "Tokens of samples that have routes."),
    "starved_s": (
        "engine_starved_seconds",
        "Time in which the engine had free slots while too many samples waited for rewards or environments.",
    ),
    "reward_s": ("reward_seconds", "Time spent in the task's reward function."),
    "reward_restarts": ("reward_worker_restarts", "Reward workers lost to a timeout or a crash."),
    "scorer_changes": (
        "scorer_changes",
        "Reward models, beyond the first, that have scored samples of this server.",
    ),
    "teacher_requests": ("teacher_requests", "Requests that teachers' servers answered."),
    "teacher_failures": ("teacher_failures", "Requests to teachers' servers that failed."),
    "teacher_s": ("teacher_seconds", "Time of the answered requests to teachers' servers, summed up."),
    "environment_s": ("environment_seconds", "Time that samples waited for calls of their environments."),
    "environment_restarts": (
        "environment_restarts",
        "Processes of environments lost to a time limit or a crash.",
    ),
    "session_requests": ("session_requests", "Requests of agents to the model."),
    "agent_failures": ("session_agent_failures", "Sessions of external agents that produced no sample."),
    "claims_slowed": (
        "session_claims_slowed",
        "Claims of agents that had to wait because their sessions failed.",
    ),
    "claims_refused": ("session_claims_refused", "Claims that were refused because sessions failed."),
    "session_fields_ignored": (
        "session_fields_ignored",
        "Fields of agents' requests that had no effect, because the job's settings determine them.",
    ),
    "pushes": ("weight_pushes", "Weight pushes activated."),
    "push_failures": ("weight_push_failures", "Weight requests that failed."),
    "push_s": ("weight_push_seconds", "Time from push request to activation."),
    "stall_s": ("weight_stall_seconds", "Time in which a push kept the engine from decoding."),
    "bad_frames": ("weights_bad_frames", "Frames refused on the weight control socket."),
    "refused_frames": ("refused_frames", "Messages refused because of their sender's key."),
    "refused_handshakes": ("refused_handshakes", "Connections refused for lack of an allowed key."),
}
_GAUGES = {
    "running": ("sequences_running", "Sequences that the engine decodes."),
    "waiting": ("sequences_waiting", "Sequences that wait for a slot of the engine."),
    "kv_usage": ("kv_usage", "Fraction of the engine's KV memory that its sequences use."),
    "concurrency_limit": ("concurrency_limit", "Samples that may be at the engine."),
    "holding": ("samples_held", "Samples of leases that are not finished."),
    "in_progress_s": (
        "sample_seconds_in_progress",
        "Time that the samples in progress have taken so far: what the loss of the server would cost.",
    ),
    "unacknowledged": ("samples_unacknowledged", "Finished samples that the buffer has not confirmed."),
    "at_engine": ("samples_at_engine", "Held samples that are at the engine or wait for it."),
    "in_tools": ("samples_in_environments", "Held samples that wait for their environment or agent."),
    "in_rewards": ("samples_in_rewards", "Held samples that wait for their reward or their teacher."),
    "rewards_waiting": ("rewards_waiting", "Completions that wait for their reward."),
    "rewards_held": (
        "rewards_holding_workers",
        "Completions whose rewards take far longer than the others and hold a reward worker.",
    ),
    "teachers_waiting": ("teachers_waiting", "Samples that wait for the log-probs of their teacher."),
    "environments_open": ("environments_open", "Environments that samples use."),
    "sessions_open": ("sessions_open", "Sessions that agents work on."),
    "sessions_waiting": ("sessions_waiting", "Sessions that an external agent can claim."),
    "session_requests_pending": ("session_requests_pending", "Requests of agents that have no response yet."),
    "session_kept_bytes": (
        "session_kept_bytes",
        "Bytes of the responses that agents may refer to (previous_response_id).",
    ),
    "tokens_per_s": ("tokens_per_second", "Tokens sampled per second, over the last heartbeats."),
    "weights_version": ("weights_version", "Version that the engine samples with."),
    "weights_age_s": ("weights_age_seconds", "Time since the engine has had that version."),
    "engine_starts": ("engine_starts", "Engines started by this server."),
    "loop_late_s": ("loop_late_seconds", "How late the server's timer is, a mean over the last heartbeats."),
}
_FAILED = {kind: f"samples_failed_{kind.value}" for kind in FailureKind}
_FINISHED = {reason: f"samples_finished_{reason.value}" for reason in FinishReason}
_ENDED = {outcome: f"sessions_{outcome.value}" for outcome in SessionOutcome}
_ROUTES = {name: f"session_wrong_routes_{name}" for name in WRONG_ROUTES}
_REFUSED = {status: f"session_refusals_{status}" for status in (400, 404, 405, 410, 413, 422, 429, 500, 503)}
"""Keys that are HTTP statuses of the application's response."""
_BY_LABEL: tuple[tuple[str, str, str, Mapping[Any, str]], ...] = (
    ("rollout_samples_failed", "Samples of this server that failed, by kind.", "kind", _FAILED),
    (
        "rollout_samples_finished",
        "Samples of this server that did not fail, by the reason for their end.",
        "reason",
        _FINISHED,
    ),
    ("sessions_ended", "Sessions that have ended, by outcome.", "outcome", _ENDED),
    (
        "session_refusals",
        "Requests of agents that were refused after their key was accepted, by HTTP status.",
        "status",
        _REFUSED,
    ),
    (
        "session_wrong_routes",
        "Requests of agents for routes that sessions do not have, by the last word of their paths.",
        "route",
        _ROUTES,
    ),
)
"""Counters with one label: the label's name, and the server's name for each of its values."""
_DURATIONS = {
    "samples": ("sample_seconds", "Time from the start of a sample to its end, including its rewards."),
    "generations": ("generation_seconds", "Time from a request to the engine to its completion."),
    "weights": ("weight_receive_seconds", "Time from the request of a push to its activation."),
}
"""Lane of the spans -> histogram."""
_SMOOTHING = 0.3
_MOST_LATE_S = 1.0
"""Upper bound of one gap in the average: a single long gap does not make a server late."""


_TRACED = ("running", "waiting", "at_engine", "in_tools", "in_rewards", "tokens_per_s", "unacknowledged")
"""Values written to traces as counters."""


class EngineTime:
    """Measures how long a server had requests at its engine, to relate the engine's output to that time.

    `busy_s`: seconds with a request at the engine; `request_s`: the same, added over the requests. The
    engine's own busy time does not measure that, because an engine that is repeatedly stopped between two
    steps counts that time as idle. Time in which the server itself did not run, or in which a weight push
    kept the engine from decoding, is not counted. Pure: no clock.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.request_s = 0.0
        self._seen = (0.0, 0.0)
        self._pending = (0.0, 0.0)
        """Times not counted yet because a push is running: how long it stalled the engine is known only at
        its end."""
        self._stall_s = 0.0
        self._num_pushes = 0

    def observe(
        self,
        *,
        busy_s: float,
        request_s: float,
        passed_s: float,
        late_s: float,
        is_pushing: bool,
        num_pushes: int,
        stall_s: float,
    ) -> None:
        """Takes the totals of the gate, of pushes and of their stalls, once per heartbeat.

        `passed_s`: seconds since the last call; `late_s`: those of them in which the server did not run.
        """
        share = max(0.0, 1 - late_s / passed_s) if passed_s > 0 else 1.0
        added = (share * (busy_s - self._seen[0]), share * (request_s - self._seen[1]))
        self._seen = (busy_s, request_s)
        self._pending = (self._pending[0] + added[0], self._pending[1] + added[1])
        if is_pushing and num_pushes == self._num_pushes:
            return
        pending_s, pending_request_s = self._pending
        if pending_s > 0:
            decoding = max(0.0, 1 - (stall_s - self._stall_s) / pending_s)
            self.busy_s += decoding * pending_s
            self.request_s += decoding * pending_request_s
        self._pending, self._stall_s, self._num_pushes = (0.0, 0.0), stall_s, num_pushes


@dataclass
class ServerStats:
    """Collects numbers from the parts of a server; `update` is called once per heartbeat."""

    metrics: InitVar[Metrics]
    _: KW_ONLY
    buffers: ShardedBufferClient
    runner: LeaseRunner
    rewards: Sequence[RewardPool]
    teachers: TeacherPool | None = None
    environments: Sequence[EnvironmentPool]
    receiver: WeightReceiver
    engine: Engine
    gate: GenerationGate
    supervisor: EngineSupervisor
    starvation: Starvation
    book: SessionBook
    concurrency_limit: int = 0

    def __post_init__(self, metrics: Metrics) -> None:
        self._progress = ProgressClock(now_s=0.0)
        self._engine_time = EngineTime()
        self._counters = {key: metrics.counter(*named) for key, named in _COUNTERS.items()}
        self._gauges = {key: metrics.gauge(*named) for key, named in _GAUGES.items()}
        self._by_label = [
            (metrics.counter(name, doc, label=label, values=list(map(str, keys))), keys)
            for name, doc, label, keys in _BY_LABEL
        ]
        for lane, (name, doc) in _DURATIONS.items():
            recorder.listen(lane, metrics.histogram(name, doc, buckets=SECONDS).observe)
        self._before_engine = dict.fromkeys(_CUMULATIVE, 0.0)
        self._by_engine = dict.fromkeys(_CUMULATIVE, 0.0)
        self._loop_late_s = 0.0
        self._late_s = 0.0
        """How late the last timer was."""
        self._updated_s = 0.0
        self._weights = (-1, 0.0)
        """Version that the engine holds, and since when."""
        self.values: dict[str, float] = dict.fromkeys(
            (*_COUNTERS, *_GAUGES, *(key for *_, keys in _BY_LABEL for key in keys.values())), 0.0
        )
        """Values by name, as sent with the heartbeat."""

    def woke(self, *, late_s: float) -> None:
        """Records how late the heartbeat timer fired."""
        self._late_s = late_s
        self._loop_late_s += _SMOOTHING * (min(max(0.0, late_s), _MOST_LATE_S) - self._loop_late_s)

    def engine_lost(self) -> None:
        """Adds the lost engine's counts to the totals; the next engine counts from zero."""
        for key in _CUMULATIVE:
            self._before_engine[key] += self._by_engine[key]
            self._by_engine[key] = 0.0

    def update(self, load: Mapping[str, Any], *, now_s: float) -> dict[str, float]:
        """Computes the values from the engine's `load` ({} if it did not respond) and the server's parts."""
        self._by_engine |= {key: float(load[name]) for key, name in _CUMULATIVE.items() if name in load}
        passed_s, num_at = now_s - self._updated_s, self.buffers.num_at
        if hint := self.starvation.observe(num_at, now_s=now_s):
            log.warning("%s", hint)
        totals = {key: self._before_engine[key] + self._by_engine[key] for key in _CUMULATIVE}
        values = totals | {
            "progress": self._num_changes(now_s=now_s),
            "samples_done": self.runner.num_done,
            "routes_bytes": self.runner.num_routes_bytes,
            "routed_tokens": self.runner.num_routed_tokens,
            "samples_failed": self.runner.num_failed.total(),
            **{name: self.runner.num_failed[kind] for kind, name in _FAILED.items()},
            "reward_s": sum(pool.seconds_total for pool in self.rewards),
            "reward_restarts": sum(pool.num_restarts for pool in self.rewards),
            "scorer_changes": sum(pool.num_scorer_changes for pool in self.rewards),
            **{name: self.runner.num_finished[reason] for reason, name in _FINISHED.items()},
            **self._of_teachers(),
            "environment_s": sum(pool.seconds_total for pool in self.environments),
            "environment_restarts": sum(pool.num_restarts for pool in self.environments),
            "environments_open": sum(pool.num_open for pool in self.environments),
            **self._of_sessions(),
            "pushes": self.receiver.num_pushes,
            "push_failures": self.receiver.num_failures,
            "push_s": self.receiver.seconds_total,
            "stall_s": self.receiver.stall_seconds_total,
            "bad_frames": self.receiver.listener.num_bad_frames,
            "refused_frames": self.receiver.listener.num_refused_frames,
            "refused_handshakes": self.receiver.listener.num_refused_handshakes,
            "running": float(load.get("running", 0)),
            "waiting": float(load.get("waiting", 0)),
            "kv_usage": float(load.get("kv_usage", 0.0)),
            "concurrency_limit": self.concurrency_limit,
            "holding": self.buffers.holding_samples,
            "in_progress_s": self.runner.seconds_in_progress,
            "unacknowledged": self.buffers.num_unacknowledged,
            "starved_s": self.starvation.seconds_total,
            "at_engine": num_at[Place.ENGINE],
            "in_tools": num_at[Place.TOOL],
            "in_rewards": num_at[Place.REWARD],
            "rewards_waiting": sum(pool.num_waiting for pool in self.rewards),
            "rewards_held": sum(pool.num_held for pool in self.rewards),
            "tokens_per_s": self._rate(totals["tokens_generated"], now_s=now_s),
            "weights_version": self.receiver.version,
            "weights_age_s": self._weights_age_s(now_s=now_s),
            **self._of_engine_time(passed_s=passed_s),
            "engine_starts": self.engine.num_starts,
            "loop_late_s": self._loop_late_s,
        }
        for key, counter in self._counters.items():
            counter.inc(values[key] - self.values[key])
        for labelled, keys in self._by_label:
            for value, key in keys.items():
                labelled.labels(str(value)).inc(values[key] - self.values[key])
        for key, gauge in self._gauges.items():
            gauge.set(values[key])
        self.values = {key: float(value) for key, value in values.items()}
        for key in _TRACED:
            recorder.count(key, self.values[key])
        return self.values

    def _of_teachers(self) -> dict[str, float]:
        names = ("requests", "failures", "s")
        if (pool := self.teachers) is None:
            return dict.fromkeys([*(f"teacher_{name}" for name in names), "teachers_waiting"], 0.0)
        numbers = (pool.num_requests, pool.num_failures, pool.seconds_total)
        found = {f"teacher_{name}": float(number) for name, number in zip(names, numbers, strict=True)}
        return found | {"teachers_waiting": float(pool.num_waiting)}

    def _of_engine_time(self, *, passed_s: float) -> dict[str, float]:
        busy_s, request_s = self.gate.seconds()
        self._engine_time.observe(
            busy_s=busy_s,
            request_s=request_s,
            passed_s=passed_s,
            late_s=self._late_s,
            is_pushing=self.receiver.work is not None,
            num_pushes=self.receiver.num_pushes,
            stall_s=self.receiver.stall_seconds_total,
        )
        return {"at_engine_s": self._engine_time.busy_s, "requests_s": self._engine_time.request_s}

    def _of_sessions(self) -> dict[str, float]:
        book = self.book
        return {
            "sessions_open": len(book.open),
            "sessions_waiting": book.num_waiting,
            "session_requests_pending": book.num_pending,
            "session_kept_bytes": book.num_kept_bytes,
            "session_requests": book.num_calls,
            "session_fields_ignored": book.num_ignored.total(),
            **{name: book.num_ended[outcome] for outcome, name in _ENDED.items()},
            "agent_failures": book.claimants.num_failures,
            "claims_slowed": book.claimants.num_slowed,
            "claims_refused": book.claimants.num_refused,
            **{name: book.num_refused[status] for status, name in _REFUSED.items()},
            **{name: book.num_wrong_routes[route] for route, name in _ROUTES.items()},
        }

    def _num_changes(self, *, now_s: float) -> int:
        """Returns how often progress was seen; the trainer waits for this server while the number grows.

        Time limits are enforced elsewhere: for a start of the engine, a push, a reward, a call of an
        environment, a session without requests, an engine with requests. Waiting for external agents counts
        as progress: whoever runs the agents decides how long they may stay away.
        """
        client, receiver = self.supervisor.client, self.receiver
        reward_s = sum(pool.seconds_total for pool in self.rewards)
        num_calls = sum(pool.num_calls for pool in self.environments)
        if client is None or client.is_held:
            self._progress.advance(now_s=now_s)  # the engine starts, or takes weights
        elif client.num_generating:
            self._progress.observe("engine", client.progress, now_s=now_s)
        self._progress.observe("pushes", receiver.num_pushes, now_s=now_s)
        self._progress.observe("rewards", reward_s, now_s=now_s)
        if self.environments:
            self._progress.observe("environments", num_calls, now_s=now_s)
        self._progress.observe("sessions", self.book.progress, now_s=now_s)
        if self.book.num_waiting and not self.book.open:
            self._progress.advance(now_s=now_s)
        self._progress.observe("samples", self.runner.num_done, now_s=now_s)
        return self._progress.num_changes

    def _weights_age_s(self, *, now_s: float) -> float:
        version = self.receiver.version
        if version != self._weights[0]:
            self._weights = (version, now_s)
        return now_s - self._weights[1]

    def _rate(self, tokens: float, *, now_s: float) -> float:
        elapsed_s, self._updated_s = now_s - self._updated_s, now_s
        rate = (tokens - self.values["tokens_generated"]) / elapsed_s
        return (1 - _SMOOTHING) * self.values["tokens_per_s"] + _SMOOTHING * rate
