"""Responses being made: whole, streamed, or in the background, where they outlive their request and the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from sqlalchemy.orm import Session

from llmasos.client.types import ChatCompletionRequest
from llmasos.client.types.response_events import ResponseStateEvent
from llmasos.client.types.response_items import InputItem, ItemReference
from llmasos.client.types.responses import ConversationReference, InputRequest, Response, ResponseError, ResponseRequest
from llmasos.errors import InvalidInputError, LLMasOSError
from llmasos.serve.aside import Aside
from llmasos.serve.caller import Caller
from llmasos.serve.conversation import chat_prompt_ids
from llmasos.serve.models import Models
from llmasos.serve.problems import problem_of, unexpected
from llmasos.serve.responses import store
from llmasos.serve.responses.events import Writer, sse
from llmasos.serve.responses.request import (
    INCLUDE_LOGPROBS,
    INCLUDE_REASONING,
    chat_request,
    check,
    new_id,
    own_items,
    stored,
    summary_asked,
    translated,
)
from llmasos.serve.served import ServedTokenizer
from llmasos.serve.storage import Storage
from llmasos.serve.turn import TurnDelta, TurnEnd, TurnEvent, TurnStart, TurnUsage, turn
from llmasos.store.database import utc_now

log = logging.getLogger("llmasos.serve")

KEPT_DAYS = 30
"""How long a stored response is kept (OpenAI's)."""
BACKGROUND = 64
"""Background responses that are worked on at once; more wait."""
MAX_RETRIES = 5
_Body = TypeVar("_Body", bound=InputRequest)
_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


@dataclass
class Plan:
    """A request that was checked: what is asked of the model, and what will be kept."""

    body: ResponseRequest
    chat: ChatCompletionRequest
    own: list[dict[str, Any]]
    response: Response


@dataclass
class Run:
    """A background response while this server works on it, and what its readers have to be told. `accepted`: as it was
    at first, for an answer that is written in a thread while `plan.response` goes on changing."""

    plan: Plan
    caller: Caller
    events: list[str] = field(default_factory=list)
    over: bool = False
    task: asyncio.Task[None] | None = None
    accepted: Response = field(init=False)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.accepted = self.plan.response.model_copy(deep=True)

    def tell(self, event: BaseModel) -> None:
        if self.plan.body.stream:
            self.events.append(sse(event))
            self._wake()

    def end(self, last: BaseModel | None = None) -> None:
        if last is not None:
            self.tell(last)
        self.over = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, after: int) -> AsyncGenerator[str, None]:
        """The events whose number is above `after`, those to come as they come."""
        position = after + 1
        while True:
            news = self._news
            while position < len(self.events):
                yield self.events[position]
                position += 1
            if self.over:
                return
            await news.wait()


class Responses:
    """`take_up` goes on with what servers before this one left unfinished; `stop` leaves the same to the next."""

    def __init__(self, models: Models, storage: Storage, aside: Aside | None = None) -> None:
        self.models, self.storage = models, storage
        self._aside = aside or Aside()
        self._runs: dict[str, Run] = {}
        self._slots = asyncio.Semaphore(BACKGROUND)
        self._stopping = False

    async def start(self) -> None:
        self._stopping = False

    async def take_up(self) -> None:
        """Go on with what servers of this place that have ended left unfinished."""
        place = self.storage.place
        at_work = await self.storage.run(lambda session: store.servers_at_work(session, place), read_only=True)
        # in this order: who was at work before and is not alive now has ended
        ended = at_work - await asyncio.to_thread(self.storage.living)
        if not ended:
            return
        server = self.storage.server
        for id, key_id, request in await self.storage.run(lambda s: store.take_up(s, place, server, ended)):
            try:
                caller = await self._aside.caller(key_id)
                body = ResponseRequest.model_validate(request)
                plan = await self.plan(caller, body, id=id)
            except (LLMasOSError, ValidationError) as e:  # the latter: another version took the request
                await self.storage.run(partial(_give_up, id=id, key_id=key_id, reason=_reason(e, id)))
            else:
                plan.response.status = "queued"
                self._begin(Run(plan, caller))

    async def stop(self) -> None:
        self._stopping = True
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def clean(self) -> None:
        """Forget what is older than KEPT_DAYS."""
        oldest = utc_now() - timedelta(days=KEPT_DAYS)
        while await self.storage.run(lambda session: store.remove_before(session, oldest)):
            pass

    # requests

    async def plan(self, caller: Caller, body: ResponseRequest, *, id: str | None = None) -> Plan:
        """Raises what is wrong with the request, before anything is asked of a model."""
        check(body)
        before, body = await self._before(caller, body), await self._complete(caller, body)
        chat = chat_request(body, before)
        own = list(stored(own_items(body)))
        return Plan(body, chat, own, _empty(body, id or new_id("resp")))

    async def _before(self, caller: Caller, body: InputRequest) -> list[InputItem]:
        if body.previous_response_id is not None:
            previous = body.previous_response_id
            found = await self.storage.run(lambda s: store.context(s, previous, caller.key_id), read_only=True)
        elif body.conversation is not None:
            id = conversation_id(body)
            assert id is not None
            found = await self.storage.run(lambda s: store.conversation_items(s, id, caller.key_id), read_only=True)
        else:
            return []
        return _ITEMS.validate_python(found)

    async def _complete(self, caller: Caller, body: _Body) -> _Body:
        """With the items themselves in the places of references to them."""
        if isinstance(body.input, str):
            return body
        items = [await self._resolved(caller, item, i) for i, item in enumerate(body.input)]
        return body.model_copy(update={"input": items})

    async def _resolved(self, caller: Caller, item: InputItem, index: int) -> InputItem:
        if not isinstance(item, ItemReference):
            return item
        found = await self.storage.run(lambda s: store.item_by_id(s, item.id, caller.key_id), read_only=True)
        if found is None:
            raise InvalidInputError(
                f"There is no item {item.id!r}.", hint="Items of stored responses have ids.", param=f"input.{index}.id"
            )
        return _ITEMS.validate_python([found])[0]

    async def count(self, caller: Caller, body: InputRequest) -> int:
        """Tokens of the prompt that the request would make."""
        before, body = await self._before(caller, body), await self._complete(caller, body)
        async with self.models.lease(body.model, caller) as served:
            return len(await asyncio.to_thread(chat_prompt_ids, served.model, chat_request(body, before)))

    async def answer(self, caller: Caller, body: ResponseRequest) -> Response:
        """The whole response; its errors are raised, and then nothing is kept."""
        if body.background:
            return (await self._submit(caller, body)).accepted
        plan = await self.plan(caller, body)
        async with aclosing(self._work(caller, plan, _writer(plan, count()))) as events:
            async for _ in events:
                pass
        await self._keep(caller, plan)
        return plan.response

    async def stream(self, caller: Caller, body: ResponseRequest, numbers: Iterator[int]) -> AsyncGenerator[str, None]:
        """The same as events. What fails after the first one makes a failed response, which is kept."""
        if body.background:
            run = await self._submit(caller, body)
            async with aclosing(run.follow(-1)) as texts:
                async for text in texts:
                    yield text
            return
        plan = await self.plan(caller, body)
        writer = _writer(plan, numbers)
        last: BaseModel | None = None
        begun = False
        try:
            async with aclosing(self._work(caller, plan, writer)) as events:
                async for event in events:
                    if is_last(event):
                        last = event
                    else:
                        begun = True
                        yield sse(event)
        except Exception as e:
            if not begun:
                raise
            *before, last = writer.failed(*_reason(e, plan.response.id))
            for event in before:
                yield sse(event)
        await self._keep(caller, plan)  # whoever reads the last event can go on from it
        assert last is not None
        yield sse(last)

    async def _work(self, caller: Caller, plan: Plan, writer: Writer) -> AsyncGenerator[BaseModel, None]:
        """Every event of the response; the first comes when its prompt is tokens and nothing is wrong with it."""
        try:
            async with (
                self.models.lease(plan.body.model, caller) as served,
                aclosing(turn(served, plan.chat)) as events,
            ):
                async for event in events:
                    for one in _made(writer, event, served.model.tokenizer):
                        yield one
        except LLMasOSError as e:
            raise translated(e) from e

    async def _keep(self, caller: Caller, plan: Plan) -> None:
        if plan.response.store:
            await self.storage.run(lambda session: store.save(session, plan.response, caller.key_id, plan.own))

    # stored ones

    async def get(self, caller: Caller, id: str) -> Response:
        """Raises ResponseNotFoundError."""
        if run := self._run(caller, id):
            return run.plan.response
        return await self.storage.run(lambda session: store.load(session, id, caller.key_id), read_only=True)

    async def replay(self, caller: Caller, id: str, after: int) -> AsyncGenerator[str, None]:
        """The events after number `after` of a background response that was asked for with stream: true."""
        run = self._run(caller, id)
        if run is None:
            events = await self.storage.run(lambda s: store.stored_events(s, id, caller.key_id), read_only=True)
        else:
            events = run.events or None
        if events is None:
            raise InvalidInputError(
                f"The response {id!r} has no events.",
                hint="Those of background responses made with stream: true are kept.",
                param="stream",
            )
        if run is None:
            for text in events[after + 1 :]:
                yield text
            return
        async with aclosing(run.follow(after)) as texts:
            async for text in texts:
                yield text

    async def cancel(self, caller: Caller, id: str) -> Response:
        """End a background response; one that is over stays as it is."""
        if (run := self._run(caller, id)) and run.task is not None:
            run.task.cancel()
            await asyncio.wait([run.task])
        response = await self.get(caller, id)
        if not response.background:
            raise InvalidInputError(
                f"The response {id!r} was not made in the background.",
                hint="Close the connection to end one that is being made.",
                param="response_id",
            )
        if response.status in ("queued", "in_progress"):  # another server's: what it makes is not written any more
            response.status = "cancelled"
            await self.storage.run(lambda session: store.save(session, response, caller.key_id, None))
            response = await self.get(caller, id)
        return response

    async def delete(self, caller: Caller, id: str) -> None:
        if (run := self._run(caller, id)) and run.task is not None:
            run.task.cancel()
            await asyncio.wait([run.task])
        await self.storage.run(lambda session: store.remove(session, id, caller.key_id))

    def _run(self, caller: Caller, id: str) -> Run | None:
        run = self._runs.get(id)
        return run if run is not None and run.caller.key_id == caller.key_id else None

    # the background

    async def _submit(self, caller: Caller, body: ResponseRequest) -> Run:
        plan = await self.plan(caller, body)
        await self.models.look(body.model)
        self.models.check(body.model, caller)  # refused now rather than found out by polling
        plan.response.status = "queued"
        request = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
        run = Run(plan, caller)

        worker = self.storage.place, self.storage.server

        async def accept() -> None:
            await self.storage.run(
                lambda s: store.save(s, plan.response, caller.key_id, plan.own, request=request, worker=worker)
            )
            self._begin(run)

        await asyncio.shield(accept())  # who asked may go away: what is stored is worked on
        return run

    def _begin(self, run: Run) -> None:
        self._runs[run.plan.response.id] = run
        # a context of its own: what is noted of the request that asked for it ends with that request
        run.task = asyncio.create_task(self._background(run), context=Context())

    async def _background(self, run: Run) -> None:
        response = run.plan.response
        writer = _writer(run.plan, count())
        for event in writer.queued():
            run.tell(event)
        last: BaseModel | None
        try:
            async with self._slots:
                last = await self._with_patience(run, writer)
        except asyncio.CancelledError:
            if self._stopping:  # what is unfinished in the database is taken up by the next server
                run.end()
                self._runs.pop(response.id, None)
                return
            last = None
            for event in writer.cancelled():
                run.tell(event)
        except Exception as e:
            *before, last = writer.failed(*_reason(e, response.id))
            for event in before:
                run.tell(event)
        try:
            events = [*run.events, *([sse(last)] if last else [])] if run.plan.body.stream else None
            key_id = run.caller.key_id
            await asyncio.shield(
                self.storage.run(lambda session: store.save(session, response, key_id, None, events=events))
            )
        except LLMasOSError:
            log.exception("the response %s could not be stored", response.id)
        finally:
            run.end(last)
            self._runs.pop(response.id, None)

    async def _with_patience(self, run: Run, writer: Writer) -> BaseModel | None:
        """The run's last event. A server that is busy is asked again: nobody waits on the line."""
        for attempt in count():
            last = None
            try:
                noted = self._aside.request(run.caller, "/v1/responses", run.plan.response.id)
                async with noted, aclosing(self._work(run.caller, run.plan, writer)) as events:
                    async for event in events:
                        if is_last(event):
                            last = event
                        else:
                            run.tell(event)
                return last
            except LLMasOSError as e:
                pause = getattr(e, "retry_after", None)
                if pause is None or attempt == MAX_RETRIES or run.plan.response.status != "queued":
                    raise
                await asyncio.sleep(min(60.0, pause * 2.0**attempt))
        raise AssertionError("unreachable")


def is_last(event: BaseModel) -> bool:
    return isinstance(event, ResponseStateEvent) and event.response.status not in ("queued", "in_progress")


def _made(writer: Writer, event: TurnEvent, tokenizer: ServedTokenizer) -> Iterator[BaseModel]:
    match event:
        case TurnStart():
            return writer.started()
        case TurnDelta():
            return writer.add(event, tokenizer)
        case TurnEnd():
            return writer.end(event)
        case TurnUsage():
            return writer.finished(event)


def _writer(plan: Plan, numbers: Iterator[int]) -> Writer:
    include = plan.body.include or ()
    as_summary = summary_asked(plan.body) is not None
    return Writer(plan.response, numbers, as_summary=as_summary, with_sealed=INCLUDE_REASONING in include)


def conversation_id(body: InputRequest) -> str | None:
    return body.conversation.id if isinstance(body.conversation, ConversationReference) else body.conversation


def _give_up(session: Session, *, id: str, key_id: str | None, reason: tuple[str, str]) -> None:
    """A response that can't be taken up again, because what it goes on from or its key is gone."""
    response = store.load(session, id, key_id)
    response.status, response.error = "failed", ResponseError(code=reason[0], message=reason[1])
    store.save(session, response, key_id, None)


def _reason(e: Exception, id: str) -> tuple[str, str]:
    """Code and message of a failed response; the codes are those that OpenAI has for it."""
    problem = problem_of(e) if isinstance(e, LLMasOSError) else unexpected(id)
    status: int = problem["status"]
    code = "rate_limit_exceeded" if status == 429 else "server_error" if status >= 500 else "invalid_prompt"
    return code, problem["message"]


def _empty(body: ResponseRequest, id: str) -> Response:
    """The response before it has any output: what was asked for, repeated."""
    asked = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    same = ("max_output_tokens", "max_tool_calls", "prompt_cache_key", "safety_identifier", "temperature", "top_p")
    logprobs = body.top_logprobs or 0 if INCLUDE_LOGPROBS in (body.include or ()) else None
    form = asked.get("text", {}).get("format") or {"type": "text"}
    if form["type"] == "json_schema":
        form = {"name": "", "strict": None, "description": None} | form
    tools = [{"parameters": None, "strict": None, "description": None} | tool for tool in asked.get("tools", ())]
    conversation = conversation_id(body)
    return Response(
        id=id,
        created_at=int(time.time()),
        status="in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        conversation={"id": conversation} if conversation else None,
        reasoning={"effort": None, "summary": None} | asked.get("reasoning", {}),
        service_tier="default",
        store=body.store is not False,
        text={"format": form},
        tool_choice=asked.get("tool_choice", "auto"),
        tools=tools,
        top_logprobs=logprobs,
        metadata=body.metadata or {},
        user=body.user,
        **{name: asked.get(name) for name in same},  # type: ignore[arg-type]  # fields of the same types
    )
