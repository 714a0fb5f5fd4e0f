"""The packed form of /generate: what the client sends, and what it does with frames that are wrong."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import EngineError, PromptRefusedError
from areal_like.http.streams import (
    END_OF_FRAMES,
    FRAMES,
    encode_frame,
    pack_logprobs,
    pack_tokens,
    read_frames,
    unpack_tokens,
)
from rollout_server.policy.generation import checked, encode_request, parse_generation

EVENT = {
    "output_ids": pack_tokens([5, 6]),
    "meta_info": {
        "finish_reason": {"type": "length", "length": 2},
        "output_token_logprobs": pack_logprobs([-0.1, -2.5]),
        "weight_versions": [{"version": "7", "start": 0, "end": 2}],
    },
    "index": 0,
}


def read(*pieces: bytes) -> list[dict[str, Any]]:
    async def arriving() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def events() -> list[dict[str, Any]]:
        return [checked(event) async for event in read_frames(arriving())]

    return asyncio.run(events())


def test_frames_are_read_wherever_they_are_cut() -> None:
    content = encode_frame([EVENT, EVENT]) + encode_frame([EVENT]) + END_OF_FRAMES
    for size in (1, 7, len(content)):
        assert read(*(content[i : i + size] for i in range(0, len(content), size))) == [EVENT] * 3


def test_log_probs_of_a_frame_are_exact() -> None:
    generation = parse_generation(EVENT)
    assert generation.output_ids.tolist() == [5, 6] and generation.versions.tolist() == [7, 7]
    assert generation.logprobs.tolist() == np.array([-0.1, -2.5], np.float32).tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xff\xff\xff", "longer than"),
        (struct.pack("<I", 1) + b"\x80", "not a list"),
        (encode_frame([3]), "not an object"),
        (struct.pack("<I", 2) + b"\xc1\xc1", "FormatError"),
        (encode_frame([]) + struct.pack("<I", 3) + b"\xd4\x05\x00", "extension"),
        (encode_frame([[0] * 700_000]), "max_array_len"),
    ],
)
def test_a_wrong_frame_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(content)


def test_an_error_event_is_raised() -> None:
    with pytest.raises(PromptRefusedError, match="too long"):
        read(encode_frame([{"error": {"message": "too long", "code": 400}}]))


@given(
    tokens=st.binary(max_size=9),
    logprobs=st.binary(max_size=9),
    spans=st.lists(st.dictionaries(st.sampled_from(["version", "start", "end"]), st.integers() | st.text())),
)
def test_wrong_bytes_are_refused_by_name(tokens: bytes, logprobs: bytes, spans: list[dict[str, Any]]) -> None:
    meta = EVENT["meta_info"] | {"output_token_logprobs": logprobs, "weight_versions": spans}  # type: ignore[operator]
    try:
        generation = parse_generation({"output_ids": tokens, "meta_info": meta})
    except (KeyError, ValueError, OverflowError, EngineError):
        return  # what the batcher turns into the failure of one request
    assert generation.output_ids.shape == generation.logprobs.shape == generation.versions.shape
    assert len(tokens) == len(logprobs) == 4 * len(generation.output_ids)


def test_a_request_says_the_same_in_both_forms() -> None:
    prompts: list[list[int]] = [[3, 1 << 20], [4]]
    params = [{"max_new_tokens": 2}] * 2

    def encoded(prompts: list[list[int]], *, is_packed: bool) -> tuple[bytes, dict[str, str]]:
        return encode_request(
            ["a;", "b;"],
            prompts,
            params,
            keeps_prefix=[False, True],
            cache_salts=["", ""],
            is_packed=is_packed,
        )

    as_json, headers = encoded(prompts, is_packed=False)
    packed, packed_headers = encoded(prompts, is_packed=True)
    body = msgpack.unpackb(packed)
    body["input_ids"] = [unpack_tokens(prompt).tolist() for prompt in body["input_ids"]]
    assert body == json.loads(as_json) and headers["Content-Type"] == "application/json"
    assert packed_headers["Content-Type"] == FRAMES
    # The engine refuses such a token, with its own message.
    packed, _ = encoded([[1 << 40], [4]], is_packed=True)
    assert msgpack.unpackb(packed)["input_ids"] == [[1 << 40], pack_tokens([4])]
