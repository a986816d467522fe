"""Files as inputs and results: forms, JSON, raw answers, limits, and what hostile senders try."""

import base64
import io
import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from six_routes import PIXEL

from llmasos.apps import Application, Audio, File, Image, Upload
from llmasos.apps.files import MAX_BODY, clean_name, is_foreign, sniff, wants_raw
from llmasos.client import AppClient, dataurl
from llmasos.client.app import save
from llmasos.errors import InvalidInputError

PNG = base64.b64decode(PIXEL)
WAV = b"RIFF\x24\0\0\0WAVEfmt "
SVG = b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.fixture(scope="module")
def client() -> Any:
    app = Application(title="Files")

    @app.route("/look")
    def look(
        picture: Image, times: int = 1, tags: list[str] | None = None, more: dict[str, int] | None = None
    ) -> dict[str, Any]:
        return {"file": [picture.name, picture.media_type, picture.size], "times": times, "tags": tags, "more": more}

    @app.route("/read/{lang}")
    def read(lang: str, text: Annotated[File, Upload(max_size=100, accept=("text/*", "application/json"))]) -> str:
        return f"{lang}: {text.text}"

    @app.route("/all")
    def every(files: Annotated[list[File], "any"]) -> list[str]:
        return [file.name for file in files]

    @app.route("/draw")
    def draw(kind: str = "bytes") -> Image:
        return {"bytes": PNG, "file": File(PNG, "x.bin"), "image": Image(PNG, "a.png"), "wrong": b"no"}[kind]

    @app.route("/page")
    def page() -> File:
        return File(b"<script>alert(1)</script>", "page.html")

    @app.route("/hear")
    def hear(sound: Audio) -> str:
        return sound.media_type

    @app.route("/plain")
    def plain(text: str) -> str:
        return text

    return app.test_client()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (PIXEL, "file.png"),
        (f"data:image/png;base64,{PIXEL}", "file.png"),
        (f"data:image/jpeg;name=my%20cat.png;charset=x;base64,{PIXEL}", "my cat.png"),
        ({"data": PIXEL}, "file.png"),
        ({"data": PIXEL, "name": "/etc/../cat.png", "media_type": "text/html"}, "cat.png"),
        ({"data": f"data:;name=a.png;base64,{PIXEL}", "name": ""}, "a.png"),
    ],
)
def test_json_brings_a_picture_in_any_of_its_forms(client: Any, value: Any, name: str) -> None:
    assert client.post("/look", json={"picture": value}).json()["file"] == [name, "image/png", len(PNG)]


def test_a_form_brings_files_beside_other_inputs(client: Any) -> None:
    files = {"picture": ("..\\up\\cat.png", PNG, "application/octet-stream")}
    answer = client.post("/look", files=files, data={"times": "3", "tags": ["a", "b"], "more": '{"x": 1}'})
    assert answer.json() == {
        "file": ["cat.png", "image/png", len(PNG)],
        "times": 3,
        "tags": ["a", "b"],
        "more": {"x": 1},
    }
    assert client.post("/look", files=files, data={"tags": "one"}).json()["tags"] == ["one"]
    assert client.post("/look", data={"picture": PIXEL}, files={"x": ("", b"")}).status_code == 422
    text = {"text": ("a.json", b'{"a": 1}', "")}
    assert client.post("/read/en", files=text).json() == 'en: {"a": 1}'
    many = [("files", (name, b"1", "text/plain")) for name in ("a.txt", "b.txt")]
    assert client.post("/all", files=many).json() == ["a.txt", "b.txt"]
    assert client.post("/all", files=many[:1]).json() == ["a.txt"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/look", {"picture": "data:image/png;base64,AAAA"}, "picture: The file is not a picture of a known format"),
        ("/look", {"picture": base64.b64encode(WAV).decode()}, "not a picture"),
        ("/hear", {"sound": PIXEL}, "not sound of a known format"),
        ("/look", {"picture": "caf\u00e9"}, "no base64"),
        ("/look", {"picture": "data:image/png;base64"}, "has no comma"),
        ("/look", {"picture": None}, "A file is expected, not NoneType"),
        ("/look", {"picture": ["x"]}, "A file is expected, not list"),
        ("/look", {"picture": {"data": 5}}, "data of a file is a text"),
        ("/look", {"picture": {"name": "x"}}, "A file has data"),
        ("/look", {"picture": {"data": PIXEL, "path": "/etc/passwd"}}, "A file has no 'path'"),
        ("/look", {"picture": "/etc/passwd"}, "no base64|not a picture"),
        ("/look", {"picture": "@/etc/passwd"}, "no base64"),
        ("/read/en", {"text": "data:text/plain," + "x" * 101}, "text: The file has 101 bytes; at most 100 are taken"),
        ("/read/en", {"text": "A" * 10_000}, "at most 100"),
        ("/read/en", {"text": f"data:image/png;base64,{PIXEL}"}, r"image/png; text/\* or application/json is taken"),
        ("/read/en", {"text": "data:text/plain;base64,//79"}, "is not UTF-8"),
    ],
)
def test_what_is_no_such_file_is_refused_with_the_reason(client: Any, path: str, body: Any, words: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422)
    import re

    assert re.search(words, answer.json()["message"]), answer.json()["message"]
    assert len(answer.text) < 3000


def test_bodies_that_are_too_large_are_refused_before_they_are_read(client: Any) -> None:
    answer = client.post("/plain", content=b"x", headers={"content-length": str(MAX_BODY + 1)})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")

    def endless() -> Any:
        yield b'{"text": "'
        for _ in range(MAX_BODY // 2**20 + 2):
            yield b"a" * 2**20

    answer = client.post("/plain", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    small = client.post("/read/en", files={"text": ("a.txt", b"x" * (MAX_BODY + 2**20))})
    assert small.status_code == 413


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "multipart/form-data"}, b"x", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--y\r\n", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\ncontent-disposition: form-data\r\n\r\n1", 400),
        ({"content-type": "multipart/form-data; boundary=x"}, b"", 422),
    ],
)
def test_forms_that_are_none_are_refused(client: Any, headers: dict[str, str], content: bytes, status: int) -> None:
    assert client.post("/look", content=content, headers=headers).status_code == status


def test_many_parts_are_refused(client: Any) -> None:
    answer = client.post("/all", files=[("files", (str(n), b"1")) for n in range(300)])
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_form")


def test_forms_are_for_routes_with_files_and_not_for_other_sites(client: Any) -> None:
    assert client.post("/plain", files={"text": ("a", b"x")}).status_code == 415
    files = {"picture": ("a.png", PNG)}
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
        assert client.post("/look", files=files, headers=headers).status_code == 403
    for headers in ({"origin": "http://testserver"}, {"sec-fetch-site": "same-origin", "origin": "https://proxy"}):
        assert client.post("/look", files=files, headers=headers).status_code == 200
    from starlette.datastructures import Headers

    assert not is_foreign(Headers({}))


def test_a_file_is_sent_as_it_is_to_who_accepts_it_rather_than_json(client: Any) -> None:
    for kind, name in (("bytes", "file.png"), ("file", "x.bin"), ("image", "a.png")):
        assert client.get("/draw", params={"kind": kind}).json() == f"data:image/png;name={name};base64,{PIXEL}"
    raw = client.get("/draw", headers={"accept": "image/avif,image/*,*/*;q=0.8"})
    assert (raw.content, raw.headers["content-type"]) == (PNG, "image/png")
    page = client.get("/page", headers={"accept": "text/html"})
    assert page.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/draw", params={"kind": "wrong"}).status_code == 500


def test_json_is_preferred_where_the_media_type_is_not_named() -> None:
    assert not wants_raw("*/*", "image/png") and not wants_raw("", "image/png")
    assert not wants_raw("image/*;q=0.5, application/json", "image/png")
    assert wants_raw("image/png", "image/png") and not wants_raw("image/png;q=x, application/json", "image/png")


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\x\\a.txt", "a.txt"),
        ("a\0b\n\u202etxt.exe", "abtxt.exe"),
        ("..", ""),
        (" . hidden. ", "hidden"),
        (".bashrc", "bashrc"),
        ("CON.txt", "_CON.txt"),
        ("nul", "_nul"),
        ('a<b>:"|?*.txt', "ab.txt"),
        ("你好.png", "你好.png"),
        ("é" * 300 + ".png", "é" * 98 + ".png"),
    ],
)
def test_names_are_made_harmless(name: str, clean: str) -> None:
    assert clean_name(name) == clean


@given(st.text())
def test_no_name_leads_anywhere_else(name: str) -> None:
    clean = clean_name(name)
    assert not set(clean) & set("/\\\0:") and clean not in (".", "..") and len(clean.encode()) <= 200
    assert clean_name(clean) == clean


@given(st.binary(max_size=300), st.text(max_size=50), st.sampled_from(["", "image/png", "text/x-y+z"]))
def test_what_is_written_as_text_is_read_back(data: bytes, name: str, kind: str) -> None:
    name = clean_name(name)
    assert dataurl.decode(dataurl.encode(data, name, kind)) == (data, name, kind)
    file = File(data, name, kind)
    assert File.from_text(file.url) == file


@given(st.text(max_size=100))
def test_any_text_is_a_file_or_refused(text: str) -> None:
    for head in ("", "data:", "data:a/b;base64,"):
        try:
            File.from_text(head + text, max_bytes=50)
        except InvalidInputError:
            continue


def test_what_a_picture_is_its_bytes_say(tmp_path: Path) -> None:
    assert sniff(SVG) == "image/svg+xml" and sniff(b"<html><svg>") is None and sniff(b"") is None
    assert Image(SVG, "a.txt", "text/html").media_type == "image/svg+xml"
    assert Audio(WAV).name == "file.wav" and sniff(b"RIFF\0\0\0\0AVI ") is None
    assert File(b"a,b", "t.csv").media_type == "text/csv" and File(b"\0").media_type == "application/octet-stream"
    path = Image(PNG, "a.png").save(tmp_path)
    assert Image(PNG, "a.png").save(tmp_path) == tmp_path / "a-2.png" and Image.from_path(path).data == PNG
    with pytest.raises(InvalidInputError, match="made of bytes, not str"):
        File("x")  # type: ignore[arg-type]


def test_pictures_of_pillow_and_paths_are_results() -> None:
    app = Application(title="Results")

    class Picture:
        mode = "RGB"

        def save(self, file: io.BytesIO, kind: str) -> None:
            assert kind == "PNG"
            file.write(PNG)

    @app.route("/pillow")
    def pillow() -> Image:
        return Picture()

    @app.route("/path")
    def path() -> File:
        return Path(__file__)

    assert app.test_client().get("/pillow").json() == f"data:image/png;name=image.png;base64,{PIXEL}"
    assert File.from_text(app.test_client().get("/path").json()).name == "test_app_files.py"


def test_limits_and_outputs_that_make_no_sense_are_refused() -> None:
    app = Application()
    for make, words in (
        (lambda: Upload(max_size="big"), "no size"),
        (lambda: Upload(accept=("csv",)), "'csv' is no media type"),
        (lambda: app.route("/a", output="fancy")(lambda: 1), "no way to show"),
        (lambda: app.route("/a", ["GET"])(_wants_file), "nested or a file"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            make()
    assert Upload(max_size="1KB").max_bytes == 1024 and Upload(accept="text/csv").accept == ("text/csv",)


def _wants_file(file: File) -> int:
    return 1


def test_clients_send_paths_bytes_and_open_files(tmp_path: Path) -> None:
    from served import served
    from six_routes import app

    path = tmp_path / "cat.png"
    path.write_bytes(PNG)
    with served(app) as url, AppClient(url) as client:
        for picture in (path, PNG, path.open("rb"), Image(PNG), PIXEL):
            result = client.call("stamp", picture=picture)
            assert result == f"data:image/png;name=stamped.png;base64,{PIXEL}"
            if hasattr(picture, "close"):
                picture.close()
        assert client.call("sizes", files=[path, b"12"])[0] == {"name": "cat.png", "bytes": len(PNG)}
        save(result, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == PNG


def test_the_openapi_document_has_forms_and_pictures() -> None:
    from six_routes import app

    operation = app.openapi()["paths"]["/stamp"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["picture"] == {"type": "string", "format": "binary"}
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "image/*"}
    assert json.dumps(app.document()).count("x-llmasos-max-bytes") == 3
