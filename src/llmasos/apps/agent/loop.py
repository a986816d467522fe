"""The loop of an agent: ask the model, run what it calls, tell it the results, until it answers or a limit is reached.

What goes wrong with a call is told to the model, which can do something about it; what goes wrong with the model ends
the run. Everything is written into the run as it happens, and told as events.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Literal

from llmasos.apps.agent import context
from llmasos.apps.agent.forms import Form
from llmasos.apps.agent.models import ChatModel, Ended, Question, estimate
from llmasos.apps.agent.threads import awaited, invoke, together
from llmasos.client.tools import Tool, as_text, prepare
from llmasos.client.types.agents import (
    AgentCall,
    AgentDecision,
    AgentError,
    AgentEvent,
    AgentRun,
    AgentStep,
    AgentStop,
    AgentWindow,
    StopReason,
)
from llmasos.errors import ContextOverflowError, InvalidInputError, LLMasOSError, ProviderError
from llmasos.store.database import utc_now
from llmasos.text.reply import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart

Approve = Callable[[AgentCall, Tool], Any]
"""Whether a call may be made: True, False, "always" (and all calls of this tool in the run), or any other text: no, and
that is the reason that the model is told. May be a coroutine function."""
Emit = Callable[[AgentEvent], None]
CLIENT = "client"
"""The source of a tool whose results the caller of a run gives."""
MAX_FORM_TRIES = 3
_SUMMARY_TOKENS = 400
_OVERFLOWS = ("context_length_exceeded", "context_overflow")
_REPEATED = "Error: this call was made {num} times with the same arguments and gave the same each time. It is not made "
_REPEATED += "again: use what it gave, or do something else."
_SUMMARISE = "Summarise this part of a conversation in a few sentences. Keep names, numbers, decisions, and what is "
_SUMMARISE += "still to be done."

_log = logging.getLogger("llmasos")


class Loop:
    """One run from where it is to where it ends or waits. `tools` by name; `form`: of the answer; `required`: the
    first answer must call a tool."""

    def __init__(
        self,
        run: AgentRun,
        model: ChatModel,
        tools: Mapping[str, Tool],
        *,
        emit: Emit,
        approve: Approve | None = None,
        form: Form | None = None,
        required: bool = False,
    ) -> None:
        self.run, self.model, self.tools = run, model, tools
        self._emit_event, self._approve, self._form, self._required = emit, approve, form, required
        self._definitions = [one.definition for one in tools.values()]
        self._turn = asyncio.Semaphore(run.limits.parallel)
        self._before = run.seconds
        self._begun = time.monotonic()
        self._deadline = asyncio.timeout(None)

    async def go(self, decisions: Mapping[str, AgentDecision] | None = None) -> None:
        """Raises what the model raises; the run then says `failed`."""
        run, limit = self.run, self.run.limits.seconds
        run.state, run.stop, run.error = "running", None, None
        self._emit("run.started", run=run.model_copy(deep=True))
        self._deadline = asyncio.timeout(None if limit is None else max(0.0, limit - self._before))
        try:
            async with self._deadline:
                await self.model.ready()
                await self._go(decisions)
        except TimeoutError as e:
            if not self._deadline.expired():
                self._failed(e)
                raise
            self._stop("seconds", f"Stopped after {limit:g} s, the limit of time (seconds).")
        except asyncio.CancelledError:
            run.state = "cancelled"
            self._close_calls("Not finished: the run was cancelled.")
            raise
        except Exception as e:
            self._failed(e)
            raise
        finally:
            run.seconds, run.updated = round(self._now(), 4), utc_now()
            self._emit("run.done", run=run)

    def _failed(self, e: Exception) -> None:
        self.run.state = "failed"
        known = e if isinstance(e, LLMasOSError) else LLMasOSError(f"{type(e).__name__}: {e}")
        self.run.error = AgentError(code=known.code, message=known.message, hint=known.hint)
        self._close_calls("Not finished: the run failed.")

    def _now(self) -> float:
        """Seconds that the run has been at work."""
        return self._before + time.monotonic() - self._begun

    def _emit(self, type: Any, **fields: Any) -> None:
        self._emit_event(AgentEvent(type=type, step=self.run.num_answers, **fields))

    def _stop(self, reason: StopReason, message: str) -> None:
        self.run.state, self.run.stop = "stopped", AgentStop(reason=reason, message=message)
        self._close_calls(f"Not run: {message[0].lower()}{message[1:]}")

    async def _go(self, decisions: Mapping[str, AgentDecision] | None) -> None:
        if decisions is not None:
            self._decide(decisions)
            if not await self._calls(self.run.steps[-1]):
                return
        tries = 0
        while True:
            step = await self._ask() if self._may_ask() else None
            if step is None:
                return
            if step.calls:
                if self.run.num_answers >= self.run.limits.steps:
                    names = ", ".join(dict.fromkeys(call.name for call in step.calls))
                    self._stop_at_steps(f"; the model still wanted to call {names}")
                    return
                if not await self._calls(step):
                    return
            else:
                tries += 1
                if self._ended(step, tries):
                    return

    # limits

    def _may_ask(self) -> bool:
        limits = self.run.limits
        if self.run.num_answers >= limits.steps:
            self._stop_at_steps("")
        elif limits.tokens is not None and self._tokens_left(limits.tokens) < 1:
            self._stop_at_tokens(limits.tokens)
        return self.run.state == "running"

    def _stop_at_steps(self, more: str) -> None:
        num = self.run.limits.steps
        answers = "1 answer" if num == 1 else f"{num} answers"
        self._stop("steps", f"Stopped after {answers}, the limit of steps{more}.")

    def _tokens_left(self, limit: int) -> int:
        return limit - self.run.prompt_tokens - self.run.output_tokens

    def _stop_at_tokens(self, limit: int) -> None:
        used = self.run.prompt_tokens + self.run.output_tokens
        self._stop("tokens", f"Stopped after {used} tokens of prompts and answers: the limit is {limit}.")

    # one answer

    async def _ask(self) -> AgentStep | None:
        """None: the run was stopped instead."""
        while True:
            shown = await self._shown()
            if shown is None:
                return None
            most = self.run.limits.answer_tokens
            if (limit := self.run.limits.tokens) is not None:
                most = min(most, self._tokens_left(limit) - await self._count(shown))
                if most < 1:
                    self._stop_at_tokens(limit)
                    return None
            try:
                return await self._answer(shown, most)
            except (ContextOverflowError, ProviderError) as e:
                if isinstance(e, ProviderError) and e.server_code not in _OVERFLOWS:
                    raise
                self.run.steps.pop()  # nothing came of it
                if not await self._hide_half(shown):
                    return None

    async def _count(self, shown: list[dict[str, Any]]) -> int:
        return await asyncio.to_thread(self.model.count, shown, self._definitions)

    async def _answer(self, shown: list[dict[str, Any]], most: int) -> AgentStep:
        run = self.run
        options = {name: value for name, value in run.options.items() if value is not None}
        question = Question(
            messages=shown,
            tools=self._definitions,
            required=self._required and run.num_answers == 0,
            parallel=run.parallel_calls,
            form=None if self._form is None else self._form.schema,
            max_tokens=most,
            options=options,
        )
        step = AgentStep(number=run.num_answers + 1, started=round(self._now(), 4), window=run.window)
        run.steps.append(step)
        ended: Ended | None = None
        async with aclosing(self.model.ask(question)) as events:
            async for event in events:
                match event:
                    case TextDelta(text):
                        step.text += text
                        self._emit("answer.delta", text=text)
                    case ReasoningDelta(text):
                        step.reasoning += text
                        self._emit("reasoning.delta", text=text)
                    case ToolCallStart(_, id, name):
                        step.calls.append(AgentCall(id=self._new_id(id), name=name, arguments=""))
                    case ToolCallDelta(index, arguments):
                        step.calls[index].arguments += arguments
                    case Ended():
                        ended = event
        step.seconds = round(self._now() - step.started, 4)
        self._count_in(step, ended or Ended("stop"), shown)
        message: dict[str, Any] = {"role": "assistant", "content": _unicode(step.text)}
        if step.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in step.calls
            ]
        run.messages.append(message)
        self._emit("answer.done", text=step.text)
        return step

    def _count_in(self, step: AgentStep, ended: Ended, shown: list[dict[str, Any]]) -> None:
        step.finish_reason = ended.finish_reason
        step.is_estimated = ended.prompt_tokens is None or ended.output_tokens is None
        written = [step.text, step.reasoning, [call.arguments for call in step.calls]]
        known = ended.prompt_tokens
        step.prompt_tokens = estimate(shown, self._definitions) if known is None else known
        step.output_tokens = estimate(*written) if ended.output_tokens is None else ended.output_tokens
        self.run.prompt_tokens += step.prompt_tokens
        self.run.output_tokens += step.output_tokens

    def _new_id(self, given: str) -> str:
        """Some models give none, or the same twice."""
        taken = {call.id for step in self.run.steps for call in step.calls}
        return given if given and given not in taken else f"call_{secrets.token_hex(8)}"

    def _ended(self, step: AgentStep, tries: int) -> bool:
        """Whether an answer without calls ends the run."""
        run = self.run
        if step.finish_reason == "length":
            run.text = step.text
            limit = run.limits.tokens
            if limit is not None and self._tokens_left(limit) < 1:
                self._stop_at_tokens(limit)
            else:
                self._stop(
                    "length", f"The answer was cut after {step.output_tokens} tokens, the most that it could have."
                )
            return True
        if self._form is None:
            run.state, run.text = "done", step.text
            return True
        try:
            run.output = self._form.read(step.text)
            run.state, run.text = "done", step.text
            return True
        except ValueError as e:
            step.problem = str(e)
            if tries >= MAX_FORM_TRIES:
                run.text = step.text
                self._stop("output", f"{tries} answers were not of the form that was asked for; the last: {e}.")
                return True
            told = f"Your answer is not of the form that was asked for: {e}. Answer again, with the JSON alone."
            run.messages.append({"role": "user", "content": told})
            return False

    # what the context does not hold

    async def _shown(self) -> list[dict[str, Any]] | None:
        """The messages that fit; None: the run was stopped."""
        length = self.model.context_length
        run = self.run
        if length is None:
            return context.view(run.messages, run.window)
        room = length - min(run.limits.answer_tokens, max(1, length // 4))

        def fits(shown: list[dict[str, Any]]) -> bool:
            return self.model.count(shown, self._definitions) <= room

        found = await asyncio.to_thread(context.narrowed, run.messages, run.window, fits)
        if found is None:
            self._stop_full(f"this model's holds {length} tokens, {length - room} of them for the answer")
            return None
        if found != run.window and not await self._hide(found):
            return None
        return context.view(run.messages, run.window)

    async def _hide_half(self, shown: list[dict[str, Any]]) -> bool:
        """Where a model does not tell its context and said that this was too much."""
        half = estimate(shown) // 2
        run = self.run
        found = context.narrowed(run.messages, run.window, lambda one: estimate(one) <= half)
        found = found or context.narrower(run.messages, run.window)
        if found is None:
            self._stop_full("the model refused it")
            return False
        return await self._hide(found)

    def _stop_full(self, why: str) -> None:
        self._stop("context", f"Stopped: the conversation no longer fits into the context ({why}).")

    async def _hide(self, found: AgentWindow) -> bool:
        run = self.run
        if run.context == "stop":
            self._stop_full("and nothing may be left out")
            return False
        if run.context == "summarise":
            gone = context.hidden_messages(run.messages, found, run.window)
            if summary := await self._summary(f"{run.window.notice}\n{context.transcript(gone)}".strip()):
                found = found.model_copy(update={"notice": context.summary_notice(found.num_hidden, summary)})
        run.window = found
        run.notices.append(found.notice)
        self._emit("notice", text=found.notice)
        return True

    async def _summary(self, text: str) -> str:
        """Empty: the model could not make one; then the notice says that messages are gone."""
        length = self.model.context_length or 8192
        messages = [
            {"role": "system", "content": _SUMMARISE},
            {"role": "user", "content": context.cut(text, length)},
        ]
        step = AgentStep(kind="summary", number=self.run.num_answers, started=round(self._now(), 4))
        self.run.steps.append(step)
        ended = Ended("stop")
        with suppress(ContextOverflowError):
            question = Question(messages, max_tokens=min(_SUMMARY_TOKENS, length // 4), options=dict(self.run.options))
            async with aclosing(self.model.ask(question)) as events:
                async for event in events:
                    if isinstance(event, TextDelta):
                        step.text += event.text
                    elif isinstance(event, Ended):
                        ended = event
        step.seconds = round(self._now() - step.started, 4)
        self._count_in(step, ended, messages)
        return step.text.strip()

    # calls

    def _decide(self, decisions: Mapping[str, AgentDecision]) -> None:
        """What somebody said of the calls that wait. Raises InvalidInputError."""
        check_decisions(self.run, decisions)
        for call in self.run.waiting():
            self._settle(call, decisions[call.id])
        self.run.pending = []

    def _settle(self, call: AgentCall, decision: AgentDecision) -> None:
        if decision.result is not None:
            call.approval = "not_needed"
            self._give(call, decision.result, is_error=decision.is_error)
        elif decision.approve:
            call.approval = "always" if decision.approve == "always" else "approved"
            if decision.approve == "always" and call.name not in self.run.trusted:
                self.run.trusted.append(call.name)
        else:
            call.approval = "denied"
            why = f": {decision.reason.rstrip('. ')}" if decision.reason else ""
            self._give(call, f"Error: the user did not allow this call{why}. Do not make it again.", is_error=True)

    async def _calls(self, step: AgentStep) -> bool:
        """Run the calls of an answer. False: the run was stopped, or waits for somebody."""
        ready = []
        for call in step.calls:
            if call.result is not None:
                continue
            tool, arguments = self._prepare(call)
            if (times := self._repeated(call)) < 0:
                names = f"{call.name} {call.arguments}"
                self._stop(
                    "repeats", f"Stopped: the model made the same call again and again: {context.cut(names, 200)}."
                )
                return False
            elif times:
                self._give(call, _REPEATED.format(num=times), is_error=True)
            elif tool is None:
                self._give(call, self._explained(call, step, arguments), is_error=True)
            elif await self._may_run(call, tool, arguments):
                ready.append(self._execute(call, tool, arguments))
        await together(ready)
        if waiting := [call for call in step.calls if call.result is None]:
            self.run.state, self.run.pending = "requires_action", [call.id for call in waiting]
            for call in waiting:
                self._emit("approval.required", call=call.model_copy())
            return False
        self._tell(step)
        return True

    def _prepare(self, call: AgentCall) -> tuple[Tool | None, Any]:
        return prepare(self.tools, call.name, call.arguments)

    def _tell(self, step: AgentStep) -> None:
        """The results, in the order of the calls."""
        for call in step.calls:
            told = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": call.result or ""}
            self.run.messages.append(told)

    def _explained(self, call: AgentCall, step: AgentStep, error: str) -> str:
        """What is wrong with a call, with what the model can do about it."""
        if call.name not in self.tools:
            near = difflib.get_close_matches(call.name, self.tools, n=1)
            return f"{error} Did you mean {near[0]}?" if near else error
        if step.finish_reason == "length" and call is step.calls[-1]:
            return f"Error: the call was cut off after {step.output_tokens} tokens. Make its arguments shorter."
        return error

    def _repeated(self, call: AgentCall) -> int:
        """How often the call was made and gave the same, if that is too often; -1: the model was told so before."""
        key, most = _key(call), self.run.limits.repeats
        results = [
            one.result
            for step in self.run.steps
            for one in step.calls
            if one is not call and one.result is not None and _key(one) == key
        ]
        if results and results[-1] == _REPEATED.format(num=most):
            return -1
        same = results[-most:]
        return most if len(same) == most and len(set(same)) == 1 else 0

    async def _may_run(self, call: AgentCall, tool: Tool, arguments: Mapping[str, Any]) -> bool:
        """False: it was denied, and says so, or it waits."""
        if tool.source == CLIENT:
            call.approval = "waiting"
            return False
        if call.approval in ("approved", "always") or tool.name in self.run.trusted:
            if call.approval == "not_needed" and tool.needs_approval(arguments):
                call.approval = "always"
            return True
        if not _asks_first(tool, arguments):
            return True
        call.approval = "waiting"
        if self._approve is None:
            return False
        self._emit("approval.required", call=call.model_copy())
        decided = await self._outside_the_clock(awaited(self._approve, call, tool))
        reason = decided if isinstance(decided, str) and decided != "always" else None
        allowed: bool | Literal["always"] = "always" if decided == "always" else decided is True
        self._settle(call, AgentDecision(approve=allowed, reason=reason))
        return call.result is None

    async def _outside_the_clock(self, work: Awaitable[Any]) -> Any:
        """What a person takes is not the run's time."""
        begun, when = time.monotonic(), self._deadline.when()
        self._deadline.reschedule(None)
        try:
            return await work
        finally:
            away = time.monotonic() - begun
            self._begun += away
            self._deadline.reschedule(None if when is None else when + away)

    async def _execute(self, call: AgentCall, tool: Tool, arguments: Mapping[str, Any]) -> None:
        async with self._turn:
            call.started = round(self._now(), 4)
            self._emit("call.started", call=call.model_copy())
            text, is_error = await self._run_tool(call, tool, arguments)
            call.seconds = round(self._now() - call.started, 4)
            self._give(call, text, is_error=is_error)

    async def _run_tool(self, call: AgentCall, tool: Tool, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """The text of the result, and whether it is an error."""
        seconds = tool.timeout or self.run.limits.tool_seconds
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                return as_text(await invoke(tool.run, arguments)), False
        except LLMasOSError as e:
            return f"Error: {e}", True
        except (Exception, SystemExit) as e:
            if isinstance(e, TimeoutError) and deadline.expired():
                return f"Error: {tool.name} did not finish within {seconds:g} s.", True
            _log.debug("The tool %s failed.", tool.name, exc_info=e)
            return f"Error: {tool.name} failed: {type(e).__name__}{f': {e}' if str(e) else ''}", True

    def _give(self, call: AgentCall, text: str, *, is_error: bool = False) -> None:
        most = self.run.limits.result_chars
        if self.model.context_length is not None:
            most = min(most, max(200, self.model.context_length))  # about a quarter of the context
        call.result, call.is_error = context.cut(_unicode(text), most), is_error
        self._emit("call.done", call=call.model_copy())

    def _close_calls(self, text: str) -> None:
        """A conversation that is gone on with must have a result for every call."""
        steps = [step for step in self.run.steps if step.kind == "answer"]
        last = self.run.messages[-1] if self.run.messages else {}
        if not steps or not steps[-1].calls or not last.get("tool_calls"):
            return
        for call in steps[-1].calls:
            if call.result is None:
                call.result, call.is_error = text, True
        self.run.pending = []
        self._tell(steps[-1])


def check_decisions(run: AgentRun, decisions: Mapping[str, AgentDecision]) -> None:
    """Raises InvalidInputError for what is missing, too much, or of the wrong kind."""
    waiting = {call.id: call for call in run.waiting()}
    if missing := sorted(waiting.keys() - decisions.keys()):
        raise InvalidInputError(f"The call {missing[0]!r} still waits for a decision.", param="decisions")
    if extra := sorted(decisions.keys() - waiting.keys()):
        raise InvalidInputError(f"No call {extra[0]!r} waits for a decision.", param="decisions")
    of_client = {tool.name for tool in run.tools if tool.source == CLIENT}
    for id, decision in decisions.items():
        name = waiting[id].name
        if name in of_client and decision.result is None and decision.approve is not False:
            raise InvalidInputError(f"The call {id!r} of {name} waits for its result.", param="decisions")
        if name not in of_client and (decision.approve is None or decision.result is not None):
            raise InvalidInputError(f"The call {id!r} of {name} waits to be approved or not.", param="decisions")


def _key(call: AgentCall) -> tuple[str, str]:
    try:
        return call.name, json.dumps(json.loads(call.arguments or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return call.name, call.arguments


def _asks_first(tool: Tool, arguments: Mapping[str, Any]) -> bool:
    try:
        return tool.needs_approval(arguments)
    except Exception as e:
        _log.warning("Whether %s needs approval could not be said: %s", tool.name, e)
        return True


def _unicode(text: str) -> str:
    """Half surrogate pairs, which no tokeniser takes, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
