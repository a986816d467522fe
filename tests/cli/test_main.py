"""The command as a whole: help in two languages, exit codes, what a start loads, completion."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from string import Formatter

import pytest
from cli_runner import Cli

from llmasos import __version__
from llmasos.cli import main, messages
from llmasos.cli.app import NOT_FLAGS, completion_script
from llmasos.cli.commands import COMMANDS
from llmasos.errors import ServerError

HEAVY = ("torch", "fastapi", "httpx", "huggingface_hub", "pydantic", "rich", "cyclopts", "numpy", "prompt_toolkit")


def spawn(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llmasos", *args], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("args", [["--help"], ["version"], ["--version"], ["version", "--json"], []])
def test_help_and_version_load_nothing_heavy(args: list[str]) -> None:
    code = (
        f"import sys\nfrom llmasos.cli import main\ncode = main({args!r})\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert "LLMasOS" in done.stdout or "llmasos" in done.stdout


def test_help_of_a_command_loads_no_torch() -> None:
    for command in ("run", "pull", "serve"):
        code = (
            f"import sys\nfrom llmasos.cli import main\nmain([{command!r}, '--help'])\nsys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_both_languages_have_the_same_messages_with_the_same_blanks() -> None:
    english, chinese = messages.table("en"), messages.table("zh")
    assert english.keys() == chinese.keys()
    for key in english:
        blanks = [{name for _, name, _, _ in Formatter().parse(table[key]) if name} for table in (english, chinese)]
        assert blanks[0] == blanks[1], key
        assert english[key] and chinese[key], key


@pytest.mark.parametrize("lang", messages.LANGUAGES)
def test_every_command_and_flag_has_help_in_both_languages(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, lang: str
) -> None:
    monkeypatch.setenv("LLMASOS_LANG", lang)
    root = cli("--help").out
    for name in COMMANDS:
        result = cli(name, "--help")
        assert result.code == 0 and messages.table(lang)[f"command.{name}"] in result.out
        assert messages.table(lang)[f"command.{name}"] in root
        assert all(len(line.split(None, 1)) > 1 for line in result.out.splitlines() if line.startswith("  ")), name


def test_every_message_is_used() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(messages.__file__).parent.parent.glob("*.py"))
    built = (
        *("command.", "details.", "option.", "group.", "phase.", "config.", "head.", "job.", "chat.help.", "verify."),
        *("state.", "key.active", "key.expired", "key.revoked", "train.plan."),
        *("sandbox.what.", "sandbox.by.", "sandbox.why."),
        "runs.names.",
        *("running.state.", "running.start", "running.restart", "running.stop"),
    )
    named = set(re.findall(r"""["']([\w.]+)["']""", source))
    unused = [key for key in messages.table("en") if not key.startswith(built) and key not in named]
    assert unused == []


def test_the_language_follows_the_locale(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMASOS_LANG")
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert "用法" in cli("--help").out
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert "Usage" in cli("run", "--help").out


def test_errors_are_said_in_chinese_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_LANG", "zh")
    result = cli("run", "--max-tokens", "abc")
    assert result.code == 2
    assert result.err.splitlines()[0].startswith("错误: --max-tokens 不能是 'abc'")


def test_every_sampling_field_is_a_flag_of_run_and_chat(cli: Cli) -> None:
    from dataclasses import fields

    from llmasos.inference.request import SamplingParams

    names = {f.name for f in fields(SamplingParams)}
    assert names >= NOT_FLAGS
    for command in ("run", "chat"):
        text = cli(command, "--help").out
        for name in names - NOT_FLAGS:
            assert f"--{name.replace('_', '-')} " in text or f"--{name.replace('_', '-')}\n" in text


def test_help_can_be_asked_for_in_several_ways(cli: Cli) -> None:
    assert cli().out == cli("--help").out == cli("-h").out == cli("help").out
    assert cli("help", "pull").out == cli("pull", "--help").out == cli("pull", "x", "-h").out


def test_version_as_text_and_as_json(cli: Cli) -> None:
    assert cli("version").out == cli("-V").out == f"llmasos {__version__}\n"
    assert cli("version", "--json").json["version"] == __version__
    done = spawn("version")
    assert (done.returncode, done.stdout) == (0, f"llmasos {__version__}\n")


def test_json_errors_go_to_stdout_as_an_object(cli: Cli) -> None:
    result = cli("show", "nothing-like-it", "--json")
    error = result.json["error"]
    assert (result.code, error["code"], error["exit_code"], result.err) == (3, "not_found", 3, "")
    assert "nothing-like-it" in error["message"] and error["hint"]
    assert cli("ls", "--jsn", "--json").json["error"]["param"] == "--jsn"


def test_an_unexpected_error_is_short_and_says_how_to_see_more(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> int:
        raise ZeroDivisionError("one over none")

    monkeypatch.setattr("llmasos.cli.models.ls", broken)
    result = cli("ls")
    assert result.code == 1
    assert "ZeroDivisionError" in result.err and "one over none" in result.err and "Traceback" not in result.err
    assert "LLMASOS_LOG_LEVEL=debug" in result.err
    assert cli("ls", "--json").json["error"]["code"] == "unexpected"
    monkeypatch.setenv("LLMASOS_LOG_LEVEL", "debug")
    assert "Traceback" in cli("ls").err


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EACCES, "Permission denied"), (errno.ENOSPC, "No space left on device")]
)
def test_an_error_of_the_operating_system_is_said_in_a_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refused(**_: object) -> int:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("llmasos.cli.models.ls", refused)
    result = cli("ls")
    assert result.code == 5
    assert result.err.startswith(f"error: /some/file: {words}.\nhint: ") and "Traceback" not in result.err
    assert cli("ls", "--json").json["error"]["code"] == ("disk_full" if number == errno.ENOSPC else "store")


def test_debug_shows_the_traceback_of_a_typed_error() -> None:
    environ = os.environ | {"LLMASOS_LOG_LEVEL": "debug"}
    done = spawn("show", "no-such-model", env=environ)
    assert done.returncode == 3
    assert "error: " in done.stderr and "Traceback" in done.stderr


def test_ctrl_c_is_130_and_said_in_a_word(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmasos.cli.models.ls", interrupted)
    result = cli("ls")
    assert (result.code, result.out, result.err) == (130, "", "stopped\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m llmasos search --json | head -c 1; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "["
    # the catalogue is longer than a pipe's buffer on no platform, so it may also have been written in full
    assert done.stderr in ("141\n", "0\n")


def test_a_closed_pipe_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def gone(**_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("llmasos.cli.models.ls", gone)
    assert main(["ls"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete "), ("zsh", "#compdef llmasos"), ("fish", "complete -c")]
)
def test_completion_scripts_know_every_command(cli: Cli, shell: str, sign: str) -> None:
    script = cli("completion", shell).out
    assert sign in script and script.strip() == completion_script(shell).strip()
    assert all(name in script for name in COMMANDS) and "--temperature" in script


def test_install_completion_writes_where_the_shell_looks(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    result = cli("--install-completion", "fish")
    assert result.code == 0
    [script] = list(tmp_path.rglob("*.fish"))
    assert str(script) in result.err and "complete -c llmasos" in script.read_text()


def test_doctor_says_what_is_here_and_asks_nobody_when_offline(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    facts = cli("doctor", "--json").json
    assert facts["home"] == str(home) and facts["offline"] is True
    assert {c["name"]: c["status"] for c in facts["checks"]}["doctor.writable"] == "ok"
    text = cli("doctor").out
    assert "offline" in text and str(home) in text and "CPU" in text


@pytest.mark.parametrize("lang", messages.LANGUAGES)
def test_doctor_says_what_the_sandbox_enforces(cli: Cli, monkeypatch: pytest.MonkeyPatch, lang: str) -> None:
    from llmasos.apps.sandbox import Policy, report

    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.setenv("LLMASOS_LANG", lang)
    rows = cli("doctor", "--json").json["sandbox"]
    assert rows == [{"what": row.what, "by": list(row.by), "why": row.why} for row in report.enforced()]
    words = messages.table(lang)
    text = cli("doctor").out
    assert all(words[f"sandbox.what.{row['what']}"] in text for row in rows)
    poor = [row for version in (0, 1) for row in report.enforcements({"landlock": version}, Policy(net=(80,)))]
    monkeypatch.setattr(
        "llmasos.apps.sandbox.enforced", lambda: [*poor, *report.enforcements({}, Policy())], raising=False
    )
    text = cli("doctor").out
    for why in {row.why for row in poor if row.why}:
        assert words[f"sandbox.why.{why}"] in text


def test_doctor_warns_if_the_sandbox_cannot_be_made(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ServerError("no process could be started")

    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.setattr("llmasos.apps.sandbox.enforced", fail, raising=False)
    result = cli("doctor", "--json")
    assert result.code == 0 and result.json["sandbox"] == []
    assert {c["name"]: c["status"] for c in result.json["checks"]}["doctor.sandbox"] == "warning"


def test_doctor_warns_of_hosts_that_do_not_answer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("LLMASOS_PYPI_INDEX", "http://127.0.0.1:9/simple")
    result = cli("doctor", "--json")
    states = {check["name"]: check["status"] for check in result.json["checks"]}
    assert result.code == 0
    assert states["doctor.hub"] == states["doctor.index"] == "warning"


def test_doctor_fails_if_the_home_cannot_be_written(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMASOS_OFFLINE", "1")
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path / "file" / "home"))
    result = cli("doctor", "--json")
    assert result.code == 1
    assert {c["name"]: c["status"] for c in result.json["checks"]}["doctor.writable"] == "error"


def test_json_output_is_never_mixed_with_words(cli: Cli) -> None:
    for args in (["ls"], ["search", "gpt"], ["verify"], ["version"]):
        json.loads(cli(*args, "--json").out)
