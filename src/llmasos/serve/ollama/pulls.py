"""Pulls as Ollama's clients follow them: jobs as all others (`native.pulls`), but paused when their clients leave."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from llmasos.client.types.native import PullJob
from llmasos.client.types.ollama import OllamaProgress, OllamaPullRequest
from llmasos.errors import InvalidInputError, NotFoundError, UnsupportedError
from llmasos.serve.models import ModelNotFoundError, Models
from llmasos.serve.native.pulls import Pulls
from llmasos.serve.ollama.names import spellings
from llmasos.store.catalog import Resolved
from llmasos.store.library import Library

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


async def follow(resolved: Resolved, pulls: Pulls, models: Models) -> AsyncGenerator[OllamaProgress, None]:
    """Progress, then `success`. Raises what the pull fails with."""
    yield OllamaProgress(status="pulling manifest")
    message, said = "", None
    async with aclosing(pulls.hold(resolved.ref, resolved.name)) as jobs:
        async for job in jobs:
            if job.message and job.message != message:
                yield OllamaProgress(status=job.message)
            message = job.message
            line = _line(job)
            if line is not None and line != said:
                said = line
                yield line
    await models.look(resolved.name)
    try:
        models[resolved.name]
    except ModelNotFoundError:
        status = f"{resolved.name} is installed; this server serves only what it was started with"
        yield OllamaProgress(status=status)
    yield OllamaProgress(status="success")


def _line(job: PullJob) -> OllamaProgress | None:
    if job.state != "running" or not job.phase:
        return None
    status = _PHASES.get(job.phase, job.phase)
    if job.phase == "download" and job.file:
        status = f"{status} {job.file}"
    known: dict[str, Any] = {"completed": job.done}
    if job.total:
        known["total"] = job.total
    return OllamaProgress(status=status, digest=job.file or status, **known)
