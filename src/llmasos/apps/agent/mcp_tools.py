"""Servers of the Model Context Protocol as tools of an agent. Needs the extra `mcp`.

What a server says of its tools is its own word: its hints excuse no call from approval, its schemas are checked before
and after each call, and a tool whose definition changes while it is used is not called any more.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import importlib
import json
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from llmasos.apps.agent.forms import mismatch, schema_problem, wrong
from llmasos.apps.agent.tools import tool_name
from llmasos.client.tools import Tool
from llmasos.errors import FormatError, InvalidInputError, NotFoundError, ToolError, UnsupportedError
from llmasos.settings import settings

if TYPE_CHECKING:
    from mcp import Client

MAX_TOOLS = 128
MAX_RESTARTS = 2
"""Of a server that ends while an agent runs."""
_MAX_PAGES = 20
_MAX_DESCRIPTION = 2000
_MAX_SCHEMA = 20_000
"""Characters."""


@dataclass(frozen=True)
class McpServer:
    """A program that is started (`command`, over its standard input and output), or a `url` (streamable HTTP).

    `allow`: names or patterns of the tools that may be used; None: all. `approval`: "always", "never", or the names of
    the tools that need none. `timeout` and `start_timeout`: seconds of one call, and until it answers at first. A
    program gets `env` and the few variables that every program needs.
    """

    name: str
    command: Sequence[str] = ()
    url: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    allow: Sequence[str] | None = None
    approval: Literal["always", "never"] | Sequence[str] = "always"
    timeout: float = 60.0
    start_timeout: float = 30.0

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise InvalidInputError(
                f"The MCP server {self.name!r} needs a command or a url, and not both.", param="command"
            )
        if isinstance(self.command, str):
            raise InvalidInputError("command is a list: the program and its arguments.", param="command")

    def connect(self) -> McpConnection:
        """An asynchronous context manager; inside it, the server answers."""
        return McpConnection(self)

    def allows(self, tool: str) -> bool:
        return self.allow is None or any(fnmatchcase(tool, pattern) for pattern in self.allow)

    def needs_approval(self, tool: str) -> bool:
        if isinstance(self.approval, str):
            return self.approval != "never"
        return not any(fnmatchcase(tool, pattern) for pattern in self.approval)


class McpConnection:
    """`tools`: those that may be used; `notices`: what people should know of the others."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self.tools: list[Tool] = []
        self.notices: list[str] = []
        self._definitions: dict[str, str] = {}
        self._client: Client | None = None
        self._holding: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._starting = asyncio.Lock()
        self._num_starts = 0
        self._said = ""

    async def __aenter__(self) -> McpConnection:
        """Raises ToolError for a server that does not start or answer, UnsupportedError without the package `mcp`."""
        try:
            importlib.import_module("mcp")
        except ImportError as e:
            raise UnsupportedError(
                "Tools over MCP need the package mcp, which is not installed.", hint="pip install llmasos[mcp]"
            ) from e
        try:
            await self._start()
            listed = await self._list()
        except BaseException:
            await self._end()
            raise
        for one in listed:
            self._take(one)
        if len(self.tools) > MAX_TOOLS:
            await self._end()
            raise InvalidInputError(
                f"The MCP server {self.server.name} has {len(self.tools)} tools; {MAX_TOOLS} may be used at most.",
                hint="Name those that are needed (allow).",
                param="allow",
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    # the connection: opened and closed in one task, as its library wants it

    async def _start(self) -> None:
        self._stop = asyncio.Event()
        ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._num_starts += 1
        self._holding = asyncio.ensure_future(self._hold(ready, self._stop))
        try:
            async with asyncio.timeout(self.server.start_timeout):
                self._client = await asyncio.shield(ready)
        except TimeoutError:
            raise self._not_started(f"it did not answer within {self.server.start_timeout:g} s") from None
        except ToolError:
            raise
        except Exception as e:
            raise self._not_started(_words(e)) from e

    def _not_started(self, why: str) -> ToolError:
        said = f" It said: {self._said}" if self._said else ""
        command = " ".join(self.server.command)
        return ToolError(
            f"The MCP server {self.server.name} could not be used: {why}.{said}",
            hint=f"Does `{command}` run?" if command else f"Is {self.server.url} right?",
        )

    async def _hold(self, ready: asyncio.Future[Any], stop: asyncio.Event) -> None:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            try:
                async with self._connection(log) as client:
                    ready.set_result(client)
                    await stop.wait()
            except Exception as e:
                self._said = _last_line(log)
                if not ready.done():
                    ready.set_exception(e)
            finally:
                if not ready.done():
                    ready.cancel()

    @asynccontextmanager
    async def _connection(self, log: Any) -> AsyncIterator[Client]:
        from mcp import Client, StdioServerParameters

        async with AsyncExitStack() as stack:
            if self.server.command:
                from mcp.client.stdio import stdio_client

                program, *args = self.server.command
                env, cwd = dict(self.server.env), self.server.cwd
                to: Any = stdio_client(StdioServerParameters(command=program, args=args, env=env, cwd=cwd), errlog=log)
            else:
                from mcp.client.streamable_http import streamable_http_client

                http: Any = importlib.import_module("httpx2")
                asking = http.AsyncClient(headers=dict(self.server.headers), timeout=self.server.timeout + 5)
                to = streamable_http_client(self.server.url, http_client=await stack.enter_async_context(asking))
            yield await stack.enter_async_context(Client(to, cache=None))

    async def _end(self) -> None:
        """Bounded: the library gives a program a few seconds to end, and then ends it."""
        was_connected, holding = self._client is not None, self._holding
        self._client = self._holding = None
        self._stop.set()
        if holding is not None:
            if was_connected:
                await asyncio.wait({holding}, timeout=10)
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    # the tools

    async def _list(self) -> list[Any]:
        assert self._client is not None
        found: list[Any] = []
        cursor: str | None = None
        try:
            async with asyncio.timeout(self.server.start_timeout):
                for _ in range(_MAX_PAGES):
                    page = await self._client.list_tools(cursor=cursor)
                    found += page.tools
                    cursor = page.next_cursor
                    if not cursor:
                        break
        except TimeoutError:
            raise self._not_started("it did not list its tools in time") from None
        except Exception as e:
            raise self._not_started(_words(e)) from e
        return found

    def _take(self, told: Any) -> None:
        if not self.server.allows(told.name):
            return
        problem = self._problem(told)
        if problem:
            self.notices.append(f"The tool {told.name[:64]!r} of {self.server.name} is left out: {problem}.")
            return
        self._definitions[told.name] = _fingerprint(told)
        hints = told.annotations
        schema = dict(told.input_schema)
        description = told.description or told.title or ""

        async def run(**arguments: Any) -> str:
            return await self._call(told.name, schema, told.output_schema, arguments)

        self.tools.append(
            Tool(
                name=tool_name(self.server.name, told.name),
                description=description[:_MAX_DESCRIPTION],
                parameters=schema,
                run=run,
                read_only=bool(hints and hints.read_only_hint),
                destructive=bool(hints and hints.destructive_hint),
                approval=self.server.needs_approval(told.name),
                timeout=self.server.timeout + self.server.start_timeout,
                source=f"mcp:{self.server.name}",
            )
        )

    def _problem(self, told: Any) -> str:
        """Why a tool can't be offered to a model; empty if it can."""
        schema = told.input_schema
        if told.name in self._definitions:
            return "there are two of this name"
        if tool_name(self.server.name, told.name) in {one.name for one in self.tools}:
            return "its name can't be told from another one's"
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            return "its inputs are not described as a JSON object"
        if len(json.dumps(schema)) > _MAX_SCHEMA:
            return f"the description of its inputs is longer than {_MAX_SCHEMA} characters"
        if problem := schema_problem(schema):
            return f"its schema is wrong: {problem}"
        return ""

    async def _call(
        self, name: str, schema: Mapping[str, Any], promised: Mapping[str, Any] | None, arguments: dict[str, Any]
    ) -> str:
        """Raises ToolError, whose text the model can act on."""
        if problem := mismatch(schema, arguments):
            raise ToolError(f"the arguments are wrong: {problem}.")
        client = await self._alive()
        try:
            async with asyncio.timeout(self.server.timeout):
                result = await client.call_tool(name, arguments)
        except TimeoutError:
            raise ToolError(f"{self.server.name} did not answer within {self.server.timeout:g} s.") from None
        except Exception as e:
            if await self._has_ended(e):
                raise ToolError(f"{self.server.name} ended in the midst of the call. It may be tried again.") from e
            raise ToolError(f"{self.server.name} answered wrongly: {_words(e)}.") from e
        text = _text(result)
        if result.is_error:
            raise ToolError(text or f"{name} failed and did not say why.")
        # its library looks, too, but not where a server lists a tool twice
        if promised and (problem := mismatch(promised, result.structured_content)):
            raise ToolError(f"{self.server.name} answered wrongly: not what it promised: {problem}.")
        return text

    async def _alive(self) -> Client:
        """The connection, opened anew if the server has ended."""
        async with self._starting:
            if self._client is not None and self._holding is not None and not self._holding.done():
                return self._client
            if self._num_starts > MAX_RESTARTS:
                raise ToolError(f"{self.server.name} has ended {self._num_starts} times; it is not started again.")
            await self._end()
            await self._start()
            now = {one.name: _fingerprint(one) for one in await self._list()}
            if changed := [name for name, one in self._definitions.items() if now.get(name) != one]:
                await self._end()
                self._num_starts = MAX_RESTARTS + 1
                raise ToolError(
                    f"{self.server.name} describes {changed[0]!r} differently since it started anew; it is not used."
                )
            assert self._client is not None
            return self._client

    async def _has_ended(self, error: Exception) -> bool:
        import anyio
        from mcp import MCPError

        closed = isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError | anyio.EndOfStream)
        if isinstance(error, MCPError):
            closed = error.code == -32000  # CONNECTION_CLOSED of the SDK
        if closed or (self._holding is not None and self._holding.done()):
            self._client = None
            return True
        return False


def _fingerprint(told: Any) -> str:
    return json.dumps([told.name, told.description, told.input_schema], sort_keys=True)


def _text(result: Any) -> str:
    """What a model can read of a result."""
    parts = []
    for one in result.content or ():
        kind = getattr(one, "type", "")
        resource = getattr(one, "resource", None)
        if kind == "text":
            parts.append(one.text)
        elif resource is not None and isinstance(getattr(resource, "text", None), str):
            parts.append(f"[{resource.uri}]\n{resource.text}")
        elif kind == "resource_link":
            parts.append(f"[{one.name}: {one.uri}]")
        else:
            parts.append(f"[{getattr(one, 'mime_type', None) or kind}, {_size(getattr(one, 'data', ''))}: not shown]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _size(data: Any) -> str:
    try:
        return f"{len(base64.b64decode(data))} bytes"
    except (binascii.Error, TypeError, ValueError):
        return "unreadable"


def _words(error: BaseException) -> str:
    """The first line of what went wrong, out of the groups that task groups put it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ValidationError):
        return wrong(error)[:300]
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def _last_line(log: Any) -> str:
    with suppress(OSError, ValueError):
        log.seek(0)
        lines = [line.strip() for line in log.read()[-4000:].splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""
    return ""


def mcp_config(path: str | Path | None = None) -> dict[str, McpServer]:
    """The servers that a file names; default: `mcp.json` in the home folder, none if it is not there.

    The form is that of desktop programs, `{"mcpServers": {"NAME": {"command": …, "args": […], "env": {…}}}}` or with
    `url` and `headers`; `allow`, `approval`, `timeout` and `start_timeout` are ours. Raises NotFoundError for a file
    that was named and is not there, FormatError for one of another form.
    """
    place = Path(path).expanduser() if path is not None else settings().home / "mcp.json"
    if not place.is_file():
        if path is None:
            return {}
        raise NotFoundError(f"There is no file {str(path)!r}.", hint="Check the path.")
    try:
        told = json.loads(place.read_text(encoding="utf-8"))["mcpServers"]
        return {name: _configured(name, dict(one)) for name, one in told.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FormatError(
            f"{place} does not describe MCP servers: {_words(e)}.",
            hint='{"mcpServers": {"NAME": {"command": "program", "args": ["argument"]}}}',
        ) from e


def _configured(name: str, one: dict[str, Any]) -> McpServer:
    command, args = one.pop("command", None), one.pop("args", [])
    one.pop("type", None)  # other programs say "stdio" or "http", which the rest says already
    if one.pop("disabled", False):
        one["allow"] = []
    for key in ("timeout", "start_timeout"):
        if key in one and (isinstance(one[key], bool) or not isinstance(one[key], int | float) or one[key] <= 0):
            raise ValueError(f"{key} of {name} is {one[key]!r}, which is no number of seconds")
    return McpServer(name=name, command=[command, *args] if command else (), **one)
