"""One turn of a conversation as events: what every wire format that answers messages is rendered from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from llmasos.client.types import ChatCompletionRequest, FunctionCall, ToolCall
from llmasos.inference.request import TokenLogprob
from llmasos.serve import prepare, render
from llmasos.serve.models import Served
from llmasos.text.reply import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta, ToolCallStart

TurnFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TurnStart:
    """First event, as soon as the prompt is tokens: nothing is computed yet."""

    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TurnDelta:
    """A piece of completion `index`."""

    index: int
    event: ReplyEvent
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """Completion `index` is over. `stop_reason`: the stop string or token id that ended it, if one did."""

    index: int
    finish_reason: TurnFinish
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class TurnUsage:
    """Last event: tokens of all completions together."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_reasoning_tokens: int = 0


TurnEvent = TurnStart | TurnDelta | TurnEnd | TurnUsage


async def turn(served: Served, body: ChatCompletionRequest, *, fit: bool = False) -> AsyncGenerator[TurnEvent, None]:
    """Answer `body.messages`. Closing the generator stops the model at its next token. `fit`: `body.max_tokens` may be
    more than the context still holds; the answer then ends (`length`) where the context does."""
    ids = await asyncio.to_thread(prepare.chat_prompt_ids, served.model, body)
    params = prepare.chat_params(served.model, body, len(ids), fit=fit)
    yield TurnStart(len(ids))
    num_output_tokens = num_cached_tokens = 0
    if params.num_beams > 1 and not body.stream:  # beams have no chunks
        [output] = await served.complete([ids], params, **prepare.request_options(body))
        for one in output.outputs:
            yield TurnDelta(one.index, TextDelta(one.text))
            yield TurnEnd(one.index, render.finish(one.finish_reason) or "stop", one.stop_reason)
        yield TurnUsage(len(ids), output.num_output_tokens, output.metrics.num_cached_tokens)
        return
    async with aclosing(served.stream([ids], params, **prepare.request_options(body))) as chunks:
        async for _, chunk in chunks:
            num_output_tokens += len(chunk.token_ids)
            num_cached_tokens += chunk.metrics.num_cached_tokens if chunk.metrics else 0
            if chunk.text or chunk.logprobs:
                yield TurnDelta(chunk.index, TextDelta(chunk.text), chunk.logprobs)
            if (reason := render.finish(chunk.finish_reason)) is not None:
                yield TurnEnd(chunk.index, reason, chunk.stop_reason)
    yield TurnUsage(len(ids), num_output_tokens, num_cached_tokens)


@dataclass(slots=True)
class Reply:
    """A whole completion."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: TurnFinish = "stop"
    stop_reason: str | int | None = None

    def add(self, event: ReplyEvent) -> None:
        match event:
            case TextDelta(text):
                self.text += text
            case ReasoningDelta(text):
                self.reasoning += text
            case ToolCallStart(_, id, name):
                self.tool_calls.append(ToolCall(id=id, function=FunctionCall(name=name, arguments="")))
            case ToolCallDelta(index, arguments):
                self.tool_calls[index].function.arguments += arguments


async def whole_turn(
    served: Served, body: ChatCompletionRequest, *, fit: bool = False
) -> tuple[list[Reply], TurnUsage]:
    """The same, when everything is there: one Reply for each of `body.n`."""
    replies = [Reply() for _ in range(body.n or 1)]
    async with aclosing(turn(served, body, fit=fit)) as events:
        async for event in events:
            match event:
                case TurnDelta(index, piece, logprobs):
                    replies[index].add(piece)
                    replies[index].logprobs += logprobs
                case TurnEnd(index, reason, stop):
                    replies[index].finish_reason, replies[index].stop_reason = reason, stop
                case TurnUsage():
                    return replies, event
    raise AssertionError("a turn ends with its usage")
