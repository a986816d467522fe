"""The library and the server from the command line, against a loopback hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Cli
from store_web import COMMIT, Web, tiny_repo, wheel_of

from llmasos.store.adapters import install_adapter
from llmasos.store.card import Card
from tiny import write_tiny_adapter

WEIGHTS = f"/acme/tiny/resolve/{COMMIT}/model.safetensors"


def test_pull_shows_the_plan_before_the_first_byte(cli: Cli, web: Web, home: Path) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    result = cli("pull", "acme/tiny")
    assert result.code == 0 and result.out == ""
    lines = result.err.splitlines()
    plan = next(i for i, line in enumerate(lines) if line.startswith("verdict"))
    assert plan < next(i for i, line in enumerate(lines) if "downloading" in line)
    assert "LlamaForCausalLM" in lines[0] and "acme--tiny is installed" in result.err
    assert (home / "models" / "acme--tiny" / "model.safetensors").read_bytes() == files["model.safetensors"].body


def test_pull_of_an_installed_model_says_so_and_asks_nobody(cli: Cli, web: Web) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    cli("pull", "acme/tiny")
    asked = len(web.requests)
    result = cli("pull", "acme/tiny", "--json")
    assert result.json["name"] == "acme--tiny" and "already" in result.err
    assert len(web.requests) == asked


def test_pull_takes_another_name(cli: Cli, web: Web, home: Path) -> None:
    web.add_repo("acme/tiny", tiny_repo())
    assert cli("pull", "acme/tiny", "--name", "mine", "--json").json["name"] == "mine"
    assert [card["name"] for card in cli("ls", "--json").json] == ["mine"]


def test_a_source_that_cannot_be_planned_is_pulled_all_the_same(cli: Cli, web: Web) -> None:
    """What a wheel holds cannot be seen before it is here if the index sends no ranges."""
    files = {f"tiny/{name}": data for name, data in tiny_repo().items() if "/" not in name}
    web.add_wheel("tiny", "1.0", wheel_of(files)).ranges = False
    result = cli("pull", "pypi:tiny==1.0")
    assert result.code == 0, result
    assert "ranges" in result.err and "verdict" not in result.err and "is installed" in result.err
    assert cli("plan", "pypi:tiny==1.0").code == 0


def test_ctrl_c_during_a_pull_keeps_the_bytes_and_says_how_to_go_on(
    cli: Cli, web: Web, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = web.add_repo("acme/tiny", tiny_repo())
    whole = files["model.safetensors"].body
    files["model.safetensors"].drop_after = [len(whole)] + [2000] * 20  # the plan reads the header first
    from llmasos.store import transfer

    waits: list[float] = []

    def interrupt(self: Any, timeout: float | None = None) -> bool:
        waits.append(timeout or 0)
        raise KeyboardInterrupt

    monkeypatch.setattr("llmasos.store.transfer.Meter.__init__", _meter_with(transfer.Meter.__init__, interrupt))
    result = cli("pull", "acme/tiny")
    assert result.code == 130 and waits
    assert result.err.endswith("`llmasos pull acme/tiny` goes on from there.\n") and "Traceback" not in result.err
    parts = list((home / "cache" / "partial").rglob("model.safetensors.part"))
    assert parts and 0 < parts[0].stat().st_size < len(whole)
    assert not (home / "models" / "acme--tiny").exists()

    monkeypatch.undo()
    monkeypatch.setenv("LLMASOS_HOME", str(home))
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "ENDPOINT", web.url)
    files["model.safetensors"].drop_after = []
    assert cli("pull", "acme/tiny").code == 0
    assert any("Range" in headers and headers["Range"] != "bytes=0-262143" for headers in web.asked(WEIGHTS))
    assert (home / "models" / "acme--tiny" / "model.safetensors").read_bytes() == whole


def _meter_with(init: Any, wait: Any) -> Any:
    def started(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.stop.wait = lambda timeout=None: wait(self.stop, timeout)

    return started


def test_plan_as_text_and_as_json(cli: Cli, tiny_model: Path) -> None:
    data = cli("plan", str(tiny_model), "--context", "128", "--concurrency", "2", "--json").json
    assert data["fits"] is True and data["context"] == 128 and data["concurrency"] == 2
    assert data["memory_bytes"] == data["weights_bytes"] + data["kv_cache_bytes"] + data["activation_bytes"]
    text = cli("plan", str(tiny_model))
    assert text.code == 0 and "Fits" in text.out and "1 x 256 tokens" in text.out


def test_import_by_link_by_copy_and_without_doing_it(cli: Cli, tiny_model: Path, home: Path) -> None:
    dry = cli("import", str(tiny_model), "--dry-run")
    assert dry.code == 0 and "model.safetensors" in dry.out and not (home / "models").exists()
    assert cli("import", str(tiny_model), "--dry-run", "--copy", "--json").json["copied_bytes"] > 0
    assert cli("import", str(tiny_model), "--name", "linked").code == 0
    assert cli("import", str(tiny_model), "--name", "copied", "--copy", "--json").json["disk_size"] > 0
    linked, copied = (home / "models" / name / "model.safetensors" for name in ("linked", "copied"))
    assert linked.samefile(tiny_model / "model.safetensors") and not copied.samefile(linked)


def test_ls_show_and_rm(cli: Cli, tiny_model: Path, home: Path) -> None:
    empty = cli("ls")
    assert (empty.code, empty.out) == (0, "") and "llmasos pull" in empty.err
    assert cli("ls", "--json").json == []
    cli("import", str(tiny_model), "--name", "tiny", "--copy")
    [card] = cli("ls", "--json").json
    assert {"name", "format", "family", "size", "disk_size", "source", "licence", "path", "files", "error"} <= set(card)
    assert card["name"] == "tiny" and card["path"] == str(home / "models" / "tiny")
    assert "tiny" in cli("ls").out and "safetensors" in cli("ls").out
    shown = cli("show", "tiny", "--json").json
    assert shown["config"]["context_length"] == 256 and shown["installed"] is True
    assert "256" in cli("show", "tiny").out and "SHA-256" in cli("show", "tiny").out
    assert cli("verify").code == 0

    kept = cli("rm", "tiny", stdin="\n", terminal=True)
    assert kept.code == 1 and (home / "models" / "tiny").exists() and "[y/N]" in kept.err
    assert cli("rm", "tiny", stdin="y\n", terminal=True).code == 0
    assert not (home / "models" / "tiny").exists()
    cli("import", str(tiny_model), "--name", "tiny", "--copy")
    assert cli("rm", "tiny", "--yes", "--json").json == {"removed": "tiny", "freed_bytes": card["disk_size"]}


def test_adapters_that_were_trained_here_are_listed_run_and_removed(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    cli("import", str(tiny_model), "--name", "tiny", "--copy")
    card = Card(name="ft-tiny-1", base="tiny", serves_as="ft:tiny::1")
    folder = install_adapter(write_tiny_adapter(tmp_path / "adapter"), card)
    listed = cli("ls").out
    assert "ft:tiny::1" in listed and "adapter" in listed and "of tiny" in listed
    assert [one["kind"] for one in cli("ls", "--json").json] == ["model", "adapter"]
    said = {name: cli("run", name, "hi", "--raw", "--max-tokens", "8", "--device", "cpu").out
            for name in ("tiny", "ft:tiny::1", "ft-tiny-1")}  # fmt: skip
    assert said["ft:tiny::1"] == said["ft-tiny-1"] != said["tiny"]
    assert "of tiny" in cli("show", "ft:tiny::1").out and cli("show", "ft-tiny-1", "--json").json["base"] == "tiny"
    assert cli("rm", "ft:tiny::1", stdin="\n", terminal=True).code == 1 and folder.exists()
    assert cli("rm", "ft:tiny::1", "--yes", "--json").json["removed"] == "ft-tiny-1" and not folder.exists()
    assert cli("rm", "ft:tiny::1", "--yes").code == 3 and (tiny_model / "config.json").exists()


def test_a_damaged_model_is_listed_with_its_error_and_can_be_removed(cli: Cli, home: Path) -> None:
    (home / "models" / "odd").mkdir(parents=True)
    (home / "models" / "odd" / "llmasos.json").write_text("{")
    assert "damaged" in cli("ls").out and cli("ls", "--json").json[0]["error"]
    assert "damaged" in cli("show", "odd").out
    assert cli("verify", "odd").code == 5
    assert cli("rm", "odd", "--yes").code == 0


def test_show_and_search_know_the_catalogue(cli: Cli) -> None:
    entry = cli("show", "gpt3", "--json").json
    assert entry["installed"] is False and "GPT-3" in entry["notice"]
    assert "llmasos pull gpt3" in cli("show", "gpt3").out
    found = cli("search", "smollm2", "chat", "--json").json
    assert {"name", "family", "use", "licence", "upstream", "installed", "notice"} <= set(found[0])
    assert all("smollm2" in (info["name"] + info["upstream"]).lower() for info in found)
    nothing = cli("search", "no", "such", "thing")
    assert (nothing.code, nothing.out) == (0, "") and "no such thing" in nothing.err


def test_columns_line_up_with_chinese_heads(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmasos.cli.render import cell_width, table

    monkeypatch.setenv("LLMASOS_LANG", "zh")
    lines = table(["名称", "x"], [["abc", "1"], ["模型", "2"]]).splitlines()
    assert [cell_width(line[: -len(line.split()[-1])]) for line in lines] == [6, 6, 6]
    assert "许可证" in cli("search", "gpt2").out


def test_serve_answers_and_stops_at_ctrl_c(tiny_model: Path, home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmasos", "serve", str(tiny_model), "--port", "0", "--dtype", "float32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLMASOS_HOME": str(home), "LLMASOS_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://" in line)
        url = next(word for word in line.split() if word.startswith("http://"))
        with urllib.request.urlopen(f"{url}/models") as response:
            names = [model["id"] for model in json.load(response)["data"]]
        assert names == [tiny_model.name]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_progress_is_lines_without_a_terminal_and_not_too_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmasos.cli.render import Reporter
    from llmasos.store import Progress

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Reporter() as report:
        for step in range(101):
            report(Progress("download", "model", step * 10, 1000))
            now[0] += 0.2
        report(Progress("check", "model", 1000, 1000))
        report(Progress("note", message="almost done"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7 and lines[0] == "downloading 0 B / 1.0 kB (0 %)"
    assert lines[-2:] == ["checking 1.0 kB / 1.0 kB (100 %)", "almost done"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from llmasos.cli.render import Reporter
    from llmasos.store import Progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Reporter() as report:
        report(Progress("note", message="[b]from a mirror[/b]"))
        report(Progress("download", "model", 250, 1000))
        report(Progress("download", "model", 1000, 1000))
    assert "[b]from a mirror[/b]" in screen.getvalue() and "downloading" in screen.getvalue()
