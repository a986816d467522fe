"""`Agent`: a model with tools that it may call until it has an answer."""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, Literal

from pydantic import BaseModel

from llmasos.apps.agent.forms import Form
from llmasos.apps.agent.loop import Approve, Emit, Loop, check_decisions
from llmasos.apps.agent.mcp_tools import McpServer
from llmasos.apps.agent.models import ChatModel, chat_model, text_of
from llmasos.apps.agent.traces import open_traces
from llmasos.apps.memory import Memory
from llmasos.client.tools import Tool, by_name
from llmasos.client.types.agents import AgentDecision, AgentEvent, AgentLimits, AgentRun, AgentToolInfo, ContextMode
from llmasos.errors import InvalidInputError
from llmasos.store.database import utc_now
from llmasos.tasks.model import run_sync

Toolish = Tool | McpServer | Callable[..., Any]
Input = str | Sequence[Mapping[str, Any]]
Decision = bool | str | Mapping[str, Any] | AgentDecision
"""True, False, "always", another text (no, and why), or the fields of an AgentDecision."""
ROLES = ("system", "developer", "user", "assistant", "tool")
DEFAULT_MODEL = "smollm2-135m-instruct"


class Agent:
    """A model with tools. Any number of runs may go on at once; each is an `AgentRun`.

    `model`: an LLM, a name of one, `provider:model`. `tools`: typed functions, `Tool`s, `McpServer`s. `approve` is
    asked before a call that needs approval; without it the run pauses (`requires_action`) until `resume`. `output`: a
    pydantic model or a JSON Schema of the answer. `context`: what becomes of messages that no longer fit. `tool_choice`
    "required": the first answer must call a tool; without `parallel_calls` an answer calls one at most. `memory`: where
    `conversation`s are kept. `trusted`: names of tools whose calls need no approval. `keep`: whether runs are kept in
    the home's database (`llmasos agent show`). `options`: sampling, as SamplingParams names it.
    """

    def __init__(
        self,
        model: Any = DEFAULT_MODEL,
        *,
        tools: Sequence[Toolish] = (),
        system: str | None = None,
        name: str = "agent",
        limits: AgentLimits | None = None,
        approve: Approve | None = None,
        output: type[BaseModel] | Mapping[str, Any] | None = None,
        context: ContextMode = "drop",
        tool_choice: Literal["auto", "required"] = "auto",
        parallel_calls: bool = True,
        memory: Memory | None = None,
        trusted: Sequence[str] = (),
        keep: bool = True,
        **options: Any,
    ) -> None:
        self.name, self.system, self.limits = name, system, limits or AgentLimits()
        self.approve, self.context, self.memory, self.keep = approve, context, memory, keep
        self.trusted = tuple(trusted)
        self.form = None if output is None else Form(output)
        self.tool_choice, self.parallel_calls = tool_choice, parallel_calls
        self.options = {name: value for name, value in options.items() if value is not None}
        self._given = model
        self._servers = [one for one in tools if isinstance(one, McpServer)]
        self._tools = by_name([one for one in tools if not isinstance(one, McpServer)])

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, tools=[{', '.join([*self._tools, *(one.name for one in self._servers)])}])"

    # a run from its beginning

    def run(self, input: Input, *, conversation: str | None = None) -> AgentRun:
        """The run, ended or paused. `input`: a question, or messages that end with one; `conversation`: an id of the
        memory's, whose messages come first and where the new ones are kept. Raises what the model raises."""
        return run_sync(self.arun(input, conversation=conversation))

    def stream(self, input: Input, *, conversation: str | None = None) -> Generator[AgentEvent, None, None]:
        """What happens, as it happens; the last event has the run. Closing the generator cancels the run."""
        return _from_thread(lambda: self.astream(input, conversation=conversation))

    async def arun(self, input: Input, *, conversation: str | None = None) -> AgentRun:
        return await _last(self.astream(input, conversation=conversation))

    async def astream(self, input: Input, *, conversation: str | None = None) -> AsyncGenerator[AgentEvent, None]:
        model = await self._model()
        run = self._begin(model, conversation, *await self._messages(input, conversation))
        async with aclosing(self._events(run, model, None)) as events:
            async for event in events:
                yield event

    # a run that waits

    def resume(self, run: AgentRun, decisions: Mapping[str, Decision] | Decision) -> AgentRun:
        """Go on with a run that waits (`requires_action`): decisions by the id of the call, or one for all of them."""
        return run_sync(self.aresume(run, decisions))

    def stream_resume(
        self, run: AgentRun, decisions: Mapping[str, Decision] | Decision
    ) -> Generator[AgentEvent, None, None]:
        return _from_thread(lambda: self.astream_resume(run, decisions))

    async def aresume(self, run: AgentRun, decisions: Mapping[str, Decision] | Decision) -> AgentRun:
        return await _last(self.astream_resume(run, decisions))

    async def astream_resume(
        self, run: AgentRun, decisions: Mapping[str, Decision] | Decision
    ) -> AsyncGenerator[AgentEvent, None]:
        if run.state != "requires_action":
            raise InvalidInputError(f"The run {run.id} is {run.state}; it waits for nothing.", param="run")
        made = decisions_of(run, decisions)
        check_decisions(run, made)
        async with aclosing(self._events(run, await self._model(), made)) as events:
            async for event in events:
                yield event

    # how it is done

    async def _model(self) -> ChatModel:
        if isinstance(self._given, str):
            return await asyncio.to_thread(chat_model, self._given)
        return chat_model(self._given)

    async def _messages(self, input: Input, conversation: str | None) -> tuple[list[dict[str, Any]], int]:
        """All messages, and how many of them the memory has already."""
        given = [{"role": "user", "content": input}] if isinstance(input, str) else [dict(one) for one in input]
        if not given or any(one.get("role") not in ROLES for one in given):
            raise InvalidInputError("The input is a text, or messages with roles.", param="input")
        for one in given:
            text_of(one.get("content"))
        before: list[dict[str, Any]] = []
        if conversation is not None:
            before = list(await asyncio.to_thread(self._memory().messages, conversation))
        if self.system is not None:
            given = [one for one in given if one["role"] not in ("system", "developer")]
            before = [one for one in before if one["role"] not in ("system", "developer")]
            before.insert(0, {"role": "system", "content": self.system})
        return before + given, len(before)

    def _memory(self) -> Memory:
        if self.memory is None:
            raise InvalidInputError(
                "A conversation was named, and the agent has no memory.", hint="Agent(memory=Memory.open())"
            )
        return self.memory

    def _begin(
        self, model: ChatModel, conversation: str | None, messages: list[dict[str, Any]], num_kept: int
    ) -> AgentRun:
        now = utc_now()
        return AgentRun(
            id=f"run_{secrets.token_hex(12)}",
            agent=self.name,
            model=model.name,
            created=now,
            updated=now,
            messages=messages,
            num_given=len(messages),
            limits=self.limits,
            form=None if self.form is None else self.form.schema,
            options=self.options,
            trusted=list(self.trusted),
            context=self.context,
            parallel_calls=self.parallel_calls,
            conversation=conversation,
            num_kept=num_kept,
        )

    async def _events(
        self,
        run: AgentRun,
        model: ChatModel,
        decisions: Mapping[str, AgentDecision] | None,
    ) -> AsyncGenerator[AgentEvent, None]:
        """The run goes on in a task of its own: its limits end it and nothing else."""
        told: asyncio.Queue[AgentEvent | None] = asyncio.Queue()
        work = asyncio.ensure_future(self._work(run, model, decisions, told.put_nowait))
        work.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (event := await told.get()) is not None:
                if event.type == "run.done":
                    await self._store(run)
                yield event
            await work
        finally:
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                await self._store(run)

    async def _work(
        self, run: AgentRun, model: ChatModel, decisions: Mapping[str, AgentDecision] | None, emit: Emit
    ) -> None:
        async with AsyncExitStack() as stack:
            tools = list(self._tools.values())
            for server in self._servers:
                connection = await stack.enter_async_context(server.connect())
                tools += connection.tools
                for notice in connection.notices:
                    run.notices.append(notice)
                    emit(AgentEvent(type="notice", text=notice))
            named = by_name(tools)
            run.tools = [described(one) for one in named.values()]
            loop = Loop(
                run,
                model,
                named,
                emit=emit,
                approve=self.approve,
                form=self.form,
                required=self.tool_choice == "required",
            )
            await loop.go(decisions)

    async def _store(self, run: AgentRun) -> None:
        """A conversation gets whole turns only: nothing as long as a call waits."""
        if run.conversation is not None and run.state != "requires_action":
            added = run.messages[run.num_kept :]
            await asyncio.shield(asyncio.to_thread(self._memory().add, run.conversation, added))
            run.num_kept = len(run.messages)
        await asyncio.shield(self._keep(run))

    async def _keep(self, run: AgentRun) -> None:
        def write() -> None:
            with open_traces() as traces:
                traces.save(run)

        if self.keep:
            await asyncio.to_thread(write)


def described(tool: Tool) -> AgentToolInfo:
    names = ("name", "description", "read_only", "destructive", "source")
    return AgentToolInfo(parameters=dict(tool.parameters), **{name: getattr(tool, name) for name in names})


def decisions_of(run: AgentRun, given: Mapping[str, Decision] | Decision) -> dict[str, AgentDecision]:
    by_id = given if isinstance(given, Mapping) and not _is_decision(given) else dict.fromkeys(run.pending, given)
    return {id: _decision(one) for id, one in by_id.items()}


def _is_decision(given: Mapping[str, Any]) -> bool:
    return bool(given) and given.keys() <= AgentDecision.model_fields.keys()


def _decision(given: Any) -> AgentDecision:
    if isinstance(given, AgentDecision):
        return given
    if isinstance(given, Mapping):
        return AgentDecision.model_validate(dict(given))
    if given == "always":
        return AgentDecision(approve="always")
    if isinstance(given, str):
        return AgentDecision(approve=False, reason=given)
    return AgentDecision(approve=bool(given))


async def _last(events: AsyncGenerator[AgentEvent, None]) -> AgentRun:
    run: AgentRun | None = None
    async with aclosing(events):
        async for event in events:
            run = event.run or run
    assert run is not None
    return run


def _from_thread(events: Callable[[], AsyncGenerator[AgentEvent, None]]) -> Generator[AgentEvent, None, None]:
    """An asynchronous generator for ordinary code: it runs in a thread with an event loop of its own."""
    told: queue.Queue[AgentEvent | BaseException | None] = queue.Queue()
    loop = asyncio.new_event_loop()
    reading: list[asyncio.Task[None]] = []

    async def read() -> None:
        async with aclosing(events()) as found:
            async for event in found:
                told.put(event)

    def work() -> None:
        asyncio.set_event_loop(loop)
        reading.append(loop.create_task(read()))
        try:
            loop.run_until_complete(reading[0])
        except BaseException as e:
            told.put(e)
        finally:
            told.put(None)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=work, name="llmasos-agent", daemon=True)
    thread.start()
    try:
        while (one := told.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one
    finally:
        if thread.is_alive() and reading:
            with suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(reading[0].cancel)
        thread.join()
