"""The invariants of one ledger, as SQL over its tables (docs/reference/ledger.md).

The queries use the names of tables and columns but no code of the buffer, so that they do not repeat its
errors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Invariant:
    """One statement about the ledger, as two queries."""

    text: str
    count: str
    """Query: the number of rows that the statement is about."""
    violations: str
    """Query: one text per row that contradicts the statement; its ids identify the row in the ledger."""


def _mark(name: str, default: str) -> str:
    return f"coalesce((SELECT value FROM marks WHERE name = '{name}'), {default})"


_COMMITTED = _mark("committed_step", "-1")
_TRAINER_STEP = _mark("trainer_step", "0")
_NUM_SHARDS = _mark("num_shards", "1")
_SHARD = _mark("shard", "0")
_NUM_COUNTED = _mark("num_steps_counted", _TRAINER_STEP)
_IS_COUNTED = f"(state = 'trained' OR (state = 'batched' AND step < {_NUM_COUNTED}))"
_TICKETS_WITH_SAMPLES = "tickets CROSS JOIN samples USING (ticket_id)"
# A sample that is recorded in a step, in its own ticket or in a position of parts. With
# `buffer.overdue=close` (`by_token`) the bound of the position limits the age of each token.
_RECORDED = """(
    SELECT ticket_id AS position_id, state, step, max_staleness, begin_step >= 0 AS by_token,
           sample_index < num_samples - num_greedy AS is_trained,
           ticket_id, sample_index, oldest_step, sum_token_steps, num_sampled, token_steps
    FROM tickets CROSS JOIN samples USING (ticket_id) WHERE state IN ('batched', 'trained')
    UNION ALL
    SELECT p.position_id, t.state, t.step, t.max_staleness, 1, 1,
           s.ticket_id, s.sample_index, s.oldest_step, s.sum_token_steps, s.num_sampled, s.token_steps
    FROM parts AS p CROSS JOIN tickets AS t ON t.ticket_id = p.position_id
         CROSS JOIN samples AS s ON s.ticket_id = p.ticket_id AND s.sample_index = p.sample_index
    WHERE t.state IN ('batched', 'trained'))"""
_COUNTED = f"{_RECORDED} WHERE {_IS_COUNTED} AND is_trained"


def _within(aggregate: str, of_all: str) -> str:
    """An aggregate over the tokens of a recorded sample that are within its bound, from `age` (the step of
    their weights) and `num`. `of_all`: its value without `token_steps`: all tokens are within the bound."""
    return f"""iif(token_steps = '[]', {of_all}, (
        SELECT {aggregate} FROM (SELECT json_extract(value, '$[0]') AS age, json_extract(value, '$[1]') AS num
                                 FROM json_each(token_steps))
        WHERE age >= step - max_staleness))"""


_NUM_WITHIN = _within("coalesce(sum(num), 0)", "num_sampled")
_SUM_WITHIN = _within("coalesce(sum(age * num), 0)", "sum_token_steps")
_OLDEST_WITHIN = _within("coalesce(min(age), oldest_step)", "oldest_step")
_NEWEST = "iif(token_steps = '[]', oldest_step, json_extract(token_steps, '$[#-1][0]'))"
_LAGS = f"""
    SELECT 'trained_lag_' || (step - {_OLDEST_WITHIN}) AS name, count(*) AS num FROM {_COUNTED} GROUP BY 1"""
# Complete samples of closed groups that are not trained on, and all samples that are not.
_GIVEN_UP = """
    FROM failures CROSS JOIN tickets USING (ticket_id) CROSS JOIN samples USING (ticket_id, sample_index)
    WHERE given_up AND purpose = 'train'"""
_DROPPED = f"""(
    SELECT num_sampled FROM {_TICKETS_WITH_SAMPLES} WHERE state = 'dropped'
    UNION ALL SELECT s.num_sampled
    FROM parts AS p CROSS JOIN tickets AS t ON t.ticket_id = p.position_id
         CROSS JOIN samples AS s ON s.ticket_id = p.ticket_id AND s.sample_index = p.sample_index
    WHERE t.state = 'dropped'
    UNION ALL SELECT num_sampled {_GIVEN_UP} AND state != 'dropped')"""
# Only closed groups have train samples that were given up; any other train ticket is dropped as a whole.
_CLOSED = """(
    SELECT early, (SELECT count(*) FROM samples AS s WHERE s.ticket_id = t.ticket_id) AS num_arrived
    FROM tickets AS t
    WHERE state IN ('closed', 'split') OR (state = 'dropped' AND purpose = 'train'
          AND ticket_id IN (SELECT ticket_id FROM failures WHERE given_up)))"""
_OF_EVALUATION = """
    t.purpose = 'eval' AND t.eval_id = e.eval_id AND t.eval_set = e.eval_set
    AND t.num_samples = e.num_samples AND t.prompt_index < e.num_prompts"""
# Both directions search a primary key: a scan of all tickets for each evaluation takes minutes in a long run.
_ITS_TICKETS = f"""
    {_OF_EVALUATION} AND t.ticket_id = e.first_ticket + t.prompt_index * {_NUM_SHARDS}
    AND t.ticket_id BETWEEN e.first_ticket AND e.first_ticket + (e.num_prompts - 1) * {_NUM_SHARDS}"""
_ITS_EVALUATION = f"{_OF_EVALUATION} AND e.first_ticket = t.ticket_id - t.prompt_index * {_NUM_SHARDS}"
# Lengths and reasons are counted since the ledger's first row, unless an earlier release has made the ledger.
_COUNTS_SELECTION = f"{_mark('counts_selection', '0')} = 1"
_MAX_BUCKET = 18
_TRAIN_SAMPLES = (
    f"{_TICKETS_WITH_SAMPLES} WHERE purpose = 'train' AND sample_index < num_samples - num_greedy"
)
_SELECTION = f"""
    WITH RECURSIVE limits(bucket, above, upto) AS (
        SELECT 0, 0, 1 UNION ALL SELECT bucket + 1, upto, iif(bucket + 1 = {_MAX_BUCKET}, 1 << 62, 2 * upto)
        FROM limits WHERE bucket < {_MAX_BUCKET})
    SELECT 'offered_length_' || bucket AS name, count(*) AS num
    FROM {_TICKETS_WITH_SAMPLES} JOIN limits ON num_sampled > above AND num_sampled <= upto
    WHERE purpose = 'train' AND sample_index < num_samples - num_greedy GROUP BY 1
    UNION ALL SELECT 'trained_length_' || bucket, count(*)
    FROM {_RECORDED} JOIN limits ON num_sampled > above AND num_sampled <= upto
    WHERE {_IS_COUNTED} AND is_trained GROUP BY 1
    UNION ALL SELECT 'offered_sum_tokens', coalesce(sum(num_sampled), 0) FROM {_TRAIN_SAMPLES}
    UNION ALL SELECT 'masked_length_' || bucket, sum(num_sampled - {_NUM_WITHIN})
    FROM {_RECORDED} JOIN limits ON num_sampled > above AND num_sampled <= upto
    WHERE {_IS_COUNTED} AND is_trained GROUP BY bucket HAVING sum(num_sampled - {_NUM_WITHIN}) > 0
    UNION ALL SELECT 'trained_sum_tokens', coalesce(sum(num_sampled), 0) FROM {_COUNTED}
    UNION ALL SELECT 'sum_token_lag', coalesce(sum(step * {_NUM_WITHIN} - {_SUM_WITHIN}), 0) FROM {_COUNTED}
    UNION ALL SELECT 'num_failures', (SELECT coalesce(sum(value), 0) FROM statistics
        WHERE name GLOB 'failed_*_retry' OR name GLOB 'failed_*_drop' OR name GLOB 'failed_*_zero')"""

LEDGER_INVARIANTS = (
    Invariant(
        text="every ticket is in one state, and has the columns of that state",
        count="SELECT count(*) FROM tickets",
        violations="""
        SELECT printf('ticket %d: %s %s, reason %s, place %s:%s',
                      ticket_id, purpose, state, reason, step, position)
        FROM tickets
        WHERE state NOT IN ('queued', 'leased', 'ready', 'closed', 'batched', 'trained', 'evaluated',
                            'split', 'dropped')
           OR purpose NOT IN ('train', 'eval')
           OR (state = 'dropped') != (reason IS NOT NULL)
           OR (state IN ('batched', 'trained') AND (step IS NULL OR position IS NULL))
           OR (state NOT IN ('batched', 'trained', 'dropped') AND step IS NOT NULL)
           OR (purpose = 'eval' AND state IN ('ready', 'closed', 'batched', 'trained', 'split'))
           OR (purpose = 'train' AND state = 'evaluated')
           OR (state IN ('closed', 'split') AND NOT 0 <= begin_step)
           OR (begin_step < 0) != (close_step < 0) OR close_step < begin_step
           OR (early != '[]' AND state NOT IN ('closed', 'split', 'dropped'))""",
    ),
    Invariant(
        text="no ticket is missing: they are numbered without a gap",
        count="SELECT count(*) FROM tickets",
        violations=f"""
        SELECT printf('%d tickets, numbered %d to %d', count(*), min(ticket_id), max(ticket_id))
        FROM tickets
        HAVING count(*) > 0 AND (min(ticket_id) != {_NUM_SHARDS} + {_SHARD}
                                 OR max(ticket_id) != count(*) * {_NUM_SHARDS} + {_SHARD})""",
    ),
    Invariant(
        text="a shard has its own tickets, leases and prompts, and none of another shard",
        count="SELECT count(*) FROM tickets",
        violations=f"""
        SELECT printf('ticket %d: prompt %d', ticket_id, prompt_index) FROM tickets
        WHERE ticket_id % {_NUM_SHARDS} != {_SHARD}
           OR (purpose = 'train' AND prompt_index % {_NUM_SHARDS} != {_SHARD}
               AND ticket_id NOT IN (SELECT position_id FROM parts))
        UNION ALL SELECT printf('lease %d', lease_id) FROM leases
        WHERE lease_id % {_NUM_SHARDS} != {_SHARD}""",
    ),
    Invariant(
        text="no place of a step is taken twice",
        count="SELECT count(*) FROM tickets WHERE state IN ('batched', 'trained')",
        violations="""
        SELECT printf('step %d, position %d: tickets %s', step, position, group_concat(ticket_id))
        FROM tickets WHERE state IN ('batched', 'trained') GROUP BY step, position HAVING count(*) > 1""",
    ),
    Invariant(
        text="the tickets of committed steps are trained, and no other tickets",
        count="SELECT count(*) FROM tickets WHERE state = 'trained'",
        violations=f"""
        SELECT printf('ticket %d: %s in step %d, committed up to %d', ticket_id, state, step, {_COMMITTED})
        FROM tickets
        WHERE (state = 'trained' AND step > {_COMMITTED}) OR (state = 'batched' AND step <= {_COMMITTED})""",
    ),
    Invariant(
        text="no step is committed before it is complete",
        count="SELECT count(*) FROM marks",
        violations=f"""
        SELECT printf('step %d is committed, %d are complete', {_COMMITTED}, {_TRAINER_STEP})
        WHERE {_COMMITTED} >= {_TRAINER_STEP} AND {_COMMITTED} >= 0""",
    ),
    Invariant(
        text="a finished group has all of its samples, and no group has extra samples",
        count="SELECT count(*) FROM samples",
        violations="""
        SELECT printf('ticket %d: %s with %d of %d samples',
                      ticket_id, state, count(sample_index), num_samples)
        FROM tickets LEFT JOIN samples USING (ticket_id)
        GROUP BY ticket_id
        HAVING (state IN ('ready', 'batched', 'trained') AND count(sample_index) != num_samples
                AND ticket_id NOT IN (SELECT position_id FROM parts))
            OR min(sample_index) < 0 OR max(sample_index) >= num_samples
        UNION ALL SELECT printf('sample %d of ticket %d: there is no such ticket', sample_index, ticket_id)
        FROM samples WHERE ticket_id NOT IN (SELECT ticket_id FROM tickets)""",
    ),
    Invariant(
        text="a position of parts has as many samples as a group, all of closed groups, and no prompt",
        count="SELECT count(*) FROM parts",
        violations="""
        SELECT printf('ticket %d: samples in %d of %d slots', position_id, count(*), max(num_samples))
        FROM parts LEFT JOIN tickets ON tickets.ticket_id = position_id
        GROUP BY position_id
        HAVING count(*) IS NOT max(num_samples) OR min(slot) != 0 OR max(slot) != count(*) - 1
            OR count(DISTINCT slot) != count(*)
        UNION ALL
        SELECT printf('ticket %d: prompt %d, %s', ticket_id, prompt_index, state) FROM tickets
        WHERE (prompt_index = -1) != (ticket_id IN (SELECT position_id FROM parts))
           OR (prompt_index = -1 AND (begin_step >= 0
                                      OR state NOT IN ('ready', 'batched', 'trained', 'dropped')))
        UNION ALL
        SELECT printf('sample %d of ticket %d, in ticket %d: its group is %s, it has %sarrived%s',
                      p.sample_index, p.ticket_id, p.position_id, coalesce(t.state, 'unknown'),
                      iif(s.ticket_id IS NULL, 'not ', ''), iif(f.given_up, ' and was given up', ''))
        FROM parts AS p LEFT JOIN tickets AS t USING (ticket_id)
             LEFT JOIN samples AS s USING (ticket_id, sample_index)
             LEFT JOIN failures AS f USING (ticket_id, sample_index)
        WHERE t.state IS NULL OR t.state NOT IN ('closed', 'split') OR s.ticket_id IS NULL OR f.given_up""",
    ),
    Invariant(
        text="every sample of a closed group is in a position or given up, or the group is not over",
        count="SELECT count(*) FROM tickets WHERE state IN ('closed', 'split')",
        violations="""
        SELECT printf('ticket %d: %s with %d of %d samples in positions, %d given up; early %s',
                      ticket_id, state, num_placed, num_samples, num_given_up, early)
        FROM (SELECT t.*,
                     (SELECT count(*) FROM parts AS p WHERE p.ticket_id = t.ticket_id) AS num_placed,
                     (SELECT count(*) FROM failures AS f WHERE f.ticket_id = t.ticket_id
                      AND f.given_up) AS num_given_up,
                     (SELECT count(*) FROM json_each(t.early) AS e LEFT JOIN samples AS s
                      ON s.ticket_id = t.ticket_id AND s.sample_index = e.value
                      WHERE s.ticket_id IS NULL) AS num_early_missing
              FROM tickets AS t WHERE state IN ('closed', 'split'))
        WHERE num_early_missing > 0
           OR (state = 'split') != (num_placed + num_given_up = num_samples)
           OR num_placed + num_given_up > num_samples OR (state = 'split' AND num_placed = 0)""",
    ),
    Invariant(
        text="the ages of a sample's tokens add up",
        count="SELECT count(*) FROM samples",
        violations="""
        SELECT printf('ticket %d, sample %d: %s, but %d tokens with the sum %d, the oldest of step %d',
                      ticket_id, sample_index, token_steps, num_sampled, sum_token_steps, oldest_step)
        FROM samples CROSS JOIN json_each(token_steps) AS each
        GROUP BY ticket_id, sample_index
        HAVING count(*) < 2 OR json_extract(token_steps, '$[0][0]') != oldest_step
            OR sum(json_extract(each.value, '$[1]')) != num_sampled
            OR sum(json_extract(each.value, '$[0]') * json_extract(each.value, '$[1]')) != sum_token_steps""",
    ),
    Invariant(
        text="no bytes on disk belong to two samples",
        count="SELECT count(*) FROM samples",
        violations="""
        SELECT printf('segment %d at %d: tickets %s', segment, offset, group_concat(ticket_id))
        FROM samples GROUP BY segment, offset HAVING count(*) > 1""",
    ),
    Invariant(
        text="nothing was trained beyond its ticket's staleness bound",
        count=f"SELECT count(*) FROM {_RECORDED}",
        violations=f"""
        SELECT printf('ticket %d, sample %d: step %d, weights of steps %d to %d, bound %d of %s',
                      ticket_id, sample_index, step, oldest_step, {_NEWEST}, max_staleness,
                      iif(by_token, 'each token', 'the sample'))
        FROM {_RECORDED}
        WHERE {_NEWEST} > step OR iif(by_token, {_NEWEST}, oldest_step) < step - max_staleness""",
    ),
    # The bound of a ticket is the one in force when its first sample was leased or, with
    # `buffer.overdue=close`, when it was recorded, at most one step before its own. Changes count at once, so
    # rows of later steps may also have been in force. A rollback leaves undone weights whose step numbers
    # occur a second time.
    Invariant(
        text="the staleness bound of a trained ticket is one that the run had then",
        count="SELECT count(*) FROM settings WHERE key = 'max_staleness'",
        violations=f"""
        WITH bounds AS (SELECT id, step, value FROM settings WHERE key = 'max_staleness'),
             trained AS (SELECT position_id AS ticket_id, max_staleness,
                                iif(by_token, step - 1, min(oldest_step)) AS began
                         FROM {_RECORDED} GROUP BY position_id)
        SELECT printf('ticket %d: bound %d, weights of step %d', ticket_id, max_staleness, began)
        FROM trained
        WHERE began >= (SELECT min(step) FROM bounds)
          AND NOT EXISTS (SELECT 1 FROM rollbacks WHERE began > to_step AND began <= from_step)
          AND NOT EXISTS (
              SELECT 1 FROM bounds
              WHERE value IN (CAST(max_staleness AS TEXT), 'auto')
                AND (step >= began OR id = (SELECT max(id) FROM bounds WHERE step < began)))""",
    ),
    # Versions may be missing: a run that continued with `buffer.durability=none` for a while granted some
    # without a ledger.
    Invariant(
        text="versions increase, and each has an earlier version as its parent",
        count="SELECT count(*) FROM versions",
        violations="""
        WITH again AS (SELECT step FROM (
            SELECT step, value, lag(value) OVER (ORDER BY id) AS before FROM settings
            WHERE key = 'buffer.durability') WHERE before = 'none' AND value != 'none')
        SELECT printf('version %d: parent %d, incarnation %d', version, parent, trainer_incarnation)
        FROM (SELECT *, lag(trainer_incarnation) OVER (ORDER BY version) AS before,
                     lag(version) OVER (ORDER BY version) AS newest FROM versions)
        WHERE parent >= version OR trainer_incarnation < before
           OR (parent NOT IN (SELECT version FROM versions) AND newest IS NOT NULL
               AND NOT (parent > newest AND step >= coalesce((SELECT min(step) FROM again), step + 1)))""",
    ),
    Invariant(
        text="every sample was generated by weights of a known version",
        count="SELECT count(*) FROM samples",
        violations="""
        SELECT printf('ticket %d, sample %d: versions %d to %d, weights of step %d',
                      ticket_id, sample_index, oldest_version, newest_version, oldest_step)
        FROM samples LEFT JOIN versions ON version = oldest_version
        WHERE (oldest_version != 0 AND version IS NULL) OR newest_version < oldest_version
           OR (newest_version != 0 AND newest_version NOT IN (SELECT version FROM versions))
           OR (oldest_version = newest_version AND oldest_step != coalesce(versions.step, 0))""",
    ),
    Invariant(
        text="every lease is of a leased ticket or a closed group, and every leased ticket has a lease",
        count="SELECT count(*) FROM leases",
        violations="""
        SELECT printf('lease %d of ticket %d, which is %s', lease_id, ticket_id, coalesce(state, 'unknown'))
        FROM leases LEFT JOIN tickets USING (ticket_id)
        WHERE coalesce(state, '') NOT IN ('leased', 'closed')
        UNION ALL SELECT printf('ticket %d is leased, but has no lease', ticket_id) FROM tickets
        WHERE state = 'leased' AND ticket_id NOT IN (SELECT ticket_id FROM leases)""",
    ),
    Invariant(
        text="no sample is in two leases",
        count="SELECT count(*) FROM leases",
        violations="""
        SELECT printf('ticket %d, sample %d: leases %s', ticket_id, value, group_concat(lease_id))
        FROM leases, json_each(leases.outstanding) GROUP BY ticket_id, value HAVING count(*) > 1""",
    ),
    Invariant(
        text="a prompt is tried again once, and only after its ticket was dropped",
        count="SELECT count(*) FROM tickets WHERE parent > 0",
        violations="""
        SELECT printf('tickets %s follow ticket %d, which is %s',
                      group_concat(child.ticket_id), child.parent, coalesce(max(old.state), 'unknown'))
        FROM tickets AS child LEFT JOIN tickets AS old ON old.ticket_id = child.parent
        WHERE child.parent > 0
        GROUP BY child.parent HAVING count(*) > 1 OR max(old.state) IS NOT 'dropped'""",
    ),
    Invariant(
        text="an evaluation has one ticket for each prompt, which are live only while it runs",
        count="SELECT count(*) FROM evaluations",
        violations=f"""
        SELECT printf('evaluation %d of %s is %s: %d tickets for %d prompts, %d of them live',
                      eval_id, eval_set, state, num_tickets, num_prompts, num_live)
        FROM (SELECT e.*,
                     (SELECT count(*) FROM tickets AS t WHERE {_ITS_TICKETS}) AS num_tickets,
                     (SELECT count(*) FROM tickets AS t WHERE {_ITS_TICKETS}
                      AND t.state IN ('queued', 'leased')) AS num_live
              FROM evaluations AS e)
        WHERE num_tickets != num_prompts OR (num_live > 0) != (state = 'running')
           OR state NOT IN ('running', 'done', 'released', 'cancelled')
        UNION ALL SELECT printf('ticket %d: it belongs to no evaluation', ticket_id)
        FROM tickets AS t
        WHERE purpose = 'eval' AND eval_set != ''
          AND NOT EXISTS (SELECT 1 FROM evaluations AS e WHERE {_ITS_EVALUATION})""",
    ),
    Invariant(
        text="every completion of an evaluated prompt is a sample, or has failed for good",
        count="SELECT count(*) FROM tickets WHERE state = 'evaluated' AND eval_set != ''",
        violations="""
        SELECT printf('ticket %d: %d samples and %d failed of %d',
                      ticket_id, num_made, num_failed, num_samples)
        FROM (SELECT ticket_id, num_samples,
                     (SELECT count(*) FROM samples AS s WHERE s.ticket_id = t.ticket_id) AS num_made,
                     (SELECT count(*) FROM failures AS f WHERE f.ticket_id = t.ticket_id
                      AND f.given_up) AS num_failed
              FROM tickets AS t WHERE state = 'evaluated' AND eval_set != '')
        WHERE num_made + num_failed != num_samples OR num_made = 0
        UNION ALL
        SELECT printf('ticket %d, sample %d has failed for good, and arrived', ticket_id, sample_index)
        FROM failures CROSS JOIN tickets USING (ticket_id)
             CROSS JOIN samples USING (ticket_id, sample_index)
        WHERE given_up AND purpose = 'eval'""",
    ),
    Invariant(
        text="the counters equal the sums of the rows",
        count="SELECT count(*) FROM statistics",
        violations=f"""
        WITH sums AS (
            SELECT 'num_samples_dropped' AS name, count(*) AS num FROM {_DROPPED}
            UNION ALL SELECT 'tokens_dropped', coalesce(sum(num_sampled), 0) FROM {_DROPPED}
            UNION ALL SELECT 'num_parts_dropped', count(*) {_GIVEN_UP}
            UNION ALL SELECT 'tokens_trained', coalesce(sum({_NUM_WITHIN}), 0) FROM {_COUNTED}
            UNION ALL SELECT 'tokens_masked', coalesce(sum(num_sampled - {_NUM_WITHIN}), 0) FROM {_COUNTED}
            UNION ALL SELECT 'groups_closed', count(*) FROM {_CLOSED}
            UNION ALL SELECT 'samples_late', coalesce(sum(num_arrived - json_array_length(early)), 0)
            FROM {_CLOSED}
            UNION ALL SELECT 'samples_early', coalesce(sum(json_array_length(early)), 0) FROM {_CLOSED}
            UNION ALL SELECT 'verdict_accepted',
                (SELECT count(*) FROM samples)
                + (SELECT count(*) FROM tickets WHERE state = 'evaluated' AND eval_set = '')
            UNION ALL {_LAGS})
        SELECT printf('%s is %d, the sum of the rows %d', name, coalesce(value, 0), num)
        FROM sums LEFT JOIN statistics USING (name) WHERE coalesce(value, 0) != num
        UNION ALL SELECT printf('%s is %d, the sum of the rows 0', name, value) FROM statistics
        WHERE name LIKE 'trained_lag_%' AND value != 0 AND name NOT IN (SELECT name FROM ({_LAGS}))""",
    ),
    Invariant(
        text="the counters of lengths and failures equal the sums of the rows",
        count="SELECT count(*) FROM statistics WHERE name GLOB '*_length_*' OR name GLOB 'failed_*'",
        violations=f"""
        WITH sums AS ({_SELECTION})
        SELECT printf('%s is %d, the sum of the rows %d', name, coalesce(value, 0), num)
        FROM sums LEFT JOIN statistics USING (name)
        WHERE {_COUNTS_SELECTION} AND coalesce(value, 0) != num
        UNION ALL SELECT printf('%s is %d, the sum of the rows 0', name, value) FROM statistics
        WHERE {_COUNTS_SELECTION} AND value != 0 AND name NOT IN (SELECT name FROM sums)
          AND (name GLOB 'offered_length_*' OR name GLOB 'trained_length_*' OR name GLOB 'masked_length_*')
        UNION ALL SELECT printf('groups_trained_solved_* add up to %d, the whole groups to %d', counted, num)
        FROM (SELECT (SELECT coalesce(sum(value), 0) FROM statistics
                      WHERE name GLOB 'groups_trained_solved_*') AS counted,
                     (SELECT count(*) FROM tickets WHERE {_IS_COUNTED} AND prompt_index >= 0) AS num)
        WHERE {_COUNTS_SELECTION} AND counted != num""",
    ),
)
