"""Clients of applications: the same results over the wire, jobs, errors; the sync and the async one alike."""

import inspect
from collections.abc import Iterator

import httpx
import pytest
from served import served
from six_routes import CALLS, app

from llmasos.apps import Application, report_progress
from llmasos.client import AppClient, AsyncAppClient
from llmasos.client.app import UNSET
from llmasos.errors import BadRequestError, InvalidInputError, NotFoundError, ProviderError


@pytest.fixture(scope="module")
def client() -> Iterator[AppClient]:
    with served(app) as url, AppClient(url) as found:
        yield found


@pytest.mark.parametrize(("name", "values", "result"), CALLS)
def test_a_call_gives_what_every_surface_gives(client: AppClient, name: str, values: dict, result: object) -> None:
    assert client.call(name, **values) == result
    if app.find(name).streams:
        items = list(client.stream(name, **values))
        assert ("".join(items) if name == "say" else items) == result
    assert client.wait(client.start(name, **values)).result == result


async def test_the_async_client_does_the_same() -> None:
    transport = httpx.ASGITransport(app)
    async with app.lifespan(), AsyncAppClient("http://app", transport=transport) as client:
        for name, values, result in CALLS:
            assert await client.call(name, **values) == result
        assert [item async for item in client.stream("count", to=3)] == [1, 2, 3]
        job = await client.start("say", words="a b")
        seen: list[str] = []
        assert (await client.wait(job, on_change=lambda job: seen.append(job.state))).result == "a b "
        assert (
            seen[-1] == "done" and (await client.job(job.id)).result == "a b " and (await client.jobs())[0].id == job.id
        )
        assert (await client.cancel(job)).state == "done"


def test_both_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        names = [n for n in dir(kind) if not n.startswith("_")]
        return {n: list(inspect.signature(getattr(kind, n)).parameters) for n in names if callable(getattr(kind, n))}

    assert methods(AppClient) == methods(AsyncAppClient)


def test_errors_have_the_applications_words(client: AppClient) -> None:
    with pytest.raises(BadRequestError, match="a: Input should be a valid integer") as caught:
        client.call("add", a="x")
    assert caught.value.server_code == "wrong_input"
    for broken in (lambda: client.call("box", points=[]), lambda: client.wait(client.start("box", points=[]))):
        with pytest.raises(ProviderError, match=r"box\(\) failed"):
            broken()
    with pytest.raises(NotFoundError, match="no route 'sub'") as missing:
        client.call("sub")
    assert "add, say" in missing.value.hint
    with pytest.raises(InvalidInputError, match="needs 'name'"):
        client.call("note")


def test_what_is_not_given_is_left_to_the_function_and_paths_hold_anything(client: AppClient) -> None:
    assert client.call("add", a=1, b=UNSET) == 3
    assert client.call("note", name="a b?c=1#d") is None
    assert repr(UNSET) == "UNSET" and not UNSET


def test_a_stream_that_fails_raises_after_its_elements_and_jobs_tell_progress() -> None:
    other = Application()

    @other.route("/broken")
    def broken(words: list[str]):
        yield from words
        raise KeyError("x")

    @other.route("/work", methods=["GET"])
    def work(words: list[str]) -> int:
        report_progress(0.5, "half")
        return len(words)

    with served(other) as url, AppClient(url) as client:
        seen = []
        with pytest.raises(ProviderError, match=r"broken\(\) failed"):
            for item in client.stream("broken", words=["a", "b"]):
                seen.append(item)
        assert seen == ["a", "b"]
        assert client.call("work", words=["a", "b c"]) == 2
        told = []
        client.wait(client.start("work", words=["a"]), on_change=lambda job: told.append((job.progress, job.message)))
        assert told[-1] == (1.0, "half")
