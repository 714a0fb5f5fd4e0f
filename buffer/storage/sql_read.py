"""Reads the ledger's tables, once, when a buffer starts.

Queries use the index over tickets with records, so their cost does not grow with the number of ended tickets
(except counting them).
"""

from __future__ import annotations

import json
import sqlite3

from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import RecordLocation
from buffer.prompts.order import Prompt
from buffer.storage.rows import (
    EvaluationRow,
    LeaseRow,
    Recovered,
    RollbackRow,
    SegmentRow,
    SettingRow,
    VersionRow,
)
from buffer.tickets import Drop, SampleSummary, State, Ticket


def read_all(connection: sqlite3.Connection) -> Recovered:
    """All live rows; ended tickets are counted."""
    query = connection.execute
    tickets = {
        row[0]: Ticket(
            ticket_id=row[0],
            purpose=Purpose(row[1]),
            prompt_index=row[2],
            num_samples=row[3],
            parent=row[4],
            num_reissues=row[5],
            eval_id=row[6],
            max_staleness=row[7],
            state=State(row[8]),
            drop=Drop(row[9]) if row[9] else None,
            step=-1 if row[10] is None else row[10],
            position=-1 if row[11] is None else row[11],
            num_greedy=row[12],
            eval_set=row[14],
            unleased=set(range(row[3])),
        )
        for row in query("SELECT * FROM tickets WHERE released = 0 ORDER BY ticket_id")
    }
    for ticket_id, sample_index, *columns in query(
        "SELECT samples.ticket_id, sample_index, "
        "lease_id, oldest_step, sum_token_steps, oldest_version, newest_version, num_sampled, reward, "
        "truncated, failure "
        "FROM tickets CROSS JOIN samples USING (ticket_id) WHERE released = 0"
    ):
        tickets[ticket_id].samples[sample_index] = _summary(*columns)
        tickets[ticket_id].unleased.discard(sample_index)
    for ticket_id, sample_index, count, given_up in query(
        "SELECT failures.* FROM tickets CROSS JOIN failures USING (ticket_id) WHERE released = 0"
    ):
        tickets[ticket_id].num_failures[sample_index] = count
        if given_up:
            tickets[ticket_id].failed.add(sample_index)
            tickets[ticket_id].unleased.discard(sample_index)
    trained = [ticket for ticket in tickets.values() if ticket.state is State.TRAINED]
    return Recovered(
        tickets=[ticket for ticket in tickets.values() if not ticket.state.is_terminal],
        trained=sorted(trained, key=lambda ticket: (ticket.step, ticket.position)),
        evaluated=[ticket for ticket in tickets.values() if ticket.state is State.EVALUATED],
        evaluations=[
            EvaluationRow(
                first_ticket=row[0],
                eval_id=row[1],
                eval_set=row[2],
                num_prompts=row[3],
                num_samples=row[4],
                min_version=row[5],
                state=row[6],
            )
            for row in query(
                "SELECT * FROM evaluations WHERE state IN ('running', 'done') ORDER BY first_ticket"
            )
        ],
        leases=[
            LeaseRow(
                lease_id=row[0],
                ticket_id=row[1],
                server=row[2],
                server_incarnation=row[3],
                weights_step=row[4],
                outstanding=frozenset(json.loads(row[5])),
            )
            for row in query("SELECT * FROM leases ORDER BY lease_id")
        ],
        versions=[
            VersionRow(version=row[0], step=row[1], parent=row[2], trainer_incarnation=row[3])
            for row in query("SELECT * FROM versions ORDER BY version")
        ],
        # The table of scalars is called `marks` on disk.
        scalars=dict(query("SELECT * FROM marks")),
        returned=[
            Prompt(index=row[0], parent=row[1], num_reissues=row[2])
            for row in query("SELECT prompt_index, parent, num_reissues FROM returned_prompts ORDER BY place")
        ],
        attempts=dict(query("SELECT * FROM attempts")),
        rollbacks=[
            RollbackRow(
                trainer_incarnation=row[1],
                from_step=row[2],
                to_step=row[3],
                num_tickets=row[4],
                num_tokens=row[5],
                unix_s=row[6],
            )
            for row in query("SELECT * FROM rollbacks ORDER BY id")
        ],
        settings=[
            SettingRow(step=row[1], key=row[2], value=row[3], origin=row[4], unix_s=row[5])
            for row in query("SELECT * FROM settings ORDER BY id")
        ],
        counters=dict(query("SELECT * FROM statistics")),
        ended={
            (Purpose(purpose), State(state), Drop(reason) if reason else None): count
            for purpose, state, reason, count in query(
                "SELECT purpose, state, reason, count(*) FROM tickets GROUP BY 1, 2, 3"
            )
            if State(state).is_terminal
        },
        num_issued=query("SELECT coalesce(max(ticket_id), 0) FROM tickets").fetchone()[0],
    )


def first_returned(connection: sqlite3.Connection) -> int:
    """Key of the row of `returned_prompts` whose prompt is issued next."""
    return int(connection.execute("SELECT coalesce(min(place), 0) FROM returned_prompts").fetchone()[0])


def read_locations(connection: sqlite3.Connection) -> dict[int, dict[int, RecordLocation]]:
    """Ticket id -> sample index -> position on disk, for every ticket that may still be fetched."""
    locations: dict[int, dict[int, RecordLocation]] = {}
    for ticket_id, sample_index, *location in connection.execute(
        "SELECT samples.ticket_id, sample_index, segment, offset, num_bytes, crc32 "
        "FROM tickets CROSS JOIN samples USING (ticket_id) WHERE released = 0"
    ):
        locations.setdefault(ticket_id, {})[sample_index] = RecordLocation(*location)
    return locations


def read_segments(connection: sqlite3.Connection) -> list[SegmentRow]:
    """All files of trajectories, oldest first; the last one is the one to append to."""
    return [
        SegmentRow(segment=row[0], num_bytes=row[1], retained=bool(row[2]))
        for row in connection.execute("SELECT * FROM segments ORDER BY segment")
    ]


def _summary(
    lease_id: int,
    oldest_step: int,
    sum_token_steps: int,
    oldest_version: int,
    newest_version: int,
    num_sampled: int,
    reward: float,
    truncated: int,
    failure: str,
) -> SampleSummary:
    return SampleSummary(
        lease_id=lease_id,
        oldest_step=oldest_step,
        sum_token_steps=sum_token_steps,
        oldest_version=oldest_version,
        newest_version=newest_version,
        num_sampled=num_sampled,
        reward=reward,
        is_truncated=bool(truncated),
        failure=failure,
    )
