"""SGLang's response formats: a generated sequence, a server-sent event, success and error objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from areal_like.trajectory import FinishReason
from rollout_server.engine.loop import SequenceOutput

END_OF_STREAM = b"data: [DONE]\n\n"


def sequence_json(
    output: SequenceOutput, *, index: int, return_logprob: bool, version: str
) -> dict[str, Any]:
    """One sequence in SGLang's format.

    `index`: position of the sequence in the request. `version`: weight version of its last token. The field
    `meta_info.weight_versions` is not SGLang's: it has the version that sampled each range of output tokens.
    """
    sequence, finish = output.sequence, output.finish
    meta: dict[str, Any] = {
        "id": sequence.seq_id,
        "finish_reason": None,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": len(output.output_ids),
        "cached_tokens": sequence.num_cached_tokens,
        "weight_version": version,
    }
    if return_logprob:
        pairs = zip(output.output_logprobs, output.output_ids, strict=True)
        meta["input_token_logprobs"] = []
        meta["output_token_logprobs"] = [(logprob, token, None) for logprob, token in pairs]
    if finish is not None:
        reason: dict[str, Any] = {"type": finish.reason.value}
        if finish.reason is FinishReason.STOP:
            reason["matched"] = finish.matched
        elif finish.reason is FinishReason.LENGTH:
            reason["length"] = len(output.output_ids)
        else:
            reason["message"] = finish.message
            reason["status_code"] = 500 if finish.is_error else None
        meta["finish_reason"] = reason
        meta["weight_versions"] = [
            {"version": v, "start": start, "end": end} for v, start, end in output.version_spans
        ]
    return {"text": "", "output_ids": output.output_ids, "meta_info": meta, "index": index}


def encode_event(event: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def success(message: str, **fields: Any) -> Response:
    """The response of a call that changes the engine's state."""
    return JSONResponse({"success": True, "message": message, **fields})


def failure(status: int, message: str) -> Response:
    """The response of any call that failed."""
    return JSONResponse(
        {"success": False, "message": message, "error": {"message": message, "code": status}},
        status_code=status,
    )
