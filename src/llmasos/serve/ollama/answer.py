"""Answers of Ollama's: a request on its way through a leased model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from llmasos.client.types.ollama import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbeddingsResponse,
    OllamaEmbedRequest,
    OllamaEmbedResponse,
    OllamaGenerateRequest,
)
from llmasos.errors import ContextOverflowError, InvalidInputError
from llmasos.serve import prepare, render
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models, Served
from llmasos.serve.native.residents import InProcess, Residents
from llmasos.serve.ollama.names import served_name
from llmasos.serve.ollama.reply import Clock, Line, Writer, add_up
from llmasos.serve.ollama.request import Asked, Generating, apply_model, check_room, keep_alive_of, read
from llmasos.serve.openai.embeddings import cut
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnEvent, TurnStart, TurnUsage, turn
from llmasos.text.reply import TextDelta

_FIELDS = {"response_format": "format", "structured_outputs": "format", "stop": "options.stop"}
"""Of a chat request, where they have other names here."""


async def lines(models: Models, residents: Residents, caller: Caller, body: Generating) -> AsyncGenerator[Line, None]:
    clock = Clock()
    name = await served_name(models, body.model, caller)
    asked = read(body, name)
    is_chat = isinstance(body, OllamaChatRequest)
    if asked.is_empty:
        yield await _loaded(models, residents, caller, body, asked)
        return
    stay = _stay(asked.keep_alive, residents, caller, asked.warnings)
    async with models.lease(name, caller, keep_alive=stay) as served:
        clock.load_ends()
        check_room(body.options, asked, served.model)
        writer = Writer(
            body.model,
            is_chat,
            clock,
            asked.warnings,
            tokenizer=served.model.tokenizer,
            with_logprobs=bool(body.logprobs),
        )
        async with prepare.fields_called(_FIELDS), aclosing(_turn(served, body, asked)) as events:
            async for event in events:
                for line in writer.read(event):
                    yield line


def _turn(served: Served, body: Generating, asked: Asked) -> AsyncGenerator[TurnEvent, None]:
    if isinstance(body, OllamaGenerateRequest):
        # What was trained to continue text has no template, and Ollama's own for it is the prompt alone.
        plain = served.model.chat_template is None and not body.system and not body.think
        if body.raw or plain:
            return _raw_turn(served, asked)
    request = asked.chat()
    apply_model(body, asked, request, served.model)
    return turn(served, request, fit=True)


async def _raw_turn(served: Served, asked: Asked) -> AsyncGenerator[TurnEvent, None]:
    """The prompt goes to the model as it is, what comes is text."""
    model = served.model
    [ids] = await asyncio.to_thread(prepare.completion_prompts, model, asked.completion(1))
    room = model.context_length - len(ids)
    if room < 1:
        raise ContextOverflowError(len(ids), 1, model.context_length)
    request = asked.completion(min(asked.max_tokens or room, room))
    params = prepare.completion_params(model, request)
    yield TurnStart(len(ids))
    num_output_tokens = num_cached_tokens = 0
    async with aclosing(served.stream([ids], params, **prepare.request_options(request))) as chunks:
        with prepare.form_called("format"):
            async for _, chunk in chunks:
                num_output_tokens += len(chunk.token_ids)
                num_cached_tokens += chunk.metrics.num_cached_tokens if chunk.metrics else 0
                if chunk.text or chunk.logprobs:
                    yield TurnDelta(0, TextDelta(chunk.text), chunk.logprobs)
                if (reason := render.finish(chunk.finish_reason)) is not None:
                    yield TurnEnd(0, reason, chunk.stop_reason)
    yield TurnUsage(len(ids), num_output_tokens, num_cached_tokens)


async def _loaded(models: Models, residents: Residents, caller: Caller, body: Generating, asked: Asked) -> Line:
    """Nothing was asked: the model is loaded, or with keep_alive 0 unloaded."""
    writer = Writer(body.model, isinstance(body, OllamaChatRequest), Clock(), asked.warnings)
    base, _ = models.check(asked.name, caller)
    if asked.keep_alive == 0:
        caller.check_scope("manage")
        await residents.unload(base, force=False)
        return writer.last("unload")
    stay = _stay(asked.keep_alive, residents, caller, asked.warnings)
    async with models.lease(asked.name, caller, keep_alive=stay):
        return writer.last("load")


def _stay(asked: float | None, residents: Residents, caller: Caller, warnings: list[str]) -> float | None:
    """How long a lease keeps its model. Memory is shared, so that only who manages it has a say."""
    if asked is None:
        return None
    if isinstance(residents, InProcess):
        warnings.append("keep_alive has no effect: the models belong to the program that this server runs in.")
    elif "manage" not in caller.scopes:
        warnings.append("keep_alive has no effect: it needs a key with the scope manage.")
    else:
        return asked
    return None


async def whole_answer(found: AsyncGenerator[Line, None]) -> Line:
    async with aclosing(found):
        return add_up([line async for line in found])


async def embed(models: Models, residents: Residents, caller: Caller, body: OllamaEmbedRequest) -> OllamaEmbedResponse:
    clock = Clock()
    texts = [body.input] if isinstance(body.input, str) else body.input
    name = await served_name(models, body.model, caller)
    warnings = body.options.warnings() if body.options else []
    stay = _stay(keep_alive_of(body), residents, caller, warnings)
    vectors: list[list[float]] = []
    num_tokens = 0
    async with models.lease(name, caller, keep_alive=stay) as served:
        clock.load_ends()
        if any(texts):  # without any, the model is loaded, and that is all
            vectors, num_tokens = await _vectors(served, texts, body.truncate is True, warnings)
            allowed = served.model.matryoshka
            vectors = await asyncio.to_thread(cut, vectors, body.dimensions or None, allowed, name)
    took = clock.end()
    extra: dict[str, Any] = {"warnings": warnings} if warnings else {}
    return OllamaEmbedResponse.model_construct(  # a million numbers of our own need no check
        model=body.model,
        embeddings=vectors,
        total_duration=took["total_duration"],
        load_duration=took["load_duration"],
        prompt_eval_count=num_tokens,
        **extra,
    )


async def embed_one(
    models: Models, residents: Residents, caller: Caller, body: OllamaEmbeddingsRequest
) -> OllamaEmbeddingsResponse:
    warnings = body.options.warnings() if body.options else []
    name = await served_name(models, body.model, caller)
    stay = _stay(keep_alive_of(body), residents, caller, warnings)
    async with models.lease(name, caller, keep_alive=stay) as served:
        vectors, _ = await _vectors(served, [body.prompt], False, warnings) if body.prompt else ([[]], 0)
    extra: dict[str, Any] = {"warnings": warnings} if warnings else {}
    return OllamaEmbeddingsResponse(embedding=vectors[0], **extra)


async def _vectors(
    served: Served, texts: list[str], truncate: bool, warnings: list[str]
) -> tuple[list[list[float]], int]:
    if len(texts) > prepare.MAX_INPUTS:
        raise InvalidInputError(
            f"input holds {len(texts)} texts; at most {prepare.MAX_INPUTS} are allowed.", param="input"
        )
    model = served.model
    counts = await asyncio.to_thread(lambda: [len(model.tokenizer.encode(text)) for text in texts])
    too_long = [i for i, count in enumerate(counts) if count > model.context_length]
    if too_long and not truncate:
        raise ContextOverflowError(counts[too_long[0]], 0, model.context_length)
    for i in too_long:
        warnings.append(f"input {i} was cut: it has {counts[i]} tokens, and the context holds {model.context_length}.")
    vectors = await served.embed(texts, **({"truncate": True} if too_long else {}))
    return vectors, sum(min(count, model.context_length) for count in counts)
