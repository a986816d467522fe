"""Agents on the server as `client.agents`: runs, what they wait for, their traces.

Typed functions among the `tools` are run here: the run waits for their results, and is gone on with by itself.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any
from urllib.parse import quote

from llmasos.client.http import AsyncHttp, Http, Target
from llmasos.client.providers.openai import event_json, parsed
from llmasos.client.sse import Event
from llmasos.client.tools import Tool, as_text, by_name, prepare
from llmasos.client.types.agents import (
    AgentCall,
    AgentEvent,
    AgentRun,
    AgentRunInfo,
    AgentRunList,
    AgentToolInfo,
    AgentToolList,
    ConversationInfo,
    ConversationInfoList,
)
from llmasos.errors import ProviderError

Input = str | Sequence[Mapping[str, Any]]
Toolish = str | Tool | Callable[..., Any] | Mapping[str, Any]
"""A name of the server's, a function of this program, or OpenAI's object of one."""
_RUNS = "/agents/runs"


class _Calls:
    target: Target

    def _run(self, data: Any) -> AgentRun:
        return parsed(AgentRun, data, self.target.label)

    def _event(self, event: Event) -> AgentEvent:
        data = event_json(event, self.target.label)
        if isinstance(data, dict) and isinstance(data.get("error"), dict) and "type" not in data:
            detail = data["error"]
            raise ProviderError(
                f"{self.target.label}: {detail.get('message', event.data)}", server_code=detail.get("code") or ""
            )
        return parsed(AgentEvent, data, self.target.label)


def _at(id: str, *more: str) -> str:
    return "/".join((_RUNS, quote(id, safe=""), *more))


def _body(input: Input, model: str, tools: Sequence[Toolish], fields: Mapping[str, Any]) -> dict[str, Any]:
    named = [_wire(one) for one in tools]
    given = input if isinstance(input, str) else [dict(one) for one in input]
    return {"model": model, "input": given, "tools": named, **{k: v for k, v in fields.items() if v is not None}}


def _wire(one: Toolish) -> Any:
    if isinstance(one, str):
        return one
    return dict(one) if isinstance(one, Mapping) else next(iter(by_name([one]).values())).definition


def _own(tools: Sequence[Toolish]) -> dict[str, Tool]:
    """The functions of this program."""
    return by_name([one for one in tools if not isinstance(one, str | Mapping)])


def _ours(run: AgentRun, tools: Mapping[str, Tool]) -> list[AgentCall]:
    """The calls that wait, if all of them are of this program's functions."""
    waiting = run.waiting() if run.state == "requires_action" else []
    return waiting if all(call.name in tools for call in waiting) else []


def _result(call: AgentCall, tools: Mapping[str, Tool]) -> dict[str, Any]:
    found, arguments = prepare(tools, call.name, call.arguments)
    if found is None:
        return {"result": arguments, "is_error": True}
    try:
        return {"result": as_text(found.run(**arguments))}
    except Exception as e:  # the model is told, and can do something else
        return {"result": f"Error: {call.name} failed: {type(e).__name__}: {e}", "is_error": True}


async def _aresult(call: AgentCall, tools: Mapping[str, Tool]) -> dict[str, Any]:
    found, arguments = prepare(tools, call.name, call.arguments)
    if found is None or not inspect.iscoroutinefunction(found.run):
        return await asyncio.to_thread(_result, call, tools)
    try:
        return {"result": as_text(await found.run(**arguments))}
    except Exception as e:
        return {"result": f"Error: {call.name} failed: {type(e).__name__}: {e}", "is_error": True}


def _decided(run: AgentRun, decisions: Mapping[str, Any] | bool) -> dict[str, Any]:
    """One word for all calls, or one each: True, False, "always", a reason against it, or the fields of a decision."""
    given = dict.fromkeys(run.pending, decisions) if isinstance(decisions, bool) else dict(decisions)
    return {id: _decision(one) for id, one in given.items()}


def _decision(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, str) and given != "always":
        return {"approve": False, "reason": given}
    return {"approve": given}


class Agents(_Calls):
    """Blocking. Errors are those of `Client`."""

    def __init__(self, http: Http) -> None:
        self._http, self.target = http, http.target

    def run(self, input: Input, *, model: str, tools: Sequence[Toolish] = (), **fields: Any) -> AgentRun:
        """The run, ended or waiting for an approval. `fields`: those of `AgentRunRequest`."""
        own = _own(tools)
        run = self._run(self._http.json("POST", _RUNS, _body(input, model, tools, fields)))
        while calls := _ours(run, own):
            run = self.go_on(run, {call.id: _result(call, own) for call in calls})
        return run

    def stream(
        self, input: Input, *, model: str, tools: Sequence[Toolish] = (), **fields: Any
    ) -> Generator[AgentEvent, None, None]:
        """What happens, as it happens; closing the iterator ends the run."""
        yield from self._events(_RUNS, {**_body(input, model, tools, fields), "stream": True})

    def go_on(self, run: AgentRun, decisions: Mapping[str, Any] | bool) -> AgentRun:
        """Go on with a run that waits: what becomes of its calls, by their ids, or one word for all."""
        body = {"decisions": _decided(run, decisions)}
        return self._run(self._http.json("POST", _at(run.id, "continue"), body))

    def stream_on(self, run: AgentRun, decisions: Mapping[str, Any] | bool) -> Generator[AgentEvent, None, None]:
        body = {"decisions": _decided(run, decisions), "stream": True}
        yield from self._events(_at(run.id, "continue"), body)

    def _events(self, path: str, body: dict[str, Any]) -> Generator[AgentEvent, None, None]:
        with closing(self._http.events("POST", path, body)) as events:
            for event in events:
                yield self._event(event)

    def runs(self, *, limit: int = 50) -> list[AgentRunInfo]:
        """The newest first."""
        return parsed(AgentRunList, self._http.json("GET", f"{_RUNS}?limit={limit}"), self.target.label).data

    def get(self, id: str) -> AgentRun:
        return self._run(self._http.json("GET", _at(id)))

    def cancel(self, id: str) -> AgentRun:
        return self._run(self._http.json("POST", _at(id, "cancel")))

    def delete(self, id: str) -> None:
        self._http.json("DELETE", _at(id))

    def tools(self) -> list[AgentToolInfo]:
        """What may be named in `tools`: as `source`."""
        return parsed(AgentToolList, self._http.json("GET", "/agents/tools"), self.target.label).data

    def conversations(self, query: str = "", *, limit: int = 50) -> list[ConversationInfo]:
        """Stored ones, the last changed first, or those that a search finds."""
        path = f"/conversations?query={quote(query, safe='')}&limit={limit}"
        return parsed(ConversationInfoList, self._http.json("GET", path), self.target.label).data


class AsyncAgents(_Calls):
    """The same for asyncio."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http, self.target = http, http.target

    async def run(self, input: Input, *, model: str, tools: Sequence[Toolish] = (), **fields: Any) -> AgentRun:
        own = _own(tools)
        run = self._run(await self._http.json("POST", _RUNS, _body(input, model, tools, fields)))
        while calls := _ours(run, own):
            results = await asyncio.gather(*(_aresult(call, own) for call in calls))
            run = await self.go_on(run, {call.id: one for call, one in zip(calls, results, strict=True)})
        return run

    async def stream(
        self, input: Input, *, model: str, tools: Sequence[Toolish] = (), **fields: Any
    ) -> AsyncGenerator[AgentEvent, None]:
        body = {**_body(input, model, tools, fields), "stream": True}
        async with aclosing(self._events(_RUNS, body)) as events:
            async for event in events:
                yield event

    async def go_on(self, run: AgentRun, decisions: Mapping[str, Any] | bool) -> AgentRun:
        body = {"decisions": _decided(run, decisions)}
        return self._run(await self._http.json("POST", _at(run.id, "continue"), body))

    async def stream_on(self, run: AgentRun, decisions: Mapping[str, Any] | bool) -> AsyncGenerator[AgentEvent, None]:
        body = {"decisions": _decided(run, decisions), "stream": True}
        async with aclosing(self._events(_at(run.id, "continue"), body)) as events:
            async for event in events:
                yield event

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[AgentEvent, None]:
        async with aclosing(self._http.events("POST", path, body)) as events:
            async for event in events:
                yield self._event(event)

    async def runs(self, *, limit: int = 50) -> list[AgentRunInfo]:
        return parsed(AgentRunList, await self._http.json("GET", f"{_RUNS}?limit={limit}"), self.target.label).data

    async def get(self, id: str) -> AgentRun:
        return self._run(await self._http.json("GET", _at(id)))

    async def cancel(self, id: str) -> AgentRun:
        return self._run(await self._http.json("POST", _at(id, "cancel")))

    async def delete(self, id: str) -> None:
        await self._http.json("DELETE", _at(id))

    async def tools(self) -> list[AgentToolInfo]:
        return parsed(AgentToolList, await self._http.json("GET", "/agents/tools"), self.target.label).data

    async def conversations(self, query: str = "", *, limit: int = 50) -> list[ConversationInfo]:
        path = f"/conversations?query={quote(query, safe='')}&limit={limit}"
        return parsed(ConversationInfoList, await self._http.json("GET", path), self.target.label).data
