"""What gets into a package, what stays out, what is refused."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest
from app_packages import write_app

from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, NotFoundError, UnsupportedError
from llmasos.store.packages import open_package, pack
from llmasos.store.packages import pack as _pack_function
from llmasos.store.packages.requirements import check_importable, parse_lock, parse_requirements
from llmasos.store.packages.template import create


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_app(tmp_path / "ask")


def put(folder: Path, path: str, data: bytes = b"x") -> Path:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target


def test_the_same_files_give_the_same_bytes(app: Path, tmp_path: Path) -> None:
    first = pack(app)
    assert first.path == Path("ask-1.0.0.llmapp") and first.files == ("app.py", "llmasos.toml")
    data = first.path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == first.sha256
    other = write_app(tmp_path / "elsewhere")
    os.utime(other / "app.py", (1, 1))
    (other / "app.py").chmod(0o755)
    assert pack(other, tmp_path / "other.llmapp").path.read_bytes() == data


def test_the_list_is_that_of_sha256sum(app: Path) -> None:
    with zipfile.ZipFile(pack(app).path) as archive:
        lines = archive.read("files.sha256").decode().splitlines()
    assert lines == [
        f"{hashlib.sha256((app / name).read_bytes()).hexdigest()}  {name}" for name in ("app.py", "llmasos.toml")
    ]


def test_what_is_not_the_applications_stays_out(app: Path) -> None:
    for path in (".git/config", "__pycache__/app.pyc", "x.pyc", ".venv/a", "env/pyvenv.cfg", "env/lib/b", "old.llmapp"):
        put(app, path)
    for path in ("notes.txt", "deep/notes.txt", "tests/a.py", "kept/b.txt", "wheels/a-1-py3-none-any.whl", "读.md"):
        put(app, path)
    (app / ".llmappignore").write_text("# comment\nnotes.*\n/tests/\n", encoding="utf-8")
    names = pack(app).files
    assert names == ("app.py", "kept/b.txt", "llmasos.toml", "wheels/a-1-py3-none-any.whl", "读.md")


@pytest.mark.parametrize("name", [".env", ".env.local", "id_ed25519", "deep/server.key", ".netrc", "credentials.json"])
def test_files_with_names_of_secrets_are_refused(app: Path, name: str) -> None:
    put(app, name)
    with pytest.raises(InvalidInputError, match="looks like a secret") as caught:
        pack(app)
    assert name in caught.value.message and ".llmappignore" in caught.value.hint
    assert not list(app.parent.glob("*.llmapp"))
    (app / ".llmappignore").write_text(name)
    assert name not in pack(app).files


@pytest.mark.parametrize(
    "text",
    [
        b"-----BEGIN " + b"PRIVATE KEY-----",
        b"-----BEGIN RSA " + b"PRIVATE KEY-----",
        b"AKIA" + b"A1" * 8,
        b"ghp_" + b"a" * 36,
        b"hf_" + b"a" * 34,
        b"sk-" + b"a" * 40,
    ],
)
def test_secrets_in_the_text_are_refused_with_their_line(app: Path, text: bytes) -> None:
    put(app, "notes.md", b"one\ntwo " + text + b"\n")
    with pytest.raises(InvalidInputError, match=r"notes\.md looks like a secret.*line 2") as caught:
        pack(app)
    assert text.decode() not in str(caught.value)


def test_an_example_of_an_environment_is_no_secret(app: Path) -> None:
    put(app, ".env.example", b"TOKEN=\n")
    assert ".env.example" in pack(app).files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda app: (app / "link").symlink_to("app.py"), "link is a symbolic link"),
        (lambda app: (app / "folder").symlink_to("/"), "folder is a symbolic link"),
        (lambda app: os.mkfifo(app / "pipe"), "pipe is neither a file nor a folder"),
        (lambda app: put(app, "signature.json"), "written by the packer"),
        (lambda app: put(app, "installed.json"), "written by the packer"),
        (lambda app: (put(app, "a/x"), put(app, "A/y")), "which are one on some systems"),
        (lambda app: (put(app, "readme"), put(app, "README")), "which are one file on some systems"),
        (lambda app: put(app, "aux.txt"), "name of a device"),
        (lambda app: put(app, "a\nb"), "control character"),
        (lambda app: put(app, "ab:c"), "one of <"),
        (lambda app: put(app, "dot."), "ends with a dot"),
        (lambda app: put(app, "e\u0301.txt"), "composed form"),
        (lambda app: (app / "app.py").unlink(), "app.entry = 'app.py': there is no such file"),
        (lambda app: (app / "llmasos.toml").unlink(), "has no llmasos.toml"),
        (lambda app: put(app, ".llmappignore", b"!x"), "patterns only leave out"),
        (lambda app: put(app, "requirements.lock", b"-r other.txt"), "is no requirement"),
    ],
)
def test_what_a_package_cannot_hold_is_refused(app: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    change(app)
    with pytest.raises(LLMasOSError) as caught:
        pack(app)
    assert words in caught.value.message and caught.value.hint
    assert not list(app.parent.glob("*.llmapp"))


def test_too_much_is_refused(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules[_pack_function.__module__]
    put(app, "big", os.urandom(3000))
    monkeypatch.setattr(module, "MAX_PACKED", 2000)
    with pytest.raises(FormatError, match="2000 are allowed"):
        pack(app)
    assert not list(app.parent.glob("*.llmapp"))
    monkeypatch.setattr(module, "MAX_UNPACKED", 2000)
    with pytest.raises(FormatError, match=r"3 files with \d+ bytes; 10000 with 2000 are allowed"):
        pack(app)
    monkeypatch.setattr(module, "MAX_FILES", 2)
    with pytest.raises(FormatError, match="2 with 2000 are allowed"):
        pack(app)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        pack(tmp_path / "none")


def test_the_template_is_packed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create(tmp_path / "hello")
    with open_package(pack(tmp_path / "hello").path) as package:
        package.check()
        assert package.manifest.app.name == "hello" and package.manifest.permissions.models == ["default"]
    with pytest.raises(InvalidInputError, match="is there already"):
        create(tmp_path / "hello")
    with pytest.raises(InvalidInputError, match="cannot be the name"):
        create(tmp_path / "Hello World")


LOCK = b"""\
# by uv pip compile
pytest==1000.0 \\
    --hash=sha256:%s \\
    --hash=sha256:%s
    # via something
no-such-package-of-ours==1.0 --hash=sha256:%s  # why
llmasos
pydantic>=2 --hash=sha256:%s
colorama==0.4 ; sys_platform == "never" \\
    --hash=sha256:%s
""" % tuple(letter * 64 for letter in (b"a", b"B", b"c", b"d", b"e"))


def test_requirements_are_read_as_uv_writes_them() -> None:
    names = ["pytest", "no-such-package-of-ours", "llmasos", "pydantic", "colorama"]
    assert [r.name for r in parse_requirements(LOCK)] == names
    locked = parse_lock(LOCK)
    assert locked[0].hashes == ("a" * 64, "b" * 64) and locked[2].hashes == ()
    assert str(locked[1]) == f"no-such-package-of-ours==1.0 --hash=sha256:{'c' * 64}"


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        (f"a==1 --hash=sha256:{'a' * 64}\nb==1\n", "b==1 has no hash, and others have"),
        ("a==1 --hash=sha256:aaaa\n", "a==1: 'sha256:aaaa' is no sha256"),
        (f"a==1 --hash=md5:{'a' * 32}\n", "is no sha256"),
    ],
)
def test_hashes_that_could_not_be_checked_are_refused(lock: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        parse_lock(lock.encode())


WHEEL = "wheels/rare_words-2.0-py3-none-any.whl"


def test_wheels_that_the_lock_has_no_hash_of_are_refused_packed_or_not(
    app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = (hashlib.sha256(data).hexdigest() for data in (b"right", b"wrong"))
    put(app, WHEEL, b"wrong")
    lines = [f"rare.words==2.0 --hash=sha256:{right}", f"rare-words==1.0 --hash=sha256:{wrong}", ""]
    put(app, "requirements.lock", "\n".join(lines).encode())
    said = f"{WHEEL} is not the file that requirements.lock has a hash of: expected sha256 {right}, found {wrong}"
    with pytest.raises(FormatError, match=said):
        pack(app)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[_pack_function.__module__], "check_wheels", lambda lock, hashes: None)
        path = pack(app).path
    with open_package(path) as package, pytest.raises(FormatError, match=said):
        package.check()
    put(app, WHEEL, b"right")
    with open_package(pack(app).path) as package:
        package.check()


def test_packages_that_are_not_here_are_named(tmp_path: Path) -> None:
    check_importable(tmp_path, "ask 1.0.0")
    (tmp_path / "requirements.lock").write_bytes(LOCK)
    with pytest.raises(UnsupportedError) as caught:
        check_importable(tmp_path, "ask 1.0.0")
    found = caught.value.message
    assert "pytest==1000.0 (here: " in found and "no-such-package-of-ours==1.0" in found
    assert "pydantic" not in found and "colorama" not in found
