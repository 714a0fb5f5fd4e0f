"""The one tree of exceptions.

`UserError` and what is below it are mistakes that a person can mend: the command line prints the message alone and exits
with code 2. Everything else is an event inside a running system that some daemon catches by its own name.
"""


class ArealError(Exception):
    """Root of every exception that this project raises on purpose."""


class UserError(ArealError, ValueError):
    """A setting or input is wrong. The message says what to change."""


class ConfigError(UserError):
    """A configuration key is unknown, out of range, or contradicts another."""


class WireError(ArealError):
    """A frame could not be decoded: counted by the receiver, never the end of a daemon."""


class WireVersionError(WireError):
    """A frame of another wire version: one side has to be upgraded."""


class RefusedError(ArealError):
    """A peer refused our `hello`; the message names the field that differs."""


class StaleIncarnationError(ArealError):
    """A newer process of the same name has registered: this one must stop."""


class DeadlineError(ArealError):
    """A named wait ran out of time."""


class PeerLostError(ArealError):
    """A peer that a request depends on is gone."""


class EngineError(ArealError):
    """The inference engine answered with an error or not at all."""


class WeightSyncError(ArealError):
    """A weight push failed; the receiver is at its old version or quarantined."""


class DiskFullError(ArealError):
    """A checkpoint was not written for want of space; the one before it is whole."""


class RewardError(ArealError):
    """A reward function raised, hung past its time limit, or returned no finite number."""


class StoreCorruptError(ArealError):
    """What the ledger names is not on disk as it was written; the message names the ticket and the file."""
