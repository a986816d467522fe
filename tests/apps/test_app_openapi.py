"""The OpenAPI document: complete, its references resolve, and it says what the routes do."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from llmasos.apps import Application


class Source(BaseModel):
    title: str
    pages: list[int] = []


@dataclass
class Answer:
    text: str
    sources: list[Source]


@pytest.fixture
def app() -> Application:
    app = Application(title="Library", version="2.0")

    @app.route("/ask", examples=[{"question": "Why?", "words": 20}])
    def ask(
        question: str, words: Annotated[int, Field(ge=1, le=500)] = 50, style: Literal["long", "short"] = "long"
    ) -> Answer:
        """Answer a question.

        From the books alone.

        Args:
            question: What to ask.
        """
        raise NotImplementedError

    @app.route("/shelf/{shelf}/add")
    def add(shelf: int, source: Source) -> None:
        """Put a book on a shelf."""

    @app.route("/story")
    def story(topic, seeds: list[int] = []) -> Iterator[str]:  # noqa: B006
        yield topic

    return app


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_document_is_served_and_complete(app):
    document = app.test_client().get("/openapi.json").json()
    assert document == app.openapi()
    assert document["openapi"] == "3.1.0"
    assert document["info"] == {"title": "Library", "version": "2.0"}
    assert {(p, m) for p, m, _ in operations(document)} == {
        ("/ask", "get"), ("/ask", "post"), ("/shelf/{shelf}/add", "post"), ("/story", "get"), ("/story", "post")
    }  # fmt: skip


def test_every_reference_resolves_and_names_are_legal(app):
    document = app.openapi()
    found = set(references(document))
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"], reference
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in document["components"]["schemas"])


def test_operations_have_unique_ids_and_declare_every_path_parameter(app):
    document = app.openapi()
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    for path, _, operation in operations(document):
        declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", path))
        assert {"200", "422", "default"} <= set(operation["responses"])
        assert all(p["required"] for p in operation.get("parameters", []) if p["in"] == "path")


def test_words_limits_examples_and_results_are_those_of_the_function(app):
    document = app.openapi()
    get, post = document["paths"]["/ask"]["get"], document["paths"]["/ask"]["post"]
    assert (post["summary"], post["description"]) == ("Answer a question.", "From the books alone.")
    question, words, style = get["parameters"]
    assert (question["name"], question["required"], question["description"]) == ("question", True, "What to ask.")
    assert question["examples"] == {"example1": {"value": "Why?"}}
    assert (words["schema"]["minimum"], words["schema"]["maximum"], words["schema"]["default"]) == (1, 500, 50)
    assert style["schema"]["enum"] == ["long", "short"]
    body = post["requestBody"]["content"]["application/json"]
    assert body["examples"] == {"example1": {"value": {"question": "Why?", "words": 20}}}
    schema = document["components"]["schemas"][body["schema"]["$ref"].split("/")[-1]]
    assert schema["required"] == ["question"]
    assert schema["additionalProperties"] is False
    assert {p["name"]: p["schema"] for p in get["parameters"]}.keys() == schema["properties"].keys()
    result = document["components"]["schemas"][
        post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    ]
    assert set(result["properties"]) == {"text", "sources"}
    assert get["responses"] == post["responses"]


def test_the_body_leaves_out_what_is_in_the_path(app):
    operation = app.openapi()["paths"]["/shelf/{shelf}/add"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert (list(schema["properties"]), schema["required"]) == (["source"], ["source"])
    assert operation["parameters"][0]["schema"]["type"] == "integer"
    assert operation["responses"]["200"]["content"]["application/json"]["schema"] == {"type": "null"}


def test_a_stream_is_described_in_both_forms(app):
    get = app.openapi()["paths"]["/story"]["get"]
    content = get["responses"]["200"]["content"]
    assert content["text/event-stream"]["x-item-schema"] == {"type": "string"}
    assert content["application/json"]["schema"] == {"type": "string"}
    assert get["parameters"][0]["schema"]["type"] == "string", "an untyped input is text in a query"


def test_equal_names_of_different_types_stay_apart():
    app = Application()

    def make(kind: type) -> Any:
        class Item(BaseModel):
            value: kind  # type: ignore[valid-type]

        def save(item) -> None: ...

        save.__annotations__["item"] = Item
        return save

    app.route("/a")(make(int))
    app.route("/b")(make(str))

    class Item(BaseModel):
        native: bool

    def native(item): ...

    native.__annotations__["item"] = Item
    app.asgi.post("/c")(native)
    document = app.openapi()
    schemas = document["components"]["schemas"]

    def item_of(path: str) -> dict[str, Any]:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = schemas[schema["$ref"].removeprefix("#/components/schemas/")]
        return schemas[body["properties"]["item"]["$ref"].split("/")[-1]] if "item" in body["properties"] else body

    assert item_of("/a")["properties"]["value"]["type"] == "integer"
    assert item_of("/b")["properties"]["value"]["type"] == "string"
    assert item_of("/c")["properties"]["native"]["type"] == "boolean"


def test_the_page_loads_nothing_from_elsewhere(app):
    client = app.test_client()
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://", page.text)
    for url in re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text):
        assert client.get(url).status_code == 200, url
    assert client.get("/docs/pages/chat.js").status_code == 404
    assert client.get("/docs/%2e%2e/__init__.py").status_code == 404
    assert client.get("/docs/", follow_redirects=False).headers["location"] == "../docs"


def test_chats_and_sessions_are_described():
    from llmasos.apps import Session

    app = Application(title="Talks")

    @app.route("/x")
    def x(session: Session, a: int = 1) -> int:
        return a

    @app.chat
    def answer(messages):
        """Answer."""
        return "x"

    paths = app.openapi()["paths"]
    assert [one["name"] for one in paths["/x"]["get"]["parameters"]] == ["a", "LLMasOS-Session"]
    chat = paths["/v1/chat/completions"]["post"]
    assert chat["summary"] == "Answer."
    assert chat["requestBody"]["content"]["application/json"]["schema"]["properties"]["model"]["const"] == "app/talks"
