"""Routes over HTTP: every kind of input, results, errors, hooks, mounting."""

import enum
import functools
import json
import sys
import threading
import types
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from llmasos.apps import Application
from llmasos.errors import ContextOverflowError, InvalidInputError, NetworkError

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Address(BaseModel):
    city: str
    zip: Annotated[str, Field(pattern=r"^\d{5}$")] | None = None


class Person(BaseModel):
    name: str
    addresses: list[Address] = []


@dataclass
class Settings:
    depth: int = 1
    words: list[str] = field(default_factory=list)


@pytest.fixture
def app() -> Application:
    return Application(title="Tests")


def client(app: Application) -> Any:
    return app.test_client()


def test_an_unannotated_parameter_is_text_in_a_query_and_any_json_in_a_body(app):
    @app.route("/ask")
    def ask(question):
        return {"question": question}

    assert client(app).get("/ask", params={"question": "7"}).json() == {"question": "7"}
    for value in ("why", 7, None, [1, {"a": 2}]):
        assert client(app).post("/ask", json={"question": value}).json() == {"question": value}


def test_a_default_gives_an_unannotated_parameter_its_type(app):
    @app.route("/ask")
    def ask(question="why", n=3, warm=0.5, short=False, extra=None):
        return [question, n, warm, short, extra]

    assert client(app).get("/ask").json() == ["why", 3, 0.5, False, None]
    assert client(app).get("/ask?n=4&warm=1&short=true").json() == ["why", 4, 1.0, True, None]
    assert client(app).post("/ask", json={"n": "many"}).status_code == 422


@pytest.mark.parametrize(
    ("hint", "query", "expected"),
    [
        (str, "a b", "a b"),
        (int, "-4", -4),
        (float, "0.5", 0.5),
        (bool, "true", True),
        (int | None, "3", 3),
        (Literal["long", "short"], "short", "short"),
        (Colour, "blue", "blue"),
        (date, "2026-01-31", "2026-01-31"),
        (list[int], ["1", "2"], [1, 2]),
        (list[str] | None, ["a"], ["a"]),
        (set[int], ["2", "2"], [2]),
        (tuple[int, str], ["2", "b"], [2, "b"]),
        (str | list[str], "a", "a"),
        (str | list[str], ["a", "b"], ["a", "b"]),
        (Annotated[int, Field(ge=1, le=5)], "5", 5),
    ],
)
def test_a_query_and_a_body_give_the_same_result(app, hint, query, expected):
    def echo(value):
        return value

    echo.__annotations__ = {"value": hint, "return": hint}
    app.route("/echo")(echo)
    by_query = client(app).get("/echo", params={"value": query})
    by_body = client(app).post("/echo", json={"value": expected})
    assert by_query.json() == by_body.json() == expected, by_query.text
    assert by_query.headers["content-type"] == "application/json"


def test_nested_models_and_dataclasses_come_as_json_and_only_by_post(app):
    @app.route("/invite")
    def invite(person: Person, settings: Settings = Settings(), tags: dict[str, int] | None = None) -> dict[str, Any]:  # noqa: B008
        assert isinstance(person.addresses[0], Address)
        assert isinstance(settings, Settings)
        return {"city": person.addresses[0].city, "depth": settings.depth, "tags": tags}

    body = {"person": {"name": "Ada", "addresses": [{"city": "London"}]}, "settings": {"depth": 2}, "tags": {"x": 1}}
    assert client(app).post("/invite", json=body).json() == {"city": "London", "depth": 2, "tags": {"x": 1}}
    assert client(app).get("/invite").status_code == 405
    body["person"]["addresses"][0]["zip"] = "x"
    answer = client(app).post("/invite", json=body).json()
    assert answer["detail"][0]["loc"][:5] == ["body", "person", "addresses", 0, "zip"]
    assert "person.addresses.0.zip" in answer["message"]


@pytest.mark.parametrize("name", ["json", "model_config", "copy", "_hidden", "schema", "self", "request", "input_0"])
def test_a_parameter_may_have_any_name(app, name):
    scope: dict[str, Any] = {}
    exec(f"def echo(other: int, {name}: int): return [other, {name}]", scope)
    app.route("/echo")(scope["echo"])
    assert client(app).post("/echo", json={"other": 1, name: 2}).json() == [1, 2]
    assert client(app).get(f"/echo?other=1&{name}=2").json() == [1, 2]


def test_an_alias_is_the_name_that_callers_write(app):
    @app.route("/go")
    def go(max_words: Annotated[int, Field(alias="max-words")]) -> int:
        return max_words

    assert client(app).get("/go?max-words=3").json() == 3
    assert client(app).get("/go?max_words=3").status_code == 422


def test_path_parameters_are_typed_and_stand_beside_the_body(app):
    @app.route("/items/{id}")
    def item(id: int, note: str = "") -> dict[str, Any]:
        return {"id": id, "note": note}

    assert client(app).get("/items/7?note=a").json() == {"id": 7, "note": "a"}
    assert client(app).post("/items/7", json={"note": "b"}).json() == {"id": 7, "note": "b"}
    assert client(app).get("/items/x").json()["detail"][0]["loc"] == ["path", "id"]
    assert client(app).get("/items/x").json()["detail"][0]["input"] == "x"
    twice = client(app).post("/items/7", json={"id": 8})
    assert twice.status_code == 422
    assert twice.json()["detail"][0]["loc"] == ["body", "id"]


def test_a_path_parameter_can_take_the_rest_of_the_path(app):
    @app.route("/files/{name:path}", methods=["GET"])
    def read(name: str) -> str:
        return name

    assert client(app).get("/files/a/b.txt").json() == "a/b.txt"
    assert "/files/{name}" in app.openapi()["paths"]


@pytest.mark.parametrize(
    ("body", "loc", "given", "words"),
    [
        ({}, ["body", "question"], {}, "question: Field required"),
        ({"question": 5}, ["body", "question"], 5, "question: Input should be a valid string (given 5)"),
        ({"question": "a", "words": 0}, ["body", "words"], 0, "greater than or equal to 1 (given 0)"),
        ({"question": "a", "words": "many"}, ["body", "words"], "many", '(given "many")'),
        ({"question": "a", "style": "odd"}, ["body", "style"], "odd", "'long' or 'short'"),
        ({"question": "a", "wrods": 1}, ["body", "wrods"], 1, "wrods: No such input (given 1)"),
        ([1], ["body"], [1], "must be a JSON object"),
        (None, ["body"], None, "must be a JSON object"),
    ],
)
def test_wrong_input_is_a_422_that_names_field_reason_and_value(app, body, loc, given, words):
    @app.route("/ask")
    def ask(question: str, words: Annotated[int, Field(ge=1)] = 5, style: Literal["long", "short"] = "long") -> str:
        raise AssertionError("must not run")

    answer = client(app).post("/ask", content=json.dumps(body), headers={"Content-Type": "application/json"})
    problem = answer.json()
    assert answer.status_code == problem["status"] == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["code"] == "wrong_input"
    assert problem["detail"][0]["loc"] == loc
    assert problem["detail"][0]["input"] == given
    assert words in problem["message"]
    if "wrods" in (body or {}):
        assert problem["hint"] == "Known: question, words, style."


def test_every_wrong_field_is_named_at_once_and_long_values_are_shortened(app):
    @app.route("/ask")
    def ask(a: int, b: int) -> int:
        return a + b

    problem = client(app).post("/ask", json={"a": "x" * 1_000_000, "b": list(range(1000)), "c": 1}).json()
    assert [e["loc"][-1] for e in problem["detail"]] == ["a", "b", "c"]
    assert len(str(problem)) < 3000
    assert "(1000000 characters)" in problem["message"]


def test_queries_are_as_strict_as_bodies(app):
    @app.route("/ask")
    def ask(n: int, x: float = 0.0) -> int:
        return n

    for query, field_ in [("", "n"), ("n=", "n"), ("n=a", "n"), ("n=1&n=2", "n"), ("n=1&m=2", "m"), ("n=1&x=nan", "x")]:
        answer = client(app).get(f"/ask?{query}")
        assert answer.status_code == 422, query
        assert answer.json()["detail"][0]["loc"] == ["query", field_]
    stray = client(app).post("/ask?n=1", json={"n": 1})
    assert stray.json()["detail"][0]["loc"] == ["query", "n"]


@pytest.mark.parametrize(
    "body", [b"{", b"{'a': 1}", b'{"n": NaN}', b'{"n": "\\ud800"}', b'{"n": "\xff"}', b"[" * 100_000, b"1" * 100_000]
)
def test_malformed_json_is_a_400_that_says_where(app, body):
    @app.route("/ask")
    def ask(n: Any) -> Any:
        return n

    answer = client(app).post("/ask", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["code"] == "malformed_json"
    assert "line 1 column" in answer.json()["message"]


def test_a_body_that_is_not_declared_as_json_gets_the_flag_that_is_missing(app):
    @app.route("/ask")
    def ask(n: int = 1) -> int:
        return n

    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        answer = client(app).post("/ask", content=b'{"n": 2}', headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert "Content-Type: application/json" in answer.json()["hint"]
    assert (
        client(app)
        .post("/ask", content=b'{"n": 2}', headers={"Content-Type": "application/json; charset=utf-8"})
        .json()
        == 2
    )
    assert client(app).post("/ask").json() == 1, "no body: the defaults"


def test_a_function_without_parameters_refuses_input(app):
    @app.route("/now")
    def now() -> str:
        return "now"

    assert client(app).get("/now").json() == client(app).post("/now").json() == client(app).post("/now", json={}).json()
    assert client(app).get("/now?a=1").json()["hint"] == "It takes no input."


def test_results_are_the_bare_json_of_the_return_annotation(app):
    app.route("/text")(lambda: "é")

    @app.route("/model")
    def model() -> Person:
        return {"name": "Ada", "addresses": [{"city": "X"}]}  # type: ignore[return-value]

    @app.route("/data")
    def data() -> list[Settings]:
        return [Settings(2, ["a"])]

    @app.route("/nothing")
    def nothing() -> None:
        return None

    @app.route("/own")
    def own():
        return PlainTextResponse("as it is", 201)

    @app.route("/later")
    async def later() -> Colour:
        return Colour.RED

    http = client(app)
    assert http.get("/text").content == '"é"'.encode()
    assert http.get("/model").json() == {"name": "Ada", "addresses": [{"city": "X", "zip": None}]}
    assert http.get("/data").json() == [{"depth": 2, "words": ["a"]}]
    assert http.get("/nothing").content == b"null"
    assert (http.get("/own").text, http.get("/own").status_code) == ("as it is", 201)
    assert http.get("/later").json() == "red"


def test_a_failing_function_is_a_500_with_the_id_of_its_traceback_and_the_app_lives_on(app, caplog):
    @app.route("/divide")
    def divide(by: int) -> float:
        return 1 / by

    answer = client(app).get("/divide?by=0")
    problem = answer.json()
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["error_id"].startswith("err_")
    assert "division" not in answer.text, "what went wrong inside is not for callers"
    assert [r for r in caplog.records if problem["error_id"] in r.getMessage() and r.exc_info]
    assert "ZeroDivisionError" in caplog.text
    assert client(app).get("/divide?by=2").json() == 0.5


@pytest.mark.parametrize(
    "error", [SystemExit(1), StopIteration(), RecursionError(), MemoryError(), ExceptionGroup("g", [KeyError()])]
)
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_no_exception_of_a_function_reaches_the_server(app, caplog, error, kind):
    def plain():
        raise error

    async def later():
        raise error

    app.route("/fail")(plain if kind == "plain" else later)
    assert client(app).get("/fail").status_code == 500


def test_a_result_that_breaks_the_annotation_is_the_functions_fault(app, caplog):
    @app.route("/count")
    def count() -> int:
        return "many"  # type: ignore[return-value]

    @app.route("/thing")
    def thing():
        return {"x": object()}

    assert client(app).get("/count").status_code == 500
    assert client(app).get("/thing").status_code == 500
    assert "valid integer" in caplog.text


def test_errors_of_ours_keep_status_message_and_hint(app, caplog):
    @app.route("/long")
    def long() -> str:
        raise ContextOverflowError(90, 20, 100)

    @app.route("/away")
    def away() -> str:
        raise NetworkError("The hub did not answer.", hint="Try again.")

    @app.route("/teapot")
    def teapot() -> str:
        raise HTTPException(418, "short and stout", headers={"X-Tea": "green"})

    problem = client(app).get("/long").json()
    assert (problem["status"], problem["code"], problem["param"]) == (400, "context_overflow", "max_tokens")
    assert "110" in problem["message"]
    assert "at most 10" in problem["hint"]
    assert not caplog.records, "a caller's mistake is no line in the log"
    problem = client(app).get("/away").json()
    assert (problem["status"], problem["message"], problem["hint"]) == (502, "The hub did not answer.", "Try again.")
    assert problem["error_id"] in caplog.text
    answer = client(app).get("/teapot")
    assert (answer.status_code, answer.json()["message"], answer.headers["x-tea"]) == (418, "short and stout", "green")


def test_a_validator_that_raises_our_error_keeps_its_words(app):
    @dataclass
    class Even:
        n: int

        def __post_init__(self) -> None:
            if self.n % 2:
                raise InvalidInputError(f"n={self.n} is odd.", param="n")

    def go(even):
        return even.n

    go.__annotations__ = {"even": Even, "return": int}
    app.route("/go")(go)
    assert client(app).post("/go", json={"even": {"n": 3}}).json()["message"] == "n=3 is odd."


def test_unknown_paths_and_methods_are_problems_too(app):
    app.route("/ask", methods=["POST"])(lambda: 1)
    missing, wrong = client(app).get("/aks"), client(app).get("/ask")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert "GET /" in missing.json()["hint"]
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")


def test_methods_are_as_asked_for(app):
    @app.route("/note", methods=["put", "DELETE"])
    def note(id: int) -> int:
        return id

    assert app.routes[0].methods == ("PUT", "DELETE")
    assert client(app).put("/note", json={"id": 3}).json() == 3
    assert client(app).delete("/note?id=3").json() == 3
    assert client(app).get("/note?id=3").status_code == 405


def test_two_functions_can_share_a_path_with_different_methods(app):
    app.route("/note", methods="GET")(lambda: "read")
    app.route("/note", methods="POST")(lambda: "written")
    assert client(app).get("/note").json() == "read"
    assert client(app).post("/note").json() == "written"
    assert set(app.openapi()["paths"]["/note"]) == {"get", "post"}


def test_the_decorated_function_stays_a_plain_function(app):
    def ask(question: str) -> str:
        return question.upper()

    assert app.route("/ask")(ask) is ask
    assert ask("a") == "A"


def test_blocking_functions_run_side_by_side(app):
    barrier = threading.Barrier(4, timeout=20)

    @app.route("/wait")
    def wait() -> int:
        return barrier.wait()

    with client(app) as http:
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(http.get("/wait").json())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answers) == [0, 1, 2, 3]


def test_the_root_lists_the_routes_and_health_is_ok(app):
    @app.route("/ask")
    def ask(question):
        """Answer a question."""

    answer = client(app).get("/").json()
    assert answer["title"] == "Tests"
    assert answer["routes"] == [
        {"path": "/ask", "methods": ["GET", "POST"], "summary": "Answer a question.", "streams": False}
    ]
    assert client(app).get("/healthz").json() == {"status": "ok"}


def test_an_app_may_have_a_root_of_its_own(app):
    app.route("/")(lambda: "mine")
    assert client(app).get("/").json() == "mine"
    assert client(app).post("/").json() == "mine"


def test_hooks_run_around_the_requests_in_order(app):
    seen: list[str] = []

    @app.on_start
    def first() -> None:
        seen.append("first")
        app.state.answer = 42

    @app.on_start
    async def second() -> None:
        seen.append("second")

    app.on_stop(lambda: seen.append("stop, defined first"))

    @app.on_stop
    async def stop() -> None:
        seen.append("stop, defined last")

    app.route("/answer")(lambda: app.state.answer)
    with client(app) as http:
        assert http.get("/answer").json() == 42
        assert seen == ["first", "second"]
    assert seen[2:] == ["stop, defined last", "stop, defined first"]


def test_a_request_before_the_start_hooks_is_told_so(app):
    app.on_start(lambda: None)
    app.route("/ask")(lambda: 1)
    problem = client(app).get("/ask").json()
    assert problem["status"] == 500
    assert "lifespan=app.lifespan" in problem["hint"]


def test_a_failing_stop_hook_does_not_keep_the_others_from_running(app, caplog):
    seen: list[int] = []
    app.on_stop(lambda: seen.append(1))
    app.on_stop(lambda: 1 / 0)
    with client(app):
        pass
    assert seen == [1]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("host", ["fastapi", "starlette"])
def test_an_app_can_be_mounted_in_another_one(app, host):
    from starlette.testclient import TestClient

    started: list[int] = []
    app.on_start(lambda: started.append(1))
    app.route("/ask")(lambda question="why": question)
    if host == "fastapi":
        outer: Any = FastAPI(lifespan=app.lifespan)
        outer.mount("/bot", app)
    else:
        outer = Starlette(routes=[Mount("/bot", app)], lifespan=app.lifespan)
    with TestClient(outer) as http:
        assert http.get("/bot/ask").json() == "why"
        assert http.get("/bot/ask?x=1").status_code == 422
        assert http.get("/bot/nowhere").json()["code"] == "not_found"
        assert http.get("/bot/openapi.json").json()["servers"] == [{"url": "/bot"}]
        assert http.get("/bot/").json()["title"] == "Tests"
    assert started == [1]


def test_fastapi_routes_and_middleware_can_be_added(app):
    app.route("/ask")(lambda question: question)

    @app.asgi.get("/native/{n}")
    def native(n: int, request: Request) -> dict[str, int]:
        return {"n": n}

    assert client(app).get("/native/3").json() == {"n": 3}
    assert {"/ask", "/native/{n}"} <= set(app.openapi()["paths"])


def test_a_model_is_handed_through_and_a_name_is_loaded_once_on_first_use(monkeypatch):
    model = object()
    assert Application(model).model is model
    assert Application(model).llm is model
    loaded: list[str] = []
    zoo = types.ModuleType("llmasos.model_zoo")
    zoo.get_model = lambda name: loaded.append(name) or model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmasos.model_zoo", zoo)
    app = Application("smollm2-135m-instruct")
    assert loaded == []
    assert app.model is app.llm is model
    assert loaded == ["smollm2-135m-instruct"]
    with pytest.raises(InvalidInputError, match="without a model"):
        _ = Application().model


@given(ANYTHING)
def test_no_json_makes_a_typed_route_fail(body):
    answer = _echo_client().post("/echo", json=body)
    assert answer.status_code in (200, 422), answer.text
    assert answer.json() is not None


@given(
    st.dictionaries(st.sampled_from(["text", "n", "x", "choice", "many", "person", "any", "?"]), ANYTHING, max_size=5)
)
def test_no_json_object_makes_a_typed_route_fail(body):
    answer = _echo_client().post("/echo", json={"text": "a", **body})
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code == 422:
        named = [e["loc"][1] for e in answer.json()["detail"]]
        assert set(named) <= set(body)
        assert named[0] in answer.json()["message"]
    else:
        assert answer.json()["text"] == body.get("text", "a")


@given(st.binary(max_size=40) | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_no_bytes_make_a_route_fail(body):
    answer = _echo_client().post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


@given(st.text(), st.text())
def test_no_query_makes_a_route_fail(name, value):
    answer = _echo_client().get("/query", params={"text": "a", name: value} if name else {"text": value})
    assert answer.status_code in (200, 422), answer.text


@functools.cache
def _echo_client() -> Any:
    app = Application()

    @app.route("/echo")
    def echo(
        text: str,
        n: Annotated[int, Field(ge=0)] = 1,
        x: float = 0.5,
        choice: Literal["a", "b"] = "a",
        many: list[int] | None = None,
        person: Person | None = None,
        any: Any = None,
    ) -> dict[str, Any]:
        return {"text": text, "n": n, "x": x, "choice": choice, "many": many, "person": person, "any": any}

    @app.route("/query")
    def query(text: str, n: int = 1, many: list[str] = []) -> list[Any]:  # noqa: B006
        return [text, n, many]

    return app.test_client()


async def test_a_hosted_one_names_paths_as_they_were_asked_for():
    place = httpx.ASGITransport(Application(), root_path="/apps/x")
    async with httpx.AsyncClient(transport=place, base_url="http://localhost") as client:
        found = (await client.get("/apps/x/nope")).json()
    assert (found["message"], found["hint"]) == ("There is no GET /apps/x/nope.", "GET /apps/x/ lists the routes.")


def test_a_path_that_is_not_there_is_named():
    with Application().test_client() as client:
        assert client.get("/nope").json()["message"] == "There is no GET /nope."
        assert client.get("/nope").json()["hint"] == "GET / lists the routes."
        assert client.post("/healthz").json()["message"] == "There is no POST /healthz."
