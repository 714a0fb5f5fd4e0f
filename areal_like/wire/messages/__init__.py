"""All messages between daemons: small typed dataclasses, one file for each pair of roles.

    hello      any peer <-> buffer
    producer   rollout server <-> buffer
    consumer   trainer rank <-> buffer
    weights    trainer rank 0 <-> rollout server

`areal_like.wire.codec` encodes them; only the classes in `MESSAGES` can be sent.
"""

from areal_like.wire.messages import consumer, hello, producer, weights

_RENAMED = {consumer.GetRunCounters: "GetBooks", consumer.RunCounters: "Books"}
"""Classes renamed since the wire version was fixed; they keep their old tags."""

MESSAGES: dict[str, type] = {
    _RENAMED.get(cls, cls.__name__): cls
    for module in (hello, producer, consumer, weights)
    for cls in module.MESSAGES
}
"""Tag on the wire -> class."""

TAGS: dict[type, str] = {cls: tag for tag, cls in MESSAGES.items()}
"""Class -> tag on the wire."""

TO_BUFFER: frozenset[type] = frozenset((*hello.TO_BUFFER, *producer.TO_BUFFER, *consumer.TO_BUFFER))
"""The messages that a buffer accepts."""
