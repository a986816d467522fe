"""GET /metrics: names, and numbers that agree with what was asked."""

import asyncio

import httpx
import pytest
from fake_llm import FakeLLM, asgi_client
from prometheus_client.parser import text_string_to_metric_families

from llmasos.inference.llm import LLM
from llmasos.models.load import load_model

BODY = {"model": "fake", "prompt": "hi"}


async def samples(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Value by name and labels, the prefix left out."""
    response = await client.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            prefix, _, name = sample.name.partition(":")
            assert prefix == "llmasos"
            labels = dict(sample.labels)
            found[(name, labels.pop("model_name"), *labels.values())] = sample.value
    return found


async def test_completions_are_counted_by_how_they_end() -> None:
    llm = FakeLLM(delay=0.01)
    async with asgi_client(llm) as client:
        for more in ({}, {"n": 2, "stream": True}, {"max_tokens": 1}, {"prompt": "boom"}, {"prompt": "x" * 999}):
            await client.post("/v1/completions", json=BODY | more)
        asking = asyncio.create_task(client.post("/v1/completions", json=BODY | {"prompt": ["x" * 99, "y" * 99]}))
        while llm.num_running < 2:
            await asyncio.sleep(0.001)
        now = await samples(client)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        end = await samples(client)
    assert now["num_requests_running", "fake"] == 2 and end["num_requests_running", "fake"] == 0
    counts = {labels[2]: value for labels, value in end.items() if labels[0] == "request_success_total"}
    assert counts == {"stop": 3, "length": 1, "error": 2, "abort": 2}
    for name in ("request_queue_time", "time_to_first_token", "e2e_request_latency", "request_time_per_output_token"):
        assert end[f"{name}_seconds_count", "fake"] == (2 if "per_output" in name else 3)
    assert end["e2e_request_latency_seconds_sum", "fake"] == pytest.approx(0.6)


async def test_a_real_models_tokens_cache_and_times_are_told(tiny_model) -> None:
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="tiny") as llm:
        async with asgi_client({"tiny": llm, "same": llm}) as client:
            empty = await samples(client)
            assert empty["prompt_tokens_total", "tiny"] == 0 and ("prompt_tokens_total", "same") not in empty
            body = {"model": "same", "prompt": "The quick brown fox jumps over the lazy dog. " * 4, "max_tokens": 6}
            body |= {"ignore_eos": True}
            first = (await client.post("/v1/completions", json=body)).json()["usage"]
            again = (await client.post("/v1/completions", json=body)).json()["usage"]
            streamed = await client.post(
                "/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
            )
            apart = (await client.post("/v1/completions", json=body | {"cache_salt": "x"})).json()["usage"]
            found = await samples(client)
    cached = again["prompt_tokens_details"]["cached_tokens"]
    assert first["prompt_tokens_details"]["cached_tokens"] == apart["prompt_tokens_details"]["cached_tokens"] == 0
    assert cached > 0.5 * first["prompt_tokens"] and f'"cached_tokens":{cached}' in streamed.text
    prompt = 4 * first["prompt_tokens"]
    assert (found["prompt_tokens_total", "tiny"], found["generation_tokens_total", "tiny"]) == (prompt, 24)
    assert (found["prefix_cache_queries_total", "tiny"], found["prefix_cache_hits_total", "tiny"]) == (
        prompt,
        2 * cached,
    )
    assert found["request_success_total", "tiny", "length"] == 4
    times = [found[f"{name}_seconds_sum", "tiny"] for name in (
        "request_queue_time", "time_to_first_token", "e2e_request_latency"
    )]  # fmt: skip
    assert 0 <= times[0] < times[1] < times[2]
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "num_preemptions_total",
        "prefix_cache_evictions_total",
        "kv_cache_usage_perc",
    ):
        assert found[name, "tiny"] == 0
    for name in ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"):
        assert found[name, "tiny"] == 0
