"""Application: a model and Python functions, served.

    app = Application(model)

    @app.route("/ask")
    def ask(question: str, words: Annotated[int, Field(ge=1, le=500)] = 50) -> str:
        "Answer a question."
        return model.generate_text(question, max_tokens=words)

    app.run()

    curl 'http://127.0.0.1:8000/ask?question=Why'
    curl http://127.0.0.1:8000/ask -H 'Content-Type: application/json' -d '{"question": "Why", "words": 20}'

Methods: by default a route answers GET (inputs in the query string) and POST (inputs in a JSON body); one with nested
inputs answers POST only. Any web page that the user visits can cause a GET, so give a function that changes something
`methods=["POST"]`: browsers don't send JSON to another site unless it agrees.

Results: the body is the bare JSON of the return value, checked against the return annotation; a generator is sent as
server-sent events (see streams.py). Errors are RFC 9457 documents (see problems.py).

What it does not do: keys, quotas, TLS. `app` is an ASGI application, so any server or framework can hold it; when it is
mounted in another one, hooks run only if that one is told: `FastAPI(lifespan=app.lifespan)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import re
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
import pydantic_core
from fastapi import FastAPI, Request
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as AsgiRoute
from starlette.types import Receive, Scope, Send

from llmasos.apps import chat, clients, files, jobs, llm, mcp, page, problems, requests, sessions, streams
from llmasos.apps.depends import Context, Node, bind, name_of
from llmasos.apps.document import document
from llmasos.apps.llm import Requirement
from llmasos.apps.openapi import openapi
from llmasos.apps.place import Config, Place
from llmasos.apps.routes import Hints, Output, Route, describe
from llmasos.apps.schedule import PATH as SCHEDULES
from llmasos.apps.schedule import Schedule, describe_schedule
from llmasos.client import leaving
from llmasos.errors import InvalidInputError, NotFoundError, ServerError, UnsupportedError

if TYPE_CHECKING:
    from starlette.testclient import TestClient

Function = TypeVar("Function", bound=Callable[..., Any])

_NUM_THREADS = 64
"""Functions and streams that run at once; more wait. Models order their own work, so this bounds only the waiting."""
_RESERVED = ("/healthz", "/docs", "/openapi.json", "/app.json", "/mcp", "/jobs", "/jobs/{}", "/jobs/{}/events")


class _Left(Response):
    """For a client that has left, so nobody reads it; the status is nginx's."""


class Application:
    """Functions over HTTP. An ASGI application: `uvicorn module:app` serves it, FastAPI and Starlette can mount it.

    `model` is any object that the functions use, or a name that `model_zoo.get_model` knows: it is loaded when
    `app.model` is first read. `llm` instead says what a model must have (`Requirement`), or names one: who runs the
    application decides which it gets (see `llm.py`).
    """

    def __init__(
        self,
        model: Any = None,
        *,
        llm: str | Requirement | None = None,
        title: str | None = None,
        version: str = "0.1.0",
    ) -> None:
        if model is not None and llm is not None:
            raise InvalidInputError("An application has one model: give model or llm.", param="llm")
        self.title = title or "LLMasOS application"
        self.start_error: BaseException | None = None
        """Why the last start failed, if it did."""
        self.num_running = 0
        """Functions and streams in worker threads now."""
        self._model, self._model_lock = llm if model is None else model, threading.RLock()
        self.models: dict[str, Any] = {}
        """Those of `[models]` of the manifest that were asked for (`get_llm`), by name; a test puts its own there."""
        self._place = Place(sys._getframe(1).f_globals.get("__file__"), title)
        self._chat: chat.Chat | None = None
        self._created = int(time.time())
        self._schedules: list[Schedule] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self.sessions = sessions.SessionStore(lambda: self.data)
        """State of clients between their calls; `app.sessions.lifetime` in seconds."""
        self.dependency_overrides: dict[Callable[..., Any], Callable[..., Any]] = {}
        """What `Depends` names -> what is used instead, in tests."""
        self._routes: list[Route] = []
        self._on_start: list[Callable[[], Any]] = []
        self._on_stop: list[Callable[[], Any]] = []
        self._started = False
        self._count_lock = threading.Lock()
        self._limiter = anyio.CapacityLimiter(_NUM_THREADS)
        self.asgi = FastAPI(title=self.title, version=version, docs_url=None, redoc_url=None, lifespan=self.lifespan)
        """The FastAPI application below, for middleware and routes of its own kind."""
        self.asgi.openapi = self.openapi  # type: ignore[method-assign]  # FastAPI's own way
        self.asgi.add_exception_handler(HTTPException, self._http_error)
        own = (("/", self._index), ("/healthz", self._health), ("/docs", self._docs), ("/app.json", self._document))
        for path, endpoint in own:
            self.asgi.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False)
        self._jobs = jobs.Jobs()
        self.asgi.include_router(jobs.create_router(self._jobs))
        self._tools = mcp.HttpTools()
        self.asgi.router.routes.append(AsgiRoute(mcp.PATH, endpoint=self._tools, include_in_schema=False))
        self.asgi.router.routes.append(AsgiRoute("/docs/{path:path}", page.file, include_in_schema=False))

    @property
    def model(self) -> Any:
        """The model; a name or a requirement is resolved now, once: see `llm.py`. Without one, `[models]` of the
        manifest beside the application's file counts. Raises InvalidInputError if there is none either."""
        with self._model_lock:
            if self._model is None:
                self._model = llm.required(self._place.manifest)
            if isinstance(self._model, str | llm.Requirement):
                self._model = llm.resolve(self._model)
        if self._model is None:
            raise InvalidInputError(
                "This application was made without a model.",
                hint='Write Application("smollm2-135m-instruct").',
                param="model",
            )
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        """Another one, in a test for instance."""
        with self._model_lock:
            self._model = model

    llm = model

    def get_llm(self, name: str) -> Any:
        """The model that `[models]` of the manifest has under a name, resolved once. Raises NotFoundError."""
        with self._model_lock:
            if name not in self.models:
                wanted = llm.required(self._place.manifest, name)
                if wanted is None:
                    raise NotFoundError(f"[models] of {self.name} has no {name!r}.", hint="Add it to llmasos.toml.")
                self.models[name] = llm.resolve(wanted)
            return self.models[name]

    @property
    def name(self) -> str:
        """What it is called in addresses: the host's name for it, the manifest's, else made of title or file."""
        return self._place.name

    @property
    def data(self) -> Path:
        """Its own folder, which is there: see `place.py`."""
        return self._place.data

    @property
    def config(self) -> Config:
        """The values that its user has set for `[config]` of the manifest. Raises InvalidInputError for one that is
        missing or not allowed."""
        return self._place.config

    @property
    def state(self) -> State:
        """A place for the application's own values: `app.state.db = ...`."""
        return self.asgi.state

    @property
    def routes(self) -> tuple[Route, ...]:
        """The descriptions of all routes, in the order of their definition."""
        return tuple(self._routes)

    def route(
        self,
        path: str,
        methods: Iterable[str] | None = None,
        *,
        examples: Iterable[Mapping[str, Any]] = (),
        tool: bool = False,
        read_only: bool | None = None,
        destructive: bool | None = None,
        output: Output | None = None,
        dependencies: Iterable[Any] = (),
    ) -> Callable[[Function], Function]:
        """Serve the decorated function (plain, async, generator or async generator) at `path`; it stays as it is.

        `methods`: default GET and POST, or POST alone where an input is nested. `examples`: inputs, shown in the
        documentation and checked now. `tool`: language models may call it too, over MCP (see `mcp.py`). `read_only`,
        `destructive`: what it does to the world, for who asks before a call. `output`: how a result is best shown
        ("markdown", "table", "json", "image", ...), where its type does not say. `dependencies`: `Depends(...)` that
        run first, for what they do (see `depends.py`). Raises InvalidInputError for what
        can't be served.
        """

        def decorate(function: Function) -> Function:
            hints = Hints(tool=tool, read_only=read_only, destructive=destructive, output=output)
            route = describe(function, path, methods, examples, hints, dependencies)
            self._check_free(route)
            route = dataclasses.replace(route, name=self._free_name(route))
            if route.path == "/":
                # The own list of routes gives way; what it answered is part of the page at /docs.
                self.asgi.router.routes[:] = [r for r in self.asgi.router.routes if getattr(r, "path", None) != "/"]
            self._routes.append(route)
            endpoint = self._endpoint(route)
            self.asgi.add_api_route(
                path, endpoint, methods=list(route.methods), include_in_schema=False, name=route.name
            )
            return function

        if not isinstance(path, str):
            raise InvalidInputError(
                f"@app.route needs a path, not {path!r}.",
                hint=f'Write @app.route("/{getattr(path, "__name__", "ask")}").',
            )
        return decorate

    def chat(self, function: Function) -> Function:
        """Serve the decorated function as the model `app/NAME`, in OpenAI's form; it stays as it is. See `chat.py`.

        Raises InvalidInputError for what can't chat, and where there is such a function already.
        """
        described = chat.describe_chat(function)
        if self._chat is not None:
            raise InvalidInputError(f"{described.name}(): {self._chat.name}() chats already.")
        for route in self._routes:
            if route.path == chat.COMPLETIONS or route.path.startswith(chat.MODELS):
                raise InvalidInputError(
                    f"The path {route.path!r} of {route.name}() belongs to @app.chat.", hint="Choose another."
                )
        self._chat = described
        endpoints = (
            (chat.COMPLETIONS, self._complete_chat, "POST"),
            (chat.MODELS, self._list_models, "GET"),
            (chat.MODELS + "/{name:path}", self._get_model, "GET"),
        )
        for path, endpoint, method in endpoints:
            self.asgi.router.routes.append(AsgiRoute(path, endpoint, methods=[method], include_in_schema=False))
        return function

    def schedule(self, cron: str | None = None, *, every: float | None = None) -> Callable[[Function], Function]:
        """Run the decorated function by the clock while the application is served; see `schedule.py`. Raises
        InvalidInputError for times that never come."""

        def decorate(function: Function) -> Function:
            described = describe_schedule(function, cron, every)
            if any(other.name == described.name for other in self._schedules):
                raise InvalidInputError(f"There is a schedule {described.name}() already.", hint="Rename the function.")
            if not self._schedules:
                if any(route.path == SCHEDULES for route in self._routes):
                    raise InvalidInputError(f"The path {SCHEDULES} belongs to @app.schedule.", hint="Choose another.")
                self.asgi.router.routes.append(
                    AsgiRoute(SCHEDULES, self._list_schedules, methods=["GET"], include_in_schema=False)
                )
            self._schedules.append(described)
            return function

        if cron is not None and not isinstance(cron, str):
            raise InvalidInputError(f"@app.schedule needs a time, not {cron!r}.", hint="@app.schedule(every=60)")
        return decorate

    def background(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> jobs.Job:
        """Run a function, plain or async, on its own: the call that asks for it does not wait. It is a job like those
        of routes, so `GET /jobs` shows it, and `report_progress` works. Raises ServerError while the application does
        not run, BusyError for too many jobs."""
        call = functools.partial(function, *args, **kwargs)

        async def carry_out(on_item: Callable[[Any], Awaitable[None]]) -> bytes:
            result = await self._call(call)
            if streams.is_stream(result):
                raise UnsupportedError(f"{name_of(function)}() is a generator: nobody would read what it yields.")
            return pydantic_core.to_json(result, serialize_unknown=True, inf_nan_mode="null")

        async def start() -> jobs.Job:
            return self._jobs.start(name_of(function), carry_out)

        if _is_in_loop():
            return self._jobs.start(name_of(function), carry_out)
        if self._loop is None or not self._loop.is_running():
            raise ServerError("The application does not run, so nothing can go on in the background.")
        return asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    async def settle(self) -> None:
        """Wait until all jobs are over."""
        await self._jobs.settle()

    def on_start(self, function: Function) -> Function:
        """Run the function, plain or async, before the first request. If it raises, the application does not start."""
        self._on_start.append(function)
        return function

    def on_stop(self, function: Function) -> Function:
        """Run the function, plain or async, after the last request; the last one defined runs first."""
        self._on_stop.append(function)
        return function

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI 3.1 document."""
        return openapi(self.asgi, self._routes, None if self._chat is None else self._chat.describe(self.name))

    def document(self) -> dict[str, Any]:
        """Every route as data: what pages, command lines, tools and clients are made from; see `document.py`."""
        chats = None if self._chat is None else self._chat.describe(self.name)
        described = document(self.title, self.asgi.version, self._routes, chats)
        return described | {"schedules": [one.describe() for one in self._schedules]}

    def find(self, name: str) -> Route:
        """The route of a function's name, or of a path. Raises NotFoundError."""
        for route in self._routes:
            if name in (route.name, route.path):
                return route
        known = ", ".join(route.name for route in self._routes) or "none"
        raise NotFoundError(f"{self.title} has no route {name!r}.", hint=f"Known: {known}.")

    async def call(
        self,
        route: Route,
        values: Mapping[str, Any],
        *,
        on_item: Callable[[Any], Awaitable[None]] | None = None,
        session: str | None = None,
    ) -> bytes:
        """The JSON that `route` answers to these inputs on every surface; a stream's elements are collected, and
        `on_item` gets each when it comes. `session` names a session of this machine's own. Raises
        pydantic.ValidationError for wrong inputs, and what the function raises."""
        self._check_started()
        call = self._bind(route.node, route.read(values), None if session is None else sessions.local_id(session))
        return await self._collect(route, call, on_item)

    def _bind(
        self, node: Node, values: Mapping[str, Any], session_id: str | None = None, request: Request | None = None
    ) -> Callable[[], Any]:
        """The call of a function with its dependencies."""
        self._loop = asyncio.get_running_loop()
        session_id = None if session_id is None else clients.scoped(session_id)
        context = Context(self.sessions, self.dependency_overrides, self._in_thread, session_id, request)
        return bind(node, values, context)

    async def _collect(
        self, route: Route, call: Callable[[], Any], on_item: Callable[[Any], Awaitable[None]] | None
    ) -> bytes:
        result = await self._call(call)
        if isinstance(result, Response):
            raise UnsupportedError(f"{route.name}() answers with an HTTP response, which only HTTP can carry.")
        if not (route.streams or streams.is_stream(result)):
            return route.dump(result)
        items = []
        async with streams.reading(route, result, self._in_thread) as elements:
            async for item in elements:
                items.append(item)
                if on_item is not None:
                    await on_item(item)
        return route.collect(items)

    def run(self, host: str = "127.0.0.1", port: int = 8000, *, open: bool = False, insecure: bool = False) -> None:
        """Serve until Ctrl-C or SIGTERM, then return. `open` shows the page in a browser.

        An address that other machines can reach needs `insecure=True`: an application has no keys. Raises ServerError
        if the port is in use or a start hook fails.
        """
        from llmasos.apps.loading import is_loading
        from llmasos.apps.server import serve

        if is_loading.get():
            return  # the file is read for its application, not run
        serve(self, host, port, open=open, insecure=insecure)

    def test_client(self) -> TestClient:
        """A synchronous client that needs no port. As a context manager it runs the start and stop hooks."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # starlette deprecates one of the two HTTP clients that it accepts
            from starlette.testclient import TestClient
        return TestClient(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.asgi(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any = None) -> AsyncIterator[None]:
        """All that requests need around what it encloses; for a host application: `FastAPI(lifespan=app.lifespan)`."""
        async with self.hooks(), self._serving_tools(), self._keeping_schedules():
            yield

    @contextlib.asynccontextmanager
    async def hooks(self) -> AsyncIterator[None]:
        """Runs the start and stop hooks around what it encloses."""
        self.start_error, self._loop = None, asyncio.get_running_loop()
        try:
            for hook in self._on_start:
                await self._call(hook)
        except BaseException as e:
            self.start_error = e
            raise
        self._started = True
        try:
            yield
        finally:
            self._started = False
            await self._jobs.close()
            for hook in reversed(self._on_stop):
                try:
                    await self._call(hook)
                except Exception:
                    problems.log.exception("The stop hook %s() failed", getattr(hook, "__name__", hook))

    def _check_free(self, route: Route) -> None:
        def shape(path: str) -> str:
            return re.sub(r"{[^{}]*}", "{}", path)

        pages = route.path.startswith("/docs/")
        taken = (*_RESERVED, *((chat.COMPLETIONS, chat.MODELS) if self._chat else ()))
        if pages or shape(route.path) in taken or (self._schedules and route.path == SCHEDULES):
            raise InvalidInputError(
                f"The path {route.path!r} of {route.name}() belongs to every application.",
                hint="Choose another.",
                param="path",
            )
        for other in self._routes:
            if shape(other.path) == shape(route.path) and (shared := set(other.methods) & set(route.methods)):
                raise InvalidInputError(
                    f"{min(shared)} {route.path} of {route.name}() is taken by {other.name}().",
                    hint="Choose another path, or give each function its own methods=[...].",
                    param="path",
                )

    def _free_name(self, route: Route) -> str:
        """The function's name, by which command lines, tools and clients know the route; the path's where another
        function has it already, or it has none."""
        words = re.sub(r"\W+", "_", re.sub(r":[^{}]*}", "}", route.path)).strip("_") or "root"
        numbered = (f"{words}_{n}" for n in itertools.count(2))
        names = itertools.chain((route.name, words, f"{route.methods[0].lower()}_{words}"), numbered)
        taken = {other.name for other in self._routes}
        return next(name for name in names if name.isidentifier() and name not in taken)

    def _endpoint(self, route: Route) -> Callable[[Request], Any]:
        uses_session = route.node.uses("session")

        async def endpoint(request: Request) -> Response:
            try:
                self._check_started()
                values = await requests.read_inputs(route, request)
                if not uses_session:
                    return await self._answer(route, self._bind(route.node, values, None, request), request)
                id, is_new = sessions.find_id(request, self.name)
                answer = await self._answer(route, self._bind(route.node, values, id, request), request)
                return sessions.tell(answer, request, self.name, id) if is_new else answer
            except (Exception, SystemExit) as e:  # whatever the function does, the server stays up
                headers = e.headers if isinstance(e, HTTPException) else None
                return problems.response(problems.of_exception(e, route.name), headers)

        return endpoint

    async def _answer(self, route: Route, call: Callable[[], Any], request: Request) -> Response:
        if jobs.is_wanted(request.headers):
            job = self._jobs.start(route.name, functools.partial(self._collect, route, call))
            return jobs.accepted(job, request.scope.get("root_path", ""))
        result = await self._call_while_there(call, request, route.node)
        if isinstance(result, Response):
            return result
        accept = request.headers.get("accept", "")
        if route.streams or streams.is_stream(result):
            collected = streams.prefers_json(accept)
            return streams.StreamResponse(route, result, collected=collected, worker=self._in_thread)
        return _file_response(route, result, accept) if route.returns_files else _json_response(route.dump(result))

    async def _complete_chat(self, request: Request) -> Response:
        assert self._chat is not None
        described = self._chat
        try:
            self._check_started()
            asked = chat.parse_request(await requests.read_json(request, chat.ChatRequest.model_fields), self.name)
            answer = chat.Answer(asked, described.stops(asked), self._count_tokens)
            uses_session = described.node.uses("session")
            id, is_new = sessions.find_id(request, self.name) if uses_session else (None, False)
            call = self._bind(described.node, described.read(asked), id, request)
            result = await self._call_while_there(call, request, described.node)
            if isinstance(result, _Left):
                return result
            if not (streams.is_stream(result) or asked.stream):
                response = await chat.whole_response(answer, result)
            else:
                items = result if streams.is_stream(result) else iter((result,))
                response = chat.ChatResponse(
                    described.name, items, answer, streamed=bool(asked.stream), worker=self._in_thread
                )
            return sessions.tell(response, request, self.name, id) if id and is_new else response
        except (Exception, SystemExit) as e:  # whatever the function does, the server stays up
            return chat.error_response(e, described.name)

    async def _count_tokens(self, what: Any) -> int | None:
        return await chat.count_tokens(self._model, what, self._in_thread)

    async def _list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [chat.model_entry(self.name, self._created)]})

    async def _get_model(self, request: Request) -> Response:
        try:
            chat.check_model(request.path_params["name"], self.name)
        except NotFoundError as e:
            return chat.error_response(e, "models")
        return JSONResponse(chat.model_entry(self.name, self._created))

    @contextlib.asynccontextmanager
    async def _serving_tools(self) -> AsyncIterator[None]:
        """Over HTTP, while the application runs; without the package, the endpoint says so when it is asked."""
        if not mcp.tools(self) or importlib.util.find_spec("mcp") is None:
            yield
            return
        async with self._tools.start(self).run():
            try:
                yield
            finally:
                self._tools.manager = None

    @contextlib.asynccontextmanager
    async def _keeping_schedules(self) -> AsyncIterator[None]:
        async def call(node: Node) -> None:
            await self._call(self._bind(node, {}))

        tasks = [asyncio.create_task(one.keep(call), name=f"schedule {one.name}") for one in self._schedules]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=1)

    async def _list_schedules(self, request: Request) -> Response:
        return JSONResponse([one.state() for one in self._schedules])

    def _check_started(self) -> None:
        if self._on_start and not self._started:
            raise ServerError(
                "The start hooks have not run.",
                hint="Mounted: FastAPI(lifespan=app.lifespan). In a test: with app.test_client() as client.",
            )

    async def _call(self, call: Callable[[], Any]) -> Any:
        if inspect.isasyncgenfunction(call) or inspect.isgeneratorfunction(call) or inspect.iscoroutinefunction(call):
            result = call()
        else:
            result = await self._in_thread(call)
        return await result if inspect.isawaitable(result) else result

    async def _call_while_there(self, call: Callable[[], Any], request: Request, node: Node) -> Any:
        """`_call`; an empty response if the client leaves meanwhile. An async function is cancelled then; one in a
        thread is told (`is_cancelled`), and so are the models that it waits for. Who takes the request reads of it
        what it likes, so nobody else may."""
        if node.uses("request") or (inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call)):
            return await self._call(call)
        token = leaving.Token()
        with token.active():
            work = asyncio.ensure_future(self._outcome(call))
        left = asyncio.ensure_future(streams.until_left(request.receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            is_there = work.done()
            if not is_there:
                token.cancel()
                if inspect.iscoroutinefunction(call):
                    work.cancel()
                await asyncio.wait({work})  # a thread can't be interrupted
            result, error = (None, None) if work.cancelled() else work.result()
            if is_there and error is not None:
                raise error
            if error is not None:
                problems.of_exception(error, name_of(node.function))  # nobody reads it: the log is all there is
            return result if is_there else _Left(status_code=499)
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _outcome(self, call: Callable[[], Any]) -> tuple[Any, Exception | SystemExit | None]:
        """A task that raised SystemExit would end the server."""
        try:
            return await self._call(call), None
        except (Exception, SystemExit) as e:
            return None, e

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        return await anyio.to_thread.run_sync(self._counted, call, limiter=self._limiter)

    def _counted(self, call: Callable[[], Any]) -> Any:
        with self._count_lock:
            self.num_running += 1
        try:
            return call()
        finally:
            with self._count_lock:
                self.num_running -= 1

    async def _index(self) -> Response:
        routes = [
            {"path": r.path, "methods": list(r.methods), "summary": r.summary, "streams": r.streams}
            for r in self._routes
        ]
        return JSONResponse({"title": self.title, "version": self.asgi.version, "routes": routes, "docs": "docs"})

    async def _health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def _document(self) -> Response:
        return JSONResponse(self.document())

    async def _docs(self) -> Response:
        return page.page()

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        hint = ""
        if error.status_code in (404, 405):
            what = "the routes" if error.status_code == 404 else "each route's methods"
            hint = f"GET {request.scope.get('root_path', '')}/ lists {what}."
            error.detail = f"There is no {request.method} {request.url.path}."
        return problems.of_http_exception(error, hint=hint)


def _file_response(route: Route, result: Any, accept: str) -> Response:
    """A file as it is for who accepts it rather than JSON; anything else as JSON."""
    found = route.result.validate_python(result)
    if isinstance(found, files.File) and files.wants_raw(accept, found.media_type):
        return files.raw_response(found)
    return _json_response(route.dump(found))


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _json_response(body: bytes) -> Response:
    return Response(body, media_type="application/json")
