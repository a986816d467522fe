"""Jobs of installed applications in the server's own list, each its key's."""

import json
import sys
from collections.abc import Iterator

import pytest
from access_world import REQUIRED
from app_world import World, package_of, running

from llmasos.cli import main
from llmasos.client import Client
from llmasos.serve.apps.jobs import _shown

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")

CODE = '''
import os, time
from llmasos import Application
from llmasos.apps import Session, report_progress

app = Application(title="Works")


@app.route("/work", methods=["POST"])
def work(word: str) -> str:
    """Work until somebody writes the file."""
    report_progress(0.5, "half of " + word)
    while not os.path.exists(word):
        time.sleep(0.01)
    if word == "bad":
        raise ValueError("no")
    return word.upper()


@app.route("/allow", methods=["POST"])
def allow(word: str) -> None:
    """Let it end."""
    open(word, "w").close()


@app.route("/count", methods=["POST"])
def count(session: Session) -> int:
    """How often."""
    session["n"] = session.get("n", 0) + 1
    return session["n"]
'''
ASYNC = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("jobs")
    with running(folder, REQUIRED) as found:
        found.ann, found.bob = found.key("ann"), found.key("bob")
        found.boss = found.key("boss", scopes=["inference", "manage"])
        found.other = found.key("other", apps=["nothing"])
        found.install(package_of(folder, CODE, name="works"), **found.boss)
        yield found


def start(world: World, word: str, who: dict[str, str]) -> str:
    answer = world.client.post("/apps/works/work", json={"word": word}, headers=who | ASYNC)
    assert answer.status_code == 202 and "client" not in answer.json()
    return f"works:{answer.json()['id']}"


def ids(world: World, who: dict[str, str], **query: str) -> list[str]:
    answer = world.client.get("/llmasos/v1/jobs", headers=who, params=query)
    assert answer.status_code == 200
    return [job["id"] for job in answer.json()["data"]]


def test_a_job_is_listed_for_its_key_and_for_who_manages(world: World) -> None:
    mine = start(world, "a", world.ann)
    assert mine in ids(world, world.ann) and mine in ids(world, world.boss, kind="app")
    assert ids(world, world.boss, kind="pull") == []
    assert mine not in ids(world, world.bob) and ids(world, world.other) == []
    for path in (f"/llmasos/v1/jobs/{mine}", f"/apps/works/jobs/{mine.partition(':')[2]}"):
        assert world.client.get(path, headers=world.bob).status_code == 404
        assert world.client.get(path, headers=world.ann).status_code == 200
    assert world.client.get("/apps/works/jobs", headers=world.bob).json() == []
    forged = world.bob | {"llmasos-client": "*"}
    assert world.client.get("/apps/works/jobs", headers=forged).json() == []
    assert world.client.post(f"/llmasos/v1/jobs/{mine}/cancel", headers=world.bob).status_code == 404
    shown = world.client.get(f"/llmasos/v1/jobs/{mine}", headers=world.ann).json()
    assert (shown["kind"], shown["name"], shown["state"], shown["can_pause"]) == ("app", "works work", "running", False)
    assert world.client.post(f"/llmasos/v1/jobs/{mine}/pause", headers=world.ann).status_code == 409
    gone = world.client.post(f"/llmasos/v1/jobs/{mine}/cancel", headers=world.boss).json()
    assert gone["state"] == "cancelled"
    assert world.client.get(f"/llmasos/v1/jobs/{mine}", headers=world.ann).json()["state"] == "cancelled"
    world.client.post("/apps/works/allow", json={"word": "a"}, headers=world.ann)  # its thread ends


def test_a_job_is_followed_to_its_end(world: World) -> None:
    mine = start(world, "b", world.ann)
    with Client(f"{str(world.client.base_url).rstrip('/')}/v1", api_key=world.ann["authorization"][7:]) as client:
        states = []
        for job in client.jobs.follow(mine):
            states.append(job)
            world.client.post("/apps/works/allow", json={"word": "b"}, headers=world.bob)
    assert states[-1].state == "done" and states[-1].result == "B"
    bad = start(world, "bad", world.ann)
    world.client.post("/apps/works/allow", json={"word": "bad"}, headers=world.ann)
    events = world.client.get(f"/llmasos/v1/jobs/{bad}/events", headers=world.ann).text
    last = json.loads([line for line in events.splitlines() if line.startswith("data: {")][-1][6:])
    assert last["state"] == "failed" and last["error"]["code"] and "ValueError" not in last["error"]["message"]


def test_the_command_line_shows_and_ends_them(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = start(world, "c", world.ann)
    monkeypatch.setenv("LLMASOS_URL", str(world.client.base_url).rstrip("/"))
    monkeypatch.setenv("LLMASOS_API_KEY", world.ann["authorization"][7:])
    assert main(["jobs"]) == 0
    assert mine in capsys.readouterr().out
    assert main(["jobs", "show", mine, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["message"] == "half of c"
    assert main(["jobs", "cancel", mine, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "cancelled"
    world.client.post("/apps/works/allow", json={"word": "c"}, headers=world.ann)


def test_jobs_end_with_their_application(world: World) -> None:
    mine = start(world, "d", world.ann)
    seen: list[dict[str, object]] = []
    with world.client.stream("GET", f"/llmasos/v1/jobs/{mine}/events", headers=world.ann) as events:
        for line in events.iter_lines():
            if line.startswith("data: {"):
                seen.append(json.loads(line[6:]))
                if len(seen) == 1:
                    assert world.client.post("/llmasos/v1/apps/works/restart", headers=world.boss).status_code == 200
    assert seen[-1]["state"] in ("failed", "cancelled")
    assert world.client.get(f"/llmasos/v1/jobs/{mine}", headers=world.ann).status_code == 404


def test_two_keys_may_name_the_same_session(world: World) -> None:
    def count(who: dict[str, str]) -> int:
        named = who | {"llmasos-session": "s" * 20}
        found: int = world.client.post("/apps/works/count", headers=named).json()
        return found

    assert [count(who) for who in (world.ann, world.ann, world.bob, world.ann)] == [1, 2, 1, 3]


def test_what_an_application_tells_of_its_jobs_is_not_believed() -> None:
    app = type("App", (), {"name": "odd"})()
    running = type("Running", (), {"order": type("Order", (), {"app": app})()})()
    now = "2026-01-01T00:00:00Z"
    good = {"id": "job_ab", "route": "r", "state": "running", "created": now, "updated": now}
    assert _shown(running, good | {"message": "m" * 9999, "x": 1}).message == "m" * 500
    for wrong in (
        *({"id": id} for id in ("../keys", "job_a/b", "", 3)),
        {"state": "queued"},
        {"created": "soon"},
        {"progress": 7},
        {"error": []},
        {"route": "r" * 201},
    ):
        assert _shown(running, good | wrong) is None, wrong
    assert _shown(running, None) is None and _shown(running, []) is None
