"""From the events of a turn to those of Anthropic's stream; a whole message is what its events add up to."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from llmasos.client.types.anthropic import (
    AnthropicMessage,
    AnthropicStopReason,
    AnthropicUsage,
    Block,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDeltaBody,
    MessageDelta,
    MessageEvent,
    MessageStart,
    MessageStop,
    OutputTokensDetails,
    Ping,
    SignatureDeltaBody,
    StopDelta,
    TextBlock,
    TextDeltaBody,
    ThinkingBlock,
    ThinkingDeltaBody,
    ToolUseBlock,
)
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnEvent, TurnStart, TurnUsage
from llmasos.text.reply import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta, ToolCallStart

Kind = Literal["text", "thinking", "tool_use"]


def signature(thinking: str) -> str:
    """Clients want a signature to send thinking back; this one is made of the text alone."""
    return hashlib.sha256(thinking.encode("utf-8", "replace")).hexdigest()


@dataclass
class Writer:
    """One message. `room`: new tokens that the context had place for at most, as told by the turn's start."""

    model: str
    context_length: int
    max_tokens: int
    hide_thinking: bool = False
    warnings: list[str] = field(default_factory=list)
    _num_prompt_tokens: int = 0
    _open: Kind | None = None
    _index: int = -1
    _call: int = -1
    _thinking: str = ""
    _stop: StopDelta | None = None

    def read(self, event: TurnEvent) -> list[MessageEvent]:
        match event:
            case TurnStart(num_prompt_tokens):
                self._num_prompt_tokens = num_prompt_tokens
                return self._start()
            case TurnDelta(_, piece):
                return self._piece(piece)
            case TurnEnd(_, reason, stop):
                self._stop = self._stopped(reason, stop)
                return self._close()
            case TurnUsage():
                assert self._stop is not None, "a turn ends before its usage"
                usage = _usage(
                    event.num_prompt_tokens,
                    event.num_cached_tokens,
                    event.num_output_tokens,
                    event.num_reasoning_tokens,
                )
                delta = MessageDelta(type="message_delta", delta=self._stop, usage=usage)
                return [delta, MessageStop(type="message_stop")]

    def _start(self) -> list[MessageEvent]:
        message = AnthropicMessage(
            id=f"msg_{secrets.token_hex(12)}",
            type="message",
            role="assistant",
            model=self.model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=_usage(self._num_prompt_tokens, 0, 0, 0),
            **({"warnings": self.warnings} if self.warnings else {}),
        )
        return [MessageStart(type="message_start", message=message), Ping(type="ping")]

    def _stopped(self, reason: str, stop: str | int | None) -> StopDelta:
        kind: AnthropicStopReason = "end_turn"
        if reason == "tool_calls":
            kind = "tool_use"
        elif reason == "length":
            fits = self.max_tokens <= self.context_length - self._num_prompt_tokens
            kind = "max_tokens" if fits else "model_context_window_exceeded"
        elif isinstance(stop, str):
            return StopDelta(stop_reason="stop_sequence", stop_sequence=stop)
        return StopDelta(stop_reason=kind, stop_sequence=None)

    def _piece(self, piece: ReplyEvent) -> list[MessageEvent]:
        match piece:
            case TextDelta(text) if text:
                events = self._into("text", TextBlock(type="text", text=""))
                return [*events, self._delta(TextDeltaBody(type="text_delta", text=text))]
            case ReasoningDelta(text) if text:
                events = self._into("thinking", ThinkingBlock(type="thinking", thinking="", signature=""))
                self._thinking += text
                if self.hide_thinking:
                    return events
                return [*events, self._delta(ThinkingDeltaBody(type="thinking_delta", thinking=text))]
            case ToolCallStart(index, id, name):
                self._call = index
                block = ToolUseBlock(type="tool_use", id=id, name=name, input={})
                return [*self._close(), *self._into("tool_use", block)]
            case ToolCallDelta(index, arguments) if arguments:
                assert self._open == "tool_use" and index == self._call, "calls come one after the other"
                return [self._delta(InputJsonDeltaBody(type="input_json_delta", partial_json=arguments))]
        return []

    def _into(self, kind: Kind, block: Block) -> list[MessageEvent]:
        if self._open == kind:
            return []
        closing = self._close()
        self._open, self._index = kind, self._index + 1
        return [*closing, ContentBlockStart(type="content_block_start", index=self._index, content_block=block)]

    def _close(self) -> list[MessageEvent]:
        if self._open is None:
            return []
        events: list[MessageEvent] = []
        if self._open == "thinking":
            events.append(self._delta(SignatureDeltaBody(type="signature_delta", signature=signature(self._thinking))))
            self._thinking = ""
        self._open = None
        return [*events, ContentBlockStop(type="content_block_stop", index=self._index)]

    def _delta(self, body: Any) -> ContentBlockDelta:
        return ContentBlockDelta(type="content_block_delta", index=self._index, delta=body)


def _usage(num_prompt: int, num_cached: int, num_output: int, num_thinking: int) -> AnthropicUsage:
    return AnthropicUsage(
        input_tokens=num_prompt - num_cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=num_cached,
        output_tokens=num_output,
        output_tokens_details=OutputTokensDetails(thinking_tokens=num_thinking),
        service_tier="standard",
    )


def add_up(events: Iterable[MessageEvent]) -> AnthropicMessage:
    """The message that a client has at the end of these events."""
    message: AnthropicMessage | None = None
    inputs: dict[int, str] = {}
    for event in events:
        if isinstance(event, MessageStart):
            message = event.message.model_copy(deep=True)
            continue
        assert message is not None
        match event:
            case ContentBlockStart():
                message.content.append(event.content_block.model_copy())
            case ContentBlockDelta(index=index, delta=delta):
                _extend(message.content[index], delta, index, inputs)
            case MessageDelta(delta=delta, usage=usage):
                message.stop_reason, message.stop_sequence, message.usage = (
                    delta.stop_reason,
                    delta.stop_sequence,
                    usage,
                )
    assert message is not None
    for index, arguments in inputs.items():
        block = message.content[index]
        assert isinstance(block, ToolUseBlock)
        block.input = tool_input(arguments)
    return message


def _extend(block: Block, delta: Any, index: int, inputs: dict[int, str]) -> None:
    match block, delta:
        case TextBlock(), TextDeltaBody(text=text):
            block.text += text
        case ThinkingBlock(), ThinkingDeltaBody(thinking=text):
            block.thinking += text
        case ThinkingBlock(), SignatureDeltaBody(signature=text):
            block.signature = text
        case ToolUseBlock(), InputJsonDeltaBody(partial_json=text):
            inputs[index] = inputs.get(index, "") + text


def tool_input(arguments: str) -> dict[str, Any]:
    """Arguments as an object. Text that the model wrote wrongly, or that max_tokens cut, is under INVALID_JSON, where
    Anthropic's guide to streamed tool inputs puts it."""
    try:
        value = json.loads(arguments)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}
