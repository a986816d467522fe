"""A run writes over nothing that is not its own, and says so before it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmasos.errors import BusyError, InvalidInputError, LLMasOSError, StoreError
from llmasos.store import Library, import_model
from llmasos.train.config import TrainConfig
from llmasos.train.events import Listener, StepReport
from llmasos.train.export import export_run
from llmasos.train.run import resume, train
from tiny import write_tiny_model


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "base")
    rows = [{"text": f"Row {i}: the quick brown fox {i * 7 % 13} jumps over dog {i % 5}."} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def options(**changes: Any) -> TrainConfig:
    given = {"model": "base", "data": ["data.jsonl"], "device": "cpu", "dtype": "float32", "steps": 1, "install": False}
    return TrainConfig.of(**{**given, "max_length": 64, "batch_tokens": 64, "validation": 0.0, **changes})


def scratch(**changes: Any) -> TrainConfig:
    return options(**{"method": "pretrain", "model": None, "depth": 1, "vocab_size": 300, **changes})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "name",
    ["tokenizer/tokenizer.json", "model/config.json", "adapter/notes.txt", "checkpoints/000100/x", "metrics.csv"],
)
def test_what_lies_in_the_folder_already_is_refused_and_stays(name: str, world: Path) -> None:
    own = world / "own" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    before = snapshot(world / "own")
    with pytest.raises(InvalidInputError, match=f"{name.split('/')[0]} is there already, and 'own' has not made"):
        train(scratch(output="own"))
    assert snapshot(world / "own") == before


def test_a_folder_of_ones_own_may_be_the_runs_where_nothing_is_in_the_way(world: Path) -> None:
    (world / "tokenizer").mkdir()
    (world / "tokenizer" / "tokenizer.json").write_text("mine")  # this run needs none
    (world / ".notes.tmp").write_text("mine")
    (world / ".config.yaml.0a1b2c3d.tmp").write_text("a run's that was killed")
    result = train(options(output=".", name="here"))
    assert result.folder == world and result.exported and result.exported.adapter == world / "adapter"
    assert (world / "tokenizer" / "tokenizer.json").read_text() == "mine"
    assert [p.name for p in world.glob(".*.tmp")] == [".notes.tmp"]


def test_the_tokenizer_of_a_run_that_never_began_is_learnt_anew(world: Path) -> None:
    with pytest.raises(LLMasOSError, match="no samples"):
        train(scratch(name="new", validation=0.999))
    tokenizer = world / "home" / "runs" / "new" / "tokenizer"
    (tokenizer / "tokenizer.json").write_text("half of i")  # it was killed there
    result = train(scratch(name="new"))
    assert result.reason == "finished" and tokenizer.is_dir()
    assert [p.name for p in tokenizer.iterdir() if p.name.startswith(".")] == []  # no longer one that may be removed
    assert resume("new", steps=2).step == 2


def test_what_was_put_in_the_place_of_an_export_is_refused_before_training_and_when_exporting(world: Path) -> None:
    result = train(options(tuning="full", name="whole"))
    assert result.exported and result.exported.model
    assert export_run(result.folder).model == result.exported.model  # its own it may replace
    for file in result.exported.model.iterdir():
        file.unlink()
    (result.exported.model / "config.json").write_text("another model")
    with pytest.raises(InvalidInputError, match="has not made it"):
        export_run(result.folder)
    with pytest.raises(InvalidInputError, match="has not made it"):
        resume("whole", steps=2)
    assert (result.exported.model / "config.json").read_text() == "another model"
    assert export_run(result.folder, output=world / "elsewhere").model == world / "elsewhere" / "model"
    other = train(options(tuning="full", name="other"), export=False)
    with pytest.raises(InvalidInputError, match="'other' has not made it"):
        export_run(other.folder, output=world / "elsewhere")


def test_a_name_that_the_library_has_is_refused_before_training(world: Path) -> None:
    import_model(world / "base", name="taken")
    with pytest.raises(StoreError, match="The library has 'taken' already"):
        train(options(name="taken", install=True))
    assert not (world / "home" / "runs" / "taken").exists()
    first = train(options(name="mine", install=True))
    assert first.installed == "mine" and resume("mine", steps=2).installed == "mine"
    assert Library().has("taken")


def test_a_file_is_no_folder(world: Path) -> None:
    (world / "file").write_text("mine")
    with pytest.raises(InvalidInputError, match="file is a file"):
        train(options(output="file"))
    with pytest.raises(StoreError, match="inside could not be written: Not a directory"):
        train(options(output="file/inside"))
    assert (world / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_said(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="no-way could not be written: Permission denied") as caught:
        train(options(output="no-way"))
    assert "or give another folder with --output" in caught.value.hint


def test_a_run_that_goes_on_is_nobody_elses(world: Path) -> None:
    seen: list[str] = []

    class Again(Listener):
        def stepped(self, report: StepReport) -> None:
            with pytest.raises(BusyError) as caught:
                resume("one", steps=2)
            seen.append(caught.value.message)

    assert train(options(name="one"), listeners=[Again()]).reason == "finished"
    assert seen == ["The run 'one' goes on in another process."]


def test_a_run_goes_on_from_another_folder_with_its_own_files(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(options(name="one", data=["data.jsonl=2"], validation_data=["data.jsonl"], validation=0))
    other = world / "other"
    write_tiny_model(other / "base", num_hidden_layers=1)
    (other / "data.jsonl").write_text('{"text": "something else"}\n')
    monkeypatch.chdir(other)
    assert resume("one", steps=2).step == 2


def test_a_run_elsewhere_is_gone_on_with_by_its_folder_and_lost_checkpoints_are_said(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train(options(output="own"))
    with pytest.raises(InvalidInputError, match="There is a run 'own'") as caught:
        train(options(output="own"))
    assert f"llmasos train resume {world / 'own'};" in caught.value.hint
    assert resume(world / "own", steps=2).step == 2 and "begins anew" not in caplog.text
    shutil.rmtree(first.folder / "checkpoints")
    assert resume(world / "own", steps=3).step == 3
    assert "The run own has no checkpoint to go on from: it begins anew." in caplog.text
    assert [json.loads(x)["step"] for x in (first.folder / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
