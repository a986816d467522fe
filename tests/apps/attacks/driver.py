"""Runs the attacking applications against a real server and says what became of each.

    with Attacked(folder) as server:
        row = server.run("fork-bomb")     # {"app": "fork-bomb", "outcome": "stopped", "by": [...], "told": {...}}

`outcome`: `stopped`; `not enforced`, where the server's own report says that this system cannot hold it; `failed`,
where an attack succeeded that the report says is held. Whatever happens, the server must serve on and the victim must
live.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

HERE = Path(__file__).parent
SECRET = "a secret of the user"

ATTACKS = {
    # what it is held by: rows of the report. All of an attack's parts must be stopped.
    "read-home": ("files_read",),
    "write-outside": ("files_write", "file_attributes"),
    "connect-out": ("network",),
    "proxy-out": ("network",),
    "fork-bomb": ("processes", "survivors"),
    "fill-memory": ("memory", "survivors"),
    "fill-disk": ("disk",),
    "read-token": ("process_memory", "files_read", "unix_sockets", "environment"),
    "kill-parent": ("signals",),
    "hold-gpu": ("gpu",),
    "exceed-tokens": ("access",),
    "listen": ("network", "abstract_sockets"),
    "never-answer": ("cores", "health"),
    "links": ("files_write",),
    "crash": ("restart",),
    "flood": ("log",),
    "deceive": ("proxy",),
}
ENDED_BY = {
    "fork-bomb": ("processes", "memory"),
    "fill-memory": ("memory",),
    "fill-disk": ("disk", "file_size"),
    "never-answer": ("health",),
    "crash": ("exited", "signal"),
}
"""How the process ends, of the attacks that cost the attacker its process."""
ALLOWED = {"exceed-tokens": {"first"}, "listen": {"squat_abstract"}}
"""Parts that may succeed: what was granted, and what harms nobody, as it is seen by nobody."""


class Attacked:
    """A server in a process of its own, with the victim installed; `home` is where it keeps things."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.secret = folder / "secret"

    def __enter__(self) -> "Attacked":
        self.home.mkdir(parents=True)
        self.secret.write_text(SECRET)
        self.abstract = f"llmasos-attacked-{secrets.token_hex(4)}"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "attacked_server.py"), self.abstract],
            env={**os.environ, "LLMASOS_HOME": str(self.home), "LLMASOS_LANG": "en"},
            stdout=subprocess.PIPE,
            stderr=(folder_log := (self.folder / "server.log").open("wb")),
            start_new_session=True,
        )
        folder_log.close()
        line = self.process.stdout.readline()
        assert line, (self.folder / "server.log").read_text()
        self.port = int(line)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)
        self.install("victim")
        self.client.get("/apps/victim/read").raise_for_status()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def pack(self, name: str) -> bytes:
        from llmasos.store.packages import pack

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, name)
            shutil.copytree(HERE / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(HERE / "tried.py", folder)
            return pack(folder, Path(temporary, "made.llmapp")).path.read_bytes()

    def install(self, name: str) -> dict:
        answer = self.client.put("/llmasos/v1/apps?accept=true", content=self.pack(name))
        assert answer.status_code == 201, answer.text
        return answer.json()

    def facts(self) -> dict:
        return {
            "home": str(self.home),
            "secret": str(self.secret),
            "port": self.port,
            "pid": self.process.pid,
            "group": self.process.pid,
            "victim": self.info("victim")["use"]["pid"],
            "abstract": self.abstract,
            "abstract_free": f"{self.abstract}-free",
        }

    def info(self, name: str) -> dict:
        return self.client.get(f"/llmasos/v1/apps/{name}").json()

    def run(self, name: str) -> dict:
        before = self.state()
        info = self.install(name)
        if name == "exceed-tokens":
            limits = {"tokens_per_minute": 60}
            self.client.patch(f"/llmasos/v1/keys/{info['key_id']}", json=limits).raise_for_status()
        rows = {row["what"]: row["by"] for row in info["enforced"]}
        answer = self.client.post(f"/apps/{name}/attack", json={"given": self.facts()} if name != "deceive" else {})
        told = self.judge(name, answer)
        lacking = [row for row in ATTACKS[name] if row in rows and not rows[row]]
        done = sorted(part for part, what in told.items() if what == "done" and part not in ALLOWED.get(name, ()))
        problems = self.harm(before) + done
        ended = self.ended(name)
        if name in ENDED_BY and (ended is None or ended["reason"] not in ENDED_BY[name]):
            problems.append(f"it ended by {ended and ended['reason']}")
        outcome = "stopped" if not problems else "not enforced" if lacking else "failed"
        by = sorted({means for row in ATTACKS[name] for means in rows.get(row, (row,))})
        self.client.delete(f"/llmasos/v1/apps/{name}?data=true").raise_for_status()
        left = self.left(name)
        return {
            "app": name,
            "outcome": "failed" if left else outcome,
            "by": by,
            "ended": ended and ended["reason"],
            "lacking": lacking,
            "problems": problems + left,
            "told": told,
        }

    def ended(self, name: str) -> dict | None:
        deadline = time.monotonic() + (30 if name in ENDED_BY else 0)
        while (found := self.info(name)["last_exit"]) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def judge(self, name: str, answer: httpx.Response) -> dict:
        """What the attacker says of its parts, and what is seen from here of those that can't say it."""
        if name == "deceive":
            kept = {"set-cookie", "access-control-allow-origin", "service-worker-allowed", "refresh"} & set(
                answer.headers
            )
            rules = answer.headers["content-security-policy"]
            paths = [route["path"] for route in self.client.get("/apps/deceive/app.json").json()["routes"]]
            return {
                "headers": "done" if kept else "left out",
                "scripts": "left out" if "sandbox" in rules and "allow-same-origin" not in rules else "done",
                "paths": "done" if paths else "left out",
            }
        if name == "flood":
            time.sleep(1.0)
            size = sum(path.stat().st_size for path in (self.home / "logs").rglob("flood*"))
            text = self.client.get("/llmasos/v1/apps/flood/logs?limit=50").text
            return {
                "log": "done" if size > 10_000_000 else "kept short",
                "codes": "done" if "\x1b" in text else "left out",
            }
        if name == "crash":
            again = self.client.post("/apps/crash/attack", json={"given": {}})
            return {"again": "refused" if again.status_code == 503 and "retry-after" in again.headers else "done"}
        if name == "links" and answer.status_code == 200:
            return answer.json() | {"planted": "done" if (self.folder / "planted").exists() else "stopped"}
        if answer.status_code == 200:
            return answer.json()
        assert answer.status_code in (500, 502, 503, 504), answer.text
        return {"answer": f"{answer.status_code} {json.loads(answer.text)['error']['code']}"}

    def state(self) -> dict:
        return {
            "files": sorted(path.name for path in self.folder.iterdir()),
            "victim": self.info("victim")["use"]["pid"],
        }

    def harm(self, before: dict) -> list[str]:
        """What the attack has changed outside."""
        found = []
        if self.process.poll() is not None:
            return ["the server is dead"]
        if self.secret.read_text() != SECRET:
            found.append("the secret is changed")
        if self.client.get("/healthz").status_code != 200:
            found.append("the server is not healthy")
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
        if self.client.post("/v1/chat/completions", json=body).status_code != 200:
            found.append("the server does not answer")
        if self.client.get("/apps/victim/read").text != '"nobody may read this"':
            found.append("the victim's diary")
        if self.state() != before:
            found.append(f"{before} became {self.state()}")
        return found

    def left(self, name: str) -> list[str]:
        """What is there of an application after it was uninstalled."""
        found = [str(path) for path in (self.home / "apps").glob(f"{name}/**/*")]
        key = [one for one in self.client.get("/llmasos/v1/keys").json()["data"] if one["name"] == f"app/{name}"]
        if not key or any(one["state"] != "revoked" for one in key):
            found.append("its key")
        return found
