"""A live server with installed applications, for the tests of `llmasos.serve.apps`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from access_world import LOOPBACK, make_key
from fake_llm import FakeLLM, live_server

from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.store.database import Database
from llmasos.store.packages import pack

ASK = '''
import json, os, time
from collections.abc import Iterator
from llmasos import Application
from llmasos.apps import report_progress

app = Application(title="Ask")


@app.route("/ask", tool=True)
def ask(question: str) -> str:
    """Ask a model."""
    print("asked:", question)
    return app.llm.chat(question, max_tokens=8)


@app.route("/tell")
def tell(n: int, pause: float = 0.0) -> Iterator[str]:
    """Count."""
    try:
        for i in range(n):
            time.sleep(pause)
            yield f"{i} "
    finally:
        open("closed", "w").write("yes")


@app.route("/echo", methods=["POST"])
def echo(value: dict) -> dict:
    """Give it back."""
    return value


@app.route("/look")
def look() -> dict:
    """What it knows."""
    return {"cwd": os.getcwd(), "pid": os.getpid(), "env": sorted(os.environ), "config": dict(app.config)}


@app.route("/sleep")
def sleep(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "slept"


@app.route("/exit", methods=["POST"])
def leave() -> None:
    """End."""
    os._exit(3)


@app.chat
def chat(messages: list) -> Iterator[str]:
    """Repeat."""
    yield "you said: "
    yield messages[-1]["content"]
'''


def package_of(
    folder: Path,
    code: str = ASK,
    *,
    name: str = "ask",
    version: str = "1.0.0",
    more: str = "",
    files: dict | None = None,
) -> Path:
    source = folder / f"{name}-{version}"
    source.mkdir(parents=True, exist_ok=True)
    head = f'[app]\nname = "{name}"\nversion = "{version}"\nsummary = "Asks"\nlicense = "MIT"\n'
    (source / "llmasos.toml").write_text(head + more)
    (source / "app.py").write_text(code)
    for path, data in (files or {}).items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    return pack(source, folder / f"{name}-{version}.llmapp").path


@contextlib.contextmanager
def running(folder: Path, policy: Policy = LOOPBACK, llms: object = None, **options: object) -> Iterator[World]:
    """A live server whose home is in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMASOS_HOME", str(folder / "home"))
        patch.setenv("LLMASOS_OFFLINE", "1")
        llm = llms or FakeLLM()
        with (
            Database.open(f"sqlite:///{folder}/db.sqlite") as database,
            live_server(llm, access=Access(database, policy), **options) as url,
            httpx.Client(base_url=url.removesuffix("/v1"), timeout=60) as client,
        ):
            yield World(folder, database, client, llm)


class World:
    def __init__(self, folder: Path, database: Database, client: httpx.Client, llm: object) -> None:
        self.folder, self.home, self.database, self.client, self.llm = folder, folder / "home", database, client, llm

    def install(self, path: Path, **headers: str) -> dict:
        answer = self.client.put("/llmasos/v1/apps?accept=true", content=path.read_bytes(), headers=headers)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def info(self, name: str = "ask") -> dict:
        return self.client.get(f"/llmasos/v1/apps/{name}").json()

    def act(self, name: str, action: str, **body: object) -> httpx.Response:
        return self.client.post(f"/llmasos/v1/apps/{name}/{action}", json=body)

    def key(self, name: str, **fields: object) -> dict[str, str]:
        return {"authorization": f"Bearer {make_key(self.database, name, **fields)}"}


def events_of(text: str) -> list:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
