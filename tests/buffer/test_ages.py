"""How long groups wait for the trainer, leases last and writes take, as the buffer's page shows them."""

from buffer.ledger.ledger import Ledger
from buffer.tables.ages import FINISHED, UNFINISHED
from buffer.tickets import Verdict
from tests.support.ledger_simulation import add_server, deliver, done, new_ledger


def ages_of(ledger: Ledger) -> dict[str, tuple[int, float]]:
    """Number and sum by what was measured."""
    snapshot = ledger.snapshot()
    ages = {"ready": snapshot.ready_age, **snapshot.lease_ages}
    return {name: (sum(buckets.counts), buckets.total) for name, buckets in ages.items()}


def test_a_group_waits_until_the_trainer_gets_it() -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=4)
    ledger.advance(now_s=10.0)
    leases = ledger.grant(now_s=10.0)["a"]
    ledger.advance(now_s=13.0)
    for lease in leases:
        for index in lease.sample_indices:
            assert deliver(ledger, "a", done(lease, index, [0])) is Verdict.ACCEPTED
    assert ages_of(ledger) == {"ready": (0, 0.0), FINISHED: (2, 6.0), UNFINISHED: (0, 0.0)}
    for now_s in (18.0, 99.0):  # the second is a repeated request
        ledger.advance(now_s=now_s)
        assert ledger.fetch(step=0, position=0) is not None
    assert ages_of(ledger)["ready"] == (1, 5.0)


def test_the_lease_of_a_lost_server_ends_unfinished() -> None:
    ledger = new_ledger()
    add_server(ledger, "a", capacity=4)
    ledger.advance(now_s=1.0)
    (lease, *_) = ledger.grant(now_s=1.0)["a"]
    assert deliver(ledger, "a", done(lease, 0, [0])) is Verdict.ACCEPTED
    ledger.advance(now_s=8.0)
    ledger.remove_server("a")
    assert ages_of(ledger) == {"ready": (0, 0.0), FINISHED: (0, 0.0), UNFINISHED: (2, 14.0)}
