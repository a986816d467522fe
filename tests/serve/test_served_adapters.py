"""Adapters over HTTP: loaded at the start or by request, served as models."""

import os
import signal

import pytest
from fake_llm import FakeLLM, asgi_client

from llmasos.errors import InvalidInputError
from llmasos.inference.llm import LLM
from llmasos.models.load import load_model
from llmasos.serve import serve
from tiny import write_tiny_adapter


@pytest.fixture
def llm(tiny_model):
    with LLM(load_model(tiny_model, device="cpu", dtype="float32"), name="tiny") as llm:
        yield llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "a")


async def text(client, model: str) -> str:
    body = {"model": model, "prompt": "The quick", "max_tokens": 12, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.json()["model"] == model, answer.text
    streamed = await client.post("/v1/completions", json=body | {"stream": True})
    assert streamed.status_code == 200
    return answer.json()["choices"][0]["text"]


async def test_an_adapter_is_loaded_served_as_a_model_and_unloaded(llm, tiny_llm, folder) -> None:
    async with asgi_client({"tiny": llm}, enable_lora_loading=True) as client:
        body = {"lora_name": "mine", "lora_path": str(folder)}
        loaded = await client.post("/v1/load_lora_adapter", json=body)
        assert loaded.status_code == 200 and (loaded.json()["id"], loaded.json()["parent"]) == ("mine", "tiny")
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(m["id"], m["parent"]) for m in listed] == [("tiny", None), ("mine", "tiny")]
        assert await text(client, "mine") == llm.generate("The quick", max_tokens=12, adapter="mine")
        assert await text(client, "tiny") == tiny_llm.generate("The quick", max_tokens=12) != await text(client, "mine")
        embedded = await client.post("/v1/embeddings", json={"model": "mine", "input": "x"})
        assert embedded.status_code == 400 and "Ask tiny" in embedded.json()["error"]["message"]
        chunks = llm.stream("The quick", max_tokens=200, ignore_eos=True, adapter="mine")
        next(chunks)
        busy = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert busy.status_code == 409 and busy.json()["error"]["code"] == "busy"
        chunks.close()
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert gone.json() == {"id": "mine", "object": "model", "deleted": True}
        missing = await client.post("/v1/completions", json={"model": "mine", "prompt": "x"})
        assert missing.status_code == 404 and (await client.get("/healthz")).json()["models"] == ["tiny"]


async def test_loading_is_refused_unless_the_server_was_started_for_it(llm, folder) -> None:
    async with asgi_client({"tiny": llm}) as client:
        for path, body in (("load", {"lora_name": "a", "lora_path": str(folder)}), ("unload", {"lora_name": "a"})):
            refused = await client.post(f"/v1/{path}_lora_adapter", json=body)
            assert refused.status_code == 403 and "--enable-lora-loading" in refused.json()["error"]["message"]
    assert llm.adapters == []


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"lora_name": "tiny", "lora_path": "x"}, 400, "served already"),
        ({"lora_name": "alias", "lora_path": "x"}, 400, "served already"),
        ({"lora_name": "a", "lora_path": "/no/such/folder"}, 404, "/no/such/folder"),
        ({"lora_name": "a", "lora_path": ".."}, 404, "adapter_config"),
        ({"lora_name": "a", "lora_path": "x", "base_model_name": "none"}, 404, "not served here"),
        ({"lora_name": "a"}, 400, "lora_path"),
        ({"lora_name": "a", "lora_path": "x", "rank": 3}, 400, "Unknown field"),
    ],
)
async def test_what_is_wrong_in_a_load_is_named(llm, body, status, word) -> None:
    async with asgi_client({"tiny": llm}, aliases={"alias": "tiny"}, enable_lora_loading=True) as client:
        answer = await client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == status and word in answer.json()["error"]["message"], answer.text


async def test_of_several_models_the_adapters_one_must_be_named(llm, folder) -> None:
    async with asgi_client({"fake": FakeLLM(), "tiny": llm}, enable_lora_loading=True) as client:
        body = {"lora_name": "a", "lora_path": str(folder)}
        unnamed = await client.post("/v1/load_lora_adapter", json=body)
        assert unnamed.json()["error"]["param"] == "base_model_name"
        named = await client.post("/v1/load_lora_adapter", json=body | {"base_model_name": "tiny"})
        assert named.json()["parent"] == "tiny"
        onto = await client.post("/v1/load_lora_adapter", json=body | {"lora_name": "b", "base_model_name": "a"})
        assert "an adapter itself" in onto.json()["error"]["message"]
        model = await client.post("/v1/unload_lora_adapter", json={"lora_name": "tiny"})
        assert model.status_code == 404 and "not an adapter" in model.json()["error"]["message"]


def test_adapters_named_at_the_start_are_served(tiny_model, folder) -> None:
    loaded = []

    def load(name: str) -> LLM:
        loaded.append(LLM(load_model(tiny_model, device="cpu", dtype="float32"), name=name))
        return loaded[-1]

    def ready(url: str) -> None:
        assert [(a.name, a.path) for a in loaded[0].adapters] == [("mine", folder.resolve())]
        os.kill(os.getpid(), signal.SIGINT)

    serve({"tiny": "x"}, port=0, load=load, on_ready=ready, adapters={"mine": folder})
    with pytest.raises(InvalidInputError, match="own name"):
        serve({"tiny": "x"}, port=0, load=load, adapters={"tiny": folder})
    with pytest.raises(InvalidInputError, match="several"):
        serve(["a", "b"], port=0, load=load, adapters={"mine": folder})
