"""Anthropic's Messages protocol, to and from chat completions.

Source: Anthropic API reference, "Messages" and "Streaming messages" (version 2023-06-01). Not covered: images,
documents, server tools, cache control; thinking is read (as `reasoning_content`), not asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from llmasos.client.providers.openai import event_json, parsed
from llmasos.client.providers.table import Provider
from llmasos.client.sse import Event
from llmasos.client.types import ChatCompletion, ChatCompletionChunk, ChatFinishReason, WireResponse
from llmasos.errors import InvalidInputError, ProviderError, UnsupportedError

DEFAULT_MAX_TOKENS = 4096
"""The API wants a number; this is what every Claude model can write."""

FINISH: dict[str, ChatFinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_SAME_NAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream")
_TRANSLATED = ("messages", "stop", "tools", "tool_choice", "parallel_tool_calls", "n", "stream_options")


class AnthropicWire:
    """Translates; does no I/O."""

    completions_path = embeddings_path = ""
    models_path = "/models"

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    def headers(self, key: str) -> dict[str, str]:
        return {"anthropic-version": "2023-06-01"} | ({"x-api-key": key} if key else {})

    def fields(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return dict(body)

    def chat_call(self, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Raises UnsupportedError naming a field that the API does not have."""
        if unknown := [k for k in body if k not in _SAME_NAME + _TRANSLATED]:
            raise UnsupportedError(f"Anthropic's API has no {unknown[0]!r}.", hint="Leave it out.", param=unknown[0])
        if body.get("n") not in (None, 1):
            raise UnsupportedError("Anthropic's API gives one completion: n must be 1.", param="n")
        system, messages = _split_system(body["messages"])
        request: dict[str, Any] = {"max_tokens": DEFAULT_MAX_TOKENS}
        request |= {k: body[k] for k in _SAME_NAME if body.get(k) is not None}
        if request.get("temperature") == 1:
            del request["temperature"]  # the default; newer models refuse it beside top_p
        request["messages"] = _messages(messages)
        if system:
            request["system"] = system
        if stop := body.get("stop"):
            request["stop_sequences"] = [stop] if isinstance(stop, str) else list(stop)
        return "/messages", request | _tools(body)

    def chat_reply(self, data: Any) -> ChatCompletion:
        message = parsed(_Message, data, self.provider.name)
        calls = [
            {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": json.dumps(b.input)}}
            for b in message.content
            if b.type == "tool_use"
        ]
        reply = {
            "role": "assistant",
            "content": "".join(b.text for b in message.content if b.type == "text") or None,
            "reasoning_content": "".join(b.thinking for b in message.content if b.type == "thinking") or None,
            "tool_calls": calls or None,
        }
        completion = {
            "id": message.id,
            "model": message.model,
            "created": int(time.time()),
            "choices": [{"index": 0, "message": reply, "finish_reason": _finish(message.stop_reason)}],
            "usage": _usage(message.usage),
        }
        return parsed(ChatCompletion, completion, self.provider.name)

    def stream_reader(self, body: Mapping[str, Any]) -> AnthropicStreamReader:
        return AnthropicStreamReader(self.provider.name)


class _Usage(WireResponse):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Block(WireResponse):
    """A piece of content of any kind."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: Any = None


class _Message(WireResponse):
    id: str
    model: str
    content: list[_Block] = Field(default_factory=list)
    stop_reason: str | None = None
    usage: _Usage = _Usage()


class _Delta(WireResponse):
    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _Event(WireResponse):
    type: str
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None


class AnthropicStreamReader:
    """Turns Messages events into chat completion chunks; tool calls are numbered in the order they start."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.done = False
        self._id = self._model = ""
        self._usage = _Usage()
        self._call_of_block: dict[int, int] = {}

    def read(self, event: Event) -> list[ChatCompletionChunk]:
        found = parsed(_Event, event_json(event, self.provider), self.provider)
        if found.type == "message_start" and found.message:
            self._id, self._model, self._usage = found.message.id, found.message.model, found.message.usage
            return [self._chunk({"role": "assistant", "content": ""})]
        if found.type == "content_block_start" and found.content_block:
            return self._block_start(found.index, found.content_block)
        if found.type == "content_block_delta" and found.delta:
            return self._block_delta(found.index, found.delta)
        if found.type == "message_delta" and found.delta:
            newer = found.usage.model_dump(exclude_none=True) if found.usage else {}
            self._usage = self._usage.model_copy(update=newer)
            return [self._chunk({}, finish_reason=_finish(found.delta.stop_reason))]
        if found.type == "message_stop":
            self.done = True
            return [self._chunk(None, usage=_usage(self._usage))]
        return []  # ping, content_block_stop and kinds yet to come carry nothing for us

    def _block_start(self, index: int, block: _Block) -> list[ChatCompletionChunk]:
        if block.type == "text" and block.text:
            return [self._chunk({"content": block.text})]
        if block.type != "tool_use":
            return []
        call = self._call_of_block[index] = len(self._call_of_block)
        function = {"name": block.name, "arguments": ""}
        return [
            self._chunk({"tool_calls": [{"index": call, "id": block.id, "type": "function", "function": function}]})
        ]

    def _block_delta(self, index: int, delta: _Delta) -> list[ChatCompletionChunk]:
        if delta.type == "text_delta":
            return [self._chunk({"content": delta.text})]
        if delta.type == "thinking_delta":
            return [self._chunk({"reasoning_content": delta.thinking})]
        if delta.type == "input_json_delta" and delta.partial_json:
            if index not in self._call_of_block:
                raise ProviderError(f"{self.provider} sent arguments of a tool call that it did not start.")
            function = {"arguments": delta.partial_json}
            return [self._chunk({"tool_calls": [{"index": self._call_of_block[index], "function": function}]})]
        return []

    def _chunk(self, delta: dict[str, Any] | None, **more: Any) -> ChatCompletionChunk:
        reason = more.pop("finish_reason", None)
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
        chunk = {"id": self._id, "model": self._model, "created": int(time.time()), "choices": choices, **more}
        return parsed(ChatCompletionChunk, chunk, self.provider)


def _finish(reason: str | None) -> ChatFinishReason:
    return FINISH.get(reason or "end_turn", "stop")


def _usage(usage: _Usage) -> dict[str, Any]:
    """Anthropic counts cached prompt tokens apart from `input_tokens`; chat completions count them in."""
    cached = usage.cache_read_input_tokens or 0
    prompt = (usage.input_tokens or 0) + cached + (usage.cache_creation_input_tokens or 0)
    output = usage.output_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _split_system(messages: Iterable[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    """The leading system messages as one text, and the rest."""
    rest = list(messages)
    system: list[str] = []
    while rest and rest[0]["role"] in ("system", "developer"):
        system.append(_text(rest.pop(0)))
    return "\n\n".join(system), rest


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    for part in content:
        if part.get("type") != "text":
            raise UnsupportedError(f"Content of type {part.get('type')!r} is not supported yet.", param="messages")
    return "\n".join(part["text"] for part in content)


def _messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns that alternate between user and assistant: tool results are blocks of a user turn."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role in ("system", "developer"):
            raise UnsupportedError("Anthropic's API takes system messages only at the start.", param="messages")
        side = "assistant" if role == "assistant" else "user"
        if not turns or turns[-1]["role"] != side:
            turns.append({"role": side, "content": []})
        turns[-1]["content"] += _blocks(message)
    return turns


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = _text(message)
    if message["role"] == "tool":
        return [{"type": "tool_result", "tool_use_id": message.get("tool_call_id") or "", "content": text}]
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except ValueError as e:
            raise InvalidInputError(
                f"The arguments of tool call {function['name']!r} are not JSON: {e}.", param="messages"
            ) from e
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    if not body.get("tools"):
        return {}
    tools = []
    for tool in body["tools"]:
        function = tool["function"]
        entry = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
        if function.get("description"):
            entry["description"] = function["description"]
        tools.append(entry)
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, str):
        wanted: dict[str, Any] = {"type": {"required": "any"}.get(choice, choice)}
    else:
        wanted = {"type": "tool", "name": choice["function"]["name"]}
    if body.get("parallel_tool_calls") is False:
        wanted["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": wanted}
