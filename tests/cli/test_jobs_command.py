"""`llmasos jobs` on a server that does something."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cli_runner import Cli
from fake_llm import FakeLLM, live_server

from llmasos.cli.messages import en, zh
from llmasos.client import Client
from llmasos.serve.jobs.room import Kind


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMASOS_HOME", str(tmp_path_factory.mktemp("home")))
        with live_server({"fast": FakeLLM("fast"), "slow": FakeLLM("slow", delay=0.05)}) as url:
            yield url


@pytest.fixture(autouse=True)
def url(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("LLMASOS_API_KEY", raising=False)
    monkeypatch.setenv("LLMASOS_URL", server.removesuffix("/v1"))
    return server


def test_jobs_are_listed_followed_shown_and_ended(cli: Cli, url: str) -> None:
    assert cli("jobs").err.strip() == "There are no jobs."
    with Client(url) as client:
        fast = client.tasks.batch("chat", model="fast", lines=["a", "b"])
        followed = cli("jobs", "follow", fast.id)
        assert followed.code == 0 and "done" in followed.out and "output_file_id" in followed.out
        slow = client.tasks.batch("chat", model="slow", lines=["a"] * 50)
        table = cli("jobs", "--kind", "task_batch")
        assert [line.split()[:2] for line in table.out.splitlines()[1:]] == [
            [slow.id, "task_batch"],
            [fast.id, "task_batch"],
        ]
        assert cli("jobs", "ls", "--kind", "pull").err.strip() == "There are no jobs."
        assert "paused" in cli("jobs", "pause", slow.id).out
        assert cli("jobs", "show", slow.id, "--json").json["can_pause"] is True
        assert cli("jobs", "resume", slow.id, "--json").json["state"] in ("queued", "running")
        assert "cancelled" in cli("jobs", "cancel", slow.id).out
        ended = cli("jobs", "follow", slow.id, "--json")
        assert ended.code == 1 and json.loads(ended.out.splitlines()[-1])["state"] == "cancelled"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["show"], 2, "needs the id"),
        (["ls", "x"], 2, "takes no id"),
        (["show", "none"], 3, "no job 'none'"),
        (["show", "none", "--kind", "pull"], 2, "--kind"),
        (["dance"], 2, "dance"),
    ],
)
def test_wrong_lines_say_what_is_wrong(cli: Cli, words: list[str], code: int, said: str) -> None:
    result = cli("jobs", *words)
    assert result.code == code and said in result.err, result.err


def test_the_help_of_kind_names_all_kinds() -> None:
    def named(kind: type[Kind]) -> set[str]:
        own = {kind.name} if "name" in vars(kind) and kind.__module__.startswith("llmasos.") else set()
        return own.union(*(named(each) for each in kind.__subclasses__()))

    kinds = named(Kind)
    assert "fine_tuning" in kinds
    for messages in (en.MESSAGES, zh.MESSAGES):
        assert all(kind in messages["option.jobs.kind"] for kind in kinds)
