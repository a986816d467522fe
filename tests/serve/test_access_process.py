"""Access control of a real server, from its start to its stop."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from access_world import BODY, bearer, id_of, make_key

from llmasos.errors import ServerError
from llmasos.serve import serve
from llmasos.serve.access import registry, usage
from llmasos.store.database import Database

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from fake_llm import FakeLLM
from llmasos.serve import serve
serve(["fake"], port=0, load=FakeLLM, on_ready=lambda url: print(url, flush=True), **{options!r})
"""


@contextmanager
def running(**options) -> Iterator[tuple[subprocess.Popen, str]]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), options=options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        try:
            url = process.stdout.readline().strip()
            assert url, process.stderr.read()
            yield process, url
        finally:
            process.kill()


def test_a_server_that_others_reach_starts_with_a_key_and_asks_for_it() -> None:
    with pytest.raises(ServerError, match=r"keys are required.*llmasos key create NAME"):
        serve(["fake"], host="0.0.0.0", port=0, load=lambda name: pytest.fail("loaded before the check"))
    with Database.open() as database:
        key = make_key(database)
    with running(host="0.0.0.0") as (_, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.post(f"{url}/completions", json=BODY).status_code == 401
        assert httpx.post(f"{url}/completions", json=BODY, headers=bearer(key)).status_code == 200


def test_usage_is_not_lost_when_the_server_is_stopped_and_keys_outlive_it(tmp_path: Path) -> None:
    database_url = f"sqlite:///{tmp_path}/a.db"
    with Database.open(database_url) as database:
        key = make_key(database)
        for _ in range(2):
            with running(require_key=True, database=database_url) as (process, url):
                for _ in range(5):
                    assert httpx.post(f"{url}/completions", json=BODY, headers=bearer(key)).status_code == 200
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=30)
                assert process.returncode == 0 and "Traceback" not in said, said
                assert key not in said
        with database.session(read_only=True) as session:
            [row] = usage.report(session)
            assert (row.key_id, row.model, row.requests, row.prompt_tokens) == (id_of(key), "fake", 10, 20)
            assert registry.find(session, id_of(key)).last_used is not None


def test_a_server_that_is_killed_leaves_a_database_that_opens(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    with Database.open(url) as database:
        key = make_key(database, "boss", scopes=("inference", "manage"))
    with running(require_key=True, database=url) as (process, base):
        keys_url = base.removesuffix("/v1") + "/llmasos/v1/keys"
        for i in range(5):
            assert httpx.post(keys_url, json={"name": f"{i}"}, headers=bearer(key)).status_code == 201
        process.kill()
    with Database.open(url) as database, database.session(read_only=True) as session:
        assert len(registry.keys(session)) == 6  # what was answered was kept
