"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring as quoted  # json.dumps(text, ensure_ascii=False), in C

from llmasos.client.types import ChatChoice, ChatCompletion, ChatCompletionRequest, ChatReply
from llmasos.serve import render
from llmasos.serve.caller import Caller
from llmasos.serve.models import Models, Served
from llmasos.serve.openai.common import Events, head
from llmasos.serve.stream import DONE
from llmasos.serve.turn import Reply, TurnDelta, TurnEnd, TurnUsage, turn, whole_turn
from llmasos.text.reply import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta, ToolCallStart

_OPENS = '"delta": {"role": "assistant", "content": ""}, "finish_reason": null'


async def answer(models: Models, caller: Caller, body: ChatCompletionRequest) -> ChatCompletion:
    async with models.lease(body.model, caller) as served:
        replies, took = await whole_turn(served, body)
        choices = await asyncio.to_thread(_choices, served, body, replies)
        return ChatCompletion(**head("chatcmpl", "chat.completion", body.model), choices=choices, usage=took.body())


def _choices(served: Served, body: ChatCompletionRequest, replies: Sequence[Reply]) -> list[ChatChoice]:
    return [_choice(served, body, index, reply) for index, reply in enumerate(replies)]


def _choice(served: Served, body: ChatCompletionRequest, index: int, one: Reply) -> ChatChoice:
    # content is null where a call stands in its place, as clients expect
    reply = ChatReply(role="assistant", content=one.text or (None if one.tool_calls else ""), refusal=None)
    if one.reasoning:
        reply.reasoning_content = reply.reasoning = one.reasoning
    if one.tool_calls:
        reply.tool_calls = one.tool_calls
    logprobs = render.chat_logprobs(served.model.tokenizer, one.logprobs) if body.logprobs else None
    return ChatChoice(index=index, message=reply, finish_reason=one.finish_reason, logprobs=logprobs)


async def events(models: Models, caller: Caller, body: ChatCompletionRequest) -> AsyncGenerator[str, None]:
    """One event with the role for each choice, then its pieces, then its end; then the usage, where asked for."""
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    stream = Events("chatcmpl", "chat.completion.chunk", body.model, with_usage=with_usage)
    opened: set[int] = set()
    async with models.lease(body.model, caller) as served, aclosing(turn(served, body)) as pieces:
        async for one in pieces:
            if isinstance(one, TurnDelta | TurnEnd):
                if one.index not in opened:
                    opened.add(one.index)
                    yield stream.choice(one.index, _OPENS)
                if isinstance(one, TurnEnd):
                    end = f'"delta": {{}}, "finish_reason": "{one.finish_reason}"{_stop(one.stop_reason)}'
                    yield stream.choice(one.index, end)
                    continue
                logprobs = "null"
                if body.logprobs:
                    logprobs = render.dump(render.chat_logprobs(served.model.tokenizer, one.logprobs))
                fields = f'"delta": {{{_delta(one.event)}}}, "finish_reason": null, "logprobs": {logprobs}'
                yield stream.choice(one.index, fields)
            elif isinstance(one, TurnUsage) and with_usage:
                yield stream.usage(one.body())
    yield DONE


def _stop(reason: str | int | None) -> str:
    return "" if reason is None else f', "stop_reason": {json.dumps(reason, ensure_ascii=False)}'


def _delta(event: ReplyEvent) -> str:
    match event:
        case TextDelta(text):
            return f'"content": {quoted(text)}'
        case ReasoningDelta(text):
            text = quoted(text)
            return f'"reasoning_content": {text}, "reasoning": {text}'
        case ToolCallStart(index, id, name):
            function = f'{{"name": {quoted(name)}, "arguments": ""}}'
            call = f'{{"index": {index}, "id": {quoted(id)}, "type": "function", "function": {function}}}'
            return f'"tool_calls": [{call}]'
        case ToolCallDelta(index, arguments):
            return f'"tool_calls": [{{"index": {index}, "function": {{"arguments": {quoted(arguments)}}}}}]'
