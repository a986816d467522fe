"""docs/*/tutorial.md, done word by word: its files are written where it says, its command lines run in their order."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from doc_examples import ROOT, blocks, commands
from llmasos.cli import main
from llmasos.store import import_model
from llmasos.store.packages import Apps, grants
from tiny import write_tiny_model


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    folder = write_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    import_model(folder, name="smollm2-135m-instruct")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.timeout(300)
def test_the_tutorial_leads_to_an_installed_application(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", _quiet(subprocess.run))
    [application, _, tests] = [
        block.text for block in blocks((ROOT / "docs/en/tutorial.md").read_text(encoding="utf-8"), "python")
    ]
    text = (ROOT / "docs/zh/tutorial.md").read_text(encoding="utf-8")
    [manifest] = [block.text for block in blocks(text, "toml")]
    said = {}
    for block in blocks(text, "bash"):
        for words in commands(block):
            assert main(words) == 0, (words, capsys.readouterr().err)
            said[" ".join(words[:3])] = capsys.readouterr().out
            if words[1] == "new":  # what the page has its reader write
                (work / "moods/app.py").write_text(application, encoding="utf-8")
                (work / "moods/test_app.py").write_text(f"from app import app\n\n\n{tests}", encoding="utf-8")
                (work / "moods/llmasos.toml").write_text(manifest, encoding="utf-8")
    moods = Apps().get("moods")
    assert moods.version == "1.0.0" and moods.manifest is not None and moods.record is not None
    assert [str(grant) for grant in grants(moods.manifest)] == ["models default"] and moods.record.key_id
    assert said["app run moods"].strip() in ("positive", "neutral", "negative")
    assert Apps().has("translator")


def _quiet(run):  # type: ignore[no-untyped-def]
    """`app test` sends pytest's output to a real stderr, which capsys is not."""

    def call(command, **options):  # type: ignore[no-untyped-def]
        if "stdout" in options and not isinstance(options["stdout"], int):
            options["stdout"] = subprocess.DEVNULL
        return run(command, **options)

    return call
