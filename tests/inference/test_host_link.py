"""The folders of sockets: a server that was killed leaves them, the next one takes them away."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from llmasos.errors import ServerError
from llmasos.inference.host import link

pytestmark = pytest.mark.skipif(os.name != "posix", reason="elsewhere sockets are no files")


def test_folders_of_dead_processes_are_swept_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = {name: tmp_path / f"llmasos-link-{name}" for name in ("dead", "young", "living", "without")}
    folders["other"] = tmp_path / "llmasos-other"
    for folder in folders.values():
        folder.mkdir()
        (folder / "orders").touch()
    os.close(link.own(folders["dead"]))
    os.close(link.own(folders["young"]))
    os.close(link.own(folders["other"]))
    held = link.own(folders["living"])
    for name, folder in folders.items():
        if name != "young":
            os.utime(folder, (1000, 1000))
    link.sweep.cache_clear()
    link.sweep()
    os.close(held)
    assert {name for name, folder in folders.items() if folder.exists()} == {"young", "living", "without", "other"}


def test_a_link_owns_its_folder_until_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = link.Link(lambda news: None, lambda error: None)
    [folder] = tmp_path.iterdir()
    with pytest.raises(BlockingIOError):
        link.own(folder)
    one.end(lambda: ServerError("over"))
    one.close()
    assert not any(tmp_path.iterdir())
