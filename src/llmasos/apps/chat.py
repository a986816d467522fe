"""`@app.chat`: an application as a model, in OpenAI's form.

    @app.chat
    def answer(messages: list[Message], temperature: float | None = None) -> Iterator[str]:
        "Answer as a pirate."
        for chunk in app.llm.stream([PIRATE, *messages], temperature=temperature):
            yield chunk.text

    POST /v1/chat/completions    whole or streamed, with usage; errors as OpenAI's
    GET /v1/models               the application as the model app/NAME

The function takes `messages`, and what else of the request it names: a parameter called like one of its fields
(`temperature`, `max_tokens`, `tools`, ...), or the whole as a parameter of the type `ChatRequest`. Of fields that it
does not take, those that only steer sampling are passed over; those that ask for another kind of answer (`tools`,
`response_format`, `logprobs`, `n`) are refused. `stop` is kept for it.

It returns the answer, or yields its pieces: text, the chunks of `model.stream`, or messages as OpenAI has them, with
`content`, `tool_calls` (whose arguments may be an object, and whose ids may be left out) and `reasoning_content`. When
the client goes away a generator is closed.
"""

from __future__ import annotations

import inspect
import json
import math
import secrets
import time
import types
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required

import docstring_parser
from anyio.streams.memory import MemoryObjectReceiveStream
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict

from llmasos.apps import problems, streams
from llmasos.apps.depends import Node, node_of
from llmasos.apps.routes import is_stream_type, parameters_of, type_hints_of
from llmasos.client.types import ChatCompletionRequest
from llmasos.errors import InvalidInputError, LLMasOSError, NotFoundError, UnsupportedError
from llmasos.inference.request import Chunk

ChatRequest = ChatCompletionRequest
"""The whole request, as a parameter of a chat function."""

COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
_OURS = {"messages", "model", "stream", "stream_options", "n", "logprobs", "top_logprobs", "max_completion_tokens"}
_FIELDS = frozenset(ChatCompletionRequest.model_fields) - _OURS
_ASKING: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": (),
    "structured_outputs": (),
    "num_beams": (1,),
    "continue_final_message": (False,),
}
"""Fields that ask for another kind of answer, each with the values that ask for nothing."""
_BYTES_PER_TOKEN = 4
_WHOLE = "<request>"


class Message(TypedDict, total=False):
    """One message, as `model.chat` takes it: OpenAI's form. Content is text, or parts where some are not text."""

    role: Required[Literal["system", "developer", "user", "assistant", "tool"]]
    content: Required[str | list[dict[str, Any]] | None]
    name: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str


@dataclass(frozen=True)
class Chat:
    """What a decorated chat function is and takes."""

    function: Callable[..., Any]
    name: str
    summary: str
    description: str
    node: Node
    fields: Mapping[str, TypeAdapter[Any]]
    """Fields of the request that it takes, `messages` among them."""
    defaults: frozenset[str]
    """Those of them that have a default."""
    whole: bool
    """It takes the whole request."""
    streams: bool

    def describe(self, app: str) -> dict[str, Any]:
        """Its part of the application's document."""
        return {
            "name": self.name,
            "model": f"app/{app}",
            "path": COMPLETIONS,
            "summary": self.summary,
            "description": self.description,
            "fields": sorted(_FIELDS if self.whole else set(self.fields) - {"messages"}),
            "stream": self.streams,
            "session": self.node.uses("session"),
        }

    def read(self, request: ChatRequest) -> dict[str, Any]:
        """Inputs of the function and its dependencies. Raises ValidationError where its own hints want something else,
        UnsupportedError for what it can't do."""
        for name, nothing in _ASKING.items():
            value = getattr(request, name)
            if value is None or value in nothing or name in self.fields or self.whole:
                continue
            if name == "response_format" and request.response_format and request.response_format.type == "text":
                continue
            raise UnsupportedError(f"This application does not know {name!r}.", hint="Leave it out.", param=name)
        if (request.n or 1) > 1 or request.logprobs:
            name = "logprobs" if request.logprobs else "n"
            raise UnsupportedError(
                f"An application gives one answer, as text: {name} is not for it.", hint="Leave it out.", param=name
            )
        found: dict[str, Any] = {_WHOLE: request}
        for name, adapter in self.fields.items():
            value = _field(request, name)
            if value is not None or name not in self.defaults:
                found[name] = adapter.validate_python(value)
        return found

    def stops(self, request: ChatRequest) -> tuple[str, ...]:
        """The texts before which we end the answer, where the function does not do it."""
        return () if self.whole or "stop" in self.fields else _stops(request)


def _stops(request: ChatRequest) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def describe_chat(function: Callable[..., Any]) -> Chat:
    """Read the function's description. Raises InvalidInputError that names the parameter at fault."""
    if not callable(function) or inspect.isclass(function):
        raise InvalidInputError(f"@app.chat decorates a function, not {function!r}.")
    name = getattr(function, "__name__", type(function).__name__)
    fields: dict[str, TypeAdapter[Any]] = {}
    defaults, inputs = set[str](), set[str]()

    def read_input(owner: str, p: inspect.Parameter, hint: Any) -> str:
        if hint is ChatRequest:
            inputs.add(_WHOLE)
            return _WHOLE
        if p.name not in _FIELDS | {"messages"}:
            raise InvalidInputError(
                f"The parameter {p.name!r} of {owner}() is no field of a chat request.",
                hint=f"Known: {', '.join(sorted(_FIELDS))}; or one of the type ChatRequest.",
                param=p.name,
            )
        bare = list[Message] if p.name == "messages" else Any
        fields.setdefault(p.name, _adapter(bare if hint is p.empty else hint, owner, p.name))
        if p.default is not p.empty:
            defaults.add(p.name)
        return p.name

    if "messages" not in {p.name for p in parameters_of(function, name)}:
        raise InvalidInputError(
            f"{name}() has no parameter `messages`, so it can't chat.",
            hint=f"Write def {name}(messages: list[Message]) -> str.",
            param="messages",
        )
    node = node_of(function, read_input)
    hints = type_hints_of(function, name)
    words = docstring_parser.parse(inspect.getdoc(function) or "")
    result = hints.get("return", str)
    streams_ = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function) or is_stream_type(result)
    if not streams_ and not _is_answer(result):
        raise InvalidInputError(
            f"{name}() returns {result!r}; a chat answers with text, or a message.",
            hint="Return str or Message, or yield it.",
            param="return",
        )
    return Chat(
        function=function,
        name=name,
        summary=words.short_description or name.replace("_", " ").strip().capitalize(),
        description=words.long_description or "",
        node=node,
        fields=fields,
        defaults=frozenset(defaults),
        whole=_WHOLE in inputs,
        streams=streams_,
    )


def _is_answer(result: Any) -> bool:
    if typing.get_origin(result) in (typing.Union, types.UnionType):
        return all(map(_is_answer, typing.get_args(result)))
    return result in (str, Any, Message, dict) or typing.get_origin(result) is dict


def _adapter(annotation: Any, function: str, parameter: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation)
    except PydanticUserError as e:
        raise InvalidInputError(
            f"The parameter {parameter!r} of {function}() has the type {annotation!r}, which can't be checked.",
            hint="Take messages: list[Message].",
            param=parameter,
        ) from e


def _message(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = message.model_dump(exclude_none=True)
    parts = found.get("content")
    if isinstance(parts, list) and all(part["type"] in ("text", "refusal") for part in parts):
        parts = "\n".join(part[part["type"]] for part in parts)
    return found | {"content": parts}


def _field(request: ChatRequest, name: str) -> Any:
    if name == "messages":
        return [_message(one) for one in request.messages]
    if name == "max_tokens":
        return request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    value = getattr(request, name)
    if isinstance(value, list):
        return [one.model_dump(exclude_none=True) if hasattr(one, "model_dump") else one for one in value]
    return value.model_dump(exclude_none=True, by_alias=True) if hasattr(value, "model_dump") else value


def parse_request(values: Mapping[str, Any], app: str) -> ChatRequest:
    """A checked request for this application. Raises RequestError, NotFoundError for another model's name."""
    try:
        request = ChatRequest.model_validate(values)
    except ValidationError as e:
        errors = problems.located(e, "body", ())
        problem = problems.wrong_input(errors, sorted(ChatRequest.model_fields))
        raise problems.RequestError(problem | {"param": ".".join(map(str, errors[0]["loc"][1:])) or None}) from e
    check_model(request.model, app)
    return request


def check_model(name: str, app: str) -> None:
    """Raises NotFoundError unless the name is this application's."""
    if name not in (f"app/{app}", app):
        raise NotFoundError(f"The model {name!r} is not here.", hint=f"This is app/{app}.")


def model_entry(app: str, created: int) -> dict[str, Any]:
    """The application in a list of models."""
    return {"id": f"app/{app}", "object": "model", "created": created, "owned_by": "llmasos"}


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: BaseException, function: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an error in OpenAI's form; what nobody foresaw is logged under an id."""
    problem = problems.of_exception(error, function)
    status = 400 if problem["status"] == 422 else problem["status"]
    message = " ".join(filter(None, (problem["message"], problem.get("hint"))))
    if error_id := problem.get("error_id"):
        message += f" ({error_id})"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = "model_not_found" if isinstance(error, NotFoundError) else problem["code"]
    return status, {"error": {"message": message, "type": kind, "param": problem.get("param"), "code": code}}


def error_response(error: BaseException, function: str) -> Response:
    status, body = error_body(error, function)
    headers = error.headers if isinstance(error, HTTPException) else None
    return Response(problems.encode(body), status, headers, "application/json")


Count = Callable[[Any], Awaitable[int | None]]
"""Tokens of a text or of messages, by the application's own model; None: it has none that counts."""


class _GivenFunction(BaseModel):
    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] = "{}"


class _GivenCall(BaseModel):
    id: str | None = None
    function: _GivenFunction

    def made(self) -> dict[str, Any]:
        given = self.function.arguments
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        function = {"name": self.function.name, "arguments": text}
        return {"id": self.id or f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class _Given(BaseModel):
    """A message that a chat function gave."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_GivenCall] | None = None


class Answer:
    """The OpenAI form of one answer, as its pieces come."""

    def __init__(self, request: ChatRequest, stops: Sequence[str], count: Count) -> None:
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.finish_reason = "stop"
        self.stop_reason: str | None = None
        """The stop text of the request that ended it, if one did."""
        self._request, self._stops, self._count = request, tuple(stops), count
        self._text, self._held, self._reasoning = "", "", ""
        self._calls: list[dict[str, Any]] = []
        self.ended = False
        """A stop text has come: no more is wanted."""

    def add(self, piece: Any) -> list[dict[str, Any]]:
        """What may be sent now, as deltas. Raises TypeError for a piece that is none."""
        if isinstance(piece, Chunk):
            if piece.finish_reason == "length":
                self.finish_reason = "length"
            if isinstance(piece.stop_reason, str) and piece.stop_reason in _stops(self._request):
                self.stop_reason = piece.stop_reason  # others are the application's own
            piece = piece.text
        if isinstance(piece, BaseModel):
            piece = piece.model_dump(exclude_none=True)
        if isinstance(piece, Mapping):
            return self._add_message(piece)
        if not isinstance(piece, str):
            raise TypeError(f"A chat function gives text or messages, not {type(piece).__name__}.")
        text = self._add_text(piece)
        return [{"content": text}] if text else []

    def _add_message(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        if not message.keys() & _Given.model_fields.keys() - {"role"}:
            raise TypeError("A chat function gave a message with neither content nor tool_calls.")
        try:
            found = _Given.model_validate(message)
        except ValidationError as e:
            wrong = e.errors()[0]
            where = ".".join(map(str, wrong["loc"]))
            raise TypeError(f"A chat function gave a message whose {where} is wrong: {wrong['msg']}.") from e
        deltas: list[dict[str, Any]] = []
        if found.reasoning_content:
            self._reasoning += found.reasoning_content
            deltas.append({"reasoning_content": found.reasoning_content})
        if found.content and (text := self._add_text(found.content)):
            deltas.append({"content": text})
        if found.tool_calls and not self.ended:
            deltas += [{"content": text}] if (text := self.rest()) else []
            for call in found.tool_calls:
                made = call.made()
                deltas.append({"tool_calls": [{"index": len(self._calls), **made}]})
                self._calls.append(made)
            self.finish_reason = "tool_calls"
        return deltas

    def _add_text(self, piece: str) -> str:
        self._held += piece
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.ended = bool(found)
        ready, self.stop_reason = min(found) if found else (len(self._held) - self._overlap(), self.stop_reason)
        text, self._held = self._held[:ready], "" if found else self._held[ready:]
        self._text += text
        return text

    def rest(self) -> str:
        """What was held because it could have begun a stop text."""
        text, self._held = self._held, ""
        self._text += text
        return text

    def _overlap(self) -> int:
        """Length of the end that could be the beginning of a stop text."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        ends = (size for size in range(longest, 0, -1) if self._held[-size:] in {stop[:size] for stop in self._stops})
        return next(ends, 0)

    async def usage(self) -> dict[str, Any]:
        """By the application's own model; estimated where it has none, which the body says."""
        messages = [_message(one) for one in self._request.messages]
        said = self._text + self._reasoning + "".join(json.dumps(call["function"]) for call in self._calls)
        counts = [await self._count(messages), await self._count(said) if said else 0]
        estimated = None in counts
        if estimated:
            texts = ("".join(_texts(messages)), said)
            counts = [math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN) for text in texts]
        prompt, completion = counts[0] or 0, counts[1] or 0
        found = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return found | ({"estimated": True} if estimated else {})

    async def whole(self) -> dict[str, Any]:
        # content is null where a call stands in its place, as clients expect
        content = self._text or (None if self._calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= {"reasoning_content": self._reasoning} if self._reasoning else {}
        message |= {"tool_calls": self._calls} if self._calls else {}
        choice = {"index": 0, "message": message, "logprobs": None, **self._end()}
        return self._head("chat.completion") | {"choices": [choice], "usage": await self.usage()}

    def chunk(self, delta: Mapping[str, Any], *, is_last: bool = False) -> dict[str, Any]:
        end = self._end() if is_last else {"finish_reason": None}
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, **end}
        return self._head("chat.completion.chunk") | {"choices": [choice]} | ({"usage": None} if self._counts else {})

    def _end(self) -> dict[str, Any]:
        found = {"finish_reason": self.finish_reason}
        return found | ({} if self.stop_reason is None else {"stop_reason": self.stop_reason})

    async def last_chunks(self) -> list[dict[str, Any]]:
        found = [self.chunk({"content": text})] if (text := self.rest()) else []
        found.append(self.chunk({}, is_last=True))
        if self._counts:
            found.append(self._head("chat.completion.chunk") | {"choices": [], "usage": await self.usage()})
        return found

    @property
    def _counts(self) -> bool:
        options = self._request.stream_options
        return bool(options and options.include_usage)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._request.model}


def _texts(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part.get("text", "") for part in message["content"] or ())


async def whole_response(answer: Answer, text: Any) -> Response:
    """Of a function that returned its whole answer."""
    answer.add(text)
    answer.rest()
    return _json(await answer.whole())


def _json(body: Mapping[str, Any]) -> Response:
    return Response(problems.encode(body), media_type="application/json")


class ChatResponse(streams.Streaming):
    """Sends the pieces of a generator as they come, or all at once."""

    def __init__(self, name: str, items: Any, answer: Answer, *, streamed: bool, worker: streams.Worker) -> None:
        super().__init__(name, items, worker=worker)
        self._name, self._answer, self._streamed = name, answer, streamed

    async def send_from(
        self, source: MemoryObjectReceiveStream[Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        if self._streamed:
            await self._events(source, scope, receive, send)
        else:
            await (await self._collect(source))(scope, receive, send)

    async def _collect(self, source: MemoryObjectReceiveStream[Any]) -> Response:
        try:
            async for item in source:
                self._answer.add(streams.element(item))
                if self._answer.ended:
                    break
            else:
                self._answer.rest()
            return _json(await self._answer.whole())
        except (Exception, SystemExit) as e:
            return error_response(e, self._name)

    async def _events(self, source: MemoryObjectReceiveStream[Any], scope: Scope, receive: Receive, send: Send) -> None:
        answer, started = self._answer, False

        async def put(*events: bytes, last: bool = False) -> None:
            nonlocal started
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": streams.HEADERS})
                started = True
                events = (_event(answer.chunk({"role": "assistant", "content": ""})), *events)
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": not last})

        try:
            while not answer.ended and (item := await streams.next_element(source)) is not streams.END:
                if item is streams.PING:
                    await put(b": waiting\n\n")
                elif deltas := answer.add(streams.element(item)):
                    await put(*(_event(answer.chunk(delta)) for delta in deltas))
            await put(*map(_event, await answer.last_chunks()), b"data: [DONE]\n\n", last=True)
        except (Exception, SystemExit) as e:
            if not started:
                await error_response(e, self._name)(scope, receive, send)
            else:
                body = problems.encode(error_body(e, self._name)[1])
                await put(b"data: " + body + b"\n\n", last=True)


def _event(body: Mapping[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return b"data: " + text + b"\n\n"


async def count_tokens(model: Any, what: Any, in_thread: streams.Worker) -> int | None:
    """Of a text or of messages, by a model that is loaded; None if it can't say."""
    if model is None or isinstance(model, str):
        return None
    try:
        counted: int = await in_thread(lambda: _count(model, what))
        return counted
    except (LLMasOSError, AttributeError, TypeError, KeyError, ValueError):
        return None


def _count(model: Any, what: Any) -> int:
    from llmasos.inference.remote import RemoteLLM

    if isinstance(model, RemoteLLM):
        return model.count_tokens(what)
    prompt: str = what if isinstance(what, str) else model.chat_prompt(what)
    ids: list[int] = model.tokenizer.encode(prompt, add_special_tokens=False)
    return len(ids)
