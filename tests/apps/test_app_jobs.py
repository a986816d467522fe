"""Calls as jobs: the same results, progress, an end at any time."""

import asyncio
import json
import threading
from contextlib import asynccontextmanager

import httpx
import pytest
from six_routes import CALLS, app

from llmasos.apps import Application, jobs, report_progress
from llmasos.errors import InvalidInputError

ASYNC = {"prefer": "respond-async, wait=1"}


@asynccontextmanager
async def client_of(application: Application):
    transport = httpx.ASGITransport(application)
    async with application.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


async def begun(client: httpx.AsyncClient, path: str, values: dict) -> str:
    answer = await client.post(path, json=values, headers=ASYNC)
    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async"), answer.text
    assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
    return answer.headers["location"]


async def events(client: httpx.AsyncClient, path: str) -> list[dict]:
    """The job at each change, until it was over."""
    text = (await client.get(f"{path}/events")).text
    assert text.endswith("event: done\ndata: {}\n\n")
    return [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: ")]


@pytest.mark.parametrize(("name", "values", "result"), [call for call in CALLS if call[0] != "note"])
async def test_a_job_gives_what_every_surface_gives(name: str, values: dict, result: object) -> None:
    async with client_of(app) as client:
        path = await begun(client, f"/{name}", values)
        last = (await events(client, path))[-1]
        assert (last["state"], last["result"], last["route"], last["error"]) == ("done", result, name, None)
        assert (await client.get(path)).json() == last == (await client.get("/jobs")).json()[0]
        assert last["num_items"] == (3 if name in ("say", "count") else 0)


async def test_wrong_inputs_are_refused_before_there_is_a_job() -> None:
    async with client_of(app) as client:
        before = (await client.get("/jobs")).json()
        assert (await client.post("/add", json={"a": "x"}, headers=ASYNC)).status_code == 422
        assert (await client.get("/jobs")).json() == before


async def test_failures_are_problem_documents() -> None:
    async with client_of(app) as client:
        last = (await events(client, await begun(client, "/box", {"points": []})))[-1]
        assert (last["state"], last["error"]["status"], last["error"]["code"]) == ("failed", 500, "internal")
        assert last["error"]["error_id"].startswith("err_")


@pytest.mark.parametrize("plain", [True, False])
async def test_functions_say_how_far_they_are(plain: bool) -> None:
    other, gate = Application(), threading.Event()

    def work() -> int:
        report_progress(0.25, "reading")
        gate.wait(30)
        report_progress(message="writing")
        return 7

    async def work_async() -> int:
        return await asyncio.to_thread(work)

    other.route("/work")(work if plain else work_async)
    async with client_of(other) as client:
        path = await begun(client, "/work", {})
        while (job := (await client.get(path)).json())["progress"] is None:
            await asyncio.sleep(0.01)
        assert (job["state"], job["progress"], job["message"], job["result"]) == ("running", 0.25, "reading", None)
        gate.set()
        last = (await events(client, path))[-1]
        assert (last["state"], last["progress"], last["message"], last["result"]) == ("done", 1.0, "writing", 7)
    report_progress(0.5)  # nobody listens
    with pytest.raises(InvalidInputError, match="no share"):
        report_progress(50)


async def test_a_job_is_ended_and_its_generator_closed() -> None:
    other, closed = Application(), asyncio.Event()

    @other.route("/endless")
    async def endless():
        try:
            while True:
                yield 1
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with client_of(other) as client:
        path = await begun(client, "/endless", {})
        while not (await client.get(path)).json()["num_items"]:
            await asyncio.sleep(0.01)
        assert (await client.delete(path)).json()["state"] == "cancelled"
        await asyncio.wait_for(closed.wait(), 10)
        assert (await events(client, path))[-1]["state"] == "cancelled"
        assert (await client.delete(path)).json()["state"] == "cancelled"


async def test_what_a_thread_gives_after_the_end_is_thrown_away_and_a_stop_ends_all() -> None:
    other, gate = Application(), threading.Event()
    other.route("/wait")(lambda: gate.wait(30))
    async with client_of(other) as client:
        paths = [await begun(client, "/wait", {}) for _ in range(2)]
        ending = asyncio.ensure_future(client.delete(paths[0]))
        await asyncio.sleep(0)
        gate.set()
        assert (await ending).json()["state"] == "cancelled"
        gate.clear()
        running = await begun(client, "/wait", {})
        id = running.rpartition("/")[2]
        asyncio.get_running_loop().call_later(0.05, gate.set)
    assert other._jobs.get(id).state == "cancelled"
    assert (await other._jobs.cancel(id)).state == "cancelled"


async def test_jobs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "KEPT", 3)
    monkeypatch.setattr(jobs, "AT_ONCE", 2)
    other, gate = Application(), asyncio.Event()

    @other.route("/wait")
    async def wait(n: int) -> int:
        if n > 3:
            await gate.wait()
        return n

    async with client_of(other) as client:
        for n in range(4):
            await events(client, await begun(client, "/wait", {"n": n}))
        assert [job["result"] for job in (await client.get("/jobs")).json()] == [3, 2, 1]
        held = [await begun(client, "/wait", {"n": 9}) for _ in range(2)]
        refused = await client.post("/wait", json={"n": 1}, headers=ASYNC)
        assert (refused.status_code, refused.json()["code"]) == (409, "busy")
        gate.set()
        assert [(await events(client, path))[-1]["result"] for path in held] == [9, 9]
        missing = await client.get("/jobs/job_none")
        assert (missing.status_code, missing.json()["code"]) == (404, "job_not_found")
        assert (await client.get("/jobs/job_none/events")).status_code == 404
        assert (await client.delete("/jobs/job_none")).status_code == 404


async def test_a_get_may_become_a_job_and_a_mounted_application_says_where_it_is() -> None:
    from fastapi import FastAPI

    site = FastAPI(lifespan=app.lifespan)
    site.mount("/ai", app)
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://site") as client:
        answer = await client.get("/ai/add", params={"a": 1}, headers=ASYNC)
        assert answer.headers["location"].startswith("/ai/jobs/job_")
        assert (await events(client, answer.headers["location"]))[-1]["result"] == 3


def test_paths_of_jobs_are_taken() -> None:
    with pytest.raises(InvalidInputError, match="belongs to every application"):
        Application().route("/jobs/{name}")(lambda name: name)
