"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring as quoted  # json.dumps(text, ensure_ascii=False), in C
from typing import Any

from llmasos.client.types import CompletionChoice, CompletionRequest, TextCompletion
from llmasos.inference.request import Completion, RequestOutput, TokenLogprob
from llmasos.serve import prepare, render
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models, Served
from llmasos.serve.openai.common import Events, head
from llmasos.serve.stream import DONE


async def answer(models: Models, caller: Caller, body: CompletionRequest) -> TextCompletion:
    async with models.lease(body.model, caller) as served:
        return await _answer(served, body)


async def _answer(served: Served, body: CompletionRequest) -> TextCompletion:
    prompts = await asyncio.to_thread(prepare.completion_prompts, served.model, body)
    params = prepare.completion_params(served.model, body)
    with prepare.form_called("structured_outputs"):
        outputs = await served.complete(prompts, params, **prepare.request_options(body))
    return await asyncio.to_thread(_completion, served, body, outputs)


def _completion(served: Served, body: CompletionRequest, outputs: Sequence[RequestOutput]) -> TextCompletion:
    n = body.n or 1
    echoes = _echoes(served, body, len(outputs))
    choices = []
    for i, (echo, output) in enumerate(zip(echoes, outputs, strict=True)):
        for at, one in enumerate(_best(output.outputs, n)):
            choices.append(
                CompletionChoice(
                    index=i * n + at,
                    text=echo + one.text,
                    finish_reason=render.finish(one.finish_reason),
                    logprobs=_completion_logprobs(served, body, output, one),
                )
            )
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_cached_tokens = sum(output.metrics.num_cached_tokens for output in outputs)
    usage = render.usage(num_prompt_tokens, sum(output.num_output_tokens for output in outputs), num_cached_tokens)
    return TextCompletion(**head("cmpl", "text_completion", body.model), choices=choices, usage=usage)


def _best(outputs: Sequence[Completion], n: int) -> Sequence[Completion]:
    """Of more completions than were asked for, the `n` whose tokens are likeliest, on average."""
    if len(outputs) <= n:
        return outputs

    def mean(one: Completion) -> float:
        logprobs = [position.logprob for position in one.logprobs or ()]
        return sum(logprobs) / len(logprobs) if logprobs else 0.0

    return sorted(outputs, key=mean, reverse=True)[:n]


def _echoes(served: Served, body: CompletionRequest, num_prompts: int) -> list[str]:
    """What stands before each prompt's completions: the prompt with `echo`, else nothing. Blocking."""
    if not body.echo:
        return [""] * num_prompts
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


async def events(models: Models, caller: Caller, body: CompletionRequest) -> AsyncGenerator[str, None]:
    """The completions of all prompts as they come; `index` tells them apart."""
    async with models.lease(body.model, caller) as served, aclosing(_events(served, body)) as found:
        with prepare.form_called("structured_outputs"):
            async for event in found:
                yield event
    yield DONE


async def _events(served: Served, body: CompletionRequest) -> AsyncGenerator[str, None]:
    prompts = await asyncio.to_thread(prepare.completion_prompts, served.model, body)
    params = prepare.completion_params(served.model, body)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    stream = Events("cmpl", "text_completion", body.model, with_usage=with_usage)
    num_output_tokens = num_cached_tokens = 0
    echoes = await asyncio.to_thread(_echoes, served, body, len(prompts))
    offsets: dict[int, int] = {}
    async with aclosing(served.stream(prompts, params, **prepare.request_options(body))) as chunks:
        async for prompt, chunk in chunks:
            num_output_tokens += len(chunk.token_ids)
            num_cached_tokens += chunk.metrics.num_cached_tokens if chunk.metrics else 0
            index = prompt * params.n + chunk.index
            text = chunk.text if index in offsets else echoes[prompt] + chunk.text
            offset = offsets.setdefault(index, 0)
            logprobs = "null"
            if body.logprobs is not None:
                positions = [(logprob.token_id, logprob) for logprob in chunk.logprobs]
                found = render.completion_logprobs(served.model.tokenizer, positions, offset)
                offsets[index] += sum(map(len, found.tokens))
                logprobs = render.dump(found)
            reason = render.finish(chunk.finish_reason)
            finish = f'"{reason}"' if reason else "null"
            yield stream.choice(index, f'"text": {quoted(text)}, "finish_reason": {finish}, "logprobs": {logprobs}')
    if with_usage:
        usage = render.usage(sum(map(len, prompts)), num_output_tokens, num_cached_tokens)
        yield stream.usage(usage)
