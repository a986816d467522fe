"""`llmasos agent` and `llmasos memory`, with a model whose answers are written down."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmasos.apps.agent import ScriptedModel

TOOLS = """
from llmasos.client import tool

@tool(destructive=True)
def send(to: str) -> str:
    "Send a letter."
    return f"sent to {to}"
"""


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the model says, whichever is named."""

    def script(*answers: Any) -> ScriptedModel:
        model = ScriptedModel(answers)
        monkeypatch.setattr("llmasos.cli.fetch.load", lambda *_, **__: contextlib.nullcontext(model))
        return model

    return script


def sending(to: str) -> dict[str, Any]:
    return {"calls": [{"name": "send", "arguments": {"to": to}}]}


def test_a_question_is_answered_shown_and_replayed(cli: Any, says: Any, tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(TOOLS)
    says(sending("Ada"), "It is sent.")
    done = cli("agent", "run", "Write", "to", "Ada.", "--tool", str(tmp_path / "tools.py"), "--yes")
    assert (done.code, done.out.strip()) == (0, "It is sent.")
    assert "→ send" in done.err and "sent to Ada" in done.err
    [run] = cli("agent", "ls", "--json").json
    assert run["input"] == "Write to Ada." and run["state"] == "done"
    shown = cli("agent", "show", run["id"]).out
    assert "├─ 1 answer" in shown and "→ sent to Ada" in shown and shown.strip().endswith("└─ done")
    assert cli("agent", "show", run["id"], "--json").json["steps"][0]["calls"][0]["approval"] == "approved"
    assert "Replayed exactly" in cli("agent", "replay", run["id"]).err
    assert run["id"] in cli("agent").out
    assert cli("agent", "rm", run["id"]).code == 0
    assert cli("agent", "show", run["id"]).code == 3


def test_without_a_terminal_a_run_waits_and_is_gone_on_with(cli: Any, says: Any, tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(TOOLS)
    says(sending("Ada"))
    waits = cli("agent", "run", "Write.", "--tool", str(tmp_path / "tools.py"))
    assert waits.code == 1 and "waits to be approved: send" in waits.err
    id = cli("agent", "ls", "--json").json[0]["id"]
    assert f"llmasos agent continue {id} --yes" in waits.err
    assert cli("agent", "continue", id).code == 2
    says("Not sent.")
    assert cli("agent", "continue", id, "--deny").out.strip() == "Not sent."
    assert cli("agent", "continue", id, "--yes").code == 2


def test_limits_forms_and_conversations(cli: Any, says: Any, tmp_path: Path) -> None:
    says(sending("Ada"), "Never.")
    stopped = cli("agent", "run", "Go", "--steps", "1")
    assert stopped.code == 1 and "Stopped after 1 answer, the limit of steps" in stopped.err
    (tmp_path / "form.json").write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}}))
    says('{"n": 7}')
    assert cli("agent", "run", "Go", "--output", str(tmp_path / "form.json"), "--json").json["output"] == {"n": 7}
    says("Boil the water.")
    assert cli("agent", "run", "Black tea?", "--conversation", "new").code == 0
    [talk] = cli("memory", "ls", "--json").json
    model = says("70 degrees.")
    assert cli("agent", "run", "Green tea?", "--conversation", talk["id"]).code == 0
    assert [one["content"] for one in model.asked[0].messages] == ["Black tea?", "Boil the water.", "Green tea?"]
    assert [one["id"] for one in cli("memory", "search", "boil", "--json").json] == [talk["id"]]
    assert "user: Green tea?" in cli("memory", "show", talk["id"]).out
    assert cli("memory", "rename", talk["id"], "About", "tea").code == 0
    assert cli("memory", "export", "--to", str(tmp_path / "all.jsonl")).code == 0
    assert json.loads((tmp_path / "all.jsonl").read_text())["title"] == "About tea"
    assert cli("memory", "export", "--to", str(tmp_path / "all.jsonl")).code == 5
    assert cli("memory", "rm", talk["id"]).code == 2
    assert cli("memory", "rm", talk["id"], "--yes").code == 0
    assert cli("memory", "show", talk["id"]).code == 3


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["agent", "run"], 2),
        (["agent", "show"], 2),
        (["agent", "ls", "more"], 2),
        (["agent", "ls", "--yes"], 2),
        (["agent", "run", "Hi", "--steps", "0"], 2),
        (["agent", "run", "Hi", "--tool", "shell"], 2),
        (["agent", "run", "Hi", "--tool", "mcp:none"], 3),
        (["agent", "run", "Hi", "--tool", "nowhere.py"], 3),
        (["agent", "run", "Hi", "--output", "nowhere.json"], 2),
        (["agent", "run", "Hi", "--conversation", "conv_none"], 3),
        (["agent", "replay", "run_none"], 3),
        (["memory", "search"], 2),
        (["memory", "show", "a", "b"], 2),
        (["memory", "ls", "--yes"], 2),
    ],
)
def test_what_is_wrong_is_said(cli: Any, says: Any, words: list[str], code: int) -> None:
    says("Hello.")
    result = cli(*words)
    assert result.code == code and result.err.strip() and "Traceback" not in result.err


def test_the_tools_are_listed(cli: Any) -> None:
    found = [one["tool"] for one in cli("agent", "tools", "--json").json]
    assert found[0] == "python" and "task:summarise" in found
