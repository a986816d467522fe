"""What a lease gives, and the errors of one that can't be given."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from llmasos.errors import LLMasOSError, ModelCrashedError, ServerError


class QueueFullError(ServerError):
    """Too many requests wait for a model. `retry_after`: seconds, from what the model gets done."""

    http_status = 503

    def __init__(self, message: str, *, hint: str = "Try again in a moment.", retry_after: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class LoadFailedError(ServerError):
    """A model could not be loaded; `retry_after` seconds from now it is tried again. The statuses are the cause's."""

    def __init__(self, name: str, cause: BaseException, retry_after: int) -> None:
        ours = cause if isinstance(cause, LLMasOSError) else ServerError(f"{type(cause).__name__}: {cause}")
        super().__init__(f"{name} could not be loaded: {ours.message}", hint=ours.hint)
        self.exit_code, self.http_status = ours.exit_code, ours.http_status
        if isinstance(ours, ServerError):  # the process died or never answered: another time it may
            self.http_status = 503
        self.retry_after = retry_after


class ClosingError(ServerError):
    """The host takes no more requests."""

    http_status = 503
    retry_after = 5

    def __init__(self) -> None:
        super().__init__("The server is stopping.", hint="Try again when it is back.")


class LentModel:
    """A leased model: its process's `llm`, whose requests outlive the process as long as nothing of their answers has
    been given."""

    def __init__(self, llm: Callable[[], Any], again: Callable[[], Awaitable[bool]]) -> None:
        """`llm`: the process's that the lease is on now. `again`: moves the lease to another; False if it may not."""
        self._llm, self._again = llm, again

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm(), name)

    async def astream_complete(self, *args: Any, **request: Any) -> AsyncGenerator[Any, None]:
        while True:
            begun = False
            try:
                async with aclosing(self._llm().astream_complete(*args, **request)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except ModelCrashedError:
                if begun or not await self._again():
                    raise

    async def acomplete(self, *args: Any, **request: Any) -> Any:
        return await self._call("acomplete", args, request)

    async def aembed(self, *args: Any, **request: Any) -> Any:
        return await self._call("aembed", args, request)

    async def ascore_pairs(self, *args: Any, **request: Any) -> Any:
        return await self._call("ascore_pairs", args, request)

    async def _call(self, method: str, args: tuple[Any, ...], request: dict[str, Any]) -> Any:
        while True:
            try:
                return await getattr(self._llm(), method)(*args, **request)
            except ModelCrashedError:
                if not await self._again():
                    raise
