"""Installed applications on a live server: installed, called, held to their rights, changed, taken away."""

import json
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from access_world import REQUIRED
from app_world import ASK, World, events_of, package_of, running
from fake_llm import FakeLLM

from llmasos.client import AppClient
from llmasos.client.native import Native
from llmasos.serve.apps import running as process
from llmasos.serve.apps import supervisor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")
MODELS = '[models]\ndefault = "fake"\n[permissions]\nmodels = ["default"]\n'
CONFIG = '[config.style]\ntype = "choice"\nchoices = ["short", "long"]\ndefault = "short"\n'
BROKEN = "raise RuntimeError('it can not be')"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("apps")
    with running(folder, llms={"fake": FakeLLM("fake"), "other": FakeLLM("other")}) as found:
        path = package_of(folder, more=f"{MODELS}[resources]\nconcurrency = 2\n{CONFIG}")
        found.installed = found.install(path)
        yield found


def test_an_install_shows_what_is_asked_and_takes_only_an_answer_to_that(world: World) -> None:
    path = package_of(world.folder, name="shy", more='[permissions]\nnet = ["a.example"]\nexec = true\n')
    asked = {"reference": str(path)}
    refused = world.client.post("/llmasos/v1/apps", json=asked)
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "not_accepted"
    sheet = refused.json()["sheet"]
    assert [(one["kind"], one["value"]) for one in sheet["asked"]] == [("net", "a.example"), ("exec", "")]
    assert {"what": "files_read", "by": ["namespaces", "landlock"], "why": ""} in sheet["enforced"] or any(
        row["what"] == "files_read" for row in sheet["enforced"]
    )
    assert world.client.post("/llmasos/v1/apps", json={**asked, "accept": "f" * 64}).status_code == 409
    assert world.client.get("/llmasos/v1/apps/shy").status_code == 404
    done = world.client.post("/llmasos/v1/apps", json={**asked, "accept": sheet["accept"]})
    assert done.status_code == 201 and done.json()["state"] == "running"
    gone = world.client.delete("/llmasos/v1/apps/shy?data=true").json()
    assert gone == {"object": "app.removed", "name": "shy", "versions": ["1.0.0"], "data_kept": False}


def test_what_does_not_start_is_not_installed(world: World) -> None:
    path = package_of(world.folder, BROKEN, name="broken")
    answer = world.client.put("/llmasos/v1/apps?accept=true", content=path.read_bytes())
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "unhealthy"
    assert "it can not be" in answer.json()["error"]["message"]
    assert world.client.get("/llmasos/v1/apps/broken").status_code == 404
    assert not (world.home / "apps" / "broken").exists()
    keys = world.client.get("/llmasos/v1/keys").json()["data"]
    assert all(key["state"] == "revoked" for key in keys if key["name"] == "app/broken")


def test_every_surface_of_the_application_is_there(world: World) -> None:
    client = world.client
    assert client.get("/apps/ask/ask", params={"question": "hi"}).json() == "hi!"
    assert client.post("/apps/ask/echo", json={"value": {"a": [1, "é"]}}).json() == {"a": [1, "é"]}
    told = client.get("/apps/ask/tell?n=3")
    assert told.headers["content-type"].startswith("text/event-stream")
    assert events_of(told.text) == ["0 ", "1 ", "2 ", {}]
    job = client.post("/apps/ask/tell", json={"n": 2}, headers={"prefer": "respond-async"})
    assert job.status_code == 202 and job.headers["location"].startswith("/apps/ask/jobs/")
    assert '"result":"0 1 "' in client.get(job.headers["location"] + "/events").text
    wrong = client.get("/apps/ask/tell?n=many")
    assert wrong.status_code == 422 and wrong.headers["content-type"] == "application/problem+json"
    assert client.get("/apps/ask/nothing").status_code == 404
    assert client.get("/apps/nobody/ask").status_code == 404
    with AppClient(f"{client.base_url}/apps/ask") as app:
        assert app.call("ask", question="you") == "you!"
        assert "".join(app.stream("tell", n=2)) == "0 1 "


def test_its_tools_answer_over_mcp(world: World) -> None:
    pytest.importorskip("mcp")
    call = {"jsonrpc": "2.0", "id": 1, "method": "initialize"}
    call["params"] = {
        "protocolVersion": "2025-03-26",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    }
    answer = world.client.post("/apps/ask/mcp", json=call, headers={"accept": "application/json, text/event-stream"})
    assert answer.status_code == 200 and "protocolVersion" in answer.text, answer.text


def test_an_application_that_chats_is_a_model(world: World) -> None:
    names = [model["id"] for model in world.client.get("/v1/models").json()["data"]]
    assert names == ["fake", "other", "app/ask"]
    assert world.client.get("/v1/models/app/ask").json()["capabilities"]["chat"]
    body = {"model": "app/ask", "messages": [{"role": "user", "content": "hi"}]}
    answer = world.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "you said: hi" and answer["model"] == "app/ask"
    streamed = world.client.post("/v1/chat/completions", json={**body, "stream": True}).text
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events_of(streamed) if event["choices"]]
    assert "".join(pieces) == "you said: hi" and streamed.endswith("data: [DONE]\n\n")
    nobody = world.client.post("/v1/chat/completions", json={**body, "model": "app/nobody"})
    assert nobody.status_code == 404 and nobody.json()["error"]["param"] == "model"


def test_what_it_asks_counts_as_its_own(world: World) -> None:
    world.client.get("/apps/ask/ask", params={"question": "who pays"})
    report = world.client.get("/llmasos/v1/usage", params={"key": "app/ask"}).json()["data"]
    assert sum(row["output_tokens"] for row in report if row["model"] == "fake") > 0
    assert {row["key_id"] for row in report} == {world.installed["key_id"]}


def test_it_knows_what_it_needs_and_nothing_of_the_server(world: World) -> None:
    known = world.client.get("/apps/ask/look").json()
    assert known["cwd"] == str(world.home / "apps" / "ask" / "data")
    assert known["config"] == {"style": "short"}
    assert {"LLMASOS_SERVER", "LLMASOS_API_KEY", "LLMASOS_APP_NAME", "LLMASOS_APP_DATA"} <= set(known["env"])
    assert "LLMASOS_OFFLINE" not in known["env"], "a variable of the server"


def test_nothing_of_the_caller_goes_with_its_request(tmp_path: Path) -> None:
    code = ASK + '\nfrom fastapi import Request\n\n@app.asgi.get("/headers")\ndef headers(request: Request) -> dict:\n'
    code += "    return dict(request.headers)\n"
    with running(tmp_path, REQUIRED) as world:
        owner = world.key("owner", scopes=("inference", "manage"))
        ann = world.key("ann", apps=("other-*",))  # servers know of keys within a second
        bob = world.key("bob", apps=("ask",), models=("app/*",), requests_per_minute=2)
        world.install(package_of(tmp_path, code), **owner)
        sent = {**owner, "cookie": "a=b", "x-forwarded-for": "1.2.3.4", "x-mine": "yes", "x-request-id": "one"}
        seen = world.client.get("/apps/ask/headers", headers=sent).json()
        assert seen["x-mine"] == "yes" and seen["x-request-id"] == "one"
        assert not {"authorization", "cookie", "x-forwarded-for", "x-api-key"} & set(seen)

        assert world.client.get("/apps/ask/look", headers=ann).status_code == 403
        assert world.client.get("/llmasos/v1/apps", headers=ann).json()["data"] == []
        body = {"model": "app/ask", "messages": [{"role": "user", "content": "hi"}]}
        assert world.client.post("/v1/chat/completions", json=body, headers=ann).status_code == 403
        assert world.client.post("/v1/chat/completions", json=body, headers=bob).status_code == 200
        [info] = world.client.get("/llmasos/v1/apps", headers=bob).json()["data"]
        assert info["key_id"] is None and info["source"] is None and info["enforced"] == []
        for path in ("/llmasos/v1/apps/ask/stop", "/llmasos/v1/apps"):
            assert world.client.post(path, json={"reference": "x"}, headers=bob).status_code == 403
        assert world.client.get("/apps/ask/look", headers=bob).status_code == 200
        assert world.client.get("/apps/ask/look", headers=bob).status_code == 429, "calls count as its key's"
        assert world.client.get("/apps/ask/look").status_code == 401


def test_its_key_opens_nothing_from_elsewhere(world: World) -> None:
    """Not even for who has read it."""
    path = package_of(
        world.folder,
        ASK + '\n@app.route("/key")\ndef key() -> str:\n    return os.environ["LLMASOS_API_KEY"]\n',
        name="leaky",
    )
    world.install(path)
    key = world.client.get("/apps/leaky/key").json()
    assert key.startswith("sk-llmasos-")
    answer = world.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 401 and "belongs to an application" in answer.json()["error"]["message"]
    kept = world.home / "keys" / "apps" / "leaky.json"
    assert kept.stat().st_mode & 0o077 == 0 and key in kept.read_text()
    world.act("leaky", "restart")
    assert world.client.get("/apps/leaky/key").json() == key, "other servers of this home go on with it"
    id = world.info("leaky")["key_id"]
    world.client.delete(f"/llmasos/v1/keys/{id}")
    world.act("leaky", "restart")
    assert world.client.get("/apps/leaky/key").json() != key, "its owner has revoked it: a start makes another"
    world.client.delete("/llmasos/v1/apps/leaky?data=true")


def test_no_more_calls_at_once_than_it_takes(world: World) -> None:
    statuses: list[int] = []

    def call() -> None:
        with httpx.Client(base_url=world.client.base_url, timeout=30) as client:
            statuses.append(client.get("/apps/ask/sleep?seconds=1.5").status_code)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 200, 503, 503]


ONE = '''
from collections.abc import Iterator
from fastapi import Response
from llmasos import Application

app = Application(title="One")


@app.route("/text")
def text() -> str:
    """A text."""
    return "text"


@app.route("/stream")
def stream(n: int) -> Iterator[str]:
    """Some texts."""
    yield from map(str, range(n))


@app.asgi.get("/with/{status}")
def with_(status: int, content: str = "") -> Response:
    return Response(content, status_code=status)


@app.chat
def chat(messages: list) -> Iterator[str]:
    """Texts."""
    yield from "text"
'''
ANSWERS = {
    "text": (200, '"text"'),
    "stream?n=0": (200, None),
    "stream?n=3": (200, None),
    "with/204": (204, ""),
    "with/304": (304, ""),
    "with/200": (200, ""),
    "with/205?content=text": (205, "text"),
    "none": (404, None),
    "stream?n=x": (422, None),
}


@pytest.mark.parametrize("path", ANSWERS)
def test_whoever_has_the_last_byte_may_call_again_at_once(world: World, path: str) -> None:
    world.install(package_of(world.folder, ONE, name="one", more="[resources]\nconcurrency = 1\n"))
    answers = [world.client.get(f"/apps/one/{path}") for _ in range(100)]
    status, text = ANSWERS[path]
    assert {answer.status_code for answer in answers} == {status}
    assert text is None or {answer.text for answer in answers} == {text}
    world.client.delete("/llmasos/v1/apps/one?data=true")


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_has_all_of_a_chat_may_go_on_at_once(world: World, stream: bool) -> None:
    world.install(package_of(world.folder, ONE, name="one", more="[resources]\nconcurrency = 1\n"))
    asked = {"model": "app/one", "messages": [{"role": "user", "content": "?"}], "stream": stream}
    for _ in range(60):
        answer = world.client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 200, answer.text
    world.client.delete("/llmasos/v1/apps/one?data=true")


def test_a_stream_ends_when_its_reader_goes(world: World) -> None:
    closed = world.home / "apps" / "ask" / "data" / "closed"
    closed.unlink(missing_ok=True)
    with world.client.stream("GET", "/apps/ask/tell?n=1000&pause=0.05") as answer:
        assert b"data" in next(answer.iter_bytes()) and answer.status_code == 200
    for _ in range(200):
        if closed.exists():
            break
        time.sleep(0.05)
    assert closed.exists()


def test_a_crash_is_told_and_waited_for(world: World) -> None:
    pid = world.info()["use"]["pid"]
    crashed = world.client.post("/apps/ask/exit", json={})
    assert crashed.status_code == 502 and crashed.json()["error"]["code"] == "app_ended"
    assert "exited" in crashed.json()["error"]["message"]
    waiting = world.client.get("/apps/ask/look")
    assert waiting.status_code == 503 and 1 <= int(waiting.headers["retry-after"]) <= 2
    info = world.info()
    assert (info["state"], info["num_crashes"], info["last_exit"]["code"]) == ("waiting", 1, 3)
    assert info["last_exit"]["reason"] == "exited" and info["retry_at"]
    for _ in range(100):
        if world.client.get("/apps/ask/look").status_code == 200:
            break
        time.sleep(0.1)
    assert world.info()["use"]["pid"] != pid and world.client.get("/healthz").status_code == 200


def test_who_stops_it_holds_it(world: World) -> None:
    assert world.act("ask", "stop").json()["state"] == "stopped"
    assert world.client.get("/apps/ask/look").json()["error"]["code"] == "app_unavailable"
    assert world.client.get("/apps/ask/app.json").json()["title"] == "Ask", "known without it"
    assert world.act("ask", "start").json()["state"] == "running"
    assert world.client.get("/apps/ask/look").status_code == 200
    assert world.act("ask", "dance").status_code == 400


def test_its_values_are_checked_and_kept_where_it_cannot_write(world: World) -> None:
    wrong = world.client.patch("/llmasos/v1/apps/ask", json={"config": {"style": "loud"}})
    assert wrong.status_code == 400 and "loud" in wrong.json()["error"]["message"]
    assert world.client.patch("/llmasos/v1/apps/ask", json={"config": {"other": 1}}).status_code == 400
    done = world.client.patch("/llmasos/v1/apps/ask", json={"config": {"style": "long"}}).json()
    assert done["config"]["style"]["value"] == "long" and done["config"]["style"]["is_set"]
    assert world.client.get("/apps/ask/look").json()["config"] == {"style": "long"}
    assert not (world.home / "apps" / "ask" / "data" / "config.json").exists()


def test_its_log_is_text_and_can_be_followed(world: World) -> None:
    world.client.get("/apps/ask/ask", params={"question": "before\nafter\x1b[2J"})
    for _ in range(100):  # it comes through a pipe
        text = world.client.get("/llmasos/v1/apps/ask/logs").text
        if "stdout asked: before" in text:
            break
        time.sleep(0.05)
    assert "stdout asked: before" in text and "\x1b" not in text
    lines = []

    def follow() -> None:
        with httpx.Client(base_url=world.client.base_url, timeout=30) as client:
            native = client.stream("GET", "/llmasos/v1/apps/ask/logs?follow=true&limit=0")
            with native as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        lines.append(json.loads(line[6:]))
                        return

    thread = threading.Thread(target=follow)
    thread.start()
    for _ in range(50):
        world.client.get("/apps/ask/ask", params={"question": "now"})
        thread.join(0.1)
        if not thread.is_alive():
            break
    assert lines and lines[0]["text"] == "asked: now" and lines[0]["stream"] == "stdout"
    assert world.client.get("/llmasos/v1/apps/nobody/logs").status_code == 404


def test_all_applications_are_in_one_openapi_document(world: World) -> None:
    found = world.client.get("/llmasos/v1/apps/openapi.json").json()
    assert found["openapi"] == "3.1.0" and "/apps/ask/ask" in found["paths"]
    references = set(_references(found))
    known = {f"#/components/{kind}/{name}" for kind, names in found["components"].items() for name in names}
    assert references <= known and all(name.rpartition("/")[2].startswith("Ask_") for name in known)
    operations = [one["operationId"] for item in found["paths"].values() for one in item.values()]
    assert len(set(operations)) == len(operations)


def _references(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def test_python_clients_do_the_same(world: World) -> None:
    from llmasos.client.http import Http, Target
    from llmasos.client.native import native_target

    http = Http(native_target(Target(f"{world.client.base_url}/v1", "LLMasOS", max_retries=0)))
    native = Native(http)
    assert [one.name for one in native.apps()] == ["ask"] and native.app("ask").version == "1.0.0"
    assert native.change_app("ask", "restart").state == "running"
    assert "runs as process" in native.app_log("ask", limit=5)
    assert native.configure_app("ask", style=None).config["style"].is_set is False
    http.close()


def test_an_update_asks_for_what_is_new_and_can_be_taken_back(world: World) -> None:
    index = world.folder / "index"
    from llmasos.store.packages import Index

    for version, more, code in (
        ("1.0.0", "", ASK),
        ("1.1.0", '[permissions]\nenv = ["TZ"]\n', ASK),
        ("1.2.0", '[permissions]\nenv = ["TZ"]\n', BROKEN),
    ):
        Index(str(index)).publish(package_of(world.folder / "many", code, name="grow", version=version, more=more))
    client, places = world.client, {"index": [str(index)]}
    first = client.post("/llmasos/v1/apps", json={"reference": "grow==1.0.0", **places, "accept": True})
    assert first.status_code == 201, first.text
    (world.home / "apps" / "grow" / "data" / "kept").write_text("mine")
    broken = world.act("grow", "update", **places, accept=True)
    assert broken.status_code == 422 and world.info("grow")["version"] == "1.0.0", broken.text
    assert world.info("grow")["versions"] == ["1.0.0"], "what does not run is gone"
    Index(str(index)).yank("grow", "1.2.0", "it does not run")
    asked = world.act("grow", "update", **places)
    assert asked.status_code == 409
    sheet = asked.json()["sheet"]
    assert (sheet["previous"], sheet["version"]) == ("1.0.0", "1.1.0")
    assert sheet["asked"] == [{"kind": "env", "value": "TZ"}]
    done = world.act("grow", "update", **places, accept=sheet["accept"]).json()
    assert (done["version"], done["versions"], done["state"]) == ("1.1.0", ["1.0.0", "1.1.0"], "running")
    back = world.act("grow", "rollback").json()
    assert (back["version"], back["state"]) == ("1.0.0", "running")
    assert (world.home / "apps" / "grow" / "data" / "kept").read_text() == "mine"
    client.delete("/llmasos/v1/apps/grow?data=true")


def wheel(name: str, version: str, code: str) -> bytes:
    import io

    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return found.getvalue()


def test_packages_come_from_its_own_wheels_and_what_lacks_is_named(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    code = ASK.replace("import json", "import json, rare_words\nimport pydantic")
    code += '\n@app.route("/rare")\ndef rare() -> list:\n    return [rare_words.WORD, rare_words.__file__]\n'
    lock = b"rare-words==2.0\npydantic>=2\n"
    files = {
        "requirements.lock": lock,
        "wheels/rare_words-2.0-py3-none-any.whl": wheel("rare_words", "2.0", "WORD = 'petrichor'"),
    }
    world.install(package_of(world.folder, code, name="rare", files=files))
    word, place = world.client.get("/apps/rare/rare").json()
    assert word == "petrichor" and "app-environments/rare/1.0.0" in place
    world.client.delete("/llmasos/v1/apps/rare?data=true")
    assert not (world.home / "cache" / "app-environments" / "rare").exists()

    path = package_of(world.folder, code, name="rarer", files={"requirements.lock": lock})
    answer = world.client.put("/llmasos/v1/apps?accept=true", content=path.read_bytes())
    assert answer.status_code == 422
    said = answer.json()["error"]["message"]
    assert "rare-words==2.0" in said and "offline" in said and "pydantic" not in said


def test_idle_ones_are_stopped_but_not_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(supervisor.Supervisor.__init__, "__kwdefaults__", {"home": None, "idle_seconds": 0.4})
    with running(tmp_path) as world:
        world.install(package_of(tmp_path))
        job = world.client.post("/apps/ask/sleep", json={"seconds": 2.0}, headers={"prefer": "respond-async"}).json()
        time.sleep(1.2)
        assert world.info()["state"] == "running", "its job goes on"
        assert job["state"] == "running"
        for _ in range(100):
            if (info := world.info())["last_exit"]:
                break
            time.sleep(0.1)
        assert (info["state"], info["last_exit"]["reason"], info["num_crashes"]) == ("idle", "stopped", 0)
        assert world.client.get("/apps/ask/echo").status_code == 405, "started again by a call"


def test_processes_end_with_their_server(tmp_path: Path) -> None:
    import psutil

    with running(tmp_path) as world:
        world.install(package_of(tmp_path))
        pid = world.info()["use"]["pid"]
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_paths_that_lead_out_are_no_routes() -> None:
    own = ["/", "/ask", "/a/{b}", "/x/"]
    out = ["/../keys", "//evil", "/%2e%2e/keys", "/a/..", "\\evil", "ask", "/a?b", "/./x", None, 3]
    app = {"routes": [{"path": path} for path in own + out] + ["nonsense"]}
    found = process.documents_of(app, {"paths": {str(path): {} for path in own + out}})
    assert [route["path"] for route in found.app["routes"]] == own
    assert list(found.openapi["paths"]) == own
