"""Fine-tuning jobs, as `client.fine_tuning`: an uploaded file in, a model that the server serves out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing, closing
from typing import Any

from llmasos.client.http import AsyncHttp, Http, Target, path_of
from llmasos.client.providers.openai import event_json, parsed
from llmasos.client.sse import Event
from llmasos.client.types.finetuning import (
    FineTuningCheckpointList,
    FineTuningEvent,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
)

_ENDED = frozenset({"paused", "succeeded", "failed", "cancelled"})


def _path(*parts: str, **query: Any) -> str:
    return path_of("fine_tuning", "jobs", *parts, **query)


def _body(
    model: str,
    training_file: str,
    validation_file: str | None,
    suffix: str | None,
    seed: int | None,
    hyperparameters: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None,
    options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "seed": seed,
        "metadata": None if metadata is None else dict(metadata),
        "llmasos": None if options is None else dict(options),
    }
    if hyperparameters is not None:
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": dict(hyperparameters)}}
    return {name: value for name, value in body.items() if value is not None}


def _event(event: Event, target: Target) -> FineTuningEvent:
    return parsed(FineTuningEvent, event_json(event, target.label), target.label)


class FineTuning:
    """Blocking."""

    def __init__(self, http: Http) -> None:
        self._http, self._label = http, http.target.label

    def create(
        self,
        model: str,
        training_file: str,
        *,
        validation_file: str | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> FineTuningJob:
        """Train an installed model on an uploaded file (purpose fine-tune). `hyperparameters`: n_epochs, batch_size,
        learning_rate_multiplier. `options`: of a run, e.g. {"tuning": "full", "lora": {"r": 8}}."""
        body = _body(model, training_file, validation_file, suffix, seed, hyperparameters, metadata, options)
        return parsed(FineTuningJob, self._http.json("POST", _path(), body, once=True), self._label)

    def retrieve(self, id: str) -> FineTuningJob:
        return parsed(FineTuningJob, self._http.json("GET", _path(id)), self._label)

    def list(self, *, after: str | None = None, limit: int | None = None) -> FineTuningJobList:
        """One page, the newest first."""
        return parsed(FineTuningJobList, self._http.json("GET", _path(after=after, limit=limit)), self._label)

    def cancel(self, id: str) -> FineTuningJob:
        """End it for good; checkpoints stay."""
        return self._act(id, "cancel")

    def pause(self, id: str) -> FineTuningJob:
        """Save it, and stop until it is resumed."""
        return self._act(id, "pause")

    def resume(self, id: str) -> FineTuningJob:
        """Go on with a paused or failed one."""
        return self._act(id, "resume")

    def events(self, id: str, *, after: str | None = None, limit: int | None = None) -> FineTuningEventList:
        """One page, the newest first."""
        path = _path(id, "events", after=after, limit=limit)
        return parsed(FineTuningEventList, self._http.json("GET", path), self._label)

    def follow(self, id: str) -> Generator[FineTuningEvent, None, None]:
        """Every event, the oldest first, as they come, until nothing more happens to the job by itself."""
        with closing(self._http.events("GET", _path(id, "events", stream=True))) as events:
            for event in events:
                yield _event(event, self._http.target)

    def checkpoints(self, id: str, *, after: str | None = None, limit: int | None = None) -> FineTuningCheckpointList:
        """One page, the newest first."""
        path = _path(id, "checkpoints", after=after, limit=limit)
        return parsed(FineTuningCheckpointList, self._http.json("GET", path), self._label)

    def wait(self, id: str, *, interval: float = 2.0) -> FineTuningJob:
        """The job once it is over or paused, however it ended; asked for every `interval` seconds."""
        while (job := self.retrieve(id)).status not in _ENDED:
            time.sleep(interval)
        return job

    def _act(self, id: str, action: str) -> FineTuningJob:
        return parsed(FineTuningJob, self._http.json("POST", _path(id, action)), self._label)


class AsyncFineTuning:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self._label = http, http.target.label

    async def create(
        self,
        model: str,
        training_file: str,
        *,
        validation_file: str | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> FineTuningJob:
        body = _body(model, training_file, validation_file, suffix, seed, hyperparameters, metadata, options)
        return parsed(FineTuningJob, await self._http.json("POST", _path(), body, once=True), self._label)

    async def retrieve(self, id: str) -> FineTuningJob:
        return parsed(FineTuningJob, await self._http.json("GET", _path(id)), self._label)

    async def list(self, *, after: str | None = None, limit: int | None = None) -> FineTuningJobList:
        return parsed(FineTuningJobList, await self._http.json("GET", _path(after=after, limit=limit)), self._label)

    async def cancel(self, id: str) -> FineTuningJob:
        return await self._act(id, "cancel")

    async def pause(self, id: str) -> FineTuningJob:
        return await self._act(id, "pause")

    async def resume(self, id: str) -> FineTuningJob:
        return await self._act(id, "resume")

    async def events(self, id: str, *, after: str | None = None, limit: int | None = None) -> FineTuningEventList:
        path = _path(id, "events", after=after, limit=limit)
        return parsed(FineTuningEventList, await self._http.json("GET", path), self._label)

    async def follow(self, id: str) -> AsyncGenerator[FineTuningEvent, None]:
        async with aclosing(self._http.events("GET", _path(id, "events", stream=True))) as events:
            async for event in events:
                yield _event(event, self._http.target)

    async def checkpoints(
        self, id: str, *, after: str | None = None, limit: int | None = None
    ) -> FineTuningCheckpointList:
        path = _path(id, "checkpoints", after=after, limit=limit)
        return parsed(FineTuningCheckpointList, await self._http.json("GET", path), self._label)

    async def wait(self, id: str, *, interval: float = 2.0) -> FineTuningJob:
        while (job := await self.retrieve(id)).status not in _ENDED:
            await asyncio.sleep(interval)
        return job

    async def _act(self, id: str, action: str) -> FineTuningJob:
        return parsed(FineTuningJob, await self._http.json("POST", _path(id, action)), self._label)
