"""`llmasos app new … ls`: the whole story of a package on the command line, offline, from two indexes."""

import json
from pathlib import Path
from typing import Any

import pytest
from app_packages import package, write_app
from cli_runner import Cli, Result


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    return folder


@pytest.fixture
def app(cli: Cli) -> Any:
    """`llmasos app ARGS`, which must succeed."""

    def run(*args: str, **options: Any) -> Result:
        done = cli("app", *args, **options)
        assert done.code == 0, done.err
        return done

    return run


BOTH = ("--index", "near", "--index", "far")


def test_the_whole_story(app: Any, cli: Cli, work: Path, home: Path) -> None:
    write_app(work / "ask")
    assert app("pack", "ask").err.startswith("ask-1.0.0.llmapp: 2 files, ")
    key = app("sign", "ask-1.0.0.llmapp", "--json").json["key_id"]
    shown = app("verify", "ask-1.0.0.llmapp")
    assert key in shown.out and "asks for no permissions" in shown.out and "All 2 files" in shown.err
    app("publish", "ask-1.0.0.llmapp", "--index", "far")
    write_app(work / "poems", name="poems")
    app("pack", "poems", "--out", "p.llmapp")
    app("publish", "p.llmapp", "--index", "near")

    found = app("search", "answers", *BOTH).out.splitlines()
    assert [line.split()[0] for line in found] == ["name", "ask", "poems"]
    assert [one["index"] for one in app("search", "--json", *BOTH).json] == [str(work / "far"), str(work / "near")]

    assert "No package ask" in cli("app", "install", "ask", "--index", "near", "--yes").err
    refused = cli("app", "install", "ask", *BOTH)
    assert refused.code == 2 and "It asks for no permissions." in refused.err and "--yes" in refused.err
    app("install", "ask", *BOTH, "--yes")
    assert app("run", "ask", "tell").out == "1.0.0\n"
    assert "tell" in app("show", "ask").out

    write_app(work / "ask", "1.1.0", "[permissions]\nnet = ['a.com']\nexec = true")
    app("pack", "ask")
    app("sign", "ask-1.1.0.llmapp")
    app("publish", "ask-1.1.0.llmapp", "--index", "far")
    refused = cli("app", "update", "ask", *BOTH)
    assert refused.code == 2 and "New in this version, it asks to:\n  connect to a.com\n  start other" in refused.err
    assert app("run", "ask", "tell").out == "1.0.0\n"
    assert "Install it? [y/N] ask is now 1.1.0." in app("update", "ask", *BOTH, stdin="y\n", terminal=True).err
    assert app("run", "ask", "tell").out == "1.1.0\n"
    assert "is the newest" in app("update", "ask", *BOTH).err

    app("yank", "ask==1.1.0", "--reason", "loses data", "--index", "far")
    assert app("search", "ask", *BOTH, "--json").json[0]["version"] == "1.0.0"
    assert "is 1.0.0 again" in app("rollback", "ask").err
    assert app("run", "ask", "tell").out == "1.0.0\n"
    assert "This version was yanked: loses data" in app("install", "ask==1.1.0", *BOTH, "--yes").err

    [listed] = app("ls", "--json").json
    assert (listed["version"], listed["versions"], listed["key_id"]) == ("1.1.0", ["1.0.0", "1.1.0"], key)
    assert app("ls").out.splitlines()[1].split()[:4] == ["ask", "1.1.0", "1.0.0", str(work / "far")]
    (home / "apps" / "ask" / "data").mkdir()
    assert "data stays in" in app("uninstall", "ask", "--yes").err
    app("install", "ask", *BOTH, "--yes")
    gone = app("uninstall", "ask", "--data", "--yes", "--json").json
    assert gone == {"name": "ask", "versions": ["1.0.0"], "data": None} and not (home / "apps" / "ask").exists()
    assert "No application is installed" in app("ls").err


def test_a_new_application_works_and_can_be_packed(app: Any, tiny_model: Path, work: Path) -> None:
    from llmasos.store import import_model

    import_model(tiny_model, name="smollm2-135m-instruct")
    assert "app run ask/app.py" in app("new", "ask").err
    assert app("run", "ask/app.py", "ask", "Why?", "--words", "2", "--json").out.startswith('"')
    app("pack", "ask")
    sheet = app("install", "ask-0.1.0.llmapp", "--yes").err
    assert "default: smollm2-135m-instruct" in sheet and "ask the model default" in sheet
    assert app("run", "ask", "ask", "Why?", "--words", "2", "--json").out.startswith('"')


def test_a_routes_inputs_may_have_the_names_of_our_flags(app: Any, tmp_path: Path) -> None:
    app("install", str(package(tmp_path)), "--yes")
    assert app("run", "ask", "tell", "--index", "!").out == "1.0.0!\n"
    assert app("run", "ask", "tell", "--index=!", "--json").json == "1.0.0!"
    assert app("run", "--json", "ask", "tell", "-").json == "1.0.0"


def test_the_settings_name_the_indexes(app: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app("publish", str(package(tmp_path)), "--index", "far")
    monkeypatch.setenv("LLMASOS_APP_INDEX", str(work / "far"))
    app("install", "ask", "--yes")
    assert app("search", "nothing").err == "Nothing found.\n"


def test_another_publisher_is_trusted_by_the_id_of_the_key(
    app: Any, cli: Cli, tmp_path: Path, home: Path, work: Path
) -> None:
    one, two = package(tmp_path), package(tmp_path, "2.0.0")
    app("sign", str(one))
    (home / "keys" / "publisher.pem").unlink()  # the next key is another publisher's
    key = app("sign", str(two), "--json").json["key_id"]
    app("install", str(one), "--yes")
    refused = cli("app", "install", str(two), "--yes", "--json")
    assert refused.code == 2 and refused.json["error"]["code"] == "key_changed"
    assert f"--trust {key}" in refused.json["error"]["hint"]
    assert app("install", str(two), "--yes", "--trust", key, "--json").json["version"] == "2.0.0"


def test_a_no_on_the_terminal_changes_nothing(app: Any, cli: Cli, tmp_path: Path) -> None:
    path = str(package(tmp_path))
    assert cli("app", "install", path, stdin="n\n", terminal=True).code == 2
    app("install", path, "--yes")
    kept = cli("app", "uninstall", "ask", "--data", stdin="\n", terminal=True)
    assert kept.code == 1 and "delete its data?" in kept.err and "ask was kept" in kept.err
    assert "Uninstall ask? Its data stays." in app("uninstall", "ask", stdin="y\n", terminal=True).err


def test_a_changed_byte_is_refused(cli: Cli, tmp_path: Path) -> None:
    path = package(tmp_path)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    for action in ("verify", "sign", "install"):
        done = cli("app", action, str(path), "--json")
        assert done.code == 4 and done.json["error"]["code"] == "format"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["new"], 2, "NAME is missing"),
        (["sign"], 2, "FILE is missing"),
        (["uninstall", "nobody"], 3, "No application nobody is installed"),
        (["new", "Ask"], 2, "cannot be the name of an application"),
        (["pack"], 4, "has no llmasos.toml"),
        (["pack", "none"], 3, "There is no folder none"),
        (["sign", "none.llmapp"], 3, "There is no package none.llmapp"),
        (["install", "none.llmapp"], 3, "There is no package none.llmapp"),
        (["install", "ask"], 3, "No package ask in bundled"),
        (["publish", "ask.llmapp"], 2, "No index of applications is known"),
        (["install", "ask", "--index", "none"], 3, "has no index.json"),
        (["install", "ask", "--index", "https://apps.example.org/x"], 6, "offline mode is on"),
        (["install", "a", "b"], 2, "'b' is one argument too many"),
        (["update", "ask", "--index", "none"], 3, "No application ask is installed"),
        (["rollback", "ask"], 3, "No application ask is installed"),
        (["uninstall", "ask", "--yes"], 3, "No application ask is installed"),
        (["publish", "a", *BOTH], 2, "One index is needed here, not 2."),
        (["yank", "ask==1", "--index", "near"], 2, "with a reason"),
        (["ls", "--yes"], 2, "--yes means nothing to llmasos app ls"),
        (["show", "--data", "app.py"], 2, "--data means nothing to llmasos app show"),
        (["show"], 2, "FILE is missing"),
    ],
)
def test_wrong_lines_say_what_is_wrong(cli: Cli, work: Path, line: list[str], code: int, words: str) -> None:
    done = cli("app", *line)
    assert (done.code, done.out) == (code, "") and words in done.err
    assert "unexpected" not in done.err
    assert json.loads(cli("app", *line, "--json").out)["error"]["exit_code"] == code


def test_a_server_is_published_to_and_installed_from(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    from fake_llm import FakeLLM, live_server

    for name in ("LLMASOS_OFFLINE", "LLMASOS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "rows").mkdir()
    facts = 'name = "rows"\nversion = "1.0.0"\nsummary = "Rows"\nlicense = "CC0-1.0"\n'
    (tmp_path / "rows" / "llmasos.toml").write_text(f'[package]\nkind = "dataset"\n{facts}')
    (tmp_path / "rows" / "train.jsonl").write_text("{}\n")
    file = str(tmp_path / "rows.llmapp")
    assert cli("app", "pack", str(tmp_path / "rows"), "--out", file).code == 0
    with live_server(FakeLLM()) as url:
        index = url.removesuffix("/v1") + "/llmasos/v1/index"
        assert "--owner" in cli("app", "publish", file, "--index", index).err
        done = cli("app", "publish", file, "--index", index, "--owner", "ann")
        assert done.code == 0 and "secrets" in done.out and "ann/rows 1.0.0" in done.err
        assert [one["name"] for one in cli("app", "search", "--index", index, "--json").json] == ["ann/rows"]
        installed = cli("app", "install", "rows", "--index", index, "--yes")
        assert installed.code == 0 and "It is a dataset" in installed.err
        assert (home / "datasets" / "rows" / "train.jsonl").is_file()
        assert "rows" in cli("app", "ls").out
        assert cli("app", "yank", "ann/rows==1.0.0", "--index", index, "--reason", "old").code == 0
        assert cli("app", "install", "rows", "--index", index, "--yes").code == 3
        assert cli("app", "uninstall", "rows", "--yes").code == 0 and not (home / "datasets" / "rows").exists()
    assert cli("app", "publish", file, "--index", "https://example.com/x", "--owner", "ann").code == 2
