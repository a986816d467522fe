"""Tools over MCP, with the official client: in memory, over HTTP, over standard input and output."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from served import served
from six_routes import CALLS, app

from llmasos.apps import Application, Session, report_progress

pytest.importorskip("mcp")

from mcp import Client, StdioServerParameters

from llmasos.apps.mcp import create_server

HERE = Path(__file__).parent
TOOLS = [route.name for route in app.routes if route.hints.tool]


async def results(client: Client) -> list[object]:
    """Of all calls that are tools."""
    found = []
    for name, values, _ in CALLS:
        if name in TOOLS:
            answer = await client.call_tool(name, values)
            assert not answer.is_error, answer.content
            found.append(answer.structured_content or [(one.mime_type, one.data) for one in answer.content])
    return found


def expected() -> list[object]:
    whole = {"box": lambda result: result, "stamp": lambda result: [("image/png", result.partition(",")[2])]}
    return [whole.get(name, lambda result: {"result": result})(result) for name, _, result in CALLS if name in TOOLS]


async def test_only_tools_are_listed_with_their_routes_schemas() -> None:
    async with Client(create_server(app)) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert list(tools) == TOOLS == ["add", "say", "box", "note", "forget", "stamp", "greet"]
        routes = {route["name"]: route for route in app.document()["routes"]}
        for name, tool in tools.items():
            assert tool.input_schema == routes[name]["input"]
        assert tools["box"].output_schema == routes["box"]["output"]
        assert tools["add"].output_schema["properties"]["result"] == routes["add"]["output"]
        assert tools["say"].description == "Repeat words.\n\nOne after the other, in a style."
        assert (tools["add"].annotations.read_only_hint, tools["add"].annotations.destructive_hint) == (True, None)
        assert tools["forget"].annotations.destructive_hint is True


async def test_calls_give_what_every_surface_gives() -> None:
    async with Client(create_server(app)) as client:
        assert await results(client) == expected()


async def test_a_stream_is_told_as_it_comes() -> None:
    seen: list[tuple[float, str | None]] = []

    async def tell(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, message))

    async with Client(create_server(app)) as client:
        answer = await client.call_tool("say", {"words": "a b"}, progress_callback=tell)
    assert seen == [(1, "a "), (2, "b ")]
    assert answer.content[0].text == "a b "


async def test_progress_is_told() -> None:
    other, seen = Application(), []

    @other.route("/work", tool=True)
    def work() -> int:
        """Work."""
        report_progress(0.5, "half")
        return 1

    async def tell(*progress: object) -> None:
        seen.append(progress)

    async with Client(create_server(other)) as client:
        await client.call_tool("work", {}, progress_callback=tell)
    assert seen == [(0.5, 1, "half")]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("add", {"a": "x"}, "a: Input should be a valid integer"),
        ("add", {"a": 1, "c": 2}, "c: No such input"),
        ("box", {"points": []}, "box() failed."),
        ("count", {"to": 3}, "There is no tool 'count'. Known: add, say, box, note, forget, stamp, greet."),
    ],
)
async def test_what_fails_is_told_to_the_model(name: str, values: dict[str, Any], words: str) -> None:
    async with Client(create_server(app)) as client:
        answer = await client.call_tool(name, values)
        assert answer.is_error and words in answer.content[0].text


async def test_tools_over_http() -> None:
    with served(app) as url:
        async with Client(f"{url}/mcp") as client:
            assert await results(client) == expected()


async def test_tools_over_standard_input_and_output() -> None:
    command = ["-m", "llmasos", "app", "mcp", str(HERE / "six_routes.py")]
    async with Client(StdioServerParameters(command=sys.executable, args=command)) as client:
        assert await results(client) == expected()


def test_other_sites_and_applications_that_have_not_started_are_refused() -> None:
    with app.test_client() as client:
        answer = client.post("/mcp", json={}, headers={"origin": "https://evil.example"})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        own = client.post("/mcp", json={}, headers={"origin": "http://testserver"})
        assert own.status_code != 403
    answer = Application().test_client().post("/mcp", json={})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")


async def test_hooks_run_before_tools() -> None:
    other, order = Application(), []

    @other.on_start
    def begin() -> None:
        order.append("start")

    @other.route("/ask", tool=True)
    def ask() -> str:
        """Ask."""
        order.append("ask")
        return json.dumps(order)

    async with other.lifespan(), Client(create_server(other)) as client:
        await client.call_tool("ask")
    assert order == ["start", "ask"]


async def test_a_program_keeps_its_session() -> None:
    other = Application(title="Remembers")

    @other.route("/count", tool=True)
    def count(session: Session) -> int:
        """Count."""
        session["n"] = session.get("n", 0) + 1
        return session["n"]

    async def counted(client: Client) -> list[Any]:
        return [(await client.call_tool("count", {})).structured_content["result"] for _ in range(2)]

    async with Client(create_server(other)) as client:
        assert await counted(client) == [1, 2]
    with served(other) as url:
        async with Client(f"{url}/mcp") as client:
            first = await counted(client)
    assert first in ([1, 2], [3, 4])
