"""An application's tools over the Model Context Protocol: routes with `tool=True`, for models and the programs around
them. Needs the extra `mcp`.

    llmasos app mcp app.py         over standard input and output, as desktop programs start it
    http://127.0.0.1:8000/mcp      streamable HTTP, where the application is served

A tool's inputs and result are those of its route. MCP wants an object as structured result, so any other is the value
of `result`. Files are image and audio content or embedded resources, and not repeated as structured results. A stream's
elements are told as progress, and the result is all of them put together. A failure is a result with `isError`, whose
text says what happened and what to do: the model reads it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from pydantic import ValidationError
from starlette.datastructures import Headers

from llmasos.apps import problems
from llmasos.apps.document import describe_route
from llmasos.apps.files import File
from llmasos.apps.jobs import reporting_to
from llmasos.apps.routes import Route
from llmasos.errors import UnsupportedError

if TYPE_CHECKING:
    from mcp import types
    from mcp.server import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from starlette.types import Receive, Scope, Send

    from llmasos.apps.application import Application

PATH = "/mcp"


def create_server(app: Application) -> Server[Any]:
    """The MCP server of the application's tools. Raises UnsupportedError without the package `mcp`."""
    try:
        from mcp import types
        from mcp.server.lowlevel import Server
    except ImportError as e:
        raise UnsupportedError(
            "Tools over MCP need the package mcp, which is not installed.", hint="pip install llmasos[mcp]"
        ) from e

    async def list_tools(
        context: ServerRequestContext[Any], params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_tool(route) for route in tools(app)])

    async def call_tool(
        context: ServerRequestContext[Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        route = next((route for route in tools(app) if route.name == params.name), None)
        if route is None:
            known = ", ".join(route.name for route in tools(app))
            problem = problems.problem(404, "not_found", f"There is no tool {params.name!r}.", hint=f"Known: {known}.")
            return _failed(problem)
        return await _call(app, route, params.arguments or {}, context)

    return Server(app.title, version=app.asgi.version, on_list_tools=list_tools, on_call_tool=call_tool)


def tools(app: Application) -> list[Route]:
    """The routes that models may call."""
    return [route for route in app.routes if route.hints.tool]


def serve_stdio(app: Application) -> None:
    """Answer on standard input and output until the other side closes them. What the application prints goes to
    standard error."""
    import anyio

    server = create_server(app)
    from mcp.server.stdio import stdio_server

    async def run() -> None:
        async with app.hooks(), stdio_server() as (source, sink):
            await server.run(source, sink, server.create_initialization_options())

    anyio.run(run)


class HttpTools:
    """The ASGI endpoint of streamable HTTP; sessions are kept while `manager` runs, in the application's lifespan."""

    def __init__(self) -> None:
        self.manager: StreamableHTTPSessionManager | None = None

    def start(self, app: Application) -> StreamableHTTPSessionManager:
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

        self.manager = StreamableHTTPSessionManager(create_server(app))
        return self.manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.manager is None:
            problem = problems.problem(
                503,
                "unavailable",
                "The application has not started, or the package mcp is not installed.",
                hint="Mounted: FastAPI(lifespan=app.lifespan). Else: pip install llmasos[mcp]",
            )
            await problems.response(problem)(scope, receive, send)
        elif _is_foreign(Headers(scope=scope)):
            problem = problems.problem(403, "forbidden", "Pages of other sites may not call tools.")
            await problems.response(problem)(scope, receive, send)
        else:
            await self.manager.handle_request(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    """A page of another site asks: the protocol's specification wants such requests refused."""
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def _tool(route: Route) -> types.Tool:
    from mcp import types

    described = describe_route(route)
    schema, hints = described["output"], route.hints
    whole = None if route.returns_files else schema if _is_object(schema) else _wrapped(schema)
    return types.Tool(
        name=route.name,
        title=route.summary,
        description="\n\n".join(filter(None, (route.summary, route.description))),
        input_schema=described["input"],
        output_schema=whole,
        annotations=types.ToolAnnotations(
            title=route.summary, read_only_hint=hints.read_only, destructive_hint=hints.destructive
        ),
    )


def _is_object(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "object"


def _wrapped(schema: dict[str, Any]) -> dict[str, Any]:
    inner = {key: value for key, value in schema.items() if key != "$defs"}
    whole = {"type": "object", "properties": {"result": inner}, "required": ["result"]}
    return whole | ({"$defs": schema["$defs"]} if "$defs" in schema else {})


async def _call(
    app: Application, route: Route, values: dict[str, Any], context: ServerRequestContext[Any]
) -> types.CallToolResult:
    from mcp import types

    count = 0
    loop, telling = asyncio.get_running_loop(), list[Future[None]]()

    def report(done: float | None, message: str) -> None:
        progress = context.session.report_progress(
            count if done is None else done, None if done is None else 1, message
        )
        telling.append(asyncio.run_coroutine_threadsafe(progress, loop))

    async def tell(item: Any) -> None:
        nonlocal count
        count += 1
        text = item if isinstance(item, str) else route.dump_item(item).decode()
        await context.session.report_progress(count, message=text)

    try:
        with reporting_to(report):
            text = (await app.call(route, values, on_item=tell, session=_session_of(context))).decode()
        await asyncio.gather(*map(asyncio.wrap_future, telling))
    except ValidationError as e:
        errors = problems.located(e, "body", ())
        return _failed(problems.wrong_input(errors, [i.name for i in route.inputs]))
    except (Exception, SystemExit) as e:
        return _failed(problems.of_exception(e, route.name))
    value = json.loads(text)
    if route.returns_files:
        found = value if isinstance(value, list) else [value]
        return types.CallToolResult(content=[_content(one) for one in found if one is not None])
    whole = value if _is_object(route.result.json_schema(mode="serialization")) else {"result": value}
    shown = value if isinstance(value, str) else text
    return types.CallToolResult(content=[types.TextContent(text=shown)], structured_content=whole)


_HERE = f"mcp-{secrets.token_hex(16)}"
"""The session of who has started this process and talks over its standard input."""


def _session_of(context: ServerRequestContext[Any]) -> str:
    headers = getattr(context.request, "headers", None)
    found = headers.get("mcp-session-id") if headers is not None else None
    return f"mcp-{found[:100]}" if found else _HERE


def _content(url: str) -> types.ImageContent | types.AudioContent | types.EmbeddedResource:
    """A file, as models take it."""
    from mcp import types

    file = File.from_text(url)
    data, kind = base64.b64encode(file.data).decode(), file.media_type
    if kind.startswith("image/"):
        return types.ImageContent(data=data, mime_type=kind)
    if kind.startswith("audio/"):
        return types.AudioContent(data=data, mime_type=kind)
    uri = f"file:///{quote(file.name, safe='')}"
    return types.EmbeddedResource(resource=types.BlobResourceContents(uri=uri, blob=data, mime_type=kind))


def _failed(problem: dict[str, Any]) -> types.CallToolResult:
    from mcp import types

    text = " ".join(filter(None, (problem["message"], problem.get("hint"))))
    return types.CallToolResult(content=[types.TextContent(text=text)], is_error=True)
