"""`llmasos app config`: values of an installed application, shown, set and taken back."""

import json
import stat
import sys
import time
from pathlib import Path

import pytest
from app_world import ASK, package_of, running
from cli_runner import Cli

from llmasos.apps.loading import load_application
from llmasos.serve.apps import supervisor
from llmasos.store.packages import Apps

CONFIG = """
[config.style]
type = "choice"
choices = ["short", "long"]
default = "short"
[config.limit]
type = "number"
minimum = 1
maximum = 9
label = "Answers"
[config.loud]
type = "bool"
[config.token]
type = "secret"
required = true
[config.place]
type = "folder"
[config.name]
type = "string"
"""


@pytest.fixture
def app(tmp_path: Path, home: Path) -> Apps:
    apps = Apps(home)
    apps.install(str(package_of(tmp_path, more=CONFIG)), accept=True)
    return apps


def kept(home: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((home / "apps" / "ask" / "config.json").read_text())
    return found


def test_values_are_set_shown_and_taken_back(cli: Cli, app: Apps, home: Path, tmp_path: Path) -> None:
    shown = cli("app", "config", "ask")
    assert shown.code == 0 and "short|long" in shown.out and "≥ 1 ≤ 9" in shown.out
    assert [line.split()[0] for line in shown.out.splitlines()[1:]] == [
        *("style", "limit", "loud", "token", "place", "name")
    ]
    assert next(line for line in shown.out.splitlines() if "needed" in line).startswith("token")
    words = ("style=long", "limit=7", "loud=yes", "token=s3cr=t", f"place={tmp_path}", "name=a=b c")
    done = cli("app", "config", "ask", *words)
    assert done.code == 0 and "s3cr" not in done.out + done.err
    assert kept(home) == {
        "style": "long",
        "limit": 7,
        "loud": True,
        "token": "s3cr=t",
        "place": str(tmp_path),
        "name": "a=b c",
    }
    assert stat.S_IMODE((home / "apps" / "ask" / "config.json").stat().st_mode) == 0o600
    found = cli("app", "config", "ask", "--json").json
    assert found["token"] == found["token"] | {"is_set": True, "value": None}
    assert found["limit"]["value"] == 7
    assert load_application("ask").config == {
        "style": "long",
        "limit": 7,
        "loud": True,
        "token": "s3cr=t",
        "place": tmp_path,
        "name": "a=b c",
    }
    assert "as it was" in cli("app", "config", "ask", "style=", "limit=2.5").err
    assert "style" not in kept(home) and kept(home)["limit"] == 2.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("style=loud",), "'loud' is none of short, long"),
        (("limit=ten",), "'ten' is no number"),
        (("limit=10",), "10 is above maximum = 9"),
        (("limit=nan",), "no number"),
        (("limit=inf",), "no number"),
        (("loud=perhaps",), "'perhaps' is no bool"),
        (("place=/no/such/folder",), "there is no folder '/no/such/folder'"),
        (("colour=red",), "no setting 'colour'"),
        (("style=long", "style=short"), "style was given twice"),
        (("style",), "no secret that could be asked for"),
        (("token=@no.txt",), "no.txt can't be read"),
        (("style=long", "limit=99"), "above maximum"),
        (("style=long", "--yes"), "--yes"),
        (("style=long", "--api-key", "k"), "--api-key"),
    ],
)
def test_a_wrong_value_changes_nothing(cli: Cli, app: Apps, home: Path, words: tuple[str, ...], said: str) -> None:
    done = cli("app", "config", "ask", *words)
    assert done.code != 0 and said in done.err, done.err
    assert not (home / "apps" / "ask" / "config.json").exists()
    assert cli("app", "config").code == 2 and cli("app", "config", "none").code == 3


def test_secrets_come_from_files_and_standard_input_and_are_not_shown(
    cli: Cli, app: Apps, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("from a file\n")
    for words, stdin, value in (
        ((f"token=@{tmp_path / 'token'}",), "", "from a file"),
        (("token=-",), "piped\n", "piped"),
        (("token",), "a line\nanother\n", "a line"),
    ):
        done = cli("app", "config", "ask", *words, stdin=stdin)
        assert done.code == 0 and value not in done.out + done.err
        assert kept(home)["token"] == value
    assert "set" in next(line for line in cli("app", "config", "ask").out.splitlines() if line.startswith("token"))


@pytest.mark.skipif(sys.platform != "linux", reason="what holds applications is Linux's")
def test_a_server_takes_them_too_and_notices_what_is_set_beside_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.05)
    with running(tmp_path) as world:
        world.install(package_of(tmp_path, ASK, more=CONFIG.replace("required = true", "required = false")))
        url = ("--url", str(world.client.base_url))
        done = cli("app", "config", "ask", "limit=3", "token=s3cret", "name=n", *url)
        assert done.code == 0 and "s3cret" not in done.out + done.err, done.err
        assert "above maximum" in cli("app", "config", "ask", "limit=99", *url).err
        assert cli("app", "config", "ask", "--json", *url).json["limit"]["value"] == 3
        assert world.client.get("/apps/ask/look").json()["config"]["limit"] == 3
        monkeypatch.setenv("LLMASOS_HOME", str(world.home))
        assert cli("app", "config", "ask", "limit=4").code == 0
        for _ in range(200):
            if world.client.get("/apps/ask/look").json()["config"]["limit"] == 4:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the server did not notice")
