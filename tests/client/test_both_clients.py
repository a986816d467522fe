"""The blocking and the asyncio client have the same methods, the same signatures, the same documentation."""

import inspect

import pytest

from llmasos.client import AsyncClient, Client

SYNC, ASYNC = Client("http://127.0.0.1:1/v1"), AsyncClient("http://127.0.0.1:1/v1")


def namespaces() -> list[tuple[str, object, object]]:
    names = [
        name for name, value in inspect.getmembers(Client) if hasattr(value, "attrname") and not name.startswith("_")
    ]
    assert {"responses", "native"} <= set(names)
    return [("client", SYNC, ASYNC), *((name, getattr(SYNC, name), getattr(ASYNC, name)) for name in names)]


def methods(thing: object) -> dict[str, object]:
    return {name: f for name, f in inspect.getmembers(type(thing), inspect.isfunction) if not name.startswith("_")}


@pytest.mark.parametrize(("name", "sync", "asynchronous"), namespaces(), ids=lambda x: x if isinstance(x, str) else "")
def test_both_have_the_same_methods_with_the_same_signatures(name: str, sync: object, asynchronous: object) -> None:
    ours, theirs = methods(sync), methods(asynchronous)
    assert list(ours) == list(theirs) and ours
    for method in ours:
        a, b = inspect.signature(ours[method]), inspect.signature(theirs[method])
        assert a.parameters == b.parameters, method
        expected = str(a.return_annotation).replace(", None, None]", ", None]")  # an async generator returns nothing
        assert str(b.return_annotation).replace("Async", "") == expected, method
        streams = inspect.isgeneratorfunction(ours[method])
        assert inspect.isasyncgenfunction(theirs[method]) == streams, method
        assert inspect.iscoroutinefunction(theirs[method]) != streams, method
