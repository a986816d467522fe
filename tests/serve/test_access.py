"""Keys over HTTP: what opens what, what is counted, what is written down."""

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from access_world import BODY, INSECURE, LOOPBACK, REQUIRED, Clock, bearer, client_of, guarded, id_of, make_key
from argon2 import PasswordHasher
from fake_llm import FakeLLM
from sqlalchemy import text

from llmasos.errors import ServerError, StoreError
from llmasos.serve.access import directory, keys, registry, usage
from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.serve.access.usage import Counts
from llmasos.serve.caller import Caller
from llmasos.serve.server import create_app
from llmasos.store.database import Database


@pytest.fixture(autouse=True)
def _quick_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_hasher", lambda: PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


@pytest.fixture
def memory() -> Iterator[Database]:
    with Database.open("sqlite://") as opened:
        yield opened


async def ask(client: httpx.AsyncClient, key: str | None = None, **fields) -> httpx.Response:
    return await client.post("/v1/completions", json=BODY | fields, headers=bearer(key) if key else {})


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_a_key_opens_what_nothing_else_does(database: Database) -> None:
    key = make_key(database)
    id, secret = keys.parts_of(key)
    access, client = guarded(database)
    async with client:
        assert (await ask(client, key)).status_code == 200
        assert (await client.post("/v1/completions", json=BODY, headers={"x-api-key": key})).status_code == 200
        wrong = ["", "none", key[:-1], key + "x", keys.text_of(id, secret[::-1]), keys.text_of("a" * 10, secret)]
        for text_ in wrong:
            response = await ask(client, text_)
            assert error(response) == (401, "invalid_api_key"), text_
            assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"]
            assert secret not in response.text
    await access.close()


async def test_a_key_that_is_not_ascii_is_no_key(memory: Database) -> None:
    access, client = guarded(memory)
    async with client:
        headers = [(b"authorization", "Bearer sk-llmasos-é".encode("latin-1"))]
        assert (await client.post("/v1/completions", json=BODY, headers=headers)).status_code == 401
    await access.close()


async def test_errors_are_in_the_words_of_the_asked_protocol(memory: Database) -> None:
    access, client = guarded(memory)
    async with client:
        theirs = (await client.post("/v1/messages", json={})).json()
        assert theirs["type"] == "error" and theirs["error"]["type"] == "authentication_error"
        assert isinstance((await client.post("/api/chat", json={})).json()["error"], str)
    await access.close()


async def test_an_expired_key_opens_nothing_from_that_moment_on(memory: Database) -> None:
    clock = Clock()
    key = make_key(memory, expires=clock.moment + timedelta(hours=1))
    access, client = guarded(memory, clock=clock)
    async with client:
        clock.pass_(3599)
        assert (await ask(client, key)).status_code == 200
        clock.pass_(1)
        response = await ask(client, key)
        assert error(response) == (401, "invalid_api_key") and "expired" in response.text
    await access.close()


async def test_a_key_revoked_elsewhere_is_shut_out_within_a_second(database: Database) -> None:
    key = make_key(database)
    access, client = guarded(database)
    async with client:
        assert (await ask(client, key)).status_code == 200
        with database.session() as session:  # as another process does
            registry.revoke(session, id_of(key), actor="local:test")
        async with asyncio.timeout(1):
            while (response := await ask(client, key)).status_code == 200:
                await asyncio.sleep(0.05)
        assert error(response) == (401, "invalid_api_key") and "revoked" in response.text
        access2, client2 = guarded(database)
        async with client2:
            assert error(await ask(client2, key)) == (401, "invalid_api_key")
        await access2.close()
    await access.close()


async def test_a_key_made_elsewhere_opens_a_running_server_at_once(memory: Database) -> None:
    access, client = guarded(memory)
    async with client:
        await ask(client, make_key(memory))
        for name in ("new", "newer"):
            assert (await ask(client, make_key(memory, name))).status_code == 200
    await access.close()


async def test_unknown_keys_share_the_readings_that_they_cause(memory: Database) -> None:
    clock = Clock()
    access, client = guarded(memory, clock=clock)
    readings, run = 0, memory.run

    async def counting(work, **options):
        nonlocal readings
        readings += 1
        return await run(work, **options)

    async def away(work, **options):
        raise StoreError("away")

    async with client:
        await ask(client, make_key(memory))
        unknown = [keys.text_of(*keys.new_text()) for _ in range(50)]
        clock.pass_(0.01)
        memory.run = counting
        answers = await asyncio.gather(*(ask(client, one) for one in unknown))
        assert ({answer.status_code for answer in answers}, readings) == ({401}, 1)
        clock.pass_(0.01)
        memory.run = away
        assert [(await ask(client, one)).status_code for one in unknown[:3]] == [503] * 3, "one may be new"
        memory.run = run
    await access.close()


async def test_knowledge_never_grows_old_while_requests_are_decided(memory: Database) -> None:
    clock = Clock()
    key = make_key(memory)
    access, client = guarded(memory, clock=clock)
    async with client:
        assert (await ask(client, key)).status_code == 200
        with memory.session() as session:
            registry.revoke(session, id_of(key), actor="local:test")
        clock.pass_(directory.STALE_AFTER + 0.01)
        assert (await ask(client, key)).status_code == 401  # the very next one
    await access.close()


async def test_known_keys_hold_while_the_database_is_away_but_not_for_long(memory: Database) -> None:
    clock = Clock()
    key = make_key(memory)
    access, client = guarded(memory, clock=clock)
    run = memory.run

    async def broken(work, **options):
        raise StoreError("away")

    async with client:
        assert (await ask(client, key)).status_code == 200
        memory.run = broken
        clock.pass_(directory.GRACE)
        assert (await ask(client, key)).status_code == 200
        clock.pass_(1)
        refused = await ask(client, key)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert "away" not in refused.text  # the cause is for the log
        memory.run = run
        assert (await ask(client, key)).status_code == 200
    await access.close()


async def test_the_slow_hash_is_computed_once_per_key(memory: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    real = directory.is_secret
    monkeypatch.setattr(directory, "is_secret", lambda *a: hashed.append(1) or real(*a))
    key = make_key(memory)
    access, client = guarded(memory)
    async with client:
        for _ in range(5):
            assert (await ask(client, key)).status_code == 200
        assert len(hashed) == 1
        for _ in range(3):
            await ask(client, keys.text_of("z" * 10, "A" * 43))
        assert len(hashed) == 1  # an unknown id costs no hash
    await access.close()


async def test_guesses_cost_no_slow_hash_and_keep_no_right_key_out(
    memory: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    real = directory.is_secret
    monkeypatch.setattr(directory, "is_secret", lambda *a: hashed.append(1) or real(*a))
    key = make_key(memory)
    id, _ = keys.parts_of(key)
    access, client = guarded(memory)
    async with client:
        guesses = [keys.text_of(id, f"{i:043}") for i in range(50)]
        assert {(await ask(client, one)).status_code for one in guesses} == {401}
        assert not hashed
        assert (await ask(client, key)).status_code == 200  # not used before, and from the same address
    await access.close()


def test_the_secret_is_compared_by_argon2_and_its_hash_tells_32_bits() -> None:
    _, secret = keys.new_text()
    hashed, wrong = keys.hash_of(secret), secret[:-1] + "!"
    mark, argon2 = hashed[:8], hashed[8:]
    assert argon2.startswith("$argon2id$") and secret not in hashed
    assert mark == hashlib.sha256(secret.encode()).hexdigest()[:8]
    assert argon2 != keys.hash_of(secret)[8:]
    assert keys.may_be_secret(hashed, secret) and not keys.may_be_secret(hashed, wrong)
    for made in (hashed, argon2):  # keys of old had no mark
        assert keys.may_be_secret(made, secret) and keys.is_secret(made, secret) and not keys.is_secret(made, wrong)
    assert len({keys.new_text() for _ in range(1000)}) == 1000


@pytest.mark.parametrize(("path", "name"), [("/v1/completions", "small-9"), ("/api/generate", "small-9:latest")])
async def test_a_name_that_is_unknown_tells_a_key_only_of_its_own_models(
    memory: Database, path: str, name: str
) -> None:
    key = make_key(memory, models=["small-*"])
    access, client = guarded(memory, llms={name: FakeLLM(name) for name in ("small-1", "one")})
    async with client:
        answer = await client.post(path, json={"model": name, "prompt": "hi"}, headers=bearer(key))
        assert answer.status_code == 404 and "Served: small-1." in answer.text
        for other in ("one", "two"):  # whether it is there is not told
            refused = await client.post(path, json={"model": other, "prompt": "hi"}, headers=bearer(key))
            assert refused.status_code == 403 and f"may not use the model '{other}'" in refused.text
    await access.close()


async def test_models_that_a_key_may_not_use_are_refused(memory: Database) -> None:
    key = make_key(memory, models=["small-*", "one"])
    access, client = guarded(memory, llms={name: FakeLLM(name) for name in ("small-1", "one", "two")})
    async with client:
        for name, status in (("small-1", 200), ("one", 200), ("two", 403), ("none", 403), ("ONE", 403)):
            response = await ask(client, key, model=name)
            assert response.status_code == status, name
        assert error(await ask(client, key, model="two", stream=True)) == (403, "insufficient_permissions")
    await access.close()


def test_applications_are_restricted_like_models() -> None:
    caller = Caller("id", "ann", apps=("notes",))
    caller.check_app("notes")
    with pytest.raises(Exception, match="may not use the application 'mail'"):
        caller.check_app("mail")
    Caller("id", "ann").check_app("mail")


async def test_a_request_stands_behind_its_keys_priority_and_in_its_own_cache(memory: Database) -> None:
    llm = FakeLLM()
    ann, bob = make_key(memory, priority=5), make_key(memory, "bob")
    shared = make_key(memory, "shared", share_cache=True)
    access, client = guarded(memory, llms=llm)
    async with client:
        for key in (ann, bob, shared):
            await ask(client, key)
            await ask(client, key, priority=-3, cache_salt="mine")
            await ask(client, key, priority=9)
        seen = [(one.get("priority"), one.get("cache_salt")) for one in llm.requests]
    a, b = id_of(ann), id_of(bob)
    assert seen == [
        *((5, f"{a}:"), (5, f"{a}:mine"), (9, f"{a}:")),
        *((0, f"{b}:"), (0, f"{b}:mine"), (9, f"{b}:")),
        *((0, None), (0, ":mine"), (9, None)),
    ]
    await access.close()


async def test_limits_answer_429_with_the_usual_headers(memory: Database) -> None:
    clock = Clock()
    key = make_key(memory, requests_per_minute=2, tokens_per_minute=1000)
    access, client = guarded(memory, clock=clock)
    async with client:
        first = await ask(client, key)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "30.000s"
        assert first.headers["x-ratelimit-limit-tokens"] == "1000"
        await ask(client, key)
        third = await ask(client, key)
        assert error(third) == (429, "rate_limit_exceeded")
        assert third.json()["error"]["type"] == "rate_limit_error"
        assert third.headers["retry-after"] == "30" and third.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await client.get("/v1/models", headers=bearer(key))).status_code == 200  # asks no model
        clock.pass_(30)
        assert (await ask(client, key)).status_code == 200
    await access.close()


async def test_tokens_are_charged_when_a_request_has_ended(memory: Database) -> None:
    clock = Clock()
    key = make_key(memory, tokens_per_minute=60)
    access, client = guarded(memory, clock=clock)
    async with client:
        assert (await ask(client, key, prompt="x" * 60, max_tokens=40)).status_code == 200  # 100 in all
        refused = await ask(client, key)
        assert error(refused) == (429, "rate_limit_exceeded") and refused.headers["retry-after"] == "41"
        clock.pass_(41)
        assert (await ask(client, key)).status_code == 200
    await access.close()


@pytest.mark.parametrize("limit", [{"tokens_per_day": 50}, {"tokens_per_month": 50}, {"requests_per_day": 1}])
async def test_quotas_hold_across_restarts_and_begin_anew(database: Database, limit: dict[str, int]) -> None:
    clock = Clock()
    key = make_key(database, **limit)
    access, client = guarded(database, clock=clock)
    async with client:
        assert (await ask(client, key, prompt="x" * 60)).status_code == 200
        assert error(await ask(client, key)) == (429, "insufficient_quota")
    await access.close()
    access, client = guarded(database, clock=clock)
    async with client:
        assert error(await ask(client, key)) == (429, "insufficient_quota")
        clock.pass_(24 * 3600)
        monthly = "tokens_per_month" in limit
        assert (await ask(client, key)).status_code == (429 if monthly else 200)
        clock.pass_(20 * 24 * 3600)
        assert (await ask(client, key)).status_code == 200
    await access.close()


async def test_requests_at_once_are_limited_and_freed_however_they_end(memory: Database) -> None:
    key = make_key(memory, max_parallel=2)
    access, client = guarded(memory, llms=FakeLLM(delay=0.02))
    async with client:
        found = await asyncio.gather(*(ask(client, key, stream=i % 2 == 0) for i in range(6)))
        assert sorted(r.status_code for r in found) == [200, 200, 429, 429, 429, 429]
        task = asyncio.create_task(ask(client, key, prompt="x" * 500, max_tokens=400))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ask(client, key, prompt="boom")
        assert [(await ask(client, key)).status_code for _ in range(3)] == [200, 200, 200]
    await access.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_whoever_has_the_last_byte_may_ask_again_at_once(memory: Database, stream: bool) -> None:
    key = make_key(memory, max_parallel=1, requests_per_day=5)
    access = Access(memory, REQUIRED)
    app = create_app(FakeLLM(), access=access)
    held: list[int] = []

    async def watched(scope, receive, send) -> None:
        async def sending(message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                held.append(next(iter(access._meters.values())).num_parallel)
            await send(message)

        await app(scope, receive, sending)

    async with client_of(watched) as client:
        for _ in range(3):
            assert (await ask(client, key, stream=stream)).status_code == 200
        assert (await ask(client, key, prompt="boom")).status_code == 500
        assert held == [0, 0, 0, 0]
        assert (await ask(client, key)).status_code == 200
        assert error(await ask(client, key)) == (429, "insufficient_quota"), "each was counted, and once"
    await access.close()


async def test_usage_is_told_per_key_model_and_day(database: Database) -> None:
    clock = Clock()
    ann, boss = make_key(database, "ann"), make_key(database, "boss", scopes=("inference", "manage"))
    access, client = guarded(database, clock=clock)
    async with client:
        await ask(client, ann, prompt="hello", max_tokens=3)
        await ask(client, ann, prompt="hello", max_tokens=3, stream=True)
        await ask(client, ann, model="none")
        await ask(client, ann, prompt="boom")
        clock.pass_(24 * 3600)
        await ask(client, boss, prompt="hi", max_tokens=2)

        async def read(who: str, **query) -> list[tuple]:
            response = await client.get("/llmasos/v1/usage", params=query, headers=bearer(who))
            counts = ("requests", "errors", "prompt_tokens", "cached_tokens", "output_tokens")
            return [tuple(r[f] for f in ("day", "key_name", "model", *counts)) for r in response.json()["data"]]

        anns = [
            ("2026-03-14", "ann", None, 1, 1, 0, 0, 0),
            ("2026-03-14", "ann", "fake", 3, 1, 14, 4, 6),
        ]
        bosss = [("2026-03-15", "boss", "fake", 1, 0, 2, 2, 2)]
        assert sorted(await read(boss), key=str) == sorted(anns + bosss, key=str)
        assert await read(ann) == anns  # without `manage`: one's own
        assert await read(ann, key="boss") == []
        assert await read(boss, key="ann", model="fake") == anns[1:]
        assert await read(boss, since="2026-03-15") == bosss
        assert await read(boss, until="2026-03-14") == anns
    await access.close()


async def test_usage_survives_an_orderly_stop_and_a_database_that_was_away(database: Database) -> None:
    access = Access(database)
    caller = Caller("k" * 10, "ann")
    run = database.run

    async def broken(work, **options):
        raise StoreError("away")

    access.record(caller, "m", Counts(requests=1, prompt_tokens=5))
    database.run = broken
    await access.ledger.flush()
    database.run = run
    access.record(caller, "m", Counts(requests=1, output_tokens=7))
    await access.close()
    with database.session(read_only=True) as session:
        [row] = usage.report(session)
        assert (row.requests, row.prompt_tokens, row.output_tokens) == (2, 5, 7)


async def test_usage_is_written_without_being_asked(memory: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "FLUSH_SECONDS", 0.01)
    access = Access(memory)
    access.record(Caller(), "m", Counts(requests=1))
    async with asyncio.timeout(10):
        while True:
            with memory.session(read_only=True) as session:
                if rows := usage.report(session):
                    break
            await asyncio.sleep(0.01)
    assert (rows[0].key_id, rows[0].model) == (usage.NO_KEY, "m")
    await access.close()


async def test_two_servers_on_one_database_add_up(database: Database) -> None:
    one, two = Access(database), Access(database)
    caller = Caller("k" * 10, "ann")
    for _ in range(3):
        one.record(caller, "m", Counts(requests=1, prompt_tokens=10))
        two.record(caller, "m", Counts(requests=1, prompt_tokens=10))
        await asyncio.gather(one.ledger.flush(), two.ledger.flush())
    assert (await one.ledger.spent(caller.key_id)).tokens_today == 60
    await one.close()
    await two.close()


async def test_a_batchs_owner_is_known_without_a_request(memory: Database) -> None:
    key = make_key(memory, models=["m"])
    access = Access(memory)
    assert (await access.caller_with(id_of(key))).models == ("m",)
    with memory.session() as session:
        registry.revoke(session, id_of(key), actor="local:test")
    await access.directory.refresh()
    with pytest.raises(Exception, match="revoked"):
        await access.caller_with(id_of(key))
    await access.close()


async def test_keys_are_made_changed_and_revoked_over_http(database: Database) -> None:
    boss = make_key(database, "boss", scopes=("manage",))
    access, client = guarded(database)
    headers = bearer(boss)
    async with client:
        given = {"name": "app", "models": ["fake"], "expires": "2100-01-01T00:00:00+08:00", "tokens_per_day": 10**9}
        made = await client.post("/llmasos/v1/keys", json=given, headers=headers)
        assert made.status_code == 201
        key = made.json()["key"]
        info = made.json() | {}
        del info["key"]
        assert (
            info["state"] == "active" and info["scopes"] == ["inference"] and info["expires"].startswith("2099-12-31")
        )
        url = f"/llmasos/v1/keys/{info['id']}"
        assert (await client.get(url, headers=headers)).json() == info
        assert key not in (await client.get("/llmasos/v1/keys", headers=headers)).text
        assert (await ask(client, key)).status_code == 200  # at once

        changed = await client.patch(url, json={"models": [], "tokens_per_day": None}, headers=headers)
        assert changed.json()["models"] == [] and changed.json()["tokens_per_day"] is None
        assert (await ask(client, key)).status_code == 403  # at once
        assert (await client.delete(url, headers=headers)).json()["state"] == "revoked"
        assert (await ask(client, key)).status_code == 401  # at once
        assert (await client.patch(url, json={"name": "again"}, headers=headers)).status_code == 400
        assert (await client.get("/llmasos/v1/keys/nobody", headers=headers)).status_code == 404

        log = (await client.get("/llmasos/v1/audit", headers=headers)).json()["data"]
        assert [(one["action"], one["actor"]) for one in log] == [
            ("key.revoke", f"key:{id_of(boss)}"),
            ("key.update", f"key:{id_of(boss)}"),
            ("key.create", f"key:{id_of(boss)}"),
            ("key.create", "local:test"),
        ]
        assert log[1]["details"] == {"models": [], "tokens_per_day": None} and log[1]["request_id"]
        page = (await client.get("/llmasos/v1/audit?limit=3", headers=headers)).json()
        assert page["has_more"] and len(page["data"]) == 3
        rest = await client.get(f"/llmasos/v1/audit?before={page['data'][-1]['id']}", headers=headers)
        assert [one["action"] for one in rest.json()["data"]] == ["key.create"]
    await access.close()


WRONG_WISHES = (
    ({}, "name"),
    ({"name": ""}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": "\ud800"}, "name"),
    ({"name": "a", "scopes": []}, "scopes"),
    ({"name": "a", "scopes": ["root"]}, "scopes.0"),
    ({"name": "a", "tokens_per_day": 0}, "tokens_per_day"),
    ({"name": "a", "tokens_per_day": 2**63}, "tokens_per_day"),
    ({"name": "a", "max_parallel": 1.5}, "max_parallel"),
    ({"name": "a", "priority": 10**6}, "priority"),
    ({"name": "a", "models": ["a\u0000"]}, "models.0"),
    ({"name": "a", "expires": "2001-01-01T00:00:00Z"}, "expires"),
    ({"name": "a", "expires": "2100-01-01T00:00:00"}, "expires"),
    ({"name": "a", "expires": "9999-12-31T23:59:59-12:00"}, "expires"),
    ({"name": "a", "owner": "me"}, "owner"),
)


async def test_a_wrong_wish_for_a_key_is_named(memory: Database) -> None:
    access, client = guarded(memory, LOOPBACK)
    headers = {"content-type": "application/json"}
    async with client:
        for body, param in WRONG_WISHES:
            content = json.dumps(body).encode()  # httpx can't write half a surrogate pair
            response = await client.post("/llmasos/v1/keys", content=content, headers=headers)
            assert response.status_code == 400 and response.json()["error"]["param"] == param, (body, response.text)
    await access.close()


async def test_odd_characters_are_no_server_error(database: Database) -> None:
    access, client = guarded(database, LOOPBACK)
    async with client:
        for path in ("keys/%00", "keys/%ff", "usage?key=%00", "usage?model=%00", "usage?since=x", "audit?before=0"):
            assert (await client.get(f"/llmasos/v1/{path}")).status_code in (400, 404), path
    await access.close()


ABOUT_A_MODEL = [
    ("POST", "/llmasos/v1/load", {"model": "gone"}, 404),
    ("POST", "/llmasos/v1/unload", {"model": "gone"}, 404),
    ("POST", "/llmasos/v1/pin", {"model": "gone", "pinned": True}, 404),
    ("POST", "/llmasos/v1/pulls", {"model": "gone"}, 404),
    ("POST", "/api/pull", {"model": "gone"}, 404),
    ("DELETE", "/api/delete", {"model": "gone"}, 404),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "gone"}, 403),
]


async def test_what_changes_the_server_is_in_the_audit_log(memory: Database) -> None:
    boss, ann = make_key(memory, "boss", scopes=("manage",)), make_key(memory, "ann")
    access, client = guarded(memory)
    async with client:
        path = "/v1/load_lora_adapter"
        body = {"lora_name": "x", "lora_path": "/nowhere"}
        assert (await client.post(path, json=body, headers=bearer(boss))).status_code == 403  # not enabled
        assert (await client.post(path, json=body, headers=bearer(ann))).status_code == 403  # no such right
        for method, own, body, _ in ABOUT_A_MODEL:
            await client.request(method, own, json=body, headers=bearer(boss))
        log = (await client.get("/llmasos/v1/audit", headers=bearer(boss))).json()["data"]
    found = [(one["actor"], one["action"], one["details"]) for one in log if not one["action"].startswith("key.")]
    assert {actor for actor, *_ in found} == {f"key:{id_of(boss)}"}
    assert [(action, details) for _, action, details in reversed(found)] == [
        (f"POST {path}", {"status": 403, "model": "x"}),
        *((f"{method} {own}", {"status": status, "model": "gone"}) for method, own, _, status in ABOUT_A_MODEL),
    ]
    await access.close()


async def test_a_secret_is_nowhere_but_in_its_first_answer(
    database: Database, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client's
    boss = make_key(database, "boss", scopes=("manage", "inference"))
    access, client = guarded(database)
    said = []
    async with client:
        made = await client.post("/llmasos/v1/keys", json={"name": "app"}, headers=bearer(boss))
        key = made.json()["key"]
        wrong = key[:-4] + "AAAA"
        for one in (key, wrong):
            said.append((await ask(client, one, prompt="the secret body")).text * (one == wrong))
            said.append((await ask(client, one, prompt="boom")).text)
            said.append((await client.post(f"/v1/{one}", headers={"x-api-key": boss})).text.replace(one, ""))
        for path in ("keys", "usage", "audit"):
            said.append((await client.get(f"/llmasos/v1/{path}", headers=bearer(boss))).text)
    await access.close()
    with database.engine.connect() as connection:
        names = ("access_keys", "access_usage", "access_audit")
        rows = [str(row) for name in names for row in connection.execute(text(f"SELECT * FROM {name}"))]
    everything = "\n".join([*said, *rows, caplog.text, *capfd.readouterr()])
    assert "app" in everything and "key.create" in caplog.text
    for one in (key, boss, wrong):
        assert keys.parts_of(one)[1] not in everything
    assert "the secret body" not in everything


# who needs no key


async def test_loopback_is_open_and_a_key_that_is_sent_counts_there_too(memory: Database) -> None:
    key = make_key(memory, requests_per_minute=1)
    access, client = guarded(memory, LOOPBACK)
    async with client:
        assert (await ask(client)).status_code == 200
        assert (await ask(client, "none")).status_code == 200  # what SDKs send who must send something
        assert (await client.get("/llmasos/v1/keys")).status_code == 200
        assert (await ask(client, key)).status_code == 200
        assert (await ask(client, key)).status_code == 429
        assert (await client.get("/llmasos/v1/keys", headers=bearer(key))).status_code == 403
        assert (await ask(client, key[:-1] + "_")).status_code == 401
    await access.close()


async def test_what_a_proxy_passes_on_is_not_local(memory: Database) -> None:
    key = make_key(memory)
    access, client = guarded(memory, LOOPBACK)
    async with client:
        for name in ("x-forwarded-for", "forwarded", "x-real-ip"):
            assert (await client.get("/v1/models", headers={name: "203.0.113.7"})).status_code == 401
        assert (await client.get("/v1/models", headers={"x-forwarded-for": "1.2.3.4"} | bearer(key))).status_code == 200
    await access.close()


async def test_strangers_on_an_insecure_server_ask_models_and_manage_nothing(memory: Database) -> None:
    access, client = guarded(memory, INSECURE)
    app = client._transport.app
    async with client_of(app, address="192.168.1.9", host="192.168.1.2:8000") as stranger:
        assert (await ask(stranger)).status_code == 200
        assert (await stranger.get("/llmasos/v1/keys")).status_code == 403
        assert (await stranger.get("/metrics")).status_code == 403
    async with client:
        assert (await client.get("/llmasos/v1/keys")).status_code == 200
    async with client_of(app, host="evil.example") as rebound:  # a page whose name points at 127.0.0.1
        assert (await rebound.get("/llmasos/v1/keys")).status_code == 403
    await access.close()


async def test_metrics_are_for_this_machine_and_for_managers(memory: Database) -> None:
    ann, boss = make_key(memory), make_key(memory, "boss", scopes=("manage",))
    access, client = guarded(memory)
    app = client._transport.app
    async with client, client_of(app, address="10.0.0.9", host="server") as far:
        assert (await client.get("/metrics")).status_code == 200
        assert (await far.get("/metrics")).status_code == 401
        assert (await far.get("/metrics", headers=bearer(ann))).status_code == 403
        assert (await far.get("/metrics", headers=bearer(boss))).status_code == 200
        assert (await far.get("/healthz")).status_code == 200
    await access.close()


async def test_a_page_of_another_origin_changes_nothing_in_its_visitors_name(memory: Database) -> None:
    access, client = guarded(memory, LOOPBACK)
    async with client:
        evil = {"origin": "https://evil.example"}
        assert (await client.post("/v1/completions", json=BODY, headers=evil)).status_code == 403
        assert (await client.delete("/llmasos/v1/keys/x", headers={"origin": "null"})).status_code == 403
        own = {"origin": "http://127.0.0.1:8000"}
        assert (await client.post("/v1/completions", json=BODY, headers=own)).status_code == 200
        assert "access-control-allow-origin" not in (await client.get("/v1/models", headers=evil)).headers
    await access.close()


async def test_allowed_origins_may_ask_and_read(memory: Database) -> None:
    key = make_key(memory)
    access, client = guarded(memory, Policy(True, True, ("https://app.example",)))
    async with client:
        preflight = {
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        asked = await client.options("/v1/completions", headers=preflight)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://app.example"
        response = await client.post(
            "/v1/completions", json=BODY, headers=bearer(key) | {"origin": "https://app.example"}
        )
        assert response.status_code == 200
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        refused = await client.post("/v1/completions", json=BODY, headers={"origin": "https://app.example"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"
        other = await client.options("/v1/completions", headers=preflight | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    await access.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "server.lan", ""])
def test_beyond_loopback_keys_are_required_and_there_must_be_one(host: str) -> None:
    with pytest.raises(ServerError, match=r"llmasos key create.*--insecure"):
        Policy.decide(host, num_keys=0)
    assert Policy.decide(host, num_keys=1) == Policy(require_key=True, exposed=True)
    assert Policy.decide(host, num_keys=0, insecure=True) == Policy(require_key=False, exposed=True)
    assert Policy.decide(host, num_keys=1, insecure=True, require_key=True).require_key


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_key_unless_told_so(host: str) -> None:
    assert Policy.decide(host, num_keys=3) == Policy()
    assert Policy.decide(host, num_keys=1, require_key=True).require_key
    with pytest.raises(ServerError, match="there is none"):
        Policy.decide(host, num_keys=0, require_key=True)


def test_revoked_and_expired_keys_let_no_server_start(database: Database) -> None:
    key = make_key(database, expires=datetime.now(UTC) + timedelta(hours=1))
    with database.session() as session:
        assert registry.num_usable(session) == 1
        registry.update_key(session, id_of(key), {"expires": datetime.now(UTC)}, actor="local:test")
    other = make_key(database)
    with database.session() as session:
        assert registry.num_usable(session) == 1
        registry.revoke(session, id_of(other), actor="local:test")
        assert registry.num_usable(session) == 0


def test_a_name_that_two_keys_have_names_neither(database: Database) -> None:
    first, second = make_key(database, "app"), make_key(database, "app")
    with database.session() as session:
        with pytest.raises(registry.KeyNotFoundError, match="Several keys are named 'app'"):
            registry.find(session, "app")
        registry.revoke(session, id_of(first), actor="local:test")
        assert registry.find(session, "app").id == id_of(second)


async def test_without_access_control_an_application_asks_nobody() -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(FakeLLM())), base_url="http://127.0.0.1"
    ) as client:
        assert (await ask(client)).status_code == 200
        assert (await client.get("/llmasos/v1/keys")).status_code == 404


async def test_lists_hold_only_what_a_key_may_use(memory: Database) -> None:
    key, every = make_key(memory, models=["small-*"]), make_key(memory, "all")
    access, client = guarded(memory, llms={name: FakeLLM(name) for name in ("small-1", "big")})

    async def names(path: str, text_: str, **headers: str) -> str:
        return (await client.get(path, headers=bearer(text_) | headers)).text

    async with client:
        for path, headers in (
            ("/v1/models", {}),
            ("/v1/models", {"anthropic-version": "2023-06-01"}),
            ("/api/tags", {}),
        ):
            assert "small-1" in await names(path, key, **headers) and "big" not in await names(path, key, **headers)
            assert "small-1" in await names(path, every, **headers) and "big" in await names(path, every, **headers)
        assert (await client.get("/v1/models/big", headers=bearer(key))).status_code == 403
        assert (await client.get("/v1/models/small-1", headers=bearer(key))).status_code == 200
        assert (await client.get("/healthz")).json()["models"] == []  # keys are required, and none was sent
    await access.close()


async def test_embeddings_and_scores_use_tokens_too(memory: Database) -> None:
    key = make_key(memory, tokens_per_day=100)
    access, client = guarded(memory)
    async with client:
        made = await client.post(
            "/v1/embeddings", json={"model": "fake", "input": ["x" * 60, "y" * 50]}, headers=bearer(key)
        )
        assert made.status_code == 200
        again = await client.post("/v1/embeddings", json={"model": "fake", "input": "x"}, headers=bearer(key))
        assert error(again) == (429, "insufficient_quota")
        usage_ = (await client.get("/llmasos/v1/usage", headers=bearer(key))).json()["data"]
        assert [(one["model"], one["requests"], one["prompt_tokens"]) for one in usage_] == [("fake", 1, 110)]
    await access.close()


async def test_usage_is_told_under_the_models_own_name(memory: Database) -> None:
    key = make_key(memory)
    access, client = guarded(memory, aliases={"other": "fake"})
    async with client:
        for name in ("fake", "other"):
            assert (await ask(client, key, model=name)).status_code == 200
        usage_ = (await client.get("/llmasos/v1/usage", headers=bearer(key))).json()["data"]
        assert [(one["model"], one["requests"]) for one in usage_] == [("fake", 2)]
    await access.close()
