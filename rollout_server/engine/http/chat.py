"""/v1/chat/completions and /v1/models in OpenAI's format, for clients other than the job: a judge, a person.

Completions from these endpoints are not leased or recorded, and never trained on. The engine works on tokens
and has no tokenizer; the first request here loads the model's tokenizer and chat template. Completions are
sampled with whatever weights are active: in a running job the response reports them as `weight_version` in
`metadata`, as SGLang does.

Fields that cannot change the response (`user`, `metadata`, `store`) are ignored. A field that the engine does
not support (tools, penalties, response formats) is refused by name unless it has no effect.
"""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from areal_like.chat import openai
from areal_like.chat.openai import ChatRequest, ChatRules, chat_choice, chat_delta, chat_head
from areal_like.errors import ArealError, ConfigError, EngineError, EpisodeError, UserError, first_line
from areal_like.http.bodies import ParamError, integer, parse_bounded_object
from areal_like.http.streams import END_OF_EVENTS, encode_event
from areal_like.trajectory import FinishReason
from rollout_server.engine.http.generate_request import RequestLimits, parse_generate
from rollout_server.engine.http.generation_routes import EventStream, OpenRequest
from rollout_server.engine.loop import EngineLoop, SequenceOutput
from rollout_server.rendering.jinja import JinjaRenderer

MAX_CHOICES = 128
STREAM_INTERVAL = 8
"""Number of tokens between two checks of the text, for stop texts and streams."""
RULES = ChatRules(
    server="the embedded engine",
    default_model="default",
    takes_tools=False,
    refused={
        name: (neutral, "")
        for name, neutral in {
            "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"), "logit_bias": ({},), "logprobs": (False,),
            "top_logprobs": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
            "repetition_penalty": (1,), "min_tokens": (0,), "audio": (),
            "response_format": ({"type": "text"},), "modalities": (["text"],),
        }.items()
    },
)  # fmt: skip
_NO_SETTINGS = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip
"""Arguments of transformers' `apply_chat_template`. A client that could pass its own template could keep the
engine's process busy forever."""
_SAME_NAME = ("temperature", "top_p", "top_k", "min_p", "n", "ignore_eos", "stop_token_ids")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class SampledChat:
    """A checked body, except for the part that /generate checks (`sampling_params`)."""

    chat: ChatRequest
    template_kwargs: Mapping[str, Any]
    """`chat_template_kwargs`."""
    sampling_params: dict[str, Any]
    """Sampling parameters as /generate accepts them. Without `max_new_tokens`: as many tokens as fit."""

    @property
    def reads_text(self) -> bool:
        """True if the text is needed before the completion has ended."""
        return self.chat.options.stream or bool(self.chat.options.stop)


def parse_sampled_chat(body: Mapping[str, Any]) -> SampledChat:
    """Checks a body. Raises UserError for the first error."""
    chat = openai.parse_chat(body, RULES)
    kwargs = body.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ParamError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    if refused := sorted(_NO_SETTINGS & set(kwargs)):
        raise ParamError(
            f"chat_template_kwargs: {', '.join(refused)} are not settings of a template",
            param="chat_template_kwargs",
        )
    integer(body, "n", 1, low=1, high=MAX_CHOICES)
    params = {name: body[name] for name in _SAME_NAME if body.get(name) is not None}
    if not isinstance(params.get("stop_token_ids", []), list):
        raise ParamError("stop_token_ids must be a list of token ids", param="stop_token_ids")
    if chat.options.max_new_tokens is not None:
        params["max_new_tokens"] = chat.options.max_new_tokens
    if (seed := integer(body, "seed", None, low=-(1 << 63), high=(1 << 64) - 1)) is not None:
        params["sampling_seed"] = seed
    return SampledChat(chat=chat, template_kwargs=kwargs, sampling_params=params)


class CompletionText:
    """The text of one completion while its tokens arrive: what can be sent, and where it stops. Pure.

    The last tokens may be part of a character, or the start of a stop text. Their text is held back until
    more tokens have arrived or the completion has ended.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        """`decode`: returns the text of tokens, without special tokens."""
        self._decode = decode
        self._stops = stops
        self._num_kept = max(map(len, stops), default=1) - 1
        """Number of characters at the end that may be the start of a stop text."""
        self.text = ""
        """The text that can no longer change."""
        self.has_stopped = False
        """True once a stop text was found; the text ends before it."""

    def read(self, tokens: Sequence[int], *, is_complete: bool) -> str:
        """Returns new text that can no longer change; empty after a stop. `tokens`: all tokens so far."""
        if self.has_stopped:
            return ""
        text = self._decode(tokens)
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.has_stopped = True
            _, at = min(found)  # the one that was complete first
            text = text[:at]
        elif not is_complete:
            text = text.rstrip(_INCOMPLETE)
            text = text[: max(0, len(text) - self._num_kept)]
        # With some tokenizers the text of the first tokens changes when others follow; text already sent is
        # final.
        new = text[len(self.text) :]
        self.text += new
        return new


@dataclass(eq=False, kw_only=True)
class _ChatChoice:
    """One of the `n` completions."""

    text: CompletionText
    num_tokens: int = 0
    finish_reason: str = ""
    """Empty until the completion is complete."""
    error: str = ""


@dataclass(eq=False, kw_only=True)
class _Work:
    """One request in progress."""

    asked: SampledChat
    open: OpenRequest
    choices: list[_ChatChoice]
    num_prompt_tokens: int
    id: str
    created_s: int

    @property
    def usage(self) -> dict[str, int]:
        """Returns the numbers of tokens, including tokens after a stop text."""
        completion = sum(choice.num_tokens for choice in self.choices)
        return openai.usage(prompt=self.num_prompt_tokens, completion=completion)

    def head(self, *, is_chunk: bool) -> dict[str, Any]:
        """Returns the first fields of a response or chunk."""
        model = self.asked.chat.options.model
        return chat_head(id=self.id, created_s=self.created_s, model=model, is_chunk=is_chunk)


class ChatRoutes:
    """The two endpoints."""

    def __init__(self, loop: EngineLoop, limits: RequestLimits, *, model_path: str) -> None:
        self._loop = loop
        self._limits = limits
        self._model_path = model_path
        self._renderer: JinjaRenderer | None = None
        self._rendering = asyncio.Lock()
        """A tokenizer may not be used by two threads at a time."""

    async def models(self, request: Request) -> Response:
        """/v1/models: the one model."""
        model = openai.model_object(self._model_path, max_context=self._limits.context_length)
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        """/v1/chat/completions: one response, or a stream of chunks."""
        try:
            body, context = await request.body(), self._limits.context_length
            if len(body) > (most := openai.most_bytes(context_length=context)):
                raise UserError(
                    f"the body has {len(body)} bytes; at most {most} are read with a context of {context}"
                )
            work = await self._started(parse_sampled_chat(parse_bounded_object(body)))
            if work.asked.chat.options.stream:
                return EventStream(self._chunks(work), on_close=work.open.close)
            return await self._whole(request, work)
        except ParamError as error:
            return _failure(400, str(error), param=error.param)
        except UserError as error:
            return _failure(400, str(error))
        except ArealError as error:
            return _failure(500, str(error))

    async def _started(self, asked: SampledChat) -> _Work:
        """Renders and submits a request. Raises UserError if it cannot be rendered or does not fit."""
        async with self._rendering:
            prompt, renderer = await asyncio.to_thread(self._rendered, asked)
        params = {
            "max_new_tokens": max(1, self._limits.context_length - len(prompt)),
            **asked.sampling_params,
        }
        params["stop_token_ids"] = [*(params.get("stop_token_ids") or []), *renderer.stop_token_ids]
        if params.get("ignore_eos") is True:
            del params["stop_token_ids"]
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": params, "stream": asked.reads_text}
        if asked.reads_text:
            params["stream_interval"] = STREAM_INTERVAL
        generation = parse_generate(body, self._limits)

        def decode(tokens: Any) -> str:
            return renderer.decode(tokens, skip_special_tokens=True)

        stops = asked.chat.options.stop
        return _Work(
            asked=asked,
            open=await OpenRequest.started(self._loop, generation),
            choices=[_ChatChoice(text=CompletionText(decode, stops)) for _ in generation.sequences],
            num_prompt_tokens=len(prompt),
            id=uuid.uuid4().hex,
            created_s=int(time.time()),
        )

    def _rendered(self, asked: SampledChat) -> tuple[list[int], JinjaRenderer]:
        if self._renderer is None:
            self._renderer = self._loaded()
        renderer = self._renderer
        if asked.template_kwargs:
            renderer = copy.copy(renderer)
            renderer.template_kwargs = dict(asked.template_kwargs)
        try:
            return renderer.render(asked.chat.messages), renderer
        except EpisodeError as error:
            raise UserError(str(error)) from None

    def _loaded(self) -> JinjaRenderer:
        from transformers import AutoTokenizer  # an engine that is not asked for text needs no tokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._model_path, trust_remote_code=False)
        except Exception as error:  # for a broken file, tokenizers raises plain exceptions
            raise ConfigError(
                f"{self._model_path} has no tokenizer that transformers can load ({first_line(error)})"
            ) from error
        return JinjaRenderer(
            tokenizer,
            stop_token_ids=self._limits.eos_token_ids,
            vocab_size=self._limits.vocab_size,
            template_kwargs={},
        )

    async def _whole(self, request: Request, work: _Work) -> Response:
        """Returns the response to a non-streaming request; status 499 if the client has disconnected."""
        try:
            async for output in work.open.outputs_until_gone(request):
                self._read(work, output)
        finally:
            work.open.close()
        if work.open.num_running:
            return Response(status_code=499)
        if errors := [choice.error for choice in work.choices if choice.error]:
            raise EngineError(errors[0])
        choices = [
            chat_choice(
                index, {"role": "assistant", "content": choice.text.text}, reason=choice.finish_reason
            )
            for index, choice in enumerate(work.choices)
        ]
        metadata = {"weight_version": self._loop.load().weight_version}
        return JSONResponse(
            {**work.head(is_chunk=False), "choices": choices, "usage": work.usage, "metadata": metadata}
        )

    async def _chunks(self, work: _Work) -> AsyncIterator[bytes]:
        head = work.head(is_chunk=True)
        for index in range(len(work.choices)):
            yield encode_event({**head, "choices": [chat_delta(index, {"role": "assistant", "content": ""})]})
        while work.open.num_running:
            for output in await work.open.take():
                index, new, has_ended = self._read(work, output)
                choice = work.choices[index]
                if choice.error:
                    yield encode_event(openai.error_object(500, choice.error, code=500))
                elif new or has_ended:
                    reason = choice.finish_reason if has_ended else None
                    delta = chat_delta(index, {"content": new} if new else {}, reason=reason)
                    yield encode_event({**head, "choices": [delta]})
        if work.asked.chat.options.include_usage:
            yield encode_event({**head, "choices": [], "usage": work.usage})
        yield END_OF_EVENTS

    def _read(self, work: _Work, output: SequenceOutput) -> tuple[int, str, bool]:
        """Returns the index of the choice, its new text, and whether it has just ended."""
        index = work.open.index_of(output)
        choice = work.choices[index]
        if choice.finish_reason:
            return index, "", False  # tokens sampled after the stop text, before the abort
        choice.num_tokens = len(output.output_ids)
        finish = output.finish
        is_complete = finish is not None
        new = ""
        if is_complete or work.asked.reads_text:
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


def _failure(status: int, message: str, *, param: str | None = None) -> Response:
    return JSONResponse(openai.error_object(status, message, code=status, param=param), status_code=status)
