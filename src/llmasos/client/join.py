"""The chunks of a streamed chat put together to the answer that would have come without a stream."""

from __future__ import annotations

from typing import Any

from llmasos.client.types import ChatCompletion, ChatCompletionChunk, ChatDelta, ChatLogprobs


class ChatJoiner:
    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, chunk: ChatCompletionChunk) -> None:
        head = chunk.model_dump(exclude={"choices", "object"}, exclude_none=True)
        self._head |= head
        for piece in chunk.choices:
            choice = self._choices.setdefault(
                piece.index,
                {"index": piece.index, "message": {"role": "assistant"}, "finish_reason": None, "logprobs": None},
            )
            choice["finish_reason"] = piece.finish_reason or choice["finish_reason"]
            self._add_delta(choice["message"], piece.delta)
            if piece.logprobs is not None:
                self._add_logprobs(choice, piece.logprobs)

    @staticmethod
    def _add_delta(message: dict[str, Any], delta: ChatDelta) -> None:
        texts = delta.model_dump(exclude={"role", "tool_calls"}, exclude_none=True)
        for name, text in texts.items():
            if isinstance(text, str):
                message[name] = message.get(name, "") + text
        for piece in delta.tool_calls or ():
            calls = message.setdefault("tool_calls", {})
            empty = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            call = calls.setdefault(piece.index, empty)
            call["id"] = piece.id or call["id"]
            if piece.function is not None:
                call["function"]["name"] = piece.function.name or call["function"]["name"]
                call["function"]["arguments"] += piece.function.arguments or ""

    @staticmethod
    def _add_logprobs(choice: dict[str, Any], piece: ChatLogprobs) -> None:
        whole = choice["logprobs"] = choice["logprobs"] or {}
        for name, found in piece.model_dump(exclude_none=True).items():
            whole[name] = [*whole.get(name, []), *found]

    def whole(self) -> ChatCompletion:
        """What `add` was given so far."""
        choices = []
        for _, choice in sorted(self._choices.items()):
            message = dict(choice["message"])
            if "tool_calls" in message:
                message["tool_calls"] = [call for _, call in sorted(message["tool_calls"].items())]
            choices.append({**choice, "message": message})
        return ChatCompletion.model_validate({**self._head, "choices": choices})
