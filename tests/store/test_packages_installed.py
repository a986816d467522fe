"""Installing: accepted first, whole or not at all, back again; updates ask only for more."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from app_packages import package, write_app
from filelock import FileLock

from llmasos.apps.loading import load_application
from llmasos.errors import BusyError, FormatError, InvalidInputError, NotFoundError, StoreError, UnsupportedError
from llmasos.store import library
from llmasos.store.packages import Apps, Index, KeyChangedError, NotAcceptedError, Request, pack, sign
from llmasos.store.packages import unpack as unpack_module

NET = "[permissions]\nnet = ['a.com']"


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Asked:
    """An `accept` that notes what it was asked."""

    def __init__(self, answer: bool = True) -> None:
        self.answer, self.requests = answer, list[Request]()

    def __call__(self, request: Request) -> bool:
        self.requests.append(request)
        return self.answer


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index")


@pytest.fixture
def publish(index: Index, tmp_path: Path) -> Callable[..., None]:
    def act(version: str = "1.0.0", more: str = "", name: str = "ask") -> None:
        path = package(tmp_path, version, more, name)
        sign(path)
        index.publish(path)

    return act


def test_the_whole_story(index: Index, publish: Callable[..., None], tmp_path: Path, home: Path) -> None:
    publish("1.0.0")
    publish("1.1.0")
    apps, asked = Apps(), Asked()
    one = apps.install("ask==1.0.0", [index], accept=asked)
    assert (one.version, one.folder) == ("1.0.0", home / "apps" / "ask" / "1.0.0")
    assert asked.requests[0].sheet["permissions"] == [] and asked.requests[0].previous is None
    assert load_application("ask").title == "Ask"

    two = apps.update("ask", [index])  # nothing more is asked for
    assert two.version == "1.1.0" and two.versions == ("1.0.0", "1.1.0")
    publish("1.2.0", NET)
    with pytest.raises(NotAcceptedError, match=r"ask 1\.2\.0 also asks for: net a\.com") as caught:
        apps.update("ask", [index])
    assert caught.value.hint == "Look at it, then repeat the command with --yes."
    assert caught.value.request.sheet["permissions"] == [{"kind": "net", "value": "a.com"}]
    assert apps.get("ask").version == "1.1.0" and apps.versions("ask") == ("1.0.0", "1.1.0")
    assert apps.update("ask", [index], accept=asked).version == "1.2.0"
    assert [str(grant) for grant in asked.requests[-1].asked] == ["net a.com"]
    assert asked.requests[-1].previous == "1.1.0"

    assert apps.rollback("ask").version == "1.1.0"
    assert apps.rollback("ask").version == "1.0.0"
    with pytest.raises(NotFoundError, match=r"no version before 1\.0\.0") as nothing:
        apps.rollback("ask")
    assert "1.0.0, 1.1.0, 1.2.0" in nothing.value.hint
    assert apps.rollback("ask", "1.2.0").version == "1.2.0"
    with pytest.raises(NotFoundError, match=r"no version 3\.0 "):
        apps.rollback("ask", "3.0")
    assert [one.version for one in apps.list()] == ["1.2.0"]

    apps.data("ask").mkdir()
    (apps.data("ask") / "notes").write_text("mine")
    assert apps.uninstall("ask") == ("1.0.0", "1.1.0", "1.2.0")
    assert files_below(home / "apps") == {"ask/data/notes"} and apps.list() == []
    apps.install("ask", [index], accept=True)
    apps.uninstall("ask", data=True)
    assert not (home / "apps" / "ask").exists()


def test_an_install_that_nobody_accepts_leaves_nothing(index: Index, publish: Callable[..., None], home: Path) -> None:
    publish("1.0.0", NET)
    for accept in (False, Asked(False)):
        with pytest.raises(NotAcceptedError, match=r"ask 1\.0\.0 asks for: net a\.com\."):
            Apps().install("ask", [index], accept=accept)
    assert not (home / "apps" / "ask").exists() and not (home / "keys" / "publishers").exists()
    with pytest.raises(NotFoundError, match="No application ask is installed"):
        Apps().get("ask")


def test_a_file_is_installed_without_an_index(tmp_path: Path) -> None:
    path = package(tmp_path)
    found = Apps().install(path, accept=True)
    assert found.record is not None and found.record.source == str(path) and found.record.key_id is None
    assert files_below(found.folder) == {"app.py", "llmasos.toml", "files.sha256", "installed.json"}


def test_an_update_to_nothing_newer_changes_nothing(index: Index, publish: Callable[..., None]) -> None:
    publish("1.0.0")
    apps = Apps()
    apps.install("ask", [index], accept=True)
    assert apps.update("ask", [index]).version == "1.0.0"
    publish("2.0.0")
    index.yank("ask", "2.0.0", "bad")
    assert apps.update("ask", [index]).version == "1.0.0"
    with pytest.raises(NotFoundError, match="No application other"):
        apps.update("other", [index])


def test_a_yanked_version_says_so_when_it_is_named(index: Index, publish: Callable[..., None]) -> None:
    publish("1.0.0")
    index.yank("ask", "1.0.0", "loses data")
    asked = Asked()
    Apps().install("ask==1.0.0", [index], accept=asked)
    assert asked.requests[0].yanked == "loses data"


def test_going_back_to_fewer_rights_asks_for_the_rest_again(index: Index, publish: Callable[..., None]) -> None:
    publish("1.0.0")
    publish("2.0.0", NET)
    apps = Apps()
    apps.install("ask==1.0.0", [index], accept=True)
    apps.update("ask", [index], accept=True)
    apps.rollback("ask")
    with pytest.raises(NotAcceptedError, match="also asks for"):
        apps.update("ask", [index])
    assert apps.update("ask", [index], accept=True).version == "2.0.0"


def test_an_installed_version_never_changes(tmp_path: Path) -> None:
    apps = Apps()
    one = apps.install(package(tmp_path / "a"), accept=True)
    assert apps.install(tmp_path / "a" / "ask-1.0.0.llmapp", accept=True) == one
    with pytest.raises(StoreError, match="is installed with other bytes"):
        apps.install(package(tmp_path / "b", more=NET), accept=True)
    assert apps.get("ask") == one


def test_another_publishers_package_is_refused_until_it_is_trusted(tmp_path: Path, home: Path) -> None:
    ours, theirs, plain = package(tmp_path / "a"), package(tmp_path / "b", "2.0.0"), package(tmp_path / "c", "3.0.0")
    sign(ours, tmp_path / "us")
    them = sign(theirs, tmp_path / "them")
    apps = Apps()
    apps.install(ours, accept=True)
    for path in (theirs, plain):
        with pytest.raises(KeyChangedError):
            apps.install(path, accept=True)
    apps.uninstall("ask")
    with pytest.raises(KeyChangedError):  # the note outlives the application
        apps.install(theirs, accept=True)
    assert apps.install(theirs, accept=True, trust=them.key_id).version == "2.0.0"
    with pytest.raises(KeyChangedError):
        apps.install(ours, accept=True)


def test_an_unsigned_update_from_elsewhere_is_asked_about_anew(tmp_path: Path, index: Index) -> None:
    other, asked, apps = Index(tmp_path / "other"), Asked(), Apps()
    index.publish(package(tmp_path, more=NET))
    for place, version in ((index, "1.1.0"), (other, "1.2.0")):
        place.publish(package(tmp_path, version, NET))
    apps.install("ask==1.0.0", [index], accept=True)
    assert apps.update("ask", [index]).version == "1.1.0"
    with pytest.raises(NotAcceptedError, match=r"ask 1\.2\.0 asks for: net a\.com"):
        apps.update("ask", [other])
    assert apps.update("ask", [other], accept=asked).version == "1.2.0"
    assert asked.requests[0].source == str(other)


def test_a_signed_update_may_come_from_elsewhere(tmp_path: Path, index: Index, publish: Callable[..., None]) -> None:
    publish("2.0.0")
    path = package(tmp_path)
    sign(path)
    Apps().install(path, accept=True)
    assert Apps().update("ask", [index]).version == "2.0.0"


def test_an_index_that_renames_a_package_is_refused(index: Index, publish: Callable[..., None]) -> None:
    publish("1.0.0")
    path = Path(index.place) / "index.json"
    for name, version in (("other", "1.0.0"), ("ask", "9.0.0")):
        facts = json.loads(path.read_text())
        facts["apps"] = {name: {version: next(iter(next(iter(facts["apps"].values())).values()))}}
        path.write_text(json.dumps(facts))
        with pytest.raises(FormatError, match=rf"lists app {name} {version}, and the package is app ask 1\.0\.0"):
            Apps().install(name, [index], accept=True)


def test_another_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"needs Python >=4\.0"):
        Apps().install(package(tmp_path, more='python = ">=4.0"'), accept=True)


@pytest.mark.parametrize("step", ["fsync", "rename", "replace"])
def test_an_install_that_is_interrupted_leaves_nothing_that_counts(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    path = package(tmp_path)
    apps = Apps()
    monkeypatch.setattr(os, step, die)
    monkeypatch.setattr(unpack_module.shutil, "rmtree", lambda *_, **__: None)  # a killed process clears nothing away
    with pytest.raises(Killed):
        apps.install(path, accept=True)
    assert apps.list() == [] and not apps.has("ask")
    monkeypatch.undo()
    monkeypatch.setenv("LLMASOS_HOME", str(home))
    assert Apps(home).install(path, accept=True).version == "1.0.0"
    assert set(os.listdir(home / "apps" / "ask")) == {"1.0.0", "current"}


def test_a_version_without_its_record_was_never_whole(tmp_path: Path, home: Path) -> None:
    broken = home / "apps" / "ask" / "1.0.0"
    broken.mkdir(parents=True)
    (broken / "app.py").write_text("half")
    found = Apps().install(package(tmp_path), accept=True)
    assert "half" not in (found.folder / "app.py").read_text()


def test_an_application_can_be_moved_by_hand(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apps = Apps()
    apps.install(package(tmp_path), accept=True)
    apps.install(package(tmp_path, "2.0.0"), accept=True)
    (home / "apps" / "ask" / "current").write_text("1.0.0")  # without an end of line
    assert apps.get("ask").version == "1.0.0"
    other = tmp_path / "other"
    shutil.move(home / "apps", other / "apps")
    assert Apps(other).get("ask").version == "1.0.0" and apps.list() == []
    shutil.rmtree(other / "apps" / "ask" / "2.0.0")
    assert Apps(other).versions("ask") == ("1.0.0",)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "current").write_text("../../x"), "no version '../../x'"),
        (lambda folder: (folder / "current").write_bytes(b"\xff"), "no version '?'"),
        (lambda folder: shutil.rmtree(folder / "2.0.0"), "no version '2.0.0'"),
        (lambda folder: (folder / "2.0.0" / "installed.json").write_text("{}"), "installed.json can't be read"),
        (lambda folder: (folder / "2.0.0" / "llmasos.toml").write_text("[app]"), "app.name is missing"),
        (lambda folder: shutil.copy(folder / "1.0.0/llmasos.toml", folder / "2.0.0"), "its folder has ask 1.0.0"),
    ],
)
def test_a_damaged_one_says_so_and_can_be_rolled_back(tmp_path: Path, home: Path, harm, words: str) -> None:  # type: ignore[no-untyped-def]
    apps = Apps()
    apps.install(package(tmp_path), accept=True)
    apps.install(package(tmp_path, "2.0.0"), accept=True)
    apps.install(package(tmp_path, name="other"), accept=True)
    harm(home / "apps" / "ask")
    assert [bool(one.error) for one in apps.list()] == [True, False]
    with pytest.raises(FormatError, match="is damaged") as caught:
        apps.get("ask")
    assert words in caught.value.message and "rollback ask" in caught.value.hint
    assert apps.rollback("ask", "1.0.0").version == "1.0.0"


def test_installing_a_damaged_version_again_mends_it(tmp_path: Path) -> None:
    apps, path = Apps(), package(tmp_path)
    folder = apps.install(path, accept=True).folder
    (folder / "installed.json").write_text("{")
    (folder / "app.py").unlink()
    assert apps.install(path, accept=True).folder == folder
    assert (folder / "app.py").is_file() and load_application("ask").title == "Ask"


def test_what_lies_beside_the_applications_does_no_harm(home: Path) -> None:
    (home / "apps" / "Not A Name").mkdir(parents=True)
    (home / "apps" / "Not A Name" / "current").write_text("1.0.0")
    (home / "apps" / "file").write_text("")
    assert Apps().list() == []
    with pytest.raises(InvalidInputError, match="cannot be the name"):
        Apps().get("../models")


def test_one_process_at_a_time_changes_an_application(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "LOCK_TIMEOUT", 0.0)
    path = package(tmp_path)
    locks = home / "cache" / "locks"
    locks.mkdir(parents=True)
    with FileLock(locks / "app.ask.lock"), pytest.raises(BusyError):
        Apps().install(path, accept=True)
    Apps().install(path, accept=True)


def test_installs_at_the_same_time_leave_one_whole_version(tmp_path: Path, home: Path) -> None:
    path = package(tmp_path)
    threads = [threading.Thread(target=lambda: Apps().install(path, accept=True)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(os.listdir(home / "apps" / "ask")) == ["1.0.0", "current"]
    assert Apps().get("ask").version == "1.0.0"


def test_an_installed_applications_needs_are_checked_before_it_is_loaded(tmp_path: Path) -> None:
    source = write_app(tmp_path / "source")
    (source / "requirements.lock").write_text("no-such-package-of-ours==1.0\n")
    Apps().install(pack(source, tmp_path / "ask.llmapp").path, accept=True)
    with pytest.raises(UnsupportedError, match=r"ask 1\.0\.0 needs packages .*no-such-package-of-ours==1\.0"):
        load_application("ask")


def test_an_installed_applications_name_goes_before_a_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.py").write_text("from llmasos import Application\napp = Application(title='Module')\n")
    assert load_application("ask").title == "Module"
    Apps().install(package(tmp_path), accept=True)
    assert load_application("ask").title == "Ask"
    Apps().uninstall("ask")
    assert load_application("ask").title == "Module"


def test_the_entry_may_name_one_of_several_applications(tmp_path: Path) -> None:
    source = write_app(tmp_path / "source", more='entry = "app.py:second"')
    with (source / "app.py").open("a") as file:
        file.write("second = Application(title='Second')\n")
    Apps().install(pack(source, tmp_path / "ask.llmapp").path, accept=True)
    assert load_application("ask").title == "Second"
