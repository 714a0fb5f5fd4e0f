"""Every message that crosses a ZeroMQ socket: small typed dataclasses, one file a hop.

`hello` everyone <-> buffer, `producer` rollout server <-> buffer, `consumer` trainer rank <-> buffer, `weights` trainer rank 0 <->
rollout server. `areal_like.wire.codec` turns them into frames; a class is on the wire only if it is in `MESSAGES`.
"""

from areal_like.wire.messages import consumer, hello, producer, weights

_RENAMED = {consumer.GetRunCounters: "GetBooks", consumer.RunCounters: "Books"}
"""Classes renamed since the wire version was fixed; their tags stay."""

MESSAGES: dict[str, type] = {
    _RENAMED.get(cls, cls.__name__): cls
    for module in (hello, producer, consumer, weights)
    for cls in module.MESSAGES
}
"""Wire tag -> class."""

TAGS: dict[type, str] = {cls: tag for tag, cls in MESSAGES.items()}
"""Class -> wire tag."""
