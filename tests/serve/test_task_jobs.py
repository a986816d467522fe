"""Batches of tasks and pipelines as jobs of the server: over HTTP, with keys, and after it was killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from access_world import REQUIRED, bearer, client_of, make_key
from fake_llm import FakeLLM, ObedientLLM

from llmasos.apps.hosting import listen
from llmasos.errors import ModelCrashedError
from llmasos.serve.access.access import Access
from llmasos.serve.server import create_app
from llmasos.store.database import Database
from llmasos.tasks.history import open_history

TASKS, JOBS = "/llmasos/v1/tasks", "/llmasos/v1/jobs"
HERE = Path(__file__).parent


@asynccontextmanager
async def serving(llms: Any, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(llms, **options)
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


async def over(client: httpx.AsyncClient, id: str, **options: Any) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while (job := (await client.get(f"{JOBS}/{id}", **options)).json())["state"] in ("queued", "running"):
            await asyncio.sleep(0.005)
    return job


async def output(client: httpx.AsyncClient, job: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    answer = await client.get(f"/v1/files/{job['result']['output_file_id']}/content", **options)
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_lines_are_answered_in_order_with_errors_in_theirs(home: Path) -> None:
    async with serving(FakeLLM()) as client:
        body = {"task": "chat", "model": "fake", "lines": ["a", {"message": "b"}, {"mesage": "c"}, 7, ""]}
        made = await client.post(f"{TASKS}/batch", json=body)
        assert made.status_code == 202 and made.json()["kind"] == "task_batch", made.text
        events = (await client.get(f"{JOBS}/{made.json()['id']}/events")).text
        assert [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")][-1][
            "state"
        ] == "done"
        job = await over(client, made.json()["id"])
        counts = {name: job["result"][name] for name in ("total", "done", "failed")}
        assert (
            counts == {"total": 5, "done": 5, "failed": 3} and job["progress"] == 1 and job["name"] == "chat: 5 lines"
        )
        lines = await output(client, job)
        assert [one["index"] for one in lines] == list(range(5))
        assert [one["output"]["text"] for one in lines[:2]] == ["a!", "b!"]
        assert [one["error"]["code"] for one in lines[2:]] == ["invalid_input"] * 3
        assert [one["id"] for one in (await client.get(JOBS, params={"kind": "task_batch"})).json()["data"]] == [
            job["id"]
        ]
        assert not list((home / "jobs").iterdir())


async def test_an_uploaded_file_is_answered_paused_and_goes_on(home: Path) -> None:
    llm = FakeLLM(delay=0.002)
    async with serving(llm) as client:
        content = "".join(f'"line {i}"\n' for i in range(60)).encode()
        form: Any = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", content)}}
        file = (await client.post("/v1/files", **form)).json()["id"]
        body = {"task": "chat", "model": "fake", "input_file_id": file, "parallel": 4}
        id = (await client.post(f"{TASKS}/batch", json=body)).json()["id"]
        while not (job := (await client.get(f"{JOBS}/{id}")).json())["progress"]:
            await asyncio.sleep(0.002)
        await client.delete(f"/v1/files/{file}")  # the job has its own
        paused = (await client.post(f"{JOBS}/{id}/pause")).json()
        num_asked = len(llm.prompts)
        assert paused["state"] == "paused" and 0 < num_asked < 60 and llm.num_running == 0
        await asyncio.sleep(0.02)
        assert len(llm.prompts) == num_asked
        assert (await client.post(f"{JOBS}/{id}/resume")).json()["state"] == "queued"
        job = await over(client, id)
        assert job["name"] == "chat: in.jsonl"
        assert [one["output"]["text"] for one in await output(client, job)] == [f"line {i}!" for i in range(60)]


async def test_a_cancelled_batch_keeps_the_lines_that_are_done(home: Path) -> None:
    async with serving(FakeLLM(delay=0.005)) as client:
        body = {"task": "chat", "model": "fake", "lines": [f"line {i}" for i in range(200)], "parallel": 2}
        id = (await client.post(f"{TASKS}/batch", json=body)).json()["id"]
        while not (await client.get(f"{JOBS}/{id}")).json()["progress"]:
            await asyncio.sleep(0.002)
        job = (await client.post(f"{JOBS}/{id}/cancel")).json()
        lines = await output(client, job)
        assert job["state"] == "cancelled" and 0 < len(lines) == job["result"]["done"] < 200
        assert not list((home / "jobs").iterdir())


async def test_a_pipeline_gives_its_output_and_its_steps(home: Path) -> None:
    llm = ObedientLLM()
    async with serving(llm) as client:
        steps = [
            {"id": "moods", "task": "sentiment", "map": "${inputs.texts}", "inputs": {"text": "${item}"}},
            {"id": "none", "task": "chat", "inputs": {"message": "x"}, "when": False},
        ]
        pipeline = {"name": "moods", "steps": steps, "output": "${moods.label}"}
        body = {"pipeline": pipeline, "inputs": {"texts": ["good", "bad"]}, "model": "fake"}
        made = await client.post(f"{TASKS}/pipeline", json=body)
        assert made.status_code == 202, made.text
        job = await over(client, made.json()["id"])
        assert job["state"] == "done" and len(job["result"]["output"]) == 2, job
        assert [(s["id"], s["state"]) for s in job["result"]["steps"]] == [("none", "skipped"), ("moods", "done")]
        again = await over(client, (await client.post(f"{TASKS}/pipeline", json=body)).json()["id"])
        assert [step["num_cached"] for step in again["result"]["steps"]] == [0, 0]  # nobody reads another's results
        broken = {"steps": [{"id": "a", "task": "chat", "inputs": {"message": "${inputs.none}"}}]}
        failed = await over(
            client, (await client.post(f"{TASKS}/pipeline", json={**body, "pipeline": broken})).json()["id"]
        )
        with open_history() as history:
            runs = {run.id: run for run in history.list()}
        assert list(runs) == [failed["id"], again["id"], job["id"]], "`llmasos task runs` has them"
        kept = runs[job["id"]]
        assert (kept.pipeline, kept.model, kept.state) == ("moods", "fake", "done")
        assert kept.output == {"value": job["result"]["output"]} and len(kept.steps) == 2
        assert runs[failed["id"]].state == "failed" and "leads nowhere" in (runs[failed["id"]].error or "")


async def test_a_pipeline_that_is_cancelled_or_goes_on_is_one_run(home: Path) -> None:
    async with serving(FakeLLM(delay=0.02)) as client:
        steps = [{"id": "a", "task": "chat", "inputs": {"message": "x" * 60}}]
        made = await client.post(f"{TASKS}/pipeline", json={"pipeline": {"name": "p", "steps": steps}, "model": "fake"})
        id = made.json()["id"]

        async def state(wanted: str) -> tuple[str, str | None]:
            for _ in range(1000):
                with open_history() as history:
                    found = history.list()
                if found and found[0].state == wanted:
                    break
                await asyncio.sleep(0.01)
            [run] = found
            return run.id, run.error

        assert await state("running") == (id, None)
        assert (await client.post(f"{JOBS}/{id}/pause")).json()["state"] == "paused"
        assert await state("failed") == (id, "It was cancelled.")
        await client.post(f"{JOBS}/{id}/resume")
        assert await state("running") == (id, None)
        await client.post(f"{JOBS}/{id}/cancel")
        assert await state("failed") == (id, "It was cancelled.")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("batch", {"task": "dance", "lines": ["x"]}, 404, "no task 'dance'"),
        ("batch", {"task": "chat", "lines": ["x"], "model": "none"}, 404, "none"),
        ("batch", {"task": "chat"}, 400, "lines or input_file_id"),
        ("batch", {"task": "chat", "lines": []}, 400, "lines"),
        ("batch", {"task": "chat", "input_file_id": "file-none"}, 404, "no file"),
        ("batch", {"task": "chat", "input_file_id": "../../etc/passwd"}, 404, "no file"),
        ("batch", {"task": "chat", "lines": ["x"], "parallel": 0}, 400, "parallel"),
        ("pipeline", {"pipeline": {"steps": []}}, 400, "steps"),
        ("pipeline", {"pipeline": {"steps": [{"id": "a", "task": "dance"}]}}, 404, "dance"),
        ("pipeline", {"pipeline": {"steps": [{"id": "a", "task": "chat", "model": "/etc/passwd"}]}}, 404, "not served"),
        ("pipeline", {"pipeline": {"steps": [{"id": "a", "task": "chat", "inputs": {"x": 1}}]}}, 400, "no input"),
    ],
)
async def test_wrong_requests_make_no_job(home: Path, path: str, body: dict[str, Any], status: int, words: str) -> None:
    async with serving(FakeLLM()) as client:
        answer = await client.post(f"{TASKS}/{path}", json={"model": "fake", **body})
        assert answer.status_code == status and words in answer.text, answer.text
        assert (await client.get(JOBS)).json()["data"] == []


async def test_keys_have_their_own_jobs_files_and_counts(home: Path) -> None:
    with Database.open("sqlite://") as database:
        ann, bob, boss = make_key(database), make_key(database, "bob"), make_key(database, "boss", ("manage",))
        llm = FakeLLM()
        async with serving(llm, access=Access(database, REQUIRED)) as client:
            body = {"task": "chat", "model": "fake", "lines": ["a", "b"]}
            codes = [
                (await client.post(f"{TASKS}/batch", json=body, headers=bearer(key))).status_code for key in (boss, ann)
            ]
            assert codes == [403, 202]
            [job] = (await client.get(JOBS, headers=bearer(ann))).json()["data"]
            job = await over(client, job["id"], headers=bearer(ann))
            assert len(await output(client, job, headers=bearer(ann))) == 2
            for path in ("", f"/{job['id']}", f"/{job['id']}/events"):
                seen = await client.get(JOBS + path, headers=bearer(bob))
                assert seen.status_code == 404 if path else seen.json()["data"] == []
            assert (await client.post(f"{JOBS}/{job['id']}/cancel", headers=bearer(bob))).status_code == 404
            theirs = await client.get(f"/v1/files/{job['result']['output_file_id']}/content", headers=bearer(bob))
            assert theirs.status_code == 404
            assert [one["id"] for one in (await client.get(JOBS, headers=bearer(boss))).json()["data"]] == [job["id"]]
            used = (await client.get("/llmasos/v1/usage", headers=bearer(ann))).json()["data"]
            assert sum(row["requests"] for row in used) >= 2 and sum(row["output_tokens"] for row in used) > 0
            assert (await client.get(JOBS)).status_code == 401


async def test_a_batch_waits_for_a_crashed_model_and_gives_up_in_the_end(home: Path) -> None:
    class Crashing(FakeLLM):
        num_left = 2

        async def acomplete(self, *args: Any, **options: Any) -> Any:
            if self.num_left:
                self.num_left -= 1
                error = ModelCrashedError("It is gone.")
                error.retry_after = 0
                raise error
            return await super().acomplete(*args, **options)

        def astream_complete(self, *args: Any, **options: Any) -> Any:
            async def stream() -> Any:
                [found] = await self.acomplete([args[0]], *args[1:], **options)
                raise AssertionError(found)
                yield

            return stream() if self.num_left else super().astream_complete(*args, **options)

    llm = Crashing()
    async with serving(llm) as client:
        body = {"task": "chat", "model": "fake", "lines": ["a"], "parallel": 1}
        job = await over(client, (await client.post(f"{TASKS}/batch", json=body)).json()["id"])
        assert job["result"]["failed"] == 0
        llm.num_left = 99
        job = await over(client, (await client.post(f"{TASKS}/batch", json=body)).json()["id"])
        assert [one["error"]["code"] for one in await output(client, job)] == ["model_crashed"]


def test_a_batch_survives_a_killed_server_without_a_lost_or_doubled_line(home: Path) -> None:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "server_to_kill.py"), str(port), "0.001"]
    environment = {**os.environ, "LLMASOS_HOME": str(home), "PYTHONPATH": str(HERE)}
    url, num = f"http://127.0.0.1:{port}", 400
    job: dict[str, Any] = {}
    for kill_at in (0.1, 0.5, None):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            with httpx.Client(base_url=url) as client:
                if not job:
                    body = {"task": "chat", "model": "fake", "lines": [f"line {i}" for i in range(num)]}
                    job = client.post(f"{TASKS}/batch", json=body).json()
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:
                    now = client.get(f"{JOBS}/{job['id']}").json()
                    if now["state"] == "done" or (kill_at is not None and (now["progress"] or 0) >= kill_at):
                        break
                    time.sleep(0.005)
                if kill_at is None:
                    text = client.get(f"/v1/files/{now['result']['output_file_id']}/content").text
                    lines = [json.loads(line) for line in text.splitlines()]
                    assert [one["output"]["text"] for one in lines] == [f"line {i}!" for i in range(num)]
                else:
                    assert now["state"] == "running", now
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
