"""The console: its files, its words, and a walk through all pages in a browser."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_llm import FakeLLM, asgi_client
from served import served
from store_web import tiny_gguf

from llmasos.inference.llm import LLM
from llmasos.serve import console
from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.serve.server import create_app
from llmasos.store.database import Database

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")
MOST = 300_000
"""Bytes of the first load."""


def table(language: str) -> dict[str, str]:
    source = (console.FOLDER / "strings" / f"{language}.js").read_text(encoding="utf-8")
    found = re.findall(r'^  ("[\w.]+"): (".*"),$', source, re.MULTILINE)
    assert len(found) == sum(line.startswith('  "') for line in source.splitlines()), "a line has another form"
    pairs = [(json.loads(key), json.loads(text)) for key, text in found]
    assert len(dict(pairs)) == len(pairs), "a key is there twice"
    return dict(pairs)


def test_both_languages_have_the_same_keys_and_values() -> None:
    english, chinese = table("en"), table("zh")
    assert sorted(english) == sorted(chinese)
    for key, text in english.items():
        assert set(re.findall(r"\{(\w+)\}", text)) == set(re.findall(r"\{(\w+)\}", chinese[key])), key


def test_every_text_that_a_page_names_is_in_the_tables() -> None:
    known = table("en")
    for name, path in console.files().items():
        if name.endswith(".js") and not name.startswith(("vendor/", "strings/")):
            for key in re.findall(r'\bt\("([\w.]+)"', path.read_text(encoding="utf-8")):
                assert key in known, f"{name}: {key}"


def test_no_file_names_another_host_or_writes_inline() -> None:
    for name, path in console.files().items():
        if name == "llmasos.js" or name.startswith("vendor/"):
            continue
        text = path.read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[\w.-]+\w", text)) - {"http://www.w3.org", "https://api.example.com"}
        assert not addresses, f"{name}: {addresses}"
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=[\"']", text), name


async def test_files_are_served_small_and_guarded() -> None:
    async with asgi_client({"fake": FakeLLM()}) as client:
        page = await client.get("/console/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert page.headers["content-encoding"] == "gzip"
        again = await client.get("/console/", headers={"if-none-match": page.headers["etag"]})
        assert again.status_code == 304 and not again.content
        sdk = await client.get("/console/llmasos.js")
        assert sdk.content == (JS / "llmasos.js").read_bytes(), "one copy"
        answers = await asyncio.gather(*(client.get(f"/console/{name}") for name in console.files()))
        assert {one.status_code for one in answers} == {200}
        assert sum(int(one.headers["content-length"]) for one in answers) < MOST, "all files as sent"
        for name in ("__init__.py", "README.md", "../server.py", "%2e%2e/server.py", "vendor", "pages/none.js"):
            assert (await client.get(f"/console/{name}")).status_code == 404, name


async def test_browsers_are_led_to_it_and_programs_are_not() -> None:
    async with asgi_client({"fake": FakeLLM()}) as client:
        shown = await client.get("/", headers={"accept": "text/html,*/*"})
        assert (shown.status_code, shown.headers["location"]) == (307, "console/")
        assert (await client.get("/console")).headers["location"] == "console/"
        assert (await client.get("/")).text == "Ollama is running"


async def test_the_doctor_tells_no_secrets(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("LLMASOS_DATABASE", "postgresql://llmasos:secret@db/llmasos")
    async with asgi_client({"fake": FakeLLM()}) as client:
        home.mkdir()
        answer = await client.get("/llmasos/v1/doctor", timeout=60)
    assert answer.status_code == 200 and "secret" not in answer.text
    assert answer.json()["settings"]["home"] == str(home)
    assert {"home", "device"} <= {check["name"] for check in answer.json()["checks"]}


class Half(BaseHTTPRequestHandler):
    """A model of which one half comes at once and the other when a file says so."""

    body = b""
    go: Path

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        start, _, stop = asked.removeprefix("bytes=").partition("-")
        first, last = int(start or 0), min(int(stop or len(self.body) - 1), len(self.body) - 1)
        piece = self.body[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(piece)))
        self.send_header("ETag", '"1"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):  # it was paused
            if not stop:  # a download: headers are read by whole ranges
                half = len(piece) // 2
                self.wfile.write(piece[:half])
                deadline = time.monotonic() + 30
                while not self.go.exists() and time.monotonic() < deadline:
                    time.sleep(0.02)
                piece = piece[half:]
            self.wfile.write(piece)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def walk(tiny_llm: LLM, tmp_path: Path) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Goes through a part of the console in a browser and returns what it saw; skips where there is no browser."""
    if NODE is None:
        pytest.skip("node is not installed")
    out = Path(os.environ.get("LLMASOS_SCREENSHOTS") or tmp_path / "out")
    out.mkdir(exist_ok=True)
    (out / "go").unlink(missing_ok=True)
    Half.body, Half.go = tiny_gguf(tmp_path), out / "go"
    files = ThreadingHTTPServer(("127.0.0.1", 0), Half)
    thread = threading.Thread(target=files.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    reference = f"http://127.0.0.1:{files.server_address[1]}/tiny-model.gguf"

    def go(part: str) -> dict[str, Any]:
        command = [str(NODE), "tests/console.browser.js", url, str(out), part, reference]
        done = subprocess.run(command, cwd=JS, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        if "missing" in told:
            pytest.skip(told["missing"])
        assert told["serious"] == {}, "what axe-core finds"
        assert told["errors"] + told["elsewhere"] == [], json.dumps([told["errors"], told["elsewhere"]])
        return told

    try:
        with Database.open(f"sqlite:///{tmp_path / 'access.db'}") as database:
            models = {"tiny": tiny_llm, "slow": FakeLLM("slow", delay=0.4)}
            with served(create_app(models, access=Access(database, Policy()))) as url:
                yield go
    finally:
        files.shutdown()
        files.server_close()
        thread.join()


@pytest.mark.timeout(300)
def test_a_chat_streams_branches_compares_and_stops(walk: Callable[[str], dict[str, Any]]) -> None:
    told = walk("chat")
    assert told["sizes"]["decoded"] < MOST, told["sizes"]
    assert told["answer"] and "tokens/s" in told["figures"] and "first token" in told["figures"]
    assert "/chat/" in told["address"] and told["kept"] == 1
    assert told["code"].startswith("curl") and told["notJSON"] == 1


@pytest.mark.timeout(300)
def test_a_model_is_pulled_and_planned_and_a_key_made_by_hand(walk: Callable[[str], dict[str, Any]]) -> None:
    told = walk("manage")
    assert told["needs"][0] != told["needs"][1], "the bar follows the slider"
    assert told["key"].startswith("sk-llmasos-")
    assert told["theme"] == "dark" and told["skip"] == "skip"


@pytest.mark.timeout(300)
def test_all_pages_in_both_languages_and_themes(walk: Callable[[str], dict[str, Any]]) -> None:
    assert walk("pages")["wide"] == [], "nothing is wider than a small phone"


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_where_a_key_is_needed_the_console_asks_for_it(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'access.db'}") as database:
        access = Access(database, Policy())
        with served(create_app({"fake": FakeLLM()}, access=access)) as url:
            made = httpx.post(f"{url}/llmasos/v1/keys", json={"name": "me", "scopes": ["inference", "manage"]}).json()
            access.policy = Policy(require_key=True)
            command = [NODE, "tests/console.login.js", url, made["key"]]
            done = subprocess.run(command, cwd=JS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    if "missing" in told:
        pytest.skip(told["missing"])
    assert told["refused"] and told["models"] == ["fake"]
    assert made["key"] not in json.dumps(told["kept"]) and made["key"] not in told["address"]
    assert told["session"]
