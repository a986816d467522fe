"""Rerank, score, tokenize, detokenize: routes that OpenAI does not have."""

import pytest
from fake_llm import FakeLLM, asgi_client

from llmasos.client.types import Reranking, ScoreList, Tokens


async def post(path, body, llm=None):
    async with asgi_client(llm or FakeLLM()) as client:
        return await client.post(path, json={"model": "fake", **body})


def cross_encoder() -> FakeLLM:
    llm = FakeLLM()
    llm.scores_pairs = True
    return llm


async def test_rerank_sorts_by_a_cross_encoder_where_there_is_one() -> None:
    body = {"query": "abc", "documents": ["xyz", {"text": "cab"}, "ax"]}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = (await post(path, body, cross_encoder())).json()
        assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == [(1, 1.0), (2, 1 / 3), (0, 0.0)]
        assert answer["results"][0]["document"] == {"text": "cab"} and answer["method"] == "cross-encoder"
        assert answer["usage"]["total_tokens"] == 3 * 3 + 8
        Reranking.model_validate(answer)
    short = (await post("/v1/rerank", {**body, "top_n": 1, "return_documents": False}, cross_encoder())).json()
    assert short["results"] == [{"index": 1, "relevance_score": 1.0}]


async def test_rerank_by_embeddings_says_so() -> None:
    answer = (await post("/v1/rerank", {"query": "ab", "documents": ["a", "abc", "ab"]})).json()
    assert answer["method"] == "cosine" and answer["results"][0]["index"] == 2
    assert answer["results"][0]["relevance_score"] == pytest.approx(1.0)
    assert answer["usage"]["total_tokens"] == 8


async def test_scores_are_of_one_text_and_several_or_of_pairs() -> None:
    one = (await post("/v1/score", {"text_1": "abc", "text_2": ["abc", "x"]}, cross_encoder())).json()
    assert [(s["index"], s["score"]) for s in one["data"]] == [(0, 1.0), (1, 0.0)]
    pairs = (await post("/score", {"text_1": ["ab", "x"], "text_2": ["a", "x"]}, cross_encoder())).json()
    assert [s["score"] for s in pairs["data"]] == [0.5, 1.0]
    assert (await post("/v1/score", {"text_1": "a", "text_2": "a"})).json()["data"][0]["score"] == pytest.approx(1)
    assert ScoreList.model_validate(one).method == "cross-encoder"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a", ""]}, "documents"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "max_chunks_per_doc": 2}, "max_chunks_per_doc"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        ("/v1/score", {"text_1": [], "text_2": ["a"]}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ["a"] * 2049}, "text_2"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
    ],
)
async def test_what_is_wrong_is_named(path, body, param) -> None:
    answer = await post(path, body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


async def test_text_and_tokens_become_one_another() -> None:
    answer = (await post("/tokenize", {"prompt": "hé"})).json()
    assert answer == {"count": 3, "max_model_len": 1000, "tokens": [104, 195, 169]}
    assert (await post("/detokenize", {"tokens": answer["tokens"]})).json() == {"prompt": "hé"}
    strings = (await post("/tokenize", {"prompt": "ab", "return_token_strs": True})).json()
    assert strings["token_strs"] == ["a", "b"] and Tokens.model_validate(strings).count == 2


async def test_messages_go_through_the_template(tiny_llm) -> None:
    messages = [{"role": "user", "content": "The quick"}]
    async with asgi_client(tiny_llm) as client:

        async def tokenize(**fields):
            body = {"model": "tiny", "messages": messages, "return_token_strs": True, **fields}
            return (await client.post("/tokenize", json=body)).json()

        whole, bare = await tokenize(), await tokenize(add_generation_prompt=False)
        assert whole["token_strs"][0] == "<|user|>" and whole["token_strs"][-1] == "<|assistant|>"
        assert bare["tokens"] == whole["tokens"][:-1] and whole["max_model_len"] == 256
        messages.append({"role": "assistant", "content": "brown"})
        assert (await tokenize(continue_final_message=True))["token_strs"][-1] != "<|end|>"
        text = (await client.post("/detokenize", json={"model": "tiny", "tokens": whole["tokens"]})).json()["prompt"]
        assert text == "<|user|>The quick<|end|><|assistant|>"
