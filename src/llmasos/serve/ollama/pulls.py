"""Pulls as Ollama's clients follow them. One that its client leaves stops; what has arrived stays for the next try."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from llmasos.client.types.ollama import OllamaProgress, OllamaPullRequest
from llmasos.errors import InvalidInputError, NotFoundError, UnsupportedError
from llmasos.serve.models import ModelNotFoundError, Models
from llmasos.serve.ollama.names import spellings
from llmasos.store.catalog import Resolved
from llmasos.store.library import Library

OnProgress = Callable[[dict[str, Any]], None]
Run = Callable[[str, dict[str, Any], OnProgress], Awaitable[dict[str, Any]]]
"""Carries a task of the store out in a process of its own; cancelling it ends the process."""

_PHASES = {"download": "pulling", "check": "verifying sha256 digest", "unpack": "unpacking"}


def wanted(body: OllamaPullRequest) -> Resolved:
    """What is to be pulled. Raises NotFoundError with the nearest names, InvalidInputError for a path. Blocking."""
    if body.insecure:
        raise UnsupportedError("insecure: true is not supported: what is fetched is always checked.", param="insecure")
    library, first = Library(), None
    for spelling in spellings(body.model):
        try:
            found = library.resolve(spelling)
        except (NotFoundError, InvalidInputError) as e:
            first = first or e
            continue
        if found.sources[0].kind == "file" and not library.has(spelling):
            raise InvalidInputError(
                f"{body.model!r} is a path of the server's machine, and clients have no say there.",
                hint="`llmasos import` it on that machine.",
                param="model",
            )
        return found
    assert first is not None
    raise first


async def follow(resolved: Resolved, run: Run, models: Models) -> AsyncGenerator[OllamaProgress, None]:
    """Progress, then `success`. Closing the generator stops the pull."""
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    yield OllamaProgress(status="pulling manifest")
    pull = asyncio.ensure_future(run("pull", {"model": resolved.ref, "name": resolved.name}, queue.put_nowait))
    pull.add_done_callback(lambda _: queue.put_nowait(None))
    said: OllamaProgress | None = None
    try:
        while (seen := await queue.get()) is not None:
            line = _line(seen)
            if line is not None and line != said:
                said = line
                yield line
        name = (await pull)["name"]
    finally:
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
    try:
        await models.look(name)
        models[name]
    except ModelNotFoundError:
        yield OllamaProgress(status=f"{name} is installed; this server serves only what it was started with")
    yield OllamaProgress(status="success")


def _line(seen: dict[str, Any]) -> OllamaProgress | None:
    """One report of the store's as a line."""
    phase, file = seen["phase"], seen["file"]
    if phase in ("note", "wait", "done"):
        return OllamaProgress(status=seen["message"]) if seen["message"] else None
    status = _PHASES.get(phase, phase)
    if phase == "download" and file:
        status = f"{status} {file}"
    known: dict[str, Any] = {"completed": seen["done"]}
    if seen["total"]:
        known["total"] = seen["total"]
    return OllamaProgress(status=status, digest=file or status, **known)
