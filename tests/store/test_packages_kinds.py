"""Models, adapters and datasets as packages: packed without being held, installed where they are looked for."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import pytest
from app_packages import package as app_package

from llmasos.errors import FormatError, NotFoundError, StoreError, UnsupportedError
from llmasos.store import Library
from llmasos.store.packages import (
    Apps,
    Index,
    Packages,
    Packed,
    Shelf,
    open_package,
    pack,
    parse_manifest,
    sign,
    verify,
)
from llmasos.store.packages import index as index_module
from tiny import write_tiny_adapter, write_tiny_model


def manifest(kind: str, name: str = "tiny", version: str = "1.0.0", more: str = "") -> str:
    facts = f'name = "{name}"\nversion = "{version}"\nsummary = "Small"\nlicense = "MIT"\n'
    return f'[package]\nkind = "{kind}"\n{facts}{more}\n'


def packed(folder: Path, kind: str, version: str = "1.0.0", **files: bytes) -> Packed:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    (folder / "llmasos.toml").write_text(manifest(kind, version=version))
    return pack(folder, folder.parent / f"{folder.name}-{version}.llmapp")


def test_a_model_is_installed_run_updated_rolled_back_and_uninstalled(tmp_path: Path, home: Path) -> None:
    index, here = Index(tmp_path / "index"), Packages()
    for seed, version in enumerate(("1.0.0", "2.0.0")):
        folder = tmp_path / "tiny"
        write_tiny_model(folder, seed=seed)
        path = packed(folder, "model", version).path
        sign(path)
        found = index.publish(path)
        assert found.release.kind == "model" and found.release.key_id
        if version == "1.0.0":
            app = here.install("tiny", [index], accept=True)
            assert app.manifest is not None and app.manifest.kind == "model" and app.folder.is_dir()
            first = (home / "models" / "tiny" / "model.safetensors").read_bytes()
    library = Library()
    card = library.get("tiny")
    assert (card.name, card.licence, card.format) == ("tiny", "MIT", "safetensors") and library.verify("tiny").ok
    assert here.of("tiny").update("tiny", [index]).version == "2.0.0"  # nothing more is asked for
    second = (home / "models" / "tiny" / "model.safetensors").read_bytes()
    assert first != second and Library().verify("tiny").ok
    assert here.of("tiny").rollback("tiny").version == "1.0.0"
    weights = home / "models" / "tiny" / "model.safetensors"
    assert weights.read_bytes() == first and weights.samefile(home / "packages/tiny/1.0.0/model.safetensors")
    assert [one.name for one in here.list()] == ["tiny"] and Apps().list() == []
    here.of("tiny").uninstall("tiny")
    assert not Library().has("tiny") and here.list() == [] and not (home / "packages" / "tiny").exists()


def test_a_packed_model_answers(tmp_path: Path, home: Path) -> None:
    from llmasos import LLM

    write_tiny_model(tmp_path / "tiny")
    Packages().install(packed(tmp_path / "tiny", "model").path, accept=True)
    with LLM.from_pretrained("tiny") as llm:
        assert isinstance(llm.generate("a", max_length=8), str)


def test_an_adapter_lies_where_the_engine_looks_and_a_dataset_by_its_name(tmp_path: Path, home: Path) -> None:
    from llmasos import LLM

    write_tiny_model(tmp_path / "base")
    write_tiny_adapter(tmp_path / "lora")
    (tmp_path / "lora" / "llmasos.toml").write_text(manifest("adapter", "lora", more='base = "base"'))
    Packages().install(pack(tmp_path / "lora", tmp_path / "lora.llmapp").path, accept=True)
    with LLM.from_pretrained(tmp_path / "base") as llm:
        llm.load_adapter("lora")
    data = packed(tmp_path / "rows", "dataset", train__jsonl=b'{"a": 1}\n')
    Packages().install(data.path, accept=True)
    assert (home / "datasets" / "tiny" / "train.jsonl").read_bytes() == b'{"a": 1}\n'
    Packages().of("lora").uninstall("lora")
    assert not (home / "adapters" / "lora").exists() and (home / "datasets" / "tiny").is_dir()


def test_what_is_there_from_elsewhere_stays(tmp_path: Path, home: Path) -> None:
    path = packed(tmp_path / "rows", "dataset", a__txt=b"x").path
    mine = home / "datasets" / "tiny"
    mine.mkdir(parents=True)
    (mine / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="came from elsewhere"):
        Packages().install(path, accept=True)
    assert (mine / "mine.txt").read_text() == "mine" and Packages().list() == []


def test_a_damaged_model_leaves_the_one_before(tmp_path: Path, home: Path) -> None:
    write_tiny_model(tmp_path / "good")
    Packages().install(packed(tmp_path / "good", "model").path, accept=True)
    bad = packed(
        tmp_path / "bad", "model", "2.0.0", model__safetensors=b"\x08\0\0\0\0\0\0\0nonsense", config__json=b"{}"
    )
    with pytest.raises(FormatError):
        Packages().install(bad.path, accept=True)
    assert Library().verify("tiny").ok and Packages().get("tiny").version == "1.0.0"
    assert [path.name for path in (home / "models").iterdir()] == ["tiny"]


def test_a_name_is_one_package_and_kinds_do_not_lie(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = packed(tmp_path / "rows", "dataset", a__txt=b"x").path
    Packages().install(app_package(tmp_path, name="tiny"), accept=True)
    with pytest.raises(StoreError, match="name of another package here, of the kind app"):
        Packages().install(data, accept=True)
    with pytest.raises(UnsupportedError, match="no application but a package of the kind dataset"):
        Apps().install(data, accept=True)
    Apps().uninstall("tiny")
    index = Index(tmp_path / "index")
    index.publish(data)
    listed = (tmp_path / "index" / "index.json").read_text()
    (tmp_path / "index" / "index.json").write_text(listed.replace('"kind": "dataset"', '"kind": "model"'))
    with pytest.raises(FormatError, match="and the package is dataset tiny"):
        Packages().install("tiny", [index], accept=True)
    with pytest.raises(NotFoundError):
        Shelf().get("tiny")
    index.publish(app_package(tmp_path, "2.0.0"))
    monkeypatch.setattr(index_module, "MAX_PACKED", 10)
    with pytest.raises(FormatError, match="an application of"):
        assert not index.apps


@pytest.mark.parametrize(
    ("kind", "files", "words"),
    [
        ("model", {"readme__md": b"x"}, "A model has weights"),
        ("model", {"pytorch_model__bin": b"x", "a__gguf": b"x"}, "pytorch_model.bin is a pickle"),
        ("adapter", {"adapter_config__json": b"{}"}, "has a file adapter_model.safetensors"),
        (
            "adapter",
            {"adapter_model__safetensors": b"", "adapter_config__json": b"{}", "x__pt": b""},
            "x.pt is a pickle",
        ),
        ("dataset", {"README__md": b"x"}, "A dataset has files"),
    ],
)
def test_each_kind_has_its_files(tmp_path: Path, kind: str, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        packed(tmp_path / "x", kind, **files)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (manifest("game"), "kind"),
        (manifest("model", more='entry = "app.py"'), "entry has no meaning"),
        (manifest("model", more='base = "x"'), "base has no meaning"),
        (manifest("app", more='base = "x"'), "base has no meaning"),
        (manifest("dataset", more="[permissions]\nexec = true"), "permissions"),
        (manifest("model", more="[models]\ndefault = 'x'"), "models"),
    ],
)
def test_a_manifest_says_only_what_its_kind_can_mean(text: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        parse_manifest(text)


def test_big_files_are_never_held_in_memory(tmp_path: Path, home: Path) -> None:
    size = 96 << 20
    (tmp_path / "x").mkdir()
    with (tmp_path / "x" / "big.parquet").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    path = packed(tmp_path / "x", "dataset").path
    sign(path)
    index = Index(tmp_path / "index")
    index.publish(path)
    Packages().install("tiny", [index], accept=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert (home / "datasets" / "tiny" / "big.parquet").stat().st_size == size


def test_zip64_is_read_for_what_is_no_application(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # as if these files had more than 2 GiB
    path = packed(tmp_path / "x", "dataset", a__npy=bytes(300), b__txt=b"b" * 500).path
    made = sign(path)
    monkeypatch.undo()
    data = path.read_bytes()
    assert b"PK\6\6" in data and b"PK\6\7" in data
    with open_package(path) as opened:
        opened.check()
        assert verify(opened) == made
    for where, byte in (
        (data.index(b"PK\6\6") + 24, 9),
        (data.index(b"PK\6\7") + 8, 1),
        (data.index(b"PK\6\6") + 4, 1),
    ):
        damaged = tmp_path / "damaged.llmapp"
        damaged.write_bytes(data[:where] + bytes([byte]) + data[where + 1 :])
        with pytest.raises(FormatError, match=r"zip64|directory|belong to no file|is no zip"), open_package(damaged):
            pass
