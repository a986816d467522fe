"""Files and uploads: through the official client, and as raw HTTP where names and forms are hostile."""

import asyncio
import hashlib
import os
import shutil
import threading
import time
from datetime import timedelta

import httpx
import openai
import pytest
from fake_llm import FakeLLM, live_server
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete

from llmasos.client.types.files import CompleteUploadRequest, UploadRequest
from llmasos.errors import DiskFullError, InvalidInputError
from llmasos.serve import storage
from llmasos.serve.batches.ledger import Ledger
from llmasos.serve.caller import ANYONE, Caller
from llmasos.serve.files import form, store, uploads
from llmasos.serve.files.form import label
from llmasos.serve.files.tables import FileRow, UploadRow
from llmasos.serve.storage import Storage
from llmasos.store.database import Database, utc_now

DATA = b'{"a": 1}\n'
FIELD = "content-disposition: form-data"
GIB = 2**30


def disk_with(monkeypatch, free, total=1000 * GIB):
    """Clients' files lie on a disk like that."""
    usage = shutil.disk_usage("/")._replace(total=total, free=free)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """One server for all of these tests, with a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("LLMASOS_HOME", str(home))
        with live_server(FakeLLM()) as url:
            yield url, home


@pytest.fixture
def home(live, monkeypatch):
    """Its home, without files from the test before."""
    monkeypatch.setenv("LLMASOS_HOME", str(live[1]))
    with Database.open() as database, database.session() as session:
        session.execute(delete(FileRow))
    for path in (live[1] / "files").glob("file-*"):
        path.unlink()
    return live[1]


@pytest.fixture
def url(live, home):
    return live[0]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def on_disk(home):
    return sorted(path.name for path in (home / "files").iterdir() if path.name != ".worker.lock")


def test_a_file_comes_back_as_it_was(client: openai.OpenAI, home) -> None:
    data = os.urandom(3 * 2**20 + 7)
    file = client.files.create(file=("träume 漢.bin", data), purpose="user_data")
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "träume 漢.bin",
        len(data),
        "user_data",
        "processed",
    )
    assert client.files.retrieve(file.id) == file
    answer = client.files.content(file.id)
    assert answer.content == data
    assert answer.response.headers["x-content-type-options"] == "nosniff"
    assert on_disk(home) == [file.id]
    assert client.files.delete(file.id).deleted
    assert on_disk(home) == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file.id)


def test_lists_go_on_from_page_to_page(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{i}", DATA), purpose="batch" if i % 2 else "evals").id for i in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=2)] == made
    assert [file.id for file in client.files.list(purpose="batch")] == [made[3], made[1]]
    page = client.files.list(limit=2)
    assert page.has_more and len(page.data) == 2
    with pytest.raises(openai.BadRequestError):
        client.files.list(after="file-nowhere")


def test_a_file_that_expired_is_gone(client: openai.OpenAI, home) -> None:
    file = client.files.create(
        file=("x", DATA), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    with Database.open() as database, database.session() as session:
        session.get(FileRow, file.id).expires = utc_now() - timedelta(seconds=1)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    assert client.files.list().data == []


async def test_cleaning_removes_what_expired_and_what_a_killed_server_left(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    files = store.Files(Storage())
    files.folder.mkdir(parents=True)
    kept = {}
    for name in ("stays", "goes"):
        source = files.folder / f"{form.TEMPORARY}{name}"
        source.write_bytes(DATA)
        kept[name] = await files.keep(ANYONE, source, filename=name, purpose="batch", seconds=3600)
    with Database.open() as database, database.session() as session:
        session.get(FileRow, kept["goes"].id).expires = utc_now() - timedelta(seconds=1)
    for name in (f"{form.TEMPORARY}{'0' * 32}", f"file-{'1' * 32}", "notes-of-the-owner.txt", f"file-{'2' * 32}"):
        (files.folder / name).write_bytes(b"x")
        if not name.endswith("2"):
            os.utime(files.folder / name, (0, 0))
    await files.clean()
    assert {path.name for path in files.folder.iterdir()} == {
        kept["stays"].id,
        "notes-of-the-owner.txt",
        f"file-{'2' * 32}",  # too young: it may be on its way
    }
    await files.storage.close()


@pytest.mark.parametrize(
    "name",
    [
        "../../../../etc/passwd",
        "..\\..\\boot.ini",
        "/etc/passwd",
        "a/../../b",
        "..",
        ".",
        "\x00\x01",
        "x" * 500,
        "%2e%2e/x",
    ],
)
def test_names_never_leave_the_folder(client: openai.OpenAI, home, name: str) -> None:
    file = client.files.create(file=(name, DATA), purpose="batch")
    assert "/" not in file.filename and "\\" not in file.filename and file.filename.strip(".")
    assert len(file.filename) <= 255 and on_disk(home) == [file.id]


@pytest.mark.parametrize("id", ["../llmasos.db", "..%2fllmasos.db", "%2e%2e%2fllmasos.db", ".worker.lock", "a\x00b"])
@pytest.mark.parametrize("tail", ["", "/content"])
def test_ids_that_are_paths_lead_nowhere(url: str, home, id: str, tail: str) -> None:
    client = httpx.Client(base_url=url)
    answer = client.get(
        httpx.URL(f"{url}/files/").copy_with(raw_path=f"/v1/files/{id}{tail}".replace("\x00", "%00").encode())
    )
    assert answer.status_code == 404, answer.text
    assert b"SQLite" not in answer.content
    assert (home / "llmasos.db").exists()
    client.close()


@given(st.text())
def test_a_label_is_a_printable_last_part(name: str) -> None:
    found = label(name)
    assert found and found.isprintable() and len(found) <= 255
    assert "/" not in found and "\\" not in found and found.strip(".")


def post(url, content, boundary="XX", kind=None):
    kind = kind or f"multipart/form-data; boundary={boundary}"
    return httpx.post(f"{url}/files", content=content, headers={"content-type": kind})


def part(name, value, filename=None):
    more = f'; filename="{filename}"' if filename is not None else ""
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


END = "--XX--\r\n"
FILE = part("file", "data", "x")


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (FILE + END, "purpose"),
        (FILE + part("purpose", "world domination") + END, "purpose"),
        (part("purpose", "batch") + END, "file"),
        (FILE + FILE + part("purpose", "batch") + END, "file"),
        (FILE + part("purpose", "batch") + part("purpose", "batch") + END, "purpose"),
        (FILE + part("purpose", "batch") + part("colour", "red") + END, "colour"),
        (FILE + part("purpose", "batch") + part("expires_after[seconds]", "3600") + END, "expires_after"),
        (
            FILE
            + part("purpose", "batch")
            + part("expires_after[anchor]", "created_at")
            + part("expires_after[seconds]", "99999999999999999999")
            + END,
            "expires_after",
        ),
        (part("purpose", "batch") + FILE, None),  # no end
        ("--XX\r\nnonsense" + END, None),
        ("", None),
        (part("x", "y" * 70_000) + END, None),
        ("".join(part(f"f{i}", "") for i in range(70)) + END, None),
        ("--XX\r\n" + "A" * 20_000 + ": x\r\n\r\n\r\n" + END, None),
    ],
)
def test_forms_that_are_wrong_are_refused_and_leave_nothing(url: str, home, content: str, param) -> None:
    answer = post(url, content.encode())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert on_disk(home) == []


def test_other_bodies_are_refused(url: str) -> None:
    assert post(url, b"{}", kind="application/json").status_code == 400
    assert post(url, b"x", kind="multipart/form-data").status_code == 400
    assert post(url, b"x", kind="multipart/form-data; boundary=").status_code == 400


async def test_a_file_that_is_too_long_is_refused_and_leaves_nothing(home) -> None:
    from fastapi import FastAPI

    from llmasos.serve import problems
    from llmasos.serve.files.routes import create_router
    from llmasos.serve.files.uploads import Uploads
    from llmasos.serve.storage import Storage

    files = store.Files(Storage(), max_file_bytes=1000)
    app = FastAPI()
    problems.install(app)
    app.include_router(create_router(files, Uploads(files)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        fields = {"data": {"purpose": "batch"}}
        answer = await client.post("/v1/files", files={"file": ("x", b"x" * 1001)}, **fields)
        assert answer.status_code == 413 and on_disk(home) == []
        answer = await client.post("/v1/files", files={"file": ("x", b"x" * 1000)}, **fields)
        assert answer.status_code == 200
    await files.storage.close()


def test_a_client_that_goes_away_leaves_nothing(url: str, home) -> None:
    import socket

    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000000\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=XX\r\n\r\n{FILE[:-6]}".encode())
        connection.sendall(b"x" * 2_000_000)
        wait_until(lambda: on_disk(home))
    wait_until(lambda: not on_disk(home))


def wait_until(found) -> None:
    until = time.monotonic() + 20
    while not found():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_file_comes_in_parts(client: openai.OpenAI, home) -> None:
    pieces = [b"one ", b"two ", b"three"]
    whole = b"".join(pieces)
    upload = client.uploads.create(bytes=len(whole), filename="a.txt", mime_type="text/plain", purpose="user_data")
    assert upload.status == "pending" and upload.expires_at == upload.created_at + 3600
    parts = [client.uploads.parts.create(upload.id, data=piece).id for piece in reversed(pieces)][::-1]
    md5 = hashlib.md5(whole).hexdigest()
    with pytest.raises(openai.BadRequestError, match="MD5"):
        client.uploads.complete(upload.id, part_ids=parts, md5="0" * 32)
    with pytest.raises(openai.BadRequestError, match="bytes"):
        client.uploads.complete(upload.id, part_ids=parts[:2])
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[parts[0], parts[0]])
    done = client.uploads.complete(upload.id, part_ids=parts, md5=md5)
    assert done.status == "completed" and client.files.content(done.file.id).content == whole
    assert on_disk(home) == [done.file.id]
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.uploads.parts.create(upload.id, data=b"x")


def test_an_upload_that_is_cancelled_leaves_nothing(client: openai.OpenAI, home) -> None:
    upload = client.uploads.create(bytes=4, filename="a", mime_type="text/plain", purpose="batch")
    client.uploads.parts.create(upload.id, data=b"1234")
    with pytest.raises(openai.BadRequestError, match="would have 5"):
        client.uploads.parts.create(upload.id, data=b"5")
    assert client.uploads.cancel(upload.id).status == "cancelled" and on_disk(home) == []
    with pytest.raises(openai.NotFoundError):
        client.uploads.parts.create("upload_nowhere", data=b"5")


def test_an_upload_waits_an_hour(client: openai.OpenAI) -> None:
    upload = client.uploads.create(bytes=4, filename="a", mime_type="text/plain", purpose="batch")
    with Database.open() as database, database.session() as session:
        session.get(UploadRow, upload.id).expires = utc_now()
    with pytest.raises(openai.BadRequestError, match="expired"):
        client.uploads.parts.create(upload.id, data=b"5")


async def upload_of(service, data, caller=ANYONE):
    """An upload whose one part is there: its id and the part's."""
    asked = UploadRequest(bytes=len(data), filename="a", mime_type="text/plain", purpose="batch")
    upload = await service.create(caller, asked)
    service.files.folder.mkdir(parents=True, exist_ok=True)
    source = service.files.folder / f"{form.TEMPORARY}part"
    source.write_bytes(data)
    return upload.id, (await service.add_part(caller, upload.id, source, len(data))).id


async def test_of_two_that_complete_an_upload_one_does(database: Database, tmp_path, monkeypatch) -> None:
    service = uploads.Uploads(store.Files(Storage(database, tmp_path)))
    for late in (False, True):  # the second comes while the first joins the parts, or when it has removed them
        id, part = await upload_of(service, DATA)
        body = CompleteUploadRequest(part_ids=[part])
        real, joined = uploads.join, threading.Event()

        def join(paths, into, late=late, real=real, joined=joined):
            if late and joined.is_set():
                wait_until(lambda: not paths[0].exists())
            joined.set()
            return real(paths, into)

        monkeypatch.setattr(uploads, "join", join)
        answers = await asyncio.gather(*(service.complete(ANYONE, id, body) for _ in range(2)), return_exceptions=True)
        monkeypatch.setattr(uploads, "join", real)
        [refused] = [one for one in answers if isinstance(one, Exception)]
        assert isinstance(refused, InvalidInputError) and "is completed" in str(refused)
        [done] = [one for one in answers if one is not refused]
        assert (await service.files.content(ANYONE, done.file.id))[1].read_bytes() == DATA
        listed = await service.files.list(ANYONE, purpose=None, after=None, limit=9, ascending=True)
        assert {file.id for file in listed.data} == {file.name for file in service.files.folder.iterdir()}
        await service.files.delete(ANYONE, done.file.id)


def test_what_would_fill_the_disk_is_refused(client: openai.OpenAI, home, monkeypatch) -> None:
    upload = client.uploads.create(bytes=4, filename="a", mime_type="text/plain", purpose="batch")
    file = client.files.create(file=("in", DATA), purpose="batch")
    disk_with(monkeypatch, free=GIB + 2**20)
    asks = [
        lambda num: client.files.create(file=("x", b"x" * num), purpose="batch"),
        lambda num: client.uploads.create(bytes=num, filename="a", mime_type="text/plain", purpose="batch"),
    ]
    for ask in asks:
        ask(2**19)
        with pytest.raises(openai.InternalServerError, match="no room") as refused:
            ask(2**20 + 1)
        assert refused.value.status_code == 507 and refused.value.code == "disk_full"
    disk_with(monkeypatch, free=GIB)
    for ask in (
        lambda: client.uploads.parts.create(upload.id, data=b"1"),
        lambda: client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"),
    ):
        with pytest.raises(openai.InternalServerError, match="no room"):
            ask()
    assert not [name for name in on_disk(home) if name.startswith(form.TEMPORARY)]
    disk_with(monkeypatch, free=3, total=200)  # of a small disk a hundredth
    storage.check_room(home, 1)
    with pytest.raises(DiskFullError):
        storage.check_room(home, 2)


def test_a_body_of_unknown_length_is_refused_when_the_disk_is_full(url: str, home, monkeypatch) -> None:
    head, tail = f'--b\r\n{FIELD}; name="purpose"\r\n\r\nbatch\r\n--b\r\n{FIELD}; name="file"\r\n\r\n', "\r\n--b--\r\n"

    def body():
        yield head.encode()
        disk_with(monkeypatch, free=GIB)
        for _ in range(40):
            yield b"x" * 2**16
        yield tail.encode()

    answer = httpx.post(f"{url}/files", content=body(), headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 507 and not [name for name in on_disk(home) if name.startswith(form.TEMPORARY)]


def test_a_batch_keeps_the_margin_too(tmp_path, monkeypatch) -> None:
    ledger = Ledger(tmp_path / "out", tmp_path / "err")
    ledger.answered("a", 200, "req_1", b"{}")
    disk_with(monkeypatch, free=GIB)
    with pytest.raises(DiskFullError):
        ledger.answered("b", 200, "req_2", b"{}")
    ledger.close()
    assert (tmp_path / "out").read_bytes().count(b"\n") == 1


async def test_a_key_stores_no_more_than_it_may(database: Database, tmp_path) -> None:
    files = store.Files(Storage(database, tmp_path), max_stored_bytes=100)
    service = uploads.Uploads(files)
    ann, bob = Caller(key_id="ann"), Caller(key_id="bob")

    async def keep(caller, num):
        source = files.folder / f"{form.TEMPORARY}x"
        source.write_bytes(b"x" * num)
        return await files.keep(caller, source, filename="x", purpose="batch")

    id, part = await upload_of(service, b"x" * 40, ann)  # counts from its beginning
    kept = await keep(ann, 60)
    for refused in (keep(ann, 1), files.admit(ann), upload_of(service, b"x", ann)):
        with pytest.raises(form.TooLargeError, match="stores 100 bytes"):
            await refused
    await service.complete(ann, id, CompleteUploadRequest(part_ids=[part]))
    with pytest.raises(form.TooLargeError, match="stores 100 bytes"):
        await files.admit(ann)
    await keep(bob, 100)
    await files.delete(ann, kept.id)
    await keep(ann, 60)
