"""/v1/chat/completions and /v1/models in OpenAI's format, for clients beside the job: a judge, a person.

What is said here is neither leased nor recorded, and never trained on. The engine works on tokens and has no
tokenizer; the first request here loads the model's, with its chat template. The answer has the weights of the
moment: an engine of a running job says `weight_version` in `metadata`, as SGLang does.
"""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from areal_like.errors import ArealError, ConfigError, EngineError, EpisodeError, UserError
from areal_like.trajectory import FinishReason
from rollout_server.engine.http.bodies import parse_body
from rollout_server.engine.http.chat_request import STREAM_INTERVAL, ChatRequest, check_size, parse_chat
from rollout_server.engine.http.chat_text import AnswerText
from rollout_server.engine.http.generate_request import GenerateRequest, RequestLimits, parse_generate
from rollout_server.engine.http.generation_routes import EventStream, Inbox, disconnected, submit
from rollout_server.engine.http.protocol import END_OF_STREAM, encode_event
from rollout_server.engine.loop import EngineLoop, SequenceOutput
from rollout_server.rendering.jinja import JinjaRenderer


@dataclass(eq=False, kw_only=True)
class _Choice:
    """One of the `n` answers."""

    text: AnswerText
    num_tokens: int = 0
    finish_reason: str = ""
    """Empty while it is not complete."""
    error: str = ""


@dataclass(eq=False, kw_only=True)
class _Work:
    """One request on its way."""

    chat: ChatRequest
    generation: GenerateRequest
    choices: list[_Choice]
    num_prompt_tokens: int
    id: str
    created_s: int

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens, those behind a stop text included."""
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.num_prompt_tokens + completion,
        }


class ChatRoutes:
    """The two endpoints."""

    def __init__(self, loop: EngineLoop, limits: RequestLimits, *, model_path: str) -> None:
        self._loop = loop
        self._limits = limits
        self._model_path = model_path
        self._renderer: JinjaRenderer | None = None
        self._rendering = asyncio.Lock()
        """A tokenizer is no thing for two threads at a time."""

    async def models(self, request: Request) -> Response:
        """/v1/models: the one model."""
        model = {
            "id": self._model_path,
            "object": "model",
            "created": 0,
            "owned_by": "areal-like",
            "max_model_len": self._limits.context_length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        """/v1/chat/completions: one response, or a stream of chunks."""
        try:
            body = await request.body()
            check_size(len(body), context_length=self._limits.context_length)
            work = await self._started(parse_chat(parse_body(body)))
            if work.chat.stream:
                return EventStream(self._chunks(work), on_close=lambda: self._abort_unfinished(work))
            return await self._whole(request, work)
        except UserError as error:
            return _failure(400, str(error))
        except ArealError as error:
            return _failure(500, str(error))

    async def _started(self, chat: ChatRequest) -> _Work:
        """Renders and submits a request. Raises UserError for what cannot be rendered or does not fit."""
        async with self._rendering:
            prompt, renderer = await asyncio.to_thread(self._rendered, chat)
        params = {"max_new_tokens": max(1, self._limits.context_length - len(prompt)), **chat.sampling_params}
        params["stop_token_ids"] = [*(params.get("stop_token_ids") or []), *renderer.stop_token_ids]
        if params.get("ignore_eos") is True:
            del params["stop_token_ids"]
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": params, "stream": chat.reads_text}
        if chat.reads_text:
            params["stream_interval"] = STREAM_INTERVAL
        generation = parse_generate(body, self._limits)

        def decode(tokens: Any) -> str:
            return renderer.decode(tokens, skip_special_tokens=True)

        work = _Work(
            chat=chat,
            generation=generation,
            choices=[_Choice(text=AnswerText(decode, chat.stops)) for _ in generation.sequences],
            num_prompt_tokens=len(prompt),
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created_s=int(time.time()),
        )
        inbox = Inbox(num_open=len(generation.sequences))
        for sequence in generation.sequences:
            sequence.owner = inbox
        await asyncio.wrap_future(self._loop.call(lambda core: submit(core, generation)))
        return work

    def _rendered(self, chat: ChatRequest) -> tuple[list[int], JinjaRenderer]:
        if self._renderer is None:
            self._renderer = self._loaded()
        renderer = self._renderer
        if chat.template_kwargs:
            renderer = copy.copy(renderer)
            renderer.template_kwargs = dict(chat.template_kwargs)
        try:
            return renderer.render(chat.messages), renderer
        except EpisodeError as error:
            raise UserError(str(error)) from None

    def _loaded(self) -> JinjaRenderer:
        from transformers import AutoTokenizer  # an engine that is not asked for text needs no tokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._model_path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{self._model_path} has no tokenizer: {error}") from error
        return JinjaRenderer(
            tokenizer,
            stop_token_ids=self._limits.eos_token_ids,
            vocab_size=self._limits.vocab_size,
            template_kwargs={},
        )

    async def _whole(self, request: Request, work: _Work) -> Response:
        """The response of a request without a stream; status 499 if the client has disconnected."""
        inbox: Inbox = work.generation.sequences[0].owner
        gone = asyncio.ensure_future(disconnected(request))
        try:
            while inbox.num_open:
                taking = asyncio.ensure_future(inbox.take())
                await asyncio.wait({taking, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    taking.cancel()
                    return Response(status_code=499)
                for output in taking.result():
                    self._read(work, output)
        finally:
            gone.cancel()
            self._abort_unfinished(work)
        if errors := [choice.error for choice in work.choices if choice.error]:
            raise EngineError(errors[0])
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text.text},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(work.choices)
        ]
        metadata = {"weight_version": self._loop.load().weight_version}
        return JSONResponse(
            {**_head(work, "chat.completion"), "choices": choices, "usage": work.usage, "metadata": metadata}
        )

    async def _chunks(self, work: _Work) -> AsyncIterator[bytes]:
        inbox: Inbox = work.generation.sequences[0].owner
        head = _head(work, "chat.completion.chunk")
        for index in range(len(work.choices)):
            yield encode_event({**head, **_delta(index, {"role": "assistant", "content": ""})})
        while inbox.num_open:
            for output in await inbox.take():
                index, new, has_ended = self._read(work, output)
                choice = work.choices[index]
                if choice.error:
                    yield encode_event(_error(500, choice.error))
                elif new or has_ended:
                    reason = choice.finish_reason if has_ended else None
                    delta = {"content": new} if new else {}
                    yield encode_event({**head, **_delta(index, delta, finish_reason=reason)})
        if work.chat.include_usage:
            yield encode_event({**head, "choices": [], "usage": work.usage})
        yield END_OF_STREAM

    def _read(self, work: _Work, output: SequenceOutput) -> tuple[int, str, bool]:
        """Index of the choice, its new text, and whether it has ended just now."""
        index = work.generation.sequences.index(output.sequence)
        choice = work.choices[index]
        if choice.finish_reason:
            return index, "", False  # what was sampled before the abort behind a stop text
        choice.num_tokens = len(output.output_ids)
        finish = output.finish
        is_complete = finish is not None
        new = ""
        if is_complete or work.chat.reads_text:
            new = choice.text.read(output.output_ids, is_complete=is_complete)
        if choice.text.has_stopped:
            choice.finish_reason = "stop"
            if not is_complete:
                self._loop.abort(lambda core: [output.sequence])
        elif finish is not None:
            choice.finish_reason = finish.reason.value
            if finish.reason is FinishReason.ABORT and finish.is_error:
                choice.error = finish.message
        return index, new, bool(choice.finish_reason)

    def _abort_unfinished(self, work: _Work) -> None:
        sequences = work.generation.sequences
        if any(sequence.finish is None for sequence in sequences):
            self._loop.abort(lambda core: sequences)


def _head(work: _Work, kind: str) -> dict[str, Any]:
    return {"id": work.id, "object": kind, "created": work.created_s, "model": work.chat.model}


def _delta(index: int, delta: dict[str, str], *, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {"choices": [choice]}


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _failure(status: int, message: str) -> Response:
    return JSONResponse(_error(status, message), status_code=status)
