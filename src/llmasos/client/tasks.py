"""Tasks as `client.tasks`: one call, a batch over many inputs, a pipeline; the last two are jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmasos.client.http import AsyncHttp, Http, path_of
from llmasos.client.providers.openai import parsed
from llmasos.client.types.jobs import Job
from llmasos.client.types.tasks import TaskInfo, TaskList


def _batch(
    task: str, model: str, lines: Sequence[Any] | None, input_file_id: str | None, parallel: int | None
) -> dict[str, Any]:
    given = {"lines": None if lines is None else list(lines), "input_file_id": input_file_id, "parallel": parallel}
    return {"task": task, "model": model, **{name: value for name, value in given.items() if value is not None}}


def _pipeline(pipeline: Mapping[str, Any], inputs: Mapping[str, Any] | None, model: str | None) -> dict[str, Any]:
    body = {"pipeline": dict(pipeline), "inputs": dict(inputs or {})}
    return body if model is None else {**body, "model": model}


class Tasks:
    """Blocking."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def list(self) -> list[TaskInfo]:
        """With the JSON Schemas of inputs and outputs."""
        return parsed(TaskList, self._http.json("GET", path_of("tasks")), self._http.target.label).data

    def run(self, task: str, *, model: str, **inputs: Any) -> dict[str, Any]:
        """The task's output."""
        found: dict[str, Any] = self._http.json("POST", path_of("tasks", task), {"model": model, **inputs})
        return found

    def batch(
        self,
        task: str,
        *,
        model: str,
        lines: Sequence[Any] | None = None,
        input_file_id: str | None = None,
        parallel: int | None = None,
    ) -> Job:
        """Run the task for each of `lines` (objects with its inputs, or texts for the first of them), or of an
        uploaded file. The result of the job names a file with a line for each."""
        body = _batch(task, model, lines, input_file_id, parallel)
        data = self._http.json("POST", path_of("tasks", "batch"), body, once=True)
        return parsed(Job, data, self._http.target.label)

    def pipeline(
        self, pipeline: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, *, model: str | None = None
    ) -> Job:
        """Run a pipeline's steps. `model`: for steps that name none."""
        body = _pipeline(pipeline, inputs, model)
        data = self._http.json("POST", path_of("tasks", "pipeline"), body, once=True)
        return parsed(Job, data, self._http.target.label)


class AsyncTasks:
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def list(self) -> list[TaskInfo]:
        return parsed(TaskList, await self._http.json("GET", path_of("tasks")), self._http.target.label).data

    async def run(self, task: str, *, model: str, **inputs: Any) -> dict[str, Any]:
        found: dict[str, Any] = await self._http.json("POST", path_of("tasks", task), {"model": model, **inputs})
        return found

    async def batch(
        self,
        task: str,
        *,
        model: str,
        lines: Sequence[Any] | None = None,
        input_file_id: str | None = None,
        parallel: int | None = None,
    ) -> Job:
        body = _batch(task, model, lines, input_file_id, parallel)
        data = await self._http.json("POST", path_of("tasks", "batch"), body, once=True)
        return parsed(Job, data, self._http.target.label)

    async def pipeline(
        self, pipeline: Mapping[str, Any], inputs: Mapping[str, Any] | None = None, *, model: str | None = None
    ) -> Job:
        body = _pipeline(pipeline, inputs, model)
        data = await self._http.json("POST", path_of("tasks", "pipeline"), body, once=True)
        return parsed(Job, data, self._http.target.label)
