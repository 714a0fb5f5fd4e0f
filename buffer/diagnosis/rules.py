"""Derives from the facts of a job who waits on whom, and the causes of the waiting. Pure.

    trainer <- a step with missing groups <- the servers that hold its tickets <- their engines, rewards, ...

Waiting spreads along these edges, and only their ends are causes: a trainer that waits for groups of a server
whose engine generates no token is not named, and neither is the server. Certain causes come first (a process
that sends nothing, a store that cannot write). Causes that are only inferred from the inactivity of others
(`_behind_*`) are considered if there is no certain one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from buffer.diagnosis.facts import Cause, JobFacts, On, PeerFacts, ServerFacts, WaitLimits
from buffer.storage.base import Blocked

_EVALUATION = "the evaluation"
"""The trainer's name for its wait for a group."""
_LATE_S = 0.5
"""Mean delay of a process's timer, in seconds, above which the process does not get enough CPU time."""
_STORE_REMEDIES = {
    Blocked.FULL: "make room on its disk; it continues by itself",
    Blocked.LOCKED: "end that program or its transaction; the buffer continues by itself",
    Blocked.HANGS: "see what keeps that disk busy, and the kernel's log (dmesg); it continues by itself",
}


_REMEDIES = {
    "rewards": (
        On.REWARD,
        "more rollout.reward_workers, a faster reward, or a shorter rollout.reward_timeout_s",
    ),
    "teachers": (
        On.TEACHER,
        "look at that server and its log; more servers of that teacher (a list in distill.teachers), or more "
        "requests at a time (distill.max_requests)",
    ),
    "environments": (
        On.ENVIRONMENT,
        "a shorter episode.step_timeout_s, or more samples at a time (rollout.max_episodes)",
    ),
    "agents": (On.AGENT, "its log says what their process does"),
    "sessions": (
        On.AGENT,
        "start agents (`areal-like status` shows the address); fix and restart those that fail",
    ),
}
"""What the job waits on, and the remedy, by the kind of a server's waits."""


def causes_of(
    facts: JobFacts, *, slow: Mapping[str, str], late: Collection[str], limits: WaitLimits
) -> list[Cause]:
    """The causes, the longest first; empty if nothing waits for long.

    `slow`: name of a server or rank -> how slow it is (`Speeds`). `late`: servers that have been late for
    long.
    """
    if facts.is_finished:
        return []
    causes = [
        *_buffer(facts, limits),
        *([*_cut_off(facts, limits)] or [*_silent(facts, limits), *_lost(facts, limits)]),
        *_engines(facts, limits),
        *_liars(facts),
    ]
    causes = causes or [*_late(facts, late)] or [*_slow(facts, slow)]
    causes = causes or [*_operator(facts, limits), *_absent(facts, limits), *_pushes(facts, limits)]
    causes = causes or [*_behind_groups(facts, limits)] or [*_behind_ranks(facts, limits)]
    return sorted(causes, key=lambda cause: -cause.seconds)


def effects_of(facts: JobFacts, *, limits: WaitLimits) -> list[str]:
    """What waits on the causes: the trainer, and the missing groups of its step."""
    effects = []
    waiting = max(facts.ranks, key=_data_wait, default=None)
    if waiting is not None and _data_wait(waiting) > limits.stall_s:
        name, seconds = waiting.longest_wait("buffer")
        effects.append(f"{waiting.name} waits for {name}, {_time(seconds)}")
    # Young tickets are work in progress and do not wait.
    old = [lease for lease in facts.oldest_leases if lease.age_s > limits.stall_s]
    if facts.num_missing and (old or (facts.ranks and not facts.oldest_leases)):
        tickets = ", ".join(
            f"{lease} for {_time(lease.age_s)}" for lease in old[: max(3, min(facts.num_missing, 8))]
        )
        effects.append(f"{_lacking(facts)}" + (f": {tickets}" if tickets else "; no ticket is leased"))
    return effects


def awaited(facts: JobFacts) -> str:
    """The running group that a step waits for, longest running first; empty if it is not known."""
    due = [lease for lease in facts.oldest_leases if lease.is_due]
    return f"{due[0]} runs for {_time(due[0].age_s)}" if due else ""


def _lacking(facts: JobFacts) -> str:
    """What the trainer's step lacks."""
    if facts.overdue == "close":
        positions = "position" if facts.num_missing == 1 else "positions"
        return (
            f"step {facts.trainer_step} lacks {facts.num_missing} {positions} of {facts.num_groups}, each of "
            f"a group or of {facts.group_size} parts ({facts.num_parts} are complete)"
        )
    groups = "group" if facts.num_missing == 1 else "groups"
    return f"step {facts.trainer_step} lacks {facts.num_missing} {groups} of {facts.num_groups}" + (
        f", whose positions are reserved ({facts.num_ready} other groups are complete)"
        if facts.is_reserving
        else ""
    )


def _buffer(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    if facts.store_trouble:
        yield Cause(
            on=On.BUFFER,
            name="buffer",
            seconds=facts.store_trouble_s,
            what=f"it cannot write its ledger: {facts.store_trouble}",
            remedy=_STORE_REMEDIES[Blocked(facts.store_trouble.partition(":")[0])],
        )
    elif facts.loop_late_s > _LATE_S:
        yield Cause(
            on=On.BUFFER,
            name="buffer",
            seconds=facts.loop_late_s,
            what=f"its process runs {facts.loop_late_s:.1f} s late",
            remedy="its machine has too little CPU time for it, or something stops it again and again",
        )


def _cut_off(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    """Every server and every rank stopped sending at once: so many processes do not fail within the same
    seconds."""
    silent = [peer.silent_s for peer in (*facts.servers, *facts.ranks)]
    if not facts.ranks or not (facts.servers or facts.lost_servers) or max(silent) <= limits.stall_s:
        return
    began_together = max(silent) - min(silent) < limits.stall_s / 3
    # A silent server is removed when its leases expire, so later than the others stopped sending.
    if not began_together or max(facts.lost_servers.values(), default=0.0) > min(silent):
        return
    yield Cause(
        on=On.BUFFER,
        name="buffer",
        seconds=max(silent),
        what=f"no message from any server or rank for {_time(max(silent))}: its network is cut, or all of "
        "them have stalled",
        remedy="look at the network of the buffer's machine, and at the machines of the others",
    )


def _silent(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    for peer in (*facts.servers, *facts.ranks):
        if peer.silent_s <= limits.stall_s:
            continue
        yield Cause(
            on=On.SERVER if isinstance(peer, ServerFacts) else On.TRAINER,
            name=peer.name,
            seconds=peer.silent_s,
            what=f"no message for {_time(peer.silent_s)}: its process has stalled, or its network is cut",
            remedy="look at its machine: `kill -CONT` wakes a stopped process; end one that does not come "
            "back, and its supervisor starts it again",
        )


def _lost(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    """Servers that were removed because they sent nothing for too long."""
    others = any(server.state == "serving" and not server.held_back for server in facts.servers)
    for name, seconds in facts.lost_servers.items():
        taken = "other servers make its samples" if others else "no other server is left"
        yield Cause(
            on=On.SERVER,
            name=name,
            seconds=seconds,
            what=f"no message; removed {_time(seconds)} ago: {taken}",
            remedy="`kill -CONT` wakes a stopped process; else start it again, or another one (`areal-like "
            "rollout RUN --join`)",
        )


def _liars(facts: JobFacts) -> Iterator[Cause]:
    """Servers that send messages that no server sends. They are causes even if the job does not wait for
    them: such a server is broken, or its key is in other hands."""
    for server in facts.servers:
        if server.lies:
            yield Cause(
                on=On.SERVER,
                name=server.name,
                seconds=0.0,
                what=f"it gets no leases: {server.lies}",
                remedy="end it and look at its machine; on a job with keys revoke its key "
                "(`areal-like keys revoke`)",
            )


def _engines(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    for server in facts.servers:
        name, seconds = server.longest_wait("engine")
        is_starting = name == "ready"
        if server.silent_s > limits.stall_s or seconds <= (limits.work_s if is_starting else limits.stall_s):
            continue
        if is_starting:
            others = any(each.state == "serving" for each in facts.servers)
            if others and not facts.num_missing:
                continue
            what, remedy = "it is starting", "its log (`areal-like logs RUN`) says what it does"
        elif name.startswith("paused"):
            what = "it is paused, and not by its server"
            remedy = "POST /continue_generation to it, or find the program that paused it"
        else:
            what = f"no {name.removeprefix('a ').removeprefix('an ')}"
            remedy = (
                "look at its log; its server replaces it after rollout.generate_timeout_s, and at once if "
                "its process ends"
            )
        yield Cause(
            on=On.ENGINE,
            name=f"{server.name}'s engine",
            seconds=seconds,
            what=f"{what} for {_time(seconds)}",
            remedy=remedy,
        )


def late_servers(facts: JobFacts) -> set[str]:
    """Servers whose process currently does not get enough CPU time."""
    return {server.name for server in facts.servers if server.stats.get("loop_late_s", 0.0) > _LATE_S}


def _late(facts: JobFacts, late: Collection[str]) -> Iterator[Cause]:
    for server in facts.servers:
        if server.name in late:
            late_s = server.stats.get("loop_late_s", 0.0)
            yield Cause(
                on=On.SERVER,
                name=server.name,
                seconds=late_s,
                what=f"its process runs {late_s:.1f} s late",
                remedy="its machine has too little CPU time for it, or something stops it again and again",
            )


def _slow(facts: JobFacts, slow: Mapping[str, str]) -> Iterator[Cause]:
    for server in facts.servers:
        if how := slow.get(server.name):
            yield Cause(
                on=On.ENGINE,
                name=f"{server.name}'s engine",
                seconds=0.0,
                what=how,
                remedy="compare its machine with others: other programs on its GPU or CPU, clocks, power",
            )
    for rank in facts.ranks:
        if how := slow.get(rank.name):
            yield Cause(
                on=On.TRAINER,
                name=rank.name,
                seconds=0.0,
                what=how,
                remedy="`areal-like profile RUN` shows where its time goes; compare its ranks' machines",
            )


def _operator(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    if facts.paused_s:
        yield Cause(
            on=On.OPERATOR,
            name="an operator",
            seconds=facts.paused_s,
            what=f"it has paused the run for {_time(facts.paused_s)}",
            remedy="`areal-like resume RUN`",
        )


def _absent(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    if len(facts.ranks) < max(1, facts.world_size) and facts.closed_s > limits.work_s:
        missing = f"{len(facts.ranks)} of {facts.world_size} ranks" if facts.world_size else "no rank"
        yield Cause(
            on=On.TRAINER,
            name="trainer",
            seconds=facts.closed_s,
            what=f"{missing} registered for {_time(facts.closed_s)}",
            remedy="start the trainer; if it runs, its log says why it cannot reach the buffer",
        )
    waits_s = max(map(_data_wait, facts.ranks), default=0.0)
    if facts.servers or waits_s <= limits.stall_s:
        return
    yield Cause(
        on=On.SERVER,
        name="rollout servers",
        seconds=waits_s,
        what="none is registered",
        remedy="start one (`areal-like rollout RUN --join`)",
    )


def _pushes(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    """Servers that have not confirmed weights, or senders that cannot send. The trainer names them; a push
    waits for the slowest."""
    for rank in facts.ranks:
        for wait, seconds in rank.waits.items():
            kind, _, what = wait.partition(": ")
            if kind != "weights" or seconds <= limits.work_s:
                continue
            is_own = what.startswith("the trainer's own ")
            yield Cause(
                on=On.TRAINER if is_own else On.WEIGHTS,
                name=rank.name if is_own else what.partition(" ")[0],
                seconds=seconds,
                what=f"{rank.name} waits for {what}, {_time(seconds)}",
                remedy="its log names the rank that cannot send, and says why"
                if is_own
                else "after weights.push_deadline_s the push continues without it; its log says more",
            )


def _behind_groups(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    """Causes while the trainer waits for groups or an evaluation and every process is alive."""
    waits_s = max(
        (max(_data_wait(rank), rank.waits.get(_EVALUATION, 0.0)) for rank in facts.ranks), default=0.0
    )
    if waits_s <= limits.stall_s:
        return
    for server in facts.servers:
        kind = max(_REMEDIES, key=lambda kind: server.longest_wait(kind)[1])
        name, seconds = server.longest_wait(kind)
        if seconds > limits.stall_s and not server.stats.get("running", 0.0):
            on, remedy = _REMEDIES[kind]
            others = [wait for wait in server.names_of(kind) if wait != name]
            yield Cause(
                on=on,
                name=f"{server.name}'s {'agents' if kind == 'sessions' else kind}",
                seconds=seconds,
                what="; ".join([f"{name} for {_time(seconds)}", *others]),
                remedy=remedy,
            )
    able = [server for server in facts.servers if server.state == "serving" and not server.held_back]
    if not able:
        yield from _held_back(facts.servers, waits_s)


def _held_back(servers: Iterable[ServerFacts], waits_s: float) -> Iterator[Cause]:
    for server in servers:
        reason = server.held_back or f"it is {server.state}"
        yield Cause(
            on=On.OPERATOR if server.held_back.startswith("cordoned") else On.SERVER,
            name=server.name,
            seconds=waits_s,
            what=f"it gets no leases: {reason}",
            remedy="`areal-like uncordon RUN SERVER`"
            if server.held_back.startswith("cordoned")
            else "its log says why; or start another one (`areal-like rollout RUN --join`)",
        )


def _behind_ranks(facts: JobFacts, limits: WaitLimits) -> Iterator[Cause]:
    """Causes while a rank waits for another one within a step, or for something outside the job."""
    for rank in facts.ranks:
        for wait, seconds in rank.waits.items():
            if wait.startswith(("buffer: ", "weights: ")) or seconds <= limits.work_s:
                continue
            yield Cause(
                on=On.TRAINER,
                name=rank.name,
                seconds=seconds,
                what=f"it waits for {wait}, {_time(seconds)}",
                remedy="its log says more",
            )


def _data_wait(rank: PeerFacts) -> float:
    return rank.longest_wait("buffer")[1]


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
