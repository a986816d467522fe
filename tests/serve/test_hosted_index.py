"""The index that a server hosts: checked uploads, owners, reports, and installing from it as from any other."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from access_world import REQUIRED, make_key
from app_packages import listed, package, raw_zip, write_app
from argon2 import PasswordHasher
from fake_llm import FakeLLM, live_server

from llmasos.client import Client
from llmasos.errors import (
    BadRequestError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    ProviderNotFoundError,
    StoreError,
)
from llmasos.serve.access import keys as keys_module
from llmasos.serve.access.access import Access
from llmasos.serve.index.start import try_start
from llmasos.store.database import Database
from llmasos.store.packages import Apps, Index, Manifest, Packages, pack, search, sign
from llmasos.store.packages.checks import Finding


class World:
    """A server with an index, keys, and a home of its own."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self.root, self.keys = url.removesuffix("/v1"), keys
        self.index = Index(f"{self.root}/llmasos/v1/index")
        self.clients = {name: Client(url, api_key=key, max_retries=0) for name, key in keys.items()}

    def publish(self, path: Path, owner: str = "ann", who: str = "ann") -> dict[str, Any]:
        packages, jobs = self.clients[who].packages, self.clients[who].jobs
        job = packages.publish(path, owner=owner)
        done = jobs.wait(job.id)
        assert done.state == "done" and done.kind == "package_check"
        return done.result

    def refused(self, path: Path, owner: str = "ann") -> dict[str, dict[str, Any]]:
        """The checks of the report, by name."""
        client = self.clients["ann"]
        job = client.packages.publish(path, owner=owner)
        with pytest.raises(ProviderError, match="is not published"):
            client.jobs.wait(job.id)
        report = client.jobs.get(job.id).result
        assert not report["passed"]
        return {check["name"]: check for check in report["checks"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMASOS_HOME", str(tmp_path_factory.mktemp("server")))

        async def quickly(manifest: Manifest, folder: Path) -> Finding:
            """Really started is what is about it."""
            if manifest.name in ("story", "bad"):
                return await try_start(manifest, folder)
            return Finding("start", "passed")

        patch.setattr("llmasos.serve.index.room.try_start", quickly)
        patch.setattr(keys_module, "_hasher", lambda: PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
        with Database.open("sqlite://") as database:
            scopes = {"ann": ("publish",), "bob": ("publish",), "boss": ("manage",), "user": ("inference",)}
            keys = {name: make_key(database, name, scope) for name, scope in scopes.items()}
            with live_server(FakeLLM(), access=Access(database, REQUIRED)) as url:
                found = World(url, keys)
                yield found
                for client in found.clients.values():
                    client.close()


@pytest.fixture
def user(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine's home, whose user has a key of the server."""
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLMASOS_URL", world.root)
    monkeypatch.setenv("LLMASOS_API_KEY", world.keys["user"])
    return tmp_path / "home"


def app(folder: Path, name: str, code: str = "", version: str = "1.0.0", more: str = "", **files: str) -> Path:
    write_app(folder / name, version, more, name)
    source = (folder / name / "app.py").read_text()
    (folder / name / "app.py").write_text(code + source)
    (folder / name / "LICENSE").write_text("MIT")
    for path, text in files.items():
        (folder / name / path.replace("__", ".")).write_text(text)
    return pack(folder / name, folder / f"{name}-{version}.llmapp").path


def test_publish_search_install_update_rollback_and_yank_through_the_server(
    world: World, user: Path, tmp_path: Path
) -> None:
    first = app(tmp_path, "story")
    sign(first)
    report = world.publish(first)
    assert {check["name"]: check["outcome"] for check in report["checks"]} == dict.fromkeys(
        ("manifest", "licence", "size", "secrets", "code", "imports", "permissions", "start"), "passed"
    )
    assert world.clients["user"].packages.report("ann/story", "1.0.0").model_dump(mode="json") == report
    [found] = search([world.index], ["story"])
    assert (found.name, found.version, found.release.summary) == ("ann/story", "1.0.0", "Answers it")
    apps = Apps()
    installed = apps.install("story", [world.index], accept=True)
    assert installed.record is not None and installed.record.name == "ann/story"
    more = app(tmp_path, "story", version="1.1.0", more='[permissions]\nnet = ["example.com"]')
    sign(more)
    assert world.publish(more)["checks"][6]["outcome"] == "warning"  # asks for a network that it does not use
    asked: list[str] = []

    def accept(request: Any) -> bool:
        asked.extend(map(str, request.asked))
        return True

    assert apps.update("story", [world.index], accept=accept).version == "1.1.0" and asked == ["net example.com"]
    assert apps.rollback("story").version == "1.0.0"
    release = world.clients["ann"].packages.yank("ann/story", "1.1.0", "loses data")
    assert release.yanked == "loses data"
    assert search([world.index], ["story"])[0].version == "1.0.0"
    assert apps.install("ann/story==1.1.0", [world.index], accept=True).version == "1.1.0"
    apps.uninstall("story")
    assert Index(world.index.place).apps["ann/story"]["1.0.0"].kind == "app"


def test_an_application_belongs_to_the_first_of_two_indexes(world: World, user: Path, tmp_path: Path) -> None:
    near = Index(tmp_path / "near")
    near.publish(package(tmp_path, name="twice"))
    world.publish(app(tmp_path, "twice", version="9.0.0"))
    world.publish(app(tmp_path, "far"))
    with_both = [near, world.index]
    assert [(one.name, one.version) for one in search(with_both, ["answers"]) if one.app in ("twice", "far")] == [
        ("ann/far", "1.0.0"),
        ("ann/twice", "9.0.0"),
        ("twice", "1.0.0"),
    ]
    assert Packages().install("twice", with_both, accept=True).version == "1.0.0"  # of the first that has the name
    assert Packages().install("far", with_both, accept=True).version == "1.0.0"


@pytest.mark.parametrize(
    ("code", "files", "check", "words"),
    [
        ("import requests\n", {}, "imports", "app.py:1: requests is imported, and requirements.lock does not name it"),
        ("import socket\n", {}, "permissions", "socket is used, and permissions.net does not ask for it"),
        ("import subprocess as s\n", {}, "permissions", "subprocess is used, and permissions.exec does not"),
        ("import os\nos.system('ls')\n", {}, "permissions", "app.py:2: os.system is used"),
        ("from os import fork as f\nx = f\n", {}, "permissions", "os.fork"),
        ("import os\nos.environ['TOKEN'] if 0 else 0\n", {}, "permissions", "the variable TOKEN is read"),
        ("", {"broken__py": "def ("}, "code", "broken.py is no Python"),
        ("raise ValueError('no start')\n", {}, "start", "no start"),
        ("while True: pass\n", {}, "start", "does not start"),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else "",
)
def test_what_a_check_finds_is_not_published(
    world: World,
    user: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    files: dict[str, str],
    check: str,
    words: str,
) -> None:
    monkeypatch.setattr("llmasos.serve.apps.running.START_SECONDS", 3.0)
    found = world.refused(app(tmp_path, "bad", code, **files))
    assert found[check]["outcome"] == "failed" and words in " ".join(found[check]["details"]), found
    assert "ann/bad" not in world.clients["user"].packages.index().apps
    with pytest.raises(ProviderNotFoundError):
        world.clients["user"].packages.report("ann/bad", "1.0.0")


def test_warnings_and_declared_uses_pass(world: World, user: Path, tmp_path: Path) -> None:
    code = (
        "import os, socket, typing\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nowhere\n"
        "try:\n    import numpy_or_not\nexcept ImportError:\n    pass\nimport helper, httpx\n"
        "os.environ.get('MODE'), os.getenv('HOME'), eval('1')\n"
    )
    more = '[permissions]\nnet = ["*"]\nenv = ["MODE"]\nexec = true'
    path = app(tmp_path, "careful", code, more=more, helper__py="", requirements__lock="httpx==0.28.1\n")
    checks = {check["name"]: check for check in world.publish(path)["checks"]}
    assert checks["imports"]["outcome"] == "warning" and "numpy_or_not" in checks["imports"]["details"][0]
    assert checks["code"]["details"] == ["app.py:10: eval runs code that can't be looked into."]
    assert checks["permissions"]["details"] == ["permissions.exec is asked for, and nothing is seen that uses it."]
    assert checks["manifest"]["outcome"] == "warning"  # nobody signed it


def test_a_licence_that_is_none_and_a_secret_are_found(world: World, user: Path, tmp_path: Path) -> None:
    write_app(tmp_path / "lic", name="lic")
    manifest = tmp_path / "lic" / "llmasos.toml"
    manifest.write_text(manifest.read_text().replace('"MIT"', '"free for all!"'))
    found = world.refused(pack(tmp_path / "lic", tmp_path / "lic.llmapp").path)
    assert found["licence"]["outcome"] == "failed" and "SPDX" in found["licence"]["details"][0]
    files = {name: (tmp_path / "lic" / name).read_bytes() for name in ("llmasos.toml", "app.py")}
    files["notes.txt"] = b"key: sk-" + b"a1" * 20
    path = raw_zip(tmp_path / "secret.llmapp", list(listed(files).items()))
    assert "notes.txt looks like a secret" in world.refused(path)["secrets"]["details"][0]


def test_owners_versions_and_scopes(world: World, user: Path, tmp_path: Path) -> None:
    path = app(tmp_path, "mine")
    world.publish(path)
    world.publish(path)  # the same bytes once more
    bob, boss, guest = (world.clients[name].packages for name in ("bob", "boss", "user"))
    with pytest.raises(PermissionDeniedError, match="another publisher"):
        bob.publish(path, owner="ann")
    with pytest.raises(PermissionDeniedError, match="another publisher"):
        bob.yank("ann/mine", "1.0.0", "mine")
    with pytest.raises(PermissionDeniedError, match="publish"):
        guest.publish(path, owner="guest")
    other = app(tmp_path / "other", "mine", "x = 1\n")
    with pytest.raises(BadRequestError, match="versions never change"):
        world.clients["ann"].packages.publish(other, owner="ann")
    world.publish(other, owner="bob", who="bob")
    assert boss.yank("ann/mine", "1.0.0", "old").yanked == "old"
    world.publish(app(tmp_path, "mine", version="2.0.0"), who="boss")
    assert {"ann/mine", "bob/mine"} <= guest.index().apps.keys()
    with pytest.raises(Exception, match="Name its owner: ann/mine, bob/mine"):
        Apps().install("mine", [world.index], accept=True)
    Apps().install("bob/mine", [world.index], accept=True)
    with pytest.raises(StoreError, match="is bob/mine here"):
        Apps().install("ann/mine", [world.index], accept=True)
    for wrong in ("Ann", "../x", "a b"):
        with pytest.raises(ProviderError):
            bob.publish(path, owner=wrong)


def test_nobody_without_a_key_and_nothing_but_packages_is_served(
    world: World, user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(app(tmp_path, "seen"))
    with Client(f"{world.root}/v1", api_key=world.keys["user"], max_retries=0) as client:
        http = client.packages._http
        for path in (
            "packages/../owners.json",
            "packages/ann/seen/../../../owners.json",
            "packages/ann",
            "owners.json",
        ):
            with pytest.raises((ProviderError, NotFoundError)):
                list(http.pieces("GET", f"/index/{path}"))
        assert b"".join(http.pieces("GET", "/index/packages/ann/seen/seen-1.0.0.llmapp"))[:2] == b"PK"
    monkeypatch.setenv("LLMASOS_API_KEY", "")
    with pytest.raises(NetworkError, match="401"):
        Index(world.index.place).apps  # noqa: B018
    monkeypatch.setenv("LLMASOS_API_KEY", world.keys["user"])
    monkeypatch.setenv("LLMASOS_URL", "http://127.0.0.1:1")  # the key is another server's, which this one must not see
    with pytest.raises(NetworkError, match="401"):
        Index(world.index.place).apps  # noqa: B018


def hostile(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    good = app(tmp_path, "evil")
    data = bytearray(good.read_bytes())
    data[data.index(b"app.py") + 40] ^= 1
    changed = tmp_path / "changed.llmapp"
    changed.write_bytes(data)
    yield r"app\.py", changed
    with zipfile.ZipFile(good) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files.pop("files.sha256")
    yield "leads out", raw_zip(tmp_path / "out.llmapp", list(listed({**files, "../x.py": b""}).items()))
    yield "bomb", raw_zip(tmp_path / "bomb.llmapp", list(listed({**files, "zeros": bytes(64 << 20)}).items()))
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    entries: list[tuple[str | zipfile.ZipInfo, bytes]] = list(listed({**files, "link": b"/etc/passwd"}).items())
    entries = [(link if name == "link" else name, data) for name, data in entries]
    yield "symbolic link", raw_zip(tmp_path / "link.llmapp", entries)
    yield "no zip", raw_zip(tmp_path / "empty.llmapp", []).with_suffix(".txt")
    signature = json.dumps({"key_id": "0" * 32, "public_key": "AAAA", "signature": "AAAA", "algorithm": "ed25519"})
    yield (
        "signature",
        raw_zip(tmp_path / "sig.llmapp", [*listed(files).items(), ("signature.json", signature.encode())]),
    )


def test_hostile_packages_are_refused_by_server_and_client(world: World, user: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"no zip at all")
    for words, path in hostile(tmp_path):
        client = world.clients["ann"]
        with pytest.raises(ProviderError, match=f"{words}|not published: manifest") as caught:
            client.jobs.wait(client.packages.publish(path, owner="ann").id)
        assert caught.value.status in (0, 400, 422), (words, caught.value)
        if path.suffix == ".llmapp":
            with pytest.raises(Exception, match=words):
                Apps().install(path, accept=True)
    assert "ann/evil" not in world.clients["user"].packages.index().apps and not Apps().list()


def test_a_dataset_is_published_and_installed_too(world: World, user: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    facts = 'name = "rows"\nversion = "1.0.0"\nsummary = "Rows"\nlicense = "CC0-1.0"\n'
    (tmp_path / "rows" / "llmasos.toml").write_text(f'[package]\nkind = "dataset"\n{facts}')
    (tmp_path / "rows" / "train.jsonl").write_text("{}\n")
    report = world.publish(pack(tmp_path / "rows", tmp_path / "rows.llmapp").path)
    assert report["kind"] == "dataset"
    Packages().install("rows", [world.index], accept=True)
    assert (user / "datasets" / "rows" / "train.jsonl").read_text() == "{}\n"
