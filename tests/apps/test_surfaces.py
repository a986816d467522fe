"""One function, every surface: the same calls give the same results, and what is said of a route is the golden file."""

import json
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import jsonschema
import pytest
from served import served
from six_routes import CALLS, app

from llmasos.apps import Application, File
from llmasos.client import AppClient
from llmasos.errors import InvalidInputError, NotFoundError

GOLDEN = Path(__file__).with_name("six_routes.json")


@asynccontextmanager
async def over_http():
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        yield client


def test_what_is_said_of_the_routes_is_the_golden_file() -> None:
    assert app.document() == json.loads(GOLDEN.read_text())


def test_schemas_are_whole_and_hold_for_the_calls() -> None:
    routes = {route["name"]: route for route in app.document()["routes"]}
    for name, values, result in CALLS:
        for schema, instance in ((routes[name]["input"], values), (routes[name]["output"], result)):
            jsonschema.Draft202012Validator.check_schema(schema)
            jsonschema.validate(instance, schema)


async def test_the_document_is_served() -> None:
    async with over_http() as client:
        assert (await client.get("/app.json")).json() == app.document()


@pytest.mark.parametrize(("name", "values", "result"), CALLS)
async def test_python_and_http_agree(name: str, values: dict, result: object) -> None:
    route = app.find(name)
    assert json.loads(await app.call(route, values)) == result
    async with over_http() as client:
        path = route.path.format(**values)
        method = "POST" if "POST" in route.methods else "GET"
        body = {"json": values} if method == "POST" else {}
        answer = await client.request(method, path, headers={"accept": "application/json"}, **body)
        assert (answer.status_code, answer.json()) == (200, result)
        if route.streams:
            events = (await client.request(method, path, **body)).text.split("\n\n")
            items = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data:")]
            assert ("".join(items) if route.joins else items) == result


def over_the_wire(base: httpx.Client, name: str, values: dict) -> dict[str, object]:
    """The result by every way that HTTP has."""
    route = app.find(name)
    path = route.path.format(**values)
    method = "POST" if "POST" in route.methods else "GET"
    body = {"json": values} if method == "POST" else {}
    found: dict[str, object] = {}
    found["json"] = base.request(method, path, headers={"accept": "application/json"}, **body).json()
    job = base.request(method, path, headers={"prefer": "respond-async"}, **body)
    assert job.status_code == 202
    last = base.get(f"{job.headers['location']}/events").text.split("\n\n")[-3]
    found["job"] = json.loads(last.removeprefix("data: "))["result"]
    if "GET" in route.methods and not route.path_names:
        found["query"] = base.get(path, params=values, headers={"accept": "application/json"}).json()
    if route.streams:
        blocks = base.request(method, path, **body).text.split("\n\n")
        items = [json.loads(block.removeprefix("data: ")) for block in blocks if block.startswith("data:")]
        found["events"] = "".join(items) if route.joins else items
    if route.takes_files:
        files = [
            (key, (file.name, file.data, file.media_type))
            for key, value in values.items()
            for one in (value if isinstance(value, list) else [value])
            if app.find(name).inputs and key != "name"
            for file in [File.from_text(one)]
        ]
        found["form"] = base.post(path, files=files).json()
    if route.returns_files == "one":
        raw = base.request(method, path, headers={"accept": "image/*"}, **body)
        found["raw"] = File(raw.content, "stamped.png", raw.headers["content-type"]).url
    return found


def test_every_way_over_the_wire_and_the_client_agree() -> None:
    ways = set()
    with served(app) as url, httpx.Client(base_url=url) as base, AppClient(url) as client:
        for name, values, result in CALLS:
            found = over_the_wire(base, name, values)
            found["client"] = client.call(name, **values)
            found["client's job"] = client.wait(client.start(name, **values)).result
            assert {way: one for way, one in found.items() if one != result} == {}, name
            ways |= set(found)
    assert ways == {"json", "job", "query", "events", "form", "raw", "client", "client's job"}


def test_a_route_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(NotFoundError, match="no route 'sub'") as caught:
        app.find("sub")
    assert "add, say" in caught.value.hint


def test_names_are_of_one_route_each() -> None:
    other = Application()

    def ask() -> int:
        return 1

    for path, methods in (("/a", ["GET"]), ("/b/{c:path}", ["GET"]), ("/b/{c:path}", ["POST"])):
        other.route(path, methods)(ask if path == "/a" else (lambda c: c))
    other.route("/ask")(ask)
    assert [route.name for route in other.routes] == ["ask", "b_c", "post_b_c", "get_ask"]


def test_a_tool_says_what_it_is_for_and_does_not_contradict_itself() -> None:
    other = Application()
    with pytest.raises(InvalidInputError, match="a tool without a docstring"):
        other.route("/a", tool=True)(lambda: 1)

    def change() -> int:
        """Change something."""
        return 1

    with pytest.raises(InvalidInputError, match="read_only and destructive"):
        other.route("/a", read_only=True, destructive=True)(change)


async def test_on_item_gets_the_elements_as_they_come_and_its_own_failure_ends_the_call() -> None:
    seen: list[object] = []

    async def tell(item: object) -> None:
        seen.append(item)
        if item == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        await app.call(app.find("count"), {"to": 5}, on_item=tell)
    assert seen == [1, 2]
