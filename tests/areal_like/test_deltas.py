"""Buckets as what changed since the last push: any bits survive, and nothing malformed is applied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_like.errors import WeightSyncError
from areal_like.weights.buckets import ITEM_BYTES, Bucket, TensorSpec
from areal_like.weights.deltas import HEADER_BYTES, MAX_SHARE, Form, Header, apply, encode, word_bytes

DTYPES = st.sampled_from(list(ITEM_BYTES))


def bucket_of(num_elements: int, dtype: str = "bfloat16") -> Bucket:
    return Bucket(tensors=(TensorSpec(name="w", dtype=dtype, shape=(num_elements,)),))


def random_bytes(num_bytes: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)


def sent_over(base: torch.Tensor, new: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, Header, int]:
    """What the receiver of `base` has after it was sent `new`; the header, and the bytes of the payload."""
    encoded = encode(base, new, word_bytes=word_bytes(bucket))
    header = Header.parse(encoded.header.to_bytes(), bucket)
    assert header == encoded.header and encoded.payload.numel() == header.payload_bytes
    into = base.clone()
    apply(header, encoded.payload.clone(), into)
    old_words, words = base.view(-1, header.word_bytes), new.view(-1, header.word_bytes)
    assert encoded.num_changed == int((old_words != words).any(1).sum())
    return into, header, header.payload_bytes


@settings(max_examples=40)
@given(
    dtype=DTYPES,
    num_elements=st.integers(0, 1500),
    changed=st.one_of(
        st.just(0.0), st.just(1.0), st.floats(0.0, 1.0), st.floats(0.0, 0.05), st.floats(0.0, 0.001)
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bits_arrive(dtype: str, num_elements: int, changed: float, seed: int) -> None:
    """All bit patterns: NaN payloads, infinities and zeros of both signs among them."""
    bucket = bucket_of(num_elements, dtype)
    base = random_bytes(bucket.num_bytes, seed=seed)
    other = random_bytes(bucket.num_bytes, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    is_changed = torch.rand(num_elements, generator=generator) < changed
    new = torch.where(is_changed.repeat_interleave(ITEM_BYTES[dtype]), other, base)
    arrived, header, size = sent_over(base, new, bucket)
    assert torch.equal(arrived, new)
    assert size == bucket.num_bytes if header.form is Form.WHOLE else size <= MAX_SHARE * bucket.num_bytes


@pytest.mark.parametrize(
    ("before", "after"),
    [(0x0000, -0x8000), (0x7FC0, 0x7FC1), (0x7FC0, -0x0040), (0x7F80, -0x0080), (0x0001, 0x0000)],
    ids=["zeros", "payloads of NaN", "signs of NaN", "infinities", "subnormal"],
)
def test_values_that_compare_strangely(before: int, after: int) -> None:
    """Bits of bfloat16: equal values with other bits are changes, and a NaN that stays is none."""
    base = torch.full((999,), before, dtype=torch.int16)
    new = base.clone()
    new[[3, 500, 998]] = after
    arrived, header, _ = sent_over(base.view(torch.uint8), new.view(torch.uint8), bucket_of(999))
    assert torch.equal(arrived, new.view(torch.uint8)) and header.num_sent == 3


@pytest.mark.parametrize(
    ("step", "form"),
    [(2, Form.WHOLE), (3, Form.MASK), (12, Form.GAPS_1), (256, Form.GAPS_1), (900, Form.GAPS_2)],
)
def test_the_smallest_form_is_chosen(step: int, form: Form) -> None:
    num_words = 90_000
    base = random_bytes(2 * num_words, seed=1)
    new = base.clone()
    new.view(torch.int16)[::step] ^= 1
    arrived, header, size = sent_over(base, new, bucket_of(num_words))
    assert header.form is form and torch.equal(arrived, new)
    forms = [mask_or_gaps(each, num_words=num_words, step=step) for each in (Form.MASK, Form.GAPS_1)]
    assert size <= min(forms) or form is Form.WHOLE


def mask_or_gaps(form: Form, *, num_words: int, step: int) -> int:
    """Bytes of a payload of this form, with a word at each multiple of `step` and where gaps of a byte are
    bridged."""
    num_sent = -(-num_words // step) * (1 if form is Form.MASK else 1 + (step - 1) // 256)
    return Header(form=form, num_sent=num_sent, num_words=num_words, word_bytes=2).payload_bytes


@pytest.mark.parametrize("first", [0, 255, 256, 65_535, 65_536, 199_999])
@pytest.mark.parametrize("gap", [0, 254, 255, 256, 511, 65_535, 65_536, 131_071, 200_000])
def test_gaps_of_any_length_are_bridged(first: int, gap: int) -> None:
    num_words = 400_001
    base = torch.zeros(2 * num_words, dtype=torch.uint8)
    new = base.clone()
    new.view(torch.int16)[[first, first + gap + 1]] = -1
    arrived, header, size = sent_over(base, new, bucket_of(num_words))
    assert torch.equal(arrived, new)
    assert header.form in (Form.GAPS_1, Form.GAPS_2) and size < 100


def test_words_are_those_of_the_narrowest_tensor() -> None:
    """A bucket may hold float32 vectors before bfloat16 matrices."""
    wide, narrow = (TensorSpec(name=d, dtype=d, shape=(64,)) for d in ("float32", "bfloat16"))
    bucket = Bucket(tensors=(wide, narrow))
    assert word_bytes(bucket) == 2
    base = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    new = base.clone()
    new[:256].view(torch.float32)[7] = 1.5  # its upper half alone changes
    arrived, header, _ = sent_over(base, new, bucket)
    assert torch.equal(arrived, new) and header.num_sent == 1


@pytest.mark.parametrize(
    ("form", "num_sent", "problem"),
    [
        (9, 0, "form is 9: want 0 to 3"),
        (-1, 0, "form is -1"),
        (Form.WHOLE, 1, "has 1 words of a bucket of 1000"),
        (Form.MASK, -1, "-1 words"),
        (Form.MASK, 1001, "1001 words"),
        (Form.MASK, 500, "too many"),
        (Form.GAPS_1, 400, "too many"),
        (Form.GAPS_2, 2**62, "too many"),
    ],
)
def test_a_malformed_header_is_refused(form: int, num_sent: int, problem: str) -> None:
    raw = torch.tensor([form, num_sent], dtype=torch.int64).view(torch.uint8)
    assert len(raw) == HEADER_BYTES
    with pytest.raises(WeightSyncError, match=problem):
        Header.parse(raw, bucket_of(1000))


@pytest.mark.parametrize("form", [Form.MASK, Form.GAPS_1, Form.GAPS_2])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), num_sent=st.integers(0, 40), num_words=st.integers(1, 700))
def test_a_malformed_payload_changes_nothing(form: Form, seed: int, num_sent: int, num_words: int) -> None:
    """Positions are checked before anything is written: any payload is applied at ascending positions of the
    bucket, or refused."""
    header = Header(form=form, num_sent=min(num_sent, num_words), num_words=num_words, word_bytes=2)
    base = random_bytes(2 * num_words, seed=seed)
    into = base.clone()
    try:
        apply(header, random_bytes(header.payload_bytes, seed=seed + 1), into)
    except WeightSyncError as error:
        assert ("positions above the last word" in str(error)) or ("bitmask" in str(error))
        assert torch.equal(into, base)
    else:
        assert int((into.view(torch.int16) != base.view(torch.int16)).sum()) <= header.num_sent
