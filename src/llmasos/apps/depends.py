"""Dependencies: what a function needs and no caller gives, as users of FastAPI know it.

    def database() -> Iterator[Connection]:
        with closing(connect(...)) as connection:
            yield connection                       # what follows runs after the call, a stream's end included

    @app.route("/notes")
    def notes(db: Annotated[Connection, Depends(database)], session: Session) -> list[str]: ...

`Depends` is FastAPI's own. A dependency is any callable: a function, a class, an object; its parameters are inputs of
the route, or dependencies themselves. One that is wanted twice in a call is made once (`use_cache=False`: twice).
`app.dependency_overrides[database] = other` puts another in its place, for tests. Parameters of the types `Session` and
`Request` are given, too.

A plain function and its dependencies run in one thread, so what belongs to a thread (connections of SQLite) may be used
throughout; those that are `async` run in the event loop meanwhile. For an `async` function, plain dependencies run in
threads, as in FastAPI.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import anyio
from fastapi import Depends as Depends
from fastapi.params import Depends as DependsMark
from starlette.requests import HTTPConnection, Request

from llmasos.apps.sessions import Session, SessionStore
from llmasos.client import leaving
from llmasos.errors import InvalidInputError, ServerError, UnsupportedError

Special = Literal["request", "session"]
_SPECIALS: dict[Any, Special] = {Request: "request", HTTPConnection: "request", Session: "session"}

ReadInput = Callable[[str, inspect.Parameter, Any], str]
"""(function's name, parameter, its hint) -> the input that it gets. Raises InvalidInputError for what can't be one."""


@dataclass(frozen=True)
class Node:
    """A function and where its parameters come from."""

    function: Callable[..., Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> name of an input."""
    needs: Mapping[str, tuple[Node, bool]] = field(default_factory=dict)
    """Parameter -> a dependency, and whether one per call is enough."""
    specials: Mapping[str, Special] = field(default_factory=dict)
    before: tuple[Node, ...] = ()
    """Dependencies whose values nobody takes."""

    def __hash__(self) -> int:
        return id(self)

    @property
    def is_plain(self) -> bool:
        """It takes inputs only."""
        return not (self.needs or self.specials or self.before)

    def uses(self, special: Special) -> bool:
        nodes = [*self.before, *(node for node, _ in self.needs.values())]
        return special in self.specials.values() or any(node.uses(special) for node in nodes)


@dataclass(frozen=True)
class Context:
    """What a call comes with beside its inputs."""

    sessions: SessionStore
    overrides: Mapping[Callable[..., Any], Callable[..., Any]]
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    session_id: str | None = None
    request: Request | None = None


def node_of(
    function: Callable[..., Any],
    read_input: ReadInput,
    *,
    before: Sequence[Any] = (),
    _above: tuple[Callable[..., Any], ...] = (),
) -> Node:
    """Read a function's parameters. Raises InvalidInputError that names the one at fault."""
    from llmasos.apps.routes import parameters_of, type_hints_of

    name = name_of(function)
    if function in _above:
        chain = " needs ".join(name_of(one) for one in (*_above, function))
        raise InvalidInputError(f"Dependencies go in a circle: {chain}.")
    types = type_hints_of(function, name)
    inputs: dict[str, str] = {}
    needs: dict[str, tuple[Node, bool]] = {}
    specials: dict[str, Special] = {}

    def inner(mark: Any, hint: Any = None) -> tuple[Node, bool]:
        wanted = mark.dependency if isinstance(mark, DependsMark) else None
        if wanted is None and inspect.isclass(hint) and hint is not inspect.Parameter.empty:
            wanted = hint
        if wanted is None or not callable(wanted):
            raise InvalidInputError(
                f"{name}(): {mark!r} is no dependency.", hint="Write Depends(function).", param="dependencies"
            )
        return node_of(wanted, read_input, _above=(*_above, function)), mark.use_cache

    for p in parameters_of(function, name):
        hint = types.get(p.name, p.annotation)
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if (mark := _mark(p, hint)) is not None:
            needs[p.name] = inner(mark, bare)
        elif inspect.isclass(bare) and (special := _SPECIALS.get(bare)):
            specials[p.name] = special
        else:
            inputs[p.name] = read_input(name, p, hint)
    return Node(function, inputs, needs, specials, tuple(inner(mark)[0] for mark in before))


def name_of(function: Callable[..., Any]) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def _mark(p: inspect.Parameter, hint: Any) -> DependsMark | None:
    if isinstance(p.default, DependsMark):
        return p.default
    metadata = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((one for one in metadata if isinstance(one, DependsMark)), None)


def bind(node: Node, values: Mapping[str, Any], context: Context) -> Callable[[], Any]:
    """The call of the node's function with these inputs, of the same kind as the function: plain, generator, coroutine
    or async generator. Its dependencies are made when it begins and cleaned up when it ends. Wants a running event
    loop."""
    function = node.function
    if node.is_plain:
        return functools.partial(function, **_given(node, values))
    solving = _Solving(values, context)
    kind = _kind(function)
    if kind == "async generator":
        return functools.partial(_async_items, node, solving)
    if kind == "coroutine":
        return functools.partial(_async_result, node, solving)
    return functools.partial(_items if kind == "generator" else _result, node, solving)


def _items(node: Node, solving: _Solving) -> Iterator[Any]:
    ended = False
    with ExitStack() as stack:
        yield from node.function(**solving.now(node, stack))
        ended = True
    _check_ended(ended, node)


def _result(node: Node, solving: _Solving) -> Any:
    ended = False
    with ExitStack() as stack:
        result = node.function(**solving.now(node, stack))
        if isinstance(result, Iterator):
            return _held(result, stack.pop_all())
        if isinstance(result, AsyncIterator):
            return _held_async(result, stack.pop_all(), solving.context)
        ended = True
    _check_ended(ended, node)
    return result


async def _async_items(node: Node, solving: _Solving) -> AsyncIterator[Any]:
    ended = False
    async with AsyncExitStack() as stack, aclosing(node.function(**await solving.soon(node, stack))) as items:
        async for item in items:
            yield item
        ended = True
    _check_ended(ended, node)


async def _async_result(node: Node, solving: _Solving) -> Any:
    ended = False
    async with AsyncExitStack() as stack:
        result = await node.function(**await solving.soon(node, stack))
        if isinstance(result, Iterator | AsyncIterator):
            raise UnsupportedError(
                f"{name_of(node.function)}() returns a stream that would outlive its dependencies.",
                hint="Make it a generator: yield the elements.",
            )
        ended = True
    _check_ended(ended, node)
    return result


def _check_ended(ended: bool, node: Node) -> None:
    if not ended:
        raise ServerError(f"A dependency of {name_of(node.function)}() has hidden its failure.")


def _held(items: Iterator[Any], stack: ExitStack) -> Iterator[Any]:
    with stack:
        yield from items


async def _held_async(items: AsyncIterator[Any], stack: ExitStack, context: Context) -> AsyncIterator[Any]:
    async with AsyncExitStack() as outer:
        outer.push_async_exit(_exit_in_thread(stack, context))
        async for item in items:
            yield item


def _given(node: Node, values: Mapping[str, Any]) -> dict[str, Any]:
    return {parameter: values[name] for parameter, name in node.inputs.items() if name in values}


def _kind(function: Callable[..., Any]) -> str:
    call = function if inspect.isroutine(function) or inspect.isclass(function) else getattr(function, "__call__", None)  # noqa: B004
    for one in (function, call):
        if inspect.isgeneratorfunction(one):
            return "generator"
        if inspect.isasyncgenfunction(one):
            return "async generator"
        if inspect.iscoroutinefunction(one):
            return "coroutine"
    return "plain"


class _Solving:
    """The dependencies of one call."""

    def __init__(self, values: Mapping[str, Any], context: Context) -> None:
        self.context = context
        self._values, self._loop = values, asyncio.get_running_loop()
        self._made: dict[Callable[..., Any], Any] = {}

    def now(self, node: Node, stack: ExitStack) -> dict[str, Any]:
        """Arguments of the node's function, in this thread."""

        async def make(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
            kind = _kind(function)
            if kind == "generator":
                return stack.enter_context(contextmanager(function)(**arguments))
            if kind == "async generator":
                manager = asynccontextmanager(function)(**arguments)
                value = self._in_loop(manager.__aenter__(), may_end=True)
                stack.push(lambda *raised: self._in_loop(manager.__aexit__(*raised)))
                return value
            return self._in_loop(function(**arguments), may_end=True) if kind == "coroutine" else function(**arguments)

        found: dict[str, Any] = _driven(self._arguments(node, make))
        return found

    async def soon(self, node: Node, stack: AsyncExitStack) -> dict[str, Any]:
        """The same in the event loop; plain functions run in threads."""

        async def make(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
            kind = _kind(function)
            if kind == "async generator":
                return await stack.enter_async_context(asynccontextmanager(function)(**arguments))
            if kind == "coroutine":
                return await function(**arguments)
            if kind == "plain":
                return await self.context.in_thread(functools.partial(function, **arguments))
            manager = contextmanager(function)(**arguments)
            entering = asyncio.ensure_future(self.context.in_thread(manager.__enter__))
            try:
                value = await asyncio.shield(entering)
            except asyncio.CancelledError:  # the thread goes on, and what it makes has to be cleaned up
                await asyncio.wait([entering])
                if not entering.cancelled() and entering.exception() is None:
                    stack.push_async_exit(_exit_in_thread(manager, self.context))
                raise
            stack.push_async_exit(_exit_in_thread(manager, self.context))
            return value

        return await self._arguments(node, make)

    async def _arguments(self, node: Node, make: Callable[..., Awaitable[Any]]) -> dict[str, Any]:
        for one in node.before:
            await self._value(one, True, make)
        found = _given(node, self._values)
        for parameter, special in node.specials.items():
            found[parameter] = await self._special(special, node, make)
        for parameter, (inner, use_cache) in node.needs.items():
            found[parameter] = await self._value(inner, use_cache, make)
        return found

    async def _value(self, node: Node, use_cache: bool, make: Callable[..., Awaitable[Any]]) -> Any:
        if use_cache and node.function in self._made:
            return self._made[node.function]
        other = self.context.overrides.get(node.function)
        used = node if other is None else node_of(other, self._known_input)
        value = await make(used.function, await self._arguments(used, make))
        self._made[node.function] = value
        return value

    def _known_input(self, function: str, p: inspect.Parameter, hint: Any) -> str:
        """An override gets inputs that the route has anyway."""
        if p.name not in self._values and p.default is p.empty:
            raise InvalidInputError(f"{function}() overrides a dependency and wants {p.name!r}, no input of the call.")
        return p.name

    async def _special(self, special: Special, node: Node, make: Callable[..., Awaitable[Any]]) -> Any:
        context = self.context
        if special == "request":
            if context.request is None:
                raise UnsupportedError(f"{name_of(node.function)}() wants an HTTP request, which this call is not.")
            return context.request
        if Session not in self._made:
            self._made[Session] = await make(context.sessions.turn, {"id": context.session_id})
        return self._made[Session]

    def _in_loop(self, call: Coroutine[Any, Any, Any], *, may_end: bool = False) -> Any:
        """`may_end`: it is cancelled when the client leaves (CallCancelledError). What it has made by then is given, so
        that it can be cleaned up."""
        if not may_end or (token := leaving.current()) is None:
            return asyncio.run_coroutine_threadsafe(call, self._loop).result()
        work: asyncio.Task[Any] | None = None

        async def begin() -> Any:
            nonlocal work
            if token.is_cancelled:
                call.close()
                raise asyncio.CancelledError
            work = asyncio.current_task()
            return await call

        def end() -> None:
            if work is not None:
                work.cancel()

        future = asyncio.run_coroutine_threadsafe(begin(), self._loop)
        try:
            with token.calling(functools.partial(self._loop.call_soon_threadsafe, end)):
                return future.result()
        except concurrent.futures.CancelledError:
            raise leaving.CallCancelledError from None


def _driven(call: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        call.send(None)
    except StopIteration as e:
        return e.value
    raise AssertionError("it waits")


def _exit_in_thread(manager: Any, context: Context) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def leave(*raised: Any) -> Any:
        with anyio.CancelScope(shield=True):  # cleaning up goes on when the client has left
            return await context.in_thread(functools.partial(manager.__exit__, *raised))

    return leave
