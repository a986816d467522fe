"""What clients leave here belongs to their key, on both kinds of database: nobody else sees it, uses it or ends it."""

import asyncio
import contextlib
import json

from access_world import REQUIRED, bearer, client_of, id_of, make_key
from fake_llm import FakeLLM

from llmasos.serve.access import registry
from llmasos.serve.access.access import Access
from llmasos.serve.batches import store
from llmasos.serve.server import create_app
from llmasos.store.database import Database

CHAT = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def running(database: Database, llm=None):
    """A client of an application that lives: its background works."""
    access = Access(database, REQUIRED)
    app = create_app(llm or FakeLLM(), access=access)
    async with app.router.lifespan_context(app), client_of(app) as client:
        client.access = access
        yield client


def line(i, model="fake"):
    body = {"model": model, "messages": [{"role": "user", "content": f"hi {i}"}]}
    return json.dumps({"custom_id": f"r{i}", "method": "POST", "url": CHAT, "body": body})


async def upload(client, key, lines):
    files = {"file": ("in.jsonl", "\n".join(lines).encode())}
    answer = await client.post("/v1/files", files=files, data={"purpose": "batch"}, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def submit(client, key, lines):
    body = {"input_file_id": await upload(client, key, lines), "endpoint": CHAT, "completion_window": "24h"}
    answer = await client.post("/v1/batches", json=body, headers=bearer(key))
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def wait(client, key, id):
    for _ in range(1000):
        batch = (await client.get(f"/v1/batches/{id}", headers=bearer(key))).json()
        if batch["status"] in ("completed", "failed", "cancelled"):
            return batch
        await asyncio.sleep(0.02)
    raise AssertionError(batch)


async def test_one_key_sees_nothing_of_another_ones(database: Database) -> None:
    ann, bob = make_key(database, "ann"), make_key(database, "bob")
    async with running(database) as client:
        post = client.post
        batch = await wait(client, ann, await submit(client, ann, [line(0)]))
        body = {"bytes": 4, "filename": "a", "mime_type": "x", "purpose": "batch"}
        upload_id = (await post("/v1/uploads", json=body, headers=bearer(ann))).json()["id"]
        conversation = (await post("/v1/conversations", json={}, headers=bearer(ann))).json()["id"]
        asked = {"model": "fake", "input": "hi", "conversation": conversation}
        response = (await post("/v1/responses", json=asked, headers=bearer(ann))).json()
        item = response["output"][0]["id"]
        paths = [
            ("GET", f"/v1/files/{batch['input_file_id']}"),
            ("GET", f"/v1/files/{batch['output_file_id']}/content"),
            ("DELETE", f"/v1/files/{batch['output_file_id']}"),
            ("GET", f"/v1/batches/{batch['id']}"),
            ("POST", f"/v1/batches/{batch['id']}/cancel"),
            ("POST", f"/v1/uploads/{upload_id}/cancel"),
            ("GET", f"/v1/responses/{response['id']}"),
            ("GET", f"/v1/responses/{response['id']}/input_items"),
            ("GET", f"/v1/responses/{response['id']}?stream=true"),
            ("POST", f"/v1/responses/{response['id']}/cancel"),
            ("DELETE", f"/v1/responses/{response['id']}"),
            ("GET", f"/v1/conversations/{conversation}"),
            ("GET", f"/v1/conversations/{conversation}/items/{item}"),
            ("DELETE", f"/v1/conversations/{conversation}/items/{item}"),
            ("DELETE", f"/v1/conversations/{conversation}"),
        ]
        for method, path in paths:
            assert (await client.request(method, path, headers=bearer(bob))).status_code == 404, (method, path)
        for path in ("/v1/files", "/v1/batches"):
            assert (await client.get(path, headers=bearer(bob))).json()["data"] == []
            assert (await client.get(path, headers=bearer(ann))).json()["data"] != []
        uses = [
            ("/v1/responses", asked | {"conversation": None, "previous_response_id": response["id"]}, 400),
            ("/v1/responses", asked, 404),
            ("/v1/responses", asked | {"conversation": None, "input": [{"type": "item_reference", "id": item}]}, 400),
            (
                "/v1/batches",
                {"input_file_id": batch["input_file_id"], "endpoint": CHAT, "completion_window": "1h"},
                400,
            ),
        ]
        for path, body, status in uses:
            assert (await post(path, json=body, headers=bearer(bob))).status_code == status, body
        for method, path in paths:
            if method == "GET" and "stream" not in path:
                assert (await client.request(method, path, headers=bearer(ann))).status_code == 200, path


async def test_what_a_batch_uses_is_written_down_for_its_key(database: Database) -> None:
    ann = make_key(database, "ann")
    async with running(database) as client:
        await wait(client, ann, await submit(client, ann, [line(i) for i in range(5)]))
        [used] = (await client.get("/llmasos/v1/usage", headers=bearer(ann))).json()["data"][:1] or [None]
        assert used["requests"] == 5 and used["output_tokens"] == 25


async def test_a_key_may_not_reach_further_through_a_batch(database: Database) -> None:
    ann = make_key(database, "ann", models=["other-*"])
    async with running(database) as client:
        batch = await wait(client, ann, await submit(client, ann, [line(0)]))
        assert batch["status"] == "failed"
        assert batch["errors"]["data"][0]["code"] == "insufficient_permissions"


async def test_a_batch_ends_with_its_key(database: Database) -> None:
    ann, eve = make_key(database, "ann"), make_key(database, "eve", ("manage", "inference"))
    async with running(database, FakeLLM(delay=0.01)) as client:
        id = await submit(client, ann, [line(i) for i in range(200)])
        while (await client.get(f"/v1/batches/{id}", headers=bearer(ann))).json()["request_counts"]["completed"] < 3:
            await asyncio.sleep(0.01)
    with database.session() as session:
        registry.revoke(session, id_of(ann), actor="local:test")
    async with running(database) as client:
        for _ in range(500):
            with database.session(read_only=True) as session:
                batch = store.get(session, id, id_of(ann))
            if batch.status == "failed":
                break
            await asyncio.sleep(0.02)
        assert batch.status == "failed" and batch.errors.data[0].code == "invalid_api_key"
        assert batch.request_counts.completed >= 3 and batch.output_file_id
        assert (await client.get("/v1/batches", headers=bearer(eve))).json()["data"] == []


async def test_no_further_line_is_answered_once_the_key_is_revoked(database: Database) -> None:
    ann = make_key(database, "ann")
    llm = FakeLLM(delay=0.01)
    async with running(database, llm) as client:
        id = await submit(client, ann, [line(i) for i in range(200)])
        while (await client.get(f"/v1/batches/{id}", headers=bearer(ann))).json()["request_counts"]["completed"] < 3:
            await asyncio.sleep(0.01)
        with database.session() as session:
            registry.revoke(session, id_of(ann), actor="local:test")
        for _ in range(500):
            with database.session(read_only=True) as session:
                batch = store.get(session, id, id_of(ann))
            if batch.status == "completed":
                break
            await asyncio.sleep(0.02)
        assert batch.request_counts.failed > 0 and batch.request_counts.completed < 200


async def test_a_key_s_limits_hold_for_the_lines_of_its_batches(database: Database) -> None:
    ann = make_key(database, "ann", tokens_per_day=60)
    async with running(database) as client:
        id = await submit(client, ann, [line(i) for i in range(40)])
        await asyncio.sleep(1)
        batch = (await client.get(f"/v1/batches/{id}", headers=bearer(ann))).json()
        # each takes 15 tokens, and those that were begun together are answered
        assert batch["status"] == "in_progress" and 4 <= batch["request_counts"]["completed"] <= 16
        assert (await client.post(f"/v1/batches/{id}/cancel", headers=bearer(ann))).json()["status"] == "cancelling"
        assert (await wait(client, ann, id))["status"] == "cancelled"


async def test_responses_that_end_at_once_all_enter_their_conversation(database: Database) -> None:
    ann = make_key(database)
    async with running(database) as client:
        conversation = (await client.post("/v1/conversations", json={}, headers=bearer(ann))).json()["id"]
        asked = [{"model": "fake", "input": f"hi {i}", "conversation": conversation} for i in range(8)]
        answers = await asyncio.gather(*(client.post("/v1/responses", json=one, headers=bearer(ann)) for one in asked))
        assert {answer.status_code for answer in answers} == {200}
        path = f"/v1/conversations/{conversation}/items?limit=100&order=asc"
        items = (await client.get(path, headers=bearer(ann))).json()["data"]
        texts = [item["content"][0]["text"] for item in items]
        assert sorted(texts[0::2]) == [f"hi {i}" for i in range(8)]
        assert [f"{text}!" for text in texts[0::2]] == texts[1::2]


async def test_what_no_database_takes_is_refused(database: Database) -> None:
    ann = bearer(make_key(database))
    async with running(database) as client:
        for id in ("%00", "a%00b", "%ff", "%ed%a0%80", "x" * 500, "%27%20OR%201=1"):
            for path in ("files/{}", "files/{}/content", "batches/{}", "responses/{}", "conversations/{}"):
                answer = await client.get(f"/v1/{path.format(id)}", headers=ann)
                assert answer.status_code == 404, answer.text
            for path in ("files?purpose={}", "files?after={}", "batches?after={}"):
                assert (await client.get(f"/v1/{path.format(id)}", headers=ann)).status_code in (200, 400)
        half = '"\\ud800"'
        for body in (
            f'{{"model": "fake", "input": {half}}}',
            f'{{"model": "fake", "input": "x", "metadata": {{"a": {half}}}}}',
            f'{{"model": "fake", "input": "x", "previous_response_id": {half}}}',
            '{"model": "fake", "input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": NaN}}]}',
            '{"model": "fake", "input": "x", "previous_response_id": "a\\u0000b"}',
        ):
            headers = ann | {"content-type": "application/json"}
            answer = await client.post("/v1/responses", content=body.encode(), headers=headers)
            assert answer.status_code == 400, answer.text
        body = {"model": "fake", "input": [{"role": "user", "content": "a\0b"}], "metadata": {"a": "b\0c"}}
        answer = await client.post("/v1/responses", json=body, headers=ann)
        assert answer.status_code == 200, answer.text
        assert (await client.get(f"/v1/responses/{answer.json()['id']}", headers=ann)).json() == answer.json()
