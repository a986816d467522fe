"""A run once more, from its trace: the model says what it said, the tools give what they gave, people decide as they
did. What comes out must be the same, or the loop has changed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmasos.apps.agent import context
from llmasos.apps.agent.forms import Form
from llmasos.apps.agent.loop import Loop
from llmasos.apps.agent.models import ScriptedModel
from llmasos.client.tools import Tool
from llmasos.client.types.agents import AgentCall, AgentEvent, AgentRun, AgentStep, AgentToolInfo, AgentWindow
from llmasos.errors import InvalidInputError
from llmasos.store.database import utc_now
from llmasos.tasks.model import run_sync

_FACTS = ("state", "text", "output", "stop", "prompt_tokens", "output_tokens", "pending", "notices")
_OF_STEP = (
    "kind",
    "number",
    "text",
    "reasoning",
    "finish_reason",
    "problem",
    "prompt_tokens",
    "output_tokens",
    "window",
)
_OF_CALL = ("id", "name", "arguments", "result", "is_error", "approval")


@dataclass(frozen=True)
class Replay:
    """`run`: what came out. `differences`: what is not as it was, one line each; none: it was replayed exactly."""

    run: AgentRun
    differences: tuple[str, ...]


def replay(trace: AgentRun) -> Replay:
    """Replay a run that has ended or waits; one that was ended from outside, up to there. What depends on the model's
    tokenizer (when messages no longer fit) and on time is taken from the trace. Raises InvalidInputError for a run that
    has not ended."""
    return run_sync(areplay(trace))


async def areplay(trace: AgentRun) -> Replay:
    if trace.state == "running":
        raise InvalidInputError(f"The run {trace.id} has not ended.", param="run")
    now = utc_now()
    same = ("id", "agent", "model", "num_given", "tools", "form", "options", "context")
    run = AgentRun(
        **{name: getattr(trace, name) for name in same},
        created=now,
        updated=now,
        messages=[dict(one) for one in trace.messages[: trace.num_given]],
        limits=trace.limits.model_copy(update={"seconds": None}),
        notices=[one for one in trace.notices if one not in [step.window.notice for step in trace.steps]],
    )
    await _Replaying(run, trace).go()
    return Replay(run, tuple(_differences(trace, run)))


class _Replaying(Loop):
    def __init__(self, run: AgentRun, trace: AgentRun) -> None:
        self._trace = trace
        self._calls_before = {call.id: call for step in trace.steps for call in step.calls}
        steps = [step for step in trace.steps if step.finish_reason is not None]
        self._answers = [step for step in steps if step.kind == "answer"]
        model = ScriptedModel([_answer(step) for step in steps], name=trace.model)
        tools = {one.name: _tool(one) for one in trace.tools}
        form = None if trace.form is None else _Form(trace, self._answers)
        super().__init__(run, model, tools, emit=_nothing, form=form)

    async def _ask(self) -> AgentStep | None:
        if self.run.num_answers < len(self._answers):
            return await super()._ask()
        self.run.state, self.run.error = self._trace.state, self._trace.error
        if self._trace.stop is not None:
            self._stop(self._trace.stop.reason, self._trace.stop.message)
        return None

    async def _count(self, shown: list[dict[str, Any]]) -> int:
        return 0

    async def _shown(self) -> list[dict[str, Any]] | None:
        wanted = self._answers[self.run.num_answers].window
        if wanted != self.run.window:
            notice = context.drop_notice(wanted.num_hidden)
            await self._hide(AgentWindow(start=wanted.start, num_hidden=wanted.num_hidden, notice=notice))
        return context.view(self.run.messages, self.run.window)

    def _prepare(self, call: AgentCall) -> tuple[Tool | None, Any]:
        """Arguments that were wrong then have their result, too."""
        tool = self.tools.get(call.name)
        return (tool, {}) if tool is not None else super()._prepare(call)

    async def _may_run(self, call: AgentCall, tool: Tool, arguments: Mapping[str, Any]) -> bool:
        before = self._before_of(call)
        call.approval = before.approval
        if before.approval == "denied" and before.result is not None:
            self._give(call, before.result, is_error=True)
        return before.result is not None and call.result is None

    async def _run_tool(self, call: AgentCall, tool: Tool, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        before = self._before_of(call)
        return before.result or "", before.is_error

    def _give(self, call: AgentCall, text: str, *, is_error: bool = False) -> None:
        if text == self._before_of(call).result:  # it was cut then, if it was too long
            call.result, call.is_error = text, is_error
        else:
            super()._give(call, text, is_error=is_error)

    def _before_of(self, call: AgentCall) -> AgentCall:
        return self._calls_before.get(call.id) or AgentCall(id=call.id, name=call.name, arguments="", result="")


class _Form(Form):
    """Takes the answers that were taken."""

    def __init__(self, trace: AgentRun, answers: list[AgentStep]) -> None:
        super().__init__(trace.form or {})
        self._output = trace.output
        self._problems = [step.problem for step in answers if not step.calls]

    def read(self, text: str) -> Any:
        if problem := self._problems.pop(0):
            raise ValueError(problem)
        return self._output


def _answer(step: AgentStep) -> dict[str, Any]:
    return {
        "text": step.text,
        "reasoning": step.reasoning,
        "calls": [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in step.calls],
        "finish_reason": step.finish_reason,
        "prompt_tokens": None if step.is_estimated else step.prompt_tokens,
        "output_tokens": None if step.is_estimated else step.output_tokens,
    }


def _tool(info: AgentToolInfo) -> Tool:
    return Tool(info.name, info.description, info.parameters, asyncio.sleep, source=info.source)


def _nothing(event: AgentEvent) -> None:
    pass


def _differences(trace: AgentRun, run: AgentRun) -> list[str]:
    found = [_said(name, getattr(trace, name), getattr(run, name)) for name in _FACTS]
    for at, pair in enumerate(zip(trace.messages, run.messages, strict=False)):
        found.append(_said(f"message {at}", *pair))
    found.append(_said("number of messages", len(trace.messages), len(run.messages)))
    steps = [step for step in trace.steps if step.finish_reason is not None]
    found.append(_said("number of steps", len(steps), len(run.steps)))
    for then, now in zip(steps, run.steps, strict=False):
        found += [_said(f"step {then.number}: {name}", getattr(then, name), getattr(now, name)) for name in _OF_STEP]
        for call, again in zip(then.calls, now.calls, strict=False):
            where = f"call {call.id}"
            found += [_said(f"{where}: {name}", getattr(call, name), getattr(again, name)) for name in _OF_CALL]
    return [one for one in found if one]


def _said(name: str, then: Any, now: Any) -> str:
    return "" if then == now else f"{name}: {_short(then)} is now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}…"
