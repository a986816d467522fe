"""Tasks over HTTP: `POST /llmasos/v1/tasks/NAME` with a model and the task's inputs, as one request of its caller."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, create_model

from llmasos.client.types import (
    ChatCompletionRequest,
    ChatMessage,
    ResponseFormat,
)
from llmasos.client.types.openai import JsonSchemaFormat
from llmasos.errors import UnsupportedError
from llmasos.inference.request import SamplingParams
from llmasos.serve import prepare
from llmasos.serve.body import ReadAside
from llmasos.serve.caller import Caller, caller_of
from llmasos.serve.conversation import chat_prompt_ids
from llmasos.serve.documented import ASKED
from llmasos.serve.models import Models, Served
from llmasos.serve.native.common import responses
from llmasos.serve.respond import whole
from llmasos.serve.turn import whole_turn
from llmasos.tasks import BUILT_IN
from llmasos.tasks.base import Run, Task
from llmasos.tasks.model import Messages, Reply


class TaskInfo(BaseModel):
    """A task. `input` and `output` are JSON Schemas; a request has the input's fields and `model`."""

    name: str
    summary: str
    input: dict[str, Any]
    output: dict[str, Any]


class TaskList(BaseModel):
    data: list[TaskInfo]


class ServedTaskModel:
    """A model of the server as that of tasks: each question is admitted, counted and measured like a chat request."""

    enforces = True
    labels: tuple[str, ...] = ()

    def __init__(self, served: Served, name: str) -> None:
        self.served, self.name = served, name

    @property
    def context_length(self) -> int:
        return self.served.model.context_length

    def count(self, messages: Messages) -> int:
        return len(chat_prompt_ids(self.served.model, self._request(messages)))

    def count_text(self, text: str) -> int:
        return len(self.served.model.tokenizer.encode(prepare.unicode(text, "text"), add_special_tokens=False))

    async def ask(self, messages: Messages, schema: Mapping[str, Any] | None, *, max_tokens: int) -> Reply:
        prepare.check_generates(self.served.model)
        form = None
        if schema is not None:
            asked = JsonSchemaFormat.model_validate({"schema": dict(schema)})
            form = ResponseFormat(type="json_schema", json_schema=asked)
        request = self._request(messages, max_tokens=max_tokens, temperature=0.0, response_format=form)
        [reply], _ = await whole_turn(self.served, request)
        return Reply(reply.text, reply.finish_reason == "length")

    async def likelihood(self, messages: Messages, reply: str) -> float | None:
        prepare.check_generates(self.served.model)
        asked, ids = await asyncio.to_thread(self._ids, messages, reply)
        [output] = await self.served.complete(
            [asked + ids], SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        )
        return sum(one.logprob for one in (output.prompt_logprobs or ())[len(asked) :] if one is not None)

    def _ids(self, messages: Messages, reply: str) -> tuple[list[int], list[int]]:
        tokenizer = self.served.model.tokenizer
        asked = chat_prompt_ids(self.served.model, self._request(messages))
        return asked, tokenizer.encode(prepare.unicode(reply, "text"), add_special_tokens=False)

    async def classify(self, text: str) -> dict[str, float]:
        raise UnsupportedError("A server's models have no classification heads.", param="model")

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return await self.served.embed([prepare.unicode(text, "texts") for text in texts])

    async def score_pairs(self, query: str, texts: Sequence[str]) -> list[float] | None:
        given = [prepare.unicode(text, "texts") for text in (query, *texts)]
        try:
            return await self.served.score_pairs(given[0], given[1:])
        except UnsupportedError as e:
            if e.param != "model" or self.served.adapter is not None:
                raise
            return None

    def _request(self, messages: Messages, **more: Any) -> ChatCompletionRequest:
        turns = [ChatMessage.model_validate(dict(one)) for one in messages]
        return ChatCompletionRequest(model=self.name, messages=turns, **more)


def create_router(models: Models) -> APIRouter:
    router = APIRouter(prefix="/tasks", route_class=ReadAside)

    @router.get("", summary="The tasks")
    async def list_tasks() -> TaskList:
        return TaskList(data=[TaskInfo.model_validate(one.describe()) for one in BUILT_IN.values()])

    for one in BUILT_IN.values():
        _add(router, models, one)
    return router


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
        found: BaseModel = await one.function(Run(ServedTaskModel(served, name)), given)
        return found
