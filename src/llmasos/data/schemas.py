"""What a row says: a text, a chat, a preference between two answers, an answer that is good or bad (KTO), an answer
with a score. The columns tell which; every row is checked, and what is wrong is said with its field and value.

    text            text
    messages        messages [tools]: a list of {role, content}; in a table it may be written as JSON
    sharegpt        conversations [system tools]: a list of {from, value}
    alpaca          instruction output [input system history]
    completion      prompt completion (or response; or question answer)
    preference      chosen rejected [prompt]: texts or lists of messages
    kto             prompt completion label; label is true or false
    reward          messages score, or prompt completion score
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from llmasos.data.readers import BEGINS, ENDS, DataFile
from llmasos.errors import FormatError, InvalidInputError
from llmasos.text.template import validate_messages

Kind: TypeAlias = Literal["text", "chat", "preference", "kto", "reward"]
Message: TypeAlias = "dict[str, Any]"
Fields: TypeAlias = "Mapping[str, Any]"
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}


@dataclass(frozen=True)
class Example:
    """One row, whatever file it came from."""

    kind: Kind
    text: str = ""
    messages: list[Message] = field(default_factory=list)
    """Of a preference: with the answer that is preferred."""
    rejected: list[Message] = field(default_factory=list)
    tools: list[Any] | None = None
    label: bool | None = None
    score: float | None = None
    is_plain: bool = False
    """A prompt and its completion, which need no chat template."""
    begins: bool = True
    ends: bool = True
    """Of a part of a long text: whether it is the first, the last."""


class RowError(FormatError):
    """`field` and `value` are what is wrong; `where`, put in front, is FILE:LINE."""

    def __init__(self, what: str, field: str = "", value: Any = None, *, where: str = "", hint: str = "") -> None:
        self.what, self.field, self.value, self.where = what, field, value, where
        shown = f": {_shown(value)}" if value is not None else ""
        super().__init__(f"{f'{where}: ' if where else ''}{f'{field} ' if field else ''}{what}{shown}.", hint=hint)

    def at(self, where: str) -> RowError:
        return RowError(self.what, self.field, self.value, where=where, hint=self.hint)


@dataclass(frozen=True)
class Schema:
    name: str
    kind: Kind
    columns: str
    """As the table above has them."""
    fits: Callable[[frozenset[str]], bool]
    convert: Callable[[Fields], Example]


def detect(columns: Iterable[str], *, where: str = "") -> Schema:
    """The schema of rows with these columns. Raises RowError with the columns that would do."""
    have = frozenset(columns)
    for schema in SCHEMAS.values():
        if schema.fits(have):
            return schema
    shown = ", ".join(sorted(have - {BEGINS, ENDS})) or "none"
    raise RowError(
        f"the columns ({shown}) are of no known schema",
        where=where,
        hint="Known: " + "; ".join(f"{one.name} ({one.columns})" for one in SCHEMAS.values())
        + ". Name them with --columns, e.g. --columns prompt=QUESTION,completion=ANSWER.",
    )  # fmt: skip


def schema_of(file: DataFile, name: str | None = None) -> Schema:
    """The schema called `name`, or the one of the file's first row. Raises RowError, or FormatError for no row."""
    if name:
        if name not in SCHEMAS:
            raise InvalidInputError(f"There is no schema {name!r}.", hint=f"Known: {', '.join(SCHEMAS)}.")
        return SCHEMAS[name]
    for line, fields in file.rows():
        return detect(fields, where=f"{file.name}:{line}")
    raise FormatError(f"{file.name} has no rows.", hint="Look into the file, or leave it out.")


def read(schema: Schema, fields: Fields, where: str) -> Example:
    """Raises RowError with `where`."""
    try:
        return schema.convert(fields)
    except RowError as e:
        raise e.at(where) from None


# --- values


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...") if isinstance(value, str) else text[:60]


def _text(fields: Fields, name: str, *, optional: bool = False) -> str:
    value = fields.get(name)
    if value is None and (optional or name in fields):
        if optional:
            return ""
        raise RowError("is null, where text is expected", name)
    if name not in fields:
        raise RowError(f"is missing; the row has {', '.join(map(str, fields)) or 'nothing'}", name)
    if not isinstance(value, str):
        raise RowError(f"is a {type(value).__name__}, not text", name, value)
    return value


def _filled(fields: Fields, name: str) -> str:
    value = _text(fields, name)
    if not value.strip():
        raise RowError("is empty", name, value)
    return value


def _list(fields: Fields, name: str) -> list[Any]:
    value = fields.get(name)
    if isinstance(value, str):  # a cell of a table
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError("is text and no JSON list", name, value) from None
    if name not in fields:
        raise RowError(f"is missing; the row has {', '.join(map(str, fields)) or 'nothing'}", name)
    if not isinstance(value, list) or not value:
        raise RowError("is empty" if value in ([], None) else f"is a {type(value).__name__}, not a list", name, value)
    return value


def _tools(fields: Fields) -> list[Any] | None:
    if str(fields.get("tools") or "").strip() in ("", "[]", "null"):
        return None
    tools = _list(fields, "tools")
    for at, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RowError(f"is a {type(tool).__name__}, not an object", f"tools[{at}]", tool)
    return tools


def _messages(fields: Fields, name: str, *, answered: bool = True) -> list[Message]:
    """Messages under either naming. `answered`: there must be an answer to learn."""
    found = [_message(one, f"{name}[{at}]") for at, one in enumerate(_list(fields, name))]
    try:
        validate_messages(found)
    except InvalidInputError as e:
        place = (e.param or "messages").replace("messages", name, 1)
        what = e.message.replace(e.param or "messages", "", 1).strip().rstrip(".")
        raise RowError(what, place, hint=e.hint) from e
    if answered and not any(one["role"] == "assistant" for one in found):
        raise RowError(f"has no message of the assistant, so there is nothing to learn ({len(found)} messages)", name)
    return found


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"is a {type(message).__name__}, not an object with role and content", name, message)
    speaker = message.get("role", message.get("from"))
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        field = f"{name}.{'role' if 'role' in message or 'from' not in message else 'from'}"
        raise RowError("is missing" if speaker is None else f"is none of {', '.join(ROLES)}", field, speaker)
    rest = {key: value for key, value in message.items() if key not in ("role", "from", "value") and value is not None}
    if "value" in message and "content" not in rest:
        if not isinstance(message["value"], str):
            raise RowError(f"is a {type(message['value']).__name__}, not text", f"{name}.value", message["value"])
        if speaker == "function_call":
            return {"role": role, "content": "", "tool_calls": _calls(message["value"], f"{name}.value")}
        rest["content"] = message["value"]
    return {"role": role, **rest}


def _calls(text: str, name: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(text)
        calls = calls if isinstance(calls, list) else [calls]
        return [
            {"type": "function", "function": {"name": str(call["name"]), "arguments": call.get("arguments", {})}}
            for call in calls
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RowError('is no call like {"name": ..., "arguments": {...}}', name, text) from None


def _side(fields: Fields, name: str, prompt: list[Message]) -> list[Message]:
    """A text answers the prompt; a list of messages goes on with it, or contains it."""
    value = fields.get(name)
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [*prompt, {"role": "assistant", "content": _filled(fields, name)}]
    messages = _messages(fields, name)
    return messages if not prompt or messages[: len(prompt)] == prompt else prompt + messages


def _prompt(fields: Fields, name: str) -> list[Message]:
    value = fields.get(name)
    if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{")):
        return _messages(fields, name, answered=False)
    return [{"role": "user", "content": _filled(fields, name)}]


# --- schemas


def _from_text(fields: Fields) -> Example:
    begins, ends = fields.get(BEGINS, True), fields.get(ENDS, True)
    text = _filled(fields, "text") if begins and ends else _text(fields, "text")
    return Example("text", text=text, begins=begins, ends=ends)


def _from_messages(fields: Fields) -> Example:
    return Example("chat", messages=_messages(fields, "messages"), tools=_tools(fields))


def _from_sharegpt(fields: Fields) -> Example:
    messages = _messages(fields, "conversations")
    system = _text(fields, "system", optional=True)
    if system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Example("chat", messages=messages, tools=_tools(fields))


def _from_alpaca(fields: Fields) -> Example:
    messages: list[Message] = []
    if (system := _text(fields, "system", optional=True)).strip():
        messages.append({"role": "system", "content": system})
    for at, turn in enumerate(fields.get("history") or []):
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(one, str) for one in turn)):
            raise RowError("is no pair of texts", f"history[{at}]", turn)
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = _filled(fields, "instruction")
    if (given := _text(fields, "input", optional=True)).strip():
        asked = f"{asked}\n\n{given}"
    answer = {"role": "assistant", "content": _filled(fields, "output")}
    return Example("chat", messages=[*messages, {"role": "user", "content": asked}, answer])


_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def _pair(fields: Fields) -> tuple[str, str]:
    return next((pair for pair in _PAIRS if fields.keys() >= set(pair)), _PAIRS[0])


def _from_completion(fields: Fields) -> Example:
    asked, answered = _pair(fields)
    is_plain = isinstance(fields.get(asked), str) and isinstance(fields.get(answered), str)
    messages = _side(fields, answered, _prompt(fields, asked))
    return Example("chat", messages=messages, tools=_tools(fields), is_plain=is_plain)


def _from_preference(fields: Fields) -> Example:
    prompt = _prompt(fields, "prompt") if "prompt" in fields else []
    chosen, rejected = _side(fields, "chosen", prompt), _side(fields, "rejected", prompt)
    if chosen == rejected:
        raise RowError("is the same as rejected, so nothing is preferred", "chosen", fields["chosen"])
    return Example("preference", messages=chosen, rejected=rejected, tools=_tools(fields))


def _from_kto(fields: Fields) -> Example:
    label = fields.get("label")
    if isinstance(label, str) and label.lower() in ("true", "false"):  # a cell of a table
        label = label.lower() == "true"
    if not isinstance(label, bool):
        raise RowError("is neither true nor false", "label", "null" if label is None else label)
    return Example("kto", messages=_from_completion(fields).messages, label=label)


def _from_reward(fields: Fields) -> Example:
    score = fields.get("score")
    try:
        number = math.nan if isinstance(score, bool) or score is None else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("is no number", "score", "null" if score is None else score)
    messages = _messages(fields, "messages") if "messages" in fields else _from_completion(fields).messages
    return Example("reward", messages=messages, score=number)


def _has(*names: str) -> Callable[[frozenset[str]], bool]:
    return lambda columns: columns >= set(names)


def _has_pair(*more: str) -> Callable[[frozenset[str]], bool]:
    return lambda columns: columns >= set(more) and any(columns >= set(pair) for pair in _PAIRS)


SCHEMAS = {
    one.name: one
    for one in (  # the more telling columns first
        Schema("preference", "preference", "chosen, rejected", _has("chosen", "rejected"), _from_preference),
        Schema("kto", "kto", "prompt, completion, label", _has_pair("label"), _from_kto),
        Schema(
            "reward",
            "reward",
            "messages, score",
            lambda columns: _has("messages", "score")(columns) or _has_pair("score")(columns),
            _from_reward,
        ),
        Schema("messages", "chat", "messages", _has("messages"), _from_messages),
        Schema("sharegpt", "chat", "conversations", _has("conversations"), _from_sharegpt),
        Schema("alpaca", "chat", "instruction, output", _has("instruction", "output"), _from_alpaca),
        Schema("completion", "chat", "prompt, completion", _has_pair(), _from_completion),
        Schema("text", "text", "text", _has("text"), _from_text),
    )
}
