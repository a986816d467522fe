"""Applications that chat, behind every API of the server: a conversation becomes a request to the application's own
`/v1/chat/completions`, and what it streams becomes the events that each wire format is rendered from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, TypeVar

import httpx
from pydantic import ValidationError
from pydantic_core import from_json

from llmasos.apps.chat import COMPLETIONS
from llmasos.apps.clients import CLIENT, name_for
from llmasos.client.types import ChatCompletionChunk, ChatCompletionRequest, ErrorBody, Usage
from llmasos.errors import LLMasOSError, UnsupportedError
from llmasos.inference.request import SamplingParams
from llmasos.serve import inflight
from llmasos.serve.apps.chat import PREFIX, app_models, checked
from llmasos.serve.apps.proxy import AppEndedError, AppTimeoutError, ended
from llmasos.serve.apps.running import Running
from llmasos.serve.apps.supervisor import Supervisor
from llmasos.serve.caller import Caller
from llmasos.serve.models import Served
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnEvent, TurnFinish, TurnStart, TurnUsage
from llmasos.text.reply import ReasoningDelta, ReplyEvent, TextDelta, ToolCallDelta, ToolCallStart

T = TypeVar("T")
NO_LIMIT = 2**31 - 1
"""Tokens of the context of an application, which tells no number."""
MOST_EVENT = 4 * 2**20
"""Bytes of one event, or of an error."""


class AppAnswerError(LLMasOSError):
    """What an application answered instead of a reply, with its own status, code and field."""

    def __init__(self, message: str, *, status: int, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.http_status, self._code, self.param = status, code, param

    @property
    def code(self) -> str:
        return self._code


class AppModels:
    """Applications among the models, as `Models` wants them."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def is_one(self, name: str) -> bool:
        return name.startswith(PREFIX) and ":" not in name

    def check(self, name: str, caller: Caller) -> None:
        """Raises ForbiddenError."""
        caller.check_model(name)
        caller.check_app(name.removeprefix(PREFIX))

    async def names(self, caller: Caller) -> list[str]:
        return [one.id for one in await app_models(self._supervisor, caller)]

    @asynccontextmanager
    async def lease(self, name: str, caller: Caller) -> AsyncIterator[Served]:
        """Raises ModelNotFoundError, ForbiddenError."""
        await checked(self._supervisor, caller, name)
        yield _AppServed(self._supervisor, name, caller)


class _AppServed(Served):
    """What it asks of models is admitted, counted and measured there, as its own."""

    def __init__(self, supervisor: Supervisor, name: str, caller: Caller) -> None:
        self.base, self.model, self.adapter = name, _Facts(name), None  # type: ignore[assignment]  # as much as is asked
        self._supervisor, self._caller = supervisor, caller

    async def answer(self, body: ChatCompletionRequest) -> AsyncGenerator[TurnEvent, None]:
        async with (
            self._supervisor.use(self.base.removeprefix(PREFIX)) as found,
            aclosing(_Turn(self._supervisor, found, self._caller).events(body)) as events,
        ):
            async for event in events:
                yield event

    async def complete(self, *_: Any, **__: Any) -> NoReturn:
        raise _only_chats(self.base)

    def stream(self, *_: Any, **__: Any) -> NoReturn:
        raise _only_chats(self.base)

    async def embed(self, *_: Any, **__: Any) -> NoReturn:
        raise _only_chats(self.base)

    async def score_pairs(self, *_: Any, **__: Any) -> NoReturn:
        raise _only_chats(self.base)


def _only_chats(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} is an application: it answers conversations, and nothing else.",
        hint="Ask it over the chat routes; its own are below /apps.",
        param="model",
    )


class _Tokenizer:
    """An application has none."""

    vocab_size = 0
    special_ids: frozenset[int] = frozenset()

    def __init__(self, name: str) -> None:
        self._name = name

    def id(self, token: str) -> int | None:
        return None

    def token(self, id: int) -> NoReturn:
        raise _only_chats(self._name)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NoReturn:
        raise _only_chats(self._name)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> NoReturn:
        raise _only_chats(self._name)

    def token_bytes(self, id: int) -> NoReturn:
        raise _only_chats(self._name)


class _Facts:
    """What is known of an application as a model: `ServedModel` as far as conversations need it."""

    is_encoder = False
    context_length = NO_LIMIT
    chat_template = ""
    adapters = ()

    def __init__(self, name: str) -> None:
        self.name, self.tokenizer = name, _Tokenizer(name)

    def params(self, **options: Any) -> SamplingParams:
        return SamplingParams.of(**options)

    def chat_prompt(self, *_: Any, **__: Any) -> NoReturn:
        raise _only_chats(self.name)


class _Turn:
    """One conversation with an application that runs."""

    def __init__(self, supervisor: Supervisor, found: Running, caller: Caller) -> None:
        self._supervisor, self._found, self._caller = supervisor, found, caller
        self._name = found.order.app.name
        self._calls: set[int] = set()
        self._finish: TurnFinish = "stop"
        self._stop: str | None = None
        self._usage: Usage | None = None

    async def events(self, body: ChatCompletionRequest) -> AsyncGenerator[TurnEvent, None]:
        """Raises AppAnswerError, AppTimeoutError, AppEndedError."""
        asked = body.model_dump(mode="json", by_alias=True, exclude_none=True)
        asked |= {"model": f"{PREFIX}{self._name}", "stream": True, "stream_options": {"include_usage": True}}
        request = self._found.client.build_request("POST", COMPLETIONS, json=asked, headers=self._headers())
        answer = await self._within(self._found.client.send(request, stream=True))
        try:
            if answer.status_code != 200:
                raise self._refusal(answer.status_code, await self._read(answer))
            yield TurnStart(0)  # it counts when it is over
            async with aclosing(self._chunks(answer)) as chunks:
                async for chunk in chunks:
                    for piece in self._pieces(chunk):
                        yield TurnDelta(0, piece)
        finally:
            await answer.aclose()
        yield TurnEnd(0, "tool_calls" if self._finish == "stop" and self._calls else self._finish, self._stop)
        used = self._usage
        yield TurnUsage(used.prompt_tokens if used else 0, used.completion_tokens if used else 0, 0)

    def _headers(self) -> dict[str, str]:
        found = {"accept-encoding": "identity"}
        if (client := name_for(self._name, self._caller.key_id)) is not None:
            found[CLIENT] = client
        if (id := inflight.current_id()) is not None:
            found["x-request-id"] = id
        return found

    async def _within(self, work: Awaitable[T]) -> T:
        """What it may take its time for."""
        try:
            async with asyncio.timeout(self._found.terms.timeout):
                return await work
        except TimeoutError:
            self._supervisor.check_later(self._found)
            raise AppTimeoutError(f"{self._name} was silent for {self._found.terms.timeout:g} s.") from None
        except httpx.HTTPError as e:
            raise await ended(self._found, e) from e

    async def _read(self, answer: httpx.Response) -> bytes:
        data = b""
        pieces = answer.aiter_raw()
        while (piece := await self._within(anext(pieces, None))) is not None and len(data) <= MOST_EVENT:
            data += piece
        return data

    async def _chunks(self, answer: httpx.Response) -> AsyncGenerator[ChatCompletionChunk, None]:
        pieces, rest = answer.aiter_raw(), b""
        while (piece := await self._within(anext(pieces, None))) is not None:
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > MOST_EVENT:
                raise AppEndedError(f"{self._name} sent an event of more than {MOST_EVENT} bytes.")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                if (data := line[5:].strip()) == b"[DONE]":
                    return
                yield self._chunk(data)
        raise AppEndedError(f"{self._name} broke its answer off.")

    def _chunk(self, data: bytes) -> ChatCompletionChunk:
        try:
            found = from_json(data)
            if isinstance(found, dict) and "error" in found:
                raise self._refusal(502, data)
            return ChatCompletionChunk.model_validate(found)
        except (ValueError, ValidationError) as e:
            raise AppEndedError(f"{self._name} sent what is no chunk of an answer: {data[:100]!r}.") from e

    def _pieces(self, chunk: ChatCompletionChunk) -> Iterator[ReplyEvent]:
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices:
            if choice.finish_reason in ("length", "tool_calls"):
                self._finish = choice.finish_reason
            if isinstance(stop := getattr(choice, "stop_reason", None), str):
                self._stop = stop
            if choice.delta.reasoning_content:
                yield ReasoningDelta(choice.delta.reasoning_content)
            if choice.delta.content:
                yield TextDelta(choice.delta.content)
            for call in choice.delta.tool_calls or ():
                function = call.function
                if call.index not in self._calls:
                    self._calls.add(call.index)
                    yield ToolCallStart(call.index, call.id or "", (function and function.name) or "")
                if function and function.arguments:
                    yield ToolCallDelta(call.index, function.arguments)

    def _refusal(self, status: int, data: bytes) -> LLMasOSError:
        try:
            error = ErrorBody.model_validate_json(data).error
        except ValidationError:
            return AppEndedError(f"{self._name} answered with the status {status}.")
        status = status if 400 <= status < 600 else 502
        code = error.code if isinstance(error.code, str) and error.code else "app_failed"
        return AppAnswerError(error.message, status=status, code=code, param=error.param)
