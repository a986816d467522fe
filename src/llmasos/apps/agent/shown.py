"""A run as people read it: a tree of answers and calls, with times, tokens, arguments and results. Also as spans of
OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmasos.apps.agent.models import text_of
from llmasos.client.types.agents import AgentCall, AgentRun, AgentStep

_SHOWN = 400
"""Characters of a text, where it is not asked for whole."""


def tree(run: AgentRun, *, whole: bool = False) -> str:
    """Lines of text. Long texts are shortened, unless they are wanted `whole`."""
    most = 1 << 60 if whole else _SHOWN
    tokens = f"{run.prompt_tokens:,} + {run.output_tokens:,} tokens"
    head = f"{run.id}  {run.state}  {run.model}  {_answers(run.num_answers)}  {tokens}  {run.seconds:.2f} s"
    lines = [head]
    for message in run.messages[: run.num_given]:
        lines += _wrapped(f"│ {message['role']}: ", "│   ", text_of(message.get("content")), most)
    for step in run.steps:
        lines += _step(step, most)
    lines += [f"│ {notice}" for notice in run.notices if not notice.startswith("[Notice")]
    return "\n".join([*lines, f"└─ {_end(run)}"])


def _answers(num: int) -> str:
    return "1 answer" if num == 1 else f"{num} answers"


def _end(run: AgentRun) -> str:
    if run.stop is not None:
        return run.stop.message
    if run.error is not None:
        return f"failed: {run.error.message}"
    if run.pending:
        return f"waits for a decision on: {', '.join(f'{call.name} ({call.id})' for call in run.waiting())}"
    return run.state


def _step(step: AgentStep, most: int) -> list[str]:
    about = " ".join(
        part
        for part in (
            f"{step.prompt_tokens:,} → {step.output_tokens:,} tokens{' (estimated)' if step.is_estimated else ''}",
            f"{step.seconds:.2f} s",
            "cut off" if step.finish_reason == "length" else "",
            f"[{step.window.num_hidden} earlier messages hidden]" if step.window.num_hidden else "",
            "not whole" if step.finish_reason is None else "",
        )
        if part
    )
    name = f"{step.number} answer" if step.kind == "answer" else "summary of earlier messages"
    lines = [f"├─ {name}  {about}"]
    if step.reasoning:
        lines += _wrapped("│    (", "│     ", f"{step.reasoning.strip()})", most)
    if step.text.strip():
        lines += _wrapped("│    ", "│    ", step.text.strip(), most)
    if step.problem:
        lines += _wrapped("│    ✗ ", "│    ", step.problem, most)
    for call in step.calls:
        lines += _call(call, most)
    return lines


def _call(call: AgentCall, most: int) -> list[str]:
    said = {"waiting": " waits", "approved": " approved", "always": " approved", "denied": " denied"}
    lines = _wrapped("│    ├─ ", "│    │  ", f"{call.name} {call.arguments}", most)
    lines[0] += f"  [{call.seconds:.2f} s{said.get(call.approval, '')}]"
    if call.result is not None:
        lines += _wrapped(f"│    │  {'✗' if call.is_error else '→'} ", "│    │    ", call.result, most)
    return lines


def _wrapped(first: str, other: str, text: str, most: int) -> list[str]:
    shown = text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
    lines = _plain(shown).split("\n") or [""]
    return [first + lines[0], *(other + line for line in lines[1:])]


def _plain(text: str) -> str:
    """What a terminal would take for commands is left out."""
    return "".join(c for c in text.replace("\r\n", "\n") if c == "\n" or c == "\t" or c.isprintable())


def spans(run: AgentRun) -> Iterator[dict[str, Any]]:
    """The run as spans under OpenTelemetry's names for agents: `invoke_agent`, below it `chat` and `execute_tool`.
    `start` and `end` are seconds after the run began, `parent` is the place of the parent in the list.

    https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-agent-spans/ (status: development)
    """
    about = {"gen_ai.provider.name": "llmasos", "gen_ai.request.model": run.model}
    usage = {"gen_ai.usage.input_tokens": run.prompt_tokens, "gen_ai.usage.output_tokens": run.output_tokens}
    named = {"gen_ai.agent.name": run.agent, "gen_ai.conversation.id": run.conversation or run.id}
    yield {
        "name": f"invoke_agent {run.agent}",
        "parent": None,
        "start": 0.0,
        "end": run.seconds,
        "is_error": run.state == "failed",
        "attributes": {"gen_ai.operation.name": "invoke_agent", **about, **named, **usage, "llmasos.run.id": run.id},
    }
    for step in run.steps:
        yield {
            "name": f"chat {run.model}",
            "parent": 0,
            "start": step.started,
            "end": step.started + step.seconds,
            "is_error": False,
            "attributes": {
                "gen_ai.operation.name": "chat",
                **about,
                "gen_ai.usage.input_tokens": step.prompt_tokens,
                "gen_ai.usage.output_tokens": step.output_tokens,
                "gen_ai.response.finish_reasons": [step.finish_reason or "error"],
            },
        }
        for call in step.calls:
            yield {
                "name": f"execute_tool {call.name}",
                "parent": 0,
                "start": call.started,
                "end": call.started + call.seconds,
                "is_error": call.is_error,
                "attributes": {
                    "gen_ai.operation.name": "execute_tool",
                    "gen_ai.tool.name": call.name,
                    "gen_ai.tool.call.id": call.id,
                    "gen_ai.tool.type": "function",
                },
            }
