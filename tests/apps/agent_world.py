"""Tools and scripts for the tests of agents."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pydantic

from llmasos.apps.agent import (
    Agent,
    AgentDecision,
    AgentEvent,
    AgentLimits,
    AgentRun,
    McpServer,
    ScriptedModel,
    Tool,
    tool,
)
from llmasos.apps.agent.loop import CLIENT
from llmasos.errors import ContextOverflowError, InvalidInputError, NetworkError

SCRIPTS = Path(__file__).parent / "agent_scripts"
MCP_SERVER = Path(__file__).parent / "agent_mcp_server.py"
FACTS = ("state", "text", "output", "stop", "error", "prompt_tokens", "output_tokens", "pending", "trusted", "notices")


class Guest(pydantic.BaseModel):
    name: str
    age: int


class Order(pydantic.BaseModel):
    hotel: str
    nights: int = pydantic.Field(ge=1)
    guests: list[Guest]


class Walk(pydantic.BaseModel):
    km: float


class Day(pydantic.BaseModel):
    city: str
    walks: list[Walk]


class Plan(pydantic.BaseModel):
    days: list[Day]
    by: Literal["train", "car"]


@tool(read_only=True)
def weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> dict[str, object]:
    """Tell the temperature.

    Args:
        city: Name of a city.
        unit: Scale of the answer.
    """
    return {"city": city, "degrees": 18 if unit == "celsius" else 64}


@tool(destructive=True)
def book(order: Order) -> str:
    """Book a hotel."""
    return f"{order.hotel}, {order.nights} nights for {', '.join(guest.name for guest in order.guests) or 'nobody'}"


@tool(approval=lambda arguments: arguments["amount"] > 100)
def pay(amount: int) -> str:
    """Pay."""
    return f"paid {amount}"


@tool
def slow(seconds: float) -> str:
    """Take a while."""
    time.sleep(seconds)
    return "at last"


@tool
async def aslow(seconds: float) -> str:
    """Take a while, asynchronously."""
    await asyncio.sleep(seconds)
    return "at last"


@tool
def broken(kind: str) -> Any:
    """Fail."""
    if kind == "json":
        return object()
    errors = {"value": ValueError("no such value"), "exit": SystemExit(3)}
    raise errors.get(kind) or InvalidInputError("That is wrong.", hint="Do it right.")


@tool
def trip(plan: Plan) -> list[str]:
    """Plan a trip."""
    return [f"{day.city}: {sum(walk.km for walk in day.walks)} km by {plan.by}" for day in plan.days]


@tool
def long(words: int) -> str:
    """Say much."""
    return " ".join(f"w{i}" for i in range(words))


@tool
def odd() -> str:
    """Say something odd."""
    return "half \ud83d and NUL \0"


@tool
def at_home(what: str) -> str:
    """Look at something at home."""
    raise AssertionError("the caller does it")


def counter() -> Tool:
    count = iter(range(1, 100))

    @tool(name="counter")
    def counts() -> int:
        """Count on."""
        return next(count)

    return counts


def tools_named(names: Sequence[str]) -> list[Any]:
    known = {one.name: one for one in (weather, book, pay, slow, aslow, broken, trip, long, odd)}
    made = {
        "counter": counter,
        "at_home": lambda: replace(at_home, source=CLIENT),
        "mcp": lambda: McpServer(
            "sums", command=[sys.executable, str(MCP_SERVER), "sums"], allow=["add"], approval="never", timeout=10
        ),
    }
    return [made[name]() if name in made else known[name] for name in names]


def scripted(answers: Sequence[Any], **options: Any) -> ScriptedModel:
    """Words for what a JSON file can't say: a model that raises."""
    errors = {"overflow": ContextOverflowError(900, 1, 500), "network": NetworkError("The line is dead.", hint="Wait.")}
    known = [{"error": errors[one]} if isinstance(one, str) and one in errors else one for one in answers]
    return ScriptedModel(known, **options)


async def run_script(script: dict[str, Any]) -> tuple[AgentRun, list[AgentEvent]]:
    """The run of a script with its events, whatever becomes of it."""
    approve = script.get("approve")
    agent = Agent(
        scripted(script["answers"], context_length=script.get("context_length"), piece=1000),
        tools=tools_named(script["tools"]),
        system=script.get("system"),
        limits=AgentLimits.model_validate(script.get("limits", {})),
        approve=None if approve is None else lambda call, tool: approve,
        output=script.get("output"),
        context=script.get("context", "drop"),
        keep=False,
    )
    events: list[AgentEvent] = []

    async def follow(stream: Any) -> AgentRun:
        try:
            async for event in stream:
                events.append(event)
        except NetworkError:
            pass
        return next(event.run for event in reversed(events) if event.run is not None)

    if "cancel_after" in script:
        work = asyncio.ensure_future(follow(agent.astream(script["input"])))
        await asyncio.sleep(script["cancel_after"])
        started = next(event.run for event in events if event.run is not None)
        running: list[AgentRun] = []
        agent._store = lambda run: _keep(running, run)  # type: ignore[method-assign]
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert started.id == running[0].id
        return running[0], events
    run = await follow(agent.astream(script["input"]))
    for decisions in script.get("decisions", ()):
        assert run.state == "requires_action"
        run = AgentRun.model_validate_json(run.model_dump_json())  # as if another process went on
        given = {id: _decision(one) for id, one in decisions.items()}
        run = await follow(agent.astream_resume(run, given))
    return run, events


async def _keep(running: list[AgentRun], run: AgentRun) -> None:
    running.append(run)


def _decision(given: Any) -> AgentDecision:
    return AgentDecision(approve=given) if isinstance(given, bool | str) else AgentDecision.model_validate(given)


def outcome(run: AgentRun, events: Sequence[AgentEvent]) -> dict[str, Any]:
    """What must stay the same, without times and made-up ids."""
    found = json.loads(run.model_dump_json(exclude_none=True))
    times = ("started", "seconds")
    steps = []
    for step in found["steps"]:
        calls = [{key: value for key, value in call.items() if key not in times} for call in step.pop("calls")]
        steps.append({key: value for key, value in step.items() if key not in times and value != ""} | {"calls": calls})
    facts = {name: found[name] for name in FACTS if found.get(name) not in (None, "", [])}
    told: list[str] = []
    for event in events:
        what = event.type if event.call is None else f"{event.type} {event.call.id}"
        if event.type != "call.started" and (not told or told[-1] != what):
            told.append(what)
    made_up = [call["id"] for step in steps for call in step["calls"] if len(call["id"]) > 15]
    text = json.dumps({**facts, "messages": found["messages"][run.num_given :], "steps": steps, "events": told})
    for number, id in enumerate(made_up):
        text = text.replace(id, f"made_up_{number}")
    known: dict[str, Any] = json.loads(text)
    groups = itertools.groupby(known["events"], lambda one: one.startswith("call.done"))
    known["events"] = [one for done, group in groups for one in (sorted(group) if done else group)]
    return known  # those that ran at once end in any order


def main() -> None:
    """Write what comes out of every script into it: look at the difference before you keep it."""
    for path in sorted(SCRIPTS.glob("*.json")):
        script = json.loads(path.read_text(encoding="utf-8"))
        script["outcome"] = outcome(*asyncio.run(run_script(script)))
        path.write_text(json.dumps(script, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
