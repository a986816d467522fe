"""Where the packages of an application come from: its wheels, indexes and folders on this machine; and no other files
than its lock has hashes of."""

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import pytest
from app_world import package_of
from store_web import Web, web

from llmasos.errors import FormatError, UnsupportedError
from llmasos.serve.apps import environment
from llmasos.store import pip
from llmasos.store.packages import Apps, Installed

__all__ = ["web"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")
NAME = "rare_words-2.0-py3-none-any.whl"


def wheel(word: str) -> bytes:
    info = "rare_words-2.0.dist-info"
    files = {
        "rare_words.py": f"WORD = {word!r}\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: rare-words\nVersion: 2.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path), text)
    return found.getvalue()


WHEEL = wheel("petrichor")
SHA256 = hashlib.sha256(WHEEL).hexdigest()


@pytest.fixture
def pip_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and nothing of this machine's pip and uv but what a test sets."""
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    for name in ("LLMASOS_PYPI_INDEX", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pip, "_pip_options", dict)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")


@pytest.fixture(params=["uv", "pip"])
def installer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    is_uv = request.param == "uv"
    those = tuple(one for one in environment._INSTALLERS if ("uv" in one) == is_uv and environment._runs(one))[:1]
    if not those:
        pytest.skip(f"{request.param} is not installed")  # uv is nobody's requirement; without it pip installs
    monkeypatch.setattr(environment, "_INSTALLERS", those)


def installed(folder: Path, lock: str) -> Installed:
    path = package_of(folder, name="rare", files={"requirements.lock": lock.encode()})
    return Apps(folder / "home").install(path, accept=True)


def made(folder: Path, app: Installed) -> str:
    """What the environment has of the package."""
    environment.ensure(folder / "home", app)
    packages = environment._packages(environment.folder_of(folder / "home", app.name, app.version))
    return (packages / "rare_words.py").read_text()


def test_an_index_on_this_machine_is_asked_offline_and_its_files_must_have_the_hash_of_the_lock(
    web: Web, pip_alone: None, installer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{web.url}/simple")
    web.add_wheel("rare-words", "2.0", WHEEL, html=True)
    app = installed(tmp_path, f"rare-words==2.0 --hash=sha256:{SHA256}\n")
    assert "petrichor" in made(tmp_path, app)
    assert web.asked(f"/files/{NAME}")

    environment.remove(tmp_path / "home", app.name)
    other = wheel("something else")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-anew"))
    web.add_wheel("rare-words", "2.0", other, html=True)
    with pytest.raises(FormatError) as caught:
        made(tmp_path, app)
    found = hashlib.sha256(other).hexdigest()
    assert f"expected sha256 {SHA256}, found {found}." in caught.value.message
    assert "requirements.lock" in caught.value.message and "rare" in caught.value.message
    with pytest.raises(FormatError):
        made(tmp_path, app)  # what is half made does not count


def test_a_folder_of_wheels_is_looked_into_offline(
    pip_alone: None, installer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / NAME).write_bytes(WHEEL)
    monkeypatch.setenv("PIP_FIND_LINKS", f"https://outside.invalid/wheels {tmp_path / 'wheels'}")
    app = installed(tmp_path, "rare-words==2.0\n")
    assert "petrichor" in made(tmp_path, app)
    app = installed(tmp_path / "two", f"rare-words==2.0 --hash=sha256:{'a' * 64}\n")
    with pytest.raises(FormatError, match=f"expected sha256 {'a' * 64}, found {SHA256}"):
        made(tmp_path / "two", app)


def test_links_of_an_index_lead_nowhere_else_offline(
    web: Web, pip_alone: None, installer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", f"{web.url}/simple")
    monkeypatch.setenv("http_proxy", web.url)
    page = f'<a href="http://outside.invalid/{NAME}">{NAME}</a>'
    web.add("/simple/rare-words/", page.encode(), content_type="text/html")
    web.add(f"http://outside.invalid/{NAME}", WHEEL)
    app = installed(tmp_path, "rare-words==2.0\n")
    with pytest.raises(UnsupportedError, match=r"offline mode is on: only http://127\.0\.0\.1:\d+/simple was asked"):
        made(tmp_path, app)
    asked = [path for _, path, _ in web.requests]
    assert "/simple/rare-words/" in asked and not [path for path in asked if "outside" in path]


def test_nothing_on_this_machine_is_said_with_what_would_help(
    pip_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://outside.invalid/simple")
    app = installed(tmp_path, "rare-words==2.0\n")
    with pytest.raises(UnsupportedError, match="offline mode is on: rare-words") as caught:
        made(tmp_path, app)
    assert "PIP_FIND_LINKS" in (caught.value.hint or "") and "PIP_INDEX_URL" in (caught.value.hint or "")


def test_indexes_are_those_of_pip_for_uv_too(pip_alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "0")
    assert environment._Sources.of_pip().options(uv=True)[:1] == ["--index-strategy"], "uv's own index"
    monkeypatch.setenv("PIP_INDEX_URL", "https://one.invalid/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://two.invalid/simple http://localhost:1/simple")
    found = environment._Sources.of_pip()
    assert found.options(uv=True)[:6] == [
        *("--default-index", "https://one.invalid/simple"),
        *("--extra-index-url", "https://two.invalid/simple", "--extra-index-url", "http://localhost:1/simple"),
    ]
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    assert environment._Sources.of_pip().options(uv=False)[:2] == ["--index-url", "http://localhost:1/simple"]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert environment._Sources.of_pip().options(uv=True)[0] == "--no-index"
