"""Traces: one span per request that a model answers, under GenAI's names, as a child of the client's."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_llm import FakeLLM
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from llmasos.errors import InvalidInputError, OfflineError, UnsupportedError
from llmasos.serve.server import create_app
from llmasos.serve.telemetry import Telemetry

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"model": "fake", "prompt": "the secret", "max_tokens": 4}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


def client(exporter: InMemorySpanExporter, **options: Any) -> httpx.AsyncClient:
    app = create_app(FakeLLM(**options), telemetry=Telemetry(SimpleSpanProcessor(exporter)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


async def test_a_completion_is_a_span_with_its_numbers(spans: InMemorySpanExporter) -> None:
    async with client(spans) as http:
        headers = {"traceparent": PARENT, "tracestate": "a=b", "x-request-id": "mine"}
        await http.post("/v1/completions", json=BODY | {"stream": True}, headers=headers)
    [span] = spans.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == (
        "text_completion fake",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert span.parent is not None and f"{span.parent.span_id:x}" == "b7ad6b7169203331"
    assert f"{span.context.trace_id:x}".zfill(32) == "0af7651916cd43dd8448eb211c80319c"
    found = dict(span.attributes or {})
    assert found.pop("gen_ai.server.time_to_first_token") > 0
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "llmasos",
        "gen_ai.request.model": "fake",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.finish_reasons": ("length",),
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "llmasos.request.id": "mine",
    }
    assert [event.name for event in span.events] == ["first token"]
    assert span.start_time is not None and span.end_time is not None
    assert span.start_time <= span.events[0].timestamp <= span.end_time
    assert dict(span.resource.attributes)["service.name"] == "llmasos"


async def test_every_request_for_a_model_has_its_kind_and_others_have_no_span(spans: InMemorySpanExporter) -> None:
    messages = [{"role": "user", "content": "hi"}]
    async with client(spans) as http:
        await http.post("/v1/chat/completions", json={"model": "fake", "messages": messages})
        await http.post("/v1/messages", json={"model": "fake", "messages": messages, "max_tokens": 3})
        await http.post("/api/chat", json={"model": "fake", "messages": messages, "stream": False})
        await http.post("/v1/embeddings", json={"model": "fake", "input": "x"})
        for path in ("/healthz", "/v1/models", "/llmasos/v1/status"):
            await http.get(path)
    assert [span.name for span in spans.get_finished_spans()] == ["chat fake"] * 3 + ["embeddings fake"]


async def test_failures_of_the_server_are_errors_and_those_of_clients_are_not(spans: InMemorySpanExporter) -> None:
    async with client(spans) as http:
        await http.post("/v1/completions", json=BODY | {"prompt": "boom"})
        await http.post("/v1/completions", json=BODY | {"model": "none"})
        await http.post("/v1/completions", json={"colour": 1}, headers={"traceparent": "nonsense"})
    failed, unknown, wrong = spans.get_finished_spans()
    assert failed.status.status_code is StatusCode.ERROR and dict(failed.attributes or {})["error.type"] == "500"
    assert unknown.status.status_code is wrong.status.status_code is StatusCode.UNSET
    assert wrong.name == "text_completion unknown" and wrong.parent is None
    assert all("secret" not in str(dict(span.attributes or {})) for span in (failed, unknown, wrong))


async def test_requests_at_once_have_spans_of_their_own(spans: InMemorySpanExporter) -> None:
    async with client(spans, delay=0.002) as http:
        bodies = [BODY | {"prompt": "x" * n, "max_tokens": n} for n in range(1, 9)]
        await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
    counts = {dict(span.attributes or {})["gen_ai.usage.output_tokens"] for span in spans.get_finished_spans()}
    assert counts == set(range(1, 9))


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://host", "http://", "none"])
def test_what_is_no_collector_is_said(url: str) -> None:
    with pytest.raises(InvalidInputError, match="not the URL of a collector"):
        Telemetry.to(url)


def test_nothing_is_sent_in_offline_mode_but_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    with pytest.raises(OfflineError, match=r"collector\.example"):
        Telemetry.to("https://collector.example:4318")
    Telemetry.to("http://127.0.0.1:9").close()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"llmasos\[telemetry\]"):
        Telemetry.to("http://127.0.0.1:4318")
