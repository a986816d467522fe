"""Messages of a chat as items of a conversation, and back."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmasos.apps.memory.tables import item_text

Message = dict[str, Any]
Item = dict[str, Any]


def items_of(messages: Sequence[Mapping[str, Any]]) -> list[Item]:
    found: list[Item] = []
    for message in messages:
        role, text = message["role"], _text(message.get("content"))
        if role == "tool":
            found.append(_item("fco", "function_call_output", call_id=message["tool_call_id"], output=text))
            continue
        if text or not message.get("tool_calls"):
            is_answer = role == "assistant"
            part = {"type": "output_text" if is_answer else "input_text", "text": text}
            content: list[dict[str, Any]] = [part | ({"annotations": []} if is_answer else {})]
            found.append(_item("msg", "message", role=role, content=content))
        for call in message.get("tool_calls") or ():
            function = call["function"]
            found.append(
                _item(
                    "fc",
                    "function_call",
                    call_id=call["id"],
                    name=function["name"],
                    arguments=function["arguments"],
                )
            )
    return found


def _item(kind: str, type: str, **fields: Any) -> Item:
    return {"id": f"{kind}_{secrets.token_hex(24)}", "type": type, "status": "completed", **fields}


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""


def messages_of(items: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Reasoning is left out: models are not shown that of earlier turns."""
    found: list[Message] = []
    names: dict[str, str] = {}
    for item in items:
        last = found[-1] if found else {}
        if item["type"] == "message":
            found.append({"role": item["role"], "content": item_text(item)})
        elif item["type"] == "function_call":
            names[item["call_id"]] = item["name"]
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if last.get("role") == "assistant":
                last.setdefault("tool_calls", []).append(call)
            else:
                found.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif item["type"] == "function_call_output":
            told = {"role": "tool", "tool_call_id": item["call_id"], "content": item_text(item)}
            found.append(told | ({"name": names[item["call_id"]]} if item["call_id"] in names else {}))
    return found
