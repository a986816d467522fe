"""From a Responses request to the conversation that is answered: items become chat messages.

What one turn of the assistant gave (reasoning, text, function calls) is one message for a chat template, so items that
follow each other are joined. Refuses by name what can't be done.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from llmasos.client.types import ChatCompletionRequest
from llmasos.client.types.response_items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputContent,
    InputItem,
    InputText,
    MessageItem,
    OtherItem,
    OutputTextInput,
    ReasoningInputItem,
    RefusalInput,
)
from llmasos.client.types.responses import AllowedTools, FunctionChoice, FunctionTool, InputRequest, ResponseRequest
from llmasos.errors import ContextOverflowError, InvalidInputError, LLMasOSError, UnsupportedError

INCLUDE_LOGPROBS = "message.output_text.logprobs"
INCLUDE_REASONING = "reasoning.encrypted_content"
_SEALED = "llmasos1."
_MAX_REASONING_BYTES = 4 * 2**20
_PARAMS = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_SAME = (
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "priority",
    "cache_salt",
    "temperature",
    "top_p",
    "top_logprobs",
    "stream",
    "user",
)


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def own_items(body: InputRequest) -> list[InputItem]:
    return [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input


def check(body: ResponseRequest) -> None:
    """Raises for wishes that contradict each other or that can't be granted, whatever the model."""
    for include in body.include or ():
        if include not in (INCLUDE_LOGPROBS, INCLUDE_REASONING):
            raise UnsupportedError(f"include: {include!r} is not supported.", hint="Leave it out.", param="include")
    if body.top_logprobs and INCLUDE_LOGPROBS not in (body.include or ()):
        raise InvalidInputError(f"top_logprobs needs {INCLUDE_LOGPROBS!r} in include.", param="top_logprobs")
    if body.background and body.store is False:
        raise InvalidInputError("background: true needs a stored response.", hint="Leave store out.", param="store")
    if body.stream_options is not None and not body.stream:
        raise InvalidInputError("stream_options needs stream: true.", param="stream_options")
    if body.conversation is not None and body.previous_response_id is not None:
        raise InvalidInputError(
            "previous_response_id and conversation were both given; send one.", param="previous_response_id"
        )
    if body.reasoning is not None and summary_asked(body) == "concise":
        raise UnsupportedError(
            "reasoning.summary: 'concise' is not supported.",
            hint="'auto' and 'detailed' give the reasoning itself.",
            param="reasoning.summary",
        )


def summary_asked(body: InputRequest) -> str | None:
    return (body.reasoning.summary or body.reasoning.generate_summary) if body.reasoning else None


def chat_request(body: InputRequest, before: Sequence[InputItem]) -> ChatCompletionRequest:
    """The conversation `before` and the request's own items as the one that is answered."""
    found = messages(body.instructions, before, own_items(body))
    if all(message["role"] == "system" for message in found):
        raise InvalidInputError("input holds no message.", param="input")
    fields: dict[str, Any] = {"model": body.model, "messages": found, **_tools(body)}
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _format(body)
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if isinstance(body, ResponseRequest):
        fields |= {name: value for name in _SAME if (value := getattr(body, name)) is not None}
        if INCLUDE_LOGPROBS in (body.include or ()):
            fields["logprobs"] = True
        else:
            fields.pop("top_logprobs", None)
        fields["max_completion_tokens"] = body.max_output_tokens
    try:
        return ChatCompletionRequest.model_validate(fields)
    except InvalidInputError as e:
        raise translated(e) from None


def translated(e: LLMasOSError) -> LLMasOSError:
    """The error with the name that its field has in this API."""
    if isinstance(e, InvalidInputError) and not isinstance(e, ContextOverflowError) and e.param:
        head, _, _ = e.param.partition(".")
        if head in _PARAMS:
            e.message = e.message.replace(repr(head), repr(_PARAMS[head]))
            e.param = _PARAMS[head]
    elif isinstance(e, ContextOverflowError):
        e.param = _PARAMS.get(e.param or "", e.param)
    return e


def messages(
    instructions: str | None, before: Sequence[InputItem], own: Sequence[InputItem], *, where: str = "input"
) -> list[dict[str, Any]]:
    """Chat messages of the items, with `instructions` first. Errors name `own` items by their place in `where`."""
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    if instructions is not None:
        found.append({"role": "system", "content": instructions})
    for i, item in enumerate([*before, *own], start=-len(before)):
        place = f"{where}.{i}" if i >= 0 else "previous_response_id"
        if isinstance(item, FunctionCallItem):
            names[item.call_id] = item.name
        elif isinstance(item, FunctionCallOutputItem) and item.call_id not in names:
            raise InvalidInputError(
                f"There is no function_call with the call_id {item.call_id!r} before its output.",
                param=f"{place}.call_id",
            )
        _add(found, item, place, names)
    return found


def _add(found: list[dict[str, Any]], item: InputItem, where: str, names: dict[str, str]) -> None:
    match item:
        case MessageItem(role="assistant"):
            message = _assistant(found, "content" in found[-1] if found else True)
            message["content"] = _text(item.content, where)
        case MessageItem():
            role = "system" if item.role == "developer" else item.role
            text = _text(item.content, where)
            if role == "system" and len(found) == 1 and found[0]["role"] == "system":
                found[0]["content"] += "\n\n" + text  # templates take one system message
            else:
                found.append({"role": role, "content": text})
        case FunctionCallItem():
            call = {"name": item.name, "arguments": item.arguments}
            message = _assistant(found, False)
            message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": call})
        case FunctionCallOutputItem():
            text = _text(item.output, where, "output")
            found.append({"role": "tool", "tool_call_id": item.call_id, "name": names[item.call_id], "content": text})
        case ReasoningInputItem():
            if text := _reasoning(item, where):
                message = _assistant(found, "content" in found[-1] or "tool_calls" in found[-1] if found else True)
                message["reasoning_content"] = message.get("reasoning_content", "") + text
        case OtherItem():
            raise UnsupportedError(f"Items of type {item.type!r} are not supported.", param=f"{where}.type")
        case _:  # what references stand for was put in their place before
            raise AssertionError(item)


def _assistant(found: list[dict[str, Any]], new: bool) -> dict[str, Any]:
    """The assistant's message that an item belongs to: the last one, unless a `new` one begins."""
    if new or not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant"})
    return found[-1]


def _text(content: str | Sequence[InputContent], where: str, field: str = "content") -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        match part:
            case InputText() | OutputTextInput():
                texts.append(part.text)
            case RefusalInput():
                texts.append(part.refusal)
            case _:
                raise UnsupportedError(
                    f"Content of type {part.type!r} is not supported yet.", param=f"{where}.{field}.{i}"
                )
    return "\n".join(texts)


def _reasoning(item: ReasoningInputItem, where: str) -> str:
    if item.content:
        return "".join(part.text for part in item.content)
    if item.encrypted_content:
        return unsealed(item.encrypted_content, where)
    return "\n\n".join(part.text for part in item.summary)


def sealed(reasoning: str) -> str:
    """What `encrypted_content` carries, so that a client that stores nothing here can give reasoning back.

    It is opaque, not secret: the same text stands readable beside it.
    """
    return _SEALED + base64.urlsafe_b64encode(zlib.compress(reasoning.encode())).decode("ascii")


def unsealed(text: str, where: str) -> str:
    """Raises InvalidInputError for what `sealed` did not make."""
    try:
        if not text.startswith(_SEALED):
            raise ValueError
        data = base64.b64decode(text.removeprefix(_SEALED), altchars=b"-_", validate=True)
        unpacker = zlib.decompressobj()
        found = unpacker.decompress(data, _MAX_REASONING_BYTES)
        if not unpacker.eof:
            raise ValueError
        return found.decode("utf-8")
    except (ValueError, binascii.Error, zlib.error):
        raise InvalidInputError(
            "This encrypted_content was not made by this server.",
            hint="Leave reasoning of other servers out.",
            param=f"{where}.encrypted_content",
        ) from None


def _format(body: InputRequest) -> dict[str, Any]:
    assert body.text is not None and body.text.format is not None
    asked = body.text.format
    if asked.type != "json_schema":
        return {"type": asked.type}
    fields = {"name": asked.name, "description": asked.description, "strict": asked.strict, "schema": asked.json_schema}
    return {"type": asked.type, "json_schema": fields}


def _tools(body: InputRequest) -> dict[str, Any]:
    tools = [_function(tool, i) for i, tool in enumerate(body.tools or ())]
    choice: Any = body.tool_choice
    match choice:
        case FunctionChoice():
            choice = {"type": "function", "function": {"name": choice.name}}
        case AllowedTools(mode=mode, tools=allowed):
            named = [{"type": "function", "function": {"name": str(tool.get("name"))}} for tool in allowed]
            choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        case None | str():
            pass
        case _:
            raise UnsupportedError(f"tool_choice: {choice.type!r} is not supported.", param="tool_choice")
    fields = {"tools": tools or None, "tool_choice": choice, "parallel_tool_calls": body.parallel_tool_calls}
    if choice in ("auto", "none") and not tools:  # OpenAI's answers say "auto" without tools, and clients repeat it
        fields["tool_choice"] = None
    return {name: value for name, value in fields.items() if value is not None}


def _function(tool: Any, index: int) -> dict[str, Any]:
    if not isinstance(tool, FunctionTool):
        raise UnsupportedError(
            f"The tool {tool.type!r} is not here.", hint="Tools of type 'function' are.", param=f"tools.{index}.type"
        )
    definition = tool.model_dump(exclude_none=True, exclude={"type"})
    return {"type": "function", "function": definition}


def stored(items: Sequence[InputItem]) -> Iterator[dict[str, Any]]:
    """The items as they are kept and listed: with ids, status and content in parts."""
    for item in items:
        match item:
            case MessageItem():
                kind = "output_text" if item.role == "assistant" else "input_text"
                content: Any = item.content
                if isinstance(content, str):
                    content = [{"type": kind, "text": content}]
                else:
                    content = [part.model_dump(exclude_none=True) for part in content]
                for part in content:
                    if part["type"] == "output_text":
                        part.setdefault("annotations", [])
                yield _entry(item, "msg", role=item.role, content=content)
            case FunctionCallItem():
                yield _entry(item, "fc", call_id=item.call_id, name=item.name, arguments=item.arguments)
            case FunctionCallOutputItem():
                output: Any = item.output
                if not isinstance(output, str):
                    output = [part.model_dump(exclude_none=True) for part in output]
                yield _entry(item, "fco", call_id=item.call_id, output=output)
            case ReasoningInputItem():
                more = item.model_dump(exclude_none=True, include={"content", "encrypted_content"})
                yield _entry(item, "rs", summary=[part.model_dump() for part in item.summary], **more)
            case _:
                raise AssertionError(item)


def _entry(item: Any, kind: str, **fields: Any) -> dict[str, Any]:
    return {"id": item.id or new_id(kind), "type": item.type, "status": item.status or "completed", **fields}
