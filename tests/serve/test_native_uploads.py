"""Uploading a model: streamed, checked as a whole, and nothing that leaves its folder or could run code."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_llm import FakeLLM, live_server
from hypothesis import given
from hypothesis import strategies as st
from store_web import tiny_gguf

from llmasos.client.http import AsyncHttp, Http, Target
from llmasos.client.native import AsyncNative, Native, native_target
from llmasos.errors import LLMasOSError, ProviderError
from llmasos.serve.native import worker
from llmasos.serve.native.uploads import FOLDER, Uploads, check_file
from llmasos.store import Library

ROOT = "/llmasos/v1"


@pytest.fixture
def url() -> Iterator[str]:
    with live_server(FakeLLM()) as found:
        yield found.removesuffix("/v1")


@pytest.fixture
def client(url: str) -> Iterator[Native]:
    http = Http(native_target(Target(f"{url}/v1", "LLMasOS", max_retries=0)))
    yield Native(http)
    http.close()


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks run in this process: it has torch already."""

    async def run(task: str, options: dict[str, Any], report: Any = None) -> Any:
        return await asyncio.to_thread(worker.TASKS[task], options, report)

    monkeypatch.setattr(worker, "run", run)


def leftovers(home: Path) -> list[Path]:
    root = home / "models" / FOLDER
    return list(root.iterdir()) if root.exists() else []


def begin(url: str, name: str = "mine") -> str:
    found: str = httpx.post(f"{url}{ROOT}/uploads", json={"name": name}).json()["id"]
    return found


def put(url: str, id: str, path: str, data: Any = b"{}") -> httpx.Response:
    return httpx.put(f"{url}{ROOT}/uploads/{id}/{path}", content=data)


def test_a_folder_with_safetensors_is_sent_and_installed(
    client: Native, tiny_model: Path, home: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "folder")
    for name in ("pytorch_model.bin", "modeling.py", "training_args.json", ".hidden"):
        (folder / name).write_text("not of the model")
    model = client.upload(folder, name="mine")
    assert (model.name, model.format) == ("mine", "safetensors")
    assert {file.path for file in Library().get("mine").files} == {file.name for file in tiny_model.iterdir()}
    assert not (home / "models" / "mine" / "training_args.json").exists()
    library = Library()
    assert library.verify("mine").ok and library.get("mine").architecture == "LlamaForCausalLM"
    sent = (tiny_model / "model.safetensors").read_bytes()
    assert (library.path("mine") / "model.safetensors").read_bytes() == sent
    assert leftovers(home) == []
    with pytest.raises(ProviderError, match="already"):
        client.upload(tiny_model, name="mine")


async def test_one_gguf_file_is_sent_by_the_asynchronous_client(url: str, tmp_path: Path, home: Path) -> None:
    data = tiny_gguf(tmp_path)
    http = AsyncHttp(native_target(Target(f"{url}/v1", "LLMasOS", max_retries=0)))
    model = await AsyncNative(http).upload(tmp_path / "tiny-Q8_0.gguf", name="small")
    await http.close()
    assert (model.name, model.format, model.size) == ("small", "gguf", len(data))
    assert Library().path("small").name == "tiny-Q8_0.gguf" and leftovers(home) == []


def test_files_tell_their_hash_and_can_be_sent_again(url: str, tiny_model: Path, inline: None) -> None:
    id = begin(url)
    sent = put(url, id, "config.json", b"not yet")
    assert sent.json() == {"path": "config.json", "size": 7, "sha256": hashlib.sha256(b"not yet").hexdigest()}
    wrong = httpx.post(f"{url}{ROOT}/uploads/{id}/complete", timeout=60)
    assert wrong.status_code in (404, 422), wrong.text
    for file in tiny_model.iterdir():
        assert put(url, id, file.name, file.read_bytes()).status_code == 200
    listed = httpx.get(f"{url}{ROOT}/uploads/{id}").json()["files"]
    assert sorted(one["path"] for one in listed) == sorted(file.name for file in tiny_model.iterdir())
    assert httpx.post(f"{url}{ROOT}/uploads/{id}/complete", timeout=60).status_code == 201
    assert httpx.get(f"{url}{ROOT}/uploads/{id}").status_code == 404


REFUSED = [
    ("..%2Fevil.json", 422),
    ("%2e%2e/config.json", 422),
    ("sub%2F..%2F..%2Fconfig.json", 422),
    ("%2Fetc%2Fconfig.json", 422),
    ("C%3Aconfig.json", 422),
    ("a%5C..%5Cconfig.json", 422),
    ("config.json%00", 422),
    ("llmasos.json", 422),
    ("pytorch_model.bin", 422),
    ("model.pt", 422),
    ("model.ckpt", 422),
    ("modeling_evil.py", 400),
    ("run.sh", 400),
    ("model.onnx", 400),
    ("deep/er/model.safetensors", 400),
    ("deep/er/config.json", 400),
    ("x" * 600 + ".gguf", 422),
]


def test_other_names_are_refused_before_a_byte_is_written(url: str, home: Path) -> None:
    id = begin(url)
    for path, status in REFUSED:
        answer = put(url, id, path, b"x" * 10)
        assert answer.status_code == status, (path, answer.text)
    files = home / "models" / FOLDER / id / "files"
    assert list(files.rglob("*")) == [] and list((home / "models").iterdir()) == [home / "models" / FOLDER]


def test_damaged_models_are_refused(url: str, tiny_model: Path, inline: None) -> None:
    cases = {
        "cut off": {"config.json": None, "model.safetensors": (tiny_model / "model.safetensors").read_bytes()[:-100]},
        "no weights": {"config.json": None},
        "no config": {"model.safetensors": None},
        "unknown": {"config.json": json.dumps({"architectures": ["NoSuchModel"]}).encode(), "model.safetensors": None},
        "not gguf": {"a.gguf": b"not a gguf file at all"},
        "pickle": {"config.json": None, "model.safetensors": b"\x80\x04\x95pickle"},
    }
    for name, files in cases.items():
        id = begin(url, "bad")
        for path, data in files.items():
            assert put(url, id, path, (tiny_model / path).read_bytes() if data is None else data).status_code == 200
        answer = httpx.post(f"{url}{ROOT}/uploads/{id}/complete", timeout=60)
        assert answer.status_code in (404, 422), (name, answer.text)
        assert not (Library().root / "bad").exists()
        assert httpx.delete(f"{url}{ROOT}/uploads/{id}").status_code == 204


def test_a_file_over_the_limit_is_refused_and_leaves_nothing(home: Path) -> None:
    with live_server(FakeLLM(), max_upload_bytes=1000) as found:
        url = found.removesuffix("/v1")
        id = begin(url)

        def pieces() -> Iterator[bytes]:
            for _ in range(20):
                yield b"x" * 100

        for data in (b"x" * 1001, pieces()):
            answer = put(url, id, "a.gguf", data)
            assert answer.status_code == 413 and "1000 bytes" in answer.text
        assert put(url, id, "a.gguf", b"x" * 1000).status_code == 200
        assert sorted(p.name for p in (home / "models" / FOLDER / id / "files").iterdir()) == ["a.gguf"]


def test_an_upload_without_room_on_the_disk_is_507(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmasos.serve.native.uploads.disk_free", lambda path: 100)
    answer = put(url, begin(url), "a.gguf", b"x" * 1000)
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "disk_full"


def test_an_upload_that_is_not_is_404(url: str) -> None:
    for id in ("none", "upload_0123456789abcdef", "..", "upload_..%2F..%2F..%2Fx"):
        for answer in (
            httpx.get(f"{url}{ROOT}/uploads/{id}"),
            put(url, id, "config.json"),
            httpx.post(f"{url}{ROOT}/uploads/{id}/complete"),
            httpx.delete(f"{url}{ROOT}/uploads/{id}"),
        ):
            assert answer.status_code in (404, 405), (id, answer.text)


def test_what_is_begun_survives_a_restart_and_is_forgotten_in_time(tiny_model: Path, home: Path) -> None:
    with live_server(FakeLLM()) as found:
        id = begin(found.removesuffix("/v1"))
        put(found.removesuffix("/v1"), id, "config.json", (tiny_model / "config.json").read_bytes())
    with live_server(FakeLLM()) as found:
        url = found.removesuffix("/v1")
        assert [one["path"] for one in httpx.get(f"{url}{ROOT}/uploads/{id}").json()["files"]] == ["config.json"]
        old = time.time() - 30 * 86400
        os.utime(home / "models" / FOLDER / id / "upload.json", (old, old))
        begin(url, "another")
        assert httpx.get(f"{url}{ROOT}/uploads/{id}").status_code == 404
    assert Library().list() == []  # unfinished ones are no models


def test_names_that_are_taken_are_refused_at_both_ends(url: str, tiny_model: Path, home: Path, inline: None) -> None:
    first, second = begin(url), begin(url)
    for id in (first, second):
        for file in tiny_model.iterdir():
            put(url, id, file.name, file.read_bytes())
    assert httpx.post(f"{url}{ROOT}/uploads/{first}/complete", timeout=60).status_code == 201
    assert httpx.post(f"{url}{ROOT}/uploads/{second}/complete", timeout=60).status_code == 409
    assert httpx.post(f"{url}{ROOT}/uploads", json={"name": "mine"}).status_code == 409
    shutil.rmtree(home / "models" / "mine")
    assert httpx.post(f"{url}{ROOT}/uploads/{second}/complete", timeout=60).status_code == 201


@given(st.text(max_size=80))
def test_a_name_that_passes_stays_inside(path: str) -> None:
    try:
        check_file(path)
    except LLMasOSError:
        return
    inside = Path("/uploads/one/files")
    assert (inside / path).resolve().is_relative_to(inside) and Path(path).suffix not in (".py", ".bin", ".sh")


def test_two_requests_do_not_write_one_file_at_once() -> None:
    uploads = Uploads(max_bytes=10)
    with uploads._alone("upload_1", "a"):
        with uploads._alone("upload_1", "b"), uploads._alone("upload_2", "a"):
            pass
        for path in ("a", ""):
            with pytest.raises(LLMasOSError, match="Another request"), uploads._alone("upload_1", path):
                pass
    with uploads._alone("upload_1", ""), pytest.raises(LLMasOSError), uploads._alone("upload_1", "b"):
        pass
