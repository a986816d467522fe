"""Functions that may take long, or never return, beside an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any


async def together(work: list[Any]) -> None:
    """All of it; what ends one early ends all."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def awaited(function: Callable[..., Any], *args: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(*args)
    return await in_thread(function, *args)


async def invoke(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    found = await in_thread(function, **arguments)
    return await found if inspect.isawaitable(found) else found


async def in_thread(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """In a thread of its own that nobody waits for in the end: a tool that hangs must not hold the program, as a thread
    of a pool would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    inside = contextvars.copy_context()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(RuntimeError(str(error)) if isinstance(error, StopIteration) else error)

    def work() -> None:
        result, error = None, None
        try:
            result = inside.run(function, *args, **kwargs)
        except BaseException as e:
            error = e
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=work, name="llmasos-tool", daemon=True).start()
    return await future
