"""Listing and search see the catalogue and the library as one."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmasos.model_zoo import get_model, list_models, search_models
from llmasos.store import catalog, import_model


def test_every_catalogue_entry_is_listed_once_and_not_installed_at_first() -> None:
    names = [info.name for info in list_models()]
    assert sorted(names) == sorted(entry.name for entry in catalog().entries)
    assert not any(info.installed for info in list_models())


def test_installed_models_come_first_whether_catalogued_or_not(tiny_model: Path) -> None:
    import_model(tiny_model, name="my-own")
    import_model(tiny_model, name="gpt2")
    first = list_models()[:2]
    assert {(info.name, info.installed) for info in first} == {("my-own", True), ("gpt2", True)}
    mine = next(info for info in first if info.name == "my-own")
    assert mine.family == "llama" and mine.upstream.startswith("file:")


def test_a_stand_in_is_installed_with_the_model_that_it_stands_for(tiny_model: Path) -> None:
    import_model(tiny_model, name="gpt-neo-1.3b")
    [stand_in] = [info for info in search_models("gpt3") if info.name == "gpt3"]
    assert stand_in.installed and "GPT-3" in stand_in.notice


def test_search_wants_every_word_in_any_case(tiny_model: Path) -> None:
    import_model(tiny_model, name="Tiny-Thing")
    assert [info.name for info in search_models("tiny LLAMA thing")] == ["Tiny-Thing"]
    found = search_models("SMOLLM2 chat")
    assert found and all("smollm2" in f"{info.name} {info.upstream}".lower() and info.use == "chat" for info in found)
    assert search_models("no such thing anywhere") == []


def test_a_damaged_model_is_not_offered(tiny_model: Path, home: Path) -> None:
    shutil.copytree(tiny_model, home / "models" / "broken")
    (home / "models" / "broken" / "llmasos.json").write_text("{")
    assert "broken" not in {info.name for info in list_models()}


def test_get_model_takes_what_listing_names(tiny_model: Path) -> None:
    import_model(tiny_model, name="mine")
    with get_model("mine", dtype="float32") as model:
        assert model.name == "mine" and isinstance(model.generate("Hello", max_tokens=4, temperature=0), str)
