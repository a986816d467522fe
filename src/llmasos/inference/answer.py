"""The text of a request on its way: the engine's tokens become chunks, for one reader, in any thread or event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from llmasos.inference.request import Chunk, RequestMetrics, TokenLogprob
from llmasos.inference.stopping import StopStrings

if TYPE_CHECKING:
    from llmasos.inference.state import Beam, Output, RawLogprob, Request, RequestState
    from llmasos.text import StreamDecoder, Tokenizer

UNREAD_TOKENS = 256
"""Beyond this the request pauses until its reader has caught up."""


class Loop(Protocol):
    """What an answer needs of an engine, in this process or in another one."""

    delivers_home: bool
    """Outputs come in the reader's event loop, where there is one; else in a thread of the engine's."""

    def submit(
        self, request: Request, listener: Callable[[Output], None], home: asyncio.AbstractEventLoop | None
    ) -> Future[None]: ...
    def abort(self, request: Request) -> None: ...
    def pause(self, request: Request, paused: bool) -> None: ...
    def finish(self, request: Request, index: int) -> None: ...


class _Text:
    """The text side of one completion."""

    def __init__(self, decoder: StreamDecoder | None, stops: StopStrings) -> None:
        self.decoder, self.stops = decoder, stops
        self.ended = False

    def push(self, ids: list[int]) -> tuple[str, int]:
        """The text that the tokens add, and how many of them there are up to a stop string."""
        if self.decoder is None:
            return "", len(ids)
        text = ""
        for n, token in enumerate(ids):
            text += self.stops.push(self.decoder.push(token))
            if self.stops.stopped is not None:
                return text, n + 1
        return text, len(ids)

    def rest(self) -> str:
        """Text that was held back: half a character, or what might have become a stop string."""
        if self.decoder is None or self.stops.stopped is not None:
            return ""
        return self.stops.push(self.decoder.flush()) + self.stops.flush()


class Answer:
    """A stream is iterated (`for` or `async for`): it begins with the first question for a chunk, and a reader that
    lags UNREAD_TOKENS behind pauses its request, so nothing grows without bound. Any other answer begins at once and is
    read as a whole, with `wait` or `await_all`. `cancel` stops either early."""

    def __init__(
        self,
        loop: Loop,
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        stream: bool,
        home: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        params = request.params
        self.request, self._loop = request, loop
        self._name = token_names(tokenizer)
        self._texts = [
            _Text(
                tokenizer.stream(shown=params.shown_token_ids) if tokenizer else None,
                StopStrings(params.stop, include=params.include_stop),
            )
            for _ in range(params.n)
        ]
        self._ready = threading.Condition()
        self._chunks: deque[Chunk] = deque()
        self._unread = 0
        self._stream = stream
        self._paused = self._over = False
        self._error: BaseException | None = None
        self._wake: Callable[[], object] | None = None
        self._state: RequestState | None = None
        self.beams: list[Beam] = []
        self._submitted: Future[None] | None = None if stream else loop.submit(request, self._take, home)

    @property
    def prompt_logprobs(self) -> dict[int, tuple[RawLogprob, bool]]:
        """By position: log-probability of a prompt's token, and whether it was the model's first choice."""
        return self._state.prompt_logprobs if self._state is not None else {}

    def metrics(self) -> RequestMetrics:
        if self._state is None:
            return RequestMetrics(0.0, 0.0, 0)
        return self._state.metrics()

    # the thread that outputs come in

    def _take(self, output: Output) -> None:
        error: BaseException | None = output.error
        chunk = None
        try:
            chunk = self._chunk(output)
        except Exception as e:  # a tokenizer that can't name a token must not end the engine's thread
            error = e
            self._loop.abort(self.request)
        with self._ready:
            if self._over:
                return
            self._state, self._error = output.state, error
            self.beams = output.beams or []
            if chunk is not None:
                self._chunks.append(chunk)
                self._unread += len(chunk.token_ids)
            if output.last or error is not None or all(t.ended for t in self._texts):
                self._over = True
            elif self._stream and self._unread > UNREAD_TOKENS and not self._paused:
                self._paused = True
                self._loop.pause(self.request, True)
            self._notify()

    def _chunk(self, output: Output) -> Chunk | None:
        text = self._texts[output.index]
        if output.beams is not None or output.error is not None or text.ended:
            return None
        ids, reason = output.token_ids, output.finish_reason
        stop_reason: str | int | None = output.stop_reason
        added, used = text.push(ids[:-1] if output.end_token else ids)
        if text.stops.stopped is not None:
            ids, reason, stop_reason = ids[:used], "stop", text.stops.stopped
            if output.finish_reason is None:
                self._loop.finish(self.request, output.index)
        metrics = None
        if reason is not None:
            added += text.rest()
            text.ended = True
            metrics = output.state.metrics() if all(t.ended for t in self._texts) else None
        logprobs = tuple(self.named(raw) for raw in output.logprobs[: len(ids)])
        return Chunk(output.index, added, tuple(ids), logprobs, reason, stop_reason, metrics)

    def named(self, raw: RawLogprob) -> TokenLogprob:
        top = tuple((i, self._name(i), value) for i, value in raw.top)
        return TokenLogprob(raw.token_id, self._name(raw.token_id), raw.logprob, top)

    def _notify(self) -> None:
        self._ready.notify_all()
        if self._wake is not None:
            try:
                self._wake()
            except RuntimeError:  # the reader's event loop is closed: nobody reads on
                self._over, self._wake = True, None
                self._loop.abort(self.request)

    # the reader

    def _started(self, home: asyncio.AbstractEventLoop | None = None) -> Future[None]:
        if self._submitted is None:
            self._submitted = self._loop.submit(self.request, self._take, home)
        return self._submitted

    def __iter__(self) -> Iterator[Chunk]:
        try:
            self._started().result()
            while (chunk := self._next()) is not None:
                yield chunk
        finally:
            self.cancel()

    def _next(self) -> Chunk | None:
        with self._ready:
            while not self._chunks and not self._over:
                self._ready.wait()
            return self._pop()

    def _pop(self) -> Chunk | None:
        if self._chunks:
            chunk = self._chunks.popleft()
            self._unread -= len(chunk.token_ids)
            if self._paused and self._unread < UNREAD_TOKENS // 2 and not self._over:
                self._paused = False
                self._loop.pause(self.request, False)
            return chunk
        if self._error is not None:
            raise self._error
        return None

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        try:
            event = await self._listen()
            while True:
                event.clear()
                with self._ready:
                    waits = not self._chunks and not self._over
                    chunk = None if waits else self._pop()
                if waits:
                    await event.wait()
                elif chunk is None:
                    return
                else:
                    yield chunk
        finally:
            self._wake = None
            self.cancel()

    async def await_all(self) -> list[Chunk]:
        """All chunks, when the request is over."""
        try:
            event = await self._listen()
            while not self._over:
                event.clear()
                if not self._over:
                    await event.wait()
        finally:
            self._wake = None
            self.cancel()
        return self._all()

    async def _listen(self) -> asyncio.Event:
        """An event of the running loop that is set whenever something has come."""
        event, running = asyncio.Event(), asyncio.get_running_loop()
        submitted = self._started(running)
        if self._loop.delivers_home:
            self._wake = event.set
            submitted.result()
        else:
            await asyncio.wrap_future(submitted)
            self._wake = lambda: running.call_soon_threadsafe(event.set)
        return event

    def wait(self, cancelled: Callable[[], bool] | None = None) -> list[Chunk]:
        """All chunks, when the request is over. Once `cancelled` is true it ends with what there is."""
        self._started().result()
        try:
            with self._ready:
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
        return list(self._chunks)

    def cancel(self) -> None:
        """Stop the request if it still runs; completions that were not finished end with the reason "abort"."""
        with self._ready:
            if self._over:
                return
            self._over = True
            for index, text in enumerate(self._texts):
                if not text.ended:
                    self._chunks.append(Chunk(index, text.rest(), finish_reason="abort"))
            self._notify()
        self._loop.abort(self.request)


def token_names(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """How log-probabilities name a token: the text that it adds, half characters as U+FFFD; empty for one of the rows
    that pad a model's vocabulary."""
    if tokenizer is None:
        return str
    known = tokenizer.backend.id_to_token

    def text(token: int) -> str:
        return "" if known(token) is None else tokenizer.token_bytes(token).decode("utf-8", "replace")

    return text
