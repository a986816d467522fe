"""Signatures: one key of one home, over every byte; another key for an application is refused."""

import json
import os
import stat
import sys
import zipfile
from pathlib import Path

import pytest
from app_packages import package, raw_zip

from llmasos.errors import FormatError, StoreError, UnsupportedError
from llmasos.store.packages import KeyChangedError, Publisher, open_package, pack, sign, verify
from llmasos.store.packages.sign import check_publisher, known_publisher, note_publisher, publisher_key


def signer(path: Path) -> Publisher | None:
    with open_package(path) as opened:
        opened.check()
        return verify(opened)


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_signature_holds_for_the_packages_bytes(tmp_path: Path, home: Path) -> None:
    path = package(tmp_path)
    before = contents(path)
    assert signer(path) is None
    made = sign(path)
    assert signer(path) == made and len(made.key_id) == 32
    after = contents(path)
    assert json.loads(after.pop("signature.json"))["algorithm"] == "ed25519" and after == before
    data = path.read_bytes()
    assert sign(path) == made and path.read_bytes() == data  # ed25519 gives one signature


def test_the_key_is_made_once_for_its_owner_only(home: Path) -> None:
    key = publisher_key().public_key()
    path = home / "keys" / "publisher.pem"
    assert publisher_key().public_key() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(path.parent) == ["publisher.pem"]
    path.chmod(0o644)
    with pytest.raises(StoreError, match="Others can read the key") as caught:
        publisher_key()
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("text", [b"", b"no key", None])
def test_a_key_file_that_holds_no_key_is_said(home: Path, text: bytes | None) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import x25519

    path = home / "keys" / "publisher.pem"
    path.parent.mkdir(parents=True)
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(text if text is not None else x25519.X25519PrivateKey.generate().private_bytes(*pem))
    path.chmod(0o600)
    with pytest.raises(FormatError, match="is no"):
        publisher_key()


def damaged(tmp_path: Path, **changes: object) -> Path:
    path = package(tmp_path)
    sign(path)
    files = contents(path)
    facts = json.loads(files["signature.json"]) | changes
    files["signature.json"] = json.dumps({name: value for name, value in facts.items() if value is not None}).encode()
    return raw_zip(tmp_path / "bad.llmapp", list(files.items()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signature": "A" * 86 + "=="}, "it is not one of these files"),
        ({"signature": "?"}, "does not hold"),
        ({"public_key": "AAAA"}, "does not hold"),
        ({"key_id": "0" * 32}, "the key id is not that of the key"),
        ({"algorithm": "none"}, "signature.json: Input should be 'ed25519'"),
        ({"key_id": None}, "signature.json: Field required"),
        ({"more": 1}, "signature.json: Extra inputs"),
    ],
)
def test_a_signature_that_does_not_hold_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(FormatError, match="signature") as caught:
        signer(damaged(tmp_path, **changes))
    assert words in caught.value.message


def test_another_packages_signature_does_not_hold(tmp_path: Path) -> None:
    one, two = package(tmp_path), package(tmp_path, "2.0.0")
    sign(one)
    files = contents(two) | {"signature.json": contents(one)["signature.json"]}
    with pytest.raises(FormatError, match="does not hold"):
        signer(raw_zip(tmp_path / "bad.llmapp", list(files.items())))


def test_a_damaged_package_is_not_signed(tmp_path: Path) -> None:
    files = contents(package(tmp_path))
    files["app.py"] += b"#"
    path = raw_zip(tmp_path / "bad.llmapp", list(files.items()))
    before = path.read_bytes()
    with pytest.raises(FormatError, match="is not the file"):
        sign(path)
    assert path.read_bytes() == before


def test_the_first_publisher_is_the_publisher(tmp_path: Path, home: Path) -> None:
    ours, theirs = (sign(package(tmp_path / name), tmp_path / name) for name in ("ours", "theirs"))
    check_publisher(home, "ask", ours)
    check_publisher(home, "ask", None)
    note_publisher(home, "ask", ours)
    assert known_publisher(home, "ask") == ours
    check_publisher(home, "ask", ours)
    check_publisher(home, "other", theirs)
    with pytest.raises(KeyChangedError, match=f"{ours.key_id}, this package with {theirs.key_id}") as caught:
        check_publisher(home, "ask", theirs)
    assert f"--trust {theirs.key_id}" in caught.value.hint
    with pytest.raises(KeyChangedError, match="this package is not signed") as caught:
        check_publisher(home, "ask", None)
    assert str(home / "keys" / "publishers" / "ask.json") in caught.value.hint
    check_publisher(home, "ask", theirs, trust=theirs.key_id)
    for publisher in (theirs, None):
        with pytest.raises(KeyChangedError, match=f"not with the key {ours.key_id}"):
            check_publisher(home, "ask", publisher, trust=ours.key_id)


def test_a_damaged_note_of_a_publisher_is_no_free_pass(home: Path) -> None:
    path = home / "keys" / "publishers" / "ask.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(StoreError, match="is damaged"):
        check_publisher(home, "ask", None)


def test_without_the_library_signatures_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed, plain = package(tmp_path / "a"), package(tmp_path / "b")
    sign(signed)
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert signer(plain) is None
    for act in (lambda: sign(plain), lambda: signer(signed)):
        with pytest.raises(UnsupportedError, match="cryptography") as caught:
            act()
        assert caught.value.hint == "pip install llmasos[apps]"


def test_packing_needs_no_such_library(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; sys.modules['cryptography'] = None; import llmasos.store.packages; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")
    assert pack.__module__ == "llmasos.store.packages.pack"
