"""Our own client and RemoteLLM against our own server: both ends of the wire agree."""

import pytest
from fake_llm import FakeLLM, live_server

from llmasos.client import AsyncClient, Client
from llmasos.errors import ProviderError, UnsupportedError
from llmasos.inference.remote import RemoteLLM
from llmasos.inference.request import SamplingParams


@pytest.fixture(scope="module")
def url(tiny_llm):
    with live_server({"fake": FakeLLM(), "tiny": tiny_llm}) as url:
        yield url


async def test_the_clients_speak_to_our_server(url: str) -> None:
    with Client(url) as client:
        assert [m.id for m in client.models()] == ["fake", "tiny"] and client.model("tiny").context_length == 256
        whole = client.chat("hi", model="tiny", temperature=0, max_tokens=8)
        streamed = client.stream_chat("hi", model="tiny", temperature=0, max_tokens=8)
        text = "".join(c.choices[0].delta.content or "" for c in streamed)
        assert text == whole.choices[0].message.content
        assert client.complete("hi", model="fake").choices[0].text == "hi!"
        assert len(client.embed(["a", "b"], model="tiny").data) == 2
        with pytest.raises(ProviderError, match="'gpt' is not served here") as caught:
            client.chat("hi", model="gpt")
        assert caught.value.status == 404
    async with AsyncClient(url) as client:
        assert (await client.chat("hi", model="fake")).choices[0].message.content == "hi!"
        assert "".join([c.choices[0].text async for c in client.stream_complete("hi", model="fake")]) == "hi!"


async def test_a_remote_model_gives_what_the_local_one_gives(url: str, tiny_llm) -> None:
    with RemoteLLM(f"{url}#tiny") as remote:
        for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 20, "seed": 3}):
            assert remote.generate("The quick", max_tokens=10, **options) == tiny_llm.generate(
                "The quick", max_tokens=10, **options
            )
        params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, n=1)
        [here], [there] = tiny_llm.complete("The quick", params), remote.complete("The quick", params)
        ours, theirs = here.outputs[0], there.outputs[0]
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        texts = [tiny_llm.tokenizer.token_bytes(p.token_id).decode("utf-8", "replace") for p in ours.logprobs]
        assert texts == [p.token for p in theirs.logprobs]
        assert [p.logprob for p in ours.logprobs] == pytest.approx([p.logprob for p in theirs.logprobs])
        long = "The quick brown fox jumps over the lazy dog. " * 3
        cached = [remote.complete(long, params)[0].metrics.num_cached_tokens for _ in range(2)]
        assert cached[1] > max(cached[0], 20)
        assert remote.chat("hi", max_tokens=6, temperature=0) == tiny_llm.chat("hi", max_tokens=6, temperature=0)
        assert remote.embed("hi") == pytest.approx(tiny_llm.embed("hi"), abs=1e-6)
        assert await remote.agenerate("The quick", max_tokens=5, temperature=0) == tiny_llm.generate(
            "The quick", max_tokens=5, temperature=0
        )
        with pytest.raises(UnsupportedError):
            remote.score("x")


def test_a_remote_model_says_what_stopped_it(url: str, tiny_llm) -> None:
    said = tiny_llm.chat("hi", max_tokens=12, temperature=0)
    options = {"max_tokens": 12, "temperature": 0, "stop": ["nothing like it", said[4:6]]}
    with RemoteLLM(f"{url}#tiny") as remote:
        last = list(remote.stream([{"role": "user", "content": "hi"}], **options))[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", said[4:6])


def test_beam_search_over_http_equals_beam_search_here(url: str, tiny_llm) -> None:
    with Client(url) as client:
        answer = client.complete("The quick", model="tiny", max_tokens=6, num_beams=3, n=2)
    [output] = tiny_llm.complete("The quick", SamplingParams(max_tokens=6, num_beams=3, n=2, temperature=0))
    assert [c.text for c in answer.choices] == [c.text for c in output.outputs]
