import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_llm import FakeLLM, asgi_client, live_server

from llmasos.apps.hosting import listen
from llmasos.errors import InvalidInputError, ServerError, UnsupportedError
from llmasos.serve import serve

BODY = {"model": "fake", "prompt": "hi"}
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from fake_llm import FakeLLM
from llmasos.serve import serve
load = lambda name: FakeLLM(name, delay=0.01, context_length=100_000)
serve(["a", "b"], port=0, drain={seconds}, load=load, on_ready=lambda url: print(url, flush=True))
print("stopped", flush=True)
"""


async def test_healthz_and_version_answer_at_once() -> None:
    async with asgi_client(FakeLLM()) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok", "models": ["fake"]}
        assert (await client.get("/version")).json()["name"] == "llmasos"


def test_an_address_that_others_reach_needs_the_insecure_flag() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", ""):
        with pytest.raises(ServerError, match="--insecure"):
            serve(["m"], host=host, load=lambda name: pytest.fail("loaded before the check"))


def test_a_port_in_use_is_said_before_a_model_is_loaded() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"Port {port} is in use.*--port {port + 1}") as caught:
            serve(["m"], port=port, load=lambda name: pytest.fail("loaded before the check"))
    assert caught.value.exit_code == 8


def test_no_model_two_of_one_name_and_remote_ones_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="No model"):
        serve([], port=0, load=FakeLLM)
    with pytest.raises(InvalidInputError, match="'same'"):
        serve(["same", "same"], port=0, load=FakeLLM)
    with pytest.raises(UnsupportedError, match="already behind an API"):
        serve(["openai:gpt-4.1"], port=0)


def test_models_are_closed_when_a_later_one_fails_to_load() -> None:
    first = FakeLLM()

    def load(name: str) -> FakeLLM:
        if name == "bad":
            raise InvalidInputError("broken")
        return first

    with pytest.raises(InvalidInputError, match="broken"):
        serve(["good", "bad"], port=0, load=load)
    assert first.closed


def test_what_clients_read_names_a_model_by_the_name_it_is_served_under(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").touch()
    loaded = []

    def load(name: str) -> FakeLLM:
        loaded.append(FakeLLM(name))
        return loaded[-1]

    def ready(url: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    serve([str(tmp_path / "mine.gguf")], port=0, load=load, on_ready=ready)
    assert loaded[0].name == "mine" and loaded[0].closed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_cleanly(number: int) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), seconds=10)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        url = server.stdout.readline().strip()
        assert [m["id"] for m in httpx.get(f"{url}/models").json()["data"]] == ["a", "b"]
        answer = {}

        def ask() -> None:
            answer.update(
                httpx.post(f"{url}/completions", json={"model": "a", "prompt": "x" * 30, "max_tokens": 30}).json()
            )

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.1)
        server.send_signal(number)
        out, err = server.communicate(timeout=30)
        asking.join()
    assert (server.returncode, out.strip()) == (0, "stopped"), err
    assert answer["choices"][0]["text"] == "x" * 30  # what was under way was answered
    assert "Traceback" not in err


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_while_stopping_gets_a_retryable_error(stream: bool) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), seconds=1)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        url = server.stdout.readline().strip()
        body = {"model": "a", "prompt": "x" * 9000, "max_tokens": 9000, "stream": stream}
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/completions", json=body, timeout=60))
        )
        asking.start()
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=30)
        asking.join()
    assert (server.returncode, out.strip()) == (0, "stopped") and "Traceback" not in err, err
    [answer] = answers
    assert answer.status_code == (200 if stream else 503)
    last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["code"] == "stopping"


async def test_every_answer_has_a_request_id_and_a_harmless_given_one_is_kept() -> None:
    async with asgi_client(FakeLLM()) as client:
        given = await client.post("/v1/completions", json=BODY, headers={"x-request-id": "trace-1"})
        assert given.headers["x-request-id"] == "trace-1"
        ids = set()
        for path in ("/healthz", "/nothing", "/v1/models"):
            ids.add((await client.get(path, headers={"x-request-id": "bad id\t!"})).headers["x-request-id"])
        assert len(ids) == 3 and all(i.startswith("req_") for i in ids)


async def test_an_unexpected_exception_is_logged_under_the_id_that_the_client_sees(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, logger="llmasos.serve"):
        async with asgi_client(FakeLLM()) as client:
            response = await client.post("/v1/completions", json=BODY | {"prompt": "boom"})
    request_id = response.headers["x-request-id"]
    assert response.status_code == 500 and request_id in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert request_id in caplog.text and "the secret cause" in caplog.text


async def test_a_body_over_the_limit_is_413_declared_or_not() -> None:
    async def pieces():
        for _ in range(20):
            yield b" " * 100

    async with asgi_client(FakeLLM(), max_body_bytes=1000) as client:
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        for content in (b" " * 1001, pieces()):
            response = await client.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 413 and "1000 bytes" in response.json()["error"]["message"]


async def test_a_foreign_host_header_can_not_reach_a_loopback_server() -> None:
    async with asgi_client(FakeLLM(), loopback_only=True) as client:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 403
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "[::1]"):
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


def raw_post(host: str, body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"prompt": ["x" * 500, "y" * 400]}])
async def test_a_client_that_goes_away_stops_its_generation_and_frees_the_model(fields) -> None:
    llm = FakeLLM(delay=0.01)
    with live_server(llm) as url:
        host, port = url.split("/")[2].split(":")
        body = json.dumps(BODY | {"prompt": "x" * 500, "max_tokens": 400} | fields).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(raw_post(host, body))
            await until(lambda: llm.num_tokens > 2)
        await until(lambda: llm.num_running == 0)
        assert llm.num_cancelled >= 1 and llm.num_tokens < 200
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{url}/completions", json=BODY)
        assert answer.json()["choices"][0]["text"] == "hi!"


async def test_requests_of_all_names_run_at_once() -> None:
    llm = FakeLLM(delay=0.01)
    async with asgi_client({"fake": llm, "again": llm}) as client:
        bodies = [{"model": ["fake", "again"][i % 2], "prompt": f"{i}" * 10, "stream": bool(i % 3)} for i in range(12)]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200} and llm.max_running == 12


async def test_the_prompts_of_one_request_run_at_once_and_their_streams_interleave() -> None:
    llm = FakeLLM(delay=0.005)
    body = BODY | {"prompt": ["aaaa", "bbbb", "cccc"], "n": 2, "stream": True}
    async with asgi_client(llm) as client:
        response = await client.post("/v1/completions", json=body)
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
    indices = [chunk["choices"][0]["index"] for chunk in chunks]
    assert llm.max_running == 3 and set(indices[:3]) == {0, 2, 4}
    texts = {i: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(6)}
    assert texts == {0: "aaaa!", 1: "aaaa!#1", 2: "bbbb!", 3: "bbbb!#1", 4: "cccc!", 5: "cccc!#1"}


async def test_one_prompt_that_fails_ends_the_others_of_its_request() -> None:
    llm = FakeLLM(delay=0.01)
    async with asgi_client(llm) as client:
        for stream in (False, True):
            body = BODY | {"prompt": ["x" * 500, "boom late"], "max_tokens": 400, "stream": stream}
            response = await client.post("/v1/completions", json=body)
            assert "internal_error" in response.text and response.text.count("[DONE]") == 0
        await until(lambda: llm.num_running == 0)
    assert llm.num_tokens < 200


async def test_two_models_do_not_wait_for_each_other() -> None:
    slow, quick = FakeLLM("slow", delay=0.02), FakeLLM("quick")
    with live_server({"slow": slow, "quick": quick}) as url:
        async with httpx.AsyncClient() as client:
            first = asyncio.create_task(
                client.post(f"{url}/completions", json={"model": "slow", "prompt": "x" * 30, "max_tokens": 30})
            )
            await until(lambda: slow.num_tokens > 0)
            assert (await client.post(f"{url}/completions", json={"model": "quick", "prompt": "x"})).status_code == 200
            assert not first.done()
            assert (await first).status_code == 200


async def test_embeddings_of_one_model_do_not_take_all_threads() -> None:
    llm = FakeLLM(delay=0.005)
    async with asgi_client(llm) as client:
        body = {"model": "fake", "input": "x"}
        answers = await asyncio.gather(*(client.post("/v1/embeddings", json=body) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200} and llm.max_running == 2


async def test_more_than_run_and_wait_is_503_with_retry_after() -> None:
    llm = FakeLLM(delay=0.02, max_num_seqs=2)
    async with asgi_client(llm, max_waiting=1) as client:
        tasks = [asyncio.create_task(client.post("/v1/completions", json=BODY | more)) for more in ({}, {"n": 2})]
        await until(lambda: llm.num_running == 2)
        for path, body in (("completions", BODY | {"stream": True}), ("embeddings", {"model": "fake", "input": "x"})):
            full = await client.post(f"/v1/{path}", json=body)
            assert full.status_code == 503 and full.headers["retry-after"] == "1"
            assert full.json()["error"]["code"] == "queue_full" and "3 completions" in full.json()["error"]["message"]
        assert {(await task).status_code for task in tasks} == {200}
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_client_that_goes_away_makes_room() -> None:
    llm = FakeLLM(delay=0.01, max_num_seqs=1)
    with live_server(llm, max_waiting=0) as url:
        async with httpx.AsyncClient() as client:
            for stream in (False, True):
                with contextlib.suppress(httpx.ReadTimeout):
                    body = BODY | {"prompt": "x" * 400, "max_tokens": 400, "stream": stream}
                    async with client.stream("POST", f"{url}/completions", json=body, timeout=0.2) as response:
                        async for _ in response.aiter_bytes():
                            break
                await until(lambda: llm.num_running == 0)
                async with asyncio.timeout(10):
                    while (await client.post(f"{url}/completions", json=BODY)).status_code == 503:
                        await asyncio.sleep(0.01)


async def test_many_clients_at_once_get_the_texts_that_each_gets_alone(tiny_llm) -> None:
    prompts = [f"The quick {word}" for word in ("brown fox", "lazy dog", "capital", "model", "answer", "Paris")]
    fields = [
        {"prompt": prompt, "max_tokens": 16 + i, "stream": bool(i % 2), "seed": i, "temperature": i % 3 / 2}
        for i, prompt in enumerate(prompts * 4)
    ]

    def text(response: httpx.Response) -> str:
        if response.headers["content-type"] == "application/json":
            return response.json()["choices"][0]["text"]
        events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
        return "".join(event["choices"][0]["text"] for event in events)

    with live_server(tiny_llm) as url:
        async with httpx.AsyncClient(timeout=60) as client:

            async def ask(more: dict[str, object]) -> str:
                return text(await client.post(f"{url}/completions", json={"model": "tiny", "ignore_eos": True} | more))

            alone = [await ask(more) for more in fields]
            steps = tiny_llm.stats.num_steps
            together = await asyncio.gather(*(ask(more) for more in fields))
            steps = tiny_llm.stats.num_steps - steps
    assert together == alone
    assert steps < sum(int(str(more["max_tokens"])) for more in fields) / 3


async def test_a_reader_that_stalls_does_not_hold_the_model() -> None:
    llm = FakeLLM(context_length=200_000)
    with live_server(llm) as url:
        host, port = url.split("/")[2].split(":")
        body = json.dumps(BODY | {"prompt": "x" * 20_000, "max_tokens": 20_000, "stream": True}).encode()
        with socket.create_connection((host, int(port))) as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.sendall(raw_post(host, body))
            await until(lambda: llm.num_tokens > 0)
            async with httpx.AsyncClient(timeout=20) as client:
                assert (await client.post(f"{url}/completions", json=BODY)).status_code == 200
            await until(lambda: llm.num_running == 0)  # what it has not read waits in memory
            assert llm.num_tokens > 20_000


async def test_a_real_model_stops_soon_after_its_client_has_gone(tiny_llm) -> None:
    steps = []
    before = tiny_llm.model.module.forward

    def counted(*args, **kwargs):
        steps.append(time.perf_counter())
        time.sleep(0.01)
        return before(*args, **kwargs)

    tiny_llm.model.module.forward = counted
    try:
        with live_server(tiny_llm) as url:
            for stream in (False, True):
                steps.clear()
                body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "stream": stream, "ignore_eos": True}
                with contextlib.suppress(httpx.ReadTimeout):
                    async with (
                        httpx.AsyncClient(timeout=0.3) as client,
                        client.stream("POST", f"{url}/completions", json=body) as r,
                    ):
                        async for _ in r.aiter_bytes():
                            break
                await asyncio.sleep(0.1)
                made = len(steps)
                assert 0 < made < 150
                await asyncio.sleep(0.2)
                assert len(steps) == made
                assert tiny_llm.stats.num_running == 0 and tiny_llm.stats.kv_cache_usage == 0
    finally:
        tiny_llm.model.module.forward = before
