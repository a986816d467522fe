"""Scripted conversations of agents, one file each: what comes out is written there, and replays exactly.

`python tests/apps/agent_world.py` writes the files anew.
"""

import json

import pytest
from agent_world import SCRIPTS, outcome, run_script

from llmasos.apps.agent import AgentRun
from llmasos.apps.agent.replaying import areplay

PATHS = sorted(SCRIPTS.glob("*.json"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
async def test_a_scripted_conversation_comes_out_as_written_and_replays_exactly(path) -> None:
    script = json.loads(path.read_text(encoding="utf-8"))
    if "mcp" in script["tools"]:
        pytest.importorskip("mcp")
    run, events = await run_script(script)
    assert outcome(run, events) == script["outcome"]
    again = await areplay(AgentRun.model_validate_json(run.model_dump_json()))
    assert again.differences == ()


def test_there_are_twenty_shapes_at_least_and_every_limit_is_among_them() -> None:
    scripts = [json.loads(path.read_text(encoding="utf-8")) for path in PATHS]
    assert len(scripts) >= 20
    assert all(script["about"] for script in scripts)
    reasons = {script["outcome"]["stop"]["reason"] for script in scripts if "stop" in script["outcome"]}
    assert reasons == {"steps", "tokens", "seconds", "repeats", "context", "length", "output"}


async def test_a_replay_says_what_has_changed() -> None:
    run, _ = await run_script(json.loads((SCRIPTS / "one_call.json").read_text(encoding="utf-8")))
    run.messages[-1]["content"] = "It is 19 degrees."
    again = await areplay(run)
    assert len(again.differences) == 1
    assert "message 3" in again.differences[0] and "19 degrees" in again.differences[0]
