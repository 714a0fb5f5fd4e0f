"""The words of a bucket that changed since the last push: encoded at the sender, applied at the engine.

A **word** is an integer as wide as the smallest elements of the bucket. Words are compared and not values, so
that NaN payloads and -0.0 arrive as they are. A payload is

    positions of the words that are sent, then padding to 8 bytes | the words, in the order of their positions

Positions are a bitmask of all words, or the number of words between one that is sent and the next, in 1 or 2
bytes; `encode` takes what is smallest. A larger gap is bridged by words that have not changed. If a payload
would be longer than half the bucket (`MAX_SHARE`), the bucket is sent whole. The idea is that of sparse
weight updates: at the learning rates of RL most bfloat16 weights do not change in a step.

A header of fixed size precedes each payload. It bounds what the receiver allocates, and `apply` changes
nothing before it has checked all positions. Both are pure and run on any device; bytes are little-endian.

Left out: entropy coding of gaps and words. It would save a third of a delta and take more time than most
networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from areal_like.errors import WeightSyncError
from areal_like.weights.buckets import ITEM_BYTES, Bucket

MAX_SHARE = 0.5
"""A payload is at most this share of its bucket; otherwise the bucket is sent whole."""
HEADER_BYTES = 16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GROUP = 64
"""Words of one 8-byte part of a bitmask."""
_FIRST_BITS = 0x0102040810204080
"""Times eight bytes that are 0 or 1: the highest byte of the product has them as its bits."""
_REPEATED = 0x0101010101010101
_ONE_BIT_EACH = 0x8040201008040201 - (1 << 64)
"""Byte i has only bit i, as a signed integer."""


class Form(IntEnum):
    """How a bucket is sent."""

    WHOLE = 0
    """All bytes of the bucket."""
    MASK = 1
    """Positions are a bitmask."""
    GAPS_1 = 2
    """Positions are gaps of 1 byte."""
    GAPS_2 = 3
    """Positions are gaps of 2 bytes."""


_GAP_BYTES = {Form.GAPS_1: 1, Form.GAPS_2: 2}


def word_bytes(bucket: Bucket) -> int:
    """Bytes of the words in which a bucket is compared. Its length is a multiple of them."""
    return min(ITEM_BYTES[spec.dtype] for spec in bucket.tensors)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What precedes the payload of a bucket of `num_words` words."""

    form: Form
    num_sent: int
    """Words in the payload; 0 if the bucket is whole."""
    num_words: int
    """Words of the bucket, known to both sides."""
    word_bytes: int

    @property
    def position_bytes(self) -> int:
        """Bytes of the positions, with their padding."""
        if self.form is Form.MASK:
            return 8 * -(-self.num_words // _GROUP)
        return 8 * -(-_GAP_BYTES.get(self.form, 0) * self.num_sent // 8)

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the header."""
        num_sent = self.num_words if self.form is Form.WHOLE else self.num_sent
        return self.position_bytes + num_sent * self.word_bytes

    @property
    def is_small(self) -> bool:
        """True unless the bucket should be sent whole."""
        return self.payload_bytes <= MAX_SHARE * self.num_words * self.word_bytes

    def to_bytes(self) -> Tensor:
        """uint8[HEADER_BYTES], on the CPU."""
        return torch.tensor([self.form, self.num_sent], dtype=torch.int64).view(torch.uint8)

    @classmethod
    def parse(cls, raw: Tensor, bucket: Bucket) -> Header:
        """Inverse of `to_bytes`, for this bucket. Raises WeightSyncError for what no sender would send."""
        form, num_sent = raw.cpu().view(torch.int64).tolist()
        if form not in Form.__members__.values():
            raise WeightSyncError(f"a delta's form is {form}: want 0 to {max(Form)}")
        size = word_bytes(bucket)
        num_words = bucket.num_bytes // size
        found = cls(form=Form(form), num_sent=num_sent, num_words=num_words, word_bytes=size)
        is_whole = found.form is Form.WHOLE
        if not 0 <= num_sent <= (0 if is_whole else num_words) or not (is_whole or found.is_small):
            raise WeightSyncError(f"a delta has {num_sent} words of a bucket of {num_words}: too many")
        return found


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A bucket as it is sent after another one."""

    header: Header
    payload: Tensor
    """uint8[header.payload_bytes], contiguous, on the device of the bucket."""
    num_changed: int
    """Words that differ from the base."""


def encode(base: Tensor, new: Tensor, *, word_bytes: int) -> Encoded:
    """What has to be sent to a receiver of `base`.

    `base`, `new`: uint8[the bucket's bytes], contiguous, on one device.
    """
    old_words, words = base.view(_WORDS[word_bytes]), new.view(_WORDS[word_bytes])
    num_words = words.numel()
    padded = torch.zeros(_GROUP * -(-num_words // _GROUP), dtype=torch.bool, device=new.device)
    changed = torch.ne(old_words, words, out=padded[:num_words])
    num_changed = int(changed.count_nonzero())

    def header(form: Form, num_sent: int) -> Header:
        return Header(form=form, num_sent=num_sent, num_words=num_words, word_bytes=word_bytes)

    best = header(Form.MASK, num_changed)
    positions = gaps = torch.empty(0, dtype=torch.int64)
    if 8 * num_changed < num_words:  # otherwise gaps of a byte are longer than the mask
        positions = changed.nonzero().squeeze(1)
        gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
        for form, width in _GAP_BYTES.items():
            candidate = header(form, num_changed + int((gaps >> 8 * width).sum()))
            best = min(best, candidate, key=lambda each: each.payload_bytes)
            if candidate.num_sent == num_changed:
                break  # wider gaps would only be longer
    if not best.is_small:
        return Encoded(header=header(Form.WHOLE, 0), payload=new, num_changed=num_changed)
    payload = torch.zeros(best.payload_bytes, dtype=torch.uint8, device=new.device)
    if best.form is Form.MASK:
        sums = (padded.view(torch.uint8).view(torch.int64) * _FIRST_BITS) >> 56
        payload[: len(sums)] = (sums & 0xFF).to(torch.uint8)
        sent = words.masked_select(changed)
    else:
        if best.num_sent > num_changed:
            gaps = _bridged(gaps, bits=8 * _GAP_BYTES[best.form])
            positions = torch.cumsum(gaps + 1, 0) - 1
        _gaps_of(best, payload).copy_(gaps)
        sent = words[positions]
    payload[best.position_bytes :].view(words.dtype).copy_(sent)
    return Encoded(header=best, payload=payload, num_changed=num_changed)


def apply(header: Header, payload: Tensor, into: Tensor) -> None:
    """Turns the bytes of the base into those of the bucket that was sent.

    `payload`: uint8[header.payload_bytes], contiguous, aligned to 8 bytes. `into`: uint8[the bucket's bytes]
    with those of the base. Raises WeightSyncError if positions are malformed; `into` is then unchanged.
    """
    if header.form is Form.WHOLE:
        into.copy_(payload)
        return
    words = into.view(_WORDS[header.word_bytes])
    sent = payload[header.position_bytes :].view(words.dtype)
    if header.form is Form.MASK:
        packed = payload[: _GROUP // 8 * -(-header.num_words // _GROUP)]
        bits = (packed.to(torch.int64) * _REPEATED) & _ONE_BIT_EACH
        mask = bits.view(torch.uint8) != 0
        if int(mask.count_nonzero()) != header.num_sent or bool(mask[header.num_words :].any()):
            raise WeightSyncError("a delta's bitmask does not have one bit for each word that was sent")
        words.masked_scatter_(mask[: header.num_words], sent)
    elif header.num_sent:
        gaps = _gaps_of(header, payload).to(torch.int64)
        if header.form is Form.GAPS_2:
            gaps &= 0xFFFF  # int16 is signed
        positions = torch.cumsum(gaps + 1, 0) - 1
        if int(positions[-1]) >= header.num_words:
            raise WeightSyncError(f"a delta has positions above the last word, {header.num_words - 1}")
        words.scatter_(0, positions, sent)


def _gaps_of(header: Header, payload: Tensor) -> Tensor:
    """The part of a payload that holds the gaps, one for each word that is sent."""
    width = _GAP_BYTES[header.form]
    return payload[: width * header.num_sent].view(_WORDS[width])


def _bridged(gaps: Tensor, *, bits: int) -> Tensor:
    """Gaps below 2^bits that lead to the same positions, by way of others."""
    num_bridges = gaps >> bits
    last = torch.cumsum(num_bridges + 1, 0) - 1
    num_gaps = int(last[-1]) + 1 if len(last) else 0
    bridged = gaps.new_full((num_gaps,), (1 << bits) - 1)
    bridged[last] = gaps & ((1 << bits) - 1)
    return bridged
