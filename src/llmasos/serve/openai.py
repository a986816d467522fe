"""OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions, /v1/embeddings.

What a request asks for is done or refused by name. Not here yet: tool calls are not read out of the model's text,
`best_of`, `suffix`, images and audio.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from llmasos.client.types import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatReply,
    CompletionChoice,
    CompletionRequest,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    ErrorBody,
    Model,
    ModelList,
    TextCompletion,
    WireRequest,
)
from llmasos.errors import LLMasOSError, UnsupportedError
from llmasos.inference.request import Completion, RequestOutput, TokenLogprob
from llmasos.serve import prepare, render
from llmasos.serve.models import Models, Served
from llmasos.serve.problems import CLIENT_CLOSED_REQUEST, error_body, problem_of, unexpected
from llmasos.serve.stream import DONE, Disconnected, EventStream, until_disconnect

_WRONG = {
    400: "A field is wrong, unknown or not supported; `param` names it.",
    404: "The model is not served here.",
    413: "The body is too long.",
    500: "The server failed; `message` has the id of the request in its log.",
    503: "Too many requests wait for the model; see Retry-After.",
}


def _responses(streamed: str = "") -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {k: {"model": ErrorBody, "description": v} for k, v in _WRONG.items()}
    if streamed:
        schema = {"type": "string", "description": f"`data:` lines of {streamed} objects, then `data: [DONE]`."}
        found[200] = {"description": "The answer", "content": {"text/event-stream": {"schema": schema}}}
    return found


def _refusals(model: type[WireRequest]) -> str:
    return f"Refused by name when set: {', '.join(f'`{name}`' for name in sorted(model.UNSUPPORTED))}."


def create_router(models: Models) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models", summary="List the served models")
    async def list_models() -> ModelList:
        return ModelList(data=[describe(models, name) for name in models.names])

    @router.get("/models/{model:path}", summary="Describe one model", responses={404: _responses()[404]})
    async def retrieve_model(model: str) -> Model:
        return describe(models, model)

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        description=_refusals(ChatCompletionRequest),
        response_model=ChatCompletion,
        responses=_responses("ChatCompletionChunk"),
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        served = models[body.model]
        if body.stream:
            return await _streamed(request, _chat_events(served, body))
        return await _whole(request, _chat(served, body))

    @router.post(
        "/completions",
        summary="Continue a text",
        description=_refusals(CompletionRequest),
        response_model=TextCompletion,
        responses=_responses("TextCompletion"),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served = models[body.model]
        if body.stream:
            return await _streamed(request, _completion_events(served, body))
        return await _whole(request, _complete(served, body))

    @router.post("/embeddings", summary="Embed texts", response_model=EmbeddingList, responses=_responses())
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await _whole(request, _embed(models[body.model], body))

    return router


async def _whole(request: Request, work: Awaitable[Response]) -> Response:
    try:
        return await until_disconnect(request.receive, work)
    except Disconnected:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _streamed(request: Request, events: AsyncGenerator[str, None]) -> Response:
    """The stream once its first event is there: until then errors are ordinary answers."""
    request_id: str = request.state.request_id

    def error_event(e: Exception) -> str:
        problem = problem_of(e) if isinstance(e, LLMasOSError) else unexpected(request_id)
        problem.pop("headers", None)
        return render.event(error_body(**problem))

    async def start() -> Response:
        return EventStream(await anext(events), events, error_event)

    return await _whole(request, start())


def describe(models: Models, name: str) -> Model:
    served = models[name]
    return Model(
        id=name,
        object="model",
        created=models.created,
        owned_by="llmasos",
        context_length=served.model.context_length,
        parent=served.base if served.adapter is not None else None,
    )


def _head(kind: str, object_: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": object_, "created": int(time.time()), "model": model}


def _json(body: Any) -> Response:
    return Response(render.dump(body), media_type="application/json")


async def _chat(served: Served, body: ChatCompletionRequest) -> Response:
    ids = await asyncio.to_thread(prepare.chat_prompt_ids, served.model, body)
    params = prepare.chat_params(served.model, body, len(ids))
    [output] = await served.complete([ids], params, **prepare.request_options(body))
    choices = []
    for one in output.outputs:
        logprobs = None if one.logprobs is None else render.chat_logprobs(served.model.tokenizer, one.logprobs)
        reply = ChatReply(role="assistant", content=one.text, refusal=None)
        reason = render.finish(one.finish_reason)
        choices.append(ChatChoice(index=one.index, message=reply, finish_reason=reason, logprobs=logprobs))
    usage = render.usage(len(ids), output.num_output_tokens, output.metrics.num_cached_tokens)
    return _json(ChatCompletion(**_head("chatcmpl", "chat.completion", body.model), choices=choices, usage=usage))


async def _chat_events(served: Served, body: ChatCompletionRequest) -> AsyncGenerator[str, None]:
    """One event with the role for each choice, then its text, then its end; then the usage, where asked for."""
    ids = await asyncio.to_thread(prepare.chat_prompt_ids, served.model, body)
    params = prepare.chat_params(served.model, body, len(ids))
    head = _head("chatcmpl", "chat.completion.chunk", body.model)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    if with_usage:
        head["usage"] = None
    opened: set[int] = set()
    num_output_tokens = num_cached_tokens = 0

    def event(index: int, delta: ChatDelta, **more: Any) -> str:
        choice = ChatChunkChoice(index=index, delta=delta, **{"finish_reason": None, **more})
        return render.event(ChatCompletionChunk(**head, choices=[choice]))

    async with aclosing(served.stream([ids], params, **prepare.request_options(body))) as chunks:
        async for _, chunk in chunks:
            num_output_tokens += len(chunk.token_ids)
            num_cached_tokens += chunk.metrics.num_cached_tokens if chunk.metrics else 0
            if chunk.index not in opened:
                opened.add(chunk.index)
                yield event(chunk.index, ChatDelta(role="assistant", content=""))
            if chunk.text or chunk.logprobs:
                logprobs = render.chat_logprobs(served.model.tokenizer, chunk.logprobs) if body.logprobs else None
                yield event(chunk.index, ChatDelta(content=chunk.text), logprobs=logprobs)
            if chunk.finish_reason:
                yield event(chunk.index, ChatDelta(), finish_reason=render.finish(chunk.finish_reason))
    if with_usage:
        last = head | {"usage": render.usage(len(ids), num_output_tokens, num_cached_tokens)}
        yield render.event(ChatCompletionChunk(**last, choices=[]))
    yield DONE


async def _complete(served: Served, body: CompletionRequest) -> Response:
    prompts = await asyncio.to_thread(prepare.completion_prompts, served.model, body)
    params = prepare.completion_params(served.model, body)
    outputs = await served.complete(prompts, params, **prepare.request_options(body))
    echoes = _echoes(served, body, prompts)
    choices = []
    for i, (echo, output) in enumerate(zip(echoes, outputs, strict=True)):
        for one in output.outputs:
            choices.append(
                CompletionChoice(
                    index=i * len(output.outputs) + one.index,
                    text=echo + one.text,
                    finish_reason=render.finish(one.finish_reason),
                    logprobs=_completion_logprobs(served, body, output, one),
                )
            )
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_cached_tokens = sum(output.metrics.num_cached_tokens for output in outputs)
    usage = render.usage(num_prompt_tokens, sum(output.num_output_tokens for output in outputs), num_cached_tokens)
    return _json(TextCompletion(**_head("cmpl", "text_completion", body.model), choices=choices, usage=usage))


def _echoes(served: Served, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """What stands before each prompt's completions: the prompt with `echo`, else nothing."""
    if not body.echo:
        return [""] * len(prompts)
    given = prepare.batch(body.prompt, "prompt")
    decode = served.model.tokenizer.decode
    return [one if isinstance(one, str) else decode(one, skip_special_tokens=False) for one in given]


def _completion_logprobs(served: Served, body: CompletionRequest, output: RequestOutput, one: Completion) -> Any:
    if body.logprobs is None:
        return None
    positions: list[tuple[int, TokenLogprob | None]] = []
    if body.echo:
        positions += zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
    positions += [(logprob.token_id, logprob) for logprob in one.logprobs or ()]
    return render.completion_logprobs(served.model.tokenizer, positions)


async def _completion_events(served: Served, body: CompletionRequest) -> AsyncGenerator[str, None]:
    """The completions of all prompts as they come; `index` tells them apart."""
    prompts = await asyncio.to_thread(prepare.completion_prompts, served.model, body)
    params = prepare.completion_params(served.model, body)
    head = _head("cmpl", "text_completion", body.model)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    if with_usage:
        head["usage"] = None
    num_output_tokens = num_cached_tokens = 0
    echoes = _echoes(served, body, prompts)
    offsets: dict[int, int] = {}
    async with aclosing(served.stream(prompts, params, **prepare.request_options(body))) as chunks:
        async for prompt, chunk in chunks:
            num_output_tokens += len(chunk.token_ids)
            num_cached_tokens += chunk.metrics.num_cached_tokens if chunk.metrics else 0
            index = prompt * params.n + chunk.index
            text = chunk.text if index in offsets else echoes[prompt] + chunk.text
            offset = offsets.setdefault(index, 0)
            logprobs = None
            if body.logprobs is not None:
                positions = [(logprob.token_id, logprob) for logprob in chunk.logprobs]
                logprobs = render.completion_logprobs(served.model.tokenizer, positions, offset)
                offsets[index] += sum(map(len, logprobs.tokens))
            reason = render.finish(chunk.finish_reason)
            choice = CompletionChoice(index=index, text=text, finish_reason=reason, logprobs=logprobs)
            yield render.event(TextCompletion(**head, choices=[choice]))
    if with_usage:
        usage = render.usage(sum(map(len, prompts)), num_output_tokens, num_cached_tokens)
        yield render.event(TextCompletion(**head | {"usage": usage}, choices=[]))
    yield DONE


async def _embed(served: Served, body: EmbeddingRequest) -> Response:
    texts, num_tokens = await asyncio.to_thread(prepare.embedding_texts, served.model, body)
    vectors = await served.embed(texts)
    if body.dimensions not in (None, len(vectors[0])):
        # Cutting a vector short keeps its meaning only for models trained for that, which no file says reliably.
        raise UnsupportedError(
            f"{body.model} makes embeddings of {len(vectors[0])} dimensions, not {body.dimensions}.", param="dimensions"
        )
    as_base64 = body.encoding_format == "base64"
    data = [
        Embedding(object="embedding", index=i, embedding=render.embedding_base64(vector) if as_base64 else vector)
        for i, vector in enumerate(vectors)
    ]
    usage = render.embedding_usage(num_tokens)
    return _json(EmbeddingList(object="list", data=data, model=body.model, usage=usage))
