"""Tasks over HTTP: `POST /llmasos/v1/tasks/NAME` with a model and the task's inputs, as one request of its caller;
batches and pipelines become jobs."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, create_model

from llmasos.apps.sandbox import run_python
from llmasos.client.types.jobs import Job
from llmasos.client.types.tasks import PipelineRequest, TaskBatchRequest, TaskInfo, TaskList
from llmasos.serve.body import ReadAside
from llmasos.serve.caller import Caller, caller_of
from llmasos.serve.documented import ASKED
from llmasos.serve.models import Models
from llmasos.serve.native.common import responses
from llmasos.serve.respond import whole
from llmasos.serve.taskmodel import ServedTaskModel
from llmasos.tasks import BUILT_IN
from llmasos.tasks.base import Run, Task

if TYPE_CHECKING:
    from llmasos.serve.jobs.tasks import Pipelines, TaskBatches


def create_router(models: Models, batches: TaskBatches, pipelines: Pipelines) -> APIRouter:
    router = APIRouter(prefix="/tasks", route_class=ReadAside)

    @router.get("", summary="The tasks")
    async def list_tasks() -> TaskList:
        return TaskList(data=[TaskInfo.model_validate(one.describe()) for one in BUILT_IN.values()])

    for one in BUILT_IN.values():
        _add(router, models, one)

    @router.post("/batch", status_code=202, summary="A task over many inputs, as a job", responses=_MADE)
    async def batch(body: TaskBatchRequest, request: Request) -> Job:
        return batches.shown((await batches.create(body, caller_of(request))).job)

    @router.post("/pipeline", status_code=202, summary="Tasks that use each other's results, as a job", responses=_MADE)
    async def pipeline(body: PipelineRequest, request: Request) -> Job:
        return pipelines.shown((await pipelines.create(body, caller_of(request))).job)

    return router


_MADE = responses(403, 404, 409, 413, 507)


def _add(router: APIRouter, models: Models, one: Task[Any, Any]) -> None:
    body_of = _body_of(one.name)

    async def call(body: Any, request: Request) -> Response:
        given = one.inputs.model_construct(**{key: getattr(body, key) for key in one.inputs.model_fields})
        return await whole(request, _answer(models, caller_of(request), body.model, one, given))

    call.__annotations__ = {"body": body_of, "request": Request, "return": Response}
    router.add_api_route(
        f"/{one.name}",
        call,
        methods=["POST"],
        name=one.name,
        summary=one.summary,
        description=one.__doc__,
        response_model=one.output,
        responses=responses(*ASKED[1:]),
    )


@lru_cache
def _body_of(task: str) -> Any:
    """The task's inputs, and the model that it is for."""
    name = "".join(map(str.capitalize, task.split("_")))
    model = (str, Field(description="which served one"))
    return create_model(f"{name}Request", __base__=BUILT_IN[task].inputs, model=model)


async def _answer(models: Models, caller: Caller, name: str, one: Task[Any, Any], given: Any) -> BaseModel:
    async with models.lease(name, caller) as served:
        found: BaseModel = await one.function(Run(ServedTaskModel(served, name), run_code=run_python), given)
        return found
