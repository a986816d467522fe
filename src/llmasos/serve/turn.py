"""One turn of a conversation as events: what every wire format that answers messages is rendered from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from llmasos.client.types import ChatCompletionRequest, CompletionTokensDetails, FunctionCall, ToolCall, Usage
from llmasos.inference.request import FinishReason, TokenLogprob
from llmasos.serve import prepare, render
from llmasos.serve.conversation import Conversation, prepare_conversation
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

    def body(self) -> Usage:
        """As OpenAI's APIs tell it."""
        found = render.usage(self.num_prompt_tokens, self.num_output_tokens, self.num_cached_tokens)
        if self.num_reasoning_tokens:
            found.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=self.num_reasoning_tokens)
        return found


TurnEvent = TurnStart | TurnDelta | TurnEnd | TurnUsage


async def turn(served: Served, body: ChatCompletionRequest, *, fit: bool = False) -> AsyncGenerator[TurnEvent, None]:
    """Answer `body.messages`. Closing the generator stops the model at its next token. `fit`: `body.max_tokens` may be
    more than the context still holds; the answer then ends (`length`) where the context does."""
    if served.answer is not None:
        async with aclosing(served.answer(body)) as events:
            async for event in events:
                yield event
        return
    asked = await asyncio.to_thread(prepare_conversation, served.model, body, fit=fit)
    params, options = asked.params, prepare.request_options(body)
    yield TurnStart(len(asked.ids))
    readers = [_Reader(asked, body, index) for index in range(params.n)]
    num_output_tokens = num_cached_tokens = 0
    with prepare.form_called(_form_field(body)):
        if params.num_beams > 1:  # beams have no chunks
            [output] = await served.complete([asked.ids], params, **options)
            for one in output.outputs:
                for event in readers[one.index].read(one.text, one.token_ids, (), one.finish_reason, one.stop_reason):
                    yield event
            num_output_tokens, num_cached_tokens = output.num_output_tokens, output.metrics.num_cached_tokens
        else:
            async with aclosing(served.stream([asked.ids], params, **options)) as chunks:
                async for _, chunk in chunks:
                    num_output_tokens += len(chunk.token_ids)
                    num_cached_tokens += chunk.metrics.num_cached_tokens if chunk.metrics else 0
                    for event in readers[chunk.index].read(
                        chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason, chunk.stop_reason
                    ):
                        yield event
    num_reasoning_tokens = sum(reader.num_reasoning_tokens for reader in readers)
    yield TurnUsage(len(asked.ids), num_output_tokens, num_cached_tokens, num_reasoning_tokens)


def _form_field(body: ChatCompletionRequest) -> str:
    """Where the form of the output comes from, if it has one."""
    if body.response_format is not None and body.response_format.type != "text":
        return "response_format"
    return "tools" if body.structured_outputs is None else "structured_outputs"


class _Reader:
    """One completion: its text becomes events. Log-probabilities go with the next event that there is; all of the
    tokens have theirs, also those of reasoning and of calls."""

    def __init__(self, asked: Conversation, body: ChatCompletionRequest, index: int) -> None:
        self.index = index
        self.num_reasoning_tokens = 0
        self._parser = None if asked.is_plain else asked.parser()
        self._logprobs: tuple[TokenLogprob, ...] = ()
        self._hides_reasoning = body.include_reasoning is False

    def read(
        self,
        text: str,
        token_ids: Sequence[int],
        logprobs: tuple[TokenLogprob, ...],
        finish_reason: FinishReason | None,
        stop_reason: str | int | None,
    ) -> list[TurnEvent]:
        reason: TurnFinish | None = render.finish(finish_reason)
        events: list[ReplyEvent]
        if self._parser is None:
            events = [TextDelta(text)] if text else []
        else:
            began_reasoning = self._parser.is_reasoning
            events = self._parser.push(text) if text else []
            if reason is not None:
                events += self._parser.finish()
            if began_reasoning or self._parser.is_reasoning:
                self.num_reasoning_tokens += len(token_ids)
            if self._hides_reasoning:
                events = [event for event in events if not isinstance(event, ReasoningDelta)]
            if reason == "stop" and self._parser.num_calls:
                reason = "tool_calls"
        if self._logprobs or logprobs:
            self._logprobs += logprobs
            if reason is not None and not events:
                events = [TextDelta("")]
        found: list[TurnEvent] = []
        for event in events:
            found.append(TurnDelta(self.index, event, self._logprobs))
            self._logprobs = ()
        if reason is not None:
            found.append(TurnEnd(self.index, reason, stop_reason))
        return found


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
                self.tool_calls.append(ToolCall(id=id, type="function", function=FunctionCall(name=name, arguments="")))
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
