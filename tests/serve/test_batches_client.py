"""Batches through the official `openai` client: a file goes in, answers come out, whatever happens between."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import openai
import pytest
from fake_llm import FakeLLM, live_server
from openai.types import Batch

from llmasos.errors import ServerError
from llmasos.serve.batches import answers, worker
from llmasos.serve.batches.tables import BatchRow
from llmasos.store.database import Database, utc_now

CHAT = "/v1/chat/completions"
OVER = ("completed", "failed", "expired", "cancelled")


def chat(i, **body):
    messages = [{"role": "user", "content": f"hi {i}"}]
    return {"custom_id": f"r{i}", "method": "POST", "url": CHAT, "body": {"model": "fake", "messages": messages} | body}


def submit(client, lines, endpoint=CHAT, **fields):
    data = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    file = client.files.create(file=("in.jsonl", data.encode()), purpose="batch")
    fields = {"completion_window": "24h"} | fields
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, **fields)


def wait(client, id, status=OVER, seconds=60):
    until = time.monotonic() + seconds
    while (batch := client.batches.retrieve(id)).status not in status:
        assert time.monotonic() < until, batch
        time.sleep(0.02)
    return batch


def results(client, file_id):
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


@pytest.fixture(scope="module")
def llm():
    return FakeLLM()


@pytest.fixture(scope="module")
def url(llm, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMASOS_HOME", str(tmp_path_factory.mktemp("home")))
        with live_server(llm) as url:
            yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_a_batch_is_answered_line_by_line(client: openai.OpenAI, llm: FakeLLM) -> None:
    lines = [chat(i) for i in range(40)] + [chat(40, temperature=9), chat(41, stream=True), chat(42, colour="red")]
    batch = submit(client, lines, metadata={"job": "night"})
    Batch.model_validate_json(batch.model_dump_json(), strict=True)
    assert batch.status == "validating" and batch.expires_at == batch.created_at + 86400
    done = wait(client, batch.id)
    assert (done.status, done.model, done.metadata) == ("completed", "fake", {"job": "night"})
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (43, 40, 3)
    good = {one["custom_id"]: one for one in results(client, done.output_file_id)}
    assert set(good) == {f"r{i}" for i in range(40)}
    assert good["r7"]["response"]["body"]["choices"][0]["message"]["content"] == "hi 7!"
    assert good["r7"]["response"]["status_code"] == 200 and good["r7"]["error"] is None
    bad = {one["custom_id"]: one["response"] for one in results(client, done.error_file_id)}
    params = {id: response["body"]["error"]["param"] for id, response in bad.items()}
    assert params == {"r40": "temperature", "r41": "stream", "r42": "colour"}
    assert {response["status_code"] for response in bad.values()} == {400}
    assert done.usage.output_tokens == sum(
        one["response"]["body"]["usage"]["completion_tokens"] for one in good.values()
    )
    assert all(request["priority"] >= answers.PRIORITY for request in llm.requests)
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert client.batches.list(limit=1).data[0].id == batch.id


@pytest.mark.parametrize(
    ("endpoint", "body", "read"),
    [
        ("/v1/completions", {"prompt": "hi"}, lambda b: b["choices"][0]["text"]),
        ("/v1/embeddings", {"input": "hi"}, lambda b: b["data"][0]["embedding"][0]),
        ("/v1/responses", {"input": "hi"}, lambda b: b["output"][0]["content"][0]["text"]),
    ],
)
def test_every_endpoint_answers_as_it_does_over_http(client: openai.OpenAI, url: str, endpoint, body, read) -> None:
    import httpx

    body = body | {"model": "fake"}
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
    done = wait(client, submit(client, [line], endpoint).id)
    [result] = results(client, done.output_file_id)
    over_http = httpx.post(url.removesuffix("/v1") + endpoint, json=body).json()
    assert read(result["response"]["body"]) == read(over_http)
    assert set(result["response"]["body"]) == set(over_http)
    assert done.usage.input_tokens > 0


def test_stored_responses_of_a_batch_can_be_gone_on_from(client: openai.OpenAI) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"model": "fake", "input": "hi"}}
    done = wait(client, submit(client, [line], "/v1/responses").id)
    [result] = results(client, done.output_file_id)
    assert client.responses.retrieve(result["response"]["body"]["id"]).output_text == "hi!"


def test_an_input_that_is_wrong_fails_with_every_line_named(client: openai.OpenAI) -> None:
    lines = [chat(1), "nonsense", chat(1), "", chat(2) | {"url": "/v1/embeddings"}, chat(3)]
    done = wait(client, submit(client, lines).id)
    assert done.status == "failed" and done.output_file_id is None and done.failed_at
    found = [(error.line, error.code) for error in done.errors.data]
    assert found == [(2, "invalid_json_line"), (3, "duplicate_custom_id"), (5, "mismatched_url")]
    listed = results(client, done.error_file_id)
    assert [(one["custom_id"], one["error"]["line"]) for one in listed] == [(None, 2), ("r1", 3), ("r2", 5)]


def test_a_model_that_is_not_there_fails_the_batch(client: openai.OpenAI) -> None:
    done = wait(client, submit(client, [chat(0), chat(1, model="gpt-9")]).id)
    [error] = done.errors.data
    assert (done.status, error.code, error.line, error.param) == ("failed", "model_not_found", 2, "body.model")
    assert "gpt-9" in error.message and done.request_counts.completed == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"completion_window": "1 day"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"input_file_id": "file-nowhere"}, "input_file_id"),
        ({"metadata": {"x": "y" * 513}}, "metadata.x"),
    ],
)
def test_a_wrong_request_is_refused(client: openai.OpenAI, fields, param: str) -> None:
    file = client.files.create(file=("in.jsonl", json.dumps(chat(0)).encode()), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | fields
    with pytest.raises(openai.BadRequestError) as wrong:
        client.batches.create(**body)
    assert wrong.value.param == param


def test_a_file_for_something_else_is_no_input(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", b"x"), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="user_data"):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_what_is_not_there_is_a_404(client: openai.OpenAI) -> None:
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call("batch_nowhere")
    with pytest.raises(openai.BadRequestError):
        client.batches.list(after="batch_nowhere")


@contextlib.contextmanager
def server(llm, **options):
    with live_server(llm, **options) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_cancelling_keeps_what_is_done_and_names_the_rest() -> None:
    with server(FakeLLM(delay=0.002)) as client:
        batch = submit(client, [chat(i) for i in range(300)])
        file_id = batch.input_file_id
        wait(client, batch.id, status=("in_progress",))
        while client.batches.retrieve(batch.id).request_counts.completed < 20:
            time.sleep(0.01)
        with pytest.raises(openai.ConflictError):
            client.files.delete(file_id)
        assert client.batches.cancel(batch.id).status == "cancelling"
        done = wait(client, batch.id)
        assert done.status == "cancelled" and done.cancelled_at and done.cancelling_at
        good, rest = results(client, done.output_file_id), results(client, done.error_file_id)
        assert 20 <= len(good) < 300
        assert {one["error"]["code"] for one in rest} == {"batch_cancelled"}
        assert sorted(one["custom_id"] for one in good + rest) == sorted(f"r{i}" for i in range(300))
        assert client.batches.cancel(batch.id).status == "cancelled"
        assert client.files.delete(file_id).deleted


def test_a_batch_whose_time_is_over_ends_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.05)
    with server(FakeLLM(delay=0.02)) as client:
        batch = submit(client, [chat(i) for i in range(200)], completion_window="1m")
        wait(client, batch.id, status=("in_progress",))
        while client.batches.retrieve(batch.id).request_counts.completed < 5:
            time.sleep(0.01)
    with Database.open() as database, database.session() as session:
        session.get(BatchRow, batch.id).expires = utc_now() - timedelta(seconds=1)
    with server(FakeLLM()) as client:
        done = wait(client, batch.id)
        assert done.status == "expired" and done.expired_at
        good, rest = results(client, done.output_file_id), results(client, done.error_file_id)
        assert len(good) >= 5 and len(good) + len(rest) == 200
        assert {one["error"]["code"] for one in rest} == {"batch_expired"}


def test_two_batches_share_and_people_go_before() -> None:
    llm = FakeLLM(delay=0.002)
    with server(llm) as client:
        long = submit(client, [chat(i) for i in range(400)])
        wait(client, long.id, status=("in_progress",))
        short = submit(client, [chat(i) for i in range(30)])
        wait(client, short.id)
        assert client.batches.retrieve(long.id).request_counts.completed < 300
        assert llm.max_running <= worker.CONCURRENCY
        assert wait(client, long.id).request_counts.completed == 400


def test_a_server_that_is_busy_or_crashed_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LONGEST_PAUSE", 0.01)

    class ModelCrashedError(ServerError):
        http_status = 503
        retry_after = 1

    class Poisoned(FakeLLM):
        """Dies of "poison", and takes everything with it that runs beside."""

        crashes = 0

        async def astream_complete(self, prompt, params, **request):
            poisoned = "poison" in self.tokenizer.decode(prompt)
            before = self.crashes
            async for chunk in super().astream_complete(prompt, params, **request):
                if poisoned:
                    self.crashes += 1
                if self.crashes > before:
                    raise ModelCrashedError("The model's process ended.")
                yield chunk
                await asyncio.sleep(0.001)

    poison = chat(99, messages=[{"role": "user", "content": "poison"}])
    with server(Poisoned(max_num_seqs=1), max_waiting=3) as client:
        done = wait(
            client, submit(client, [*(chat(i) for i in range(20)), poison, *(chat(i) for i in range(20, 40))]).id
        )
        assert done.request_counts.completed == 40
        [bad] = results(client, done.error_file_id)
        assert bad["custom_id"] == "r99" and bad["response"]["status_code"] == 503


def test_a_full_disk_fails_the_batch_and_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmasos.errors import DiskFullError
    from llmasos.serve.batches.ledger import Ledger

    answered = Ledger.answered

    def full(self, custom_id, *rest):
        if custom_id == "r30":
            raise DiskFullError("There is no room for the file.")
        answered(self, custom_id, *rest)

    monkeypatch.setattr(Ledger, "answered", full)
    with server(FakeLLM()) as client:
        done = wait(client, submit(client, [chat(i) for i in range(60)]).id)
        assert done.status == "failed" and done.errors.data[0].code == "disk_full"
        assert len(results(client, done.output_file_id)) >= 18


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def process(port, delay):
    script = Path(__file__).with_name("server_to_kill.py")
    child = subprocess.Popen(
        [sys.executable, str(script), str(port), str(delay)], stdout=subprocess.PIPE, env={**os.environ}, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_server_that_is_killed_loses_and_doubles_nothing(home: Path) -> None:
    """200 lines, SIGKILL twice in the middle, and once a background response as well."""
    port = free_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5)
    seen = {}
    with client:
        with process(port, 0.005) as child:
            batch = submit(client, [*(chat(i) for i in range(199)), chat(199, temperature=9)])
            background = client.responses.create(model="fake", input="x" * 300, background=True)
            wait(client, batch.id, status=("in_progress",))
            while client.batches.retrieve(batch.id).request_counts.completed < 40:
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
            child.wait()
        for at_least in (80, None):
            with Database.open() as database, database.session() as session:
                output = home / "files" / session.get(BatchRow, batch.id).output_id
            for line in output.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    seen[json.loads(line)["custom_id"]] = json.loads(line)["id"]
            with process(port, 0.005) as child:
                while at_least and client.batches.retrieve(batch.id).request_counts.completed < at_least:
                    time.sleep(0.01)
                if at_least:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    continue
                done = wait(client, batch.id)
                good, bad = results(client, done.output_file_id), results(client, done.error_file_id)
                until = time.monotonic() + 30
                while (response := client.responses.retrieve(background.id)).status != "completed":
                    assert time.monotonic() < until, response.status
                    time.sleep(0.05)
    assert (done.request_counts.completed, done.request_counts.failed) == (199, 1)
    assert sorted(one["custom_id"] for one in good) == sorted(f"r{i}" for i in range(199))
    assert [one["custom_id"] for one in bad] == ["r199"]
    ids = {one["custom_id"]: one["id"] for one in good}
    assert len(seen) >= 80 and all(ids[custom_id] == id for custom_id, id in seen.items())
    assert all(
        one["response"]["body"]["choices"][0]["message"]["content"] == f"hi {one['custom_id'][1:]}!" for one in good
    )
    assert response.output_text == "x" * 300 + "!"


def test_a_second_server_waits_until_the_first_is_gone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.05)
    slow, fast = FakeLLM(delay=0.05), FakeLLM()
    with server(slow) as first, server(fast) as second:
        batch = submit(second, [chat(i) for i in range(30)])
        wait(second, batch.id, status=("in_progress",))
        assert first.batches.retrieve(batch.id).status == "in_progress"
        while slow.num_running == 0:
            time.sleep(0.01)
        assert fast.num_running == 0 and fast.prompts == []
        assert second.batches.cancel(batch.id).status == "cancelling"
        assert wait(second, batch.id).status == "cancelled"


async def test_batches_of_different_keys_share_alike() -> None:
    """Whose turn it is goes by key first: ten batches of one key get as much as one batch of another."""
    jobs = {name: FakeRunning(key) for name, key in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"))}
    batches = worker.Batches.__new__(worker.Batches)
    batches._running, batches._num_flying, batches._concurrency, batches._share = jobs, 0, 12, 9
    for _ in range(12):
        batches._next_batch().flying.add(object())
        batches._num_flying += 1
    assert [len(one.flying) for one in jobs.values()] == [2, 2, 2, 6]
    assert batches._next_batch() is None


class FakeRunning:
    def __init__(self, key_id):
        self.job = type("Job", (), {"key_id": key_id})
        self.flying = set()

    def may_go_on(self, now, share):
        return len(self.flying) < share
