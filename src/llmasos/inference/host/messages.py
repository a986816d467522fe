"""What a model's process and its parent say to each other: msgpack of the types here, nothing else.

Token ids only. What every token of every stream passes through, `Step`, is one message per step of the engine, and
keeps its commonest content, one token for one completion, in two flat lists.

Bytes that are no message raise `MalformedError`; nothing that they say is executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from llmasos import errors
from llmasos.errors import INT64, InvalidInputError, LLMasOSError, ServerError
from llmasos.inference.request import FinishReason, SamplingParams, StructuredOutput
from llmasos.inference.state import AdapterInfo, Beam, EngineStats, Output, RawLogprob, Request
from llmasos.models.config import ModelConfig
from llmasos.store.transfer import Progress

Salt = str | int | None
Logprob = tuple[int, float, list[tuple[int, float]]]
"""A token, its log-probability, and the likeliest tokens with theirs."""


class MalformedError(ServerError):
    """Bytes that are no message of this protocol."""


class _Message(msgspec.Struct, array_like=True, gc=False):
    pass


class Problem(_Message):
    """An error as it crosses: the names of its class and of the classes above it, and its simple attributes."""

    kinds: list[str]
    message: str
    hint: str = ""
    fields: dict[str, str | int | float | bool | None] = {}


# what the parent asks


class Foretell(_Message, tag="foretell"):
    """What a process may be asked before its setup: what a model takes. It answers with a line of JSON on its standard
    output: `ok`, a Forecast, or `error`. After an error, or where it is not a CPU that is told of, it ends."""

    options: dict[str, Any]
    """Of `forecast`."""


class Setup(_Message, tag="setup"):
    """How a process begins, read from its standard input."""

    name: str
    reference: str
    device: str
    dtype: str
    quantization: str
    load_format: str
    engine: dict[str, Any]
    adapters: dict[str, str]
    parent: int
    """The parent's process id."""
    orders: str
    """Where the process reads what the parent asks."""
    news: str
    """Where it writes what it has to say."""
    server_key: str
    """Of CURVE (RFC 26), where the addresses are of TCP; only who knows it can connect. Empty elsewhere."""


class Submit(_Message, tag="submit"):
    id: int
    prompt: list[int]
    params: dict[str, Any]
    """Those that are not the usual ones."""
    max_tokens: int
    priority: int = 0
    adapter: str | None = None
    cache_salt: Salt = None
    score_from: int | None = None


class Abort(_Message, tag="abort"):
    id: int


class Finish(_Message, tag="finish"):
    """One completion has met its stop string."""

    id: int
    index: int


class Pause(_Message, tag="pause"):
    id: int
    paused: bool


class Embed(_Message, tag="embed"):
    id: int
    texts: list[list[int]]
    pooling: str | None
    normalize: bool


class FillMask(_Message, tag="fill_mask"):
    id: int
    text: list[int]
    top_k: int


class Classify(_Message, tag="classify"):
    id: int
    texts: list[list[int]]
    types: list[list[int]] | None


class LoadAdapter(_Message, tag="load_adapter"):
    id: int
    name: str
    path: str | None


class UnloadAdapter(_Message, tag="unload_adapter"):
    id: int
    name: str


class Sleep(_Message, tag="sleep"):
    id: int


class WakeUp(_Message, tag="wake_up"):
    id: int


class Stop(_Message, tag="stop"):
    """End; nothing is on its way any more."""


Call = Embed | FillMask | Classify | LoadAdapter | UnloadAdapter | Sleep | WakeUp
"""What is answered by one Result."""
Order = Submit | Abort | Finish | Pause | Stop | Call


# what the process says


class Working(_Message, tag="working"):
    """Where loading stands."""

    progress: Progress


class Located(_Message, tag="located"):
    """The model's files are here; the weights are not loaded yet."""

    path: str


class Loaded(_Message, tag="loaded"):
    config: ModelConfig
    """Without `extra`."""
    generation: dict[str, Any]
    pooling: dict[str, Any]
    device: str
    dtype: str
    adapters: list[AdapterInfo]


class Failed(_Message, tag="failed"):
    """The model can't be loaded, or not be used any more: the process ends."""

    problem: Problem


class Part(_Message):
    """An Output of the engine that is more than one further token of a request's first completion."""

    id: int
    index: int
    token_ids: list[int]
    logprobs: list[Logprob] = []
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    end_token: bool = False
    last: bool = False
    problem: Problem | None = None
    beams: list[tuple[list[int], float, bool]] | None = None
    queue_seconds: float | None = None
    """With a request's first output."""
    num_cached: int = 0
    prompt_logprobs: list[tuple[int, Logprob, bool]] = []


class Step(_Message, tag="step"):
    """What one step made. `ids` and `tokens`, in pairs: one more token for a request's first completion."""

    ids: list[int]
    tokens: list[int]
    parts: list[Part]
    stats: EngineStats


class Result(_Message, tag="result"):
    id: int
    value: Any = None
    problem: Problem | None = None


class Status(_Message, tag="status"):
    stats: EngineStats
    adapters: list[AdapterInfo]
    device_bytes: int = 0
    """That torch holds of the model's device; 0 on a CPU."""
    peak_device_bytes: int = 0


class Beat(_Message, tag="beat"):
    """The process lives, whatever its engine does."""

    step_seconds: float
    """For how long the engine's current step has been running."""


class Log(_Message, tag="log"):
    level: int
    message: str


News = Working | Located | Loaded | Failed | Step | Result | Status | Beat | Log


# bytes


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no place in a message")


def _path(kind: type, value: Any) -> Any:
    return Path(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_news: msgspec.msgpack.Decoder[News] = msgspec.msgpack.Decoder(News, dec_hook=_path)
_setup: msgspec.msgpack.Decoder[Setup | Foretell] = msgspec.msgpack.Decoder(Setup | Foretell)


def encode(message: Order | News | Setup | Foretell) -> bytes:
    """Raises InvalidInputError for what has no place in a message: an integer of more than 64 bits."""
    try:
        return _encoder.encode(message)
    except (OverflowError, NotImplementedError, TypeError) as e:
        raise InvalidInputError(f"The request can't be sent to the model's process: {e}.") from None


def decode_order(frame: bytes) -> Order:
    """Raises MalformedError."""
    return _decoded(_orders, frame)


def decode_news(frame: bytes) -> News:
    """Raises MalformedError."""
    news = _decoded(_news, frame)
    if isinstance(news, Step) and len(news.ids) != len(news.tokens):
        raise MalformedError(f"A step has {len(news.ids)} requests and {len(news.tokens)} tokens.")
    return news


def decode_setup(frame: bytes) -> Setup | Foretell:
    """Raises MalformedError."""
    return _decoded(_setup, frame)


def _decoded(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> Any:
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError, TypeError) as e:
        raise MalformedError(f"{len(frame)} bytes between a model's process and its parent are no message: {e}") from e


# errors


def problem_of(error: BaseException) -> Problem:
    """An error for the way; one that is not ours becomes a ServerError."""
    if not isinstance(error, LLMasOSError):
        return Problem(["ServerError"], f"The model failed: {type(error).__name__}: {error}", "Try again.")
    return Problem(**errors.error_facts(error))


def error_of(problem: Problem) -> LLMasOSError:
    return errors.error_of(msgspec.structs.asdict(problem))


def _is_big(value: object) -> bool:
    return isinstance(value, int) and not -INT64 <= value < INT64


# requests


_USUAL = SamplingParams()
_STRUCTURED = tuple(field.name for field in dataclasses.fields(StructuredOutput))
_SENT = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name != "logits_processors")


def submit_of(id: int, request: Request) -> Submit:
    """Raises InvalidInputError for a cache_salt that can't be sent."""
    salt = request.cache_salt
    if not isinstance(salt, str | int | None) or _is_big(salt):
        raise InvalidInputError(f"cache_salt={salt!r} is no text.", param="cache_salt")
    return Submit(
        id,
        list(request.prompt),
        _params_out(request.params),
        request.max_tokens,
        request.priority,
        request.adapter,
        salt,
        request.score_from,
    )


def request_of(order: Submit) -> Request:
    """Raises InvalidInputError for parameters that are none."""
    return Request(
        tuple(order.prompt),
        _params_in(order.params),
        order.max_tokens,
        priority=order.priority,
        adapter=order.adapter,
        cache_salt=order.cache_salt,
        score_from=order.score_from,
    )


def _params_out(params: SamplingParams) -> dict[str, Any]:
    sent: dict[str, Any] = {}
    for name in _SENT:
        value = getattr(params, name)
        if value != getattr(_USUAL, name):
            sent[name] = value
    if params.structured is not None:
        given = params.structured
        sent["structured"] = {name: v for name in _STRUCTURED if (v := getattr(given, name)) is not None}
    for name in ("seed", "max_tokens", "top_k"):  # of any size
        if _is_big(sent.get(name)):
            sent[name] = str(sent[name])
    return sent


def _params_in(sent: dict[str, Any]) -> SamplingParams:
    params = dict(sent)
    for name in ("seed", "max_tokens", "top_k"):
        if isinstance(params.get(name), str):
            with suppress(ValueError):  # what is no number is refused with the other parameters
                params[name] = int(params[name])
    if isinstance(given := params.get("structured"), dict):
        if unknown := set(given) - set(_STRUCTURED):
            raise InvalidInputError(f"{sorted(unknown)[0]!r} is no form of output.", param="structured")
        params["structured"] = StructuredOutput(**given)
    return SamplingParams.of(**params)


# outputs


def part_of(id: int, output: Output, *, first: bool) -> Part:
    state = output.state
    return Part(
        id,
        output.index,
        output.token_ids,
        [_logprob_out(raw) for raw in output.logprobs],
        output.finish_reason,
        output.stop_reason,
        output.end_token,
        output.last,
        None if output.error is None else problem_of(output.error),
        None if output.beams is None else [(list(b.ids), b.total, b.ended) for b in output.beams],
        max(0.0, state.first_scheduled - state.request.arrival) if first else None,
        state.num_cached,
        [(i, _logprob_out(raw), best) for i, (raw, best) in state.prompt_logprobs.items()] if first else [],
    )


def _logprob_out(raw: RawLogprob) -> Logprob:
    return raw.token_id, raw.logprob, list(raw.top)


def logprob_of(sent: Logprob) -> RawLogprob:
    return RawLogprob(sent[0], sent[1], tuple(sent[2]))


def beams_of(sent: Sequence[tuple[list[int], float, bool]]) -> list[Beam]:
    return [Beam(tuple(ids), total, ended) for ids, total, ended in sent]
