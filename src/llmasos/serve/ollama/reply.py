"""From the events of a turn to Ollama's lines; a whole answer is what its lines add up to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from llmasos.client.types.ollama import (
    OllamaCall,
    OllamaCalledFunction,
    OllamaChatResponse,
    OllamaGenerateResponse,
    OllamaReply,
)
from llmasos.serve import render
from llmasos.serve.served import ServedTokenizer
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnEvent, TurnStart, TurnUsage
from llmasos.text.reply import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta, ToolCallStart

Line = OllamaChatResponse | OllamaGenerateResponse


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Clock:
    """Nanoseconds, measured: from the request to its model, to the prompt's end (its wait in the model's queue is in
    this), to the answer's end."""

    def __init__(self) -> None:
        self.began = self.loaded = self.first = time.perf_counter_ns()
        self._is_answering = False

    def load_ends(self) -> None:
        self.loaded = self.first = time.perf_counter_ns()

    def answers(self) -> None:
        if not self._is_answering:
            self._is_answering, self.first = True, time.perf_counter_ns()

    def end(self) -> dict[str, int]:
        self.answers()
        over = time.perf_counter_ns()
        return {
            "total_duration": over - self.began,
            "load_duration": self.loaded - self.began,
            "prompt_eval_duration": self.first - self.loaded,
            "eval_duration": over - self.first,
        }


class Writer:
    """One answer. `is_chat`: of /api/chat, else of /api/generate."""

    def __init__(
        self,
        model: str,
        is_chat: bool,
        clock: Clock,
        warnings: list[str],
        *,
        tokenizer: ServedTokenizer | None = None,
        with_logprobs: bool = False,
    ) -> None:
        self._model, self._is_chat, self._clock, self._warnings = model, is_chat, clock, warnings
        self._tokenizer, self._with_logprobs = tokenizer, with_logprobs
        self._reason = "stop"
        self._call: tuple[int, str, str] | None = None  # index, id and name of the call that is being written
        self._arguments = ""

    def read(self, event: TurnEvent) -> list[Line]:
        match event:
            case TurnStart():
                return []
            case TurnDelta(_, piece, logprobs):
                self._clock.answers()
                return self._piece(piece, self._logprobs(logprobs))
            case TurnEnd(_, reason):
                self._reason = "length" if reason == "length" else "stop"
                return self._close_call()
            case TurnUsage():
                counts = {"prompt_eval_count": event.num_prompt_tokens, "eval_count": event.num_output_tokens}
                return [self.last(self._reason, **self._clock.end(), **counts)]

    def last(self, reason: str, **known: Any) -> Line:
        """The line that ends an answer."""
        if self._warnings:
            known["warnings"] = self._warnings
        return self._line(done=True, done_reason=reason, **known)

    def _piece(self, piece: ReplyEvent, logprobs: dict[str, Any]) -> list[Line]:
        match piece:
            case ToolCallDelta(_, arguments):
                self._arguments += arguments
                return [self._line(**logprobs)] if logprobs else []
            case ToolCallStart(index, id, name):
                before = self._close_call()
                self._call = (index, id, name)
                return [*before, self._line(**logprobs)] if logprobs else before
            case TextDelta(text) if text or logprobs:
                return [*self._close_call(), self._line(text, **logprobs)]
            case ReasoningDelta(text) if text or logprobs:
                return [*self._close_call(), self._line(thinking=text, **logprobs)]
        return []

    def _close_call(self) -> list[Line]:
        """Arguments are an object on this wire, so a call goes out when all of it is there."""
        if self._call is None:
            return []
        index, id, name = self._call
        arguments = self._object(self._arguments, name)
        function = OllamaCalledFunction(index=index, name=name, arguments=arguments)
        self._call, self._arguments = None, ""
        return [self._line(calls=[OllamaCall(id=id, function=function)])]

    def _object(self, arguments: str, name: str) -> dict[str, Any]:
        try:
            value = json.loads(arguments or "{}")
        except ValueError:
            value = None
        if isinstance(value, dict):
            return value
        self._warnings.append(f"The model wrote arguments for {name} that are no JSON object; they are text.")
        return {"INVALID_JSON": arguments}

    def _logprobs(self, found: Sequence[Any]) -> dict[str, Any]:
        if not self._with_logprobs or not found or self._tokenizer is None:
            return {}
        content = render.chat_logprobs(self._tokenizer, found).content or []
        return {"logprobs": [entry.model_dump(exclude_unset=True) for entry in content]}

    def _line(
        self,
        text: str = "",
        *,
        thinking: str | None = None,
        calls: list[OllamaCall] | None = None,
        done: bool = False,
        **known: Any,
    ) -> Line:
        own: dict[str, Any] = {} if thinking is None else {"thinking": thinking}
        if self._is_chat:
            if calls:
                own["tool_calls"] = calls
            message = OllamaReply(role="assistant", content=text, **own)
            return OllamaChatResponse(model=self._model, created_at=now(), message=message, done=done, **known)
        return OllamaGenerateResponse(model=self._model, created_at=now(), response=text, done=done, **own, **known)


def add_up(lines: Iterable[Line]) -> Line:
    """The one line that says what all of them say."""
    last: Line | None = None
    text, thinking = "", ""
    calls: list[OllamaCall] = []
    logprobs: list[Any] = []
    for last in lines:
        part = last.message if isinstance(last, OllamaChatResponse) else last
        text += part.content if isinstance(part, OllamaReply) else part.response
        thinking += part.thinking or ""
        calls += (part.tool_calls or []) if isinstance(part, OllamaReply) else []
        logprobs += last.logprobs or []
    assert last is not None
    if logprobs:
        last.logprobs = logprobs
    if isinstance(last, OllamaChatResponse):
        whole: OllamaReply | OllamaGenerateResponse = last.message
        last.message.content = text
        if calls:
            last.message.tool_calls = calls
    else:
        whole = last
        last.response = text
    if thinking:
        whole.thinking = thinking
    return last
