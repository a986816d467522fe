"""What of a conversation is shown to a model whose context does not hold all of it.

Nothing is lost: the run keeps every message. What is no longer shown is told in a notice, which stands before the first
message of the user that is, and in the run's events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmasos.client.types.agents import AgentWindow

Messages = Sequence[Mapping[str, Any]]


def view(messages: Messages, window: AgentWindow) -> list[dict[str, Any]]:
    """What the model is shown: system messages, and what comes after the hidden ones."""
    if not window.start:
        return [dict(one) for one in messages]
    start = num_system(messages)
    kept = [dict(one) for one in messages[:start]]
    rest = [dict(one) for one in _kept(messages[start:], window.start)]
    first = next((at for at, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return [*kept, {"role": "user", "content": window.notice}, *rest]
    rest[first]["content"] = _before(window.notice, rest[first].get("content"))
    return kept + rest


def _kept(rest: Messages, num_hidden: int) -> list[Mapping[str, Any]]:
    """Without the first ones, but for the question that is being answered: the user's last message."""
    last = _last_user(rest)
    return [one for at, one in enumerate(rest) if at >= num_hidden or at == last]


def _last_user(rest: Messages) -> int:
    return max((at for at, one in enumerate(rest) if one["role"] == "user"), default=-1)


def _before(notice: str, content: Any) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": notice}, *content]
    return f"{notice}\n\n{content or ''}"


def num_system(messages: Messages) -> int:
    """System messages that a conversation begins with."""
    return next((at for at, one in enumerate(messages) if one["role"] not in ("system", "developer")), len(messages))


def next_hidden(messages: Messages, num_hidden: int) -> int | None:
    """How many to hide so that one turn less is shown: a call goes with its results, and what is shown begins with the
    user. None: there is no more that may go."""
    rest = messages[num_system(messages) :]
    last = _last_user(rest)
    starts = [at for at, one in enumerate(rest) if one["role"] != "tool"]
    for at in starts:
        begins_well = at > last or rest[at]["role"] == "user"  # behind the last one, that is shown first
        if begins_well and at > num_hidden and hidden(rest, at) > hidden(rest, num_hidden):
            return at
    return None


def hidden(rest: Messages, num_hidden: int) -> int:
    """Messages that are really not shown."""
    return num_hidden - (0 <= _last_user(rest) < num_hidden)


def drop_notice(num: int) -> str:
    what = "1 earlier message" if num == 1 else f"{num} earlier messages"
    return f"[Notice: {what} of this conversation can't be seen any more: the context is full.]"


def summary_notice(num: int, summary: str) -> str:
    what = "1 earlier message" if num == 1 else f"{num} earlier messages"
    return f"[Notice: in place of {what} of this conversation, this summary of them: {summary}]"


def narrowed(
    messages: Messages, window: AgentWindow, fits: Callable[[list[dict[str, Any]]], bool]
) -> AgentWindow | None:
    """The window that hides as little as needed; None: not even the last turn fits."""
    found = window
    while not fits(view(messages, found)):
        further = narrower(messages, found)
        if further is None:
            return None
        found = further
    return found


def narrower(messages: Messages, window: AgentWindow) -> AgentWindow | None:
    """One turn less; None: there is no more that may go."""
    at = next_hidden(messages, window.start)
    if at is None:
        return None
    num = hidden(messages[num_system(messages) :], at)
    return AgentWindow(start=at, num_hidden=num, notice=drop_notice(num))


def hidden_messages(messages: Messages, window: AgentWindow, before: AgentWindow) -> list[Mapping[str, Any]]:
    """Those that `window` hides and `before` did not."""
    rest = messages[num_system(messages) :]
    last = _last_user(rest)
    return [one for at, one in enumerate(rest[: window.start]) if at >= before.start and at != last]


def transcript(messages: Messages) -> str:
    """For a summary."""
    from llmasos.apps.agent.models import text_of

    lines = []
    for one in messages:
        text = text_of(one.get("content"))
        asked = [call["function"] for call in one.get("tool_calls") or ()]
        calls = "".join(f" [calls {call['name']} {call['arguments']}]" for call in asked)
        lines.append(f"{one['role']}: {text}{calls}")
    return "\n".join(lines)


def cut(text: str, most: int) -> str:
    """The beginning and the end of a long text, and how much is missing."""
    if len(text) <= most:
        return text
    head, tail = most * 3 // 4, most - most * 3 // 4
    left_out = f"\n[… {len(text) - most} of {len(text)} characters are left out here …]\n"
    return text[:head] + left_out + (text[-tail:] if tail else "")
