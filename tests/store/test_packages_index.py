"""Indexes: folders and URLs, several in an order, versions that never change."""

import json
import os
import threading
from pathlib import Path

import pytest
from app_packages import package
from store_web import Web

from llmasos.errors import (
    ChecksumError,
    FormatError,
    InvalidInputError,
    LLMasOSError,
    NetworkError,
    NotFoundError,
    OfflineError,
)
from llmasos.store.packages import Found, Index, choose, indexes, search, sign


def publish(index: Index, tmp_path: Path, version: str = "1.0.0", more: str = "", name: str = "ask") -> Found:
    return index.publish(package(tmp_path / "made" / os.urandom(4).hex(), version, more, name))


@pytest.fixture
def first(tmp_path: Path) -> Index:
    return Index(tmp_path / "first")


@pytest.fixture
def second(tmp_path: Path) -> Index:
    return Index(tmp_path / "second")


def test_a_published_package_is_found(first: Index, tmp_path: Path) -> None:
    path = package(tmp_path)
    publisher = sign(path)
    found = first.publish(path)
    assert choose([first], "ask") == found and found.release.key_id == publisher.key_id
    folder = Path(first.place)
    assert (folder / found.release.file).read_bytes() == path.read_bytes()
    facts = json.loads((folder / "index.json").read_text())
    assert list(facts["apps"]["ask"]) == ["1.0.0"] and facts["format"] == 1
    assert (found.release.summary, found.release.license, found.release.size) == (
        "Answers it",
        "MIT",
        len(path.read_bytes()),
    )
    with first.package(found, tmp_path / "cache") as there:
        assert there == folder / found.release.file


def test_versions_never_change(first: Index, tmp_path: Path) -> None:
    path = package(tmp_path)
    first.publish(path)
    before = (Path(first.place) / "index.json").read_bytes()
    first.publish(path)  # the same again is no change
    with pytest.raises(InvalidInputError, match=r"has ask 1\.0\.0 already, with other bytes"):
        publish(first, tmp_path, more="[permissions]\nexec = true")
    with pytest.raises(InvalidInputError, match=r"has ask 1\.0\.0 already"):
        publish(first, tmp_path, "1.0")  # the same version in another spelling
    assert (Path(first.place) / "index.json").read_bytes() == before


def test_the_newest_that_is_not_yanked_is_chosen(first: Index, tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0", "2.0.0rc1"):
        publish(first, tmp_path, version)
    assert choose([first], "ask").version == "1.10.0"
    assert choose([first], "ask==2.0.0rc1").version == "2.0.0rc1"
    assert choose([first], "ask==1.9").version == "1.9.0"
    assert first.yank("ask", "1.10.0", " loses data ").release.yanked == "loses data"
    assert choose([first], "ask").version == "1.9.0"
    assert choose([first], "ask==1.10.0").release.yanked == "loses data"
    first.yank("ask", "1.9.0", "old")
    assert choose([first], "ask").version == "2.0.0rc1"
    first.yank("ask", "2.0.0rc1", "old")
    with pytest.raises(NotFoundError, match="no version of ask that is not yanked") as caught:
        choose([first], "ask")
    assert "1.9.0 (yanked), 1.10.0 (yanked)" in caught.value.hint
    assert search([first]) == []


@pytest.mark.parametrize("reference", ["ask==3.0", "ask==x", "other"])
def test_what_is_not_there_is_said_with_what_is(first: Index, tmp_path: Path, reference: str) -> None:
    publish(first, tmp_path)
    with pytest.raises(NotFoundError) as caught:
        choose([first], reference)
    assert "1.0.0" in caught.value.hint or "app search" in caught.value.hint


def test_yanking_wants_a_version_and_a_reason(first: Index, tmp_path: Path) -> None:
    publish(first, tmp_path)
    with pytest.raises(InvalidInputError, match="with a reason"):
        first.yank("ask", "1.0.0", " ")
    with pytest.raises(InvalidInputError, match="has a control character"):
        first.yank("ask", "1.0.0", "bad\x1b[2J")
    with pytest.raises(NotFoundError, match=r"no ask 2\.0\.0"):
        first.yank("ask", "2.0.0", "bad")


def test_an_application_belongs_to_the_first_index_that_has_its_name(
    first: Index, second: Index, tmp_path: Path
) -> None:
    publish(first, tmp_path, "1.0.0")
    publish(second, tmp_path, "9.0.0")
    publish(second, tmp_path, name="poems")
    both = [first, second]
    assert [(f.name, f.version, f.index) for f in search(both)] == [("ask", "1.0.0", first), ("poems", "1.0.0", second)]
    assert choose(both, "ask").index is first and choose(both[::-1], "ask").version == "9.0.0"
    with pytest.raises(NotFoundError, match=r"no ask 9\.0\.0"):
        choose(both, "ask==9.0.0")
    first.yank("ask", "1.0.0", "bad")
    assert [found.name for found in search(both)] == ["poems"]  # no way round the first by a yank
    with pytest.raises(NotFoundError, match="not yanked"):
        choose(both, "ask")


def test_words_are_looked_for_in_names_and_summaries(first: Index, tmp_path: Path) -> None:
    publish(first, tmp_path)
    publish(first, tmp_path, name="poems")
    assert [found.name for found in search([first], ["ANSWERS"])] == ["ask", "poems"]
    assert [found.name for found in search([first], ["poem", "it"])] == ["poems"]
    assert search([first], ["poem", "ask"]) == []


def test_indexes_come_from_the_line_or_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="No index") as caught:
        indexes(bundled=False)
    assert "LLMASOS_APP_INDEX" in caught.value.hint
    assert [str(index) for index in indexes()] == ["bundled"]
    monkeypatch.setenv("LLMASOS_APP_INDEX", f"{tmp_path}, https://user:key@example.com/apps/index.json ,")
    assert [str(index) for index in indexes()] == [str(tmp_path), "https://example.com/apps", "bundled"]
    assert [str(index) for index in indexes(bundled=False)] == [str(tmp_path), "https://example.com/apps"]
    assert [str(index) for index in indexes(["https://example.org/"])] == ["https://example.org"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 2}',
        '{"apps": {"../x": {"1.0.0": {"file": "a", "sha256": "%s", "size": 1}}}}' % ("0" * 64),
        '{"apps": {"x": {"../1": {"file": "a", "sha256": "%s", "size": 1}}}}' % ("0" * 64),
        '{"apps": {"x": {"1.0": {"file": "../a", "sha256": "%s", "size": 1}}}}' % ("0" * 64),
        '{"apps": {"x": {"1.0": {"file": "https://a/b", "sha256": "%s", "size": 1}}}}' % ("0" * 64),
        '{"apps": {"x": {"1.0": {"file": "a", "sha256": "0", "size": 1}}}}',
        '{"apps": {"x": {"1.0": {"file": "a", "sha256": "%s", "size": 1, "summary": "\\u001b"}}}}' % ("0" * 64),
        '{"apps": {"x": {"1.0": {"file": "a", "sha256": "%s", "size": 99999999999}}}}' % ("0" * 64),
    ],
)
def test_a_damaged_index_is_refused(first: Index, tmp_path: Path, text: str) -> None:
    folder = Path(first.place)
    folder.mkdir()
    (folder / "index.json").write_text(text)
    for act in (lambda: search([first]), lambda: choose([first], "x"), lambda: publish(first, tmp_path)):
        with pytest.raises(FormatError, match="is damaged"):
            act()
    assert (folder / "index.json").read_text() == text


def test_a_folder_without_an_index_is_an_error(first: Index) -> None:
    with pytest.raises(NotFoundError, match=r"has no index\.json"):
        search([first])


def test_a_package_that_was_changed_in_the_index_is_refused(first: Index, tmp_path: Path) -> None:
    found = publish(first, tmp_path)
    path = Path(first.place) / found.release.file
    data = bytearray(path.read_bytes())
    data[10] ^= 1  # a time in a header: the zip stays good
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="is not the file"), first.package(found, tmp_path):
        pass
    path.unlink()
    with pytest.raises(NotFoundError, match="is not there"), first.package(found, tmp_path):
        pass


def test_a_bad_package_is_not_published(first: Index, tmp_path: Path) -> None:
    path = tmp_path / "bad.llmapp"
    path.write_bytes(package(tmp_path).read_bytes()[:-1])
    with pytest.raises(FormatError):
        first.publish(path)
    assert not Path(first.place).exists()


def test_an_index_that_cannot_be_written_is_left_as_it_was(
    first: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(first, tmp_path)
    before = (Path(first.place) / "index.json").read_bytes()
    real = os.replace

    def fail(source: object, target: object) -> None:
        if str(target).endswith("index.json"):
            raise OSError(28, "No space left on device")
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(LLMasOSError, match="disk is full"):
        publish(first, tmp_path, "2.0.0")
    monkeypatch.undo()
    assert (Path(first.place) / "index.json").read_bytes() == before
    assert publish(first, tmp_path, "2.0.0").version == "2.0.0"  # what was left does no harm


def test_publishers_at_the_same_time_lose_nothing(first: Index, tmp_path: Path) -> None:
    paths = [package(tmp_path, f"1.{i}.0") for i in range(6)]
    threads = [threading.Thread(target=first.publish, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first.apps["ask"]) == 6


def serve(web: Web, index: Index, prefix: str = "/apps") -> None:
    folder = Path(index.place)
    for path in folder.rglob("*.*"):
        if path.is_file():
            web.add(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_an_index_behind_a_url_is_read(web: Web, first: Index, tmp_path: Path) -> None:
    published = publish(first, tmp_path)
    serve(web, first)
    remote = Index(f"{web.url}/apps/")
    found = choose([remote], "ask")
    assert found.release == published.release
    with remote.package(found, tmp_path / "cache") as path:
        assert path.read_bytes() == (Path(first.place) / found.release.file).read_bytes()
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(InvalidInputError, match="can't be written to"):
        publish(remote, tmp_path)


def test_bytes_that_the_index_did_not_promise_are_refused(web: Web, first: Index, tmp_path: Path) -> None:
    found = publish(first, tmp_path)
    serve(web, first)
    remote = Index(f"{web.url}/apps")
    web.add(f"/apps/{found.release.file}", b"x" * found.release.size)
    with pytest.raises(ChecksumError), remote.package(choose([remote], "ask"), tmp_path / "cache"):
        pass
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_index_that_cannot_be_read_is_not_passed_over(
    web: Web, first: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(first, tmp_path)
    with pytest.raises((NetworkError, NotFoundError)):
        choose([Index(f"{web.url}/none"), first], "ask")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    with pytest.raises(OfflineError):
        choose([Index("https://apps.example.org/index"), first], "ask")
    with pytest.raises((NetworkError, NotFoundError)) as found:
        choose([Index(f"{web.url}/none"), first], "ask")
    assert not isinstance(found.value, OfflineError), "this machine is no outside"
    assert choose([first], "ask").version == "1.0.0"
