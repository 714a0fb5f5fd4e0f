"""SGLang's response formats: generated sequences, and success and error objects.

`packed_sequence` is a sequence in the packed form (areal_like/http/streams.py).
"""

from __future__ import annotations

import base64
from typing import Any

from starlette.responses import JSONResponse, Response

from areal_like.http.streams import pack_logprobs, pack_tokens
from areal_like.trajectory import FinishReason
from rollout_server.engine.loop import SequenceOutput


def sequence_json(output: SequenceOutput, *, index: int, version: str) -> dict[str, Any]:
    """Returns one sequence in SGLang's format.

    `index`: position of the sequence in the request. `version`: weight version of its last token. The field
    `meta_info.weight_versions` is not SGLang's: it gives the version that sampled each range of output
    tokens, and routes are those of the layers with experts only.
    """
    event = _sequence(output, index=index, version=version)
    if output.sequence.return_logprob:
        pairs = zip(output.output_logprobs, output.output_ids, strict=True)
        event["meta_info"]["input_token_logprobs"] = []
        event["meta_info"]["output_token_logprobs"] = [(logprob, token, None) for logprob, token in pairs]
    if output.routes_TLK is not None:
        experts = output.routes_TLK.astype("<i4").tobytes()
        event["meta_info"]["routed_experts"] = base64.b64encode(experts).decode()
    return event


def packed_sequence(output: SequenceOutput, *, index: int, version: str) -> dict[str, Any]:
    """Returns one sequence in SGLang's format, with bytes for the tokens, their log-probs and their routes
    (uint8 or uint16)."""
    event = _sequence(output, index=index, version=version)
    event["output_ids"] = pack_tokens(output.output_ids)
    if output.sequence.return_logprob:
        event["meta_info"]["output_token_logprobs"] = pack_logprobs(output.output_logprobs)
    if output.routes_TLK is not None:
        event["meta_info"]["routed_experts"] = output.routes_TLK.tobytes()
    return event


def _sequence(output: SequenceOutput, *, index: int, version: str) -> dict[str, Any]:
    sequence, finish = output.sequence, output.finish
    meta: dict[str, Any] = {
        "id": sequence.seq_id,
        "finish_reason": None,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": len(output.output_ids),
        "cached_tokens": sequence.num_cached_tokens,
        "weight_version": version,
    }
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


def success(message: str, **fields: Any) -> Response:
    """Returns the response to a call that changed the engine's state."""
    return JSONResponse({"success": True, "message": message, **fields})


def failure(status: int, message: str) -> Response:
    """Returns the response to a call that failed."""
    return JSONResponse(
        {"success": False, "message": message, "error": {"message": message, "code": status}},
        status_code=status,
    )
