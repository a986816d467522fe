"""`llmasos key`: on this machine's database, and on a server elsewhere."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import pytest
import uvicorn
from argon2 import PasswordHasher
from cli_runner import Cli
from fastapi import FastAPI

from llmasos.apps.hosting import listen
from llmasos.cli import messages
from llmasos.serve import problems
from llmasos.serve.access import audit, keys, registry, usage
from llmasos.serve.access.access import Access
from llmasos.serve.access.install import install
from llmasos.serve.access.policy import Policy
from llmasos.serve.access.usage import Batch, Counts
from llmasos.serve.gate import Gate
from llmasos.store.database import Database


@pytest.fixture(autouse=True)
def _quick_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_hasher", lambda: PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


@pytest.fixture(params=["here", "elsewhere"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """What to add to a command so that it asks this machine's database, or a server."""
    if request.param == "here":
        yield ()
        return
    with Database.open() as database, listen("127.0.0.1", 0) as listener:
        with database.session() as session:
            _, text = registry.create(session, {"name": "boss", "scopes": ["manage"]}, actor="local:test")
        monkeypatch.setenv("LLMASOS_API_KEY", text)
        app = FastAPI()
        problems.install(app)
        install(app, Access(database, Policy(require_key=True)))
        app.add_middleware(Gate, max_body_bytes=10**6, loopback_only=True)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield ("--url", f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(20)


def test_a_key_is_printed_once_alone_and_works(cli: Cli, where: tuple[str, ...]) -> None:
    made = cli("key", "create", "my app", "--model", "small-*", "--tokens-per-day", "1000", *where)
    assert made.code == 0, made.err
    id, secret = keys.parts_of(made.out.strip())
    assert "my app" in made.err and id in made.err and secret not in made.err
    for command in (("ls",), ("show", "my app"), ("show", id)):
        shown = cli("key", *command, *where)
        assert shown.code == 0 and id in shown.out and "small-*" in shown.out and secret not in shown.out
    with Database.open() as database, database.session(read_only=True) as session:
        key = registry.find(session, id)
    assert (
        keys.is_secret(key.secret_hash, secret) and key.limits.tokens_per_day == 1000 and key.scopes == ("inference",)
    )


def test_a_revoked_key_stays_in_the_list(cli: Cli, where: tuple[str, ...]) -> None:
    cli("key", "create", "app", *where)
    gone = cli("key", "revoke", "app", *where)
    assert gone.code == 0 and "is revoked" in gone.err and gone.out == ""
    listed = cli("key", "ls", "--json", *where)
    assert [one["state"] for one in listed.json if one["name"] == "app"] == ["revoked"]
    assert cli("key", "revoke", "app", *where).code == 3  # names of revoked keys are free again


def test_everything_about_a_key_can_be_said_and_read_by_machine(cli: Cli, where: tuple[str, ...]) -> None:
    options = [
        "--scope",
        "inference",
        "--scope",
        "manage",
        "--app",
        "notes",
        "--expires",
        "2099-12-31",
        "--share-cache",
    ]
    numbers = {
        "requests_per_minute": 1,
        "tokens_per_minute": 2,
        "requests_per_day": 3,
        "tokens_per_day": 4,
        "tokens_per_month": 5,
        "max_parallel": 6,
        "priority": -7,
    }
    flags = [part for name, n in numbers.items() for part in (f"--{name.replace('_', '-')}", str(n))]
    made = cli("key", "create", "app", *options, *flags, "--json", *where).json
    shown = cli("key", "show", "app", "--json", *where).json
    assert made == {**shown, "key": made["key"]}
    assert {name: shown[name] for name in numbers} == numbers
    assert shown["scopes"] == ["inference", "manage"] and shown["apps"] == ["notes"] and shown["models"] is None
    assert shown["expires"].startswith("2099-12-31T00:00:00") and shown["share_cache"] is True
    table = cli("key", "show", "app", *where).out
    assert "requests/minute" in table and "2099-12-31 00:00 UTC" in table


def test_usage_is_a_table_with_its_sum(cli: Cli, where: tuple[str, ...]) -> None:
    id = cli("key", "create", "app", "--json", *where).json["id"]
    days = [{(date(2026, 3, day), "m"): Counts(requests=day, prompt_tokens=10)} for day in (1, 2)]
    with Database.open() as database, database.session() as session:
        for day in days:
            Batch({id: day, usage.NO_KEY: {(date(2026, 3, 1), "m"): Counts(requests=50)}}, {}, []).write(session)
    assert [one["requests"] for one in cli("key", "usage", "app", "--json", *where).json] == [1, 2]
    assert [one["requests"] for one in cli("key", "usage", "app", "--since", "2026-03-02", "--json", *where).json] == [
        2
    ]
    shown = cli("key", "usage", "--until", "2026-03-01", *where).out.splitlines()
    assert [re.split(r" {2,}", line)[:4] for line in shown[1:]] == [
        ["2026-03-01", "-", "m", "100"],
        ["2026-03-01", "app", "m", "1"],
        ["total", "101", "0", "10"],
    ]
    assert cli("key", "usage", "--since", "2030-01-01", *where).err.strip() == "Nothing was used."


def test_a_span_is_counted_from_now(cli: Cli) -> None:
    for text, span in (("30d", timedelta(days=30)), ("12h", timedelta(hours=12)), ("2w", timedelta(weeks=2))):
        expires = datetime.fromisoformat(cli("key", "create", "a", "--expires", text, "--json").json["expires"])
        assert abs(expires - datetime.now(UTC) - span) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["create"], 2, "needs a name"),
        (["show"], 2, "needs a name"),
        (["revoke"], 2, "needs a name"),
        (["ls", "app"], 2, "one argument too many"),
        (["ls", "--scope", "manage"], 2, "--scope means nothing to llmasos key ls"),
        (["revoke", "app", "--tokens-per-day", "5"], 2, "--tokens-per-day means nothing"),
        (["create", "app", "--since", "2026-01-01"], 2, "--since means nothing"),
        (["create", "app", "--scope", "root"], 2, "root"),
        (["create", "app", "--expires", "soon"], 2, "neither a span nor a date"),
        (["create", "app", "--expires", "2001-01-01"], 2, "is past"),
        (["create", "app", "--tokens-per-day", "0"], 2, "--tokens-per-day"),
        (["create", ""], 2, "name"),
        (["usage", "--since", "yesterday"], 2, "is no day"),
        (["show", "nobody"], 3, "no key 'nobody'"),
        (["revoke", "nobody"], 3, "no key 'nobody'"),
        (["usage", "nobody"], 3, "no key 'nobody'"),
        (["burn"], 2, "burn"),
    ],
)
def test_wrong_lines_say_what_is_wrong(cli: Cli, line: list[str], code: int, said: str) -> None:
    result = cli("key", *line)
    assert (result.code, result.out) == (code, "") and said in result.err, result.err
    assert "Traceback" not in result.err


def test_without_keys_it_says_how_to_make_one(cli: Cli) -> None:
    result = cli("key")
    assert result.code == 0 and "llmasos key create NAME" in result.err
    assert cli("key", "--json").json == []


def test_who_made_a_key_here_is_in_the_audit_log(cli: Cli) -> None:
    cli("key", "create", "app")
    with Database.open() as database, database.session(read_only=True) as session:
        [row] = audit.read(session, limit=10)
    assert row.action == "key.create" and row.actor.startswith("local:") and json.dumps(row.details)


def test_a_server_that_refuses_is_said(cli: Cli, where: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if not where:
        pytest.skip("nobody refuses here")
    monkeypatch.setenv("LLMASOS_API_KEY", "sk-llmasos-wrong")
    result = cli("key", "ls", *where)
    assert result.code == 6 and "LLMASOS_API_KEY" in result.err


def test_both_languages_have_the_same_words() -> None:
    found = [{key for key in messages.table(lang) if ".key." in key or key.startswith("key.")} for lang in ("en", "zh")]
    assert found[0] == found[1] and len(found[0]) > 20
