"""OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions, /v1/embeddings.

What a request asks for is done or refused by name. Not here yet: tool calls are not read out of the model's text,
`best_of`, `suffix`, images and audio.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
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
from llmasos.errors import UnsupportedError
from llmasos.inference.request import Completion, RequestOutput, TokenLogprob
from llmasos.serve import prepare, render
from llmasos.serve.caller import Caller, caller_of
from llmasos.serve.models import Models, Served
from llmasos.serve.respond import json_response, streamed, whole
from llmasos.serve.stream import DONE
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnUsage, turn, whole_turn
from llmasos.text.reply import TextDelta

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
        caller = caller_of(request)
        if body.stream:
            return await streamed(request, _chat_events(models, caller, body))
        return await whole(request, _chat(models, caller, body))

    @router.post(
        "/completions",
        summary="Continue a text",
        description=_refusals(CompletionRequest),
        response_model=TextCompletion,
        responses=_responses("TextCompletion"),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        caller = caller_of(request)
        if body.stream:
            return await streamed(request, _completion_events(models, caller, body))
        return await whole(request, _complete(models, caller, body))

    @router.post("/embeddings", summary="Embed texts", response_model=EmbeddingList, responses=_responses())
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await whole(request, _embed(models, caller_of(request), body))

    return router


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


async def _chat(models: Models, caller: Caller, body: ChatCompletionRequest) -> Response:
    async with models.lease(body.model, caller) as served:
        replies, took = await whole_turn(served, body)
        choices = []
        for index, one in enumerate(replies):
            logprobs = render.chat_logprobs(served.model.tokenizer, one.logprobs) if body.logprobs else None
            reply = ChatReply(role="assistant", content=one.text, refusal=None)
            choices.append(ChatChoice(index=index, message=reply, finish_reason=one.finish_reason, logprobs=logprobs))
        usage = render.usage(took.num_prompt_tokens, took.num_output_tokens, took.num_cached_tokens)
        return json_response(
            ChatCompletion(**_head("chatcmpl", "chat.completion", body.model), choices=choices, usage=usage)
        )


async def _chat_events(models: Models, caller: Caller, body: ChatCompletionRequest) -> AsyncGenerator[str, None]:
    """One event with the role for each choice, then its text, then its end; then the usage, where asked for."""
    head = _head("chatcmpl", "chat.completion.chunk", body.model)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    if with_usage:
        head["usage"] = None
    opened: set[int] = set()

    def event(index: int, delta: ChatDelta, **more: Any) -> str:
        choice = ChatChunkChoice(index=index, delta=delta, **{"finish_reason": None, **more})
        return render.event(ChatCompletionChunk(**head, choices=[choice]))

    async with models.lease(body.model, caller) as served, aclosing(turn(served, body)) as events:
        async for one in events:
            if isinstance(one, TurnDelta | TurnEnd) and one.index not in opened:
                opened.add(one.index)
                yield event(one.index, ChatDelta(role="assistant", content=""))
            match one:
                case TurnDelta(index, TextDelta(text), found):
                    logprobs = render.chat_logprobs(served.model.tokenizer, found) if body.logprobs else None
                    yield event(index, ChatDelta(content=text), logprobs=logprobs)
                case TurnEnd(index, reason):
                    yield event(index, ChatDelta(), finish_reason=reason)
                case TurnUsage() if with_usage:
                    usage = render.usage(one.num_prompt_tokens, one.num_output_tokens, one.num_cached_tokens)
                    yield render.event(ChatCompletionChunk(**head | {"usage": usage}, choices=[]))
    yield DONE


async def _complete(models: Models, caller: Caller, body: CompletionRequest) -> Response:
    async with models.lease(body.model, caller) as served:
        return await _completed(served, body)


async def _completed(served: Served, body: CompletionRequest) -> Response:
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
    return json_response(TextCompletion(**_head("cmpl", "text_completion", body.model), choices=choices, usage=usage))


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


async def _completion_events(models: Models, caller: Caller, body: CompletionRequest) -> AsyncGenerator[str, None]:
    async with models.lease(body.model, caller) as served, aclosing(_completed_events(served, body)) as events:
        async for event in events:
            yield event


async def _completed_events(served: Served, body: CompletionRequest) -> AsyncGenerator[str, None]:
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


async def _embed(models: Models, caller: Caller, body: EmbeddingRequest) -> Response:
    async with models.lease(body.model, caller) as served:
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
    return json_response(EmbeddingList(object="list", data=data, model=body.model, usage=usage))
