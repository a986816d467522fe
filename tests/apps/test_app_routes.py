"""Reading a function's description: what is refused at decoration, and what words are taken from the docstring."""

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, ValidationError

from llmasos.apps import Application
from llmasos.apps.routes import describe
from llmasos.errors import InvalidInputError


class Point(BaseModel):
    x: int


def refuse(words: str, path: Any = "/ask", methods: Any = None, **options: Any) -> Callable[[Any], None]:
    def check(function: Any) -> None:
        with pytest.raises(InvalidInputError, match=words) as caught:
            Application().route(path, methods, **options)(function)
        assert getattr(function, "__name__", "") in str(caught.value)

    return check


def test_parameters_that_a_request_cannot_name_are_refused():
    refuse(r"'words' of ask\(\) is of the kind \*words")(_named("ask", "*words"))
    refuse(r"'more' of ask\(\) is of the kind \*\*more")(_named("ask", "**more"))
    refuse(r"'a' of ask\(\) is positional-only")(_named("ask", "a, /"))


def _named(name: str, parameters: str) -> Any:
    scope: dict[str, Any] = {}
    exec(f"def {name}({parameters}): pass", scope)
    return scope[name]


def test_types_that_json_cannot_hold_are_refused_by_name():
    class Thing:
        pass

    def ask(a: int, thing): ...

    for hint in (Thing, Callable[[int], int], list[Thing]):
        ask.__annotations__["thing"] = hint
        refuse(r"'thing' of ask\(\).*can't be written as JSON")(ask)

    def give(): ...

    give.__annotations__["return"] = Thing
    refuse(r"give\(\) returns .*Thing.* can't be written as JSON")(give)


def test_hints_that_do_not_resolve_are_refused():
    def ask(thing: "Nowhere"): ...  # type: ignore[name-defined]  # noqa: F821

    refuse(r"type hint of ask\(\) can't be resolved.*Nowhere")(ask)


def test_a_field_as_default_is_refused_with_the_right_way_to_write_it():
    def ask(n: int = Field(ge=1)): ...

    refuse(r"Annotated\[TYPE, Field")(ask)


@pytest.mark.parametrize("path", ["ask", "", "ask/{id}"])
def test_a_path_without_a_slash_is_refused(path):
    def ask(id=1): ...

    refuse("does not begin with a slash", path)(ask)


def test_a_decorator_without_a_path_is_refused():
    def ask(): ...

    with pytest.raises(InvalidInputError, match=r'@app.route\("/ask"\)'):
        Application().route(ask)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "words"), [("/a/{id}", "no parameter of that name"), ("/a/{}", "not a parameter"), ("/{n}/{n}", "twice")]
)
def test_placeholders_must_be_parameters(path, words):
    def ask(n: int): ...

    refuse(words, path)(ask)


def test_a_path_holds_one_plain_value():
    def ask(p: Point): ...

    refuse("a path holds one plain value", "/{p}")(ask)

    def many(p: list[int]): ...

    refuse("a path holds one plain value", "/{p}")(many)


def test_get_with_nested_input_is_refused():
    def ask(p: Point): ...

    refuse(r"'p' of ask\(\) is nested", methods=["GET"])(ask)
    assert describe(ask, "/ask", None).methods == ("POST",)


@pytest.mark.parametrize("methods", [["FETCH"], "SEND", []])
def test_unknown_methods_are_refused(methods):
    def ask(): ...

    refuse("not a method", methods=methods)(ask)


def test_a_class_is_not_a_function():
    refuse("decorates a function")(Point)


@pytest.mark.parametrize(("first", "second"), [("/a", "/a"), ("/a/{id}", "/a/{name}"), ("/a/{id:int}", "/a/{name}")])
def test_a_path_and_method_can_be_taken_once(first, second):
    app = Application()
    app.route(first, methods=["GET"])(lambda id=1: 1)

    def ask(id=1, name=""): ...

    with pytest.raises(InvalidInputError, match=r"GET .* of ask\(\) is taken"):
        app.route(second)(ask)
    app.route(second, methods=["POST"])(ask)


@pytest.mark.parametrize("path", ["/healthz", "/docs", "/openapi.json"])
def test_the_paths_of_every_application_are_reserved(path):
    def ask(): ...

    refuse("belongs to every application", path)(ask)


def test_examples_must_be_valid_input():
    def ask(n: int): ...

    refuse("example .* of ask", examples=[{"n": "x"}])(ask)


@pytest.mark.parametrize(
    "parameters",
    [
        "Args:\n        n: How many\n            of them.\n        style: Which way.",
        ":param n: How many of them.\n    :param style: Which way.",
    ],
)
def test_summary_description_and_notes_come_from_the_docstring(parameters):
    def ask(n: int, style: str = "", other: Annotated[int, Field(description="Own words.")] = 1): ...

    ask.__doc__ = f"""Answer it.

    At some
    length.

    {parameters}
    """
    route = describe(ask, "/ask", None)
    assert route.summary == "Answer it."
    assert route.description == "At some\nlength."
    assert [i.description for i in route.inputs] == ["How many of them.", "Which way.", "Own words."]


def test_a_function_without_words_is_summarised_by_its_name():
    def make_story(): ...

    assert describe(make_story, "/x", None).summary == "Make story"


def test_arguments_leave_what_is_absent_to_the_function():
    def ask(a: int, b: list[int] = [], c: str = "x"): ...  # noqa: B006

    route = describe(ask, "/ask", None)
    assert route.arguments({"a": "3"}) == {"a": 3}
    assert route.arguments({"a": 3, "b": [1], "c": "y"}) == {"a": 3, "b": [1], "c": "y"}
    with pytest.raises(ValidationError):
        route.arguments({"a": float("inf")})


def test_streams_are_known_by_the_function_or_its_annotation():
    def numbers() -> Iterator[int]:
        yield 1

    def words() -> Generator[str, None, None]:
        yield "a"

    async def later() -> AsyncIterator[Point]:
        yield Point(x=1)

    def bare():
        yield 1

    def handed_on() -> Iterator[str]:
        return words()

    def listed() -> list[str]:
        return []

    found = {f.__name__: describe(f, "/x", None) for f in (numbers, words, later, bare, handed_on, listed)}
    assert [name for name, r in found.items() if r.streams] == ["numbers", "words", "later", "bare", "handed_on"]
    assert [name for name, r in found.items() if r.joins] == ["words", "handed_on"]
    assert found["numbers"].result.json_schema() == {"type": "array", "items": {"type": "integer"}}
    assert found["bare"].collect([1, "a"]) == b'[1,"a"]'
    assert found["bare"].collect(["b", "a"]) == b'"ba"'
    assert found["bare"].collect([]) == b"[]"
    assert found["words"].collect([]) == b'""'


def test_a_type_that_can_not_be_described_is_refused_with_the_reason():
    def call(f: Callable[[int], int]) -> None: ...

    with pytest.raises(InvalidInputError, match=r"can't be written as JSON: .*Callable"):
        describe(call, "/call", None)
