"""The library on disk, and taking in what is on this machine already."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from store_web import Web, tiny_gguf, tiny_repo

from llmasos.errors import (
    FormatError,
    InvalidInputError,
    NotFoundError,
    PickleRefusedError,
    StoreError,
    UnknownArchitectureError,
)
from llmasos.store import ImportPlan, Library, ensure, import_model, pull
from llmasos.store.card import CARD_NAME


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A Hugging Face folder somewhere on this machine."""
    folder = tmp_path / "elsewhere" / "wee"
    for name, data in tiny_repo().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_import_links_and_leaves_the_original_alone(home: Path, original: Path) -> None:
    before = snapshot(original)
    card = import_model(original)
    assert (card.name, card.architecture, card.format) == ("wee", "LlamaForCausalLM", "safetensors")
    weights = home / "models" / "wee" / "model.safetensors"
    assert weights.samefile(original / "model.safetensors")
    assert next(f for f in card.files if f.path == "model.safetensors").linked_from == str(
        original / "model.safetensors"
    )
    assert Library().verify("wee").ok
    assert Library().remove("wee") < len(before["model.safetensors"])  # linked bytes are not freed
    assert snapshot(original) == before and Library().list() == []


def test_a_link_across_file_systems_is_symbolic(home: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_disk(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", other_disk)
    import_model(original)
    weights = home / "models" / "wee" / "model.safetensors"
    assert weights.is_symlink() and weights.resolve() == original / "model.safetensors"
    Library().remove("wee")
    assert (original / "model.safetensors").exists()


def test_a_copy_is_independent(home: Path, original: Path) -> None:
    card = import_model(original, name="mine", mode="copy")
    shutil.rmtree(original)
    assert Library().verify("mine").ok and all(file.linked_from is None for file in card.files)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(home: Path, original: Path) -> None:
    plan = import_model(original, dry_run=True)
    assert isinstance(plan, ImportPlan)
    assert (plan.name, plan.architecture, plan.copied_bytes) == ("wee", "LlamaForCausalLM", 0)
    assert {file.path: file.how for file in plan.files}["model.safetensors"] == "hardlink"
    copied = import_model(original, mode="copy", dry_run=True)
    assert copied.copied_bytes == sum(file.size for file in copied.files) > 0
    assert not home.exists()


def test_a_snapshot_of_the_hub_cache_is_imported_under_its_repositorys_name(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--acme--tiny"
    folder = root / "snapshots" / ("c0ffee" * 6)
    folder.mkdir(parents=True)
    (root / "blobs").mkdir()
    for name, data in tiny_repo().items():
        if "/" not in name:
            blob = root / "blobs" / hashlib.sha256(data).hexdigest()
            blob.write_bytes(data)
            (folder / name).symlink_to(os.path.relpath(blob, folder))
    card = import_model(folder)
    assert (card.name, card.upstream.repo) == ("acme--tiny", "acme/tiny")
    weights = home / "models" / "acme--tiny" / "model.safetensors"
    assert not weights.is_symlink() and weights.samefile(folder / "model.safetensors")


def test_gguf_files_are_imported_one_by_one_or_as_a_split_whole(home: Path, tmp_path: Path) -> None:
    model, folder = tiny_gguf(tmp_path), tmp_path / "ggufs"
    folder.mkdir()
    for name in ("a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (folder / name).write_bytes(model)
    assert [f.path for f in import_model(folder / "a.gguf").files] == ["a.gguf"]
    card = import_model(folder / "b-00002-of-00002.gguf")
    assert (card.name, len(card.files)) == ("b", 2)
    assert Library().path("b").name == "b-00001-of-00002.gguf"
    (folder / "b-00001-of-00002.gguf").unlink()
    with pytest.raises(FormatError, match="1 of the 2 parts"):
        import_model(folder / "b-00002-of-00002.gguf", name="half")


def test_a_safetensors_file_brings_the_configuration_beside_it(home: Path, original: Path) -> None:
    card = import_model(original / "model.safetensors")
    assert card.name == "wee" and {f.path for f in card.files} >= {"config.json", "tokenizer.json"}
    (original / "config.json").unlink()
    with pytest.raises(FormatError, match=r"no config\.json"):
        import_model(original / "model.safetensors", name="other")


def test_what_cannot_be_imported_says_why(home: Path, original: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no file or folder"):
        import_model(tmp_path / "nothing")
    (original / "model.safetensors").unlink()
    with pytest.raises(PickleRefusedError):
        import_model(original)
    with pytest.raises(PickleRefusedError):
        import_model(original / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="no model"):
        import_model(tmp_path / "empty")
    (tmp_path / "odd.gguf").write_bytes(tiny_gguf(tmp_path, "odd"))
    with pytest.raises(UnknownArchitectureError):
        import_model(tmp_path / "odd.gguf")
    (tmp_path / "cut.gguf").write_bytes(tiny_gguf(tmp_path)[:200])
    with pytest.raises(FormatError):
        import_model(tmp_path / "cut.gguf")
    with pytest.raises(InvalidInputError, match="mode"):
        import_model(tmp_path / "odd.gguf", mode="move")  # type: ignore[arg-type]
    assert not (home / "models").exists()


def test_a_taken_name_is_refused(home: Path, original: Path) -> None:
    import_model(original)
    with pytest.raises(StoreError, match="--name"):
        import_model(original)
    assert import_model(original, name="second").name == "second"


def test_a_failed_import_leaves_nothing(home: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["llmasos.store.library"], "write_card", full)
    with pytest.raises(StoreError, match=r"disk is full: .* No space left on device\.") as caught:
        import_model(original, mode="copy")
    assert "`llmasos rm` removes); a repeated pull goes on." in caught.value.hint
    assert list((home / "models").iterdir()) == []


def test_pulling_a_path_links_it_and_ensuring_a_path_uses_it_where_it_is(home: Path, original: Path) -> None:
    assert ensure(original) == ensure(str(original)) == original
    assert not home.exists()
    assert pull(f"file:{original}").name == "wee"
    assert ensure("wee") == home / "models" / "wee"
    with pytest.raises(NotFoundError):
        ensure(original.parent / "nothing")


def test_verify_tells_missing_changed_and_extra_files(home: Path, original: Path) -> None:
    import_model(original, mode="copy")
    folder = home / "models" / "wee"
    (folder / "README.md").unlink()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "notes.txt").write_text("mine")
    found = Library().verify("wee")
    assert (found.missing, found.changed, found.extra) == (("README.md",), ("model.safetensors",), ("notes.txt",))
    assert not found.ok
    with pytest.raises(StoreError, match=r"lacks README\.md"):
        Library().path("wee")


def test_folders_moved_renamed_and_deleted_by_hand_break_nothing(home: Path, original: Path) -> None:
    import_model(original, name="a")
    import_model(original, name="b")
    import_model(original, name="c")
    models = home / "models"
    (models / "a").rename(models / "renamed")
    shutil.rmtree(models / "b")
    (models / "stray.txt").write_text("x")
    (models / ".staging-x").mkdir()
    assert [card.name for card in Library().list()] == ["c", "renamed"]
    assert Library().path("renamed") == models / "renamed"
    with pytest.raises(NotFoundError, match="llmasos pull"):
        Library().get("b")


def test_a_damaged_card_is_listed_with_its_error_and_can_be_removed(home: Path, original: Path) -> None:
    import_model(original, name="good")
    for name, text in {"a": "{", "b": '{"name": 5}', "c": ""}.items():
        (home / "models" / name).mkdir()
        (home / "models" / name / CARD_NAME).write_text(text)
    cards = {card.name: card for card in Library().list()}
    assert set(cards) == {"a", "b", "c", "good"} and cards["good"].error is None
    for name in "abc":
        assert "damaged" in (cards[name].error or "")
        with pytest.raises(FormatError, match=f"llmasos rm {name}"):
            Library().get(name)
        Library().remove(name)
    assert [card.name for card in Library().list()] == ["good"]


def test_a_folder_without_a_card_is_understood_as_far_as_possible(home: Path, original: Path) -> None:
    shutil.copytree(original, home / "models" / "by-hand")
    (home / "models" / "nothing").mkdir()
    by_hand, nothing = Library().list()
    assert (by_hand.architecture, by_hand.error) == ("LlamaForCausalLM", None)
    assert nothing.error and "no model" in nothing.error
    assert Library().path("by-hand") == ensure("by-hand") == home / "models" / "by-hand"
    assert pull("by-hand").name == "by-hand"


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/../../outside", "..", ".", "", "models/../.."])
def test_nothing_outside_the_store_is_ever_removed(home: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (home / "models").mkdir(parents=True)
    with pytest.raises((InvalidInputError, NotFoundError)):
        Library().remove(name)
    assert outside.exists() and (home / "models").exists()


def test_removing_a_folder_that_is_a_link_removes_the_link(home: Path, original: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "linked").symlink_to(original)
    assert [card.name for card in Library().list()] == ["linked"]
    Library().remove("linked")
    assert (original / "model.safetensors").exists() and Library().list() == []


def test_names_are_found_in_any_case_and_by_the_reference_that_was_pulled(web: Web, home: Path) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    pull("acme/tiny")
    for name in ("acme--tiny", "ACME--Tiny", "acme/tiny", "hf:acme/tiny"):
        assert Library().get(name).name == "acme--tiny"
    assert Library().disk_size("acme/tiny") >= Library().get("acme/tiny").size
    Library().remove("acme/tiny")
    assert not Library().has("acme/tiny")


def test_a_safetensors_file_is_loaded_through_its_folder(original: Path) -> None:
    for ref in (str(original / "model.safetensors"), f"file:{original}/model.safetensors"):
        assert ensure(ref) == original
    shutil.copy(original / "model.safetensors", original / "other.safetensors")
    with pytest.raises(InvalidInputError, match="is not the one"):
        ensure(str(original / "other.safetensors"))


def test_what_lies_deep_inside_a_folder_is_not_its_model(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "m.gguf").write_bytes(tiny_gguf(tmp_path))
    with pytest.raises(NotFoundError, match="no model"):
        import_model(folder)
    assert import_model(folder / "a").architecture == "LlamaForCausalLM"


def test_a_folder_without_a_card_has_nothing_to_be_verified_with(home: Path, original: Path) -> None:
    shutil.copytree(original, home / "models" / "byhand")
    with pytest.raises(NotFoundError, match="no hashes"):
        Library().verify("byhand")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", ""])
def test_a_card_that_points_outside_its_folder_is_damaged(home: Path, original: Path, path: str) -> None:
    import_model(original, mode="copy")
    card = home / "models" / "wee" / CARD_NAME
    facts = json.loads(card.read_text())
    facts["files"][0]["path"] = path
    card.write_text(json.dumps(facts))
    with pytest.raises(FormatError, match="points outside"):
        Library().get("wee")
    assert not Library().has("wee")
