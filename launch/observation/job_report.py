"""The report of `areal-like status --json` about a running job: one object with stable keys, for programs.

It is made from one look at the job. Rates are the buffer's, over the last minute, so one look is enough.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from areal_like.config import Config
from launch.observation.observer import DaemonView, find_number, find_table, merged_peers, merged_status

_JOB = ("step", "committed_steps", "newest_version", "max_staleness", "closed_because", "failed_because")
_RATES = (
    "window_s",
    "samples_per_s",
    "tokens_generated_per_s",
    "tokens_trained_per_s",
    "steps_per_min",
    "drops_per_min",
)
_SERVER = (
    "leases",
    "oldest_lease_s",
    "owed_samples",
    "weights_version",
    "weights_age_s",
    "versions_behind",
    "quarantine",
    "cordoned",
)


def job_report(config: Config, daemons: Mapping[str, DaemonView]) -> dict[str, Any]:
    """The state of the job; a number that no daemon reports is None."""
    statuses = [view.status for view in daemons.values() if view.role == "buffer" and view.status]
    status = merged_status(statuses) if statuses else {}
    peers = {str(peer["name"]): peer for peer in merged_peers(statuses)}
    rates = find_table(status, "rates")
    return {
        "run": config.name,
        "answers": any(view.status is not None for view in daemons.values()),
        "ready": bool(daemons) and not any(view.not_ready for view in daemons.values()),
        "num_steps": config.trainer.num_steps,
        **{key: status.get(key) for key in _JOB},
        "changes": status.get("changes") or [],
        "bound": str(status.get("bound") or ""),
        "parts": find_table(status, "parts"),
        "rates": {key: rates.get(key) for key in _RATES},
        "tickets": find_table(status, "tickets"),
        "drops": find_table(status, "drops"),
        "daemons": [_daemon(view, peers.get(view.name, {})) for view in daemons.values()],
    }


def _daemon(view: DaemonView, peer: Mapping[str, Any]) -> dict[str, Any]:
    status = view.status or {}
    entry: dict[str, Any] = {
        "name": view.name,
        "role": view.role,
        "state": str(status.get("state") or ("not ready" if view.not_ready else "ready")),
        "not_ready": view.not_ready,
        "waiting_on": status.get("waiting_on") or {},
        "heard_s": round(time.monotonic() - view.seen_s, 1) if view.seen_s else None,
        "http": str(view.endpoint.get("http", "")),
    }
    if view.role == "rollout":
        entry |= {key: peer.get(key) for key in _SERVER}
        entry["tokens_per_s"] = find_number(status, "tokens_per_s")
    return entry
