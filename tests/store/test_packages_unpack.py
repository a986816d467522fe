"""Hostile packages: each is refused in its own words, and nothing of it is written."""

import io
import random
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from app_packages import files_of, listed, package, raw_zip
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmasos.errors import FormatError, LLMasOSError, NotFoundError
from llmasos.store.packages import open_package, unpack
from llmasos.store.packages.names import problem_of_names
from llmasos.store.packages.pack import HASHES, SIGNATURE

GOOD = listed(files_of())


def extract(path: Path) -> Path:
    """What an install does with a package."""
    target = path.parent / "out" / "1.0.0"
    with open_package(path) as opened:
        opened.extract(target)
    return target


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        extract(path)
    assert caught.value.hint
    out = path.parent / "out"
    assert not out.exists() or list(out.iterdir()) == []
    return caught.value.message


def with_files(tmp_path: Path, *more: str | zipfile.ZipInfo, data: bytes = b"x") -> Path:
    """A package whose list has these, too: the list alone must not open the door."""
    names = [one if isinstance(one, str) else one.filename for one in more]
    files = listed({**files_of(), **dict.fromkeys(names, data)})
    entries = [(name, content) for name, content in files.items() if name not in names]
    return raw_zip(tmp_path / "bad.llmapp", [*entries, *((one, data) for one in more)])


def test_a_good_package_is_written_as_it_was(tmp_path: Path) -> None:
    target = extract(package(tmp_path))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == GOOD
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o644}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../evil", "leads out"),
        ("a/../../evil", "leads out"),
        ("/etc/evil", "absolute"),
        ("C:/evil", "drive"),
        ("c:evil", "drive"),
        ("..\\evil", "backslash"),
        ("\\\\host\\share", "backslash"),
        ("a//b", "empty part"),
        ("./a", "empty part"),
        ("folder/", "entry for a folder"),
        ("a\x1bb", "control character"),
        ("a\u202eb", "control character"),
        ("nul", "device"),
        ("a/COM1.txt", "device"),
        ("a ", "space"),
        ("a?", "one of <"),
        ("x" * 201, "longer than"),
        ("/".join(["x" * 100] * 5), "longer than"),
        ("installed.json", "has the line"),
    ],
)
def test_names_that_are_not_safe_everywhere_are_refused(tmp_path: Path, name: str, words: str) -> None:
    assert words in refused(with_files(tmp_path, name))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("App.PY",), "one file on some systems"),
        (("straße", "STRASSE"), "one file on some systems"),
        (("a/x", "A/y"), "one on some systems"),
        (("app.py/x",), "as a file and as a folder"),
    ],
)
def test_names_that_collide_are_refused(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    assert words in refused(with_files(tmp_path, *names))


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = raw_zip(tmp_path / "bad.llmapp", [*GOOD.items(), ("app.py", b"evil")])
    assert "'app.py' twice" in refused(path)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (stat.S_IFLNK | 0o777, "symbolic link"),
        (stat.S_IFCHR | 0o666, "device"),
        (stat.S_IFIFO | 0o666, "device"),
        (stat.S_IFSOCK | 0o666, "device"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, mode: int, words: str) -> None:
    info = zipfile.ZipInfo("odd")
    info.external_attr, info.create_system = mode << 16, 3
    assert words in refused(with_files(tmp_path, info, data=b"/etc/passwd"))


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = with_files(tmp_path, "né.txt")  # zipfile marks it as UTF-8
    path.write_bytes(path.read_bytes().replace("né.txt".encode(), b"n\xff\xfe.txt"))
    assert "not UTF-8" in refused(path)


def test_a_name_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = with_files(tmp_path, "nee.txt")
    path.write_bytes(path.read_bytes().replace(b"nee.txt", b"n\x82e.txt"))  # code page 437
    assert "not marked as UTF-8" in refused(path)


def test_a_name_that_goes_on_after_nul_is_refused(tmp_path: Path) -> None:
    path = with_files(tmp_path, "abc.txt")
    path.write_bytes(path.read_bytes().replace(b"abc.txt", b"abc\0txt"))
    assert "control character" in refused(path)


def entry_patched(tmp_path: Path, offset: int, value: bytes, name: bytes = b"app.py") -> Path:
    """A good package with bytes of a file's entry in the directory changed (APPNOTE 4.3.12)."""
    data = bytearray(package(tmp_path).read_bytes())
    start = data.rindex(b"PK\1\2", 0, data.rindex(name))
    data[start + offset : start + offset + len(value)] = value
    path = tmp_path / "bad.llmapp"
    path.write_bytes(data)
    return path


def test_encrypted_files_are_refused(tmp_path: Path) -> None:
    assert "encrypted" in refused(entry_patched(tmp_path, 8, b"\1"))


def test_other_packings_are_refused(tmp_path: Path) -> None:
    assert "packed in the way 12" in refused(entry_patched(tmp_path, 10, struct.pack("<H", zipfile.ZIP_BZIP2)))


def test_two_entries_for_the_same_bytes_are_refused(tmp_path: Path) -> None:
    assert "does not begin where" in refused(entry_patched(tmp_path, 42, b"\0\0\0\0", b"files.sha256"))


def test_a_file_whose_two_headers_differ_is_refused(tmp_path: Path) -> None:
    data = bytearray(package(tmp_path).read_bytes())
    start = data.index(b"app.py")
    data[start : start + 6] = b"apq.py"
    (tmp_path / "bad.llmapp").write_bytes(data)
    assert "can't be read" in refused(tmp_path / "bad.llmapp")


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_files(tmp_path, "bomb", data=b"\0" * (2 << 20))
    assert "2097152 bytes from" in refused(path) and path.stat().st_size < 10_000
    monkeypatch.setattr(unpack, "MAX_RATIO", 10_000)
    extract(path)
    monkeypatch.setattr(unpack, "MAX_UNPACKED", 2 << 20)
    with pytest.raises(FormatError, match="2097152 are allowed"), open_package(path):
        pass
    monkeypatch.setattr(unpack, "MAX_PACKED", 1000)
    with pytest.raises(FormatError, match="1000 are allowed"), open_package(path):
        pass


def test_a_file_that_hides_others_in_its_comment_is_refused(tmp_path: Path) -> None:
    path = package(tmp_path)
    data = path.read_bytes()
    size = len(data) - 22 - data.index(b"PK\1\2") - 46 - len("app.py")  # all entries after the first
    assert "1 files instead of 3" in refused(entry_patched(tmp_path, 32, struct.pack("<H", size)))


def test_a_size_that_is_a_lie_is_refused(tmp_path: Path) -> None:
    assert "app.py can't be read" in refused(entry_patched(tmp_path, 24, struct.pack("<L", 7)))


def test_too_many_files_are_refused_before_the_directory_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_files(tmp_path, *(f"f{i}" for i in range(20)))
    monkeypatch.setattr(unpack, "MAX_FILES", 20)
    monkeypatch.setattr(unpack.zipfile, "ZipFile", None)
    assert "23 files; 20 are allowed" in refused(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"MZ" + data, "belong to no file"),
        (lambda data: data + b"more", "something behind its end"),
        (lambda data: data[:-2] + b"\4\0more", "something behind its end"),
        (lambda data: data[:-2] + b"\4\0", "has a comment"),
        (lambda data: data[:100], "no zip file"),
        (lambda data: b"", "no zip file"),
        (lambda data: b"x" * 1000, "no zip file"),
        (lambda data: data[:-22] + b"PK\6\7" + b"\0" * 16 + data[-22:], "zip64"),
    ],
)
def test_what_is_no_plain_zip_is_refused(tmp_path: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.llmapp"
    path.write_bytes(change(package(tmp_path).read_bytes()))
    assert words in refused(path)


FILES = files_of()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({**GOOD, "evil.py": b""}, "evil.py is not in files.sha256"),
        ({name: data for name, data in GOOD.items() if name != "app.py"}, "app.py is in files.sha256 and missing"),
        ({**GOOD, "app.py": GOOD["app.py"] + b"\n"}, "app.py is not the file that files.sha256 lists"),
        ({**GOOD, "llmasos.toml": GOOD["llmasos.toml"] + b"\n"}, "llmasos.toml is not the file"),
        (FILES, "has no files.sha256"),
        (listed({"app.py": b""}), "has no llmasos.toml"),
        (listed({"llmasos.toml": FILES["llmasos.toml"]}), "app.entry = 'app.py': there is no such file"),
        (listed({**FILES, "llmasos.toml": b"[app"}), "is not valid TOML"),
        ({**GOOD, HASHES: GOOD[HASHES].upper()}, "has the line"),
        ({**GOOD, HASHES: GOOD[HASHES] * 2}, "has the line"),
        ({**GOOD, HASHES: GOOD[HASHES][:-1]}, "in the middle of a line"),
        ({**GOOD, HASHES: b"\xff"}, "is not UTF-8"),
        ({**GOOD, SIGNATURE: b" " * 100_000}, "is longer than"),
    ],
)
def test_the_list_and_the_files_must_agree(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    assert words in refused(raw_zip(tmp_path / "bad.llmapp", list(files.items())))


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no package"), open_package(tmp_path / "none.llmapp"):
        pass


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpack.os, "rename", fail)
    with pytest.raises(LLMasOSError, match="disk is full"):
        extract(package(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
@settings(max_examples=300)
def test_damaged_bytes_are_refused_or_change_nothing(tmp_path: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    whole = tmp_path / "good.llmapp"
    if not whole.exists():
        package(tmp_path).rename(whole)
    data = bytearray(whole.read_bytes())
    for _ in range(count):
        where = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[where] ^= 1 << rng.randrange(8)
            case 1:
                data[where] = rng.choice([0, 0xFF, 0x7F, 0x80])
            case _:
                del data[where : where + rng.randrange(1, 9)]
    damaged = tmp_path / "damaged.llmapp"
    damaged.write_bytes(data)
    try:
        with open_package(damaged) as opened:
            opened.check()
            found = {name: source.open().read() for name, source in opened.sources().items()}
    except FormatError:
        return
    assert found == GOOD


@given(names=st.lists(st.text(alphabet="aA./\\:éE\u0301 \0", min_size=1, max_size=6), min_size=1, max_size=4))
@example(names=["a", "a/b"])
@settings(max_examples=300)
def test_names_that_are_let_through_stay_inside_and_apart(names: list[str]) -> None:
    if problem_of_names(names):
        return
    root = Path("/root/of/package")
    places = [(root / name) for name in names]
    assert all(".." not in place.parts and place.is_relative_to(root) and place != root for place in places)
    assert len({str(place).casefold() for place in places}) == len(names)
    assert not any(a in b.parents for a in places for b in places)


def test_an_empty_zip_is_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    zipfile.ZipFile(data, "w").close()
    (tmp_path / "bad.llmapp").write_bytes(data.getvalue())
    assert "has no files.sha256" in refused(tmp_path / "bad.llmapp")
