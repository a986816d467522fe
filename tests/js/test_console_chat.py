"""Chats in the console by hand, in a browser: branches, history, files, knowledge, tools, code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeLLM
from served import served

from llmasos.serve.access.access import Access
from llmasos.serve.access.policy import Policy
from llmasos.serve.server import create_app
from llmasos.store.database import Database

JS = Path(__file__).parents[2] / "js"
NODE = shutil.which("node")
CALLS = {"sums_add": {"a": 2, "b": 40}, "weather": {"city": "Bern"}}
MCP = Path(__file__).parents[1] / "apps" / "agent_mcp_server.py"


class Caller(FakeLLM):
    """Calls the tool that it is told to call."""

    def _answer(self, prompt, params, index):
        last = self.tokenizer.decode(prompt).rsplit("\n", 1)[-1]
        name = last.removeprefix("user: Call ")
        if name in CALLS:
            self.answers = [f"<tool_call>\n{json.dumps({'name': name, 'arguments': CALLS[name]})}\n</tool_call>"]
        return super()._answer(prompt, params, index)


class Letters(FakeLLM):
    """Its vectors count letters."""

    is_encoder = True

    async def aembed(self, texts, **options):
        await super().aembed(texts, **options)
        return [[float(text.lower().count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


@pytest.fixture
def walk(tmp_path: Path, home: Path) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Goes through a part of the walk and returns what it saw; skips where there is no browser."""
    if NODE is None:
        pytest.skip("node is not installed")
    out = Path(os.environ.get("LLMASOS_SCREENSHOTS") or tmp_path / "out")
    out.mkdir(exist_ok=True)

    def go(part: str) -> dict[str, Any]:
        command = [str(NODE), "tests/chat.browser.js", url, str(out), part]
        done = subprocess.run(command, cwd=JS, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        if "missing" in told:
            pytest.skip(told["missing"])
        assert told["serious"] == {}, "what axe-core finds"
        assert told["errors"] + told["elsewhere"] == [], json.dumps([told["errors"], told["elsewhere"]])
        assert told["wide"] == [], "nothing is wider than a small phone"
        return told

    home.mkdir()
    server = {"command": sys.executable, "args": [str(MCP), "sums"], "approval": "always"}
    (home / "mcp.json").write_text(json.dumps({"mcpServers": {"sums": server}}))
    models = {
        "fake": Caller("fake", context_length=100_000),
        "other": Caller("other", context_length=100_000),
        "slow": FakeLLM("slow", delay=0.05, context_length=10_000),
        "letters": Letters("letters", template=False),
    }
    with (
        Database.open(f"sqlite:///{tmp_path / 'access.db'}") as database,
        served(create_app(models, access=Access(database, Policy()))) as url,
    ):
        yield go


@pytest.mark.timeout(300)
def test_messages_are_edited_by_keyboard_and_what_is_named_or_deleted_meanwhile_stays_so(
    walk: Callable[[str], dict[str, Any]],
) -> None:
    told = walk("branches")
    assert (told["edited"], told["before"]) == ("Three!", "Two!")
    assert told["nodes"] == 4, "one branch is shown"
    assert told["titles"] == ["One", "Renamed"]
    assert told["afterDeletion"] == [1, 0]


@pytest.mark.timeout(300)
def test_chats_are_searched_exported_and_imported(walk: Callable[[str], dict[str, Any]]) -> None:
    told = walk("history")
    assert told["found"] == ["Apples and pears"]
    assert (told["exported"], told["emptied"], told["imported"], told["kept"]) == (2, 0, 2, 2)


@pytest.mark.timeout(300)
def test_files_go_into_messages_or_knowledge_bases_and_images_to_no_blind_model(
    walk: Callable[[str], dict[str, Any]],
) -> None:
    told = walk("attachments")
    assert told["refused"].startswith("dot.png is not attached: fake can't see images.")
    assert [chip.strip() for chip in told["chips"]] == ["tea.md"]
    assert told["unchosen"] == "" and told["alone"], "a file of the base is no message"
    assert "70 degrees" in told["passage"]


@pytest.mark.timeout(300)
def test_two_tabs_lose_nothing_of_one_chat(walk: Callable[[str], dict[str, Any]]) -> None:
    told = walk("tabs")
    assert told["here"] == ["One", "Two", "Said here"] and told["there"] == ["One", "Two", "Said there", "And more"]
    said = [*told["here"], "Said there", "And more"]
    assert told["kept"] == [["Renamed", sorted(said + [f"{text}!" for text in said])]]
    assert told["coming"] == 1 and ["stopped" in one for one in told["left"]] == [True]


@pytest.mark.timeout(300)
def test_two_models_beside_each_other_have_the_tools_and_wait_for_their_own_approvals(
    walk: Callable[[str], dict[str, Any]],
) -> None:
    told = walk("both")
    assert told["waits"] is True
    assert "did not allow" in told["sides"][0] and "42" in told["sides"][1]


@pytest.mark.timeout(300)
def test_tools_run_when_they_are_allowed_and_the_code_is_the_same_request(
    walk: Callable[[str], dict[str, Any]],
) -> None:
    told = walk("tools")
    assert told["wants"] == 'sums_add({"a": 2, "b": 40})'
    assert "did not allow" in told["denied"] and "42" in told["allowed"] and "rain" in told["own"]
    assert "/llmasos/v1/agents/runs" in told["curl"] and '"tools":["mcp:sums"' in told["curl"]
    assert '"answer_tokens":300' in told["curl"] and told["languages"] == ["curl", "Python", "JavaScript"]
    assert told["shell"] == "llmasos run fake 'It'\\''s one question' --temperature=0.5"
