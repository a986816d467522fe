"""Batches of a task and pipelines as jobs. Each works in a folder of its own, `<home>/jobs/ID`, and goes on there after
the server was ended in any way: a batch behind its last whole line, a pipeline with the results that it has."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json
from sqlalchemy.orm import Session

from llmasos.apps.sandbox import run_python
from llmasos.client.types.tasks import PipelineRequest, TaskBatchRequest
from llmasos.errors import InvalidInputError, LLMasOSError, ModelCrashedError, NotFoundError
from llmasos.serve.access.errors import ForbiddenError, UnauthorizedError
from llmasos.serve.aside import Aside
from llmasos.serve.batches.answers import PRIORITY
from llmasos.serve.caller import Caller
from llmasos.serve.files.store import FileNotFoundHereError, Files, new_file_id, row_of
from llmasos.serve.jobs.room import Jobs, Kept, Kind, Work, new_id
from llmasos.serve.models import ModelNotFoundError, Models
from llmasos.serve.taskmodel import ServedTaskModel
from llmasos.store.transfer import disk_errors
from llmasos.tasks import BUILT_IN
from llmasos.tasks.base import Run, Task
from llmasos.tasks.batch import BatchProgress, arun_batch
from llmasos.tasks.history import History, StepRecord
from llmasos.tasks.pipeline import Pipeline

MAX_CRASHES = 3
"""How often a question is asked again after its model's process ended."""
LONGEST_PAUSE = 60.0
MAX_PARALLEL = 32


class _OverError(Exception):
    """Nothing of the job can be answered any more: its key is over, its model gone. `error` says it."""

    def __init__(self, error: LLMasOSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Asking:
    """Questions of a job to served models: admitted, counted and measured as its key's requests, behind those of people
    who wait."""

    def __init__(self, work: Work, models: Models, aside: Aside, caller: Caller) -> None:
        self._work, self._models, self._aside = work, models, aside
        self._caller = replace(caller, priority=caller.priority + PRIORITY)

    async def __call__(self, name: str, task: Task[Any, Any], given: Any) -> BaseModel:
        num_tries = num_crashes = 0
        while True:
            try:
                return await self._once(name, task, given)
            except (UnauthorizedError, ForbiddenError, ModelNotFoundError) as e:
                raise _OverError(e) from e
            except LLMasOSError as e:
                num_crashes += isinstance(e, ModelCrashedError)
                seconds = getattr(e, "retry_after", None)
                if seconds is None or num_crashes >= MAX_CRASHES:
                    raise
                self._work.change(message=e.message)
                await asyncio.sleep(min(LONGEST_PAUSE, float(seconds) * 2.0 ** min(num_tries, 16)))
                num_tries += 1

    async def _once(self, name: str, task: Task[Any, Any], given: Any) -> BaseModel:
        id = f"req_{secrets.token_hex(12)}"
        async with (
            self._aside.request(self._caller, f"/llmasos/v1/tasks/{task.name}", id),
            self._models.lease(name, self._caller) as served,
        ):
            found: BaseModel = await task.function(Run(ServedTaskModel(served, name), run_code=run_python), given)
            return found


class _TaskKind(Kind):
    def __init__(self, jobs: Jobs, models: Models, aside: Aside, files: Files) -> None:
        self._jobs, self._models, self._aside, self._files = jobs, models, aside, files
        jobs.add(self)

    def _folder(self, id: str) -> Path:
        return self._jobs.storage.home / "jobs" / id

    async def clear(self, job: Kept, *, is_forgotten: bool) -> None:
        await asyncio.to_thread(shutil.rmtree, self._folder(job.id), ignore_errors=True)

    async def _asking(self, work: Work) -> _Asking:
        return _Asking(work, self._models, self._aside, await self._aside.caller(work.job.key_id))

    async def _check_models(self, names: Sequence[str], caller: Caller) -> None:
        """Before a job is made of it. Raises ModelNotFoundError, ForbiddenError."""
        for name in dict.fromkeys(names):
            await self._models.look(name)
            self._models.check(name, caller)


class TaskBatches(_TaskKind):
    """One task over the lines of a file. The result names a file of the same key with a line for each."""

    name = "task_batch"

    async def create(self, body: TaskBatchRequest, caller: Caller) -> Work:
        """Raises InvalidInputError, NotFoundError for a task, model or file that there is not."""
        task = _built_in(body.task)
        if (body.lines is None) == (body.input_file_id is None):
            raise InvalidInputError("Give either lines or input_file_id.", param="input_file_id")
        await self._check_models([body.model], caller)
        await self._files.admit(caller)
        id, name = new_id(self.name), f"{task}: {len(body.lines or [])} lines"
        source = None
        if body.input_file_id is not None:
            file, source = await self._files.content(caller, body.input_file_id)
            name = f"{task}: {file.filename}"
        folder = self._folder(id)
        try:
            await asyncio.to_thread(_write_input, folder / "in.jsonl", source, body.lines)
            spec = {"task": task, "model": body.model, "parallel": body.parallel, "output_id": new_file_id()}
            return self._jobs.go_on(await self._jobs.make(self.name, name, spec, caller, id=id))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    async def run(self, work: Work) -> Any:
        spec, folder = work.job.spec, self._folder(work.job.id)

        def told(now: BatchProgress) -> None:
            details = {"done": now.done, "total": now.total, "failed": now.failed}
            work.change(progress=now.done / max(1, now.total), message=f"{now.done}/{now.total}", details=details)

        try:
            end = await arun_batch(
                spec["task"],
                folder / "in.jsonl",
                folder / "out.jsonl",
                model=spec["model"],
                parallel=spec["parallel"],
                on_progress=told,
                answer=await self._asking(work),
            )
        except _OverError as e:
            raise e.error from None
        told(end)
        return await self._result(work.job)

    async def give_up(self, job: Kept) -> Any:
        """The lines that are done."""
        return await self._result(job) if job.details.get("done") else None

    async def _result(self, job: Kept) -> dict[str, Any]:
        """The output becomes a file of the key; again without effect. The lines were synced one by one."""
        id: str = job.spec["output_id"]

        def publish(session: Session) -> None:
            try:
                row_of(session, id, job.key_id)
            except FileNotFoundHereError:
                name = f"{job.id}_output.jsonl"
                self._files.add(session, id, job.key_id, filename=name, purpose="batch_output")

        path = self._files.path(id)
        if not path.exists():
            await asyncio.to_thread(_share, self._folder(job.id) / "out.jsonl", path)
        await self._jobs.storage.run(publish)
        counts = {name: job.details.get(name, 0) for name in ("total", "done", "failed")}
        return {"output_file_id": id, **counts}


class Pipelines(_TaskKind):
    """Steps of tasks. The result has the `output` and how the steps went. Each is also in the history of runs
    (`llmasos task runs`), under the job's id."""

    name = "pipeline"

    async def create(self, body: PipelineRequest, caller: Caller) -> Work:
        """Raises InvalidInputError for a pipeline that is none, NotFoundError for a task or model that there is not."""
        pipeline = Pipeline.of(body.pipeline)
        for step in pipeline.steps:
            _built_in(step.task)
        await self._check_models([pipeline.model_of(step, body.model) for step in pipeline.steps], caller)
        spec = {"pipeline": pipeline.model_dump(mode="json", by_alias=True), "inputs": body.inputs, "model": body.model}
        return await self._jobs.begin(self.name, pipeline.name, spec, caller)

    async def run(self, work: Work) -> Any:
        spec = work.job.spec
        pipeline = Pipeline.of(spec["pipeline"])
        pipeline.parallel = min(pipeline.parallel, MAX_PARALLEL)
        steps: list[StepRecord] = []

        def told(step: StepRecord) -> None:
            steps.append(step)
            work.change(progress=len(steps) / len(pipeline.steps), message=f"{step.id}: {step.state}")

        cache = self._folder(work.job.id)
        try:
            output = await pipeline.arun(
                spec["inputs"],
                model=spec["model"],
                history=History(await self._jobs.storage.database()),
                run_id=work.job.id,
                cache=cache,
                on_step=told,
                answer=await self._asking(work),
            )
        except _OverError as e:
            raise e.error from None
        return {"output": output, "steps": [step.model_dump() for step in steps]}


def _built_in(name: str) -> str:
    """Raises NotFoundError for a task that the server does not offer."""
    if name not in BUILT_IN:
        raise NotFoundError(f"There is no task {name!r} here.", hint=f"There are: {', '.join(BUILT_IN)}.")
    return name


def _write_input(target: Path, source: Path | None, lines: Sequence[Any] | None) -> None:
    with disk_errors(target):
        target.parent.mkdir(parents=True)
        if source is not None:
            _share(source, target)
            return
        with target.open("wb") as file:
            for line in lines or ():
                file.write(to_json(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _share(source: Path, target: Path) -> None:
    """The same bytes under another name; a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
