"""MCP servers as tools of an agent: allowed ones, approval, and servers that die, hang, lie or change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from agent_world import MCP_SERVER
from served import served
from six_routes import app

from llmasos.apps.agent import Agent, McpServer, ScriptedModel, mcp_config
from llmasos.errors import FormatError, InvalidInputError, NotFoundError, ToolError

pytest.importorskip("mcp")


def server(behaviour: str, **options: Any) -> McpServer:
    options = {"approval": "never", "timeout": 5.0, **options}
    return McpServer("odd", command=[sys.executable, str(MCP_SERVER), behaviour], **options)


def calling(*calls: tuple[str, dict[str, Any]]) -> ScriptedModel:
    return ScriptedModel([*({"calls": [{"name": name, "arguments": given}]} for name, given in calls), "Done."])


async def results(behaviour: str, *calls: tuple[str, dict[str, Any]], **options: Any) -> tuple[list[str], list[str]]:
    """Of the calls, and the notices of the run."""
    run = await Agent(calling(*calls), tools=[server(behaviour, **options)], keep=False).arun("Go")
    assert run.state == "done"
    return [str(call.result) for step in run.steps for call in step.calls], run.notices


async def test_only_allowed_tools_are_there_and_their_hints_excuse_nothing() -> None:
    async with server("sums", allow=["a*"], approval="always").connect() as connection:
        [add] = connection.tools
        assert (add.name, add.read_only, add.needs_approval({}), add.source) == ("odd_add", True, True, "mcp:odd")
    async with server("sums", approval=["sub"]).connect() as connection:
        assert [(one.name, one.needs_approval({})) for one in connection.tools] == [
            ("odd_add", True),
            ("odd_sub", False),
        ]
    run = await Agent(
        calling(("odd_add", {"a": 1, "b": 2})), tools=[server("sums", approval="always")], keep=False
    ).arun("Go")
    assert run.state == "requires_action" and run.tools[0].source == "mcp:odd"


async def test_a_server_that_lies_about_its_schemas_is_seen_through() -> None:
    told, notices = await results(
        "liar", ("odd_add", {"a": 2, "b": 3}), ("odd_picture", {}), ("odd_fails", {}), ("odd_ad_d", {"x": 1})
    )
    assert told[0].startswith("Error: odd answered wrongly: not what it promised: sum: 'five'")
    assert told[1] == "[image/png, 3 bytes: not shown]"
    assert told[2] == "Error: the disk is full"
    assert told[3] == "5"
    assert notices[0].startswith("The tool 'broken' of odd is left out: its schema is wrong: 7 is not valid")
    assert "longer than 20000 characters" in notices[1]
    assert "there are two of this name" in notices[2]


async def test_a_server_that_dies_is_started_anew_but_not_for_ever() -> None:
    told, _ = await results("dies", *[("odd_add", {"a": 1, "b": number}) for number in range(4)])
    assert told[0] == told[1] == "Error: odd ended in the midst of the call. It may be tried again."
    assert told[-1] == "Error: odd has ended 3 times; it is not started again."


async def test_a_server_that_hangs_is_given_up() -> None:
    told, _ = await results("hangs", ("odd_add", {"a": 1, "b": 2}), timeout=0.3)
    assert told == ["Error: odd did not answer within 0.3 s."]


async def test_a_server_that_describes_a_tool_anew_is_not_used_any_more(tmp_path: Path) -> None:
    calls = [("odd_add", {"a": 1, "b": number}) for number in range(3)]
    told, _ = await results("changes", *calls, env={"MARK": str(tmp_path / "mark")})
    assert told[1] == "Error: odd describes 'add' differently since it started anew; it is not used."
    assert "it is not started again" in told[2]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (server("silent", start_timeout=0.5), "it did not answer within 0.5 s"),
        (server("arrays"), "inputSchema"),
        (McpServer("odd", command=["/nowhere/at-all"]), "could not be used"),
        (McpServer("odd", command=[sys.executable, "-c", "raise SystemExit('no key')"]), "could not be used"),
        (McpServer("odd", url="http://127.0.0.1:9/mcp", start_timeout=5), "could not be used"),
    ],
)
async def test_a_server_that_does_not_start_is_an_error_that_says_so(broken: McpServer, words: str) -> None:
    with pytest.raises(ToolError, match="could not be used") as failed:
        await Agent(ScriptedModel([]), tools=[broken], keep=False).arun("Go")
    assert words in failed.value.message


async def test_tools_over_http_with_headers() -> None:
    with served(app) as url:
        for headers in ({}, {"x-key": "1"}):
            served_app = McpServer("six", url=f"{url}/mcp", headers=headers, approval="never", allow=["add"])
            run = await Agent(calling(("six_add", {"a": 2, "b": 3})), tools=[served_app], keep=False).arun("Go")
            assert run.steps[0].calls[0].result == "5"


def test_servers_are_described_as_desktop_programs_do(home: Path) -> None:
    assert mcp_config() == {}
    described = {"a": {"command": "x", "args": ["y"], "type": "stdio"}, "b": {"url": "http://h/mcp", "disabled": True}}
    home.mkdir(exist_ok=True)
    (home / "mcp.json").write_text(json.dumps({"mcpServers": described}))
    found = mcp_config()
    assert found["a"].command == ["x", "y"] and found["b"].allow == []
    with pytest.raises(NotFoundError):
        mcp_config("nowhere.json")
    for wrong in (
        "[]",
        "{}",
        '{"mcpServers": {"a": {"command": "x", "timeout": true}}}',
        '{"mcpServers": {"a": {"no": 1}}}',
    ):
        (home / "mcp.json").write_text(wrong)
        with pytest.raises(FormatError):
            mcp_config()
    with pytest.raises(InvalidInputError):
        McpServer("neither")
