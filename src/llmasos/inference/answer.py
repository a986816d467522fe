"""The text of a request on its way: the engine's tokens become chunks, for one reader, in any thread or event loop.

What has come since the reader last looked is one chunk: a reader that keeps up gets every step's token by itself, one
that lags gets more at a time, which costs less.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from llmasos.inference.request import Chunk, FinishReason, RequestMetrics, SamplingParams, TokenLogprob
from llmasos.inference.stopping import StopStrings

if TYPE_CHECKING:
    from llmasos.inference.state import Beam, Output, RawLogprob, Request, RequestState
    from llmasos.text import Tokenizer

UNREAD_TOKENS = 256
"""Beyond this the request pauses until its reader has caught up."""
Home = asyncio.AbstractEventLoop | None


class Taker(Protocol):
    """Who hears what an engine makes of a request."""

    def take(self, output: Output) -> None: ...


class Listener(Taker, Protocol):
    """Who also hears the commonest of it in a shorter form."""

    def take_token(self, token: int) -> None:
        """One further token of the first completion, and nothing else: what most outputs are."""


class Loop(Protocol):
    """What an answer needs of an engine, in this process or in another one."""

    delivers_home: bool
    """The listener is called in the reader's event loop, where there is one; else in a thread of the engine's."""

    def submit(self, request: Request, listener: Listener, home: Home = None) -> Future[None]: ...
    def abort(self, request: Request) -> None: ...
    def pause(self, request: Request, paused: bool) -> None: ...
    def finish(self, request: Request, index: int) -> None: ...


class _Text:
    """One completion: how its tokens become text, and what of it has not been read."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self.decoder = tokenizer.stream(shown=params.shown_token_ids) if tokenizer is not None else None
        self.stops = StopStrings(params.stop, include=params.include_stop) if params.stop else None
        self.ended = False
        self.unread = ""
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.metrics: RequestMetrics | None = None

    def push(self, ids: list[int]) -> int:
        """Add the tokens' text. Returns how many of them there are up to a stop string."""
        for n, token in enumerate(ids, 1):
            self.push_one(token)
            if self.stopped is not None:
                return n
        return len(ids)

    def push_one(self, token: int) -> None:
        if self.decoder is not None:
            text = self.decoder.push(token)
            self.unread += text if self.stops is None else self.stops.push(text)

    @property
    def stopped(self) -> str | None:
        """The stop string that was met."""
        return None if self.stops is None else self.stops.stopped

    def end(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """Add the text that was held back: half a character, or what might have become a stop string."""
        if self.decoder is not None and self.stopped is None:
            rest = self.decoder.flush()
            self.unread += rest if self.stops is None else self.stops.push(rest) + self.stops.flush()
        self.ended, self.finish_reason, self.stop_reason = True, reason, stop_reason

    def chunk(self, index: int) -> Chunk:
        """What has not been read, as read."""
        chunk = Chunk(
            index,
            self.unread,
            tuple(self.ids),
            tuple(self.logprobs),
            self.finish_reason,
            self.stop_reason,
            self.metrics,
        )
        self.unread, self.ids = "", []
        if self.logprobs:
            self.logprobs = []
        return chunk


class Answer:
    """A stream is iterated (`for` or `async for`): it begins with the first question for a chunk, and a reader that
    lags UNREAD_TOKENS behind pauses its request, so nothing grows without bound. Any other answer begins at once and is
    read as a whole, with `wait` or `await_all`. `cancel` stops either early."""

    def __init__(
        self, loop: Loop, request: Request, tokenizer: Tokenizer | None, *, stream: bool, home: Home = None
    ) -> None:
        params = request.params
        self.request, self._loop = request, loop
        self._name = token_names(tokenizer)
        self._texts = [_Text(tokenizer, params) for _ in range(params.n)]
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._unread: deque[int] = deque()
        """Completions of which something has not been read, oldest first."""
        self._num_unread = 0
        self._stream = stream
        self._paused = self._over = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        """An asynchronous reader that waits."""
        self._home: Home = None
        """The event loop of an asynchronous reader."""
        self._state: RequestState | None = None
        self.beams: list[Beam] = []
        self._submitted: Future[None] | None = None if stream else loop.submit(request, self, home)

    @property
    def prompt_logprobs(self) -> dict[int, tuple[RawLogprob, bool]]:
        """By position: log-probability of a prompt's token, and whether it was the model's first choice."""
        return self._state.prompt_logprobs if self._state is not None else {}

    def metrics(self) -> RequestMetrics:
        if self._state is None:
            return RequestMetrics(0.0, 0.0, 0)
        return self._state.metrics()

    # the thread that outputs come in

    def take(self, output: Output) -> None:
        with self._lock:
            if self._over:
                return
            self._state = output.state
            error: BaseException | None = output.error
            try:
                if error is None and output.beams is None and not self._texts[output.index].ended:
                    self._add(output)
            except Exception as e:  # a tokenizer that can't name a token must not end the engine's thread
                error = e
                self._loop.abort(self.request)
            self._error, self.beams = error, output.beams or []
            if output.last or error is not None or all(t.ended for t in self._texts):
                self._over = True
            self._heard()

    def take_token(self, token: int) -> None:
        with self._lock:
            text = self._texts[0]
            if self._over or text.ended:
                return
            try:
                text.push_one(token)
            except Exception as e:
                self._error, self._over = e, True
                self._loop.abort(self.request)
            else:
                self._had(0, text, 1)
                text.ids.append(token)
                if text.stopped is not None:
                    self._loop.finish(self.request, 0)
                    self._ended(text, "stop", text.stopped)
                    self._over = all(t.ended for t in self._texts)
            self._heard()

    def _add(self, output: Output) -> None:
        text = self._texts[output.index]
        ids, reason = output.token_ids, output.finish_reason
        stop_reason: str | int | None = output.stop_reason
        used = text.push(ids[:-1] if output.end_token else ids)
        if text.stopped is not None:
            ids, reason, stop_reason = ids[:used], "stop", text.stopped
            if output.finish_reason is None:
                self._loop.finish(self.request, output.index)
        logprobs = [self.named(raw) for raw in output.logprobs[: len(ids)]]
        self._had(output.index, text, len(ids))
        text.ids += ids
        text.logprobs += logprobs
        if reason is not None:
            self._ended(text, reason, stop_reason)

    def _had(self, index: int, text: _Text, num_tokens: int) -> None:
        """Something comes to what the reader has not had."""
        if index not in self._unread:
            self._unread.append(index)
        self._num_unread += num_tokens

    def _ended(self, text: _Text, reason: FinishReason, stop_reason: str | int | None) -> None:
        text.end(reason, stop_reason)
        if all(t.ended for t in self._texts):
            text.metrics = self.metrics()

    def named(self, raw: RawLogprob) -> TokenLogprob:
        top = tuple((i, self._name(i), value) for i, value in raw.top)
        return TokenLogprob(raw.token_id, self._name(raw.token_id), raw.logprob, top)

    def _heard(self) -> None:
        """There is something to read, or all is over."""
        if self._stream and self._num_unread > UNREAD_TOKENS and not self._paused and not self._over:
            self._paused = True
            self._loop.pause(self.request, True)
        if self._stream or self._over:
            self._notify()

    def _notify(self) -> None:
        waiter, self._waiter = self._waiter, None
        if self._home is None:
            self._ready.notify_all()
        elif self._home.is_closed():  # nobody reads on
            self._over = True
            self._loop.abort(self.request)
        elif waiter is not None and self._loop.delivers_home:
            _resolve(waiter)
        elif waiter is not None:
            with suppress(RuntimeError):  # it has just been closed: the next output will find that
                self._home.call_soon_threadsafe(_resolve, waiter)

    # the reader

    def _started(self, home: Home = None) -> Future[None]:
        if self._submitted is None:
            self._submitted = self._loop.submit(self.request, self, home)
        return self._submitted

    def __iter__(self) -> Generator[Chunk, None, None]:
        try:
            self._started().result()
            while (chunk := self._next()) is not None:
                yield chunk
        finally:
            self.cancel()

    def _next(self) -> Chunk | None:
        with self._lock:
            while not self._unread and not self._over:
                self._ready.wait()
            return self._pop()

    def _pop(self) -> Chunk | None:
        if not self._unread:
            if self._error is not None:
                raise self._error
            return None
        index = self._unread.popleft()
        chunk = self._texts[index].chunk(index)
        self._num_unread -= len(chunk.token_ids)
        if self._paused and self._num_unread < UNREAD_TOKENS // 2 and not self._over:
            self._paused = False
            self._loop.pause(self.request, False)
        return chunk

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        try:
            running = await self._begin()
            while True:
                with self._lock:
                    if self._unread or self._over:
                        waiter, chunk = None, self._pop()
                    else:
                        waiter = self._waiter = running.create_future()
                if waiter is not None:
                    await waiter
                elif chunk is None:
                    return
                else:
                    yield chunk
        finally:
            self._waiter = None
            self.cancel()

    async def await_all(self) -> list[Chunk]:
        """One chunk of each completion, when the request is over."""
        try:
            running = await self._begin()
            while not self._over:
                with self._lock:
                    waiter = self._waiter = None if self._over else running.create_future()
                if waiter is not None:
                    await waiter
        finally:
            self._waiter = None
            self.cancel()
        return self._all()

    async def _begin(self) -> asyncio.AbstractEventLoop:
        self._home = running = asyncio.get_running_loop()
        submitted = self._started(running)
        if submitted.done():
            submitted.result()
        else:
            await asyncio.wrap_future(submitted)
        return running

    def wait(self, cancelled: Callable[[], bool] | None = None) -> list[Chunk]:
        """One chunk of each completion, when the request is over. Once `cancelled` is true it ends with what there
        is."""
        self._started().result()
        try:
            with self._lock:
                while not self._over:
                    self._ready.wait(0.02 if cancelled is not None else None)
                    if not self._over and cancelled is not None and cancelled():
                        break
        finally:
            self.cancel()
        return self._all()

    def _all(self) -> list[Chunk]:
        if self._error is not None:
            raise self._error
        with self._lock:
            return [text.chunk(index) for index, text in enumerate(self._texts)]

    def cancel(self) -> None:
        """Stop the request if it still runs; completions that were not finished end with the reason "abort"."""
        with self._lock:
            if self._over:
                return
            self._over = True
            for index, text in enumerate(self._texts):
                if not text.ended:
                    self._had(index, text, 0)
                    text.end("abort")
            self._notify()
        self._loop.abort(self.request)


def _resolve(waiter: asyncio.Future[None]) -> None:
    with suppress(asyncio.InvalidStateError):  # who waited was cancelled
        waiter.set_result(None)


def token_names(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """How log-probabilities name a token: the text that it adds, half characters as U+FFFD; empty for one of the rows
    that pad a model's vocabulary."""
    if tokenizer is None:
        return str
    known = tokenizer.backend.id_to_token

    def text(token: int) -> str:
        return "" if known(token) is None else tokenizer.token_bytes(token).decode("utf-8", "replace")

    return text
