"""Agents over HTTP: runs on served models, with the server's tools and the client's, kept and gone on with.

A run lives in its request, which holds the model as long as it works. Where a call needs somebody's word, or is of a
function of the client's, the run waits in the database (`requires_action`) until it is continued.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Query, Request, Response

from llmasos.apps.agent import traces
from llmasos.apps.agent.agent import Agent, described
from llmasos.apps.agent.loop import CLIENT, check_decisions
from llmasos.apps.agent.mcp_tools import McpServer, mcp_config
from llmasos.apps.agent.models import Ended, Message, Messages, Question
from llmasos.apps.agent.tools import knowledge_tool, python_tool, task_tool, unknown_tool
from llmasos.apps.knowledge import Passage, names
from llmasos.apps.memory import Memory
from llmasos.client.tools import Tool
from llmasos.client.types import ChatCompletionRequest
from llmasos.client.types.agents import (
    AgentContinueRequest,
    AgentDecision,
    AgentEvent,
    AgentRun,
    AgentRunList,
    AgentRunRequest,
    AgentToolInfo,
    AgentToolList,
    ConversationInfoList,
)
from llmasos.client.types.knowledge import KnowledgeSearchRequest
from llmasos.errors import InvalidInputError, LLMasOSError, NotFoundError
from llmasos.serve import prepare
from llmasos.serve.body import ReadAside
from llmasos.serve.caller import Caller, caller_of
from llmasos.serve.conversation import chat_prompt_ids
from llmasos.serve.documented import ASKED
from llmasos.serve.models import Models, Served
from llmasos.serve.native.common import responses
from llmasos.serve.native.knowledge import Knowledge
from llmasos.serve.respond import streamed, whole
from llmasos.serve.storage import Storage
from llmasos.serve.taskmodel import ServedTaskModel
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnUsage, turn
from llmasos.tasks import BUILT_IN
from llmasos.text.reply import ReplyEvent

_log = logging.getLogger("llmasos.serve.agents")
_PING = 15.0, ": still here\n\n"
OnEnd = Callable[[AgentRun], object]


class ServedChat:
    """A model of the server as that of agents: each answer is admitted, counted and measured like a chat request."""

    def __init__(self, served: Served, name: str) -> None:
        self.served, self.name = served, name

    @property
    def context_length(self) -> int:
        return self.served.model.context_length

    async def ready(self) -> None:
        prepare.check_generates(self.served.model)

    def count(self, messages: Messages, tools: list[dict[str, Any]]) -> int:
        return len(chat_prompt_ids(self.served.model, self._request(Question(messages, tools))))

    def _request(self, question: Question) -> ChatCompletionRequest:
        fields: dict[str, Any] = {name: value for name, value in question.options.items() if value is not None}
        if question.tools:
            fields["tools"] = question.tools
            fields["parallel_tool_calls"] = question.parallel
            if question.required:
                fields["tool_choice"] = "required"
        if question.form is not None:
            form = {"name": "answer", "schema": dict(question.form)}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        messages = [_message(one) for one in question.messages]
        return ChatCompletionRequest.model_validate(
            {"model": self.name, "messages": messages, "max_tokens": question.max_tokens, **fields}
        )

    async def ask(self, question: Question) -> AsyncGenerator[ReplyEvent | Ended, None]:
        finish, usage = "stop", TurnUsage(0, 0, 0)
        async with aclosing(turn(self.served, self._request(question), fit=True)) as events:
            async for event in events:
                match event:
                    case TurnDelta(_, piece):
                        yield piece
                    case TurnEnd(_, reason):
                        finish = reason
                    case TurnUsage():
                        usage = event
        yield Ended(finish, usage.num_prompt_tokens, usage.num_output_tokens)  # type: ignore[arg-type]  # one of the three


def _message(given: Any) -> Message:
    return {key: value for key, value in given.items() if value is not None}


class _KeptAgent(Agent):
    """Its runs are kept as their caller's."""

    def __init__(self, agents: Agents, caller: Caller, **options: Any) -> None:
        super().__init__(keep=False, **options)
        self._agents, self._caller = agents, caller

    async def _keep(self, run: AgentRun) -> None:
        await self._agents.keep(run, self._caller)


class Agents:
    """`on_end`: who hears of runs that have ended or wait."""

    def __init__(self, models: Models, storage: Storage, bases: Knowledge | None = None) -> None:
        self._models, self._storage = models, storage
        self.bases = bases or Knowledge(models)
        self.on_end: list[OnEnd] = []
        self._starting: asyncio.Task[None] | None = None
        self._working: dict[tuple[str | None, str], asyncio.Task[Any]] = {}

    async def start(self) -> None:
        """What servers that have ended were working on is failed."""
        self._starting = asyncio.create_task(self._give_up())

    async def close(self) -> None:
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)

    async def _give_up(self) -> None:
        try:
            place = await asyncio.to_thread(lambda: self._storage.place)
            living = await asyncio.to_thread(self._storage.living)
            if num := await self._storage.run(lambda session: traces.give_up(session, place, living)):
                _log.warning("%d runs of agents were not finished when their server ended: they are failed now", num)
        except LLMasOSError as e:
            _log.error("runs of agents that a server has left could not be looked for: %s", e)

    async def keep(self, run: AgentRun, caller: Caller) -> None:
        await self._storage.run(lambda session: traces.save(session, run, caller.key_id))
        for told in self.on_end:
            told(run)

    # runs

    async def begin(self, body: AgentRunRequest, caller: Caller) -> AsyncGenerator[AgentEvent, None]:
        functions = [one.function for one in body.tools if not isinstance(one, str)]
        infos = [
            AgentToolInfo(
                name=one.name, description=one.description or "", parameters=dict(one.parameters or {}), source=CLIENT
            )
            for one in functions
        ]
        words = [one for one in body.tools if isinstance(one, str)]
        messages = body.input if isinstance(body.input, str) else _messages(body.input)
        async with self._models.lease(body.model, caller) as served:
            tools = await self._toolbox(words, infos, served, body.model, caller)
            agent = _KeptAgent(
                self,
                caller,
                model=ServedChat(served, body.model),
                tools=tools,
                system=body.system,
                limits=body.limits,
                output=body.output,
                context=body.context,
                tool_choice=body.tool_choice,
                parallel_calls=body.parallel_calls,
                temperature=body.temperature,
                trusted=body.approve,
                memory=await self.memory(caller),
            )
            events_of_run = agent.astream(messages, conversation=body.conversation)
            async with aclosing(self._watched(events_of_run, caller)) as events:
                async for event in events:
                    yield event

    async def go_on(self, id: str, body: AgentContinueRequest, caller: Caller) -> AsyncGenerator[AgentEvent, None]:
        def check(run: AgentRun) -> None:
            check_decisions(run, body.decisions)

        found = await self.get(id, caller)
        check(found)
        async with self._models.lease(found.model, caller) as served:
            words = list(dict.fromkeys(one.source for one in found.tools if one.source not in ("", CLIENT)))
            functions = [one for one in found.tools if one.source == CLIENT]
            tools = await self._toolbox(words, functions, served, found.model, caller)
            worker = await asyncio.to_thread(lambda: (self._storage.place, self._storage.server))
            run = await self._storage.run(lambda s: traces.take(s, id, caller.key_id, check, worker=worker))
            agent = _KeptAgent(
                self,
                caller,
                model=ServedChat(served, run.model),
                tools=tools,
                limits=run.limits,
                output=run.form,
                context=run.context,
                parallel_calls=run.parallel_calls,
                memory=await self.memory(caller),
            )
            decisions: dict[str, AgentDecision] = body.decisions
            async with aclosing(self._watched(agent.astream_resume(run, decisions), caller)) as events:
                async for event in events:
                    yield event

    async def _watched(
        self, events: AsyncGenerator[AgentEvent, None], caller: Caller
    ) -> AsyncGenerator[AgentEvent, None]:
        """Others of the same key can cancel it."""
        name: tuple[str | None, str] | None = None
        try:
            async with aclosing(events):
                async for event in events:
                    if event.type == "run.started" and event.run is not None and (task := asyncio.current_task()):
                        name = (caller.key_id, event.run.id)
                        self._working[name] = task
                    yield event
        finally:
            if name is not None:
                self._working.pop(name, None)

    async def cancel(self, id: str, caller: Caller) -> AgentRun:
        """Of a run that waits, or that works in this server: its request then ends."""
        task = self._working.get((caller.key_id, id))
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=10)
            return await self.get(id, caller)

        def work(session: Any) -> AgentRun:
            run = traces.take(session, id, caller.key_id, lambda _: None)
            run.state, run.pending = "cancelled", []
            for call in (call for step in run.steps for call in step.calls if call.result is None):
                call.result, call.is_error = "Not run: the run was cancelled.", True
            traces.save(session, run, caller.key_id)
            return run

        return await self._storage.run(work)

    async def get(self, id: str, caller: Caller) -> AgentRun:
        return await self._storage.run(lambda s: traces.load(s, id, caller.key_id), read_only=True)

    async def runs(self, caller: Caller, limit: int) -> AgentRunList:
        found = await self._storage.run(lambda s: traces.infos(s, caller.key_id, limit=limit), read_only=True)
        return AgentRunList(data=found)

    async def remove(self, id: str, caller: Caller) -> None:
        await self._storage.run(lambda s: traces.remove(s, id, caller.key_id))

    # tools

    async def _toolbox(
        self, words: Sequence[str], functions: Sequence[AgentToolInfo], served: Served, name: str, caller: Caller
    ) -> list[Tool | McpServer]:
        model = ServedTaskModel(served, name)
        found: list[Tool | McpServer] = [await self._tool(word, model, caller) for word in words]
        for one in functions:
            found.append(Tool(one.name, one.description, one.parameters, _of_client, source=CLIENT))
        return found

    async def _tool(self, word: str, model: ServedTaskModel, caller: Caller) -> Tool | McpServer:
        """Programs and MCP servers act on the server's machine: they are for those who manage it."""
        kind, _, name = word.partition(":")
        if word == "python":
            caller.check_scope("manage")
            return replace(python_tool(), source=word)
        if kind == "task" and name in BUILT_IN:
            return replace(task_tool(name, model=model), source=word)
        if kind == "knowledge" and name:
            if name not in await asyncio.to_thread(names):
                raise NotFoundError(f"There is no knowledge base {name!r} here.", hint="GET /llmasos/v1/knowledge")
            return replace(knowledge_tool(name, search=self._search(name, caller)), source=word)
        if kind == "mcp" and name:
            caller.check_scope("manage")
            servers = await asyncio.to_thread(mcp_config)
            if name not in servers:
                raise NotFoundError(
                    f"There is no MCP server {name!r} here.", hint="Describe it in the home's mcp.json."
                )
            return servers[name]
        raise unknown_tool(word)

    def _search(self, name: str, caller: Caller) -> Callable[[str, int], Any]:
        async def search(query: str, k: int) -> list[Passage]:
            return await self.bases.search(name, KnowledgeSearchRequest(query=query[:10_000], k=k), caller)

        return search

    async def tools(self, caller: Caller) -> AgentToolList:
        """What may be named in `tools`, as `source`."""
        found = [replace(task_tool(name), source=f"task:{name}") for name in BUILT_IN]
        bases = [
            replace(knowledge_tool(name, search=self._search(name, caller)), source=f"knowledge:{name}")
            for name in await asyncio.to_thread(names)
        ]
        servers: list[AgentToolInfo] = []
        if "manage" in caller.scopes:
            found.insert(0, replace(python_tool(), source="python"))
            for name, server in (await asyncio.to_thread(mcp_config)).items():
                about = f"Tools of the MCP server {server.url or name}."
                servers.append(AgentToolInfo(name=name, description=about, parameters={}, source=f"mcp:{name}"))
        return AgentToolList(data=[*(described(one) for one in [*found, *bases]), *servers])

    # conversations

    async def memory(self, caller: Caller) -> Memory:
        return Memory(await self._storage.database(), caller.key_id)

    async def conversations(self, caller: Caller, query: str, limit: int) -> ConversationInfoList:
        memory = await self.memory(caller)
        if query.strip():
            found = await asyncio.to_thread(memory.search, query, limit=limit)
        else:
            found = await asyncio.to_thread(memory.list, limit=limit)
        return ConversationInfoList(data=list(found))


def _of_client(**_: Any) -> str:
    raise AssertionError("the client's functions are not run here")


def _messages(given: Sequence[Any]) -> list[Message]:
    found = [one.model_dump(exclude_none=True) for one in given]
    if not found or found[-1]["role"] not in ("user", "tool"):
        raise InvalidInputError("The input ends with a message of the user.", param="input")
    return found


async def _last(events: AsyncGenerator[AgentEvent, None]) -> AgentRun:
    run: AgentRun | None = None
    async with aclosing(events):
        async for event in events:
            run = event.run or run
    assert run is not None
    return run


async def _texts(events: AsyncGenerator[AgentEvent, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            yield f"data: {event.model_dump_json(exclude_none=True)}\n\n"


def _write(run: AgentRun) -> str:
    return run.model_dump_json(exclude_none=True)


def create_router(agents: Agents) -> APIRouter:
    router = APIRouter(route_class=ReadAside)
    stream = responses(*ASKED[1:], 409, stream="AgentEvents, where `stream` is true; the last one has the run")

    async def answer(request: Request, events: AsyncGenerator[AgentEvent, None], stream: bool) -> Response:
        if stream:
            return await streamed(request, _texts(events), idle=_PING)
        return await whole(request, _last(events), _write)

    @router.post("/agents/runs", summary="Run an agent", response_model=AgentRun, responses=stream)
    async def begin(body: AgentRunRequest, request: Request) -> Response:
        return await answer(request, agents.begin(body, caller_of(request)), body.stream)

    @router.get("/agents/runs", summary="Your runs, the newest first")
    async def runs(request: Request, limit: int = Query(50, ge=1, le=1000)) -> AgentRunList:
        return await agents.runs(caller_of(request), limit)

    @router.get("/agents/runs/{id}", summary="One of them", response_model=AgentRun, responses=responses(404))
    async def get(id: str, request: Request) -> Response:
        return Response(_write(await agents.get(id, caller_of(request))), media_type="application/json")

    @router.delete("/agents/runs/{id}", status_code=204, summary="Forget it", responses=responses(404))
    async def remove(id: str, request: Request) -> Response:
        await agents.remove(id, caller_of(request))
        return Response(status_code=204)

    @router.post(
        "/agents/runs/{id}/continue", summary="Go on with one that waits", response_model=AgentRun, responses=stream
    )
    async def go_on(id: str, body: AgentContinueRequest, request: Request) -> Response:
        return await answer(request, agents.go_on(id, body, caller_of(request)), body.stream)

    @router.post("/agents/runs/{id}/cancel", summary="End it", response_model=AgentRun, responses=responses(404, 409))
    async def cancel(id: str, request: Request) -> Response:
        return Response(_write(await agents.cancel(id, caller_of(request))), media_type="application/json")

    @router.get("/agents/tools", summary="Tools of the server that agents may call")
    async def tools(request: Request) -> AgentToolList:
        return await agents.tools(caller_of(request))

    @router.get("/conversations", summary="Your stored conversations, the last changed first, or a search")
    async def conversations(
        request: Request, query: str = Query("", max_length=1000), limit: int = Query(50, ge=1, le=1000)
    ) -> ConversationInfoList:
        return await agents.conversations(caller_of(request), query, limit)

    return router
